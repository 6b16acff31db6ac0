"NoNN and DistrEE, checks 17-19, 22 and 23 of the acceptance list: graph, partition, arithmetic, aggregation, loss weights; resume and exactness of training."

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from helpers import refused

from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import load
from darkdistill_nb.distill.losses import CropFlip, Views, teacher_table
from darkdistill_nb.distree import students as distributed
from darkdistill_nb.distree.students import (
    DistrEE,
    DistrEELoss,
    Teacher,
    branch_weights,
    communities,
    filter_graph,
    make_answers,
    modularity,
    partition_filters,
    partition_report,
    strongest_links,
    student_net,
    system_answers,
    train_distree,
    transfer_loss,
)
from darkdistill_nb.exits.networks import vit, wrn
from darkdistill_nb.distree.policies import FeatureDifference
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.records import load_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(depth=10, widen=1, exits=(0, 1, 2, 3))


@pytest.fixture(scope="module")
def world():
    "A quarter of the digits, an untrained teacher (its answers are as good as any for arithmetic), its table and a division."
    train, test = load("digits", 320, 100)
    with Streams(0).scope("init"):
        net = wrn(10, 1, train.shape, 10, exits=(3,), pool=1).eval()
    table = teacher_table(Teacher(net), train, {"features": "last.reduce"})
    a = table["features"][0].float()
    return train, test, net, table, filter_graph(a, top=20), a.sum(0)


def make(parts, shape=(1, 8, 8), seed=0):
    with Streams(seed).scope("init"):
        return DistrEE(
            [student_net("wrn", shape, 10, len(p), **SMALL) for p in parts],
            [len(p) for p in parts],
            10,
        )


def test_check_17_edges_and_communities():
    W = filter_graph(torch.tensor([[1.0, 0.5, 0.5, 0.1]]))
    assert torch.allclose(
        W,
        torch.tensor(
            [[0, 0.25, 0.25, 0.09], [0.25, 0, 0, 0.02], [0.25, 0, 0, 0.02], [0.09, 0.02, 0.02, 0]]
        ).double(),
        atol=1e-7,
    )
    a = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    W = filter_graph(a, top=6)
    assert torch.equal(W, W.T) and not W.diagonal().any()
    assert torch.allclose(
        W, filter_graph(a[torch.randperm(50, generator=torch.Generator().manual_seed(1))], top=6)
    )
    slow = torch.zeros(12, 12).double()  # the definition, as a loop
    for row in a.double():
        row = row / row.max()
        best = row.topk(6).indices.tolist()
        for i in best:
            for j in best:
                if i != j:
                    slow[i, j] += row[i] * row[j] * (row[i] - row[j]).abs()
    assert torch.allclose(W, slow)
    two = torch.zeros(6, 6).double()
    for i, j in ((0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (2, 3)):
        two[i, j] = two[j, i] = 1
    assert communities(two) == [[0, 1, 2], [3, 4, 5]]
    assert abs(modularity(two, communities(two)) - 0.35714) < 1e-5


def test_modularity_is_that_of_networkx():
    import networkx as nx

    W = filter_graph(torch.rand(30, 15, generator=torch.Generator().manual_seed(2)), top=8)
    groups = communities(W, 1.3)
    assert (
        abs(
            modularity(W, groups, 1.3)
            - nx.community.modularity(nx.from_numpy_array(W.numpy()), groups, resolution=1.3)
        )
        < 1e-9
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_check_18_partition(n, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(60, 64, generator=g) ** 3 * torch.rand(64, generator=g)
    W, I = filter_graph(a, top=20), a.sum(0)
    parts, core = partition_filters(W, I, n), partition_filters(W, I, n, cover=False)
    assert len(parts) == n and sorted(sum(parts, [])) == list(range(64))
    assert len(set(sum(core, []))) == len(sum(core, [])) <= 64
    for p in (parts, core):
        load = torch.tensor([float(I[q].sum()) for q in p])
        assert load.max() <= 1.25 * load.mean() + 1e-6
    assert parts == partition_filters(W, I, n) and all(p == sorted(p) for p in parts)
    assert abs(sum(partition_report(parts, W, I)["importance"]) - 1) < 1e-3


def test_authors_rule_leaves_filters_out(world):
    *_, W, I = world
    parts = partition_filters(W, I, 2, rule="authors", resolution=1.0)
    report = partition_report(parts, W, I)
    assert report["left_out"] > 0 and sum(report["sizes"]) + report["left_out"] == len(W)
    with pytest.raises(ValueError, match="rule='best'"):
        partition_filters(W, I, 2, rule="best")


def test_check_19_arithmetic_of_the_student():
    s = student_net("wrn", (3, 32, 32), 10, 58, depth=16, exits=(0, 1, 2, 3, 4, 5, 6), bias=True)
    assert [c / 26_657_408 for c in s.macs(heads=False)] == pytest.approx(
        [0.0166, 0.1936, 0.3706, 0.5083, 0.6853, 0.8230, 1], abs=5e-4
    )
    added = sum(e.reduce[1].weight.numel() for e in s.exits[:-1])
    assert 0.05 < added / 175_626 < 0.07 and added / 26_657_408 < 0.01
    assert {e.reduce[1].out_features for e in s.exits} == {58}
    teacher = wrn(16, 4, exits=(6,), pool=1, bias=True)
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(2.75, abs=0.01)


def test_check_22_aggregation(world):
    train, test, *_, W, I = world
    system = make(partition_filters(W, I, 3))
    answers = system_answers(system, test)
    features = [f[-1] for f in answers.features]
    joint = system.joint(torch.cat(features, -1)).detach()
    assert torch.allclose(answers.joint(3), joint, atol=1e-5)
    S = len(test)
    full = torch.full((3, S), 3)
    present = torch.ones(3, S, dtype=torch.bool)
    present[1] = False
    features[1] = features[1].mean(0, keepdim=True).expand_as(features[1])
    assert torch.allclose(
        answers.logits(full, present, answers.means()),
        system.joint(torch.cat(features, -1)).detach(),
        atol=1e-5,
    )
    half = present.clone()
    half[1, ::2] = True  # a student may be missing for some images only
    z = answers.logits(full, half, answers.means())
    assert torch.allclose(z[::2], joint[::2], atol=1e-5)
    assert not torch.allclose(z[1::2], joint[1::2], atol=1e-3)
    assert torch.equal(
        answers.logits(full, present), answers.partial[[0, 2], 3].sum(0) + answers.bias
    )


def test_one_picture_or_many_give_the_same_answers(world):
    train, test, *_, W, I = world
    system = make(partition_filters(W, I, 2))
    many = system_answers(system, test, batch_size=64)
    one = system_answers(system, test, batch_size=1)
    assert torch.allclose(many.partial, one.partial, atol=1e-5)
    assert torch.allclose(many.proxy, one.proxy, atol=1e-5)
    rule, T = FeatureDifference(), [1.0]  # check 20: alone or in a batch, the same exit
    for s in rule.scores(many)[:, 1:3].transpose(0, 1).flatten(1).sort().values:
        widest = 60 + int(
            s[60:140].diff().argmax()
        )  # a threshold in the widest gap of the middle scores: no ties by rounding
        T.append(float(s[widest : widest + 2].mean()))
    T.append(0.0)
    assert torch.equal(rule.depth(many, T), rule.depth(one, T))
    assert len(rule.depth(many, T).unique()) > 1


def test_check_23_loss(world):
    train, test, net, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts).eval()
    x, y = train[:16]
    t = {k: v[0, :16].float() for k, v in table.items()}
    value = lambda **k: float(
        DistrEELoss(system, parts, local=False, **k)(system(x), t, y).detach()
    )
    only = [value(w=[float(i == e) for i in range(4)]) for e in range(4)]
    assert value(w=[1.0, 2, 3, 4]) == pytest.approx(
        sum((e + 1) * v for e, v in enumerate(only)), rel=1e-5
    )
    F_ = [f[-1] for f in system(x)]
    z = system.joint(torch.cat(F_, -1))
    p, q = (t["logits"] / 4).softmax(-1), (z / 4).log_softmax(-1)
    kd = 16 * (p * (p.log() - q)).sum(-1).mean()
    ce = -z.log_softmax(-1)[torch.arange(16), y].mean()
    unit = lambda v: v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    at = sum(
        (unit(t["features"][:, P]) - unit(f)).square().sum(-1).mean() for P, f in zip(parts, F_)
    )
    assert only[3] == pytest.approx(float(0.1 * ce + 0.9 * kd + 5 * at), rel=1e-5)
    before = [p.clone() for p in net.parameters()]
    DistrEELoss(system, parts)(system(x), t, y).backward()
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_local_heads_change_nothing_else(world):
    train, _, _, table, W, I = world
    parts, weights = partition_filters(W, I, 2), []
    for local in (True, False):
        system = make(parts)
        train_distree(
            system,
            DistrEELoss(system, parts, local=local),
            train,
            table,
            epochs=1,
            weight_decay=0.0,
            generator=torch.Generator().manual_seed(0),
        )
        weights.append(
            {
                k: v
                for k, v in system.state_dict().items()
                if ".norm." not in k and not (".exits." in k and ".fc." in k)
            }
        )
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_training_goes_on_where_it_stopped(world, tmp_path):
    train, _, _, _, W, I = world
    parts = partition_filters(W, I, 2)
    views = Views(train, CropFlip(1, flip=False), 2)
    with Streams(0).scope("init"):
        net = wrn(10, 1, train.shape, 10, exits=(3,), pool=1)
    table = teacher_table(Teacher(net), views, {"features": "last.reduce"})

    def run(stop, path=None):
        system = make(parts)
        loss = DistrEELoss(system, parts, drop=0.3, generator=torch.Generator().manual_seed(5))

        class Killed(Exception):
            pass

        def on_epoch(row, _):
            if row["epoch"] == stop:
                raise Killed

        try:
            train_distree(
                system,
                loss,
                views,
                table,
                3,
                generator=torch.Generator().manual_seed(1),
                checkpoint=path,
                on_epoch=on_epoch,
            )
        except Killed:
            pass
        return system

    whole = run(None)
    run(1, tmp_path / "c.safetensors")
    resumed = run(None, tmp_path / "c.safetensors")
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert len(load_tensors(tmp_path / "c.safetensors")[1]["rows"]) == 3


def test_missing_students_in_training(world):
    *_, W, I = world
    parts = partition_filters(W, I, 4)
    loss = DistrEELoss(make(parts), parts, drop=0.5, generator=torch.Generator().manual_seed(0))
    gone = loss.missing(4, 4000)
    assert (
        not gone.all(0).any() and abs(float(gone.float().mean()) - 0.375) < 0.02
    )  # one of four is always kept


def test_vit_students():
    train, test = load("digits", 200, 60)
    with Streams(1).scope("init"):
        teacher = vit(
            "vit_tiny_patch16_224",
            n_classes=10,
            exits=(2,),
            in_chans=1,
            img_size=(8, 8),
            patch_size=2,
            embed_dim=48,
            num_heads=3,
            depth=2,
        )
    table = teacher_table(Teacher(teacher), train, {"features": "last.reduce"})
    a = table["features"][0].float()
    parts = partition_filters(filter_graph(a.abs()), a.abs().sum(0), 2)
    arch = dict(patch_size=2, embed_dim=24, num_heads=3, depth=2, exits=(1, 2), relu=False)
    with Streams(2).scope("init"):
        system = DistrEE(
            [student_net("vit_tiny_patch16_224", train.shape, 10, len(p), **arch) for p in parts],
            [len(p) for p in parts],
            10,
        )
    rows = train_distree(
        system,
        DistrEELoss(system, parts),
        train,
        table,
        4,
        generator=torch.Generator().manual_seed(0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
        lr=3e-3,
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert system_answers(system, test).partial.shape == (2, 2, 60, 10)


def test_errors(world):
    train, _, _, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts)
    for bad, words in (
        (lambda: DistrEE([], [], 10), "equally many exits"),
        (lambda: DistrEELoss(system, parts[:1]), "parts have"),
        (lambda: DistrEELoss(system, parts, drop=1.0), "drop=1.0"),
        (lambda: partition_filters(W, I, 0), "n_parts=0"),
        (lambda: make_answers().logits(torch.zeros(2, 3).long()), "depth must have shape"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    with pytest.raises(FloatingPointError, match="lower lr=1000"):
        train_distree(system, DistrEELoss(system, parts), train, table, 2, lr=1000.0)
    assert math.isfinite(make_answers(seed=1).partial.sum())


# ---------------------------------------------------------------- checkpoints belong to one training


def lesson(
    world,
    file,
    lr=0.03,
    seed=0,
    order=1,
    epochs=2,
    batch_size=32,
    data=None,
    table=None,
    on_epoch=None,
    **loss,
):
    "A short training of two students with a checkpoint; (weights, rows)."
    train, _, _, told, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts, seed=seed)
    rows = train_distree(
        system,
        DistrEELoss(system, parts, **loss),
        data or train,
        table or told,
        epochs,
        lr,
        batch_size,
        generator=torch.Generator().manual_seed(order),
        checkpoint=file,
        on_epoch=on_epoch,
    )
    return system.state_dict(), rows


OTHERS = dict(
    rate=dict(lr=0.02),
    weights=dict(seed=7),
    order=dict(order=2),
    fewer=dict(epochs=1),
    more=dict(epochs=3),
    batches=dict(batch_size=64),
    beta=dict(beta=1.0),
    exits=dict(w="uniform"),
    dropout=dict(drop=0.2),
)


@pytest.mark.parametrize("name", OTHERS)
def test_another_training_is_not_taken_for_this_one(world, tmp_path, name):
    file = tmp_path / "c.safetensors"
    first, rows = lesson(world, file)
    again, same = lesson(world, file)
    assert same == rows and all(map(torch.equal, first.values(), again.values()))
    with pytest.raises(ValueError, match=r"another training.*delete .*c\.safetensors"):
        lesson(world, file, **OTHERS[name])


def test_other_images_or_answers_of_the_teacher_are_other_trainings(world, tmp_path):
    train, file = world[0], tmp_path / "c.safetensors"
    lesson(world, file)
    moved = ArrayData(train.x.flip(-1), train.y, train.classes, train.mean, train.std)
    with pytest.raises(ValueError, match="another data"):
        lesson(world, file, data=moved)
    with pytest.raises(ValueError, match="another table"):
        lesson(world, file, table={k: v + 1 for k, v in world[3].items()})


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b[:-9] + bytes([b[-9] ^ 64]) + b[-8:], lambda b: b"no"],
)
def test_a_damaged_checkpoint_is_named(world, tmp_path, damage):
    file = tmp_path / "c.safetensors"
    lesson(world, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"c\.safetensors .*delete it"):
        lesson(world, file)


def test_frozen_batch_normalisation_stays_frozen(world, tmp_path):
    "Statistics of a frozen student do not move, whatever `on_epoch` does to the modes; the other student trains."
    train, _, _, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts)
    system.students[0].eval().requires_grad_(False)
    before = {k: v.clone() for k, v in system.state_dict().items()}
    train_distree(
        system, DistrEELoss(system, parts), train, table, 2, on_epoch=lambda row, s: s.train()
    )
    moved = {k: not torch.equal(v, before[k]) for k, v in system.state_dict().items()}
    assert not any(v for k, v in moved.items() if k.startswith("students.0."))
    assert all(moved[k] for k in moved if k.startswith("students.1.") and "running_mean" in k)
    with pytest.raises(ValueError, match="all weights frozen"):
        train_distree(system.requires_grad_(False), DistrEELoss(system, parts), train, table)


def test_answers_leave_modes_alone(world):
    train, test, *_, W, I = world
    system = make(partition_filters(W, I, 2)).train()
    system.students[1].eval()
    modes = [m.training for m in system.modules()]
    system_answers(system, test)
    assert [m.training for m in system.modules()] == modes and True in modes and False in modes


def test_a_last_batch_of_one_is_refused_where_batch_normalisation_sees_one_number(world):
    "One image of one pixel leaves a batch normalisation with a single number; larger images are fine."
    train, _, _, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts)
    some = {k: v[:, :33] for k, v in table.items()}
    train_distree(system, DistrEELoss(system, parts), train.subset(slice(0, 33)), some, 1)
    tiny = ArrayData(torch.rand(33, 1, 4, 4), train.y[:33], train.classes)
    small = make(parts, shape=(1, 4, 4))
    with pytest.raises(ValueError, match="batch_size=32 must be another number"):
        train_distree(small, DistrEELoss(small, parts), tiny, some, 1)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("n", range(5, 9))
@pytest.mark.parametrize("cover", [True, False])
def test_nobody_is_left_without_filters(n, cover):
    "A few equal groups for more students: groups are halved until everybody has one."
    pairs = torch.block_diag(*[torch.ones(2, 2) - torch.eye(2)] * 5)
    assert all(partition_filters(pairs, torch.ones(10), n, cover=cover))
    lonely = torch.zeros(10)
    lonely[3] = 1.0
    assert all(partition_filters(pairs, lonely, n, cover=cover))


def test_the_authors_rule_has_no_empty_group():
    "Without lonely filters there is no group of them: two communities leave one, which is too few for two students."
    with pytest.raises(ValueError, match="only 1 groups"):
        partition_filters(
            torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)), torch.ones(7), 2, rule="authors"
        )


def test_numbers_of_numpy_are_numbers(world):
    *_, W, I = world
    assert partition_filters(W, I, np.int64(3)) == partition_filters(W, I, 3)
    assert torch.equal(strongest_links(W, np.float32(0.5)), strongest_links(W, 0.5))
    assert torch.equal(branch_weights(torch.tensor(4)), branch_weights(4))
    assert torch.equal(filter_graph(np.ones((3, 4))), filter_graph(torch.ones(3, 4)))
    assert (
        DistrEELoss(make([[0], [1]]), [[0], [1]], tau=np.float64(2), drop=np.float32(0.5)).tau == 2
    )


def system_and(**kw):
    parts = [[0, 1], [2]]
    system = make(parts)
    return DistrEELoss(system, kw.pop("parts", parts), **kw)


G3 = torch.ones(3, 3)
nan, inf = math.nan, math.inf
BAD = {
    "NaN activity": (lambda: filter_graph(torch.full((3, 4), nan)), "activity must be finite"),
    "no image": (lambda: filter_graph(torch.zeros(0, 4)), r"activity.shape=\(0, 4\)"),
    "one of the top": (lambda: filter_graph(torch.ones(3, 4), top=1), "top=1 must"),
    "half a top": (lambda: filter_graph(torch.ones(3, 4), top=2.5), "top=2.5 must"),
    "scale": (lambda: filter_graph(torch.ones(3, 4), scale="no"), "scale='no'"),
    "keep": (lambda: strongest_links(G3, nan), "keep=nan"),
    "keep 2": (lambda: strongest_links(G3, 1.5), "keep=1.5"),
    "no square": (lambda: strongest_links(torch.ones(2, 3)), "as many rows"),
    "NaN links": (lambda: strongest_links(G3 * nan), "W must be finite"),
    "negative": (lambda: communities(-G3), "W.min"),
    "one way": (lambda: communities(G3.triu()), "no direction"),
    "resolution": (lambda: communities(G3, nan), "resolution=nan"),
    "seed": (lambda: communities(G3, seed=0.5), "seed=0.5"),
    "groups": (lambda: modularity(G3, [[0, 1]]), "all 3 nodes"),
    "twice": (lambda: modularity(G3, [[0, 1, 1]]), "stands twice"),
    "NaN importance": (
        lambda: partition_filters(G3, torch.full((3,), nan), 2),
        "importance must be finite",
    ),
    "no importance": (lambda: partition_filters(G3, torch.zeros(3), 2), "somewhere above 0"),
    "negative importance": (
        lambda: partition_filters(G3, torch.tensor([1.0, 1, -1]), 2),
        "nowhere negative",
    ),
    "other importance": (lambda: partition_filters(G3, torch.ones(4), 2), "len\\(importance\\)=4"),
    "no links": (lambda: partition_filters(0 * G3, torch.ones(3), 2), "at least one link"),
    "parts": (lambda: partition_filters(G3, torch.ones(3), 1.5), "n_parts=1.5"),
    "cover": (lambda: partition_filters(G3, torch.ones(3), 1, cover=1), "cover=1"),
    "a resolution": (
        lambda: partition_filters(G3, torch.ones(3), 1, resolution=-1),
        "resolution=-1",
    ),
    "report": (lambda: partition_report([[0], []], G3, torch.ones(3)), "none of them empty"),
    "report 2": (lambda: partition_report([[0], [3]], G3, torch.ones(3)), "at most 2"),
    "student": (lambda: student_net("wrn", (1, 8, 8), 10, 0), "length=0"),
    "relu": (lambda: student_net("wrn", (1, 8, 8), 10, 3, relu=None), "relu=None"),
    "sizes": (
        lambda: DistrEE(make([[0], [1]]).students, [1, 2], 10),
        "lengths of the students' features",
    ),
    "classes": (lambda: DistrEE(make([[0]]).students, [1], 0), "n_classes=0"),
    "students": (lambda: DistrEE([torch.nn.ReLU()], [1], 3), "EarlyExitNets"),
    "transfer": (lambda: transfer_loss(torch.ones(3, 1), torch.ones(3, 2)), "student.shape"),
    "exits": (lambda: branch_weights(-5), "n_exits=-5"),
    "kind": (lambda: branch_weights(3, "x"), "kind='x'"),
    "alpha": (lambda: system_and(alpha=1.1), "alpha=1.1"),
    "tau": (lambda: system_and(tau=0), "tau=0"),
    "tau inf": (lambda: system_and(tau=inf), "tau=inf"),
    "beta": (lambda: system_and(beta=nan), "beta=nan"),
    "drop": (lambda: system_and(drop=-0.1), "drop=-0.1"),
    "w": (lambda: system_and(w=[1, nan, 1, 1]), "w must be finite"),
    "w 2": (lambda: system_and(w=[0, 0, 0, 0]), "somewhere above 0"),
    "w 3": (lambda: system_and(w=[1, -1, 1, 1]), "nowhere negative"),
    "local": (lambda: system_and(local="x"), "local='x'"),
    "generator": (lambda: system_and(generator=3), "generator=3"),
    "filter": (lambda: system_and(parts=[[0, 1], [1]]), "stands twice"),
    "answers": (lambda: make_answers(2, 0), "n_exits=0"),
    "half": (lambda: make_answers(n=1.5), "n=1.5"),
    "seeds": (lambda: make_answers(seed=-1), "seed=-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_in_one_sentence(name):
    call, words = BAD[name]
    refused(call, words)


A4 = make_answers(2, 3, 5, 4, length=6)
PARTS = dict(
    partial=A4.partial[0],
    bias=torch.zeros(3),
    proxy=A4.proxy[:, :2],
    y=A4.y[:2],
    costs=-A4.costs,
    sizes=[6],
    features=[A4.features[0]] * 3,
)


@pytest.mark.parametrize("name", PARTS)
def test_a_table_of_answers_fits_together(name):
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(A4, **{name: PARTS[name]})
    if torch.is_tensor(v := getattr(A4, name)) and v.is_floating_point():
        with pytest.raises(ValueError, match="must be finite"):
            dataclasses.replace(A4, **{name: v * nan})


SETTINGS = dict(epochs=1.5, lr=nan, batch_size=0, weight_decay=-1, amp="x", generator=3)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_training(world, name):
    train, _, _, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts)
    with pytest.raises(ValueError, match=f"{name}="):
        train_distree(system, DistrEELoss(system, parts), train, table, **{name: SETTINGS[name]})


def test_what_does_not_belong_together_is_refused_before_training(world):
    train, _, _, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts)
    go = functools.partial(train_distree, system, DistrEELoss(system, parts))
    for bad, words in (
        (lambda: go(train, {"logits": table["logits"]}), "'features'"),
        (lambda: go(train, {k: v * nan for k, v in table.items()}), "finite"),
        (lambda: go(train.subset(slice(0, 0)), table), "with samples"),
        (lambda: go(None, table), "ArrayData"),
        (
            lambda: train_distree(make(parts), DistrEELoss(system, parts), train, table),
            "of this system",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            bad()


# ---------------------------------------------------------------- by hand, one claim each


def blocks(*sizes):
    return torch.block_diag(*[torch.ones(n, n) - torch.eye(n) for n in sizes])


def test_negative_activity_counts_as_none():
    W = filter_graph(torch.tensor([[-1.0, 1.0, 0.5]]))
    assert not W[0].any() and W[1, 2] == pytest.approx(0.25)


def test_the_strongest_links_are_a_share_of_those_that_exist():
    W = torch.zeros(4, 4)
    for i, w in enumerate((1.0, 2.0, 3.0)):
        W[i, i + 1] = W[i + 1, i] = w
    assert strongest_links(W, 0.34).nonzero().tolist() == [[2, 3], [3, 2]]
    assert len(strongest_links(W, 1.0).nonzero()) == 6


def test_communities_come_largest_first():
    assert communities(blocks(3, 4)) == [[3, 4, 5, 6], [0, 1, 2]]


def test_the_lightest_student_gets_the_next_group():
    "By importance, not by number; and a heavy group is halved alternately."
    I = torch.tensor([4.0, 1, 1, 1, 1])
    assert distributed._spread([[i] for i in range(5)], I, 2) == [[0], [1, 2, 3, 4]]
    assert distributed._split([[0, 1, 2, 3], [4]], torch.tensor([4.0, 3, 2, 1, 9])) == [
        [4],
        [0, 2],
        [1, 3],
    ]


def test_the_authors_rule_drops_the_largest_group_and_reads_resolution_the_old_way(monkeypatch):
    W, seen, real = blocks(5, 4, 3), [], distributed.communities

    def watched(G, resolution, seed):
        seen.append(resolution)
        return real(G, resolution, seed)

    monkeypatch.setattr(distributed, "communities", watched)
    assert partition_filters(W, torch.ones(12), 2, rule="authors") == [[5, 6, 7, 8], [9, 10, 11]]
    assert seen == [pytest.approx(1 / 0.7)]


@pytest.mark.parametrize("kind", ["rising", "uniform", "last"])
def test_weights_of_the_exits_add_up_to_their_number(kind):
    for n in (1, 2, 4, 7, 9):
        assert float(branch_weights(n, kind).sum()) == pytest.approx(n, rel=1e-6)


def test_a_missing_student_is_its_mean_and_local_heads_count_once(world, monkeypatch):
    train, _, _, table, W, I = world
    parts = partition_filters(W, I, 2)
    system = make(parts).eval()
    x, y = train[:16]
    t, f = {k: v[0, :16].float() for k, v in table.items()}, system(x)
    loss = DistrEELoss(system, parts, w=[0, 0, 0, 1.0], beta=0.0, drop=0.5, local=False)
    gone = torch.zeros(2, 16, dtype=torch.bool)
    gone[1, ::2] = True
    monkeypatch.setattr(loss, "missing", lambda N, B: gone)
    second = system.partial(1, f[1][-1])
    second = torch.where(gone[1][:, None], second.mean(0), second)
    z = system.partial(0, f[0][-1]) + second + system.joint.bias
    assert float(loss(f, t, y).detach()) == pytest.approx(
        float(loss.kd(z, t["logits"], y).detach()), rel=1e-5
    )
    both = [float(DistrEELoss(system, parts, local=v)(f, t, y).detach()) for v in (True, False)]
    heads = [
        [float(loss.kd(v, t["logits"], y).detach()) for v in s.classify(list(g))]
        for s, g in zip(system.students, f)
    ]
    assert both[0] - both[1] == pytest.approx(sum(sum(h) / len(h) for h in heads), rel=1e-3)

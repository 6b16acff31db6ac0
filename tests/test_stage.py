"""The stage of the default experiment: pooled exits, other shapes, the stored start, its settings and measurements."""

import dataclasses, hashlib
import pytest
import torch
from darkdistill_nb.experiments.settings import OPTIONS
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.scenes import outlines, shapes
from darkdistill_nb.core.other_shapes import outline_overlap, random_outlines, random_shapes
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.records import asset, load_record, load_tensors, save_tensors
from darkdistill_nb.exits.networks import Exit, PooledMap, cnn
from darkdistill_nb.exits.training import BoostNet
from darkdistill_nb.experiments import stage as page
from darkdistill_nb.experiments.stage import SETTINGS, shapes_stage, start_network
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, make_clients
from darkdistill_nb.federated.alignment import handled, tier_models, unalignment

pytestmark = pytest.mark.usefixtures("one_thread")


def digest(tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().numpy().tobytes())
    return h.hexdigest()


# cnn


def test_cnn_without_pool_is_what_it_was():
    "The first weights and outputs of the default network, as a network built by hand gives them."
    torch.manual_seed(3)
    net = cnn((3, 16, 16), 10, width=8)
    torch.manual_seed(3)
    stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
    stages = [type(net.stages[0])(8) for _ in range(4)]
    exits = [Exit(PooledMap(4), 128, 10) for _ in range(4)]
    by_hand = type(net)(stem, stages, exits, (3, 16, 16), 10)
    assert digest(net.state_dict().values()) == digest(by_hand.state_dict().values())
    x = torch.randn(2, 3, 16, 16)
    assert all(map(torch.equal, net(x), by_hand(x)))


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pool_sets_the_features_of_every_exit(pool):
    net = cnn((3, 16, 16), 7, width=8, pool=pool)
    x = torch.randn(3, 3, 16, 16)
    assert [tuple(a.shape) for a in net.features(net.stem(x))] == [(3, 8 * pool**2)] * 4
    assert [tuple(o.shape) for o in net(x)] == [(3, 7)] * 4


def test_an_exit_of_pool_1_does_not_know_where():
    "The same map with its cells in another order gives the same logits; with the 4x4 grid it does not."
    for pool, same in ((1, True), (4, False)):
        e = cnn((3, 16, 16), 7, width=8, pool=pool).exits[0]
        z = torch.randn(2, 8, 8, 8)
        moved = z.flatten(2)[..., torch.randperm(64)].view_as(z)
        assert torch.allclose(e(z), e(moved), atol=1e-5) == same


# other shapes

TEN = list(zip(*outlines()))


def test_the_shapes_of_before_are_the_same_bits():
    "The drawing takes tables of outlines now; nobody's images changed."
    found = shapes(100, 5, size=16)
    assert hashlib.sha256(found.x.numpy().tobytes()).hexdigest() == SHAPES_100


SHAPES_100 = "ede5480b034cb85eb2e5de9a82565bb2109165a9a80af6c09c427be515ba8369"


def test_no_random_outline_is_one_of_the_ten():
    "By areas counted on another, finer grid and with other rotations than those that chose them."
    for o in list(zip(*random_outlines()))[::5]:
        assert max(outline_overlap(o, a, turns=45, grid=64) for a in TEN) < 0.83


def test_random_outlines_differ_among_themselves():
    others = list(zip(*random_outlines()))[:8]
    for i, a in enumerate(others):
        assert max(outline_overlap(a, b) for b in others[i + 1 :] + [TEN[1]]) <= 0.86


def test_overlap_sees_through_rotation_mirror_and_size():
    star = tuple(0.6 * r.roll(171).flip(0) for r in TEN[8])
    assert outline_overlap(TEN[8], star) > 0.93
    assert outline_overlap(TEN[8], TEN[6]) < 0.6


def test_a_smaller_most_is_kept():
    strict = list(zip(*random_outlines(4, 1, most=0.75)))
    assert max(outline_overlap(o, a) for o in strict for a in TEN) <= 0.76


def test_random_shapes_do_not_depend_on_how_many():
    a, b = random_shapes(250, 2, size=16), random_shapes(101, 2, size=16)
    assert torch.equal(a.x[:101], b.x) and torch.equal(a.y[:101], b.y)
    assert a.y.bincount().max() - random_shapes(300, 2, size=16).y.bincount().min() <= 1
    assert not torch.equal(a.x[:100], shapes(100, 2, size=16).x)


def test_random_shapes_obey_difficulty():
    a, b = random_shapes(100, 2, 0.0, 16), random_shapes(100, 2, 0.9, 16)
    assert torch.equal(a.y, b.y) and not torch.equal(a.x, b.x)
    assert (a.difficulty == 0).all() and (b.difficulty == torch.tensor(0.9)).all()


# the start


def test_the_stored_start_is_the_one_of_its_record():
    file = asset("stage_start.safetensors")
    record = load_record(asset("stage_start.json"))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record.info["sha256"]
    assert file.stat().st_size < 50_000
    assert all(v.dtype == torch.float16 for v in load_tensors(file)[0].values())
    valid = record.runs[0]["valid"]
    assert valid == sorted(valid) and valid[0] > 5 / 30  # better than chance, and rising with depth


def test_start_is_read_and_exits_are_drawn():
    def build(seed):
        with Streams(seed).scope("init"):
            return start_network()

    a, b, c = build(0), build(0), build(1)
    own = [k for k in a.state_dict() if k.startswith("exits.")]
    for k, v in a.state_dict().items():
        assert torch.equal(v, b.state_dict()[k])
        drawn = k in own and k.split(".")[2] == "fc"
        assert torch.equal(v, c.state_dict()[k]) != drawn, k
    stored = load_tensors(asset("stage_start.safetensors"))[0]
    assert all(torch.equal(v.float(), a.state_dict()[k]) for k, v in stored.items())


def test_start_fits_other_numbers_of_classes():
    assert start_network(37)(torch.randn(2, 3, 16, 16))[3].shape == (2, 37)


def test_a_damaged_start_is_refused(tmp_path):
    tensors, meta = load_tensors(asset("stage_start.safetensors"))
    file = tmp_path / "s.safetensors"
    save_tensors(file, {k: v for k, v in tensors.items() if "stages.2" not in k}, meta)
    with pytest.raises(ValueError, match="all weights of stem and stages"):
        start_network(10, file)
    whole = asset("stage_start.safetensors").read_bytes()
    file.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    with pytest.raises(ValueError, match="whole safetensors"):
        start_network(10, file)


def test_pretraining_is_repeatable(tmp_path):
    how = dict(n_train=200, n_valid=100, epochs=1)
    a, b = (page.pretrain(tmp_path / str(i), tmp_path / f"assets{i}", **how) for i in range(2))
    assert a.info["sha256"] == b.info["sha256"]
    assert start_network(5, tmp_path / "assets1" / "stage_start.safetensors").n_classes == 5


# the stage


def test_settings_are_those_of_the_command_line():
    "Every setting can be typed as an option, and is allowed there."
    flat = {**SETTINGS["data"], **SETTINGS["train"], "rounds": SETTINGS["rounds"], "net": page.NET}
    for k, v in flat.items():
        assert OPTIONS[k].value(v) == v


def test_stage_is_the_one_described():
    s = shapes_stage()
    assert (len(s.train), len(s.test), s.train.shape, s.rounds) == (4000, 2000, (3, 16, 16), 20)
    assert float(s.train.difficulty.max()) <= 0.4
    m = s.method()
    assert (m.lr, m.decay, m.momentum, m.weight_decay) == (0.1, 0.95, 0.9, 1e-4)
    assert (m.batch_size, m.epochs, m.participation) == (32, 1, 0.5)
    assert isinstance(m.objective, BoostNet) and (m.objective.w, m.objective.ge) == (0.2, "full")
    clients = s.clients(0)
    assert sorted(c.tier for c in clients) == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    by_hand = make_clients(s.train.y, 20, 0.5, (0.25,) * 4, valid=0.2, seed=0)
    assert all(torch.equal(a.train, b.train) for a, b in zip(clients, by_hand))


def test_changes_stay_with_their_stage():
    assert shapes_stage(lr=0.05, gamma=2.0).settings["train"]["lr"] == 0.05
    assert shapes_stage().settings == {k: v for k, v in SETTINGS.items()}
    assert SETTINGS["train"]["lr"] == 0.1 and SETTINGS["data"]["gamma"] == 0.5


# unalignment


@pytest.fixture(scope="module")
def small():
    "Two rounds with few images."
    s = dataclasses.replace(shapes_stage(rounds=2))
    clients = s.clients(1)
    torch.set_num_threads(1)
    run = simulate(s.method(), s.build, s.train, s.test, clients, 2, 1, eval_every=2)
    return s, clients, run, tier_models(run.method, run.state, s.train, clients, 2, Streams(1))


def test_tier_models_average_to_the_next_global_model(small):
    "What `tier_models` gives is what one more round of the same run gives."
    s, clients, run, (nets, net) = small
    more = simulate(s.method(), s.build, s.train, s.test, clients, 3, 1, eval_every=3)
    assert all(torch.equal(v, more.state["net"][k]) for k, v in net.state_dict().items())
    assert [len(nets[m]) for m in sorted(nets)] == [1, 2, 3, 4]


def test_tier_models_leave_the_run_alone(small):
    s, clients, run, _ = small
    before = digest(run.state["net"].values())
    tier_models(run.method, run.state, s.train, clients, 2, Streams(1))
    assert digest(run.state["net"].values()) == before


def test_null_of_one_network_is_the_partition_rule(small):
    "Equal tier models: no difference to the null, although the naive difference is far from 0."
    s, _, run, (nets, net) = small
    few = s.test.subset(slice(0, 400))
    u = unalignment({m: net.prefix(m) for m in nets}, net, run.method.objective, few)
    assert set(u["difference"].values()) == {0.0}
    assert u["naive"] == u["null"] and u["null"][2] > 0


def test_handled_means_add_up(small):
    "Means of the exits, weighted by their shares, are the mean of all."
    s, _, run, (nets, net) = small
    few, d = s.test.subset(slice(0, 400)), torch.rand(400)
    from darkdistill_nb.core.training import predict
    from darkdistill_nb.exits.training import exit_partition

    logits = run.method.objective.predict(list(predict(net, few)))
    n = [len(p) for p in exit_partition(logits)]
    means = handled(net, run.method.objective, few, d)
    assert sum(a * b for a, b in zip(n, means)) / 400 == pytest.approx(float(d.mean()), abs=1e-6)


def test_unalignment_needs_the_deepest_tier(small):
    s, _, run, (nets, net) = small
    with pytest.raises(ValueError, match="tier 4"):
        unalignment({1: nets[1]}, net, run.method.objective, s.test)


# the stored measurements


def test_stored_measurements_are_of_this_stage():
    record = load_record(asset("stage_shapes.json"))
    assert record.config["settings"] == SETTINGS
    runs = {(r["method"], r["seed"]): r for r in record.runs}
    assert {m for m, _ in runs} >= {"control", "calibrated, votes"}
    for r in runs.values():
        assert r["costs"] == shapes_stage().build().macs()
        for shares in r["difficulty"].values():
            assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("name", page.METHODS)
def test_every_method_of_the_stage_can_be_made(name):
    "Options that a class has renamed would be found only after minutes of training."
    kind, options = page.METHODS[name]
    assert isinstance(shapes_stage().method(kind, **options), EEFL)

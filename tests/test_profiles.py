"""DarkDistill by its options: each of the places in which slides and released code differ is one, and does what it says."""

import copy, math
import pytest, torch
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.registry import METHODS, grouped
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet
from darkdistill_nb.federated.darkdistill import RELEASED, DarkDistill
from darkdistill_nb.federated.difficulty import (
    CAP,
    Assessment,
    DifficultyHistogram,
    DifficultyPairs,
    measure_difficulty,
    sample_difficulty,
)
from darkdistill_nb.federated.generator import GeneratorSettings, found_difficulty
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import make_clients
from darkdistill_nb.federated.parallel_variant import DarkDistillPL
from darkdistill_nb.federated.privacy import PrivateDarkDistill

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(participation=1.0, kd_lr=0.3, kd_steps=2, server_batch=32)
TINY = dict(d_eps=4, d_h=8)


@pytest.fixture(scope="module")
def world():
    train, test = load("digits", n_train=240, n_test=60)
    return train, test, make_clients(train.y, 6, gamma=5.0, tiers=(0.5, 0.5))


def go(world, rounds=2, **options):
    train, test, clients = world
    how = {k: options.pop(k) for k in ("workers", "stack", "checkpoint") if k in options}
    settings = grouped(DarkDistill, {**TINY, **SMALL, **options})
    build = lambda: cnn(train.shape, 10, stages=2, width=8)
    return simulate(
        DarkDistill(**settings), build, train, test, clients, rounds, progress=False, **how
    )


def weights(run):
    return torch.cat([v.flatten().double() for _, v in sorted(run.state["net"].items())])


@pytest.fixture(scope="module")
def usual(world):
    return weights(go(world))


EACH = {
    "seen_by": "local",
    "seen_at": "all",
    "upload": "pairs",
    "reference": "deepest",
    "leak": 0.0,
    "unit": 1.0,
    "weights": "released",
    "dif": "mse",
    "lam_div": 1.0,
    "norm": "batch",
}


@pytest.mark.parametrize("name", EACH)
def test_each_option_changes_what_is_learned(name, world, usual):
    other = weights(go(world, **{name: EACH[name]}))
    assert other.isfinite().all() and not torch.equal(other, usual)


def test_one_pair_has_no_order(world, usual):
    "Two tiers are one pair: the sequence of pairs cannot matter, bit for bit."
    assert torch.equal(weights(go(world, progressive="sequential")), usual)


@pytest.mark.parametrize(
    "order, turns",
    [("joint", [[1, 2, 3]] * 4), ("sequential", [[1], [1], [2], [2], [3], [3]] * 2)],
)
def test_pairs_step_together_or_one_after_the_other(order, turns):
    "Two server epochs of two distillation steps: a pair takes all its steps of an epoch before the next begins."
    train, test = load("digits", n_train=240, n_test=60)
    clients = make_clients(train.y, 8, gamma=5.0)
    seen = []

    class Watched(DarkDistill):
        def _distil(self, pairs, *rest):
            seen.append(list(pairs))
            return super()._distil(pairs, *rest)

    m = Watched(
        progressive=order, generator=GeneratorSettings(**TINY), **{**SMALL, "server_batch": 64}
    )
    build = lambda: cnn(train.shape, 10, width=8)
    run = simulate(m, build, train, test, clients, 1, progress=False)
    assert seen == turns
    assert run.log[0]["server_step"] == "1 -> 2, 2 -> 3, 3 -> 4"


@pytest.mark.parametrize("ce, same", [("all", True), ("routed", False)])
def test_the_partition_of_the_routed_class_loss_is_the_methods(ce, same):
    "Nothing is distilled here, so P can reach the generators by their class loss alone."
    train, test = load("digits", n_train=240, n_test=60)
    clients = make_clients(train.y, 6, gamma=5.0, tiers=(0.34, 0.33, 0.33))
    build = lambda: cnn(train.shape, 10, stages=3, width=8)

    def generator(P):
        m = DarkDistill(**grouped(DarkDistill, {**TINY, **SMALL, "kd_lr": 0.0, "P": P, "ce": ce}))
        return simulate(m, build, train, test, clients, 1, progress=False).state["server"]

    few, many = generator(1), generator(30)
    assert all(torch.equal(few[k], many[k]) for k in few if k.startswith("gen1."))  # one exit
    assert same == all(torch.equal(few[k], many[k]) for k in few if k.startswith("gen2."))


def test_no_leak_and_no_unit_are_the_plain_cross_entropy():
    z, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4
    a, b = (z.clone().requires_grad_() for _ in range(2))
    found_difficulty(a, y, 0.0).sum().backward()
    torch.nn.functional.cross_entropy(b, y, reduction="sum").backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)
    g = GeneratorSettings(unit=1.0, **TINY).build((3,), 4).eval()
    wide = copy.deepcopy(g)
    wide.unit = 10.0
    eps, d = torch.rand(5, 4), torch.ones(5)
    assert torch.equal(g(y, d, eps), wide(y, 10 * d, eps))


def method(**options):
    train, _ = load("digits", n_train=120, n_test=20)
    m = DarkDistill(**grouped(DarkDistill, {**TINY, **SMALL, **options}))
    with Streams(0).scope("init"):
        net = cnn(train.shape, 10, stages=2, width=8)
    return m, m.setup(net), train


def visit(m, state, train, tier=2):
    client = make_clients(train.y, 2, gamma=100.0, tiers=(0.5, 0.5))[0]
    client.tier = tier
    sent, data = m.send(state, client), train.subset(client.train)
    return m.check_update(m.local_update(sent, data, client, 0, Streams(0)), sent, client), data


def test_local_difficulties_are_those_of_the_last_epoch():
    """With a rate of 0 the local model stays the received one: its losses are those, in the order of the batches;
    in training mode no layer of this network behaves otherwise."""
    m, state, train = method(seen_by="local", upload="pairs", lr=0.0, epochs=3)
    update, data = visit(m, state, train)
    d, y = update.extra["difficulties"], update.extra["labels"].long()
    assert len(d) == len(data) and torch.equal(y.sort().values, data.y.sort().values)
    wanted = measure_difficulty(m.tier_net(2), BoostNet(), data)
    assert torch.allclose(d.sort().values, wanted.sort().values, atol=1e-5)
    assert "local_loss" not in vars(m)  # nothing is left behind


def test_the_last_epoch_is_the_one_that_counts():
    "Three epochs of training make the client's own images easier than one."
    make = lambda n: method(seen_by="local", upload="pairs", epochs=n)
    one, three = (visit(*make(n))[0].extra["difficulties"] for n in (1, 3))
    assert len(one) == len(three) and three.mean() < one.mean()


def test_local_training_is_the_same_when_it_is_watched():
    (m, state, train), (other, _, _) = method(seen_by="local"), method()
    a, b = visit(m, state, train)[0], visit(other, state, train)[0]
    assert all(torch.equal(a.weights[k], v) for k, v in b.weights.items()) and a.loss == b.loss
    assert not torch.equal(a.extra["histogram"], b.extra["histogram"])


def test_an_error_in_training_leaves_nothing_behind():
    m, state, train = method(seen_by="local", lr=1e30)
    with pytest.raises(FloatingPointError):
        visit(m, state, train)
    assert "local_loss" not in vars(m)


@pytest.mark.parametrize("seen_at, tier, exits", [("first", 2, 1), ("all", 1, 1), ("all", 2, 2)])
def test_exits_that_count(seen_at, tier, exits):
    m, state, train = method(seen_at=seen_at, upload="pairs")
    update, data = visit(m, state, train, tier)
    net = m.net.prefix(exits).eval()
    net.load_state_dict({k: state["net"][k] for k in net.state_dict()})
    with torch.no_grad():
        F = BoostNet().predict(net(data[:][0]))
    each = torch.stack([sample_difficulty(f, data.y) for f in F])
    assert torch.allclose(update.extra["difficulties"], each.mean(0), atol=1e-6)


@pytest.mark.parametrize("what", [dict(n_classes=4), dict(width=0.5)])
def test_lists_of_other_classes_or_bins_are_not_joined(what):
    d, y = torch.tensor([0.5, 2.0]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=f"{next(iter(what))}="):
        DifficultyPairs(d, y, 3) + DifficultyPairs(d, y, **(dict(n_classes=3) | what))


@pytest.mark.parametrize("other", [None, 3, "x"])
def test_only_lists_are_joined_with_lists(other):
    pairs = DifficultyPairs(torch.tensor([0.5]), torch.tensor([0]), 3)
    counts = DifficultyHistogram(torch.zeros(3, 10, dtype=torch.long))
    wrong = DifficultyHistogram(torch.zeros(4, 10, dtype=torch.long))
    for a, b in ((pairs, other), (counts, other), (pairs, counts), (counts, pairs), (counts, wrong)):
        with pytest.raises(ValueError):
            a + b


def test_lists_of_clients_become_one_pool_of_their_tier(world):
    seen = {}

    class Looks(DarkDistill):
        def _pools(self, tiers, updates):
            seen.update(super()._pools(tiers, updates))
            return dict(seen)

    train, test, clients = world
    settings = grouped(DarkDistill, {**TINY, **SMALL, "upload": "pairs"})
    build = lambda: cnn(train.shape, 10, stages=2, width=8)
    run = simulate(Looks(**settings), build, train, test, clients, 1, progress=False)
    assert all(isinstance(p, DifficultyPairs) for p in seen.values())
    assert {m: len(p.d) for m, p in seen.items()} == {
        m: sum(len(c.train) for c in clients if c.tier == m) for m in (1, 2)
    }
    assert {int(m): sum(v) for m, v in run.log[0]["difficulty"].items()} == {
        m: len(p.d) for m, p in seen.items()
    }


LIES = {
    "one too few": lambda e: {k: v[1:] for k, v in e.items()},
    "none": lambda e: {},
    "below 0": lambda e: {**e, "difficulties": e["difficulties"] - 20},
    "beyond the cap": lambda e: {**e, "difficulties": e["difficulties"] + CAP},
    "not finite": lambda e: {**e, "difficulties": e["difficulties"] / 0},
    "a class that is none": lambda e: {**e, "labels": e["labels"] + 10},
    "fractions as labels": lambda e: {**e, "labels": e["labels"] / 2},
}


@pytest.mark.parametrize("lie", LIES)
def test_lists_that_cannot_be_are_refused(lie):
    m, state, train = method(upload="pairs")
    update, data = visit(m, state, train)
    update.extra = LIES[lie](update.extra)
    client = make_clients(train.y, 2, gamma=100.0, tiers=(0.5, 0.5))[0]
    client.tier = 2
    with pytest.raises((ValueError, FloatingPointError)):
        m.check_update(update, m.send(state, client), client)


def test_the_reference_is_the_deepest_tier_after_distillation(world):
    "Its weights of that round, before blocks are averaged: not the shallow tier's, not those of before the step."
    train, test, clients = world
    before, after = {}, {}

    class Watched(DarkDistill):
        def server_step(self, state, tiers, *rest):
            out = super().server_step(state, tiers, *rest)
            before.update(tiers)
            after.update(out[0])
            return out

    settings = grouped(DarkDistill, {**TINY, **SMALL, "reference": "deepest", "seen_at": "all"})
    build = lambda: cnn(train.shape, 10, stages=2, width=8)
    run = simulate(Watched(**settings), build, train, test, clients, 1, progress=False)
    kept = {k.removeprefix("judge."): v for k, v in run.state["server"].items() if "judge." in k}
    assert kept.keys() == build().state_dict().keys()
    assert all(torch.equal(v, after[2][0][k]) for k, v in kept.items())
    assert any(not torch.equal(v, before[2][0][k]) for k, v in kept.items())
    assert any(not torch.equal(v, run.state["net"][k]) for k, v in kept.items())  # not the average
    assert not any("judge." in k for k in go(world, rounds=1).state["server"])


def test_released_is_what_the_specification_says():
    "Values of the authors' code of February 2025, and nothing else is moved from its default."
    generator = dict(gen_lr=0.01, lam_ce=1.0, lam_div=1.0, lam_dif=1.0, ce="routed", dif="mse")
    generator |= dict(norm="batch", leak=0.0, unit=1.0, d_h=1000)
    m, usual = DarkDistill(**RELEASED), DarkDistill()
    assert {k: getattr(m.generator, k) for k in generator} == generator
    assert vars(m.assessment) == dict(seen_by="local", seen_at="first", upload="pairs")
    assert (m.weights, m.reference, m.progressive) == ("released", "deepest", "joint")
    plain = vars(usual).keys() - {"weights", "reference", "generator", "assessment"}
    same = {k for k in plain if isinstance(getattr(usual, k), (int, float, str, tuple))}
    assert {"kd_lr", "kd_steps", "server_epochs", "server_batch", "rkd", "P"} <= same
    assert all(getattr(m, k) == getattr(usual, k) for k in same)


def test_as_released_it_runs_resumes_and_does_not_depend_on_workers(world, tmp_path):
    settings = {**RELEASED, "generator": GeneratorSettings(**{**vars(RELEASED["generator"]), **TINY})}
    make = lambda: DarkDistill(BoostNet(ge="released"), **settings, **SMALL)
    train, test, clients = world
    build = lambda: cnn(train.shape, 10, stages=2, width=8)
    play = lambda n, **kw: simulate(make(), build, train, test, clients, n, progress=False, **kw)
    file = tmp_path / "c.safetensors"
    play(1, checkpoint=file)
    resumed, at_once = play(3, checkpoint=file), play(3, workers=2)
    assert torch.equal(weights(resumed), weights(at_once))
    assert at_once.log[-1]["server_step"] == "1 -> 2" and math.isfinite(at_once.log[-1]["kd_loss"])


def test_clients_that_watch_their_training_are_not_stacked(world):
    assert "difficulties" in DarkDistill(assessment=Assessment(seen_by="local")).one_by_one()
    assert DarkDistill().one_by_one() == ""


@pytest.mark.parametrize("name", ["progressive", "reference", "seen_by", "leak", "unit"])
def test_the_parallel_variant_has_none_of_them(name):
    value = {"progressive": "sequential", "reference": "deepest", "seen_by": "local", "leak": 0.0}
    with pytest.raises(ValueError, match="left out"):
        DarkDistillPL(**grouped(DarkDistillPL, {name: value.get(name, 1.0)}))


def test_lists_cannot_be_made_private_by_noise_on_counts():
    with pytest.raises(ValueError, match="upload='pairs' must be histogram"):
        PrivateDarkDistill(assessment=Assessment(upload="pairs"))


def test_options_by_their_own_names_as_on_the_command_line():
    m = METHODS.make("darkdistill", **grouped(DarkDistill, dict(upload="pairs", leak=0.1)))
    assert (m.assessment.upload, m.generator.leak) == ("pairs", 0.1)

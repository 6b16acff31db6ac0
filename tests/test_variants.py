"""Levers on the calibrated control: their equations by hand, and what must stay the control itself."""

import inspect, pickle
import pytest, torch
import torch.nn.functional as F
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.records import Record
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet, Joint, L2W
from darkdistill_nb.experiments import rung
from darkdistill_nb.federated import variants
from darkdistill_nb.federated.calibration import (
    CalibratedEEFL,
    DifficultyFeedback,
    ExitVotes,
    PriorCalibration,
    calibrated,
)
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.engine import Here, believed, simulate
from darkdistill_nb.federated.method import Updates, make_clients
from darkdistill_nb.federated.variants import (
    BalancedVisits,
    ExitPrior,
    PublishedMean,
    RememberedUpdates,
    ServerAdam,
    ServerMomentum,
    SharedMomentum,
    SharedScales,
    SmoothedExits,
    TrainedVotes,
    exit_priors,
    scale_factors,
    together,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN, TEST = load("digits", n_train=320, n_test=60)
CLIENTS = make_clients(TRAIN.y, 8, 0.5)
NONE = {  # class -> the option that switches it off
    ServerMomentum: dict(beta=0),
    ServerAdam: dict(step=0),
    PublishedMean: dict(memory=0),
    RememberedUpdates: dict(share=0),
    SharedMomentum: dict(keep=0),
    SharedScales: dict(power=0),
    TrainedVotes: dict(share=0),
    SmoothedExits: dict(softness=0),
    ExitPrior: dict(share=0),
    BalancedVisits: dict(balance=0),
}
each_lever = pytest.mark.parametrize("kind", NONE, ids=lambda k: k.__name__)
KEY = "exits.0.fc.weight"


def build():
    return cnn(TRAIN.shape, 10, width=4)


def go(method, rounds=3, **kw):
    kw = {"eval_every": rounds, "progress": False, **kw}
    return simulate(method, build, TRAIN, TEST, CLIENTS, rounds, **kw)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def visit(method, client=CLIENTS[0], state=None, rnd=0):
    "(state, update) of one client."
    with Streams(0).scope("init"):
        state = state or method.setup(build())
    data = TRAIN.subset(client.train)
    return state, method.local_update(method.send(state, client), data, client, rnd, Streams(0))


# ---------------------------------------------------------------- without strength


@each_lever
def test_a_lever_and_the_parts_behind_it_share_no_name(kind):
    "An option of both would be one attribute with two meanings."
    options = lambda c: set(inspect.signature(c.__init__).parameters) - {"self", "objective", "kwargs"}
    levers = [c for c in kind.__mro__ if c.__module__ == kind.__module__]
    own = set().union(*map(options, levers))
    for part in (PriorCalibration, ExitVotes, DifficultyFeedback):
        assert not own & options(part), part.__name__


@each_lever
@pytest.mark.parametrize(
    "how", [dict(), dict(calibration=0.5, votes="equal")], ids=["auto", "half"]
)
def test_without_strength_it_is_the_control(kind, how):
    base, other = go(CalibratedEEFL(**how)), go(kind(**NONE[kind], **how))
    assert same(base.state["net"], other.state["net"])
    assert base.log[-1]["accuracy"] == other.log[-1]["accuracy"]
    assert base.log[-1]["bytes_up"] == other.log[-1]["bytes_up"]


@each_lever
def test_with_strength_it_is_not(kind):
    base, other = go(CalibratedEEFL()), go(kind())
    moved = not same(base.state["net"], other.state["net"])
    assert moved or base.log[-1]["accuracy"] != other.log[-1]["accuracy"]
    assert METHODS[kind.name] is kind


@each_lever
def test_a_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    whole = go(kind(), 4)
    go(kind(), 2, checkpoint=tmp_path / "c.safetensors")
    rest = go(kind(), 4, checkpoint=tmp_path / "c.safetensors")
    assert same(whole.state["net"], rest.state["net"])
    assert whole.log[-1]["accuracy"] == rest.log[-1]["accuracy"]


@each_lever
@pytest.mark.parametrize("objective", [Joint, L2W])
def test_other_objectives(kind, objective):
    run = go(kind(objective()), 2)
    assert all(v.isfinite().all() for v in run.state["net"].values())


@pytest.mark.parametrize("kinds", [(PublishedMean, ServerAdam, SharedScales)])
def test_workers_change_nothing(kinds):
    here, there = (go(together(*kinds)(), 2, workers=n) for n in (1, 2))
    assert same(here.state["net"], there.state["net"])


# ---------------------------------------------------------------- equations by hand


def test_momentum_by_hand():
    "Each round's change is half of the last one's, plus what the plain average would have done."
    states, method = [], ServerMomentum(beta=0.5)
    for n in (1, 2, 3):
        states.append(go(method, n).state)
    v = [s["server"][f"velocity.{KEY}"] for s in states]
    step = states[2]["net"][KEY] - states[1]["net"][KEY]
    assert torch.allclose(step, v[2], atol=1e-6)
    first = go(CalibratedEEFL(), 1).state["net"][KEY]
    assert torch.allclose(states[0]["net"][KEY], first, atol=1e-7)


def test_adam_by_hand():
    method = ServerAdam(step=0.01, beta=0.5, beta2=0.9, tiny=1e-3)
    a, b = (go(method, n).state for n in (1, 2))
    m, v = b["server"][f"mean.{KEY}"], b["server"][f"square.{KEY}"]
    step = 0.01 * m / 0.75 / ((v / 0.19).sqrt() + 1e-3)
    assert torch.allclose(b["net"][KEY] - a["net"][KEY], step, atol=1e-6)


def test_the_mean_leaves_the_training_alone():
    how = dict(calibration=1.0)
    plain = [go(CalibratedEEFL(**how), n).state["net"][KEY] for n in (1, 2, 3)]
    got = go(PublishedMean(memory=0.5, **how), 3).state
    assert torch.equal(got["server"][f"now.{KEY}"], plain[2])
    mean = (plain[0] + 2 * plain[1] + 4 * plain[2]) / 7
    assert torch.allclose(got["net"][KEY], mean, atol=1e-6)


def test_clients_are_asked_about_the_mean():
    "Votes are weighted for the network that is given out: the same as if it were the only one."
    run = go(PublishedMean(memory=0.5, calibration=1.0), 3)
    given = {k: v for k, v in run.state["server"].items() if not k.startswith("now.")}
    other = CalibratedEEFL(calibration=1.0)
    other.setup(run.net())
    state = {**run.state, "server": {k: v for k, v in given.items() if k != "vote_weights"}}
    ask = believed(other, Here(other, TRAIN, Streams(0)))
    after, _ = other.survey(state, ask, CLIENTS, 2, Streams(0))
    assert torch.equal(after["server"]["vote_weights"], given["vote_weights"])


def test_who_is_absent_is_remembered_by_hand():
    method = RememberedUpdates(share=1.0, calibration=0, votes="none")
    state = go(method, 1).state
    known = {int(k.split(".")[1]) for k in state["server"] if k.startswith("size.")}
    new = next(c for c in CLIENTS if c.id not in known)
    old = next(c for c in CLIENTS if c.id in known)
    ups = [visit(method, c, state, 1)[1] for c in (new, old)]
    after = method.aggregate(state, Updates(ups), 1, Streams(0))[0]["net"][KEY]
    y = {i: state["server"][f"last.{i}.{KEY}"] for i in known}
    n = {i: int(state["server"][f"size.{i}"]) for i in known}
    size = {c.id: len(c.train) for c in (new, old)}
    seen = {**n, **size}
    mean = sum(seen[i] * v for i, v in y.items()) / sum(seen[i] for i in y)
    plain = sum(u.samples * u.weights[KEY] for u in ups) / sum(size.values())
    expected = plain + size[old.id] * (mean - y[old.id]) / sum(size.values())
    assert torch.allclose(after, expected, atol=1e-5)


def test_momentum_that_travels_starts_the_first_step():
    "With a learning rate of 0 nothing moves, but the momentum that comes back tells where it began."
    method = SharedMomentum(keep=0.5, lr=0.0, momentum=0.9, weight_decay=0.0, batch_size=1000)
    state, update = visit(method)
    g = update.weights[f"objective.{KEY}.momentum"]  # one step from rest: the gradient
    state["objective"][f"{KEY}.momentum"] = torch.ones_like(g)
    again = visit(method, state=state)[1].weights[f"objective.{KEY}.momentum"]
    assert torch.allclose(again, 0.9 * 0.5 + g, atol=1e-6)


def test_scales_are_mean_squares_and_divide():
    method = SharedScales(lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=1000, tiny=0.01)
    state, update = visit(method)
    g = (state["net"][KEY] - update.weights[KEY]) / 0.1
    scale = update.weights[f"objective.{KEY}.scale"]
    assert torch.allclose(scale, g**2, atol=1e-5)
    scales = {k: v for k, v in update.weights.items() if k.endswith(".scale")}
    for k, v in scales.items():
        state["objective"][k.removeprefix("objective.")] = v
    mean = sum(v.sum() for v in scales.values()) / sum(v.numel() for v in scales.values())
    moved = (state["net"][KEY] - visit(method, state=state)[1].weights[KEY]) / 0.1
    expected = g * (mean / (scale + 0.01 * mean)).sqrt()
    assert torch.allclose(moved, expected, rtol=1e-3, atol=1e-4)


def test_scales_that_are_not_known_leave_gradients_alone():
    got = scale_factors(dict(a=torch.zeros(2), b=torch.zeros(1)))
    assert torch.equal(got["a"], torch.ones(2))
    known = scale_factors(dict(a=torch.tensor([4.0, 0.0])), 0.5, 0.5)["a"]
    assert torch.allclose(known, torch.tensor([2 / 5, 2.0]).sqrt())
    with pytest.raises(ValueError, match="tiny=0"):
        scale_factors(dict(a=torch.ones(2)), tiny=0)


def test_the_pair_with_a_name():
    "FedAdam, and a mean over its rounds: what `together` makes of the two."
    a, b = go(variants.AdaptiveEEFL(), 2), go(together(PublishedMean, ServerAdam)(), 2)
    assert same(a.state["net"], b.state["net"])
    assert METHODS["adaptive_eefl"] is variants.AdaptiveEEFL


def loss_of(method, extra, raw, y):
    "A client's loss with something added to its message."
    state = method.setup(build())
    sent = method.send(state, CLIENTS[0]) | extra
    data = TRAIN.subset(CLIENTS[0].train)
    return method.local_loss(method.tier_net(4), sent, data, 0)(raw, y)


def test_loss_of_the_vote_by_hand():
    raw, y = [torch.randn(6, 10) for _ in range(4)], torch.arange(6)
    W = torch.full((4, 4), 0.25).tril()
    W = W / W.sum(1, keepdim=True)
    own = loss_of(CalibratedEEFL(), {}, raw, y)
    got = loss_of(TrainedVotes(share=0.3), {variants.VOTES_OF: W}, raw, y)
    method = TrainedVotes()
    sent = method.send(method.setup(build()), CLIENTS[0])
    a = variants._own_shift(method, sent, TRAIN.subset(CLIENTS[0].train)).float()
    F_ = BoostNet().predict(raw)
    V = [sum(F_[: e + 1]) / (e + 1) for e in range(4)]
    together_ = sum(F.cross_entropy(v + a, y) for v in V)
    assert torch.allclose(got, 0.7 * own + 0.3 * together_, atol=1e-5)


def test_smoothing_by_hand():
    raw, y = [torch.randn(6, 10) for _ in range(4)], torch.arange(6)
    c = torch.tensor([1.0, 0.75, 0.5, 0.25])
    own = loss_of(CalibratedEEFL(), {}, raw, y)
    got = loss_of(SmoothedExits(softness=0.2), {variants.COVERED: c}, raw, y)
    uniform = torch.full((6, 10), 0.1)
    F_ = BoostNet().predict(raw)
    more = sum(0.2 * (1 - c[e]) * F.cross_entropy(F_[e], uniform) for e in range(4))
    assert torch.allclose(got, own + more, atol=1e-5)


@pytest.mark.parametrize("objective", [BoostNet(0.2), BoostNet(1.0), Joint()])
def test_every_exit_is_shifted_by_its_own(objective):
    raw, b = [torch.randn(5, 10) for _ in range(4)], torch.randn(4, 10)
    got = objective.predict(variants._each_shifted(objective, raw, b))
    for f, g, v in zip(objective.predict(raw), got, b):
        assert torch.allclose(g, f + v, atol=1e-5)


def test_priors_of_exits():
    counts = torch.tensor([[10, 0], [5, 5], [0, 10]])
    b = exit_priors(counts, s=1.0)
    assert b[0].abs().max() == 0
    assert torch.allclose(
        b[2].exp(), torch.tensor([(16 / 32) / (1 / 12), (16 / 32) / (11 / 12)]).double()
    )
    assert exit_priors(torch.ones(3, 2)).abs().max() < 1e-12  # tiers alike: nothing to separate


def test_decisions_carry_the_priors_of_exits():
    run = go(ExitPrior(votes="none", calibration=1.0))
    method = run.method
    method.recall(run.state)
    plain = CalibratedEEFL.decide(method, run.net(), TEST)
    got = method.decide(run.net(), TEST)
    assert torch.allclose(got, plain + method._b[:, None], atol=1e-5)
    assert torch.equal(got[0], plain[0])


def test_balanced_visits_tell_the_truth_and_see_classes_alike():
    client = max(CLIENTS, key=lambda c: len(c.train))
    truth = torch.bincount(TRAIN.y[client.train], minlength=10)
    seen = []

    class Spy(BalancedVisits):
        def local_loss(self, net, weights, data, rnd):
            seen.append(torch.bincount(data.y, minlength=10))
            return super().local_loss(net, weights, data, rnd)

    for rnd in range(40):
        update = visit(Spy(balance=1.0), client, rnd=rnd)[1]
    assert torch.equal(update.extra["labels"].long(), truth)
    mean = torch.stack(seen).double().mean(0)[truth > 0]
    assert (mean / mean.mean() - 1).abs().max() < 0.25


# ---------------------------------------------------------------- several at once


def test_together():
    both = together(PublishedMean, ServerMomentum)
    assert both is together(PublishedMean, ServerMomentum) and both.__mro__[1] is PublishedMean
    assert together(DarkDistill) is calibrated(DarkDistill) and together(ExitPrior) is ExitPrior
    again = pickle.loads(pickle.dumps(both(memory=0.3)))
    assert type(again) is both and again.memory == 0.3
    for wrong in ((), (3,), ("calibrated_mean",)):
        with pytest.raises(ValueError, match="method"):
            together(*wrong)


def test_mean_of_momentum():
    "The mean is taken over the networks that momentum trains."
    how = dict(calibration=1.0)
    nets = [go(ServerMomentum(**how), n).state["net"][KEY] for n in (1, 2)]
    got = go(together(PublishedMean, ServerMomentum)(memory=0.5, **how), 2).state["net"][KEY]
    assert torch.allclose(got, (nets[0] + 2 * nets[1]) / 3, atol=1e-6)


# ---------------------------------------------------------------- the experiment

TINY = dict(rounds=1, width=4, n_train=200, n_test=60, clients=8)


@pytest.mark.parametrize("lever", rung.LEVERS)
def test_every_lever_can_be_trained(lever):
    got = rung.train_lever(rung.rung_cell("digits", lever, 0.5, 3, **TINY))
    assert len(got["valid"]) == len(got["test"]) == 4


def test_the_control_of_a_lever_is_the_method_itself():
    "A cell of the control reports what a run of CalibratedEEFL reports."
    cell = rung.rung_cell("digits", "control", 1.0, 3, **TINY)
    train, test = load("digits", 200, 60)
    clients = make_clients(train.y, 8, 0.5, seed=3)
    method = CalibratedEEFL(lr=cell["lr"], batch_size=16)
    net = lambda: cnn(train.shape, 10, width=4)
    run = simulate(method, net, train, test, clients, 1, 3, progress=False)
    assert rung.train_lever(cell)["test"] == [round(v, 5) for v in run.log[-1]["accuracy"]]


def row(lever, rate, seed, valid, test=0.5, stage="choice"):
    return dict(lever=lever, rate=rate, seed=seed, valid=[valid], test=[test], stage=stage)


def test_rates_are_chosen_on_validation_alone():
    runs = [row("a", 1.0, s, 0.5, 0.1) for s in (0, 1)] + [
        row("a", 2.0, s, 0.4, 0.9) for s in (0, 1)
    ]
    runs += [row("b", 1.0, s, 0.6, 0.0) for s in (0, 1)] + [row("b", 2.0, 0, 1.0)]
    assert rung.best_rates(runs) == {"b": 1.0, "a": 1.0}
    assert list(rung.best_rates(runs)) == ["b", "a"]
    assert rung.best_rates([]) == {}


def test_a_small_rung_from_start_to_table(tmp_path):
    how = dict(levers=["server Adam", "prior of each exit"], finalists=1, chosen=(0, 1))
    how |= dict(seeds=(2, 3), rates=(1.0,), workers=1, ceilings=True)
    record = rung.run_rung("digits", tmp_path, **how, **TINY)
    again = rung.run_rung("digits", tmp_path, **how, **TINY)  # nothing is trained twice
    assert record.runs == again.runs and record.info["base"] == 1.0
    stages = {r["stage"]: 0 for r in record.runs} | {}
    for r in record.runs:
        stages[r["stage"]] += 1
    assert stages == dict(choice=6, confirmation=4, ceiling=8)
    best = next(v for v in record.info["rates"] if v != "control")
    assert {r["lever"] for r in record.runs if r["stage"] == "confirmation"} == {best, "control"}
    mine, base = (rung.rung_values(record, v) for v in (best, "control"))
    mean = sum(sum(mine[s]) / 4 - sum(base[s]) / 4 for s in (2, 3)) / 2
    assert rung.rung_gain(record, best)[0] == pytest.approx(mean)
    assert rung.rung_table(record).count("\n") == 3
    assert rung.rung_table(record, "choice").count("\n") == 4
    assert rung.rung_table(record, "ceiling").count("\n") == 6


def test_the_control_counts_at_the_better_of_two_rates():
    "Its validation accuracy chose rate 2, on fresh seeds rate 1 was better."
    both = [
        row("control", r, s, 0.0, 0.7 - r / 10, "confirmation") for r in (1.0, 2.0) for s in (5, 6)
    ]
    both += [row("server Adam", 1.0, s, 0.0, 0.7 + s / 1000, "confirmation") for s in (5, 6)]
    info = dict(rates={"server Adam": 1.0, "control": 2.0}, base=rung._better(both))
    record = Record(dict(), runs=both, info=info)
    assert info["base"] == 1.0
    assert rung.rung_values(record, "control") == {5: [60.0], 6: [60.0]}
    assert rung.rung_gain(record, "server Adam")[0] == pytest.approx(10.55)
    assert "| control | x 1 |" in rung.rung_table(record)
    assert rung._last_round(info["rates"], 1) == [
        ("control", 2.0),
        ("control", 1.0),
        ("server Adam", 1.0),
    ]


@pytest.mark.parametrize(
    "how, word",
    [
        (dict(levers=["luck"]), "levers='luck'"),
        (dict(finalists=0), "finalists=0"),
        (dict(seeds=(7,)), "at least two"),
        (dict(seeds=(0, 7)), "others than those of the choice"),
        (dict(nope=3), "setting='nope'"),
        (dict(rates=(-1.0,)), "rate=-1.0"),
    ],
)
def test_what_cannot_be_asked(how, word, tmp_path):
    with pytest.raises(ValueError, match=word.replace("(", r"\(")):
        rung.run_rung("digits", tmp_path, workers=1, **how)
    assert not (tmp_path / "cells").exists()

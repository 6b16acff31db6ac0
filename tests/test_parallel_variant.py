"""DarkDistill in parallel: the numbers of its equations, what its server step may change, and what must stay EEFL."""

import copy, inspect, warnings
import pytest, torch
import torch.nn.functional as F
from federations import CLIENTS, TRAIN, build, go
from helpers import made, same
from darkdistill_nb.app import cli
from darkdistill_nb.core.records import load_record
from darkdistill_nb.core.registry import METHODS, keywords_of
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.training import BoostNet, Joint
from darkdistill_nb.federated import parallel_variant
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.method import EEFL, block_average, make_clients
from darkdistill_nb.federated.parallel_variant import (
    DarkDistillPL,
    difficulty_gap,
    exit_ensemble,
    taught_exit,
    teacher_shares,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(participation=1.0, d_eps=8, d_h=16)


def one_round(method, tiers=(1, 2, 3, 4)):
    "(state before, {tier: (weights, samples)}, updates) of a round in which these tiers took part."
    with Streams(0).scope("init"):
        state = method.setup(build())
    s, who = Streams(0), [c for c in CLIENTS if c.tier in tiers]
    parts = [
        method.local_update(method.send(state, c), TRAIN.subset(c.train), c, 0, s) for c in who
    ]
    seen = {}

    class Spy(EEFL):
        def server_step(self, state, tiers, updates, rnd, streams):
            seen.update(tiers)
            return tiers, {}, {}

    spy = Spy()
    spy.setup(method.net)
    spy.aggregate(state, parts, 0, s)
    return state, seen, parts


# ---------------------------------------------------------------- equations by hand


def test_shares_of_check_23():
    r = teacher_shares({1: 100, 2: 200, 3: 300, 4: 400}, 2)
    assert list(r) == [2, 3, 4]
    assert [round(v, 4) for v in r.values()] == [0.2222, 0.3333, 0.4444]
    assert teacher_shares({1: 7, 2: 3}, 2) == {2: 1.0}


@pytest.mark.parametrize("objective", [Joint(), BoostNet(0.5)])
def test_the_ensemble_is_the_weighted_mean(objective):
    nets, n = {m: build().prefix(m) for m in (1, 2, 3)}, {1: 10, 2: 30, 3: 60}
    x = torch.randn(6, 4, 8, 8)
    with torch.no_grad():
        logits, a = exit_ensemble(nets, n, 2, x, objective)
        own = {m: objective.predict(nets[m].from_latents(x))[1] for m in (2, 3)}
        features = {m: nets[m].features(x)[1] for m in (2, 3)}
    assert torch.allclose(logits, (own[2] + 2 * own[3]) / 3, atol=1e-6)
    assert torch.allclose(a, (features[2] + 2 * features[3]) / 3, atol=1e-6)


def test_the_mean_of_networks_is_not_the_network_of_means():
    "What the server step is about: the average of weights does not see what the ensemble sees."
    nets = {m: build() for m in (1, 2)}
    mean = build()
    mean.load_state_dict(
        {k: sum(n.state_dict()[k] for n in nets.values()) / 2 for k in mean.state_dict()}
    )
    x = torch.randn(6, 4, 8, 8)
    with torch.no_grad():
        a = exit_ensemble({2: nets[1], 3: nets[2]}, {2: 1, 3: 1}, 2, x, Joint())[1]
        assert (mean.features(x)[1] - a).abs().max() > 1e-3


@pytest.mark.parametrize("kind, value", [("raw", 3.0), ("hinge", 1.0)])
def test_the_gap_by_hand(kind, value):
    d, before = (
        torch.tensor([4.0, 6.0], requires_grad=True),
        torch.tensor([1.0, 3.0], requires_grad=True),
    )
    gap = difficulty_gap(d, before, kind)
    assert gap.item() == value
    gap.backward()
    assert before.grad is None
    assert d.grad.tolist() == ([0.5, 0.5] if kind == "raw" else [0.0, 0.0])  # paid enough


def test_a_negative_gap_is_not_cut():
    assert difficulty_gap(torch.tensor([0.5]), torch.tensor([3.0])).item() == -2.5


def test_which_exit_learns():
    "In the paper's form exit t; in the released code the next one, once for each neighbour of t."
    assert [taught_exit(t, 4) for t in (1, 2, 3, 4)] == [(t, 1) for t in (1, 2, 3, 4)]
    assert [taught_exit(t, 4, "shifted") for t in (1, 2, 3, 4)] == [(2, 2), (3, 3), (4, 3), (4, 2)]
    assert DarkDistillPL().pairs == "same"


def test_generators_know_no_difficulty():
    m = made(DarkDistillPL, d_eps=8, d_h=16)
    m.setup(build())
    gens = m.generators({}, Streams(0))
    assert sorted(gens) == [1, 2, 3, 4]  # one per exit, also for the last
    assert all(G.level is None and G.hidden.in_features == 16 for G in gens.values())
    y, eps = torch.tensor([1, 2]), torch.rand(2, 8)
    assert torch.equal(gens[1](y, torch.zeros(2), eps), gens[1](y, torch.full((2,), 9.0), eps))
    assert not torch.equal(gens[1].out.weight, gens[2].out.weight)


# ---------------------------------------------------------------- increasing difficulty


def test_difficulty_increases_from_exit_to_exit():
    "Check 23: on, the means do not fall with the exit once the generators are warm; off, nothing pulls them apart."
    spread = {}
    for gap in ("hinge", "none"):
        log = go(made(DarkDistillPL, gap=gap, gen_steps=8, **SMALL), rounds=8).log
        rows = [[r[f"generator{t}"]["difficulty"] for t in (1, 2, 3, 4)] for r in log[5:]]
        spread[gap] = torch.tensor(rows).mean(0)
    assert (spread["hinge"].diff() >= 0).all(), spread
    assert spread["hinge"][3] - spread["hinge"][0] > 1 + spread["none"].diff().abs().sum()


def losses_of(**kw):
    "(generator losses, loss of the global network) of one batch, with fixed noise."
    m = made(DarkDistillPL, **{**SMALL, **kw})
    with Streams(0).scope("init"):
        m.setup(build())
    nets = {t: m.tier_net(t) for t in (1, 2, 3, 4)}
    gens, n = m.generators({}, Streams(0)), {1: 1, 2: 1, 3: 1, 4: 1}
    labels = {t: torch.arange(16) % 10 for t in nets}
    g = torch.Generator().manual_seed(0)
    losses, told = m._generator_losses(gens, nets, n, m.net, labels, g)
    with torch.no_grad():
        x = {t: gens[t](y, None, torch.full((16, 8), 0.1 * t)) for t, y in labels.items()}
        net = copy.deepcopy(m.net)
        for p in net.parameters():
            p.mul_(1.1)  # else there is nothing to learn
        return (
            {t: v.item() for t, v in losses.items()},
            float(m._global_loss(net, nets, n, x, labels)),
            told,
        )


def test_switched_off_the_term_is_in_neither_loss():
    on, off = losses_of(gap="raw", shrink=True), losses_of(gap="none")
    d = [off[2][t]["difficulty"] for t in (1, 2, 3, 4)]
    assert on[0][1] == off[0][1]  # exit 1 has nobody before it
    for t in (2, 3, 4):
        assert off[0][t] - on[0][t] == pytest.approx(d[t - 1] - d[t - 2], abs=1e-4)
    assert on[1] > off[1] == losses_of(gap="raw")[1]
    assert losses_of(gap="none", lam_gap=5.0)[:2] == off[:2]


def test_weights_of_the_losses():
    plain, told = losses_of(gap="none", lam_div=0)[0], losses_of(gap="none")[2]
    for t in (1, 2, 3, 4):
        assert plain[t] == pytest.approx(told[t]["ce"], abs=1e-5)
        assert losses_of(gap="none", lam_div=0, lam_ce=3)[0][t] == pytest.approx(
            3 * plain[t], rel=1e-5
        )
        assert 0 < losses_of(gap="none")[0][t] - plain[t] <= 1  # diversity lies in (0, 1]


# ---------------------------------------------------------------- what the server step may change


def test_only_stages_of_the_average_move():
    "Stem and heads are those of EEFL's average; so are tier models and updates."
    m = made(DarkDistillPL, **SMALL)
    state, tiers, updates = one_round(m)
    before = copy.deepcopy(tiers)
    after, info = m.aggregate(state, updates, 0, Streams(0))
    plain = block_average(state["net"], tiers)
    moved = {k for k in plain if not torch.equal(plain[k], after["net"][k])}
    assert moved and all(k.startswith("stages.") for k in moved)
    assert {k.split(".")[1] for k in moved} == {"0", "1", "2", "3"}
    for t, (w, _) in before.items():
        assert same(w, tiers[t][0])
    assert info["kd_loss"] > 0 and info["server_step"] == "tiers 1, 2, 3, 4 -> exits 1..4"


def test_exits_that_nobody_can_teach_stay():
    m = made(DarkDistillPL, **SMALL)
    state, tiers, updates = one_round(m, (1, 2))
    after, info = m.aggregate(state, updates, 0, Streams(0))
    assert info["server_step"] == "tiers 1, 2 -> exits 1..2" and "generator3" not in info
    for k, v in after["net"].items():
        if k.split(".")[1] in ("2", "3") and not k.startswith("stem"):
            assert torch.equal(v, state["net"][k]), k
    fresh = m.generators({}, Streams(0))[3].state_dict()
    assert same({k: after["server"][f"gen3.{k}"] for k in fresh}, fresh)


def test_the_step_lowers_its_loss():
    "Knowledge moves into the average: with more steps its features agree better with the ensembles'."
    last = {}
    for steps in (1, 30):
        m = made(DarkDistillPL, kd_steps=steps, server_epochs=1, **SMALL)
        state, tiers, updates = one_round(m)
        last[steps] = m.aggregate(state, updates, 0, Streams(0))[1]["kd_loss"]
    assert last[30] < 0.5 * last[1], last


def test_tiers_come_back_as_prefixes_of_one_network():
    m = made(DarkDistillPL, **SMALL)
    state, tiers, updates = one_round(m)
    new, _, _ = m.server_step(state, tiers, updates, 0, Streams(0))
    for t in (1, 2, 3):
        assert same(new[t][0], {k: new[4][0][k] for k in new[t][0]})
    assert [n for _, n in new.values()] == [n for _, n in tiers.values()]
    assert same(block_average(state["net"], new), new[4][0])


def test_labels_follow_the_clients():
    "y_t is drawn as the tiers that have exit t hold classes, with the counts of all clients heard of."
    drawn = {}

    class Spy(DarkDistillPL):
        def _teach(self, net, nets, samples, gens, weights, rnd, g):
            drawn.update({t: w.clone() for t, w in weights.items()})
            return {}

    m = made(Spy, **SMALL)
    state, tiers, updates = one_round(m)
    _, server, _ = m.server_step(state, tiers, updates, 0, Streams(0))
    for t in (1, 2, 3, 4):
        held = torch.cat([c.train for c in CLIENTS if c.tier >= t])
        want = torch.bincount(TRAIN.y[held], minlength=10).double()
        assert torch.allclose(drawn[t] / drawn[t].sum(), want / want.sum())
    assert sum(k.startswith("classes.") for k in server) == len(CLIENTS)
    few = [u for u in updates if u.client == updates[0].client]
    m.server_step(
        {**state, "server": server},
        {few[0].tier: (few[0].weights, few[0].samples)},
        few,
        1,
        Streams(0),
    )
    own = torch.cat([c.train for c in CLIENTS if c.tier == few[0].tier])
    want = torch.bincount(TRAIN.y[own], minlength=10).double()
    assert torch.allclose(
        drawn[1] / drawn[1].sum(), want / want.sum()
    )  # also of those who are absent


def test_the_rate_of_distillation_falls_with_the_rounds(monkeypatch):
    rates, sgd = [], parallel_variant.SGD

    class Spy(sgd):
        def __init__(self, params, lr, **kw):
            rates.append((lr, kw["weight_decay"]))
            super().__init__(params, lr, **kw)

    m = made(DarkDistillPL, kd_decay=0.5, server_epochs=1, kd_steps=1, **SMALL)
    state, tiers, updates = one_round(m)
    monkeypatch.setattr(parallel_variant, "SGD", Spy)
    for rnd in (0, 3):
        m.server_step(state, tiers, updates, rnd, Streams(0))
    assert rates == [(0.05, 1e-3), (0.05 / 8, 1e-3)]


# ---------------------------------------------------------------- what must stay EEFL


@pytest.mark.parametrize("off", [dict(kd_lr=0.0), dict(kd_steps=0), dict(server_epochs=0)])
def test_switched_off_it_is_eefl_to_the_last_bit(off):
    "Clients, orders, weights and accuracies; also with four clients of a round that lacks tiers."
    for clients in (CLIENTS, make_clients(TRAIN.y, 4, 0.5)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            a, b = go(EEFL(), clients), go(made(DarkDistillPL, d_eps=8, d_h=16, **off), clients)
        assert same(a.state["net"], b.state["net"])
        assert [r["clients"] for r in a.log] == [r["clients"] for r in b.log]
        assert a.log[-1]["accuracy"] == b.log[-1]["accuracy"]
        assert b.log[0]["server_step"] == f"nothing: {next(iter(off))}=0 switches it off"


def test_switched_on_it_is_not():
    assert not same(
        go(EEFL(participation=1.0)).state["net"], go(made(DarkDistillPL, **SMALL)).state["net"]
    )


def test_nothing_else_of_a_run_depends_on_the_server_step():
    "Who is drawn, and what clients lose in round 1."
    a, b = go(EEFL()), go(made(DarkDistillPL, d_eps=8, d_h=16))
    assert [r["clients"] for r in a.log] == [r["clients"] for r in b.log]
    assert a.log[0]["loss"] == b.log[0]["loss"]


def shared():
    net = build()
    net.exits[1].fc = net.exits[0].fc
    return net


def test_tied_classifiers_stay_tied():
    a, b = go(EEFL(), net=shared), go(made(DarkDistillPL, kd_lr=0.0, d_eps=8, d_h=16), net=shared)
    assert same(a.state["net"], b.state["net"])
    w = go(made(DarkDistillPL, **SMALL), net=shared).state["net"]
    assert torch.equal(w["exits.0.fc.weight"], w["exits.1.fc.weight"])


def frozen_stages():
    net = build()
    net.stages.requires_grad_(False)
    return net


def test_frozen_stages_are_the_reason_of_a_step_that_does_nothing():
    with pytest.warns(UserWarning, match="the stages that would learn are frozen"):
        run = go(made(DarkDistillPL, **SMALL), net=frozen_stages)
    assert same(run.state["net"], go(EEFL(participation=1.0), net=frozen_stages).state["net"])


# ---------------------------------------------------------------- runs


RELEASED = dict(pairs="shifted", gap="raw", shrink=True, norm="batch", gen_lr=1e-2)


@pytest.mark.parametrize("options", [{}, RELEASED], ids=["paper", "released"])
def test_workers_and_resuming_change_nothing(options, tmp_path):
    make = lambda: made(DarkDistillPL, **{**SMALL, **options})
    all_at_once = go(make(), rounds=3, workers=2)
    file = tmp_path / "c.safetensors"
    go(make(), rounds=1, checkpoint=file)
    resumed = go(make(), rounds=3, checkpoint=file)
    for part in ("net", "server"):
        assert same(all_at_once.state[part], resumed.state[part])
    assert all_at_once.log[-1]["accuracy"] == resumed.log[-1]["accuracy"]
    with pytest.raises(ValueError, match="another training: lam_gap=2.0"):
        go(made(DarkDistillPL, **{**SMALL, **options, "lam_gap": 2.0}), rounds=3, checkpoint=file)


@pytest.mark.parametrize("name", ["pairs", "gap", "shrink"])
def test_every_released_option_changes_something(name):
    value = dict(pairs="shifted", gap="raw", shrink=True)[name]
    how = dict(SMALL, gen_steps=10, gen_lr=0.03)
    a, b = (go(made(DarkDistillPL, **how, **kw), rounds=3) for kw in ({}, {name: value}))
    assert not same(a.state["net"], b.state["net"])


@pytest.mark.parametrize("objective", [Joint, BoostNet])
def test_objectives(objective):
    run = go(made(DarkDistillPL, objective(), **SMALL))
    assert run.log[-1]["kd_loss"] > 0 and len(run.log[-1]["accuracy"]) == 4


def test_it_is_made_by_its_name_and_explains_its_options():
    m = METHODS.make("darkdistill_pl", kd_steps=2, pairs="shifted")
    assert type(m) is DarkDistillPL and isinstance(m, DarkDistill) and m.kd_steps == 2
    own = set(inspect.signature(DarkDistillPL.__init__).parameters)
    own -= {"self", "kwargs", "generator"}
    assert all(keywords_of(DarkDistillPL)[k].help for k in own)
    for k, v in dict(tau=1, weights=1, bin_width=1, P=1, ce="routed", dif="mse", lam_dif=2).items():
        with pytest.raises(ValueError, match=f"^{k}=.* must be left out"):
            METHODS.make("darkdistill_pl", **{k: v})


def test_a_shrinking_network_needs_a_gap():
    with pytest.raises(ValueError, match="^shrink=True must be False where gap='none'"):
        DarkDistillPL(gap="none", shrink=True)


def test_a_server_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="server step of round .*lower kd_lr=1e"):
        go(made(DarkDistillPL, kd_lr=1e30, **SMALL), rounds=3)


def test_the_command_runs_it_and_reports_it(tmp_path, capsys):
    out = tmp_path / "run"
    words = "run --data digits --methods eefl,darkdistill_pl --rounds 2 --seeds 1 --no-alone"
    words += " --clients 6 --tiers 2"
    words += " --n-train 200 --n-test 60 --workers 1 --net width=4 stages=2"
    words += " --darkdistill_pl server_epochs=1 d_h=16 pairs=shifted"
    assert cli.main([*words.split(), "--out", str(out)]) == 0
    record = load_record(out)
    assert {r["method"] for r in record.runs} == {"eefl", "darkdistill_pl"}
    row = next(r for r in record.runs if r["method"] == "darkdistill_pl")["rounds"][-1]
    assert row["server_step"].startswith("tiers 1, 2 ->")
    assert "DarkDistillPL" in (out / "report.html").read_text(encoding="utf-8")
    assert "DarkDistillPL" in capsys.readouterr().out


def test_accuracies_are_those_of_a_network_that_learned():
    run = go(made(DarkDistillPL, **SMALL), rounds=10)
    images, labels = TRAIN[slice(None)]
    with torch.no_grad():
        logits = run.method.objective.predict(run.net().eval()(images))
    assert F.cross_entropy(logits[0], labels) < 1.5 and run.log[-1]["accuracy"][0] > 0.5

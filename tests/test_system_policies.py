"Policies of distributed systems: what each student does, what it costs, budgets, and promises about the joint answer."

import itertools, math
import numpy as np
import pytest
import torch
from helpers import refused
import torch.nn.functional as F
from darkdistill_nb.distree.students import SystemAnswers, make_answers
from darkdistill_nb.exits.bounds import last_of_prefix
from darkdistill_nb.exits.guarantees import METHODS, passes
from darkdistill_nb.exits.evaluation import static_mixture
from darkdistill_nb.distree.budgets import (
    SYSTEM_SCHEMES,
    align_exits,
    control_system,
    evaluate_system,
    lambda_grid,
    system_auroc,
    system_curve,
    system_losses,
    system_table,
    system_thresholds,
)
from darkdistill_nb.distree.policies import (
    POLICIES,
    FeatureDifference,
    LastExit,
    NeighbourSimilarity,
    PartialLogits,
    ProxyHead,
    Quorum,
    RandomExit,
    SharedScore,
    SystemPolicy,
    decision_points,
    joint_right,
    mac_shares,
    policy_by_name,
)

COSTS = [0.0166, 0.1936, 0.3706, 0.5083, 0.6853, 0.8230, 1.0]
T = [1, 1.08, 1.12, 1.16, 1.20, 1.24, 1.28]
DIFF = FeatureDifference()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def both():
    a = make_answers(2, 7, 1600, length=48, seed=3)
    return a.subset(slice(0, 800)), a.subset(slice(800, 1600))


def features(*rows):
    "Answers of one student with one image and these features at its exits."
    f = torch.tensor(rows).double()[:, None]
    E = len(f)
    none = torch.zeros(1, E, 1, 3)
    return SystemAnswers(
        none,
        torch.zeros(3),
        none,
        torch.zeros(1).long(),
        torch.arange(1.0, E + 1)[None],
        [f.shape[-1]],
        [f],
    )


# ---------------------------------------------------------------- check 20: the rule of the paper


def test_difference_to_the_digit():
    s = lambda *rows: DIFF.scores(features(*rows))[0, :, 0]
    assert s([1, 0], [1, 0])[1] == 1 and s([1, 0], [1, 1])[1] == pytest.approx(1.41421, abs=1e-5)
    assert s([1, 0], [0.9, math.sqrt(0.19)])[1] == pytest.approx(1.1111, abs=1e-4)
    torch.testing.assert_close(s([1, 2], [3, 1])[1], s([10, 20], [0.3, 0.1])[1])
    assert s([1, 0], [0, 1])[1] == s([1, 0], [-1, 0])[1] == 1e6
    assert s([1, 0], [1, 0])[0] == -math.inf


@pytest.mark.parametrize(
    "cosines, T_, exit",
    [
        ((0.9, 1, 1), [1, 1.08, 1.12, 1.16], 1),
        ((1, 0.9, 1), [1, 1.08, 1.12, 1.16], 3),  # 1.1111 exceeds T_2 = 1.08, not T_3 = 1.12
        ((0, 1, 1), [1, 1.08, 1.12, 1.16], 1),
        ((1, 1, 1), [1, 1, 1, 1], 3),
        ((1, 1, 1), [0, 0, 0, 0], 1),
        ((1, 1, 1), [-math.inf] * 4, 1),
        ((0, 0, 0), [math.inf] * 4, 3),
    ],
)
def test_difference_by_hand(cosines, T_, exit):
    "Strict comparison, exit 1 is never taken, the last threshold plays no role."
    a = features([1.0, 0], *([c, math.sqrt(1 - c * c)] for c in cosines))
    for last in (-math.inf, 0, 9, math.inf):
        assert int(DIFF.depth(a, T_[:-1] + [last])[0, 0]) == exit


def test_strict_means_strict():
    "A score equal to its threshold does not stop; the next smaller threshold does."
    a = features([1.0, 0], [1, 1], [1, 0])
    t = float(DIFF.scores(a)[0, 1, 0])
    assert int(DIFF.depth(a, [1, t, 9])[0, 0]) == 2
    assert int(DIFF.depth(a, [1, np.nextafter(t, 0), 9])[0, 0]) == 1
    s = NeighbourSimilarity()
    t = float(s.scores(a)[0, 1, 0])
    assert int(s.depth(a, [9, t, 9])[0, 0]) == 1
    assert int(s.depth(a, [9, np.nextafter(t, 9), 9])[0, 0]) == 2


def test_difference_on_a_table(both):
    a = both[1]
    d = DIFF.depth(a, [math.inf] * 7)
    assert (d == 6).all() and torch.equal(a.logits(d), a.logits(LastExit().depth(a)))  # bit-equal
    assert (DIFF.depth(a, [1, 0] + T[2:]) == 1).all()
    base = DIFF.depth(a)
    assert torch.equal(base, DIFF.depth(a, T)) and 1 <= base.min() and (base[0] != base[1]).any()
    for j, by in itertools.product(range(7), (0.01, 0.2)):
        assert (DIFF.depth(a, [t + by * (k == j) for k, t in enumerate(T)]) >= base).all()
    one = torch.cat([DIFF.depth(a.subset(slice(s, s + 1))) for s in range(64)], 1)
    assert torch.equal(one, base[:, :64])


@pytest.mark.parametrize(
    "policy",
    [
        DIFF,
        NeighbourSimilarity(),
        ProxyHead(),
        PartialLogits(),
        Quorum(),
        Quorum(confident=True),
        RandomExit(),
        SharedScore(),
    ],
)
def test_depth_against_a_loop(policy, both):
    "Every policy: first exit whose score reaches its threshold, written as a loop; and its path is monotone in lambda."
    a = both[1].subset(slice(0, 60))
    s, t = policy.scores(a), [1.2 if policy is DIFF else 0.6] * 7
    d = policy.depth(a, t)
    for g, row in enumerate(s):
        for i in range(60):
            stop = [
                e for e in range(6) if (row[e, i] > t[e] if policy.strict else row[e, i] >= t[e])
            ]
            assert int(d[g, i]) == (stop[0] if stop else 6)
    if policy.together:
        assert len(s) == 1 and torch.equal(d[0], d[1])
    deep = [
        policy.depth(a, policy.path(lam, 7)) for lam in (-math.inf, 0, 0.3, 0.6, 0.9, 1.5, math.inf)
    ]
    for x, y in zip(deep, deep[1:]):
        assert (x <= y).all()
    assert (deep[-1] == 6).all()


def test_one_vector_per_student(both):
    a = both[1]
    d = DIFF.depth(a, [T, [math.inf] * 7])
    assert torch.equal(d[0], DIFF.depth(a)[0]) and (d[1] == 6).all()


# ---------------------------------------------------------------- check 21: costs


def test_cost_accounting():
    c = torch.tensor(COSTS)[None].repeat(2, 1)
    full = mac_shares(c, torch.full((2, 5), 6))
    assert all((v == 1).all() for v in full)
    latency, energy = mac_shares(c, [[3, 6], [3, 6]])
    assert float(latency.mean()) == pytest.approx(0.7541, abs=1e-4)
    assert torch.allclose(latency, energy)
    latency, energy = mac_shares(c, [[3], [6]])
    assert float(latency) == 1 and float(energy) == pytest.approx(0.7541, abs=1e-4)
    latency, energy = mac_shares([[1.0, 2], [2, 4]], [[0, 1], [0, 0]])
    assert latency.tolist() == [0.5, 0.5] and energy.tolist() == [0.5, 4 / 6]
    published = [47.16, 66, 73, 79, 87, 89, 90.57]
    assert float(static_mixture(COSTS, published, 0.724)) == pytest.approx(87.6, abs=0.05)
    assert np.mean(COSTS) == pytest.approx(0.514, abs=5e-4)
    assert np.mean(published) == pytest.approx(75.96, abs=0.005)


def test_head_overhead_is_in_the_costs():
    "All students at exit 7 cost the trunk and its heads: the system's own table says so."
    from darkdistill_nb.distree.students import student_net

    net = student_net("wrn", (3, 32, 32), 10, 58, depth=16, widen=1, exits=range(7), bias=True)
    with_heads, trunk = torch.tensor(net.macs()).double(), 26_657_408
    assert 1 < float(with_heads[-1]) / trunk < 1.01
    assert all(
        (v == 1).all() for v in mac_shares(with_heads[None].repeat(2, 1), torch.full((2, 3), 6))
    )


def test_random_exit_is_uniform():
    a = make_answers(2, 7, 4000, seed=1)
    for p in (RandomExit(), RandomExit(shared=True, seed=2)):
        d = p.depth(a)
        for row in d:
            assert (torch.bincount(row, minlength=7) / 4000 - 1 / 7).abs().max() < 0.025
        assert torch.equal(d, p.depth(a)) and p.together == bool((d[0] == d[1]).all())
    assert abs(float(torch.corrcoef(RandomExit().depth(a).double())[0, 1])) < 0.05


@pytest.mark.parametrize(
    "speculative, rtt", list(itertools.product((True, False), (0.0, 0.1, 0.3, 0.6)))
)
@pytest.mark.parametrize("kind", ["partial", "votes", "bytes"])
def test_questions_against_a_timeline(kind, speculative, rtt):
    "Bytes, messages, waiting and waste of rules that ask, by walking through the exits of uneven students."
    costs = [[1.0, 2, 3, 6, 7, 8, 10], [2.0, 3, 5, 6, 8, 9, 9.5]]
    points = (2, 4, 5)
    K = 10
    m = [48, 6]
    a = make_answers(2, 7, 7, K)
    a.costs, a.sizes = torch.tensor(costs).double(), m
    p = (
        PartialLogits(points, rtt, speculative)
        if kind == "partial"
        else Quorum(points, rtt, speculative, confident=kind == "bytes")
    )
    size = [4 * min(K, v) for v in m]
    ask = [{"votes": 1, "bytes": 2}.get(kind, v) for v in size]
    for d in (2, 4, 5, 6):
        up = down = wait = waste = messages = 0.0
        for n in range(2):
            for q in points:
                if q <= d:
                    up += ask[n]
                    down += 1
                    messages += 2
            if d == 6 or kind != "partial":
                up += size[n]
                messages += 1
            if speculative and d != 6:
                stop_at = costs[n][d] + rtt * 10
                for q in (*points, 6):
                    if q > d and costs[n][q] < stop_at:
                        up += size[n] if q == 6 else ask[n]
                        messages += 1
                waste += min(stop_at, costs[n][6]) - costs[n][d]
        clock, start = 0.0, [0.0, 0.0]
        for q in [q for q in (*points, 6) if q <= d]:
            clock += max(costs[n][q] - start[n] for n in range(2)) if not speculative else 0
            start = [costs[n][q] for n in range(2)]
            if not speculative and q < d:
                clock += rtt * 10
        slowest = max(costs[n][d] for n in range(2))
        wait = (clock - slowest if not speculative else 0) + (
            rtt * 10 if kind != "partial" and d != 6 else 0
        )
        depth = torch.full((2, 1), d)
        got_bytes, got_messages = p.traffic(a, depth)
        got_wait, got_waste = p.delays(a, depth)
        assert (float(got_bytes), float(got_messages)) == (up + down, messages), d
        assert float(got_wait) * 10 == pytest.approx(wait) and float(
            got_waste
        ) * 19.5 == pytest.approx(waste), d
        cost = p.costs(a, depth, header=28)
        assert float(cost["bytes"]) == up + down + 28 * messages
        assert float(cost["latency"]) == pytest.approx((slowest + wait) / 10)


# ---------------------------------------------------------------- check 22: aggregation


def test_partial_logits_are_the_joint_answer():
    g = torch.Generator().manual_seed(0)
    sizes = [48, 49, 20]
    joint = torch.nn.Linear(sum(sizes), 10)
    f = [torch.rand(30, m, generator=g) for m in sizes]
    W = joint.weight.detach().split(sizes, 1)
    partial = torch.stack([F.linear(v, w) for v, w in zip(f, W)])[:, None]
    a = SystemAnswers(
        partial, joint.bias.detach(), partial, torch.zeros(30).long(), torch.ones(3, 1), sizes
    )
    with torch.no_grad():
        torch.testing.assert_close(a.joint(0), joint(torch.cat(f, 1)), atol=1e-5, rtol=0)
        for order in itertools.permutations(range(3)):
            moved = F.linear(
                torch.cat([f[n] for n in order], 1), torch.cat([W[n] for n in order], 1), joint.bias
            )
            torch.testing.assert_close(moved, a.joint(0), atol=1e-5, rtol=0)
        for n in range(3):
            here = torch.ones(3, 30, dtype=torch.bool)
            here[n] = False
            without = [
                v.mean(0, keepdim=True).expand_as(v) if k == n else v for k, v in enumerate(f)
            ]
            torch.testing.assert_close(
                a.logits(torch.zeros(3, 30).long(), here, a.means()),
                joint(torch.cat(without, 1)),
                atol=1e-5,
                rtol=0,
            )
    torch.testing.assert_close(PartialLogits((0,)).ask(a, [0])[0], a.joint(0).softmax(-1).amax(-1))


def test_aligned_exits_add_up():
    a = make_answers(2, 4, 500, seed=2)
    offset = torch.randn(2, 4, 1, 10, generator=torch.Generator().manual_seed(0)) * 3
    off = SystemAnswers(a.partial + offset, a.bias, a.proxy, a.y, a.costs, a.sizes)
    fixed = align_exits(off, off)
    torch.testing.assert_close(
        fixed.partial, align_exits(a, a).partial + offset[:, -1:], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(fixed.joint(3), off.joint(3))
    assert torch.equal(off.partial, a.partial + offset)
    with pytest.raises(ValueError, match="students, exits"):
        align_exits(a, make_answers(2, 3))


# ---------------------------------------------------------------- thresholds, curves, tables


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("difference", {}),
        ("similarity", {}),
        ("proxy", {}),
        ("partial", {}),
        ("random", {}),
        ("random", dict(shared=True)),
        ("partial", dict(rtt=0.1)),
        ("partial", dict(rtt=0.1, speculative=False)),
        ("shared", {}),
    ],
)
@pytest.mark.parametrize("measure", ["latency", "energy"])
def test_budget_is_met_within_one_percent(name, kwargs, measure, both):
    p = policy_by_name(name, **kwargs)
    for budget, scheme in ((0.6, "lagrange"), (0.75, "lagrange"), (0.6, "path"), (0.6, "msdnet")):
        r = p.costs(
            both[0], p.depth(both[0], system_thresholds(p, both[0], budget, scheme, measure))
        )
        assert budget * 0.99 <= float(r[measure].mean()) <= budget * (1 + 1e-6), (scheme, budget)


def test_more_budget_is_no_worse():
    a = make_answers(2, 7, 1500, length=4, seed=5)
    for p in (PartialLogits(), PartialLogits(range(6))):
        acc = [
            evaluate_system(p, a, system_thresholds(p, a, b))["accuracy"]
            for b in np.linspace(0.45, 1, 12)
        ]
        assert all(y >= x - 2 / 1500 for x, y in zip(acc, acc[1:]))


def test_a_score_that_knows_nothing_gets_the_static_mixture(both):
    valid, test = both
    right = joint_right(test).double().mean(1).tolist()
    costs = (test.costs[0] / test.costs[0, -1]).tolist()
    c = system_curve(RandomExit(shared=True), valid, test, [0.3, 0.5, 0.7, 0.9])
    for x, y in zip(c["cost"], c["accuracy"]):
        assert abs(y - float(static_mixture(costs, right, x))) < 0.035
    assert all(abs(v - 0.5) < 0.1 for v in system_auroc(RandomExit(), test)[:4])


def test_partial_logits_beat_chance_and_stay_below_the_oracle(both, capsys):
    valid, test = both
    rows = {r["name"]: r for r in system_table({n: n for n in POLICIES}, valid, test, 0.6)}
    assert rows["partial"]["over_mixture"] > 0.02
    assert rows["partial"]["bytes"] < rows["difference"]["bytes"] == 384
    assert all(rows[n]["below_oracle"] > -1e-9 for n in ("last", "partial", "quorum", "shared"))
    assert rows["last"]["cost"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(POLICIES)
    assert sum(rows["proxy"]["shares"]) == pytest.approx(1)
    assert rows["proxy"]["energy"] < rows["proxy"]["cost"]


def test_schemes_do_not_read_test_labels(both):
    "Thresholds depend on validation answers only; msdnet and path not on labels at all."
    valid, test = both
    blind = valid.subset(slice(None))
    blind.y = torch.zeros_like(valid.y)
    for p, scheme in itertools.product((DIFF, PartialLogits()), ("msdnet", "path")):
        assert system_thresholds(p, valid, 0.6, scheme) == system_thresholds(p, blind, 0.6, scheme)
    a, b = (
        system_curve(PartialLogits(), valid, t, [0.6, 0.8])
        for t in (test, test.subset(slice(0, 100)))
    )
    assert a["thresholds"] == b["thresholds"]


# ---------------------------------------------------------------- risk control on the joint answer (check 24)


def test_system_losses_are_those_of_the_joint_answer(both):
    a = both[1]
    L, cost = system_losses(DIFF, a, [3.0, 1.0, 0.2])
    for row, c, lam in zip(L, cost, (3.0, 1.0, 0.2)):
        r = evaluate_system(DIFF, a, DIFF.path(lam, 7))
        changed = a.logits(r["depth"]).argmax(-1) != a.joint(6).argmax(-1)
        assert (row == changed.double().numpy()).all() and c == pytest.approx(r["cost"])
    gap = system_losses(DIFF, a, [0.2], "gap")[0]
    assert set(np.unique(gap)) <= {-1.0, 0.0, 1.0}
    assert gap.mean() == pytest.approx(
        float((a.joint(6).argmax(-1) == a.y).double().mean())
        - evaluate_system(DIFF, a, DIFF.path(0.2, 7))["accuracy"]
    )


def test_control_ends_and_off_by_one(both):
    valid, test = both
    lams = lambda_grid(DIFF, test, 25)
    for m in METHODS[1:]:
        never = control_system(DIFF, valid, 0.0, 0.1, m, lams)
        free = control_system(DIFF, valid, 1.0, 0.1, m, lams)
        assert never.index == -1
        assert (DIFF.depth(valid, never.thresholds) == 6).all()
        assert never.cost == 1
        assert free.index == len(lams) - 1
    c = control_system(DIFF, valid, 0.05, 0.1, "ltt", lams)
    ok = passes(system_losses(DIFF, valid, lams)[0], 0.05, 0.1, "ltt")
    assert ok[: c.index + 1].all() and not ok[c.index + 1] and c.risk <= c.bound <= 0.05 + 1e-9
    row = system_losses(DIFF, valid, [c.lam])[0]
    assert passes(row, c.bound + 1e-6, 0.1, "ltt")[0]
    assert not passes(row, c.bound - 1e-4, 0.1, "ltt")[0]


def test_promises_hold_for_mixed_depths():
    "1000 calibration sets of 200 from a population whose true risk is known; epsilon .05, delta .1."
    world, rng = make_answers(2, 7, 4000, seed=11, length=8), np.random.default_rng(1)
    L = system_losses(
        DIFF, world, lambda_grid(DIFF, make_answers(2, 7, 500, seed=12, length=8), 20)
    )[0]
    true = L.mean(1)
    chosen = {m: [] for m in METHODS}
    for _ in range(10):
        sets = L[:, rng.integers(4000, size=(100, 200))].transpose(1, 0, 2)
        for m in METHODS:
            k = last_of_prefix(passes(sets, 0.05, 0.1, m))
            chosen[m].append(np.where(k < 0, 0, true[k]))
    risk = {m: np.concatenate(v) for m, v in chosen.items()}
    assert max((risk[m] > 0.05).mean() for m in ("ucb", "ltt")) <= 0.12
    assert risk["crc"].mean() <= 0.05
    assert (risk["naive"] > 0.05).mean() > 0.12 and risk[
        "ltt"
    ].mean() > 0.005  # the check can fail, and the methods do stop early


# ---------------------------------------------------------------- bad input

a5 = make_answers(2, 5, 20, length=4)
bare = SystemAnswers(a5.partial, a5.bias, a5.proxy, a5.y, a5.costs, a5.sizes)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: policy_by_name("cosine"), "choose one of last"),
        (lambda: DIFF.depth(bare), "features is None"),
        (lambda: NeighbourSimilarity().scores(bare), "keep them"),
        (lambda: ProxyHead().depth(a5), "T=None"),
        (lambda: DIFF.depth(a5, [1.0, 2.0]), "one threshold per exit"),
        (lambda: DIFF.depth(a5, [math.nan] * 5), "NaN"),
        (lambda: PartialLogits((1, 4)).scores(a5), "0..3"),
        (lambda: PartialLogits((2, 1)).scores(a5), "must rise"),
        (lambda: PartialLogits(rtt=-1), "rtt=-1"),
        (lambda: PartialLogits(score="cosine"), "unknown"),
        (lambda: system_thresholds("difference", a5, 0.1), "must lie between"),
        (lambda: system_thresholds("partial", a5, 2.7e7), "must lie between"),
        (lambda: system_thresholds("partial", a5, 0.7, "best"), "lagrange, msdnet, path"),
        (lambda: system_thresholds("partial", a5, 0.7, measure="bytes"), "latency, energy"),
        (lambda: evaluate_system("last", a5.subset(slice(0, 0))), "at least 1 image"),
        (lambda: mac_shares([[1.0, 2]], [[2]]), "0..1"),
        (lambda: mac_shares([[1.0, 2]], [[0], [1]]), "students"),
        (lambda: lambda_grid("last", a5), "no scores"),
        (lambda: system_losses("partial", a5, [0.1, 0.9]), "fall strictly"),
        (lambda: control_system("partial", a5, 0.1), "lams=None"),
        (lambda: control_system("partial", a5, 0.1, method="luck", lams=[0.5]), "must be one of"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_small_systems():
    "One student, one or two exits, one image: nothing breaks."
    assert [decision_points(E) for E in (1, 2, 3, 7)] == [(), (0,), (0, 1), (2, 4, 5)]
    assert SYSTEM_SCHEMES[0] == "lagrange"
    for N, E in ((1, 1), (1, 2), (3, 2), (2, 3)):
        a = make_answers(N, E, 12, length=5)
        for name in POLICIES:
            p = policy_by_name(name)
            d = p.depth(a.subset(slice(0, 1)), [0.5] * E)
            assert d.shape == (N, 1) and 0 <= int(d.min()) <= int(d.max()) < E
            assert evaluate_system(p, a, [math.inf] * E)["cost"] == 1
    with pytest.raises(NotImplementedError, match="must define"):
        SystemPolicy().scores(a5)


nan, inf = math.nan, math.inf
BAD = {
    "table": (lambda: joint_right(3), "a SystemAnswers"),
    "costs": (lambda: mac_shares([[nan, 1.0]], [[0]]), "costs must be finite"),
    "costs 0": (lambda: mac_shares([[0.0, 0.0]], [[0]]), "above 0 at the last exit"),
    "depth": (lambda: mac_shares([[1.0, 2.0]], [[0.5]]), "whole numbers"),
    "shared": (lambda: RandomExit(shared=2), "shared=2"),
    "seed": (lambda: RandomExit(seed=0.5), "seed=0.5"),
    "lam": (lambda: DIFF.path(nan, 3), "lam=nan"),
    "lam 2": (lambda: PartialLogits().path(nan, 3), "lam=nan"),
    "exits": (lambda: DIFF.path(1, 0), "n_exits=0"),
    "points": (lambda: PartialLogits((1.5,)), "a point=1.5"),
    "a point": (lambda: Quorum((-1,)), "a point=-1"),
    "rtt": (lambda: Quorum(rtt=nan), "rtt=nan"),
    "rtt inf": (lambda: Quorum(rtt=inf), "rtt=inf"),
    "go on": (lambda: Quorum(speculative="x"), "speculative='x'"),
    "confident": (lambda: Quorum(confident=2), "confident=2"),
    "local": (lambda: SharedScore(LastExit()), "stops alone"),
    "local 2": (lambda: SharedScore(3), "stops alone"),
    "decision": (lambda: decision_points(0), "n_exits=0"),
    "header": (lambda: evaluate_system("last", a5, header=-1), "header=-1"),
    "auroc": (lambda: system_auroc("proxy", a5.subset(slice(0, 0))), "at least 1 image"),
    "budget": (lambda: system_thresholds("proxy", a5, nan), "budget=nan"),
    "budgets": (lambda: system_curve("proxy", a5, a5, [nan]), "a budget=nan"),
    "measure": (lambda: system_curve("proxy", a5, a5, measure="x"), "measure='x'"),
    "grid": (lambda: lambda_grid("proxy", a5, 0), "size=0"),
    "lams": (lambda: system_losses("proxy", a5, [nan]), "lams must be free of NaN"),
    "epsilon": (lambda: control_system("proxy", a5, inf, lams=[0.5]), "epsilon=inf"),
    "delta": (lambda: control_system("proxy", a5, 0.1, 1, lams=[0.5]), "delta=1"),
    "bound": (lambda: control_system("proxy", a5, 0.1, bound=0, lams=[0.5]), "bound=0"),
    "risk": (lambda: control_system("proxy", a5, -1, lams=[0.5]), "epsilon=-1"),
    "rule": (lambda: policy_by_name(3), "choose one of"),
    "option": (lambda: policy_by_name("proxy", speed=3), "no option .speed."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_in_one_sentence(name):
    call, words = BAD[name]
    refused(call, words)


def test_thresholds_as_records_write_them(both):
    a = both[1]
    for p in (DIFF, PartialLogits(), ProxyHead()):
        assert torch.equal(
            p.depth(a, [1, "inf", 0.5, "-inf", None, 2, None]),
            p.depth(a, [1, inf, 0.5, -inf, inf, 2, -inf]),
        )
    assert torch.equal(
        DIFF.depth(a, [T, [1, None, None, None, None, None, None]]),
        DIFF.depth(a, [T, [1] + [inf] * 5 + [0]]),
    )
    assert (
        evaluate_system("proxy", a, np.float32([0.5] * 7))["accuracy"]
        == evaluate_system("proxy", a, torch.full((7,), 0.5))["accuracy"]
    )


def votes(*rows):
    "A table of one image and one exit before the last: `rows` are (class, confidence) of each student's local head, of three classes."
    z = torch.zeros(len(rows), 2, 1, 3)
    for n, (k, p) in enumerate(rows):
        z[n, :, 0, k] = math.log(2 * p / (1 - p))
    none = torch.zeros_like(z)
    return SystemAnswers(
        none,
        torch.zeros(3),
        z,
        torch.zeros(1).long(),
        torch.tensor([[1.0, 2]]).repeat(len(rows), 1),
        [3] * len(rows),
    )


def test_a_quorum_counts_and_breaks_ties_by_the_confidence_of_those_who_agree():
    score = lambda *rows: float(Quorum((0,), confident=True).scores(votes(*rows))[0, 0, 0])
    byte = lambda p: math.floor(256 * p) / 256
    assert score((1, 0.6), (1, 0.8), (2, 0.99)) == pytest.approx(
        2 + (byte(0.6) + byte(0.8)) / 2
    )  # the third does not agree, and does not count
    assert score((1, 0.6), (1, 0.8), (1, 0.7)) == pytest.approx(
        3 + (byte(0.6) + byte(0.8) + byte(0.7)) / 3
    )
    assert score((1, 0.9), (1, 0.9), (0, 0.4)) > score(
        (1, 0.6), (1, 0.6), (0, 0.99)
    )  # equal votes: the surer pair
    assert score((1, 0.99), (1, 0.99), (0, 0.9)) < score(
        (1, 0.4), (1, 0.4), (1, 0.4)
    )  # but never before more votes
    assert (
        score((1, 1 - 1e-9), (1, 1 - 1e-9)) == 2 + 255 / 256
    )  # one byte: below the next whole vote
    assert float(Quorum((0,)).scores(votes((1, 0.6), (1, 0.8), (2, 0.99)))[0, 0, 0]) == 2
    two_and_two = score(
        (2, 0.9), (2, 0.9), (0, 0.5), (0, 0.6)
    )  # a tie of classes: the first of them
    assert two_and_two == pytest.approx(2 + (byte(0.5) + byte(0.6)) / 2)

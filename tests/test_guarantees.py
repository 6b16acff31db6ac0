"Risk control of exits and the latency controller: exact numbers, and the guarantees themselves by Monte Carlo."
import math
import numpy as np
import pytest
import torch
from darkdistill_nb.guarantees import (METHODS, BanditController, LatencyController, ShadowMonitor, control_risk, exit_losses, hb_p_value, last_of_prefix,
                                       log_wealth, passes, sample_losses, simulate_queue)


def row(wrong, n): return np.repeat([[1., 0.]], [wrong, n - wrong], axis=1)


# ---------------------------------------------------------------- losses

def test_losses_against_a_loop():
    "Every kind against its definition, sample by sample."
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 30, 5, generator=g).double() * 2, torch.randint(5, (30,), generator=g)
    p, got = z.softmax(-1).numpy(), {k: sample_losses(z, k, y) for k in ("consistency", "gap", "brier", "hellinger")}
    free = sample_losses(z, "brier")
    for e in range(4):
        for i in range(30):
            a, b, last = p[e, i], p[3, i], p[3, i].argmax()
            one, top = np.eye(5)[y[i]], np.eye(5)[last]
            assert got["consistency"][e, i] == (a.argmax() != last)
            assert got["gap"][e, i] == float(a.argmax() != int(y[i])) - float(last != int(y[i]))
            assert got["brier"][e, i] == pytest.approx((((a - one) ** 2).sum() - ((b - one) ** 2).sum()) / 2)
            assert free[e, i] == pytest.approx((((a - top) ** 2).sum() - ((b - top) ** 2).sum()) / 2)
            assert got["hellinger"][e, i] == pytest.approx(math.sqrt(max(0, 1 - np.sqrt(a * b).sum())), abs=1e-7)
    for loss in (*got.values(), free): assert (loss[-1] == 0).all() and loss.min() >= -1 and loss.max() <= 1
    np.testing.assert_allclose(sample_losses(z.numpy(), "gap", y.numpy()), got["gap"])


two = np.zeros((2, 3))

@pytest.mark.parametrize("call, words", [
    (lambda: sample_losses(torch.zeros(2, 3, 4), "gap"), "needs the labels"), (lambda: sample_losses(torch.zeros(2, 3, 4), "acc"), "one of consistency, gap"),
    (lambda: sample_losses(torch.zeros(2, 0, 4)), "at least one sample"), (lambda: sample_losses(torch.full((2, 3, 4), math.nan)), "hold NaN"),
    (lambda: exit_losses(np.zeros((2, 0)), np.zeros((2, 0)), [.5]), "at least one sample"), (lambda: exit_losses(two, np.zeros((3, 3)), [.5]), "both be"),
    (lambda: exit_losses([[math.nan], [0]], [[0], [0]], [.5]), "NaN"), (lambda: exit_losses(two, two, [.1, .5]), "fall strictly"),
    (lambda: exit_losses(two, two, [.5, .5]), "fall strictly"), (lambda: exit_losses(two, two, [[.5] * 3]), "give one per exit"),
    (lambda: exit_losses(two, two, [.5], costs=[1]), "1 costs for 2 exits"), (lambda: passes(row(1, 9), -.1), "epsilon=-0.1"),
    (lambda: passes(row(1, 9), .1, delta=1), "delta=1"), (lambda: passes(row(1, 9), .1, method="hb"), "method='hb'"),
    (lambda: passes(-row(1, 9), .1), "clip them"), (lambda: passes(2 * row(1, 9), .1), "at most bound"),
    (lambda: passes(np.full((1, 3), math.nan), .1), "must be finite"), (lambda: passes(np.zeros(3), .1), "(thresholds, samples)"),
    (lambda: hb_p_value(.1, 0, .1), "n=0"), (lambda: hb_p_value(.1, 10, 1.5), "epsilon=1.5"), (lambda: LatencyController(math.inf), "budget=inf"),
    (lambda: LatencyController(1, eta=0), "eta=0"), (lambda: LatencyController(1, half_life=-1), "half_life=-1"),
    (lambda: LatencyController(1).update(math.nan), "latency=nan"), (lambda: ShadowMonitor([.5], .1, window=0), "window=0"),
    (lambda: ShadowMonitor([.5], 2.), "epsilon=2.0"), (lambda: BanditController([.5, .4], 0), "budget=0"),
    (lambda: simulate_queue(LatencyController(1), [1.], [[.5], [.5]], [1, 2], rho=.1), "need losses")])
def test_errors(call, words):
    with pytest.raises(ValueError) as e: call()
    assert words in str(e.value)


def test_exit_losses_against_a_loop_and_with_vectors():
    r = np.random.default_rng(0); s, l, c = r.random((4, 60)), r.random((4, 60)), [1., 2, 5, 9]
    s[0, :5] = .5                                                     # ties: a score equal to the threshold leaves
    vectors = np.sort(r.random((20, 4)), 0)[::-1]
    for grid in (np.linspace(1, 0, 21), vectors):
        L, cost = exit_losses(torch.as_tensor(s), torch.as_tensor(l), grid, c)
        for g in range(len(grid)):
            T = np.broadcast_to(grid[g], 4)
            e = [next((k for k in range(3) if s[k, i] >= T[k]), 3) for i in range(60)]
            np.testing.assert_array_equal(L[g], l[e, range(60)]); assert cost[g] == pytest.approx(np.mean([c[k] for k in e]))


# ---------------------------------------------------------------- tests of a threshold

def test_crc_limits():
    "R-hat <= ((n+1) eps - B)/n: .04905 for n=1000, .0405 for n=100, and only no loss at all for n=100, eps=.01."
    for n, eps, most in ((1000, .05, 49), (100, .05, 4), (100, .01, 0)):
        assert most / n <= ((n + 1) * eps - 1) / n < (most + 1) / n
        assert passes(row(most, n), eps, method="crc")[0] and not passes(row(most + 1, n), eps, method="crc")[0]
    assert ((1001) * .05 - 1) / 1000 == pytest.approx(.04905) and (101 * .05 - 1) / 100 == pytest.approx(.0405)
    fraction = np.full((1, 1000), .04904), np.full((1, 1000), .04906)
    assert [bool(passes(x, .05, method="crc")[0]) for x in fraction] == [True, False]
    assert passes(np.zeros((1, 99)), .01, method="crc")[0] and not passes(np.zeros((1, 98)), .01, method="crc")[0]


def test_hb_numbers():
    assert hb_p_value(.02, 500, .05) == pytest.approx(.00125, abs=1e-5) and hb_p_value(.02, 500, .05, binary=True) == pytest.approx(.00046, abs=1e-5)
    assert hb_p_value(.05, 500, .05) == 1 and hb_p_value(0, 100, .05) == pytest.approx(.00592, abs=1e-5) == .95 ** 100
    for k in range(101):   # k/n*n is not always k in floating point; the count must not slip
        assert hb_p_value(k / 100, 100, .3, binary=True) == pytest.approx(sum(math.comb(100, j) * .3**j * .7**(100 - j) for j in range(k + 1)), rel=1e-9)


def test_wealth_against_a_loop_and_grows_with_R():
    x, delta = np.random.default_rng(1).random(50) ** 3, .1
    def slow(R):
        K, best, mu_sum, var_sum, var = 1., 0., 0., .25, .25
        for i, v in enumerate(x, 1):
            nu = min(math.sqrt(2 * math.log(1 / delta) / (50 * var)), 1)
            K *= 1 - nu * (v - R); best = max(best, K)
            mu_sum += v; mean = (.5 + mu_sum) / (i + 1); var_sum += (v - mean) ** 2; var = var_sum / (i + 1)
        return best
    Rs = np.linspace(0, 1, 11); w = [float(log_wealth(x, R, delta)) for R in Rs]
    np.testing.assert_allclose(w, np.log([slow(R) for R in Rs])); assert np.all(np.diff(w) > 0)
    np.testing.assert_allclose(log_wealth(np.stack([x, x[::-1]])[:, None], .3, delta)[:, 0], [log_wealth(x, .3, delta), log_wealth(x[::-1], .3, delta)])


def test_ends():
    "eps=1 passes everything, eps=0 nothing (the naive rule excepted, where no loss was seen)."
    for m in METHODS:
        assert passes(row(50, 50), 1, method=m)[0] and passes(row(50, 50), 1.5, method=m)[0]
        assert bool(passes(row(0, 5000), 0, method=m)[0]) == (m == "naive") and not passes(row(1, 5000), 0, method=m)[0]
    s, l = np.random.default_rng(0).random((2, 3, 400)); l[-1] = 0; l = (l > .7).astype(float)
    for m in METHODS:
        grid = np.linspace(.99, 0, 34); one, zero = (control_risk(s, l, e, method=m, grid=grid) for e in (1, 0))
        assert one.index == 33 and one.lam == 0
        if m != "naive": assert (zero.index, zero.lam, zero.cost, zero.risk, zero.bound) == (-1, math.inf, 3., 0., None)


def test_prefix_rule():
    "The last index such that all up to it pass: not the last pass anywhere, and not the first failure."
    assert last_of_prefix([1, 1, 0, 1]) == 1 and last_of_prefix([0, 1]) == -1 and last_of_prefix([1, 1]) == 1
    s = np.array([np.linspace(0, 1, 1000)] * 2); l = np.zeros((2, 1000)); l[0, 400:500] = 1   # losses between scores .4 and .5
    grid = np.array([.8, .6, .45, .2]); L, _ = exit_losses(s, l, grid)
    for m in METHODS:
        ok = passes(L[:, np.random.default_rng(0).permutation(1000)], .02, .1, m); k = control_risk(s, l, .02, .1, m, grid).index
        assert ok.tolist() == [True, True, False, False] and k == 1, m                        # a rule one step too aggressive would answer 2


def test_bound_is_the_smallest_level_that_passes():
    from scipy.stats import beta
    s, l = np.ones((2, 100)), np.vstack([row(4, 100), np.zeros((1, 100))])
    got = {m: control_risk(s, l, .2, .1, m, grid=[.5]).bound for m in METHODS}
    want = {"naive": .04, "crc": 5 / 101, "ltt": beta.ppf(.9, 5, 96)}
    for m, v in want.items(): assert got[m] == pytest.approx(v, abs=2e-6)
    x = l[:1, np.random.default_rng(0).permutation(100)]               # the order in which control_risk lets the bets run
    for m, b in got.items(): assert passes(x, b + 1e-5, .1, m)[0] and not passes(x, b - 1e-5, .1, m)[0], m


def test_larger_bound_is_a_change_of_unit():
    L = np.random.default_rng(0).random((20, 150)) * np.linspace(.02, .4, 20)[:, None]
    for m in METHODS: assert (passes(L, .1, .1, m) == passes(2 * L, .2, .1, m, bound=2)).all(), m


# ---------------------------------------------------------------- the guarantees

GRID = np.linspace(.98, 0, 50)

def two_exits(rng, sets, n, kind):
    "Known risk: score u uniform, wrong with probability (1-u)/2; or a loss of that mean spread over [0, 1]."
    u = rng.random((sets, 1, n)); q = .5 * (1 - u)
    x = (rng.random((sets, 1, n)) < q).astype(float) if kind == "binary" else 2 * q * rng.random((sets, 1, n))
    return x * (u >= GRID[:, None])


def four_exits(rng, n, signed=False):
    "Losses that come and go as thresholds fall: exits disagree with the last one independently of each other."
    hard = rng.random(n); s = np.clip(1 - hard + .25 * rng.normal(size=(4, n)) + np.array([[0], [.08], [.16], [0]]), 0, 1)
    wrong = rng.random((4, n)) < .9 * hard ** 2 * np.array([[1], [.7], [.5], [0]])
    return s, np.where(wrong, np.where(rng.random((4, n)) < .3, -1., 1.) if signed else 1., 0.)


def choose(L, epsilon, method): return last_of_prefix(passes(L, epsilon, .1, method))


@pytest.mark.parametrize("kind", ["binary", "spread"])
def test_guarantee_with_known_risk(kind):
    "1000 calibration sets of 200: violations at most delta + .02 for UCB and LTT, mean risk at most epsilon for CRC, about half for the naive rule."
    true, risk = .25 * (1 - GRID) ** 2, {}
    for m in METHODS:
        rng = np.random.default_rng(7)
        k = np.concatenate([choose(two_exits(rng, 100, 200, kind), .05, m) for _ in range(10)])
        risk[m] = np.where(k < 0, 0, true[k])
    rate = {m: np.mean(r > .05) for m, r in risk.items()}
    assert rate["ucb"] <= .12 and rate["ltt"] <= .12, rate
    assert risk["crc"].mean() <= .05 and (.35 if kind == "binary" else .25) < rate["naive"] < .65, rate   # smooth losses vary less than one step of the grid
    assert min(r.mean() for r in risk.values()) > .005, "a method that never exits keeps any promise"


@pytest.mark.parametrize("signed", [False, True])
def test_guarantee_when_losses_are_not_monotone(signed):
    "Four exits; the true risk comes from a pool of 400,000 samples."
    rng = np.random.default_rng(0); pool = four_exits(rng, 400_000, signed)
    true = np.concatenate([exit_losses(*pool, [g])[0].mean(1) for g in GRID])
    risk = {m: [] for m in METHODS if not (signed and m == "ltt")}
    for _ in range(10):
        L = np.stack([exit_losses(*four_exits(rng, 200, signed), GRID)[0] for _ in range(100)])
        assert (np.diff(L, axis=1) < 0).any()                         # losses do fall as well as rise along the grid
        for m in risk: risk[m].append(choose(L, .05, m))
    risk = {m: np.where((k := np.concatenate(v)) < 0, 0, true[k]) for m, v in risk.items()}
    assert np.mean(risk["ucb"] > .05) <= .12 and risk["crc"].mean() <= .05 and np.mean(risk["naive"] > .05) > .3
    assert risk["ucb"].mean() > .003
    if not signed: assert np.mean(risk["ltt"] > .05) <= .12 and risk["ltt"].mean() > .003


def test_first_failing_threshold_breaks_the_promise():
    "The off-by-one rule of public code, on a coarse grid, under the same test."
    true, rng, rows = .25 * (1 - GRID[5::10]) ** 2, np.random.default_rng(3), slice(5, None, 10)
    k = np.concatenate([choose(two_exits(rng, 100, 200, "binary")[:, rows], .05, "ltt") for _ in range(10)])
    assert np.mean(np.where(k < 0, 0, true[k]) > .05) <= .12 and np.mean(true[np.minimum(k + 1, 4)] > .05) > .3


# ---------------------------------------------------------------- the controller

def drive(c, plant, T):
    lam, late = [c.lam], []
    for _ in range(T):
        latency = plant(lam[-1]); late.append(latency / c.budget - 1); lam.append(c.update(latency))
    return np.array(lam), float(np.mean(late))


@pytest.mark.parametrize("plant", [lambda v: 1 + 3 * v, lambda v: .5 + 4 * v ** 2, lambda v: 2 + math.tanh(4 * v - 2)])
@pytest.mark.parametrize("eta", [.02, .1])
def test_controller_converges_on_a_constant_plant(plant, eta):
    budget = plant(.55); T = 2000
    lam, mean = drive(LatencyController(budget, eta=eta, lam=.8, half_life=0), plant, T)
    assert lam[-1] == pytest.approx(.55, abs=1e-6) and lam.min() > 0 and lam.max() < 1
    assert mean == pytest.approx((lam[0] - lam[-1]) / (eta * T), abs=1e-12) and abs(mean) <= 1 / (eta * T)
    assert np.abs(lam[int(10 / eta):] - .55).max() < .01              # on the scale of 1/eta steps
    c = LatencyController(budget, eta=.02, lam=.7); lam, mean = drive(c, plant, T)
    assert mean == pytest.approx((lam[0] - lam[-1]) / (.02 * T) + (1 / c.alpha - 1) * c.late / T, abs=1e-12) and lam[-1] == pytest.approx(.55, abs=1e-3)


def test_noisy_latency_meets_the_budget_on_average():
    rng = np.random.default_rng(0)
    lam, mean = drive(LatencyController(2.5, eta=.02, lam=.9, half_life=0), lambda v: (1 + 3 * v) * rng.gamma(4, .25), 5000)
    assert 0 < lam.min() and lam.max() < 1 and abs(mean) <= 1 / (.02 * 5000)


@pytest.mark.parametrize("half_life", [0, 20])
def test_infeasible_budget_rests_at_the_bound(half_life):
    plant = lambda v: 1 + 3 * v
    for priority, bound in (("quality", .6), ("deadline", .1)):
        c = LatencyController(.8, eta=.05, lam=1, floor=.1, safe=.6, priority=priority, half_life=half_life); lam, _ = drive(c, plant, 500)
        assert lam[-1] == bound and (np.diff(lam) <= 0).all() and lam.min() >= bound and [e["event"] for e in c.log] == ["infeasible"]
    c = LatencyController(50., eta=.05, lam=.2, safe=.1); lam, _ = drive(c, plant, 300)      # more time than the network can use
    assert lam[-1] == 1 and not c.log


def test_quality_first_never_goes_below_a_moving_safe_threshold():
    class Moving:
        lam = .3
        def add(self, s, l): self.lam = float(l[0])
    rng, c = np.random.default_rng(0), LatencyController(1., eta=.1, safe=(m := Moving()), half_life=5)
    for _ in range(500):
        lam = c.update(rng.exponential(2.), shadow=([1.], [rng.random()]) if rng.random() < .2 else None)
        assert m.lam <= lam <= 1
    assert c.log[0]["event"] == "infeasible"


def test_timeouts_are_counted_and_otherwise_ignored():
    c = LatencyController(1., lam=.5); lam = c.update(1.2); late = c.late
    assert c.update(None) == lam and c.late == late and c.timeouts == 1 and c.t == 2


def test_shadow_monitor():
    "UCB equals a calibration on the window, newest first; ACI keeps its long-run bound on an adversarial stream."
    rng = np.random.default_rng(0); s, l = four_exits(rng, 600); m = ShadowMonitor(GRID, .05, window=300, every=100)
    assert m.lam == math.inf
    for i in range(600): m.add(s[:, i], l[:, i])
    assert m.index == last_of_prefix(passes(exit_losses(s[:, :299:-1], l[:, :299:-1], GRID)[0], .05, .1, "ucb")) >= 0
    a = ShadowMonitor(GRID, .05, window=100, method="aci", gamma=.02)
    for t in range(3000):                                              # wrong exactly where the monitor would leave early
        a.add([.99, 1.] if t % 500 < 250 else [.1, 1.], [float(a.lam <= .99), 0.])
    assert np.mean(a.errors) <= .05 + (.05 + .02) / (.02 * 3000) and np.mean(a.errors) > .01
    assert np.mean(a.errors) == pytest.approx(.05 + (.05 - a.level) / (.02 * 3000))


def test_sorted_calibration_data_are_shuffled():
    "Harmless samples first would win the bet; control_risk gives the same kind of answer for any order of the file."
    s, l = np.ones((2, 500)), np.zeros((2, 500)); l[0, 440:] = 1       # risk .12
    assert passes(l[:1], .05, .1, "ucb")[0]
    for seed in range(5): assert control_risk(s, l, .05, .1, "ucb", grid=[.5], seed=seed).index == -1


def test_newest_first_sees_a_change_sooner():
    "After 400 samples without a loss, 100 bad ones: the same window certifies a bad threshold in arrival order only."
    x = np.r_[np.zeros(400), (np.arange(100) % 2)][None]
    assert passes(x, .05, .1, "ucb")[0] and not passes(x[:, ::-1], .05, .1, "ucb")[0]


def test_queue_by_hand_and_in_the_mean():
    class Fixed:
        lam = .5
        def update(self, *a, **k): pass
    s = [[.4, .9], [1., 1.]]
    out = simulate_queue(Fixed(), [1., 1, 5, 1], s, [1, 2])            # services 2, 1, 2, 1; waits 0, 1, 1, 0
    assert out["latency"].tolist() == [2, 2, 3, 1] and out["exit"].tolist() == [1, 0, 1, 0]
    gaps = np.random.default_rng(0).exponential(2., 100_000)           # M/D/1 at half load: service 1, mean wait 1/2
    assert simulate_queue(Fixed(), gaps, [[.9], [1.]], [1, 2])["latency"].mean() == pytest.approx(1.5, abs=.02)


def test_bandit_follows_the_best_arm():
    b, tried = BanditController(np.linspace(.9, .2, 8), 1., kappa=.5, window=200), []
    for t in range(2000):
        tried.append(b.arm); arm = b.lam
        b.update(latency=2 * arm if t >= 1000 else .5, gain=arm if t < 1000 else .2 + .5 * (arm == b.arms[5]))
    assert set(tried[:8]) == set(range(8)) and np.mean(np.array(tried[500:1000]) == 0) > .4 and np.mean(np.array(tried[1500:]) == 5) > .4

"Risk control of exits and the latency controller: exact numbers, and the guarantees themselves by Monte Carlo."

import math
import numpy as np
import pytest
import torch
from darkdistill_nb.exits.bounds import (
    grid_losses,
    hb_p_value,
    last_of_prefix,
    log_wealth,
    sample_losses,
)
from darkdistill_nb.exits.guarantees import METHODS, control_risk, passes
from darkdistill_nb.exits.control import (
    BanditController,
    LatencyController,
    ShadowMonitor,
    simulate_queue,
)


def row(wrong, n):
    return np.repeat([[1.0, 0.0]], [wrong, n - wrong], axis=1)


# ---------------------------------------------------------------- losses


def test_losses_against_a_loop():
    "Every kind against its definition, sample by sample."
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 30, 5, generator=g).double() * 2, torch.randint(5, (30,), generator=g)
    p = z.softmax(-1).numpy()
    got = {k: sample_losses(z, k, y) for k in ("consistency", "gap", "brier", "hellinger")}
    free = sample_losses(z, "brier")
    for e in range(4):
        for i in range(30):
            a, b, last = p[e, i], p[3, i], p[3, i].argmax()
            one, top = np.eye(5)[y[i]], np.eye(5)[last]
            assert got["consistency"][e, i] == (a.argmax() != last)
            assert got["gap"][e, i] == float(a.argmax() != int(y[i])) - float(last != int(y[i]))
            assert got["brier"][e, i] == pytest.approx(
                (((a - one) ** 2).sum() - ((b - one) ** 2).sum()) / 2
            )
            assert free[e, i] == pytest.approx(
                (((a - top) ** 2).sum() - ((b - top) ** 2).sum()) / 2
            )
            assert got["hellinger"][e, i] == pytest.approx(
                math.sqrt(max(0, 1 - np.sqrt(a * b).sum())), abs=1e-7
            )
    for loss in (*got.values(), free):
        assert (loss[-1] == 0).all() and loss.min() >= -1 and loss.max() <= 1
    np.testing.assert_allclose(sample_losses(z.numpy(), "gap", y.numpy()), got["gap"])


two = np.zeros((2, 3))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sample_losses(torch.zeros(2, 3, 4), "gap"), "needs the labels"),
        (lambda: sample_losses(torch.zeros(2, 3, 4), "acc"), "one of consistency, gap"),
        (lambda: sample_losses(torch.zeros(2, 0, 4)), "at least one sample"),
        (lambda: sample_losses(torch.full((2, 3, 4), math.nan)), "hold NaN"),
        (lambda: grid_losses(np.zeros((2, 0)), np.zeros((2, 0)), [0.5]), "at least one sample"),
        (lambda: grid_losses(two, np.zeros((3, 3)), [0.5]), "both be"),
        (lambda: grid_losses([[math.nan], [0]], [[0], [0]], [0.5]), "NaN"),
        (lambda: grid_losses(two, two, [0.1, 0.5]), "fall strictly"),
        (lambda: grid_losses(two, two, [0.5, 0.5]), "fall strictly"),
        (lambda: grid_losses(two, two, [[0.5] * 3]), "give one per exit"),
        (lambda: grid_losses(two, two, [0.5], costs=[1]), "1 costs for 2 exits"),
        (lambda: passes(row(1, 9), -0.1), "epsilon=-0.1"),
        (lambda: passes(row(1, 9), 0.1, delta=1), "delta=1"),
        (lambda: passes(row(1, 9), 0.1, method="hb"), "method='hb'"),
        (lambda: passes(-row(1, 9), 0.1), "clip them"),
        (lambda: passes(2 * row(1, 9), 0.1), "at most bound"),
        (lambda: passes(np.full((1, 3), math.nan), 0.1), "must be finite"),
        (lambda: passes(np.zeros(3), 0.1), "(thresholds, samples)"),
        (lambda: hb_p_value(0.1, 0, 0.1), "n=0"),
        (lambda: hb_p_value(0.1, 10, 1.5), "epsilon=1.5"),
        (lambda: LatencyController(math.inf), "budget=inf"),
        (lambda: LatencyController(1, eta=0), "eta=0"),
        (lambda: LatencyController(1, half_life=-1), "half_life=-1"),
        (lambda: LatencyController(1).update(math.nan), "latency=nan"),
        (lambda: ShadowMonitor([0.5], 0.1, window=0), "window=0"),
        (lambda: ShadowMonitor([0.5], 2.0), "epsilon=2.0"),
        (lambda: BanditController([0.5, 0.4], 0), "budget=0"),
        (
            lambda: simulate_queue(LatencyController(1), [1.0], [[0.5], [0.5]], [1, 2], rho=0.1),
            "need losses",
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert words in str(e.value)


def test_exit_losses_against_a_loop_and_with_vectors():
    r = np.random.default_rng(0)
    s, l, c = r.random((4, 60)), r.random((4, 60)), [1.0, 2, 5, 9]
    s[0, :5] = 0.5  # ties: a score equal to the threshold leaves
    vectors = np.sort(r.random((20, 4)), 0)[::-1]
    for grid in (np.linspace(1, 0, 21), vectors):
        L, cost = grid_losses(torch.as_tensor(s), torch.as_tensor(l), grid, c)
        for g in range(len(grid)):
            T = np.broadcast_to(grid[g], 4)
            e = [next((k for k in range(3) if s[k, i] >= T[k]), 3) for i in range(60)]
            np.testing.assert_array_equal(L[g], l[e, range(60)])
            assert cost[g] == pytest.approx(np.mean([c[k] for k in e]))


# ---------------------------------------------------------------- tests of a threshold


def test_crc_limits():
    "R-hat <= ((n+1) eps - B)/n: .04905 for n=1000, .0405 for n=100, and only no loss at all for n=100, eps=.01."
    for n, eps, most in ((1000, 0.05, 49), (100, 0.05, 4), (100, 0.01, 0)):
        assert most / n <= ((n + 1) * eps - 1) / n < (most + 1) / n
        assert passes(row(most, n), eps, method="crc")[0]
        assert not passes(row(most + 1, n), eps, method="crc")[0]
    assert ((1001) * 0.05 - 1) / 1000 == pytest.approx(0.04905)
    assert (101 * 0.05 - 1) / 100 == pytest.approx(0.0405)
    fraction = np.full((1, 1000), 0.04904), np.full((1, 1000), 0.04906)
    assert [bool(passes(x, 0.05, method="crc")[0]) for x in fraction] == [True, False]
    assert passes(np.zeros((1, 99)), 0.01, method="crc")[0]
    assert not passes(np.zeros((1, 98)), 0.01, method="crc")[0]


def test_hb_numbers():
    assert hb_p_value(0.02, 500, 0.05) == pytest.approx(0.00125, abs=1e-5)
    assert hb_p_value(0.02, 500, 0.05, binary=True) == pytest.approx(0.00046, abs=1e-5)
    assert hb_p_value(0.05, 500, 0.05) == 1
    assert hb_p_value(0, 100, 0.05) == pytest.approx(0.00592, abs=1e-5) == 0.95**100
    for k in range(101):  # k/n*n is not always k in floating point; the count must not slip
        assert hb_p_value(k / 100, 100, 0.3, binary=True) == pytest.approx(
            sum(math.comb(100, j) * 0.3**j * 0.7 ** (100 - j) for j in range(k + 1)), rel=1e-9
        )


def test_wealth_against_a_loop_and_grows_with_R():
    x, delta = np.random.default_rng(1).random(50) ** 3, 0.1

    def slow(R):
        K, best, mu_sum, var_sum, var = 1.0, 0.0, 0.0, 0.25, 0.25
        for i, v in enumerate(x, 1):
            nu = min(math.sqrt(2 * math.log(1 / delta) / (50 * var)), 1)
            K *= 1 - nu * (v - R)
            best = max(best, K)
            mu_sum += v
            mean = (0.5 + mu_sum) / (i + 1)
            var_sum += (v - mean) ** 2
            var = var_sum / (i + 1)
        return best

    Rs = np.linspace(0, 1, 11)
    w = [float(log_wealth(x, R, delta)) for R in Rs]
    np.testing.assert_allclose(w, np.log([slow(R) for R in Rs]))
    assert np.all(np.diff(w) > 0)
    np.testing.assert_allclose(
        log_wealth(np.stack([x, x[::-1]])[:, None], 0.3, delta)[:, 0],
        [log_wealth(x, 0.3, delta), log_wealth(x[::-1], 0.3, delta)],
    )


def test_ends():
    "eps=1 passes everything, eps=0 nothing (the naive rule excepted, where no loss was seen)."
    for m in METHODS:
        assert passes(row(50, 50), 1, method=m)[0] and passes(row(50, 50), 1.5, method=m)[0]
        assert bool(passes(row(0, 5000), 0, method=m)[0]) == (m == "naive")
        assert not passes(row(1, 5000), 0, method=m)[0]
    s, l = np.random.default_rng(0).random((2, 3, 400))
    l[-1] = 0
    l = (l > 0.7).astype(float)
    for m in METHODS:
        grid = np.linspace(0.99, 0, 34)
        one, zero = (control_risk(s, l, e, method=m, grid=grid) for e in (1, 0))
        assert one.index == 33 and one.lam == 0
        if m != "naive":
            assert (zero.index, zero.lam, zero.cost, zero.risk, zero.bound) == (
                -1,
                math.inf,
                3.0,
                0.0,
                None,
            )


def test_prefix_rule():
    "The last index such that all up to it pass: not the last pass anywhere, and not the first failure."
    assert last_of_prefix([1, 1, 0, 1]) == 1
    assert last_of_prefix([0, 1]) == -1
    assert last_of_prefix([1, 1]) == 1
    s = np.array([np.linspace(0, 1, 1000)] * 2)
    l = np.zeros((2, 1000))
    l[0, 400:500] = 1  # losses between scores .4 and .5
    grid = np.array([0.8, 0.6, 0.45, 0.2])
    L, _ = grid_losses(s, l, grid)
    for m in METHODS:
        ok = passes(L[:, np.random.default_rng(0).permutation(1000)], 0.02, 0.1, m)
        k = control_risk(s, l, 0.02, 0.1, m, grid).index
        assert ok.tolist() == [True, True, False, False] and k == 1, (
            m
        )  # a rule one step too aggressive would answer 2


def test_bound_is_the_smallest_level_that_passes():
    from scipy.stats import beta

    s, l = np.ones((2, 100)), np.vstack([row(4, 100), np.zeros((1, 100))])
    got = {m: control_risk(s, l, 0.2, 0.1, m, grid=[0.5]).bound for m in METHODS}
    want = {"naive": 0.04, "crc": 5 / 101, "ltt": beta.ppf(0.9, 5, 96)}
    for m, v in want.items():
        assert got[m] == pytest.approx(v, abs=2e-6)
    x = l[
        :1, np.random.default_rng(0).permutation(100)
    ]  # the order in which control_risk lets the bets run
    for m, b in got.items():
        assert passes(x, b + 1e-5, 0.1, m)[0] and not passes(x, b - 1e-5, 0.1, m)[0], m


def test_larger_bound_is_a_change_of_unit():
    L = np.random.default_rng(0).random((20, 150)) * np.linspace(0.02, 0.4, 20)[:, None]
    for m in METHODS:
        assert (passes(L, 0.1, 0.1, m) == passes(2 * L, 0.2, 0.1, m, bound=2)).all(), m


# ---------------------------------------------------------------- the guarantees

GRID = np.linspace(0.98, 0, 50)


def two_exits(rng, sets, n, kind):
    "Known risk: score u uniform, wrong with probability (1-u)/2; or a loss of that mean spread over [0, 1]."
    u = rng.random((sets, 1, n))
    q = 0.5 * (1 - u)
    x = (
        (rng.random((sets, 1, n)) < q).astype(float)
        if kind == "binary"
        else 2 * q * rng.random((sets, 1, n))
    )
    return x * (u >= GRID[:, None])


def four_exits(rng, n, signed=False):
    "Losses that come and go as thresholds fall: exits disagree with the last one independently of each other."
    hard = rng.random(n)
    s = np.clip(
        1 - hard + 0.25 * rng.normal(size=(4, n)) + np.array([[0], [0.08], [0.16], [0]]), 0, 1
    )
    wrong = rng.random((4, n)) < 0.9 * hard**2 * np.array([[1], [0.7], [0.5], [0]])
    return s, np.where(wrong, np.where(rng.random((4, n)) < 0.3, -1.0, 1.0) if signed else 1.0, 0.0)


def choose(L, epsilon, method):
    return last_of_prefix(passes(L, epsilon, 0.1, method))


@pytest.mark.parametrize("kind", ["binary", "spread"])
def test_guarantee_with_known_risk(kind):
    "1000 calibration sets of 200: violations at most delta + .02 for UCB and LTT, mean risk at most epsilon for CRC, about half for the naive rule."
    true, risk = 0.25 * (1 - GRID) ** 2, {}
    for m in METHODS:
        rng = np.random.default_rng(7)
        k = np.concatenate([choose(two_exits(rng, 100, 200, kind), 0.05, m) for _ in range(10)])
        risk[m] = np.where(k < 0, 0, true[k])
    rate = {m: np.mean(r > 0.05) for m, r in risk.items()}
    assert rate["ucb"] <= 0.12 and rate["ltt"] <= 0.12, rate
    assert (
        risk["crc"].mean() <= 0.05 and (0.35 if kind == "binary" else 0.25) < rate["naive"] < 0.65
    ), rate  # smooth losses vary less than one step of the grid
    assert min(r.mean() for r in risk.values()) > 0.005, (
        "a method that never exits keeps any promise"
    )


@pytest.mark.parametrize("signed", [False, True])
def test_guarantee_when_losses_are_not_monotone(signed):
    "Four exits; the true risk comes from a pool of 400,000 samples."
    rng = np.random.default_rng(0)
    pool = four_exits(rng, 400_000, signed)
    true = np.concatenate([grid_losses(*pool, [g])[0].mean(1) for g in GRID])
    risk = {m: [] for m in METHODS if not (signed and m == "ltt")}
    for _ in range(10):
        L = np.stack([grid_losses(*four_exits(rng, 200, signed), GRID)[0] for _ in range(100)])
        assert (np.diff(L, axis=1) < 0).any()  # losses do fall as well as rise along the grid
        for m in risk:
            risk[m].append(choose(L, 0.05, m))
    risk = {m: np.where((k := np.concatenate(v)) < 0, 0, true[k]) for m, v in risk.items()}
    assert np.mean(risk["ucb"] > 0.05) <= 0.12
    assert risk["crc"].mean() <= 0.05
    assert np.mean(risk["naive"] > 0.05) > 0.3
    assert risk["ucb"].mean() > 0.003
    if not signed:
        assert np.mean(risk["ltt"] > 0.05) <= 0.12 and risk["ltt"].mean() > 0.003


def test_first_failing_threshold_breaks_the_promise():
    "The off-by-one rule of public code, on a coarse grid, under the same test."
    true, rng, rows = 0.25 * (1 - GRID[5::10]) ** 2, np.random.default_rng(3), slice(5, None, 10)
    k = np.concatenate(
        [choose(two_exits(rng, 100, 200, "binary")[:, rows], 0.05, "ltt") for _ in range(10)]
    )
    assert np.mean(np.where(k < 0, 0, true[k]) > 0.05) <= 0.12
    assert np.mean(true[np.minimum(k + 1, 4)] > 0.05) > 0.3


# ---------------------------------------------------------------- the controller


def drive(c, plant, T):
    lam, late = [c.lam], []
    for _ in range(T):
        latency = plant(lam[-1])
        late.append(latency / c.budget - 1)
        lam.append(c.update(latency))
    return np.array(lam), float(np.mean(late))


@pytest.mark.parametrize(
    "plant", [lambda v: 1 + 3 * v, lambda v: 0.5 + 4 * v**2, lambda v: 2 + math.tanh(4 * v - 2)]
)
@pytest.mark.parametrize("eta", [0.02, 0.1])
def test_controller_converges_on_a_constant_plant(plant, eta):
    budget = plant(0.55)
    T = 2000
    lam, mean = drive(LatencyController(budget, eta=eta, lam=0.8, half_life=0), plant, T)
    assert lam[-1] == pytest.approx(0.55, abs=1e-6) and lam.min() > 0 and lam.max() < 1
    assert mean == pytest.approx((lam[0] - lam[-1]) / (eta * T), abs=1e-12)
    assert abs(mean) <= 1 / (eta * T)
    assert np.abs(lam[int(10 / eta) :] - 0.55).max() < 0.01  # on the scale of 1/eta steps
    c = LatencyController(budget, eta=0.02, lam=0.7)
    lam, mean = drive(c, plant, T)
    assert mean == pytest.approx(
        (lam[0] - lam[-1]) / (0.02 * T) + (1 / c.alpha - 1) * c.late / T, abs=1e-12
    )
    assert lam[-1] == pytest.approx(0.55, abs=1e-3)


def test_noisy_latency_meets_the_budget_on_average():
    rng = np.random.default_rng(0)
    lam, mean = drive(
        LatencyController(2.5, eta=0.02, lam=0.9, half_life=0),
        lambda v: (1 + 3 * v) * rng.gamma(4, 0.25),
        5000,
    )
    assert 0 < lam.min() and lam.max() < 1 and abs(mean) <= 1 / (0.02 * 5000)


@pytest.mark.parametrize("half_life", [0, 20])
def test_infeasible_budget_rests_at_the_bound(half_life):
    plant = lambda v: 1 + 3 * v
    for priority, bound in (("quality", 0.6), ("deadline", 0.1)):
        c = LatencyController(
            0.8, eta=0.05, lam=1, floor=0.1, safe=0.6, priority=priority, half_life=half_life
        )
        lam, _ = drive(c, plant, 500)
        assert lam[-1] == bound
        assert (np.diff(lam) <= 0).all()
        assert lam.min() >= bound
        assert [e["event"] for e in c.log] == ["infeasible"]
    c = LatencyController(50.0, eta=0.05, lam=0.2, safe=0.1)
    lam, _ = drive(c, plant, 300)  # more time than the network can use
    assert lam[-1] == 1 and not c.log


def test_quality_first_never_goes_below_a_moving_safe_threshold():
    class Moving:
        lam = 0.3

        def add(self, s, l):
            self.lam = float(l[0])

    rng = np.random.default_rng(0)
    c = LatencyController(1.0, eta=0.1, safe=(m := Moving()), half_life=5)
    for _ in range(500):
        lam = c.update(
            rng.exponential(2.0), shadow=([1.0], [rng.random()]) if rng.random() < 0.2 else None
        )
        assert m.lam <= lam <= 1
    assert c.log[0]["event"] == "infeasible"


def test_timeouts_are_counted_and_otherwise_ignored():
    c = LatencyController(1.0, lam=0.5)
    lam = c.update(1.2)
    late = c.late
    assert c.update(None) == lam and c.late == late and c.timeouts == 1 and c.t == 2


def test_shadow_monitor():
    "UCB equals a calibration on the window, newest first; ACI keeps its long-run bound on an adversarial stream."
    rng = np.random.default_rng(0)
    s, l = four_exits(rng, 600)
    m = ShadowMonitor(GRID, 0.05, window=300, every=100)
    assert m.lam == math.inf
    for i in range(600):
        m.add(s[:, i], l[:, i])
    assert (
        m.index
        == last_of_prefix(
            passes(grid_losses(s[:, :299:-1], l[:, :299:-1], GRID)[0], 0.05, 0.1, "ucb")
        )
        >= 0
    )
    a = ShadowMonitor(GRID, 0.05, window=100, method="aci", gamma=0.02)
    for t in range(3000):  # wrong exactly where the monitor would leave early
        a.add([0.99, 1.0] if t % 500 < 250 else [0.1, 1.0], [float(a.lam <= 0.99), 0.0])
    assert np.mean(a.errors) <= 0.05 + (0.05 + 0.02) / (0.02 * 3000) and np.mean(a.errors) > 0.01
    assert np.mean(a.errors) == pytest.approx(0.05 + (0.05 - a.level) / (0.02 * 3000))


def test_sorted_calibration_data_are_shuffled():
    "Harmless samples first would win the bet; control_risk gives the same kind of answer for any order of the file."
    s, l = np.ones((2, 500)), np.zeros((2, 500))
    l[0, 440:] = 1  # risk .12
    assert passes(l[:1], 0.05, 0.1, "ucb")[0]
    for seed in range(5):
        assert control_risk(s, l, 0.05, 0.1, "ucb", grid=[0.5], seed=seed).index == -1


def test_newest_first_sees_a_change_sooner():
    "After 400 samples without a loss, 100 bad ones: the same window certifies a bad threshold in arrival order only."
    x = np.r_[np.zeros(400), (np.arange(100) % 2)][None]
    assert passes(x, 0.05, 0.1, "ucb")[0] and not passes(x[:, ::-1], 0.05, 0.1, "ucb")[0]


def test_queue_by_hand_and_in_the_mean():
    class Fixed:
        lam = 0.5

        def update(self, *a, **k):
            pass

    s = [[0.4, 0.9], [1.0, 1.0]]
    out = simulate_queue(
        Fixed(), [1.0, 1, 5, 1], s, [1, 2]
    )  # services 2, 1, 2, 1; waits 0, 1, 1, 0
    assert out["latency"].tolist() == [2, 2, 3, 1] and out["exit"].tolist() == [1, 0, 1, 0]
    gaps = np.random.default_rng(0).exponential(
        2.0, 100_000
    )  # M/D/1 at half load: service 1, mean wait 1/2
    assert simulate_queue(Fixed(), gaps, [[0.9], [1.0]], [1, 2])["latency"].mean() == pytest.approx(
        1.5, abs=0.02
    )


def test_bandit_follows_the_best_arm():
    b, tried = BanditController(np.linspace(0.9, 0.2, 8), 1.0, kappa=0.5, window=200), []
    for t in range(2000):
        tried.append(b.arm)
        arm = b.lam
        b.update(
            latency=2 * arm if t >= 1000 else 0.5,
            gain=arm if t < 1000 else 0.2 + 0.5 * (arm == b.arms[5]),
        )
    assert set(tried[:8]) == set(range(8))
    assert np.mean(np.array(tried[500:1000]) == 0) > 0.4
    assert np.mean(np.array(tried[1500:]) == 5) > 0.4


# ---------------------------------------------------------------- the monitor's order, and what mutants could change

LATE = np.r_[
    np.zeros(400), np.arange(100) % 2
]  # harmless for 400 samples, then every second one is wrong


def stacked(l):
    return np.ones((2, len(l))), np.stack([l, 0 * l])


@pytest.mark.parametrize("how", ["fill", "add"])
def test_the_monitor_bets_on_the_newest_first(how):
    "The same losses in the other order certify the threshold: order decides, and it is newest first."
    for l, lam in ((LATE, math.inf), (LATE[::-1], 0.5)):
        s, x = stacked(l)
        m = ShadowMonitor([0.5], 0.05, window=500, every=500)
        if how == "fill":
            m.fill(s, x)
        else:
            for i in range(500):
                m.add(s[:, i], x[:, i])
        assert m.lam == lam
        assert (m.lam < math.inf) == bool(passes(l[::-1][None], 0.05, 0.1, "ucb")[0])


def test_the_window_forgets_the_oldest():
    s, x = stacked(np.r_[np.ones(100), np.zeros(300)])
    assert [
        ShadowMonitor([0.5], 0.2, window=w, method="aci").fill(s, x).lam for w in (300, 400)
    ] == [0.5, math.inf]  # mean loss 0, and 1/4


def test_the_monitor_recomputes_every_so_many():
    m = ShadowMonitor([0.5], 0.3, window=200, every=50)
    lams = [m.add([1.0, 1.0], [0.0, 0.0]) for _ in range(120)]
    assert lams[:49] == [math.inf] * 49 and lams[49:] == [0.5] * 71 and m.n == 120
    assert [i for i in range(120) if i == 0 or lams[i] != lams[i - 1]] == [0, 49]


def test_aci_level_by_hand():
    "eps_{t+1} = eps_t + gamma (eps - err_t); the naive choice at that level; never exits below 0."
    m = ShadowMonitor([0.5], 0.1, window=10, method="aci", gamma=0.2)
    assert m.lam == math.inf
    assert m.add([1.0, 1.0], [1.0, 0.0]) == math.inf
    assert m.errors == [0.0]
    assert m.level == pytest.approx(0.12)
    assert m.add([0.1, 1.0], [1.0, 0.0]) == math.inf and m.level == pytest.approx(
        0.14
    )  # mean loss 1/2 > .14
    for _ in range(8):
        m.add([1.0, 1.0], [0.0, 0.0])
    assert m.lam == 0.5 and m.level == pytest.approx(0.30)
    m.add([1.0, 1.0], [1.0, 0.0])  # now it counts: err = 1
    assert m.errors[-1] == 1.0 and m.level == pytest.approx(0.30 + 0.2 * (0.1 - 1))
    for rows in (np.zeros(1), -np.ones(1)):  # a gain does not buy a negative level
        m.rows.clear()
        m.rows.append(rows)
        m.level = -1e-9
        m._choose()
        assert m.lam == math.inf
    m.level = 0.0
    m.rows.clear()
    m.rows.append(np.zeros(1))
    m._choose()
    assert m.lam == 0.5  # level 0 and no loss: allowed


def test_log_of_conflicts_by_hand():
    "A conflict is logged once it has lasted `hold` requests, and once more when it is over; the bound of the counter is twice that."
    c = LatencyController(1.0, eta=0.5, lam=0.5, safe=0.5, half_life=4)
    assert c.hold == 4 and c.alpha == pytest.approx(1 - 2**-0.25)
    for t in range(1, 12):
        c.update(3.0)
        assert c.stuck == min(t, 8) and c.infeasible == (t >= 4) and len(c.log) == (t >= 4)
    e = c.log[0]
    assert e["t"] == 4 and e["event"] == "infeasible" and e["lam"] == e["lam_safe"] == 0.5
    assert e["latency"] == pytest.approx(
        2.0
    )  # budget (1 + 2 (1 - 2^-1)), after one half-life of latency 3
    late = c.late
    n = 0
    while c.infeasible:
        c.update(0.0)
        n += 1
    assert c.log[1]["event"] == "feasible" and c.stuck == 0 and n >= 8
    first = LatencyController(1.0, lam=0.9, half_life=4)
    first.update(2.0)
    assert first.late == pytest.approx(first.alpha)
    assert first.lam == pytest.approx(0.9 - 0.02 * first.alpha)


def test_a_threshold_below_the_safe_one_is_a_conflict_only_when_late():
    c = LatencyController(1.0, lam=0.2, safe=0.5, priority="deadline", half_life=0)
    c.update(0.5)
    assert c.stuck == 0
    c.update(2.0)
    assert c.stuck == 1 and c.log[0]["lam"] < c.log[0]["lam_safe"]


def test_bandit_by_hand():
    "Arms in turn, then the largest mean + bonus sqrt(ln n / n_a); latency beyond three budgets counts as three."
    b = BanditController([0.9, 0.5], 2.0, kappa=0.5, window=3, bonus=0.1)
    b.update(100.0, 0.8)
    assert b.past[-1] == (0, 0.8 - 1.5) and b.arm == 1
    b.update(2.0, 0.1)
    assert b.past[-1] == (1, pytest.approx(-0.4)) and b.arm == 1  # -.7 and -.4, one try each
    b.update(2.0, 0.9)
    b.update(2.0, 0.9)
    assert len(b.past) == 3 and b.arm == 0  # arm 0 has left the window: try it
    far = BanditController([0.9, 0.5], 1.0, kappa=0.0, window=50, bonus=1.0)
    for _ in range(50):
        far.update(0.0, 0.5)
    n = np.bincount([a for a, _ in far.past])
    assert abs(int(n[0]) - int(n[1])) <= 2  # equal rewards: the bonus shares them out


def test_queue_with_shadow_runs_by_hand():
    "A shadow run keeps the server busy for a full pass, and its scores and losses go to the controller."
    got = []

    class Fixed:
        lam = 0.5

        def update(self, latency, shadow=None, gain=None):
            got.append(
                (latency, None if shadow is None else [v.tolist() for v in shadow], round(gain, 6))
            )

    out = simulate_queue(
        Fixed(),
        [1.0, 1.0],
        [[0.9, 0.2], [1.0, 0.7]],
        [1, 4],
        losses=[[1.0, 0.0], [0.0, 0.0]],
        rho=1.0,
    )
    assert out["latency"].tolist() == [1, 3 + 4] and out["exit"].tolist() == [0, 1]
    assert got == [(1.0, [[0.9, 1.0], [1.0, 0.0]], 0.0), (7.0, [[0.2, 0.7], [0.0, 0.0]], 0.5)]


def test_hb_by_hand():
    "Both parts of the bound, e times the tail included, and the ceiling of n R-hat."
    from scipy.stats import binom

    h = lambda a, b: a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    for r, n, eps in (
        (0.02, 500, 0.05),
        (0.004, 500, 0.05),
        (0.1, 30, 0.3),
        (0.001, 900, 0.02),
        (0.0113, 100, 0.05),
        (0.0301, 100, 0.2),
    ):
        tail = binom.cdf(math.ceil(n * r), n, eps)
        assert hb_p_value(r, n, eps) == pytest.approx(
            min(1, math.exp(-n * h(min(r, eps), eps)), math.e * tail)
        )
        assert hb_p_value(r, n, eps, binary=True) == pytest.approx(tail)
    assert hb_p_value(0.3, 100, 0.1) == 1 and hb_p_value(1.0 + 1e-12, 10, 0.5) == 1
    assert any(
        math.e * binom.cdf(math.ceil(n * r), n, e) < math.exp(-n * h(r, e))
        for r, n, e in ((0.004, 500, 0.05), (0.001, 900, 0.02))
    )


def test_bound_of_a_rule_by_hand():
    "control_risk returns the row of the grid, its mean loss and cost, and thresholds that end in -inf."
    s = np.array([[0.9, 0.6, 0.3, 0.1], [0.8, 0.7, 0.2, 0.9], [1.0] * 4])
    l = np.zeros((3, 4))
    l[0, 2] = 1
    r = control_risk(s, l, 0.25, method="naive", grid=[0.95, 0.5, 0.2], costs=[1, 3, 4])
    assert (r.index, r.lam, r.thresholds) == (2, 0.2, [0.2, 0.2, -math.inf])
    assert r.risk == 0.25
    assert r.bound == pytest.approx(0.25, abs=2e-6)
    assert r.cost == pytest.approx((1 + 1 + 1 + 3) / 4)
    r = control_risk(
        s,
        l,
        0.2,
        method="naive",
        grid=[[0.95, 0.95, 0.95], [0.5, 0.75, -math.inf], [0.2, 0.2, 0]],
        costs=[1, 3, 4],
    )
    assert r.index == 1
    assert r.lam == [0.5, 0.75, -math.inf]
    assert r.thresholds == [0.5, 0.75, -math.inf]
    assert r.cost == pytest.approx((1 + 1 + 4 + 3) / 4)
    a, b = (
        control_risk(s, 3 * l, 3 * e, method="naive", grid=[0.2], bound=3.0) for e in (0.25, 0.2)
    )
    assert a.index == 0
    assert a.bound == pytest.approx(0.75, abs=6e-6)
    assert b.index == -1
    assert b.cost == 3
    assert control_risk(s, l, 7.0, grid=[0.2]).bound <= 1
    assert control_risk(s, l, 1e300, grid=[0.2], bound=1e12).index == 0


def test_masked_classes_in_losses():
    z = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(20) % 4
    wide = torch.cat([torch.full_like(z[..., :1], -math.inf), z], -1)
    for kind in ("consistency", "gap", "brier", "hellinger"):
        np.testing.assert_allclose(
            sample_losses(wide, kind, y + 1), sample_losses(z, kind, y), atol=1e-12
        )


# ---------------------------------------------------------------- hostile settings

NAN, INF = math.nan, math.inf
NUMBERS, COUNTS = (NAN, INF, -1, "1", 1j), (0, -1, 1.5, NAN, "3", True)
S2, L2 = np.random.default_rng(0).random((2, 30)), np.vstack([np.zeros(30), np.zeros(30)])
queue = lambda gaps=(1.0,), s=S2, c=(1, 2), **k: simulate_queue(
    LatencyController(1.0), gaps, s, c, **k
)
HOSTILE = [
    (NUMBERS, lambda v: control_risk(S2, L2, v)),
    (NUMBERS + (0, 1), lambda v: control_risk(S2, L2, 0.1, v)),
    (("hb", 1, None), lambda v: control_risk(S2, L2, 0.1, method=v)),
    (NUMBERS + (0,), lambda v: control_risk(S2, L2, 0.1, bound=v)),
    ((1.5, -1, NAN, "0"), lambda v: control_risk(S2, L2, 0.1, seed=v)),
    (NUMBERS, lambda v: control_risk(S2, L2, 0.1, costs=[1, v])),
    (
        (NAN, INF, -INF, 2.0),
        lambda v: control_risk(S2, L2 + np.r_[v, np.zeros(29)], 0.1, method="ucb"),
    ),
    ((NAN,), lambda v: control_risk(S2 + v, L2, 0.1)),
    (
        (NAN, [0.1, 0.5], [], [[[0.5]]], 0.5, [[0.5, 0.5, 0.5]], [[0.5, "x"]]),
        lambda v: control_risk(S2, L2, 0.1, grid=v),
    ),
    (NUMBERS, lambda v: passes(L2, v)),
    (NUMBERS + (0,), lambda v: passes(L2, 0.1, bound=v)),
    ((NAN, INF, -INF), lambda v: passes(L2 + v, 0.1, method="crc")),
    ((NAN, -1, 1.1, INF, "1"), lambda v: log_wealth(L2, v, 0.1)),
    ((NAN, 0, 1, -1, INF), lambda v: log_wealth(L2, 0.1, v)),
    ((NAN, 5.0, INF, -INF), lambda v: log_wealth([0.0, v], 0.1, 0.1)),
    (([], 1.0), lambda v: log_wealth(v, 0.1, 0.1)),
    ((NAN, -1, 1.01, INF, -INF, [0.1, -0.1], [0.1, NAN]), lambda v: hb_p_value(v, 100, 0.1)),
    (COUNTS, lambda v: hb_p_value(0.1, v, 0.1)),
    ((NAN, -1, 1.1, INF, "1"), lambda v: hb_p_value(0.1, 100, v)),
    (("no", 1, None), lambda v: hb_p_value(0.1, 9, 0.1, v)),
    (NUMBERS + (0,), LatencyController),
    (NUMBERS + (0, 1.1), lambda v: LatencyController(1, v)),
    ((NAN, "1"), lambda v: LatencyController(1, lam=v)),
    ((NAN, INF, "1", 1.0), lambda v: LatencyController(1, floor=v)),
    ((NAN, INF, "1", 0.0), lambda v: LatencyController(1, ceiling=v)),
    ((NAN, "1"), lambda v: LatencyController(1, safe=v)),
    (("both", None, 1), lambda v: LatencyController(1, priority=v)),
    ((NAN, INF, -1, "1"), lambda v: LatencyController(1, half_life=v)),
    ((NAN, INF, -1, "1"), lambda v: LatencyController(1).update(v)),
    ((NAN, -1, 1.1, INF, "1"), lambda v: ShadowMonitor([1, 0], v)),
    ((NAN, -1, 0, 1, INF), lambda v: ShadowMonitor([1, 0], 0.1, v)),
    (COUNTS, lambda v: ShadowMonitor([1, 0], 0.1, window=v)),
    (COUNTS, lambda v: ShadowMonitor([1, 0], 0.1, every=v)),
    (NUMBERS + (0,), lambda v: ShadowMonitor([1, 0], 0.1, gamma=v)),
    (("ltt", None), lambda v: ShadowMonitor([1, 0], 0.1, method=v)),
    (([], [0, 1], [1, NAN], 0.5, [[0.5], [0.4]]), lambda v: ShadowMonitor(v, 0.1)),
    ((NAN, INF, 2.0), lambda v: ShadowMonitor([1, 0], 0.1).add([0.5, 0.5], [v, 0.0])),
    ((NAN,), lambda v: ShadowMonitor([1, 0], 0.1).add([v, 0.5], [0.0, 0.0])),
    (([0.5], [[0.5, 0.5]], 0.5), lambda v: ShadowMonitor([1, 0], 0.1).add(v, [0.0, 0.0])),
    (NUMBERS + (0,), lambda v: BanditController([1, 0], v)),
    (([NAN, 1], [0.5], [], ["a", "b"]), lambda v: BanditController(v, 1.0)),
    ((NAN, INF, -1), lambda v: BanditController([1, 0], 1.0, v)),
    (COUNTS, lambda v: BanditController([1, 0], 1.0, window=v)),
    ((NAN, INF, -1), lambda v: BanditController([1, 0], 1.0, bonus=v)),
    ((NAN, INF, -1, None), lambda v: BanditController([1, 0], 1.0).update(v, 0.1)),
    ((NAN, INF, None), lambda v: BanditController([1, 0], 1.0).update(1.0, v)),
    (NUMBERS, lambda v: queue(gaps=[1.0, v])),
    (([],), lambda v: queue(gaps=v)),
    ((S2[0], S2[:, :0], S2 * NAN), lambda v: queue(s=v)),
    (([1], [1, NAN], [1, -1], [1, INF]), lambda v: queue(c=v)),
    ((NAN, -1, 2, INF), lambda v: queue(rho=v, losses=L2)),
    ((L2[:1], L2[:, :3], L2 * NAN), lambda v: queue(losses=v, rho=0.1)),
    ((1.5, -1, NAN), lambda v: queue(seed=v)),
    ((1.0, [], np.zeros((2, 0))), last_of_prefix),
    (
        (torch.full((2, 5), 3), torch.zeros(3)),
        lambda v: sample_losses(torch.zeros(2, 3, 4), "gap", v),
    ),
    (
        (
            torch.full((2, 3, 4), -INF),
            torch.full((2, 3, 4), INF),
            torch.zeros(2, 3, 0),
            torch.zeros(0, 3, 4),
        ),
        sample_losses,
    ),
]


@pytest.mark.parametrize("n", range(len(HOSTILE)))
def test_hostile_settings_get_one_sentence(n):
    values, call = HOSTILE[n]
    for v in values:
        with pytest.raises(ValueError) as e:
            call(v)
        assert "\n" not in str(e.value) and any(
            w in str(e.value) for w in ("must", "contain", "empty", "give one")
        ), str(e.value)


def test_a_refused_request_changes_nothing():
    m = ShadowMonitor([0.5], 0.1).fill(*stacked(np.zeros(200)))
    c = LatencyController(1.0, lam=0.5, safe=m)
    before = (c.t, c.lam, c.late, m.n)
    for call in (
        lambda: c.update(NAN),
        lambda: c.update(1.0, shadow=([NAN, 1.0], [0.0, 0.0])),
        lambda: m.add([1.0, 1.0], [2.0, 0.0]),
    ):
        with pytest.raises(ValueError):
            call()
    assert (c.t, c.lam, c.late, m.n) == before and len(m.rows) == 200 and m.errors == []


def test_numpy_numbers_are_numbers():
    f, i = np.float32, np.int64
    assert control_risk(S2, L2, f(0.25), f(0.5)).index == control_risk(S2, L2, 0.25, 0.5).index
    assert LatencyController(f(2), eta=f(0.5), half_life=i(0)).update(f(3)) == pytest.approx(0)
    assert hb_p_value(f(0), i(100), f(0.5)) == pytest.approx(0.5**100)
    assert (
        ShadowMonitor(np.array([1, 0]), f(0.5), window=i(5), every=i(1)).add(
            np.zeros(2, np.float32), np.zeros(2, np.float32)
        )
        == INF
    )
    assert BanditController(np.array([1.0, 0]), f(1), window=i(5)).update(f(1), f(0.5)) == 0


def test_crc_remembers_losses_that_went_away():
    "A sample that is wrong under one threshold counts as wrong under all bolder ones, in the test and in the bound."
    row = np.zeros((3, 30))
    row[1, :3] = 1  # mean losses 0, .1, 0; with memory 0, .1, .1
    assert passes(row, 0.08, method="crc").tolist() == [True, False, False]
    s = np.array([[0.6] * 3 + [0.2] * 27, [0.9] * 30, [1.0] * 30])
    l = np.zeros((3, 30))
    l[1, :3] = 1
    r = control_risk(
        s, l, 0.2, method="crc", grid=[0.95, 0.8, 0.5]
    )  # exit 2 at .8: 3 wrong; at .5 exit 1 takes them, rightly
    assert r.index == 2 and r.risk == 0 and r.bound == pytest.approx((3 + 1) / 31, abs=2e-6)


def test_losses_between_0_and_1_get_the_bound_for_them():
    "Hoeffding-Bentkus, not the binomial tail, as soon as one loss is neither 0 nor 1."
    L = np.full((1, 100), 0.02)
    bound, tail = hb_p_value(0.02, 100, 0.08), hb_p_value(0.02, 100, 0.08, binary=True)
    assert tail < bound
    for delta in (0.99 * bound, (bound + tail) / 2):
        assert not passes(L, 0.08, delta, "ltt")[0]
    assert passes(L, 0.08, 1.01 * bound, "ltt")[0]
    whole = row(2, 100)
    p = hb_p_value(0.02, 100, 0.08, binary=True)
    assert passes(whole, 0.08, 1.01 * p, "ltt")[0] and not passes(whole, 0.08, 0.99 * p, "ltt")[0]


def test_never_exit_ends_in_minus_infinity():
    from darkdistill_nb.exits.inference import take_exit

    r = control_risk(S2, L2 + np.array([[1.0], [0.0]]), 0.01, grid=[0.5])
    assert r.thresholds == [math.inf, -math.inf]
    assert take_exit(torch.as_tensor(S2), r.thresholds).tolist() == [1] * 30


def test_the_bound_itself_passes():
    s, l = np.ones((2, 100)), np.vstack([row(4, 100), np.zeros((1, 100))])
    x = l[:1, np.random.default_rng(0).permutation(100)]
    for m in METHODS:
        assert passes(x, control_risk(s, l, 0.2, 0.1, m, grid=[0.5]).bound, 0.1, m)[0], m


def test_the_last_exit_takes_everybody_in_the_queue():
    class Fixed:
        lam = 0.5

        def update(self, *a, **k):
            pass

    assert simulate_queue(Fixed(), [1.0], [[0.1], [0.2]], [1, 7])["latency"].tolist() == [7]


def test_the_bonus_grows_with_all_rewards_in_the_window():
    "sqrt(ln 9 / 1) = 1.48 beats .7 + sqrt(ln 9 / 8) = 1.22; with ln 2 it would not."
    b = BanditController([0.9, 0.5], 1.0, kappa=0.0, bonus=1.0)
    b.past.extend([(0, 0.0)] + [(1, 0.7)] * 7)
    b.arm = 1
    assert b.update(0.0, 0.7) == 0.9

"""The smallest parts of promises and controllers: values by hand, limits, defaults, branches."""

import math
import numpy as np, pytest, torch
from helpers import default
from darkdistill_nb.exits import (
    KINDS,
    BanditController,
    LatencyController,
    RiskControl,
    ShadowMonitor,
    control_risk,
    grid_losses,
    hb_p_value,
    last_of_prefix,
    log_wealth,
    passes,
    sample_losses,
    simulate_queue,
)

pytestmark = pytest.mark.usefixtures("one_thread")
inf, nan = math.inf, math.nan


DEFAULTS = {
    sample_losses: dict(kind="consistency", y=None),
    grid_losses: dict(costs=None),
    hb_p_value: dict(binary=False),
    passes: dict(delta=0.1, method="ltt", bound=1),
    control_risk: dict(delta=0.1, method="ltt", grid=None, costs=None, bound=1, seed=0),
    LatencyController: dict(
        eta=0.02, lam=None, floor=0, ceiling=1, safe=None, priority="quality", half_life=20
    ),
    ShadowMonitor: dict(delta=0.1, window=500, every=25, method="ucb", gamma=0.01),
    simulate_queue: dict(losses=None, rho=0, seed=0),
    BanditController: dict(kappa=0.2, window=400, bonus=0.2),
}


@pytest.mark.parametrize("f", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_as_documented(f):
    assert {k: default(f, k) for k in DEFAULTS[f]} == DEFAULTS[f]


# ---------------------------------------------------------------- losses


P = torch.tensor([[[0.2, 0.8, 0], [0.5, 0.25, 0.25]], [[0.6, 0.4, 0], [0.5, 0.5, 0]]]).double()
Z = P.log()


def test_every_kind_of_loss_by_hand():
    "Image 1 changes its answer from class 1 to 0; image 2 keeps class 0."
    y = torch.tensor([1, 0])
    assert sample_losses(Z).tolist() == [[1, 0], [0, 0]]
    assert sample_losses(Z, "gap", y).tolist() == [[-1, 0], [0, 0]]
    assert sample_losses(Z, "gap", 1 - y).tolist() == [[1, 0], [0, 0]]
    early = (0.2**2 + 0.2**2) / 2, (0.5**2 + 0.25**2 + 0.25**2) / 2
    last = (0.6**2 + 0.6**2) / 2, (0.5**2 + 0.5**2) / 2
    brier = sample_losses(Z, "brier", y)
    assert brier[0].tolist() == pytest.approx([a - b for a, b in zip(early, last)])
    far = 1 - math.sqrt(0.2 * 0.6) - math.sqrt(0.8 * 0.4)
    assert sample_losses(Z, "hellinger")[0, 0] == pytest.approx(math.sqrt(far))
    assert all(sample_losses(Z, k, y)[-1].tolist() == [0, 0] for k in KINDS)


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_logits_have_three_dimensions_none_of_them_empty(shape):
    with pytest.raises(ValueError, match="must be .exits, samples, classes."):
        sample_losses(torch.zeros(shape))


def test_only_the_gap_needs_labels():
    with pytest.raises(ValueError, match="kind='gap' compares errors and needs the labels y"):
        sample_losses(Z, "gap")
    assert [sample_losses(Z, k).shape for k in KINDS if k != "gap"] == [(2, 2)] * 3


S = np.array([[0.9, 0.5, 0.1], [0.2, 0.5, 0.7], [0.0, 0.0, 0.0]])
L = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_whoever_reaches_a_threshold_leaves_and_the_last_exit_takes_the_rest():
    "A score equal to the threshold is enough; the earliest exit counts."
    loss, cost = grid_losses(S, L, [0.95, 0.5, 0.1], [1, 10, 100])
    assert loss.tolist() == [[7, 8, 9], [1, 2, 6], [1, 2, 3]]
    assert cost.tolist() == [100, (1 + 1 + 10) / 3, 1]
    assert grid_losses(S, L, [0.5])[1].tolist() == [(1 + 1 + 2) / 3]
    rows = grid_losses(S, L, [[0.95, 0.5, 9], [inf, 0.7, -inf]], [1, 10, 100])
    assert rows[0].tolist() == [[7, 5, 6], [7, 8, 6]] and rows[1].tolist() == [40, 70]


@pytest.mark.parametrize(
    "args, words",
    [
        ((S[0], L[0], [0.5]), "must both be .exits, samples."),
        ((S, L[:2], [0.5]), "must both be .exits, samples."),
        ((S * nan, L, [0.5]), "scores contain NaN"),
        ((S, np.full_like(L, inf), [0.5]), "losses must be finite"),
        ((S[:, :0], L[:, :0], [0.5]), "is empty: give at least one sample"),
        ((S, L, [0.5, 0.5]), "grid must fall strictly"),
        ((S, L, [nan]), "grid contains NaN"),
        ((S, L, []), "grid of shape .0,. must be"),
        ((S, L, np.zeros((2, 2))), "must be .G,. or .G, 3.: one threshold per exit"),
        ((S, L, np.zeros((1, 2, 3))), "must be .G,. or .G, 3.: one threshold per exit"),
        ((S, L, [0.5], [1, 2]), "2 costs for 3 exits"),
        ((S, L, [0.5], [1, 2, -1]), "costs=-1"),
    ],
)
def test_what_does_not_fit_is_told_in_its_own_words(args, words):
    with pytest.raises(ValueError, match=words):
        grid_losses(*args)


def test_costs_may_be_0_and_two_rows_of_thresholds_need_not_fall():
    assert grid_losses(S, L, [0.5], [0, 0, 0])[1].tolist() == [0]
    assert grid_losses(S, L, [[0.1] * 3, [0.9] * 3])[0].tolist() == [[1, 2, 3], [1, 8, 9]]


# ---------------------------------------------------------------- tests of a promise


def test_the_unbroken_run_of_passed_tests():
    assert last_of_prefix([1, 1, 0, 1]) == 1 and last_of_prefix([0, 1]) == -1
    assert last_of_prefix([[1], [0]]).tolist() == [0, -1]
    for none in (1, [], np.zeros((2, 0))):
        with pytest.raises(ValueError, match="must hold at least one answer"):
            last_of_prefix(none)


def wealth(x, R, delta):
    "The capital of the betting martingale, step by step."
    best, log, s, v = -inf, 0.0, 0.5, 0.25
    for i, xi in enumerate(x):
        before = 0.25 if i == 0 else v / (i + 1)
        stake = min(math.sqrt(2 * math.log(1 / delta) / (len(x) * before)), 1)
        log += math.log1p(-stake * (xi - R))
        best = max(best, log)
        s += xi
        v += (xi - s / (i + 2)) ** 2
    return best


@pytest.mark.parametrize("delta", [0.9, 0.1, 0.001])
@pytest.mark.parametrize("R", [0.05, 0.4])
def test_capital_step_by_step(R, delta):
    x = np.random.default_rng(0).random((3, 40)) * [[0.2], [0.6], [1.0]]
    want = [wealth(row, R, delta) for row in x]
    assert log_wealth(x, R, delta).tolist() == pytest.approx(want)
    assert log_wealth(x[:, :1], R, delta) == pytest.approx([wealth(r[:1], R, delta) for r in x])


def test_bets_have_limits_that_are_allowed():
    assert log_wealth([1.0], 0, 0.5) < 0 and log_wealth([1.0], 1, 0.5) == 0
    assert log_wealth([-1.0], 0.5, 0.5) > 0
    for x, R, delta in [([1.0001], 0.5, 0.5), ([0.0], 1.01, 0.5), ([0.0], 0.5, 1), (0.5, 0.5, 0.5)]:
        with pytest.raises(ValueError):
            log_wealth(x, R, delta)


def test_p_values_at_the_ends_of_the_unit_interval():
    "A mean may miss 0 or 1 by a rounding error; n R may miss a whole number."
    from scipy.stats import binom

    assert hb_p_value([-1e-10, 1 + 1e-10], 20, 0.5).tolist() == pytest.approx([0.5**20, 1])
    for bad in (-1e-8, 1 + 1e-8, nan):
        with pytest.raises(ValueError, match="risk=.* must be from 0 to 1"):
            hb_p_value(bad, 20, 0.5)
    for k in range(1, 60):
        tail = binom.cdf(k, 100, 0.3)
        assert hb_p_value(k / 100, 100, 0.3, binary=True) == pytest.approx(tail)
    assert hb_p_value(0.0, 5, 0, binary=True) == 1 and hb_p_value(0.0, 5, 1) == 0


def h(a, b):
    return sum(p * math.log(p / q) for p, q in ((a, b), (1 - a, 1 - b)) if p)


@pytest.mark.parametrize("risk", [0.0, 0.02, 0.1, 0.19, 0.2, 0.5])
def test_the_smaller_of_two_bounds(risk):
    from scipy.stats import binom

    tail = math.e * binom.cdf(math.ceil(50 * risk - 1e-9), 50, 0.2)
    exponential = math.exp(-50 * h(min(risk, 0.2), 0.2))
    assert hb_p_value(risk, 50, 0.2) == pytest.approx(min(1, exponential, tail))


def wrong(k, n=100):
    "One threshold, n samples, k of them wrong."
    return np.repeat([[1.0, 0.0]], [k, n - k], axis=1)


def test_a_promise_of_each_method_at_its_edge():
    "crc: (n R + 1) / (n + 1) at most epsilon; the naive rule: R at most epsilon."
    ok = lambda L, e, m, **kw: bool(passes(L, e, method=m, **kw)[0])
    assert ok(wrong(5), 0.05, "naive") and not ok(wrong(5), 0.0499, "naive")
    assert ok(wrong(5), 6 / 101, "crc") and not ok(wrong(5), 5.99 / 101, "crc")
    p = float(hb_p_value(0.05, 100, 0.12, binary=True))
    assert ok(wrong(5), 0.12, "ltt", delta=p) and not ok(wrong(5), 0.12, "ltt", delta=0.999 * p)
    x = np.random.default_rng(0).permutation(wrong(5)[0])[None]
    edge = math.exp(-float(log_wealth(x[0], 0.2, 0.05)))
    assert ok(x, 0.2, "ucb", delta=0.05) == (edge <= 0.05)


@pytest.mark.parametrize("method", ["naive", "crc", "ucb", "ltt"])
def test_a_promise_of_the_largest_loss_is_always_kept(method):
    assert passes(np.ones((2, 3)), 1, method=method).tolist() == [True, True]
    assert passes(2 * np.ones((2, 3)), 2, method=method, bound=2).tolist() == [True, True]
    assert passes(np.ones((1, 2, 3)), 0.9999, method=method).tolist() == [[False, False]]


@pytest.mark.parametrize("method", ["naive", "crc", "ucb", "ltt"])
def test_a_larger_bound_is_another_unit(method):
    x = np.random.default_rng(1).random((4, 60)) * [[0.1], [0.2], [0.5], [0.9]]
    for e in (0.1, 0.2, 0.4):
        assert (
            passes(x, e, method=method).tolist()
            == passes(4 * x, 4 * e, method=method, bound=4).tolist()
        )


@pytest.mark.parametrize(
    "L, kw, words",
    [
        ([0.0], {}, "must be .thresholds, samples."),
        (np.zeros((2, 0)), {}, "must be .thresholds, samples."),
        ([[1.1]], {}, "at most bound=1"),
        ([[2.1]], dict(bound=2), "at most bound=2"),
        ([[-0.1]], {}, "'ltt' needs losses of at least 0"),
        ([[0.0]], dict(delta=1), "delta=1"),
        ([[0.0]], dict(method="best"), "method='best'"),
    ],
)
def test_terms_that_cannot_be_are_told_in_their_own_words(L, kw, words):
    with pytest.raises(ValueError, match=words):
        passes(L, 0.1, **kw)
    assert passes([[-0.1]], 0.1, method="ucb").shape == (1,) and passes([[0.0]], 0.1).shape == (1,)


# ---------------------------------------------------------------- the choice of a threshold


def sure(*losses):
    "(scores, losses) of two exits at which everybody would leave at once."
    n = len(losses)
    return np.ones((2, n)), np.array([losses, (0.0,) * n])


def test_the_default_grid_has_100_thresholds_from_1_to_0():
    scores, losses = sure(*[0.0] * 60)
    r = control_risk(scores, losses, 0.2)
    assert (r.index, r.lam, r.cost, r.risk) == (99, 0, 1, 0)
    assert control_risk(scores / 2, losses, 0.2, method="naive").index == 99
    _, losses = sure(*[1.0] * 60)
    scores = np.vstack([np.full(60, 0.5), np.ones(60)])
    half = control_risk(scores, losses, 0.2, method="naive")
    assert half.index == 49 and half.lam == pytest.approx(1 - 49 / 99)


@pytest.mark.parametrize("bound", [1, 3])
def test_the_bound_is_the_level_at_which_the_test_would_turn(bound):
    "To a millionth of the largest loss, from above."
    scores, losses = sure(*[bound] * 4, *[0.0] * 96)
    r = control_risk(scores, losses, 0.2 * bound, method="naive", grid=[0.5], bound=bound)
    assert 0.04 * bound <= r.bound <= (0.04 + 1e-6) * bound
    crc = control_risk(scores, losses, 0.2 * bound, method="crc", grid=[0.5], bound=bound)
    assert 5 / 101 * bound - 1e-9 <= crc.bound <= (5 / 101 + 1e-6) * bound
    none = control_risk(*sure(*[0.0] * 9), 0.5, method="naive", grid=[0.5])
    assert none.bound == 0


def test_no_threshold_that_passes_means_never_exit():
    scores, losses = sure(*[1.0] * 10)
    r = control_risk(scores, losses, 0.1, grid=[0.5], costs=[2, 7])
    assert r == RiskControl("ltt", 0.1, 0.1, -1, inf, [inf, -inf], 0.0, None, 7.0)


def test_a_row_of_thresholds_is_returned_with_its_last_exit_open():
    scores, losses = sure(*[0.0] * 50)
    r = control_risk(scores, losses, 0.2, grid=[[0.9, 0.4], [0.5, 0.3]])
    assert (r.index, r.lam, r.thresholds) == (1, [0.5, 0.3], [0.5, -inf])
    one = control_risk(np.ones((3, 50)), np.zeros((3, 50)), 0.2, grid=[0.5])
    assert one.thresholds == [0.5, 0.5, -inf] and (one.epsilon, one.delta) == (0.2, 0.1)


def test_samples_are_shuffled_for_the_bet_alone():
    "By the seed; the other methods do not look at the order."
    x = np.r_[np.zeros(60), np.ones(10)]
    bounds = {
        m: {control_risk(*sure(*x), 0.9, method=m, grid=[0.5], seed=s).bound for s in range(4)}
        for m in ("naive", "crc", "ucb", "ltt")
    }
    assert {m: len(v) > 1 for m, v in bounds.items()} == dict(
        naive=False, crc=False, ucb=True, ltt=False
    )


# ---------------------------------------------------------------- controllers


def test_the_first_threshold_lies_between_floor_and_ceiling():
    first = lambda **kw: LatencyController(1.0, **kw).lam
    assert first() == 0 and first(floor=0.2) == 0.2 and first(lam=2) == 1
    assert first(lam=2, ceiling=3) == 2 and first(lam=-1) == 0 and first(lam=-1, floor=-2) == -1
    assert first(safe=0.6) == 0.6 and first(safe=inf) == 1 and first(safe=-1, floor=0.1) == 0.1
    assert first(safe=0.6, lam=0.3) == 0.6 and first(safe=0.6, lam=0.8) == 0.8
    assert first(safe=0.6, lam=0.3, priority="deadline") == 0.3
    c = LatencyController(1.0, safe=0.6, floor=0.1)
    assert c.lam_safe == 0.6 and LatencyController(1.0, floor=0.1).lam_safe == 0.1


@pytest.mark.parametrize(
    "half_life, alpha, hold", [(0, 1, 1), (0.4, None, 1), (1, 0.5, 1), (20, None, 20)]
)
def test_the_average_of_latencies_by_its_half_life(half_life, alpha, hold):
    c = LatencyController(2.0, half_life=half_life)
    assert c.alpha == pytest.approx(1 - 0.5 ** (1 / half_life) if alpha is None else alpha)
    assert c.hold == hold and (c.t, c.timeouts, c.stuck, c.late) == (0, 0, 0, 0)


def test_a_late_request_lowers_the_threshold():
    "By eta times the mean relative lateness; a timeout is only counted."
    c = LatencyController(2.0, eta=0.1, lam=0.5, half_life=1)
    assert c.update(3.0) == pytest.approx(0.5 - 0.1 * 0.25) and c.late == 0.25
    assert c.update(1.0) == pytest.approx(0.475 + 0.1 * 0.125) and c.late == -0.125
    lam = c.lam
    assert c.update(None) == lam and (c.t, c.timeouts) == (3, 1) and c.late == -0.125
    assert LatencyController(1.0, eta=1).eta == 1
    with pytest.raises(ValueError, match="eta=1.01"):
        LatencyController(1.0, eta=1.01)


def test_conflicts_come_and_go():
    "One that never lasted is not logged; being exactly in time is none."
    c = LatencyController(1.0, eta=0.5, half_life=0, lam=0.0)
    c.update(1.0)
    assert (c.stuck, c.infeasible, c.log) == (0, False, [])
    c.update(2.0)
    assert (c.stuck, c.infeasible) == (1, True) and c.log[0] == dict(
        t=2, event="infeasible", lam=0.0, lam_safe=0.0, latency=2.0
    )
    c.update(9.0)
    assert c.stuck == 2 and len(c.log) == 1
    c.update(9.0)
    assert c.stuck == 2
    c.update(0.5)
    assert c.stuck == 1 and c.infeasible
    c.update(0.5)
    assert c.stuck == 0 and [e["event"] for e in c.log] == ["infeasible", "feasible"]
    c.update(0.5)
    assert c.stuck == 0


def test_shadow_runs_go_to_a_monitor_and_to_nobody_else():
    m = ShadowMonitor([0.9, 0.5], 0.2, every=1)
    c = LatencyController(1.0, safe=m, half_life=0)
    assert c.lam == 1 and m.lam == inf
    for _ in range(60):
        c.update(1.0, shadow=([1.0, 1.0], [0.0, 0.0]))
    assert m.n == 60 and m.lam == 0.5 == c.lam_safe
    assert LatencyController(1.0, safe=0.3).update(1.0, shadow=([1.0], [0.0])) == 0.3


def test_a_monitor_recomputes_after_every_so_many_and_keeps_a_window():
    m = ShadowMonitor([0.9, 0.5], 0.2, window=70, every=30)
    lams = [m.add([0.7, 1.0], [0.0, 0.0]) for _ in range(90)]
    assert lams[:29] == [inf] * 29 and lams[59] == 0.5 and len(m.rows) == 70
    changes = [i for i in range(1, 90) if lams[i] != lams[i - 1]]
    assert all((i + 1) % 30 == 0 for i in changes) and changes
    bad = ShadowMonitor([0.9, 0.5], 0.2, every=1).fill(np.ones((2, 60)), np.zeros((2, 60)))
    assert bad.lam == 0.5 and bad.errors == [] and bad.n == 0
    bad.add([1.0, 1.0], [1.0, 0.0])
    assert bad.errors == [1] and bad.level == pytest.approx(0.2 + 0.01 * (0.2 - 1))


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(grid=[[0.5], [0.4]]), "one threshold for all exits"),
        (dict(grid=[0.5, 0.9]), "grid must fall strictly"),
        (dict(epsilon=1.1), "epsilon=1.1"),
        (dict(gamma=0), "gamma=0"),
        (dict(window=0), "window=0"),
        (dict(every=0), "every=0"),
    ],
)
def test_monitors_that_cannot_be(kw, words):
    with pytest.raises(ValueError, match=words):
        ShadowMonitor(**(dict(grid=[0.5], epsilon=0.1) | kw))


class Fixed:
    "A controller that notes what it is told."

    def __init__(self, lam=0.5):
        self.lam, self.told = lam, []

    def update(self, latency, shadow=None, gain=None):
        self.told.append((latency, shadow is not None, gain))


def test_a_queue_by_hand():
    "Requests wait for those before them; the pool is used again from its start."
    s = np.array([[0.9, 0.1], [0.2, 0.6], [0.3, 0.4]])
    c = Fixed()
    out = simulate_queue(c, [1.0, 2.0, 9.0, 0.5], s, [1, 2, 4])
    assert out["exit"].tolist() == [0, 1, 0, 1]
    assert out["latency"].tolist() == [1, 2, 1, 2] and out["lam"].tolist() == [0.5] * 4
    assert [g for *_, g in c.told] == pytest.approx([0, 0.5, 0, 0.5])
    busy = simulate_queue(Fixed(0.95), [1.0, 2.0, 3.0], s, [1, 2, 4])
    assert busy["exit"].tolist() == [2, 2, 2] and busy["latency"].tolist() == [4, 7, 9]


def shadowed(rho, seed=0):
    "Which of 400 requests became shadow runs."
    c, s = Fixed(), np.ones((2, 5))
    simulate_queue(c, [9.0] * 400, s, [1, 2], np.zeros((2, 5)), rho, seed)
    return [told for _, told, _ in c.told]


def test_so_many_requests_become_shadow_runs():
    "A share rho of them, drawn by the seed; each keeps the server for a full pass."
    assert 0.2 < np.mean(shadowed(0.3)) < 0.4 and shadowed(0.3, 1) != shadowed(0.3)
    assert not any(shadowed(0)) and all(shadowed(1))
    late = simulate_queue(Fixed(), [1.0] * 3, np.ones((2, 5)), [1, 5], np.zeros((2, 5)), 1.0)
    assert late["latency"].tolist() == [1, 5, 9]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(gaps=[]), "number of gaps=0 must be at least 1"),
        (dict(gaps=[-1.0]), "gaps=-1"),
        (dict(scores=np.ones(3)), "scores of shape"),
        (dict(scores=np.ones((2, 0))), "scores of shape"),
        (dict(scores=np.full((2, 3), nan)), "scores of shape"),
        (dict(costs=[1]), "1 costs for 2 exits"),
        (dict(losses=np.zeros((2, 4)), rho=0.5), "losses of shape"),
        (dict(losses=np.zeros((2, 4))), "losses of shape"),
        (dict(rho=0.1), "rho=0.1 asks for shadow runs"),
    ],
)
def test_queues_that_cannot_be(change, words):
    args = dict(gaps=[1.0], scores=np.ones((2, 3)), costs=[1, 2]) | change
    with pytest.raises(ValueError, match=words):
        simulate_queue(Fixed(), **args)


def test_arms_by_hand():
    "Reward gain - kappa latency / budget, late ones capped at 3 budgets; untried arms come first."
    b = BanditController([0.9, 0.5, inf], 2.0, kappa=0.5, window=4, bonus=0.0)
    assert b.lam == 0.9
    assert b.update(2.0, 1.0) == 0.5 and b.past[-1] == (0, 0.5)
    assert b.update(6.0, 1.0) == inf and b.past[-1] == (1, -0.5)
    assert b.update(60.0, 1.0) == 0.9 and b.past[-1] == (2, -0.5)
    assert [b.update(2.0, v) for v in (1.0, -9.0)] == [0.9, 0.5]
    two = BanditController([0.9, 0.5], 1.0, kappa=0, bonus=1.0)
    for arm, reward in ((0, 1.0), (1, 0.9), (0, 1.0)):
        assert two.arm == arm
        two.update(0.0, reward)
    assert two.arm == 1  # .9 + sqrt(ln 3) against 1 + sqrt(ln 3 / 2)
    with pytest.raises(ValueError, match="at least two thresholds"):
        BanditController([0.5], 1.0)
    assert len(BanditController([1, 0], 1.0).arms) == 2

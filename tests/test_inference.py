"""Scores, thresholds, budgets, calibration and yardsticks of early-exit policies, against hand-computed numbers, brute force and scikit-learn."""

import itertools, math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from darkdistill_nb.exits import evaluation, inference as inf, scores as exit_scores
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet, exit_shares
from darkdistill_nb.core.training import plus_minus, predict

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = -math.inf


def cascade(N=3000, E=4, K=5, seed=0):
    "Logits of a synthetic cascade: samples differ in difficulty, deeper exits see them more clearly."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (N,), generator=g)
    hard = torch.rand(N, generator=g)
    noise = torch.randn(N, K, generator=g)
    z = [
        3 * (1 - hard * 0.9**e)[:, None] * F.one_hot(y, K)
        + (1.3 - 0.2 * e) * (0.8 * noise + 0.6 * torch.randn(N, K, generator=g))
        for e in range(E)
    ]
    return torch.stack(z) * 1.5, y


@pytest.fixture(scope="module")
def data():
    (v, yv), (t, yt) = cascade(), cascade(seed=1)
    return dict(
        v=v,
        yv=yv,
        t=t,
        yt=yt,
        sv=exit_scores.confidence(v),
        st=exit_scores.confidence(t),
        rv=v.argmax(-1) == yv,
        rt=t.argmax(-1) == yt,
        costs=[1.0, 2.0, 3.0, 4.0],
    )


# ---------------------------------------------------------------- scores


def test_scores_of_one_distribution():
    p = torch.log(torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]]))
    H = (1 - exit_scores.Entropy().of(p)) * math.log(3)
    assert H[0] == pytest.approx(0.80182, abs=1e-5)
    assert 1 - exit_scores.Entropy().of(p)[0] == pytest.approx(0.72985, abs=1e-5)
    assert H[1] == pytest.approx(math.log(3), abs=1e-6)
    assert exit_scores.Entropy().of(p)[1] == pytest.approx(0, abs=1e-6)
    assert exit_scores.Margin().of(p).tolist() == pytest.approx([0.5, 0], abs=1e-6)
    assert exit_scores.Confidence().of(p).tolist() == pytest.approx([0.7, 1 / 3], abs=1e-6)
    z = torch.tensor([[2.0, -1, 0.5]]).double()
    for T in (0.5, 1, 3):
        assert exit_scores.Energy(T).of(z).item() == pytest.approx(
            T * math.log(sum(math.exp(v / T) for v in z[0].tolist())), abs=1e-9
        )


def test_patience_counts_agreement():
    votes = F.one_hot(torch.tensor([3, 3, 5, 5, 5]), 10)[:, None].float()
    s = exit_scores.Patience().score(votes)
    assert s[:, 0].tolist() == [0, 1, 0, 1, 2]
    assert inf.take_exit(s, [1] * 4 + [LAST]).item() + 1 == 2
    assert inf.take_exit(s, [2] * 4 + [LAST]).item() + 1 == 5
    assert inf.take_exit(s, [3] * 4 + [LAST]).item() + 1 == 5  # patience never reached: last exit


def test_feature_scores():
    a = [
        torch.tensor([[1.0, 0]]),
        torch.tensor([[1.0, 1]]),
        torch.tensor([[0.9, math.sqrt(1 - 0.81)]]),
        torch.tensor([[-1.0, 0]]),
    ]
    z = torch.zeros(4, 1, 3)
    d, c = exit_scores.Difference().score(z, a)[:, 0].tolist(), exit_scores.Saturation().score(z, a)[:, 0].tolist()
    assert d[0] == LAST and d[1:] == pytest.approx([1.41421, 1.1111, 1e6], rel=1e-4)
    assert c[0] == LAST and c[1] == pytest.approx(math.sqrt(0.5), abs=1e-6)
    scaled = [k * v for k, v in zip((1, 7, 0.1, 3), a)]
    assert exit_scores.Difference().score(z, scaled)[1:, 0].tolist() == pytest.approx(d[1:], rel=1e-5)
    take = lambda T: inf.take_exit(exit_scores.Difference().score(z, a), T).item() + 1
    assert (
        take([math.inf] * 4) == 4
        and take([math.inf, 0, 0, LAST]) == 2
        and take([0, 0, 0, LAST]) == 2
    )  # exit 1 is never taken
    assert (
        take([math.inf, 1.5, 1.08, LAST]) == 3 and take([math.inf, 1.5, 1.12, LAST]) == 4
    )  # cos .9 -> 1.1111


def all_scores(E, K):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            n: exit_scores.score_by_name(n, **(dict(exits=E, n_classes=K) if n == "gate" else {}))
            for n in exit_scores.SCORES
        }


@pytest.mark.parametrize("name", list(exit_scores.SCORES))
def test_step_with_survivors_equals_score_of_all(name):
    "Running exit by exit on those that are left gives the scores of the loop over all samples; all scores survive 16-bit logits."
    g = torch.Generator().manual_seed(2)
    z, a = torch.randn(4, 60, 5, generator=g), [torch.rand(60, 8, generator=g) for _ in range(4)]
    score = all_scores(4, 5)[name]
    full, keep, state = score.score(z, a), torch.arange(60), None
    for e in range(4):
        s, state = score.step(z[e][keep], a[e][keep], state)
        assert s.shape == keep.shape and torch.allclose(s, full[e][keep], atol=1e-6)
        assert all(len(v) == len(keep) for v in state.values())
        stay = torch.rand(len(keep), generator=g) < 0.6
        keep, state = keep[stay], {k: v[stay] for k, v in state.items()}
    assert not torch.isnan(score.score(z.bfloat16(), [v.bfloat16() for v in a])).any()


def test_scores_refuse():
    unknown = "score='confidense' is unknown .did you mean 'confidence'..; choose one of confidence"
    with pytest.raises(ValueError, match=unknown):
        exit_scores.score_by_name("confidense")
    with pytest.raises(ValueError, match="Difference compares features"):
        exit_scores.Difference().score(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="Saturation compares features"):
        exit_scores.Saturation().step(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="equal length at all exits, not 2 and 3"):
        exit_scores.Difference().score(torch.zeros(2, 1, 3), [torch.ones(1, 2), torch.ones(1, 3)])
    with pytest.raises(ValueError, match="features has 1 entries for 2 exits"):
        exit_scores.Difference().score(torch.zeros(2, 1, 3), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="T=-1 must be a finite number above 0"):
        exit_scores.Energy(-1)
    with pytest.raises(ValueError, match="this gate has 2 exits; it was asked for exit 3"):
        exit_scores.Gate(2, 3).score(torch.zeros(3, 1, 3))


# ---------------------------------------------------------------- anytime, outputs of a network


def test_anytime_reports_the_spread_across_exits():
    right = torch.arange(10000) < torch.tensor([[5510], [6567], [7126], [7064]])
    m = exit_scores.anytime(torch.stack([(~right).float(), right.float()], -1), torch.ones(10000).long())
    assert m["exits"] == pytest.approx([0.5510, 0.6567, 0.7126, 0.7064])
    assert (
        f"{100 * m['mean']:.2f} ± {100 * m['std_across_exits']:.2f}"
        == "65.67 ± 7.48"
        == plus_minus(m["exits"], scale=100)
    )


def test_exit_outputs_of_a_network():
    torch.manual_seed(0)
    net, policy = cnn((1, 8, 8), 3, stages=3, width=8), BoostNet()
    d = ArrayData(torch.randint(0, 255, (23, 1, 8, 8), dtype=torch.uint8), torch.arange(23) % 3)
    net.train()
    z, a = inf.exit_outputs(net, d, policy, batch_size=10)
    assert net.training and z.shape == (3, 23, 3) and len(a) == 3
    assert torch.allclose(z, torch.stack(policy.predict(list(predict(net, d)))), atol=1e-5)
    assert torch.allclose(inf.exit_outputs(net, d)[0], predict(net, d), atol=1e-5)
    assert torch.allclose(a[1], net.eval().features(net.stem(d[:][0]))[1], atol=1e-5)
    with pytest.raises(ValueError, match="data has no images"):
        inf.exit_outputs(net, d.subset([]))


# ---------------------------------------------------------------- MSDNet's procedure


def test_msdnet_thresholds_by_hand():
    c = torch.tensor([[0.9, 0.8, 0.6, 0.3], [0.99, 0.5, 0.4, 0.7], [1.0, 1, 1, 1]])
    T = inf.budget_thresholds(c, (0.25, 0.5, 0.25))
    assert T[:2] == pytest.approx([0.9, 0.5]) and T[2] == LAST
    assert (inf.take_exit(c, T) + 1).tolist() == [1, 2, 3, 2]
    T = inf.budget_thresholds(c, (0.2, 0.5, 0.3))  # N_1 = floor(.8) = 0
    assert T[0] == math.inf and (inf.take_exit(c, T) > 0).all()


def test_equal_shares_cost_exactly_the_mean():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 400, 10, generator=g), torch.randint(10, (400,), generator=g)
    curve = inf.budget_curve(z, z, y, [1, 2, 3, 4])
    assert [c["P"] for c in curve] == list(range(1, 40))
    assert curve[19]["cost"] == pytest.approx(2.5, abs=1e-12)
    last = [round(400 * c["shares"][-1]) for c in curve]
    assert last == [
        400 - sum(math.floor(400 * q + 1e-9) for q in exit_shares(4, P)[:-1]) for P in range(1, 40)
    ]
    assert all(b >= a - 3 for a, b in zip(last, last[1:])) and last[0] < 5 and last[-1] > 150


def test_ties_leave_together_or_nearest():
    s = torch.tensor([[2.0, 1, 1, 1, 0, 0], [0.0] * 6])
    leaves = lambda n, ties: int(
        (s[0] >= inf.budget_thresholds(s, [n / 6, 1 - n / 6], ties)[0]).sum()
    )
    assert [leaves(n, "in") for n in range(7)] == [0, 1, 4, 4, 4, 6, 6]
    assert [leaves(n, "nearest") for n in range(7)] == [0, 1, 1, 4, 4, 6, 6]
    never = torch.tensor([[LAST] * 4, [1.0, 2, 3, 4], [0.0] * 4])  # exit 1 cannot be taken
    assert inf.budget_thresholds(never, [0.5, 0.25, 0.25])[0] == math.inf


def test_flat_keeps_the_best_thresholds_so_far(data):
    d = data
    v, t = d["v"].clone(), d["t"].clone()
    v[3], t[3] = v[0], t[0]  # a last exit that is worse than the third
    args, sv, rv = (v, t, d["yt"], d["costs"]), exit_scores.confidence(v), v.argmax(-1) == d["yv"]
    plain, flat = inf.budget_curve(*args), inf.budget_curve(*args, flat=True, valid_y=d["yv"])
    acc = [inf.evaluate_thresholds(sv, rv, d["costs"], p["thresholds"])["accuracy"] for p in plain]
    seen, best = -1, None
    for a, p, f in zip(acc, plain, flat):
        if a > seen:
            seen, best = a, p
        assert f["thresholds"] == best["thresholds"] and f["accuracy"] == best["accuracy"]
    assert any(f["thresholds"] != p["thresholds"] for f, p in zip(flat, plain))
    with pytest.raises(ValueError, match="pass valid_y"):
        inf.budget_curve(*args, flat=True)


def test_departures_of_the_released_code(data):
    "Largest logit as the score and shares q_k ~ (P/20)^(4k)."
    d = data
    z = d["v"]
    got = inf.budget_curve(z, d["t"], d["yt"], d["costs"], P=[15], score="logit", exponent=4)[0]
    q = np.array([(15 / 20) ** (4 * k) for k in range(1, 5)])
    q /= q.sum()
    T = inf.budget_thresholds(z.amax(-1), q.tolist())
    assert got["thresholds"][:-1] == pytest.approx(T[:-1]) and got["thresholds"][-1] == "-inf"
    assert got["thresholds"][0] > 1
    assert got["cost"] < inf.budget_curve(z, d["t"], d["yt"], d["costs"], P=[15])[0]["cost"]


def test_both_ends_of_a_policy(data):
    d = data
    m = exit_scores.anytime(d["t"], d["yt"])["exits"]
    first, last = (
        inf.evaluate_thresholds(d["st"], d["rt"], d["costs"], [T] * 3 + [LAST]) for T in (0, 1.01)
    )
    assert first["shares"] == [1, 0, 0, 0] and first["accuracy"] == pytest.approx(m[0])
    assert last["shares"] == [0, 0, 0, 1]
    assert last["accuracy"] == pytest.approx(m[3])
    assert last["cost"] == 4


# ---------------------------------------------------------------- budgets


def test_shares_for_a_budget():
    c = [1.0, 2, 3, 4]
    assert inf.shares_for_budget(c, 2.5) == pytest.approx([0.25] * 4)
    for P, mean in ((10, 1.733), (30, 2.985)):
        B = np.dot(exit_shares(4, P), c)
        assert B == pytest.approx(mean, abs=1e-3)
        assert inf.shares_for_budget(c, B) == pytest.approx(exit_shares(4, P), abs=1e-6)
    for B in np.linspace(1, 4, 13):
        assert np.dot(inf.shares_for_budget(c, B), c) == pytest.approx(B, abs=1e-6)
    many = np.cumsum(np.arange(1, 25.0))
    assert np.dot(inf.shares_for_budget(many, 200.0), many) == pytest.approx(200, abs=1e-4)


@pytest.mark.parametrize("scheme", inf.SCHEMES)
def test_schemes_meet_the_budget_on_validation_data(data, scheme):
    d = data
    free = inf.stopping_thresholds(d["sv"], d["rv"], d["costs"], 0.0)  # spends what pays, no more
    top = (
        4
        if scheme != "lagrange"
        else inf.evaluate_thresholds(d["sv"], d["rv"], d["costs"], free)["cost"]
    )
    for B in np.linspace(1.1, top - 0.05, 7):
        r = inf.evaluate_thresholds(
            d["sv"],
            d["rv"],
            d["costs"],
            inf.thresholds_for_budget(d["sv"], d["rv"], d["costs"], B, scheme),
        )
        assert r["cost"] == pytest.approx(B, rel=0.01)
    for B, e in ((1, 0), (4, 3)):
        r = inf.evaluate_thresholds(
            d["sv"],
            d["rv"],
            d["costs"],
            inf.thresholds_for_budget(d["sv"], d["rv"], d["costs"], B, scheme),
        )
        if scheme != "lagrange" or B == 1:
            assert r["shares"][e] == 1


def test_optimal_stopping_spends_a_budget_better(data):
    "Accuracy does not fall with the budget, on validation data; on test data optimal stopping is not below the scheme without labels, on average."
    d = data
    acc, cost, gain = [], [], []
    for B in np.linspace(1.05, 3.9, 20):
        T = inf.thresholds_for_budget(d["sv"], d["rv"], d["costs"], B, "lagrange")
        r = inf.evaluate_thresholds(d["sv"], d["rv"], d["costs"], T)
        t = inf.evaluate_thresholds(d["st"], d["rt"], d["costs"], T)
        acc.append(r["accuracy"])
        cost.append(r["cost"])
        assert r["cost"] <= B * (1 + 1e-6)
        q = inf.evaluate_thresholds(
            d["st"],
            d["rt"],
            d["costs"],
            inf.thresholds_for_budget(d["sv"], None, d["costs"], B, "msdnet"),
        )
        gain.append(t["accuracy"] - q["accuracy"])
    assert (np.diff(acc) >= -1e-12).all() and (np.diff(cost) >= -1e-12).all()
    assert np.mean(gain) > 0


def test_stopping_with_two_exits_is_the_best_threshold(data):
    d = data
    s, r, c = d["sv"][[0, 3]], d["rv"][[0, 3]], [1.0, 2.0]
    value = lambda T, mu: (lambda e: e["accuracy"] - mu * e["cost"])(
        inf.evaluate_thresholds(s, r, c, [T, LAST])
    )
    for mu in (0.0, 0.05, 0.2, 0.5):
        best = max(value(T, mu) for T in [*s[0].unique().tolist()[::10], math.inf])
        assert value(inf.stopping_thresholds(s, r, c, mu)[0], mu) >= best - 1e-9


def test_no_price_means_always_last_iff_the_last_exit_is_never_worse(data):
    s = torch.linspace(0, 1, 300).expand(3, 300)
    last_best = torch.stack(
        [torch.arange(300) > 200, torch.arange(300) > 100, torch.arange(300) > 50]
    )
    assert inf.stopping_thresholds(s, last_best, [1, 2, 3], 0.0) == [math.inf, math.inf, LAST]
    worse_on_top = last_best.clone()
    worse_on_top[2, 250:] = False  # the last exit spoils the surest samples
    T = inf.stopping_thresholds(s, worse_on_top, [1, 2, 3], 0.0)
    assert (inf.take_exit(s, T)[250:] < 2).all() and (inf.take_exit(s, T)[51:200] == 2).all()
    spare = inf.thresholds_for_budget(
        s, worse_on_top, [1, 2, 3], 3.0, "lagrange"
    )  # more cost would buy nothing
    assert (
        inf.evaluate_thresholds(s, worse_on_top, [1, 2, 3], spare)["accuracy"]
        > worse_on_top[2].float().mean()
    )


def test_scores_with_ties_and_exits_that_cannot_be_taken(data):
    d = data
    p = exit_scores.Patience().score(d["v"])
    for scheme in ("quantile", "shared", "lagrange"):
        Ts = [
            inf.thresholds_for_budget(p, d["rv"], d["costs"], B, scheme) for B in (1, 2, 2.5, 3, 4)
        ]
        costs = [inf.evaluate_thresholds(p, d["rv"], d["costs"], T)["cost"] for T in Ts]
        assert all(c <= B + 1e-9 for c, B in zip(costs, (1, 2, 2.5, 3, 4)))
        assert costs == sorted(costs)
        assert costs[0] == 1
        assert costs[-1] > 2
    closed = d["sv"].clone()
    closed[0] = LAST
    for scheme in inf.SCHEMES:
        T = inf.thresholds_for_budget(closed, d["rv"], d["costs"], 2.5, scheme)
        r = inf.evaluate_thresholds(closed, d["rv"], d["costs"], T)
        assert r["shares"][0] == 0 and r["cost"] == pytest.approx(2.5, rel=0.01)
        with pytest.raises(
            ValueError, match="must lie between 2, the cheapest exit that can be taken"
        ):
            inf.thresholds_for_budget(closed, d["rv"], d["costs"], 1.5, scheme)


def test_bad_input_is_refused_in_one_sentence(data):
    d = data
    s, r, c = d["sv"], d["rv"], d["costs"]
    nan = s.clone()
    nan[2, 5] = math.nan
    for B in (0.99, 4.01, math.nan):
        words = (
            f"budget={B} must lie between 1, .* and 4, the dearest"
            if B == B
            else "budget=nan must be a finite number"
        )
        for scheme in inf.SCHEMES:
            with pytest.raises(ValueError, match=words):
                inf.thresholds_for_budget(s, r, c, B, scheme)
    with pytest.raises(ValueError, match="3 thresholds for 4 exits: give one per exit"):
        inf.take_exit(s, [0.5] * 3)
    with pytest.raises(ValueError, match="contains NaN"):
        inf.take_exit(s, [0.5, math.nan, 0.5, LAST])
    with pytest.raises(ValueError, match="NaN at exit 3"):
        inf.take_exit(nan, [0.5] * 4)
    with pytest.raises(ValueError, match="NaN at exit 3"):
        inf.thresholds_for_budget(nan, r, c, 2.0)
    with pytest.raises(ValueError, match="empty batch"):
        inf.take_exit(s[:, :0], [0.5] * 4)
    with pytest.raises(ValueError, match="empty batch"):
        inf.thresholds_for_budget(s[:, :0], r[:, :0], c, 2.0)
    with pytest.raises(ValueError, match=r"shape \(E, N\)"):
        inf.take_exit(s[0], [0.5] * 4)
    with pytest.raises(ValueError, match="3 costs for 4 exits"):
        inf.thresholds_for_budget(s, r, c[:3], 2.0)
    with pytest.raises(ValueError, match="must be positive and rise"):
        inf.thresholds_for_budget(s, r, [1, 3, 2, 4], 2.0)
    with pytest.raises(ValueError, match="right has shape"):
        inf.thresholds_for_budget(s, r[:2], c, 2.0, "lagrange")
    with pytest.raises(ValueError, match="scheme='greedy' must be one of msdnet"):
        inf.thresholds_for_budget(s, r, c, 2.0, "greedy")
    with pytest.raises(ValueError, match="add to 1"):
        inf.budget_thresholds(s, [0.3] * 4)
    with pytest.raises(ValueError, match="mu=-1 must be a finite number of at least 0"):
        inf.stopping_thresholds(s, r, c, -1)
    with pytest.raises(ValueError, match="no samples"):
        evaluation.temperature(d["v"][:, :0], d["yv"][:0])


def test_numpy_arrays_are_welcome(data):
    d = data
    s, r = d["sv"].double().numpy(), d["rv"].numpy()
    for scheme in inf.SCHEMES:
        T = inf.thresholds_for_budget(s, r, d["costs"], 2.2, scheme)
        assert inf.evaluate_thresholds(s, r, d["costs"], T)["cost"] == pytest.approx(2.2, rel=0.01)


# ---------------------------------------------------------------- the gate


def test_gate_learns_what_confidence_cannot_know():
    "Exit 1 is always wrong when it answers class 0, however confident it is: only a score that looks at all probabilities can know."
    z, y = cascade(1500, E=3, seed=3)
    pred = z[0].argmax(-1)
    y = torch.where(pred == 0, (pred + 1) % 5, y)
    gate, q = inf.fit_gate(z, y, [1, 2, 3], budget=1.7, steps=100)
    right = z.argmax(-1) == y
    mine = evaluation.failure_auroc(gate.score(z), right)[0]
    conf = evaluation.failure_auroc(exit_scores.confidence(z), right)[0]
    assert mine > conf + 0.05
    assert np.dot(q, [1, 2, 3]) == pytest.approx(1.7, rel=0.02)
    assert sum(q) == pytest.approx(1, abs=1e-5)
    T = inf.budget_thresholds(gate.score(z), q)
    assert inf.evaluate_thresholds(gate.score(z), right, [1, 2, 3], T)["cost"] == pytest.approx(
        1.7, rel=0.03
    )
    one, two = (inf.fit_gate(z, y, [1, 2, 3], budget=1.7, steps=5)[0].score(z) for _ in range(2))
    assert torch.equal(one, two)  # the same seed, the same gate


def test_gate_reaches_budgets_near_both_ends():
    "Shares of a softmax over sigmoids would lie in [0.11, 0.48] for four exits; ours need not."
    z, y = cascade(600, seed=4)
    for B, e in ((1.3, 0), (3.7, 3)):
        _, q = inf.fit_gate(z, y, [1, 2, 3, 4], budget=B, steps=100)
        assert np.dot(q, [1, 2, 3, 4]) == pytest.approx(B, rel=0.03)
        assert q[e] > math.e / (math.e + 3)


# ---------------------------------------------------------------- yardsticks


def test_auroc_and_aurc_against_references():
    from sklearn.metrics import roc_auc_score

    g = np.random.default_rng(0)
    s, r = g.random((5, 400)), g.random((5, 400)) < 0.6
    s[1] = s[1].round(1)
    s[2] = 1.0
    s[3] += r[3]
    s[4, :100] = -np.inf
    ref = [roc_auc_score(a, np.where(np.isinf(b), -1, b)) for a, b in zip(r, s)]
    assert evaluation.failure_auroc(s, r) == pytest.approx(ref, abs=1e-12)
    assert evaluation.failure_auroc(s, r)[2] == 0.5
    assert math.isnan(evaluation.failure_auroc([[1.0, 2]], [[0, 0]])[0])
    perms = [
        np.mean(np.cumsum(1 - np.array(p)) / np.arange(1, 4))
        for p in itertools.permutations([1, 0, 0])
    ]
    assert evaluation.aurc([[0.5, 0.5, 0.5]], [[1, 0, 0]])[0] == pytest.approx(
        np.mean(perms)
    )  # ties: the mean over orders
    order = np.argsort(-s[0])
    assert evaluation.aurc(s[:1], r[:1])[0] == pytest.approx(
        np.mean(np.cumsum(~r[0][order]) / np.arange(1, 401))
    )


def test_oracle_is_the_best_choice_of_exits():
    g = np.random.default_rng(1)
    costs = [1.0, 2.5, 3.0]
    for _ in range(20):
        right = g.random((3, 5)) < 0.5
        choices = [
            (right[list(e), range(5)].mean(), np.mean([costs[k] for k in e]))
            for e in itertools.product(range(3), repeat=5)
        ]
        o = evaluation.oracle(right, costs)
        top = max(a for a, _ in choices)
        assert o["accuracy"] == pytest.approx(top)
        assert o["cost"] == pytest.approx(min(c for a, c in choices if a == top))
        for B in (1.0, 1.4, 2.0):
            o = evaluation.oracle(right, costs, B)
            assert o["cost"] <= B + 1e-9
            assert o["accuracy"] == pytest.approx(max(a for a, c in choices if c <= B + 1e-9))


def test_static_mixture_is_the_best_coin_toss():
    costs, acc = np.array([1.0, 2, 3, 5]), np.array([0.4, 0.5, 0.8, 0.7])
    for B in np.linspace(1, 5, 17):
        toss = (
            (p * costs[i] + (1 - p) * costs[j], p * acc[i] + (1 - p) * acc[j])
            for i in range(4)
            for j in range(4)
            for p in np.linspace(0, 1, 401)
        )
        best = max(a for c, a in toss if c <= B + 1e-9)
        assert evaluation.static_mixture(costs, acc, B) == pytest.approx(best, abs=2e-3)


def test_policy_table_and_curve(data, capsys):
    d = data
    names = ("confidence", "margin", "patience")
    sv, st = ({n: exit_scores.score_by_name(n).score(z) for n in names} for z in (d["v"], d["t"]))
    rows = evaluation.policy_table(sv, st, d["rv"], d["rt"], d["costs"], 2.0)
    text = capsys.readouterr().out
    assert [r["name"] for r in rows] == list(names) and all(n in text for n in names)
    each = d["rt"].double().mean(1).tolist()
    for r in rows:
        assert r["over_mixture"] == pytest.approx(
            r["accuracy"] - evaluation.static_mixture(d["costs"], each, r["cost"])
        )
        assert r["below_oracle"] >= 0
    assert rows[0]["over_mixture"] > 0.01 and rows[0]["below_oracle"] > 0.01
    c = evaluation.policy_curve(
        sv["confidence"], st["confidence"], d["rv"], d["rt"], d["costs"], scheme="quantile"
    )
    assert len(c["budget"]) == 12
    assert c["accuracy"][0] == pytest.approx(each[0])
    assert c["accuracy"][-1] == pytest.approx(each[-1])


# ---------------------------------------------------------------- calibration


def test_temperature_is_the_minimum_and_changes_no_answer(data):
    from scipy.optimize import minimize_scalar

    d = data
    z = d["v"] * torch.tensor([3.0, 1, 0.3, 1])[:, None, None]
    T = evaluation.temperature(z, d["yv"])
    nll = lambda f, t: F.cross_entropy(f.double() / t, d["yv"]).item()
    for f, t in zip(z, T.tolist()):
        ref = minimize_scalar(
            lambda x: nll(f, math.exp(x)),
            bounds=(-3, 3),
            method="bounded",
            options=dict(xatol=1e-8),
        )
        assert t == pytest.approx(math.exp(ref.x), rel=1e-3) and nll(f, t) <= nll(f, 1.0)
    new = z / T[:, None, None]
    assert torch.equal(new.argmax(-1), z.argmax(-1))
    assert exit_scores.anytime(new, d["yv"])["exits"] == exit_scores.anytime(z, d["yv"])["exits"]
    before, after = evaluation.ece(exit_scores.confidence(z), d["rv"]), evaluation.ece(exit_scores.confidence(new), d["rv"])
    assert after[0] < before[0] - 0.02 and after[2] < before[2] - 0.02
    assert evaluation.temperature(z[0], d["yv"]).item() == pytest.approx(T[0].item())
    sure = 0.5 * F.one_hot(d["yv"], 5).float()  # always right: the sharper the better
    assert evaluation.temperature(sure, d["yv"]).item() == pytest.approx(math.exp(-3), rel=1e-3)


def test_ece_by_hand():
    assert evaluation.ece([[0.9, 0.8, 0.1]], [[1, 0, 0]], bins=2)[0] == pytest.approx((0.1 + 0.7) / 3)
    assert evaluation.ece([[1.0, 0.0]], [[1, 0]]) == [0.0]
    with pytest.raises(ValueError, match="only probabilities"):
        evaluation.ece([[1.5]], [[1]])


# ---------------------------------------------------------------- figures


def test_figures_take_plain_arrays(data):
    d = data
    each = d["rt"].double().mean(1).tolist()
    c = dict(cost=[1, 2], accuracy=[0.5, 0.6])
    fig = evaluation.plot_policies(dict(a=c, b=c), (d["costs"], each), d["rt"].numpy())
    assert [t.name for t in fig.data] == ["a", "b", "static mixture", "exits", "oracle"]
    assert (
        min(o - s for o, s in zip(fig.data[-1].y, fig.data[2].y)) >= -1e-9
    )  # the oracle is never below the mixture
    assert len(evaluation.plot_auroc({"a": [0.5, 0.7], "b": [0.6, 0.8]}).data) == 2
    assert len(evaluation.plot_reliability({"before": d["st"]}, d["rt"]).data) == 8
    depth = evaluation.plot_depth(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]), 2, bins=2)
    assert list(depth.data[0].y) == [1, 0] and list(depth.data[1].y) == [0, 1]
    pics = ArrayData(torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 2)
    grid = evaluation.image_grid(pics, torch.arange(40) % 3, torch.rand(4, 40), each=3)
    assert list(grid.layout.yaxis.ticktext) == ["exit 1", "exit 2", "exit 3", "exit 4"]
    with pytest.raises(ValueError, match="equally many"):
        evaluation.image_grid(pics, torch.zeros(3), torch.rand(4, 40))


def test_the_gate_is_trained_along_a_cosine(monkeypatch):
    "The learning rate of every step, from the first to the last: lr (1 + cos(pi t / steps)) / 2."
    seen, step = [], torch.optim.Adam.step

    def watched(self, *a, **k):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    z, y = cascade(100, E=2)
    inf.fit_gate(z, y, [1, 2], 1.5, steps=20, lr=0.04)
    assert seen == pytest.approx(
        [0.02 * (1 + math.cos(math.pi * t / 20)) for t in range(20)], rel=1e-6
    )


@pytest.mark.parametrize(
    "name, other",
    [
        ("alpha_ce", 0.0),
        ("alpha_cost", 0.0),
        ("beta", 0.0),
        ("steps", 3),
        ("hidden", 3),
        ("seed", 1),
    ],
)
def test_every_setting_of_the_gate_matters(name, other):
    z, y = cascade(200, E=3)
    a, b = (inf.fit_gate(z, y, [1, 2, 3], 1.5, **{"steps": 10, **k}) for k in ({}, {name: other}))
    assert a[1] != b[1]


# ---------------------------------------------------------------- thresholds in writing


def test_infinities_stay_apart_in_json():
    import json

    T = [math.inf, LAST, 0.25, LAST]
    stored = json.loads(json.dumps(inf.write_thresholds(T), allow_nan=False))
    assert stored == ["inf", "-inf", 0.25, "-inf"]
    assert (
        inf.read_thresholds(stored)
        == T
        == inf.read_thresholds(np.array(T))
        == inf.read_thresholds(torch.tensor(T))
    )
    assert inf.write_thresholds(stored) == stored  # writing twice changes nothing


def test_old_records_stay_readable():
    "None at the last exit is -inf; before it the writer of those records only meant +inf."
    assert inf.read_thresholds([None, 0.5, None]) == [math.inf, 0.5, LAST]
    from darkdistill_nb.core.records import asset, load_record

    r = load_record(asset("digits_default.json"))
    for run in r.runs:
        for p in run["final"]["budget"]:
            T = inf.read_thresholds(p["thresholds"], len(r.info["macs"]))
            assert T[-1] == LAST and not any(map(math.isnan, T))


@pytest.mark.parametrize(
    "T, words",
    [
        ([0.5, "0.5", 1, 1], "entry='0.5'"),
        ([0.5, "nan", 1, 1], "entry='nan'"),
        ([[0.5]] * 4, "must be a number"),
        (0.5, "must be a list"),
        ("inf", "must be a list"),
        ([0.5, math.nan, 1, 1], "contains NaN"),
        ([True] * 4, "entry=True"),
        ([0.5] * 5, "5 thresholds for 4 exits"),
        ([], "0 thresholds for 4 exits"),
        (None, "must be a list"),
        ([1j] * 4, "must be a number"),
        (torch.full((4, 1), 0.5), "must be a number"),
        (np.full((4, 1), 0.5), "must be a number"),
        ({0.5}, "1 thresholds"),
        (iter([0.5] * 4), "must be a list"),
    ],
)
def test_what_is_no_list_of_thresholds(data, T, words):
    for call in (
        lambda: inf.take_exit(data["sv"], T),
        lambda: inf.evaluate_thresholds(data["sv"], data["rv"], data["costs"], T),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_every_reader_takes_thresholds_as_they_are_written():
    "take_exit, evaluate_thresholds, ExitRunner, loop_exits, streams, risk control, system rules and the explorer's model: the same exits and the same cost."
    from darkdistill_nb.exits.bounds import grid_losses
    from darkdistill_nb.exits.runner import ExitRunner, loop_exits
    from darkdistill_nb.app.exit_explorer import ExitModel

    torch.manual_seed(0)
    net = cnn((1, 8, 8), 4, stages=3, width=8).eval()
    x = torch.randn(40, 1, 8, 8)
    y = torch.arange(40) % 4
    with torch.no_grad():
        z = torch.stack(net(x))
    costs, conf, right = net.macs(), exit_scores.confidence(z), z.argmax(-1) == y
    for r in inf.budget_curve(z, z, y, costs, P=(1, 4, 20, 39)):
        old = [None if isinstance(t, str) else t for t in r["thresholds"]]
        for T in (r["thresholds"], old, inf.read_thresholds(r["thresholds"])):
            exits = inf.take_exit(conf, T)
            assert np.asarray(costs)[exits].mean() == pytest.approx(r["cost"])
            assert inf.evaluate_thresholds(conf, right, costs, T)["cost"] == pytest.approx(
                r["cost"]
            )
            assert grid_losses(conf, (~right).double(), [T], costs)[1][0] == pytest.approx(
                r["cost"]
            )
            runner = ExitRunner(net, T)
            same = lambda e: (
                (torch.as_tensor(e) == exits).float().mean() >= 0.9
            )  # a threshold is a score, and a last bit decides
            assert same(runner(x).exit) and same(loop_exits(net, x, T)[0])
            s = runner.stream(batch=7)
            got = dict(
                zip(
                    *[
                        [*a, *b]
                        for a, b in zip(*((o.ids, o.exit.tolist()) for o in (s.push(x), s.flush())))
                    ]
                )
            )
            assert same([got[i] for i in range(40)])
            m = ExitModel(conf.double().numpy(), right.numpy(), costs, valid=conf.double().numpy())
            assert m.at(T)["cost"] == pytest.approx(r["cost"])


# ---------------------------------------------------------------- values that hide


@pytest.mark.parametrize("bad", [math.nan, 0.5, 2.0, -1.0])
def test_right_is_true_or_false(data, bad):
    right = data["rv"].float()
    right[1, 3] = bad
    s, c = data["sv"], data["costs"]
    for call in (
        lambda: inf.evaluate_thresholds(s, right, c, [0.5] * 4),
        lambda: evaluation.failure_auroc(s, right),
        lambda: evaluation.aurc(s, right),
        lambda: evaluation.ece(s, right),
        lambda: evaluation.oracle(right, c),
        lambda: inf.thresholds_for_budget(s, right, c, 2.0, "lagrange"),
        lambda: evaluation.policy_table({"a": s}, {"a": s}, data["rv"], right, c, 2.0),
        lambda: inf.stopping_thresholds(s, right, c, 0.1),
    ):
        with pytest.raises(ValueError, match="right must be True or False"):
            call()
    assert (
        inf.evaluate_thresholds(s, data["rv"].int(), c, [0.5] * 4)["accuracy"]
        == inf.evaluate_thresholds(s, data["rv"], c, [0.5] * 4)["accuracy"]
    )


@pytest.mark.parametrize(
    "costs",
    [
        [1, 2, 3, math.inf],
        [1, 2, 3, math.nan],
        [],
        [0, 1, 2, 3],
        [1, 1, 2, 3],
        ["1", 2, 3, 4],
        [[1], [2], [3], [4]],
    ],
)
def test_costs_are_finite_and_rise(data, costs):
    for call in (
        lambda: inf.shares_for_budget(costs, 2),
        lambda: inf.evaluate_thresholds(data["sv"], data["rv"], costs, [0.5] * 4),
        lambda: evaluation.static_mixture(costs, [0.5] * 4, 2.0),
        lambda: evaluation.oracle(data["rv"], costs),
        lambda: inf.fit_gate(data["v"], data["yv"], costs, 2.0),
    ):
        with pytest.raises(ValueError, match="cost"):
            call()


def test_whole_scores_do_not_round_thresholds():
    counts = torch.tensor([[0, 1, 2], [0, 1, 2]])
    assert inf.take_exit(counts, [0.5, LAST]).tolist() == [1, 0, 0]
    assert inf.take_exit(counts, ["inf", None]).tolist() == [1] * 3


def test_masked_classes_play_no_part(data):
    "Scores, temperature and anytime accuracy with a class that cannot occur are those without it."
    z, y = data["v"], data["yv"]
    wide = torch.cat([torch.full_like(z[..., :1], LAST), z], -1)
    assert torch.equal(evaluation.temperature(wide, y + 1), evaluation.temperature(z, y))
    assert exit_scores.anytime(wide, y + 1) == exit_scores.anytime(z, y)
    for name in ("confidence", "margin", "energy", "logit", "patience"):
        assert torch.allclose(
            exit_scores.score_by_name(name).score(wide), exit_scores.score_by_name(name).score(z)
        ), name
    with pytest.raises(ValueError, match="mean logit of the labels' classes must be finite"):
        evaluation.temperature(wide, 0 * y)
    for bad in (
        z * math.nan,
        torch.full_like(z, LAST),
        z.index_fill(2, torch.tensor([1]), math.inf),
    ):
        with pytest.raises(ValueError, match="hold NaN"):
            evaluation.temperature(bad, y)
        with pytest.raises(ValueError, match="hold NaN"):
            exit_scores.anytime(bad, y)
        with pytest.raises(ValueError, match="hold NaN"):
            inf.fit_gate(bad, y, data["costs"], 2.0)
        with pytest.raises(ValueError, match="hold NaN"):
            inf.budget_curve(bad, z, y, data["costs"])


# ---------------------------------------------------------------- modes and references


def test_exit_outputs_leaves_every_mode_as_it_was():
    net = cnn((1, 8, 8), 3, width=4).train()
    net.stages[1].eval()
    before = [m.training for m in net.modules()]
    inf.exit_outputs(net, ArrayData(torch.randn(6, 1, 8, 8), torch.arange(6) % 3))
    assert [m.training for m in net.modules()] == before and True in before and False in before


def test_features_are_those_before_the_classifier_works_in_place():
    from torch import nn

    net = cnn((1, 8, 8), 3, width=4).eval()
    d = ArrayData(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)
    want = inf.exit_outputs(net, d)[1]
    for e in net.exits:
        e.norm = nn.Threshold(1e9, -7.0, inplace=True)
    for k, w in zip(inf.exit_outputs(net, d)[1], want):
        assert torch.equal(k, w)


def test_a_score_remembers_values():
    "A later stage that works in place on a view of the features does not change what the score compares with."
    for score in (exit_scores.Saturation(), exit_scores.Difference()):
        a = torch.tensor([[1.0, 0]])
        _, state = score.step(torch.zeros(1, 2), a)
        a.mul_(0).add_(1)
        s, _ = score.step(torch.zeros(1, 2), torch.tensor([[1.0, 1]]), state)
        assert s.item() == pytest.approx(0.5**0.5 if isinstance(score, exit_scores.Saturation) else 2**0.5)


# ---------------------------------------------------------------- hostile settings

NUMBERS = (math.nan, math.inf, -1, "1", None)
COUNTS = (0, -1, 1.5, math.nan, "3", None, True)


def settings(d):
    z, y, s, r, c = d["v"], d["yv"], d["sv"], d["rv"], d["costs"]
    return [
        (NUMBERS + (0,), exit_scores.Energy),
        (COUNTS, lambda v: exit_scores.Gate(v, 3)),
        (COUNTS + (1,), lambda v: exit_scores.Gate(2, v)),
        (NUMBERS, lambda v: inf.budget_thresholds(s, [v, 0.5, 0.25, 0.25])),
        (NUMBERS, lambda v: inf.budget_curve(z, z, y, c, exponent=v)),
        (NUMBERS + (0,), lambda v: inf.budget_curve(z, z, y, c, P=[v])),
        (("no", 1, None), lambda v: inf.budget_curve(z, z, y, c, flat=v)),
        (NUMBERS, lambda v: inf.shares_for_budget(c, v)),
        (NUMBERS + (1.1,), lambda v: inf.quantile_thresholds(s, v)),
        (NUMBERS, lambda v: inf.quantile_thresholds(s, [v] * 3)),
        (NUMBERS, lambda v: inf.stopping_thresholds(s, r, c, v)),
        (NUMBERS, lambda v: inf.thresholds_for_budget(s, r, c, v)),
        (("greedy", None, 1, ["msdnet"]), lambda v: inf.thresholds_for_budget(s, r, c, 2, v)),
        (("out", None, 1), lambda v: inf.budget_thresholds(s, [0.25] * 4, v)),
        (NUMBERS, lambda v: inf.fit_gate(z, y, c, v)),
        (NUMBERS, lambda v: inf.fit_gate(z, y, c, 2, alpha_ce=v)),
        (NUMBERS, lambda v: inf.fit_gate(z, y, c, 2, beta=v)),
        (COUNTS, lambda v: inf.fit_gate(z, y, c, 2, steps=v)),
        (NUMBERS + (0,), lambda v: inf.fit_gate(z, y, c, 2, lr=v)),
        (COUNTS, lambda v: inf.fit_gate(z, y, c, 2, hidden=v)),
        ((1.5, math.nan, "1"), lambda v: inf.fit_gate(z, y, c, 2, seed=v)),
        (NUMBERS, lambda v: evaluation.static_mixture(c, [0.5] * 4, v)),
        (("1", None, math.nan, math.inf), lambda v: evaluation.static_mixture(c, [v, 0.5, 0.5, 0.5], 2)),
        ((math.nan, math.inf, -1, "1"), lambda v: evaluation.oracle(r, c, v)),
        (COUNTS, lambda v: evaluation.ece(s, r, v)),
        (COUNTS, lambda v: evaluation.reliability(s, r, v)),
        ((math.nan, math.inf, "1", 5), lambda v: evaluation.temperature(z, y, v)),
        ((math.nan, math.inf, "1", -5), lambda v: evaluation.temperature(z, y, high=v)),
        (COUNTS, lambda v: evaluation.plot_depth([0, 1], [0.1, 0.2], v)),
        (COUNTS, lambda v: evaluation.plot_depth([0, 1], [0.1, 0.2], 2, v)),
        ((math.nan, math.inf), lambda v: evaluation.plot_depth([0, 1], [0.1, v], 2)),
        ((5, -1), lambda v: evaluation.plot_depth([0, v], [0.1, 0.2], 2)),
        ((y[:5], y.float(), y + 5, -1 - y), lambda v: exit_scores.anytime(z, v)),
        ((y[:5], y.float(), y + 5), lambda v: evaluation.temperature(z, v)),
        ((z[0], z[:, :0], z[..., :0], None), lambda v: exit_scores.anytime(v, y)),
    ]


@pytest.mark.parametrize("n", range(35))
def test_hostile_settings_get_one_sentence(data, n):
    values, call = settings(data)[n]
    for v in values:
        with pytest.raises(ValueError) as e:
            call(v)
        assert "\n" not in str(e.value) and any(
            w in str(e.value) for w in ("must", "give one", "at least one")
        ), str(e.value)


def test_numpy_numbers_are_numbers(data):
    d = data
    f, i = np.float32, np.int64
    assert inf.shares_for_budget(np.array([1, 2, 3, 4]), f(2.5)) == pytest.approx([0.25] * 4)
    assert exit_scores.Energy(f(2)).T == 2 and len(exit_scores.Gate(i(2), i(3)).layers) == 2
    assert evaluation.ece(d["sv"], d["rv"], i(10)) == evaluation.ece(d["sv"], d["rv"], 10)
    assert (
        inf.quantile_thresholds(d["sv"], torch.tensor(0.5))
        == inf.quantile_thresholds(d["sv"], 0.5)
        == inf.quantile_thresholds(d["sv"], f(0.5))
    )
    assert inf.budget_curve(d["v"], d["t"], d["yt"], d["costs"], P=np.arange(3, 5))[0]["P"] == 3

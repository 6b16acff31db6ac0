"""Explorers without a browser: the numpy models against the library, callbacks that touch no torch, stored figures, tables, and what they refuse."""

import json, math, os, subprocess, sys
from unittest import mock
import numpy as np
import plotly.graph_objects as go
import pytest, torch
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.splits import class_mix, dirichlet_split, effective_classes
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet, exit_shares
from darkdistill_nb.exits.inference import budget_thresholds, take_exit
from darkdistill_nb.core.training import predict
from darkdistill_nb.app.explorer import State, live_missing
from darkdistill_nb.app.pages import Table
from darkdistill_nb.app.exit_explorer import ExitExplorer, ExitModel
from darkdistill_nb.app.split_explorer import DirichletExplorer, SplitModel

COSTS = [1e5, 2e5, 3e5, 4e5]
INF = math.inf
needs_live = pytest.mark.skipif(bool(live_missing()), reason=live_missing() or "live views work")


def scores(n=2000, seed=0, digits=None):
    "Scores (4, n) and who is right: deeper exits are right more often, the score says nearly who."
    rng = np.random.default_rng(seed)
    skill = rng.random(n) - np.array([[0.55], [0.4], [0.25], [0.15]])
    s = skill + 0.1 * rng.normal(size=skill.shape)
    return (s if digits is None else s.round(digits)), skill > 0


@pytest.fixture
def explorer():
    s, right = scores()
    return ExitExplorer(
        s,
        right,
        COSTS,
        images=np.random.default_rng(1).integers(0, 256, (2000, 3, 12, 12), dtype=np.uint8),
        mode="live",
    )


# ---------------------------------------------------------------- the model of the exits


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_and_exits_are_those_of_the_library(digits, dtype):
    "Same thresholds as `budget_thresholds`, same exits as `take_exit`, with and without ties, for MSDNet's shares and random ones."
    valid, test = (scores(700, seed, digits)[0].astype(dtype) for seed in (0, 1))
    m = ExitModel(test, scores(700, 1)[1], COSTS, valid)
    rng = np.random.default_rng(2)
    for q in (
        [exit_shares(4, p) for p in (0.01, 5, 20, 39, 400)]
        + list(rng.dirichlet(np.full(4, 0.5), 20))
        + [[0, 0, 0, 1], [1, 0, 0, 0]]
    ):
        T = m.thresholds(q)
        assert T.tolist() == list(budget_thresholds(torch.from_numpy(valid), [float(v) for v in q]))
        assert m.at(T)["exit"].tolist() == take_exit(torch.from_numpy(test), T.tolist()).tolist()


def test_numbers_are_those_of_a_loop():
    s, right = scores(200)
    m = ExitModel(s, right, COSTS, s)
    for T in ([0.2, 0.1, 0, -INF], [INF, 0.3, -1, -INF], [-9, 0, 0, -INF], [INF] * 3 + [-INF]):
        taken = [next(k for k in range(4) if s[k, i] >= T[k]) for i in range(200)]
        r = m.at(T)
        assert r["exit"].tolist() == taken
        assert r["cost"] == pytest.approx(np.mean([COSTS[k] for k in taken]))
        assert r["accuracy"] == pytest.approx(np.mean([right[k, i] for i, k in enumerate(taken)]))
        assert r["shares"].tolist() == pytest.approx([taken.count(k) / 200 for k in range(4)])
        assert r["hits"].tolist() == pytest.approx(
            [sum(right[k, i] for i, k in enumerate(taken) if k == e) / 200 for e in range(4)]
        )


def test_budget_is_kept_on_validation():
    "On continuous validation scores the mean cost misses the budget only by the flooring of three shares."
    s, right = scores(5000)
    m = ExitModel(s, right, COSTS, s)
    for b in np.linspace(1e5, 4e5, 31):
        assert abs(m.at(m.thresholds(m.budget_shares(b)))["cost"] - b) < 3 * 3e5 / 5000 + 1


def test_static_mixture_is_what_chance_reaches():
    s, right = scores(4000)
    m = ExitModel(
        np.random.default_rng(5).random(s.shape), right, COSTS, s
    )  # scores that know nothing
    gaps = [(r := m.at([t, t, t, -INF]))["accuracy"] - r["mixture"] for t in (0.2, 0.5, 0.8)]
    assert max(map(abs, gaps)) < 0.06
    assert m.at([INF] * 3 + [-INF])["mixture"] == pytest.approx(m.each[3])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scores=np.full((4, 10), np.nan)), "scores holds 40 NaN"),
        (dict(scores=np.zeros((4, 0)), right=np.zeros((4, 0), bool)), "N >= 1"),
        (dict(scores=np.zeros(10)), r"scores must have shape \(E, N\)"),
        (dict(right=np.zeros((4, 9), bool)), "right must have the shape of scores"),
        (dict(right=np.full((4, 10), 0.5)), "True and False"),
        (dict(costs=[1, 2, 3]), "costs must be 4 numbers"),
        (dict(costs=[4, 3, 2, 1]), "rise"),
        (dict(costs=[0, 1, 2, 3]), "above 0"),
        (dict(costs=[1, 2, 3, INF]), "rise"),
        (dict(valid=np.zeros((3, 5))), r"valid must have shape \(4, N\)"),
        (dict(valid=np.full((4, 5), np.nan)), "valid holds 20 NaN"),
        (dict(scores=np.array([["a"] * 10] * 4)), "must be numbers"),
        (dict(images=np.zeros((9, 1, 4, 4))), "one per sample"),
        (dict(images=np.zeros((10, 2, 4, 4))), "1 or 3"),
        (dict(mode="film"), "auto, live, page"),
    ],
)
def test_bad_arrays(change, message):
    good = dict(
        scores=np.random.default_rng(0).random((4, 10)),
        right=np.zeros((4, 10), bool),
        costs=[1, 2, 3, 4],
    )
    with pytest.raises(ValueError, match=message):
        ExitExplorer(**{**good, **change})


@pytest.mark.parametrize(
    "T, message",
    [
        ([0.5], "4 numbers"),
        ([0.5] * 5, "4 numbers"),
        ([np.nan, 0, 0, -INF], "NaN"),
        ([0] * 4, "last exit takes every sample"),
    ],
)
def test_bad_thresholds(explorer, T, message):
    with pytest.raises(ValueError, match=message):
        explorer.model.at(T)


@pytest.mark.parametrize("budget", [0, 99_999, 400_001, INF, math.nan])
def test_bad_budget(explorer, budget):
    before = dict(explorer.state.values)
    with pytest.raises(ValueError, match="between the costs of the first and the last exit"):
        explorer.set_budget(budget)
    assert explorer.state.values == before


# ---------------------------------------------------------------- controls and figure


def test_observers_hear_of_changes_once():
    s, calls = State(a=1, b=2), []
    s.observe(lambda: calls.append((s["a"], s["b"])))
    s.update(a=3, b=4)
    s.update(a=3)
    assert calls == [(3, 4)]


def reader(explorer, **values):
    "What the browser sends when the reader moves a control: the state that it now has."
    explorer.hear(dict(state={**explorer.widget.state, **values}))


@needs_live
def test_every_control_has_a_name_and_a_unit(explorer):
    split = DirichletExplorer(np.arange(2000) % 10)
    names = [c["label"] for c in explorer.controls()]
    assert names == ["mean cost budget (k MACs)"] + [
        f"threshold of exit {e} (score)" for e in (1, 2, 3)
    ]
    assert [c["label"] for c in split.controls()] == [
        "gamma (concentration)",
        "clients (number)",
        "family",
        "seed",
    ]
    assert explorer.live() is explorer.live(), "one widget per explorer"


@needs_live
def test_what_the_reader_does_is_known_to_python(explorer):
    explorer.live()
    seen = []
    explorer.state.observe(lambda: seen.append(explorer.says()))
    reader(explorer, budget=None, thresholds=["inf", 0.2, 0.1, "-inf"])
    assert explorer.state["thresholds"] == (INF, 0.2, 0.1, -INF)
    assert explorer.result()["shares"][0] == 0 and len(seen) == 1 and "by hand" in seen[0]
    assert "nobody leaves" in explorer.to_table()["threshold (score)"]
    reader(explorer)
    assert len(seen) == 1, "what has not changed is not told"


@needs_live
def test_what_python_does_is_seen_by_the_reader(explorer):
    explorer.live()
    explorer.set_budget(150_000)
    assert explorer.widget.state["budget"] == 150_000
    explorer.set_threshold(1, explorer.high)
    assert explorer.widget.state["thresholds"][0] == "inf"
    assert explorer.widget.state["thresholds"][-1] == "-inf"
    json.dumps(explorer.widget.state, allow_nan=False)
    explorer.reset()
    assert explorer.widget.state["budget"] == explorer.defaults["budget"]


@needs_live
def test_split_follows_the_reader():
    e = DirichletExplorer(np.arange(2000) % 10, mode="live")
    e.live()
    reader(e, gamma=2.0, clients=4, family="class", seed=5)
    want = SplitModel(np.arange(2000) % 10).at(2.0, 4, "class", 5)["counts"]
    assert e.now["counts"].tolist() == want.tolist() and "4 clients" in e.says()
    e.set(gamma=0.5)
    assert e.widget.state["gamma"] == 0.5
    with pytest.raises(ValueError):
        e.set(clients=1000, family="class", gamma=0.01)
    assert e.widget.state == e.state.values
    e.reset()
    assert e.widget.state["clients"] == 10


@needs_live
def test_the_widget_is_small_and_plotly_comes_when_it_is_asked_for(explorer):
    "Its own script starts at once; five megabytes are sent only to a page that has none."
    w = explorer.live()
    assert len(w._esm) < 100_000 and "export default" in w._esm
    with mock.patch.object(type(w), "send") as send:
        reader(explorer, budget=2e5)
        assert not send.called, "what the browser knows is not sent back to it"
        explorer.set_budget(3e5)
        assert send.call_args.args[0]["state"]["budget"] == 3e5
        explorer.hear("plotly")
    kind, (script,) = send.call_args.args
    assert kind == "plotly" and b"window.Plotly = Plotly" in script


@needs_live
def test_no_torch_in_callbacks(explorer):
    "Every control is moved while a profiler watches and every torch function raises."
    explorer.live()
    seen = []

    def watch(frame, event, arg):
        where = (
            frame.f_code.co_filename
            if event == "call"
            else (getattr(arg, "__module__", None) or "")
            if event == "c_call"
            else ""
        )
        if f"{os.sep}torch{os.sep}" in where or where.split(".")[0] == "torch":
            seen.append(where)

    class Poison(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"torch was called: {func}")

    with Poison():
        sys.setprofile(watch)
        try:
            reader(explorer, budget=None, thresholds=[0.3, 0.2, 0.1, "-inf"])
            explorer.set_budget(180_000)
            explorer.to_table()
            explorer.reset()
        finally:
            sys.setprofile(None)
    assert seen == []
    with Poison(), pytest.raises(AssertionError, match="torch was called"):
        torch.zeros(1) + 1  # the poison works


@needs_live
def test_what_a_notebook_shows(explorer):
    "Live: one widget. On Colab, or asked for: a page."
    import types
    import IPython.display as D
    from darkdistill_nb.app.pages import Page

    with mock.patch.object(D, "display") as display:
        explorer._ipython_display_()
    assert display.call_args.args == (explorer.widget,)
    explorer.mode = "auto"
    colab = mock.patch.dict(sys.modules, {"google.colab": types.ModuleType("google.colab")})
    with colab, mock.patch.object(D, "display") as display:
        explorer._ipython_display_()
    assert isinstance(display.call_args.args[0], Page)


def test_figure_says_what_the_model_says(explorer):
    fig, r = explorer.draw(go.Figure), explorer.result()
    assert fig.data[2].x[0] * 1e3 == pytest.approx(r["cost"])
    assert sum(fig.data[3].x) == pytest.approx(100 * r["accuracy"], abs=0.03)
    explorer.set_threshold(1, explorer.high)
    assert explorer.draw(go.Figure).data[5].text[0] == "nobody"
    split = DirichletExplorer(np.arange(2000) % 10)
    heat = split.draw(go.Figure).data[10]
    assert np.array(heat.z).T.tolist() == split.now["counts"].tolist()


def test_tables_of_many_positions(explorer):
    t = explorer.to_table("budgets", 7)
    assert t["budget (k MACs)"] == ["100", "150", "200", "250", "300", "350", "400"]
    explorer.set_budget(200_000)
    assert t["accuracy (%)"][2] == f"{100 * explorer.result()['accuracy']:.1f}"
    with pytest.raises(ValueError, match="steps"):
        explorer.to_table("budgets", 1)
    split = DirichletExplorer(np.arange(2000) % 10)
    t = split.to_table("gammas")
    assert t["gamma"] == [f"{g:g}" for g in GAMMAS]
    assert t["sum p² in theory"] == [f"{v:.4f}" for v in GAMMAS.values()]


def test_explorers_of_one_exit_and_of_many():
    for E in (1, 7):
        s = np.random.default_rng(0).random((E, 40))
        e = ExitExplorer(s, s > 0.5, np.arange(1, E + 1) * 1e9, unit="MACs", mode="page")
        assert e.unit == "G MACs" and len(e.controls()) == E and len(e.to_table()) == E + 1


@pytest.mark.parametrize(
    "start",
    [
        dict(gamma=0.001, clients=150, seed=1234),
        dict(gamma=np.float64(2e5), clients=np.int64(1), seed=0),
        dict(gamma=0.5),
    ],
)
def test_bounds_hold_the_state(start):
    e = DirichletExplorer(np.arange(3000) % 10, **start)
    for change in ({}, dict(gamma=0.0001, clients=2000), dict(seed=10**9)):
        e.set(**change)
        for c in e.controls():
            assert "options" in c or c["low"] <= e.state[c["name"]] <= c["high"]
        json.dumps(e.to_page().spec, allow_nan=False)


def test_images_of_a_page_are_few_enough_to_store():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2000, 3, 40, 40)).astype(np.uint8)
    s, right = scores(2000)
    sprite = ExitExplorer(s, right, COSTS, images=noise).page_data()["sprite"]
    assert 60 <= sprite["images"] <= 240 and len(sprite["source"]) < 200_000
    assert ExitExplorer(s[:, :6], right[:, :6], COSTS, images=noise[:6]).page_data()["sprite"]["images"] == 3


# ---------------------------------------------------------------- stored forms


@pytest.mark.parametrize(
    "missing, message",
    [("anywidget", "anywidget not installed"), ("ipywidgets", "ipywidgets not installed")],
)
def test_live_says_what_is_missing(missing, message):
    s, right = scores(50)
    e = ExitExplorer(s, right, COSTS, mode="live")
    import importlib.util as u

    find = u.find_spec
    without = mock.patch.object(u, "find_spec", lambda n: None if n == missing else find(n))
    with without, pytest.raises(ImportError, match=message + ".*to_page"):
        e.live()


def test_table_is_accessible_and_escaped():
    t = Table("A <b>", ["x", "y & z"], [["<1>", 2]])
    h = t._repr_html_()
    assert "<caption" in h
    assert h.count('scope="col"') == 2
    assert h.count('scope="row"') == 1
    assert "&lt;1&gt;" in h
    assert "y &amp; z" in h
    assert "A &lt;b&gt;" in h
    assert repr(t).splitlines() == ["A <b>", "x    y & z", "<1>      2"] and t["y & z"] == ["2"]


# ---------------------------------------------------------------- from a network


@pytest.mark.parametrize("score", ["confidence", "margin"])
def test_from_net_is_the_library_in_steps(score):
    from darkdistill_nb.exits.scores import score_by_name

    g = torch.Generator().manual_seed(0)
    split = lambda n: ArrayData(
        torch.randint(0, 256, (n, 1, 8, 8), generator=g, dtype=torch.uint8), torch.arange(n) % 10
    )
    net = cnn((1, 8, 8), 10, width=8).train()
    policy = BoostNet()
    test = split(120)
    valid = split(90)
    e = ExitExplorer.from_net(net, test, valid, policy, score, mode="page")
    assert net.training, "the network is left as it was"
    F, V = (torch.stack(policy.predict(list(predict(net, d)))) for d in (test, valid))
    s = score_by_name(score)
    for have, want in ((e.model.scores, F), (e.model.valid, V)):
        assert torch.allclose(torch.from_numpy(have), s.score(want).float(), atol=1e-5)
    assert e.model.right.tolist() == (F.argmax(-1) == test.y).tolist()
    assert e.model.costs.tolist() == net.macs() and e.score == score
    half = ExitExplorer.from_net(net, test, objective=policy, mode="page")
    assert half.model.scores.shape == half.model.valid.shape == (4, 60)
    assert half.cells.shape == (60, 8, 8, 1)
    own = ExitExplorer.from_logits(
        F, test.y, net.macs(), V, score=score, images=test.x.numpy(), mode="page"
    )
    assert np.allclose(own.model.scores, e.model.scores, atol=1e-5)
    assert (own.model.right == e.model.right).all()
    assert own.score == score
    assert (own.cells == e.cells).all() and np.allclose(own.model.valid, e.model.valid, atol=1e-5)


def own_logits(n=300, K=5, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    return np.stack([rng.normal(size=(n, K)) + k * np.eye(K)[y] for k in (1, 2, 3)]), y


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        torch.as_tensor,
        list,
        lambda F: [torch.as_tensor(f).float().requires_grad_() for f in F],
    ],
)
def test_logits_of_any_kind(kind):
    F, y = own_logits()
    e = ExitExplorer.from_logits(
        kind(F), y.tolist(), [1, 2, 3], kind(F), y, m=3, unit="ms", mode="page"
    )
    p = np.exp(F) / np.exp(F).sum(-1, keepdims=True)
    assert np.allclose(e.model.scores, p.max(-1), atol=1e-5)
    assert (e.model.right == (F.argmax(-1) == y)).all()
    assert (e.model.scores == e.model.valid).all()
    assert (e.m, e.unit, e.score) == (3, "ms", "confidence")


def test_scores_that_need_more_than_logits():
    F, y = own_logits()
    a = [torch.randn(300, 7) for _ in range(3)]
    e = ExitExplorer.from_logits(
        F, y, [1, 2, 3], F, score="saturation", features=a, valid_features=a, mode="page"
    )
    assert (e.model.scores[0] == -INF).all()
    assert np.allclose(e.model.scores[2], torch.cosine_similarity(a[1], a[2]), atol=1e-6)
    assert (
        ExitExplorer.from_logits(
            F, y, [1, 2, 3], F, y, score="gate", mode="page"
        ).model.scores.max()
        <= 1
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=np.zeros((3, 300))), r"\(E, N, K\)"),
        (dict(logits=[]), r"\(E, N, K\)"),
        (dict(logits=np.zeros((3, 0, 5)), y=[]), r"\(E, N, K\)"),
        (dict(y=[0, 1]), "^y must be 300 labels"),
        (dict(y=np.full(300, 5)), r"whole numbers in 0\.\.4"),
        (dict(y=np.full(300, 0.5)), "whole numbers"),
        (dict(y=np.full(300, -1)), "whole numbers"),
        (dict(valid_logits=np.zeros((3, 9, 5)), valid_y=[0]), "valid_y must be 9 labels"),
        (dict(valid_y=[0]), "needs valid_logits"),
        (dict(valid_logits=np.zeros((2, 9, 5))), r"valid must have shape \(3, N\)"),
        (dict(logits=np.full((3, 300, 5), np.nan)), "scores holds 900 NaN"),
        (dict(score="gate"), "valid_logits and valid_y"),
        (dict(score="mood"), "unknown"),
        (dict(score="difference"), "compares features"),
        (dict(costs=[1, 2]), "costs must be 3 numbers"),
    ],
)
def test_bad_logits(change, message):
    F, y = own_logits()
    with pytest.raises(ValueError, match=message):
        ExitExplorer.from_logits(**{**dict(logits=F, y=y, costs=[1, 2, 3]), **change})


# ---------------------------------------------------------------- splits

GAMMAS = {0.25: 0.3571, 0.5: 0.25, 1: 0.1818, 2.5: 0.1346, 5: 0.1176, 5000: 0.1}


@pytest.mark.parametrize("gamma, square", GAMMAS.items())
def test_mean_square_of_a_mix(gamma, square):
    "Check 12: E[sum p^2] for ten classes, as formula and as the mean of many mixes; this is the line that the explorer draws."
    model = SplitModel(np.arange(1000) % 10)
    assert model.mean_square(gamma) == pytest.approx(square, abs=5e-5)
    assert float((class_mix(20_000, 10, gamma, 1).numpy() ** 2).sum(1).mean()) == pytest.approx(
        square, rel=0.02
    )
    line = DirichletExplorer(model.y).draw(go.Figure).data[11]
    assert np.interp(math.log(gamma), np.log(line.x), line.y) == pytest.approx(1 / square, rel=0.02)


@pytest.mark.parametrize("family", ["client", "class"])
def test_split_is_the_one_that_a_run_gets(family):
    y = np.random.default_rng(0).integers(0, 7, 900)
    r = SplitModel(y).at(0.7, 9, family, 3)
    parts = dirichlet_split(torch.from_numpy(y), 9, 0.7, family, 3)
    assert r["counts"].tolist() == [np.bincount(y[p.numpy()], minlength=7).tolist() for p in parts]
    p = r["counts"] / r["sizes"][:, None]
    assert r["effective"].tolist() == pytest.approx((1 / (p**2).sum(1)).tolist())
    assert r["theory"] == effective_classes(0.7, 7)


def test_many_classes_have_different_looks():
    import plotly.graph_objects as go

    bars = DirichletExplorer(np.arange(1280) % 64, clients=3).draw(go.Figure).data[:64]
    assert len({(b.marker.color, b.marker.pattern.shape) for b in bars}) == 64


def test_labels_by_name():
    y = np.array(["ant", "bee", "cow"])[np.arange(90) % 3]
    a = DirichletExplorer(y, clients=5)
    b = DirichletExplorer(torch.arange(90) % 3, ["ant", "bee", "cow"], clients=5)
    assert a.model.classes == ["ant", "bee", "cow"] and (a.now["counts"] == b.now["counts"]).all()


@pytest.mark.parametrize(
    "y, message",
    [([], "non-empty"), ([0.5, 1.0], "integer labels"), ([[1, 2]], "vector"), ([-1, 2], ">= 0")],
)
def test_bad_labels(y, message):
    with pytest.raises(ValueError, match=message):
        DirichletExplorer(y)


def test_bad_settings():
    e = DirichletExplorer(np.arange(100) % 5)
    refused = (
        (dict(gamma=0), "above 0"),
        (dict(clients=101), "number of samples"),
        (dict(family="A"), "one of client, class"),
        (dict(seed=-1), "seed"),
        (dict(alpha=1), "not controls"),
    )
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            e.set(**wrong)
    assert e.state.values == e.defaults
    with pytest.raises(ValueError, match="names"):
        DirichletExplorer([0, 1, 2], ["a"])


# ---------------------------------------------------------------- cost


def test_module_brings_no_plotly_and_no_widgets():
    code = """import sys, darkdistill_nb.app.exit_explorer as w, numpy as np
w.ExitModel(np.eye(3), np.eye(3), [1, 2, 3]).at([.5, .5, -np.inf])
print(sorted({'plotly', 'ipywidgets', 'anywidget', 'PIL', 'IPython'} & set(sys.modules)))"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# ---------------------------------------------------------------- what is shown is what is


HOSTILE = [math.nan, INF, -INF, -1, 0, 0.5, "a", None, True, [1], 10**30]


def test_explorers_refuse_nonsense_when_they_are_made():
    "Every number, tried with hostile values, is either refused by one sentence or gives an explorer that works."
    s, right = scores(40)
    good = dict(y=np.arange(100) % 5, gamma=0.5, clients=5, family="client", seed=0, mode="page")
    allowed = dict(gamma=[0.5, 10**30], clients=[], family=[], seed=[0], mode=[])
    for name in allowed:
        for v in HOSTILE:
            if any(v is a or (v == a and type(v) is type(a)) for a in allowed[name]):
                continue
            with pytest.raises(ValueError, match=f"{name}|samples|None"):
                DirichletExplorer(**{**good, name: v})
    for name, v in [
        (n, v) for n in ("m", "unit", "score", "mode", "costs", "scores", "right") for v in HOSTILE
    ]:
        if name in ("unit", "score") and v == "a":
            continue
        with pytest.raises(ValueError):
            ExitExplorer(**{**dict(scores=s, right=right, costs=COSTS, mode="page"), name: v})
    e = ExitExplorer(s, right, COSTS, mode="page")
    for v in HOSTILE[:2] + ["a", None, True, [1], 10**30]:
        with pytest.raises(ValueError):
            e.set_budget(v)
    for v in ("a", None, True, [1], math.nan):
        with pytest.raises(ValueError):
            e.set_threshold(1, v)
    for v in HOSTILE:
        if v == 10**30:
            continue
        with pytest.raises(ValueError):
            e.to_table("budgets", v)
    d = DirichletExplorer(**good)
    for gammas in ([1], [1, 1], [1, -1], [1, math.nan], [1, "a"], 1, []):
        with pytest.raises(ValueError, match="gammas"):
            d.to_table("gammas", gammas)


# ---------------------------------------------------------------- the look of classes, and the report's own checks


@pytest.mark.parametrize("mark", ["bar", "dot"])
def test_classes_look_different_and_can_be_seen(mark):
    "100 classes have 100 looks; no fill is nearly white or nearly black; a pattern lies over its fill, in an ink that differs from it."
    from darkdistill_nb.core.plots import class_look

    light = lambda c: sum(
        w * int(c[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5))
    )
    looks = [class_look(c, mark) for c in range(100)]
    assert len({json.dumps(v, sort_keys=True) for v in looks}) == 100
    for v in looks:
        assert 30 < light(v["color"]) < 235 and v["line"]["width"] > 0
        if p := v.get("pattern"):
            assert p["fillmode"] == "overlay" and abs(light(p["fgcolor"]) - light(v["color"])) > 60
    for wrong in (-1, 0.5, "a", None, math.nan):
        with pytest.raises(ValueError, match="c="):
            class_look(wrong, mark)


def test_one_look_everywhere():
    "Bars of clients in core.data, in the explorer and in the report have the same markers."
    import plotly.graph_objects as go
    from darkdistill_nb.core.plots import class_look
    from darkdistill_nb.core.splits import plot_clients
    from darkdistill_nb.experiments.report import clients_figure
    from darkdistill_nb.core.records import Record

    K, n = 23, np.random.default_rng(0).integers(1, 9, (4, 23))
    info = dict(clients={"0": dict(tier=[1, 1, 2, 2], classes=n.tolist())}, classes=list(range(K)))
    explorer = DirichletExplorer(np.arange(2300) % K, clients=4)
    for bars in (
        plot_clients(torch.from_numpy(n)).data,
        clients_figure(Record({}, info=info)).data,
        explorer.draw(go.Figure).data[:K],
    ):
        assert [b.marker for b in bars] == [go.bar.Marker(class_look(c)) for c in range(K)]


def test_report_functions_refuse_nonsense(tmp_path):
    from darkdistill_nb.experiments.report import (
        agreement,
        compare_table,
        html_table,
        in_words,
        mean_effective_classes,
        spread,
        summary,
        text_table,
        write_compare,
        write_report,
    )
    from darkdistill_nb.core.records import Record

    for call in (
        lambda: spread([math.nan, 0.5]),
        lambda: spread([INF]),
        lambda: spread([0.5], signed=3),
        lambda: agreement([math.nan]),
        lambda: spread(["a"]),
        lambda: summary(),
        lambda: summary({}),
        lambda: summary(Record({}), names=[]),
        lambda: html_table([], []),
        lambda: html_table(["a"], [["b", "c"]]),
        lambda: text_table(["a", "b"], [["c"]]),
        lambda: in_words({}),
        lambda: write_report({}, tmp_path / "a.html"),
        lambda: write_compare({}, names=["a"], path=tmp_path / "a.html"),
        lambda: compare_table({}, names=["a"]),
        lambda: mean_effective_classes(Record({}, info=dict(clients={"0": {}})), 3),
    ):
        with pytest.raises(ValueError):
            call()
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_report_is_utf8_in_any_locale(tmp_path):
    "Class names outside ASCII survive a console and a locale that know ASCII only."
    code = f"""import sys; sys.path.insert(0, "tests")
from test_site import a_record
from darkdistill_nb.experiments.report import write_report
r = a_record(3); r.info["classes"] = ["k\\u00e4fer", "\\u732b", "b"]
write_report(r, r"{tmp_path / "r.html"}")"""
    subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        check=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"},
    )
    assert "k\u00e4fer" in (page := (tmp_path / "r.html").read_bytes().decode("utf-8"))
    assert "\u732b" in page

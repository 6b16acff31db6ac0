"""The explorers' JavaScript against their numpy models: the same random settings, the same numbers, sentences and tables; and what a page holds."""

import json, math, os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import LONG
from darkdistill_nb.app.alignment_explorer import AlignmentExplorer
from darkdistill_nb.app.difficulty_explorer import DifficultyExplorer
from darkdistill_nb.app.distree_explorer import DistreeExplorer
from darkdistill_nb.app.distillation_explorer import DistillationExplorer, DistillationModel
from darkdistill_nb.app.exit_explorer import ExitExplorer
from darkdistill_nb.app.explorer import _from_json, _to_json
from darkdistill_nb.app.generator_explorer import GeneratorExplorer
from darkdistill_nb.app.latent_explorer import LatentExplorer
from darkdistill_nb.app.pages import _FILES, MIME, PLOTLY, Page, page_fragment, page_script, save_page
from darkdistill_nb.app.split_explorer import DirichletExplorer

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "darkdistill_nb/app"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SETTINGS = 1000
MODELS = "words random view exits splits distillation alignment distree difficulty stored".split()
SCRIPT = "\n".join((APP / f"{name}.js").read_text(encoding="utf-8") for name in MODELS)


def run_js(body, *arguments):
    "What a function body of JavaScript returns, run by node or else by Chromium; `a`: the arguments."
    code = f"{SCRIPT}\n{KINDS}\nconst answer = (a => {{ {body} }})({json.dumps(arguments)});\n"
    if node := shutil.which("node"):
        code += "process.stdout.write(JSON.stringify(answer));"
        r = subprocess.run([node, "-"], input=code, capture_output=True, text=True, timeout=LONG)
        assert r.returncode == 0, r.stderr[-3000:]
        return json.loads(r.stdout)
    sync = pytest.importorskip("playwright.sync_api", reason="neither node nor Playwright is here")
    if not CHROMIUM:
        pytest.skip("neither node nor a Chromium is here")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        text = browser.new_page().evaluate(f"() => {{ {code} return JSON.stringify(answer); }}")
        browser.close()
    return json.loads(text)


KINDS = """const kinds = {
  exits: ExitView, splits: SplitView, distillation: DistillationView, alignment: AlignmentView,
  distree: DistreeView, difficulty: DifficultyView, stored: StoredView,
};"""
WALK = """const [kind, data, settings] = a;
const view = new kinds[kind](data);
const plain = v => ArrayBuffer.isView(v) ? Array.from(v) : Array.isArray(v) ? v.map(plain) : worded(v);
return settings.map(s => {
  try {
    if (s.set) view.set(...s.set);
    else view.put(s.put);
  } catch (e) { return {error: e.message}; }
  const {numbers, says, table} = view.look();
  return {says, table, state: view.state, numbers: Object.fromEntries(Object.entries(numbers).map(([k, v]) => [k, plain(v)]))};
});"""


def walk(explorer, settings):
    "What the page of an explorer says after each setting."
    return run_js(WALK, explorer.kind, explorer.to_page().spec["data"], settings)


def _from_json_state(state):
    return {name: _from_json(v) for name, v in state.items()}


def same(numbers, want):
    "Every number that numpy has is found again, to 1e-9."
    assert numbers.keys() == want.keys()
    for name, v in want.items():
        found = np.array(_from_json(numbers[name]), float)
        assert np.allclose(found, np.asarray(v, float), rtol=1e-9, atol=1e-9), name


def same_words(found, explorer):
    t = explorer.to_table()
    assert found["says"] == explorer.says() == t.caption
    assert found["table"] == dict(columns=t.columns, rows=t.rows)


def exit_explorer(n=1500, dtype=np.float32, digits=None, **options):
    rng = np.random.default_rng(0)
    skill = rng.random(n) - np.array([[0.55], [0.4], [0.25], [0.15]])
    s = skill + 0.1 * rng.normal(size=skill.shape)
    s = (s if digits is None else s.round(digits)).astype(dtype)
    return ExitExplorer(s, skill > 0, [1e5, 2.1e5, 3e5, 4.4e5], mode="page", **options)


@pytest.mark.parametrize("dtype, digits", [(np.float32, None), (np.float64, 1)])
def test_exits_say_the_same_in_both_languages(dtype, digits):
    "Budgets and thresholds in turn, with and without ties, one endless threshold in ten."
    e, rng = exit_explorer(dtype=dtype, digits=digits), np.random.default_rng(1)
    settings = []
    for i in range(SETTINGS):
        if i % 2:
            settings.append(dict(set=["budget", float(rng.uniform(90, 450))]))
        else:
            v = e.high if rng.random() < 0.1 else float(rng.uniform(e.low, e.high))
            v = round(v, int(rng.integers(1, 6)))
            settings.append(dict(set=[int(rng.integers(1, 4)), v]))
    for s, found in zip(settings, walk(e, settings)):
        name, v = s["set"]
        if name == "budget":
            e.set_budget(min(max(v * e.scale, 1e5), 4.4e5))
        else:
            e.set_threshold(name, v)
        same(found["numbers"], e.result())
        same_words(found, e)
        assert _from_json(found["state"]["thresholds"]) == e.state["thresholds"]


@pytest.mark.parametrize("sizes", [[300] * 10, [1, 0, 700, 12, 2000]])
def test_splits_say_the_same_in_both_languages(sizes):
    "Counts are those of `dirichlet_split`, client by client, for both families; what numpy refuses the page refuses with the same words."
    y = np.repeat(np.arange(len(sizes)), sizes)
    e, rng, settings = DirichletExplorer(y, mode="page"), np.random.default_rng(2), []
    for _ in range(SETTINGS):
        gamma = float(10 ** rng.uniform(-2, 4)) if rng.random() < 0.9 else 1.0
        clients, seed = int(rng.integers(1, 101)), int(rng.integers(0, 100))
        family = str(rng.choice(["client", "class"]))
        settings.append(dict(put=dict(gamma=gamma, clients=clients, family=family, seed=seed)))
    settings[0]["put"]["seed"] = 2**53
    refused = 0
    for s, found in zip(settings, walk(e, settings)):
        try:
            e.set(**s["put"])
        except ValueError as error:
            assert found == dict(error=str(error))
            refused += 1
            continue
        assert found["numbers"]["counts"] == e.now["counts"].tolist(), s
        same(found["numbers"], e.now)
        same_words(found, e)
    assert 0 < refused < SETTINGS / 2


@pytest.mark.parametrize("scale", [1, 300])
def test_distillation_says_the_same_in_both_languages(scale):
    "Also for logits whose probabilities are zero in floating point."
    rng = np.random.default_rng(3)
    teacher, student = scale * rng.normal(size=(2, 40, 7))
    e = DistillationExplorer(teacher, student, rng.integers(0, 7, 40), mode="page")
    settings = [
        dict(
            put=dict(
                sample=int(rng.integers(40)),
                T=float(10 ** rng.uniform(-0.6, 1.5)),
                alpha=round(float(rng.random()), 2),
                direction=str(rng.choice(["forward", "reverse"])),
            )
        )
        for _ in range(SETTINGS)
    ]
    for s, found in zip(settings, walk(e, settings)):
        e.set(**s["put"])
        same(found["numbers"], e.result())
        if scale == 1:  # beyond, a zero may be -0.0000 in one language and +0.0000 in the other
            same_words(found, e)


def alignment_explorer(**options):
    rng = np.random.default_rng(8)
    y = np.repeat(np.arange(6), [300, 200, 1, 0, 450, 250])
    tiers = rng.integers(1, 90, (4, 12))
    runs = {"accuracy": {"a": rng.random((3, 4)), "b": rng.random((3, 4))}, "gap": {"a": [[1, 2, 3.0]], "b": [[0, 1, 2.0]]}}
    given = dict(clients=17, difficulty=tiers, results=runs, mode="page")
    return AlignmentExplorer(y, **{**given, **options})


@pytest.mark.parametrize("clients", [17, 3])
def test_alignment_says_the_same_in_both_languages(clients):
    "Some tiers without weight; with three clients some tiers are empty."
    e, rng = alignment_explorer(clients=clients), np.random.default_rng(9)
    settings = []
    for _ in range(SETTINGS):
        mix = (rng.random(4) * (rng.random(4) < 0.8)).round(2)
        words = dict(votes=["equal", "coverage", "depth"], shown=["classes", "difficulties"])
        drawn = {name: str(rng.choice(v)) for name, v in words.items()}
        drawn |= dict(stored=str(rng.choice(["accuracy", "gap"])), seed=int(rng.integers(100)))
        drawn |= dict(gamma=float(10 ** rng.uniform(-2, 4)), tau=round(float(rng.random()), 2))
        settings.append(dict(put=dict(mix=(mix if mix.any() else mix + 1).tolist(), **drawn)))
    for s, found in zip(settings, walk(e, settings)):
        e.set(**_from_json_state(s["put"]))
        same(found["numbers"], e.now)
        same_words(found, e)


def distree_explorer(**options):
    rng = np.random.default_rng(10)
    partial = rng.normal(size=(3, 4, 30, 5)).astype(np.float32)
    scores = rng.random((3, 4, 30)).astype(np.float32)
    costs = 1e5 * np.cumsum(1 + rng.random((3, 4)), 1)
    given = dict(y=rng.integers(0, 5, 30), costs=costs, mean=rng.normal(size=(3, 5)), mode="page")
    return DistreeExplorer(partial, scores, **{**given, **options})


def test_devices_say_the_same_in_both_languages():
    "Sure loss and no loss among the settings; deadlines that cut a stage."
    e, rng = distree_explorer(), np.random.default_rng(11)
    settings = []
    for _ in range(SETTINGS):
        loss = float(rng.choice([0, 1, round(rng.random(), 2)]))
        drawn = dict(T=rng.random(3).round(2).tolist(), speeds=(10 ** rng.uniform(0, 3, 3)).tolist())
        drawn |= dict(loss=loss, deadline=float(10 ** rng.uniform(0, 3)), retries=int(rng.integers(4)))
        settings.append(dict(put=dict(**drawn, send=str(rng.choice(["last", "every"])), request=3)))
    for s, found in zip(settings, walk(e, settings)):
        e.set(**_from_json_state(s["put"]))
        same(found["numbers"], e.now)
        same_words(found, e)


def difficulty_explorer(**options):
    rng = np.random.default_rng(12)
    loss = rng.exponential(size=400)
    right = rng.random((3, 400)) < np.exp(-loss) + np.array([[0.1], [0.3], [0.5]])
    scores = {"loss": loss, "rounded": loss.round(1), "whole": rng.integers(0, 6, 400), "nothing": np.zeros(400)}
    return DifficultyExplorer(scores, right, **{"mode": "page", **options})


def test_difficulties_say_the_same_in_both_languages():
    "Bins and thresholds that fall on values, scores that are all equal, and another score chosen alone."
    e, rng = difficulty_explorer(), np.random.default_rng(13)
    settings = []
    for i in range(SETTINGS):
        name = str(rng.choice(list(e.model.scores)))
        start = e.model.starts[name]
        width, threshold = start["top"] * rng.uniform(0.02, 1), start["top"] * rng.random()
        if i % 2:
            width, threshold = start["step"] * int(rng.integers(1, 40)), round(threshold, 1)
        put = dict(score=name, width=float(width), threshold=float(threshold))
        settings.append(dict(set=["score", name]) if i % 5 == 4 else dict(put=put))
    for s, found in zip(settings, walk(e, settings)):
        if "set" not in s:
            e.set(**s["put"])
        elif e.state["score"] != s["set"][1]:
            e.set(score=s["set"][1])
        else:
            e.set(**{k: e.model.starts[s["set"][1]][k] for k in ("width", "threshold")})
        same(found["numbers"], e.now)
        same_words(found, e)
        assert found["state"] == e.state.values


def latent_explorer():
    rng, networks = np.random.default_rng(14), ("teacher", "student")
    runs = lambda axis, values: [
        dict(method=m, seed=s, uni=rng.random(), priv=rng.random(), absent=None, present=rng.random(), **{axis: v})
        for m in ("CE", "KD", "LKD") for v in values for s in range(3)
    ]
    sweep = lambda: dict(gamma=runs("gamma", (0.5, 5, 5000)), n=runs("n", (64, 128)))
    points = lambda: {name: rng.normal(size=(20, 2)).tolist() for name in networks}
    place = lambda: dict(maps=dict(pca=points(), tsne=points()), y=rng.integers(0, 3, 20), classes="abc", gap=dict(teacher=0.0, student=1.0))
    return LatentExplorer(dict(a=sweep(), b=sweep()), dict(a=place(), b=place()), mode="page")


def generator_explorer():
    rng = np.random.default_rng(16)
    made = lambda: dict(got=rng.random((3, 4)), hit=rng.random(3), points=rng.normal(size=(24, 2)), y=np.arange(24) % 3, d=np.arange(24) % 4)
    real = dict(points=rng.normal(size=(9, 2)), y=rng.integers(0, 3, 9))
    return GeneratorExplorer(dict(a=made(), b=made()), [0.5, 1, 2, 3], "xyz", real, dict(b=rng.random((3, 4))), mode="page")


def stored_settings(e, seed):
    "Every setting of every control, drawn at random."
    rng = np.random.default_rng(seed)
    pick = lambda values: values[int(rng.integers(len(values)))]
    return [dict(put={name: pick(v) for name, v in e.choices().items()}) for _ in range(SETTINGS)]


@pytest.mark.parametrize("make", [latent_explorer, generator_explorer])
def test_stored_numbers_are_those_that_python_computes(make):
    "Sentence, table and all that a figure changes, for random settings."
    e = make()
    settings = stored_settings(e, 15)
    body = WALK.replace("const {numbers, says, table} = view.look();", "const {says, table, changes} = view.look(), numbers = {};")
    body = body.replace("return {says, table,", "return {says, table, changes,")
    data = e.to_page().spec["data"]
    for s, found in zip(settings, run_js(body, e.kind, data, settings)):
        e.set(**s["put"])
        same_words(found, e)
        assert found["changes"] == json.loads(json.dumps(e.changes()))


def test_the_comparison_notices_a_difference():
    e = exit_explorer(200)
    (found,) = walk(e, [dict(set=["budget", 250.0])])
    e.set_budget(250e3)
    same(found["numbers"], e.result())
    with pytest.raises(AssertionError, match="shares"):
        same(found["numbers"], {**e.result(), "shares": e.result()["shares"] + 1e-6})


def test_random_numbers_are_numpys():
    "Uniform, normal, gamma, Dirichlet, binomial and shuffles, whatever the seed; streams stay in step."
    body = """const [seed, n] = a, r = new Random(...seed), many = f => Array.from({length: n}, f);
    return [many(() => r.normal()), many(() => r.exponential()), many(() => r.gamma(.3)), many(() => r.gamma(7)),
      many(() => r.dirichlet(6, .03)), many(() => r.dirichlet(6, 2)), many(() => r.binomial(.37, 900)), many(() => r.binomial(.9, 12)),
      many(() => r.multinomial(50, [.2, .5, 0, .3])), r.shuffle([...Array(n).keys()]), r.uniform()];"""
    for seed in ([0], [1, 7], [2**40 + 3, 5]):
        g, n = np.random.default_rng(seed), 3000
        want = [
            g.standard_normal(n),
            g.standard_exponential(n),
            g.standard_gamma(0.3, n),
            g.standard_gamma(7, n),
            g.dirichlet([0.03] * 6, n),
            g.dirichlet([2.0] * 6, n),
            g.binomial(900, 0.37, n),
            g.binomial(12, 0.9, n),
            g.multinomial(50, [0.2, 0.5, 0, 0.3], n),
            g.permutation(n),
            g.random(),
        ]
        for a, b in zip(run_js(body, seed, n), want):
            assert np.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_numbers_are_written_as_python_writes_them():
    "Exact halves go to the even digit, in every form that tables use."
    rng = np.random.default_rng(4)
    v = [0.125, 0.375, 2.5, 12.25, 251.75, 1e-5, 9.9999, 99.95, 999950.0, 1e10, 0.0, 0.00012345, -0.5]
    v += (rng.normal(size=2000) * 10.0 ** rng.integers(-8, 9, 2000)).tolist()
    v += (rng.integers(-4000, 4000, 1000) / 8).tolist()
    forms = "return a[0].map(v => [fixed(v, 0), fixed(v, 1), fixed(v, 2), general(v, 4), general(v), plus(v, 4)]);"
    want = [[f"{x:.0f}", f"{x:.1f}", f"{x:.2f}", f"{x:.4g}", f"{x:g}", f"{x:+.4f}"] for x in v]
    assert run_js(forms, v) == want
    n = [0, 7, 999, 1000, 12345, 1234567]
    assert run_js("return a[0].map(thousands)", n) == [f"{x:,}" for x in n]


# ---------------------------------------------------------------- the distillation model


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradient_is_that_of_torch(direction):
    from torch.nn import functional as F

    rng = np.random.default_rng(5)
    teacher, student = 3 * rng.normal(size=(2, 8, 5))
    y = rng.integers(0, 5, 8)
    m = DistillationModel(teacher, student, y)
    for i in range(8):
        T, alpha = float(rng.uniform(0.3, 9)), float(rng.random())
        s = torch.tensor(student[i], requires_grad=True)
        p = F.log_softmax(torch.tensor(teacher[i]) / T, 0)
        q = F.log_softmax(s / T, 0)
        a, b = (p, q) if direction == "forward" else (q, p)
        loss = alpha * T**2 * (a.exp() * (a - b)).sum()
        loss = loss + (1 - alpha) * F.cross_entropy(s[None], torch.tensor(y[i : i + 1]))
        loss.backward()
        r = m.at(i, T, alpha, direction)
        assert r["loss"] == pytest.approx(loss.item())
        assert r["gradient"] == pytest.approx(s.grad.numpy())


def test_forward_direction_is_the_librarys_loss():
    from darkdistill_nb.distill.losses import kd_loss

    rng = np.random.default_rng(6)
    teacher, student = rng.normal(size=(2, 1, 6))
    want = kd_loss(torch.tensor(student), torch.tensor(teacher), 3.0)
    assert DistillationModel(teacher, student, [0]).at(0, 3.0, 1.0)["loss"] == pytest.approx(float(want))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher=np.zeros((3, 4))), "the same for teacher and student"),
        (dict(teacher=np.zeros(4)), "numbers of shape"),
        (dict(student=np.full((2, 4), np.nan)), "student"),
        (dict(y=[0, 4]), r"whole numbers in 0\.\.3"),
        (dict(y=[0]), "2 whole numbers"),
        (dict(y=[0.5, 1]), "whole numbers"),
        (dict(classes=["a"]), "4 names"),
        (dict(sample=2), "sample"),
        (dict(T=0), "T="),
        (dict(alpha=1.5), "alpha"),
        (dict(direction="up"), "forward, reverse"),
        (dict(mode="film"), "auto, live, page"),
    ],
)
def test_bad_distillation(change, message):
    good = dict(teacher=np.zeros((2, 4)), student=np.ones((2, 4)), y=[0, 3])
    with pytest.raises(ValueError, match=message):
        DistillationExplorer(**{**good, **change})


def test_a_refused_setting_changes_nothing():
    e = DistillationExplorer(np.zeros((2, 4)), np.ones((2, 4)), [0, 3], mode="page")
    for wrong in (dict(T=-1), dict(sample=9), dict(direction="up"), dict(tau=2)):
        with pytest.raises(ValueError):
            e.set(**wrong)
    assert e.state.values == e.defaults


# ---------------------------------------------------------------- what a page holds


def all_explorers():
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (400, 1, 8, 8), dtype=np.uint8)
    teacher, student = rng.normal(size=(2, 9, 4))
    return [
        exit_explorer(400, images=images),
        DirichletExplorer(np.arange(600) % 6, list("abcdef"), mode="page"),
        DistillationExplorer(teacher, student, np.arange(9) % 4, mode="page"),
        alignment_explorer(),
        distree_explorer(),
        difficulty_explorer(images=images),
        latent_explorer(),
        generator_explorer(),
    ]


def test_saved_page_is_one_file_with_plotly_once(tmp_path):
    pages = [e.to_page() for e in all_explorers()]
    text = save_page(tmp_path / "all.html", pages, title="a < b").read_text(encoding="utf-8")
    assert text.count("window.Plotly = Plotly") == 1 and "<title>a &lt; b</title>" in text
    own = text.split("<script>if (!window.Plotly)")[0] + page_script()
    assert not re.search(r"https?://|//cdn|src=\"(?!data:)", own)
    assert own.count('class="explorer"') == len(pages) and own.count('scope="row"') > 10
    alone = all_explorers()[1].save_html(tmp_path / "one.html", title="alone")
    assert alone.read_text(encoding="utf-8").count('class="explorer"') == 1


def test_no_word_of_the_data_ends_the_script():
    e = DirichletExplorer(np.arange(20) % 2, ["</script><b>", "&"], mode="page")
    p = e.to_page()
    text = page_fragment({**p.spec, "figure": p.figure})
    data = text.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["data"]["classes"] == ["</script><b>", "&"]
    assert "<b>" not in text.split("<script")[0]


def test_stored_form_is_small_and_holds_no_script():
    for e in all_explorers():
        kept = e.to_page().stored()._repr_mimebundle_()
        assert set(kept) == {MIME, PLOTLY, "text/plain"}
        assert len(json.dumps(kept)) < 120_000
        assert "figure" not in kept[MIME] and kept[PLOTLY]["data"]
        assert repr(e.to_table()) == kept["text/plain"]
        assert kept[PLOTLY]["config"]["showSendToCloud"] is False


def test_page_of_a_state_set_by_hand():
    "The page starts where the explorer stands; Reset goes to its first state."
    e = exit_explorer(300)
    e.set_threshold(1, e.high)
    data = e.to_page().spec["data"]
    assert data["state"]["budget"] is None and data["state"]["thresholds"][0] == "inf"
    assert data["defaults"]["budget"] == e.defaults["budget"]
    (found,) = walk(e, [dict(put=data["state"])])
    same_words(found, e)


CHANGES = """const [kind, data] = a;
return Object.keys(new kinds[kind](data).look().changes).map(Number);"""


def stored_explorers():
    "What notebooks keep of explorers, as (name of the notebook, bundle of mime types)."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        bundles = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
        yield from ((path.name, data) for data in bundles if MIME in data)


@pytest.mark.parametrize("name, data", stored_explorers())
def test_stored_explorers_fit_the_scripts_of_today(name, data):
    "A page that was stored before a change of its explorer would stay blank on the site."
    moved, traces = run_js(CHANGES, data[MIME]["kind"], data[MIME]["data"]), data[PLOTLY]["data"]
    assert moved and max(moved) < len(traces), f"run {name} again"


def test_one_exit_and_whole_number_scores():
    for s in (np.arange(8)[None], np.arange(24).reshape(3, 8)):
        e = ExitExplorer(s, s % 2 == 0, np.arange(1, len(s) + 1), mode="page")
        (found,) = walk(e, [dict(put=e.to_page().spec["data"]["state"])])
        same(found["numbers"], e.result())
        same_words(found, e)


def test_infinities_travel_as_words():
    values = (0.5, math.inf, -math.inf, np.float64(2), np.int64(3))
    assert _to_json(values) == [0.5, "inf", "-inf", 2.0, 3]
    assert _from_json(json.loads(json.dumps(_to_json(values)))) == (0.5, math.inf, -math.inf, 2, 3)


def test_page_refuses_nonsense():
    p = all_explorers()[1].to_page()
    for wrong in (3, None, "a"):
        with pytest.raises(ValueError):
            page_fragment(wrong)
        with pytest.raises(ValueError):
            save_page("never.html", wrong)
        with pytest.raises(ValueError):
            Page(wrong, {}, [], None, p.table, {})
    with pytest.raises(ValueError, match="table"):
        Page("exits", {}, [], None, "a table", {})


def test_scripts_are_in_the_wheel():
    "Every file that `page_script` reads matches a pattern of package_data."
    import tomllib

    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = toml["tool"]["setuptools"]["package-data"]["darkdistill_nb"]
    held = {f for p in patterns for f in (ROOT / "darkdistill_nb").glob(p)}
    assert {*APP.glob("*.js"), *APP.glob("*.css")} <= held
    assert {f.stem for f in APP.glob("*.js")} == {*_FILES, "live"}


def test_models_are_readable():
    "A model of the page is about a hundred lines, none wider than a screen."
    for name in MODELS + ["page", "live"]:
        lines = (APP / f"{name}.js").read_text(encoding="utf-8").splitlines()
        assert len(lines) < (280 if name == "random" else 180), name
        assert max(map(len, lines)) <= 140, name

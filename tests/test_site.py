"""The gate: every page of the site and the report in a real browser, wide and narrow, light and dark, with nothing hidden, cut off or fetched.

SITE names a folder with a site that `tools/build_docs.py` has built; without it, one is built here. `tools/check.py --only site` runs this file."""

import json, os, shutil, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
GATE = (Path(__file__).parent / "site_gate.js").read_text(encoding="utf-8")
FOUND = os.environ.get("CHROMIUM") or next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
pytestmark = pytest.mark.browser
PATIENCE = 120  # s for what a page draws; a page that never does is told by the gate


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium, the system's or Playwright's own."
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as p:
        if not FOUND and not os.path.exists(p.chromium.executable_path):
            pytest.skip("no Chromium here; `playwright install chromium` gets one")
        b = p.chromium.launch(executable_path=FOUND, args=QUIET)
        yield b
        b.close()


@pytest.fixture
def page(browser):
    "A window for one test. What it has compiled of a script it knows on the next page: half the time of a new window for each."
    context = browser.new_context(color_scheme="light")
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A built site."
    if built := os.environ.get("SITE"):
        return Path(built).resolve()
    out = tmp_path_factory.mktemp("site") / "html"
    r = subprocess.run(
        [sys.executable, "tools/build_docs.py", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return out


def a_record(classes):
    "A made-up record of two methods and two seeds, with that many classes."
    import numpy as np
    from darkdistill_nb.core.records import Record

    rng, T = np.random.default_rng(0), 4
    number = lambda low, high: float(rng.uniform(low, high))
    bins = lambda: {str(m): rng.integers(1, 200, 10).tolist() for m in range(1, T + 1)}
    budget = lambda: [
        dict(
            P=P,
            cost=1e5 + 7e3 * P,
            accuracy=0.5 + 0.01 * P,
            thresholds=[0.9 - 0.02 * P, "inf", 0.3, "-inf"],
        )
        for P in range(1, 40)
    ]
    work = lambda: dict(
        bytes_up=4000, bytes_down=9000, seconds=2.0, seconds_clients=1.5, seconds_server=0.5
    )

    def run(method, seed):
        rounds = [
            dict(round=r, accuracy=[number(0.2, 0.9) for _ in range(T)], **work())
            for r in range(1, 6)
        ]
        for row in rounds if method == "darkdistill" else []:
            row["difficulty"] = bins()
        final = dict(
            accuracy=rounds[-1]["accuracy"],
            mean=0.6,
            valid=None,
            budget=budget(),
            difficulty=bins(),
            **work(),
        )
        return dict(method=method, seed=seed, rounds=rounds, final=final)

    held = lambda: rng.integers(0, 60, (12, classes)).tolist()
    config = dict(
        data="made_up_data_with_a_long_name_and_no_blank.npz",
        clients=12,
        gamma=0.5,
        family="client",
        tiers=[0.25] * 4,
        policy="boostnet",
        rounds=5,
        seeds=[0, 1],
        arch="cnn",
        methods=["eefl", "darkdistill"],
    )
    info = dict(
        macs=[1e5, 2e5, 3e5, 4e5],
        parameters=[1000, 2000, 3000, 4000],
        classes=[f"class {c}" for c in range(classes)],
        input_shape=[1, 8, 8],
        clients={str(s): dict(tier=[1 + i % 4 for i in range(12)], classes=held()) for s in (0, 1)},
        alone={
            str(s): [dict(client=i, tier=1 + i % 4, accuracy=number(0.2, 0.8)) for i in range(12)]
            for s in (0, 1)
        },
    )
    record = Record.begin(config, **info)
    record.runs, record.seconds = [run(m, s) for m in ("eefl", "darkdistill") for s in (0, 1)], 12.0
    record.command = "darkdistill run --data made_up_data_with_a_long_name_and_no_blank.npz --clients 12 --rounds 5 --seeds 2"
    return record


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    "Reports with 10, 20 and 100 classes, and a comparison."
    from darkdistill_nb.experiments.report import write_compare, write_report

    folder, records = tmp_path_factory.mktemp("reports"), {K: a_record(K) for K in (10, 20, 100)}
    for K, r in records.items():
        write_report(r, folder / f"report{K}.html")
    write_compare(records[10], records[10], names=["first", "second"], path=folder / "compare.html")
    return folder


DRAWN = (
    "[...document.querySelectorAll('.drawing')].every(d => d.dataset.drawn) &&"
    "[...document.querySelectorAll('.explorer')].every(d => d.dataset.ready === 'yes')"
)


KATEX = (
    "document.querySelectorAll('.tex, .tex-display').length ==="
    " document.querySelectorAll('.tex > .katex, .tex-display > .katex').length"
)
FITS = (
    "[...document.querySelectorAll('.drawing')].every("
    "d => !d._fullLayout || d._fullLayout.width <= d.clientWidth + 1)"
)
CUT = (
    "[...document.querySelectorAll('.bd-article div.highlight pre')]"
    ".filter(p => p.getClientRects().length && !p.closest('.cell_output') && p.scrollWidth > p.clientWidth + 1)"
    ".map(p => p.textContent.trim().slice(0, 60))"
)
DARK = "(document.documentElement.dataset.theme || 'dark') === 'dark'"


def wait_until(page, js, patience):
    "Wait for a condition; where it does not come within `patience` seconds, the gate says what is wrong."
    end = time.monotonic() + patience
    while not page.evaluate(js) and time.monotonic() < end:
        page.wait_for_timeout(100)


def settle(page, width, patience):
    "Give the window another width, and every figure time to follow."
    page.set_viewport_size(dict(width=width, height=900))
    page.wait_for_timeout(100)
    wait_until(page, FITS, patience)


def looked_at(page, path, widths=(1280, 400), broken=False):
    "What the gate finds on one page, loaded anew at each width, light and dark; what is broken may never come."
    patience = 30 if broken else PATIENCE
    found, outside = [], []
    abroad = ("http:", "https:", "ws")
    heard = dict(
        request=lambda r: outside.append(r.url) if r.url.startswith(abroad) else None,
        pageerror=lambda e: found.append(f"script error: {e}"),
    )
    for event, note in heard.items():
        page.on(event, note)
    for width in widths:
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(dict(width=width, height=900))
        page.goto(path.as_uri())
        wait_until(page, DRAWN, patience)
        wait_until(page, KATEX, patience)
        found += [
            f"{width} px, light: {w}" for w in page.evaluate(GATE, dict(figures=True, text=True))
        ]
        page.add_style_tag(content="*, *::before, *::after { transition: none !important }")
        page.emulate_media(color_scheme="dark")
        wait_until(page, DARK, patience)
        found += [
            f"{width} px, dark: {w}" for w in page.evaluate(GATE, dict(figures=False, text=True))
        ]
        if width == 1280:
            found += [f"code is read by scrolling: {w}" for w in page.evaluate(CUT)]
        if width == max(widths) and not broken:
            settle(page, 1600, patience)
            found += [
                f"resized to 1600 px: {w}"
                for w in page.evaluate(GATE, dict(figures=True, text=False))
            ]
    for event, note in heard.items():
        page.remove_listener(event, note)
    return found + [f"asked another host for {u}" for u in outside]


def all_pages(site):
    "Every page that was written, without those that Sphinx makes of its own."
    own = ("genindex", "search")
    return [p for p in sorted(site.rglob("*.html")) if p.stem not in own]


def test_the_keyboard_shows_where_it_is(site, page):
    "Tab moves through links, buttons and the fields of an explorer, each of them with a visible outline."
    page.set_viewport_size(dict(width=1280, height=900))
    page.goto((site / "index.html").as_uri())
    wait_until(page, DRAWN, PATIENCE)
    seen, plain = set(), []
    for i in range(50):
        if i == 25:  # the sidebar is long
            page.evaluate("document.querySelector('.bd-article td a').focus()")
        page.keyboard.press("Tab")
        look = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, e.textContent.slice(0, 30), s.outlineStyle !== 'none'"
            " && parseFloat(s.outlineWidth) > 0 || s.boxShadow !== 'none']; })()"
        )
        seen.add(look[0])
        plain += [look] if not look[2] and look[0] != "BODY" else []
    assert {"A", "BUTTON", "INPUT"} <= seen and not plain


SHARES = 8  # of the pages, for workers side by side


@pytest.mark.parametrize("share", range(SHARES))
def test_every_page_of_the_site(site, page, share):
    pages = all_pages(site)
    assert len(pages) > 8 * SHARES
    found = {p.name: wrong for p in pages[share::SHARES] if (wrong := looked_at(page, p))}
    assert not found, json.dumps(found, indent=1)


@pytest.mark.parametrize("name", ["report10", "report20", "report100", "compare"])
def test_report(reports, page, name):
    assert not looked_at(page, reports / f"{name}.html")


def test_every_class_can_be_seen(reports, page):
    "In 'Who holds what' the bars of 20 classes are painted in 20 different ways."
    page.goto((reports / "report20.html").as_uri())
    page.wait_for_function(DRAWN, timeout=1000 * PATIENCE)
    looks = page.evaluate(
        "document.getElementById('clients')._fullData.map(t => JSON.stringify([t.marker.color, t.marker.pattern && t.marker.pattern.shape]))"
    )
    assert len(looks) == len(set(looks)) == 20


# ---------------------------------------------------------------- the gate itself must catch what is broken


def a_page(tmp_path, body):
    from darkdistill_nb.experiments.report import _page

    (tmp_path / "page.html").write_text(_page("a page", [body]), encoding="utf-8")
    return tmp_path / "page.html"


def a_figure(trace, **layout):
    import plotly.graph_objects as go
    from darkdistill_nb.experiments.report import figure_html
    from darkdistill_nb.core.plots import figure

    fig = figure(*([trace(go)] if trace else []), title="one", x="x", y="y").update_layout(layout)
    return f"<figure>{figure_html(fig, 'one')}</figure>"


BROKEN = dict(
    white_pattern=(
        lambda go: go.Bar(
            x=[1], y=[2], marker=dict(color="#0072B2", pattern=dict(shape="/", fgcolor="white"))
        ),
        "no visible ink",
    ),
    white_fill=(lambda go: go.Bar(x=[1], y=[2], marker=dict(color="white")), "no visible ink"),
    nearly_white=(lambda go: go.Bar(x=[1], y=[2], marker=dict(color="#f4f4f4")), "no visible ink"),
    transparent=(
        lambda go: go.Bar(x=[1], y=[2], marker=dict(color="rgba(0,0,255,.02)")),
        "no visible ink",
    ),
    opacity=(lambda go: go.Scatter(x=[1, 2], y=[1, 2], opacity=0), "no visible ink"),
    no_size=(
        lambda go: go.Scatter(x=[1, 2], y=[1, 2], mode="markers", marker=dict(size=0.1)),
        "no visible ink",
    ),
    thin_line=(
        lambda go: go.Scatter(x=[1, 2], y=[1, 2], mode="lines", line=dict(width=0)),
        "no visible ink",
    ),
    white_words=(
        lambda go: go.Scatter(
            x=[1, 2], y=[1, 2], mode="text", text=["a", "b"], textfont=dict(color="white")
        ),
        "no visible ink",
    ),
    out_of_range=(lambda go: go.Scatter(x=[1, 2], y=[None, None]), "is blank"),
    nothing=(None, "is blank"),
)


@pytest.mark.parametrize("name", BROKEN)
def test_gate_catches_a_figure_without_ink(tmp_path, page, name):
    trace, message = BROKEN[name]
    found = looked_at(page, a_page(tmp_path, a_figure(trace)), (1280,), broken=True)
    assert any(message in w for w in found), found


WIDE = (
    "<figure style='width:300px'><div class='plotly-graph-div drawing' id='one' data-drawn='yes'></div></figure>"
    "<script>Plotly.newPlot('one', [{y: [1, 2]}], {width: 572, height: 200})</script>"
)
PAGES = dict(
    wide_figure=(WIDE, "is 572 px wide in a container of 300 px"),
    wide_page=("<div style='width:3000px'>x</div>", "the page is 3"),
    no_scope=("<table><tr><th>a</th></tr></table>", "th without scope"),
    pale=("<p style='color:#ddd'>pale</p>", "contrast"),
    dark=("<p style='color:#222;background:none'>dark</p>", "dark: contrast"),
    stays_light=("<div class=drawing data-drawn=yes style='filter:none'></div>", "stays light"),
    not_drawn=(
        "<figure><div class=drawing id=one></div><script type='application/json'>{</script></figure>",
        "could not be drawn",
    ),
    another_host=("<img src='http://other.invalid/a.png' alt=''>", "another host"),
    error=("<script>nothing.there()</script>", "script error"),
    long_line=(
        "<div class=bd-article><div class=highlight style='width:300px'>"
        f"<pre style='overflow:auto'>{'x' * 200}</pre></div></div>",
        "code is read by scrolling: xxx",
    ),
)


@pytest.mark.parametrize("name", PAGES)
def test_gate_catches_a_broken_page(tmp_path, page, name):
    body, message = PAGES[name]
    found = looked_at(page, a_page(tmp_path, body), (1280,), broken=True)
    assert any(message in w for w in found), found


def test_gate_lets_good_figures_pass(tmp_path, page):
    "Every class look, a thin grey line, an image and text: nothing is found, on a wide and on a narrow page."
    import plotly.graph_objects as go
    from darkdistill_nb.core.plots import class_look
    from darkdistill_nb.experiments.report import figure_html
    from darkdistill_nb.core.plots import figure, style

    bars = figure(
        *(go.Bar(x=[0, 1], y=[1, 2], marker=class_look(c)) for c in range(70)),
        barmode="stack",
        showlegend=False,
    )
    curves = figure(
        *(go.Scatter(x=[0, 1], y=[i, i + 1], name=f"curve {i}", **style(i)) for i in range(9)),
        title="nine curves " * 9,
    )
    dots = figure(
        *(
            go.Scatter(x=[0, 1], y=[c, c], mode="markers", marker=class_look(c, "dot"))
            for c in range(70)
        ),
        showlegend=False,
    )
    body = "".join(
        f"<figure>{figure_html(f, f'f{i}')}</figure>" for i, f in enumerate((bars, curves, dots))
    )
    assert not looked_at(page, a_page(tmp_path, body))

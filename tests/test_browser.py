"""The explorers in a real browser: headless Chromium drives JupyterLab, moves a slider by keyboard, and the figure changes.

Skipped where Playwright, JupyterLab or a Chromium is missing. CHROMIUM names another browser than the one found; BROWSER_SHOTS names a folder that keeps the
screenshots."""

import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

pytestmark = pytest.mark.browser
PROGRAM = os.environ.get("CHROMIUM") or next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)

EXITS = """import numpy as np
from darkdistill_nb.app import ExitExplorer
rng = np.random.default_rng(0)
skill = rng.random(4000) - np.array([[.55], [.4], [.25], [.15]])
pictures = (np.clip(skill[3] + .15, 0, 1)[:, None, None, None] * rng.integers(100, 256, (4000, 3, 12, 12))).astype("uint8")
ExitExplorer(skill + .1*rng.normal(size=skill.shape), skill > 0, [100e3, 200e3, 300e3, 400e3], pictures=pictures, mode="live")"""
SPLIT = """import numpy as np
from darkdistill_nb.app import DirichletExplorer
DirichletExplorer(np.repeat(np.arange(10), 300), mode="live")"""
SLOW = """import plotly.graph_objects as go
go.FigureWidget._esm = "await new Promise(() => {})"       # a script that never gets ready
""" + SPLIT.replace('mode="live")', 'clients=150, seed=1234, gamma=.001, mode="live")')
FRAMES = EXITS.replace('mode="live")', 'mode="frames").to_frames(5)')


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium, or skip."
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab on this machine, whose folder holds one notebook per explorer."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    import nbformat

    home = tmp_path_factory.mktemp("lab")
    for name, code in dict(exits=EXITS, split=SPLIT, slow=SLOW, frames=FRAMES).items():
        spec = dict(name="python3", display_name="python3", language="python")
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=spec)
        )
        nbformat.write(nb, home / f"{name}.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = home / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps(dict(fetchNews="false", checkForUpdates=False))
    )  # or it asks
    own = dict(
        JUPYTERLAB_SETTINGS_DIR="settings",
        JUPYTER_CONFIG_DIR="config",
        JUPYTER_DATA_DIR="data",
        JUPYTER_RUNTIME_DIR="run",
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(home / v) for k, v in own.items()}}
    options = [
        f"--port={port}",
        "--ip=127.0.0.1",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=t",
        f"--ServerApp.root_dir={home}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=2)
                break
            except OSError:
                if server.poll() is not None:
                    pytest.fail("JupyterLab ended: " + (home / "log").read_text()[-2000:])
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(browser, request):
    "A page of 1280 x 1000 that refuses, and remembers, every request to another machine."
    context = browser.new_context(viewport=dict(width=1280, height=1000))
    p, p.outside = context.new_page(), []

    def route(r):
        if re.match(
            r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|file:", r.request.url
        ):
            r.continue_()
        else:
            p.outside.append(r.request.url)
            r.abort()

    context.route("**/*", route)
    yield p
    if folder := os.environ.get("BROWSER_SHOTS"):
        p.screenshot(path=str(Path(folder) / f"{request.node.name}.png"))
    context.close()


BARS = ".main-svg .barlayer .point path"


def run_notebook(page, lab, name, drawn=f".jp-OutputArea-output {BARS}"):
    "Open a notebook alone on the page, run its cell, and wait for a drawn figure."
    page.goto(f"{lab}/doc/tree/{name}.ipynb?token=t")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=90_000)
    prompt = page.locator(".jp-CodeCell .jp-InputPrompt").first
    asks = page.locator(
        "dialog.jp-Dialog button.jp-mod-accept"
    )  # under load, JupyterLab asks which kernel
    for _ in range(20):  # a kernel that has only just come up may miss the first request
        if asks.count():
            asks.first.click()
        page.locator(".jp-CodeCell .jp-Editor").first.click()
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(1500)
        if re.search(r"[*\d]", prompt.inner_text()):
            break
    page.wait_for_selector(drawn, state="attached", timeout=180_000)


def field(page, label):
    return page.get_by_label(label, exact=True)


def says(page):
    return page.locator("[role=status]").inner_text()


def bars(page):
    return page.eval_on_selector_all(
        ".main-svg .barlayer .point path", "e => e.map(p => p.getAttribute('d'))"
    )


def handle(page, label):
    return page.locator(".widget-hbox", has=page.get_by_label(label, exact=True)).last.get_by_role(
        "slider"
    )


def press(page, target, key, times, changed):
    "Focus, press a key some times, and wait until `changed()` differs from what it was; returns before and after."
    before = changed()
    target.focus()
    for _ in range(times):
        page.keyboard.press(key)
    for _ in range(150):
        if (after := changed()) != before:
            break
        page.wait_for_timeout(100)
    page.wait_for_timeout(600)
    return before, changed()


def test_keyboard_moves_thresholds(page, lab):
    "Arrow keys on a slider change bars, pictures, sentence and number field; Reset puts all back; the table is there; nothing leaves the machine."
    run_notebook(page, lab, "exits")
    first, bars_first = says(page), bars(page)
    assert "budget of 250 k MACs" in first and len(bars_first) == 8
    picture = lambda: page.eval_on_selector(
        ".main-svg .imagelayer image", "e => e.getAttribute('href') || e.getAttribute('xlink:href')"
    )
    image_first = picture()
    label = "mean cost budget (k MACs)"
    value = float(field(page, label).input_value())
    before, after = press(page, handle(page, label), "ArrowLeft", 10, lambda: bars(page))
    assert before == bars_first and after != before and len(after) == 8
    assert float(field(page, label).input_value()) == pytest.approx(value - 10 * 5), (
        "ten steps of 5 k MACs"
    )
    assert "budget of 200 k MACs" in says(page) and picture() != image_first

    slider = handle(page, label)
    assert slider.get_attribute("aria-label") == f"{label}, slider"
    assert slider.get_attribute("aria-valuetext") == "200"
    for e in (1, 2, 3):
        number = field(page, f"threshold of exit {e} (score)")
        slider = handle(page, f"threshold of exit {e} (score)")
        assert float(number.input_value()) == float(slider.get_attribute("aria-valuetext"))
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "PageUp"):
            slider.press(key)
            assert len(slider.get_attribute("aria-valuetext")) <= 8, "no long tail of digits"
    assert (
        page.locator("[role=note]").count() == 0 or not page.locator("[role=note]").is_visible()
    ), "the figure has reported"

    field(page, "threshold of exit 1 (score)").fill("5")
    page.keyboard.press("Enter")  # above every score: clamped to the top of the range
    page.wait_for_function(
        "() => document.querySelector('[role=status]').innerText.includes('by hand')"
    )
    assert page.locator(".main-svg text", has_text="nobody").count() == 1
    page.get_by_role("button", name="Reset", exact=True).press("Enter")
    page.wait_for_function(
        "t => document.querySelector('[role=status]').innerText === t", arg=first
    )
    page.wait_for_timeout(600)
    assert bars(page) == bars_first
    page.get_by_text("The numbers as a table").click()
    table = page.locator(".jp-OutputArea-output table")
    assert table.locator("th[scope=col]").count() == 6
    assert table.locator("th[scope=row]").first.inner_text() == "exit 1"
    assert "above the static mixture" in table.locator("caption").inner_text()

    titles = page.eval_on_selector_all(
        ".modebar-btn",
        "e => e.map(b => b.getAttribute('data-title') || b.getAttribute('aria-label') || '')",
    )
    assert titles and not any(re.search(r"cloud|share|plotly|edit in", t, re.I) for t in titles), (
        titles
    )
    assert page.outside == []


def test_keyboard_moves_gamma(page, lab):
    "The end of the gamma slider deals nearly equal clients; what the number field says is what the slider says."
    run_notebook(page, lab, "split")
    assert "gamma 0.5" in says(page)
    before, after = press(page, handle(page, "gamma (concentration)"), "End", 1, lambda: bars(page))
    assert before != after and len(after) == 100
    assert field(page, "gamma (concentration)").input_value() == "10000"
    assert "gamma 10000" in says(page)
    assert page.outside == []


def test_slow_script_is_said_and_the_figure_is_drawn_without_it(page, lab):
    "The live figure's script never starts: a sentence stands there, the figure comes another way and follows the controls."
    run_notebook(page, lab, "slow", "[role=note]")
    assert ".to_frames()" in page.locator("[role=note]").inner_text()
    page.wait_for_selector(
        f".jp-RenderedPlotly {BARS}, .jp-OutputArea-output .js-plotly-plot {BARS}",
        state="attached",
        timeout=60_000,
    )
    assert "has not answered" in page.locator("[role=note]").inner_text()
    assert ".to_frames()" in page.locator("[role=note]").inner_text()
    shown = [
        field(page, label).input_value()
        for label in ("gamma (concentration)", "clients (number)", "seed")
    ]
    assert shown == ["0.001", "150", "1234"], (
        "controls show the state, also beyond their usual bounds"
    )
    before, after = press(page, handle(page, "clients (number)"), "Home", 1, lambda: bars(page))
    assert before != after and "1 clients" in says(page) and page.outside == []


def test_frames_work_in_lab_and_without_a_kernel(page, lab, tmp_path):
    "The stored figure moves when its slider is clicked, in JupyterLab and in a file."
    run_notebook(page, lab, "frames")
    in_lab = bars(page)
    scope = {}
    exec(FRAMES.replace("\nExitExplorer(", "\nfigure = ExitExplorer("), scope)
    scope["figure"].write_html(
        tmp_path / "frames.html", include_plotlyjs=True, default_width="880px"
    )
    page.goto((tmp_path / "frames.html").as_uri())
    page.wait_for_selector(".main-svg .barlayer .point path")
    before = bars(page)
    assert len(before) == len(in_lab) == 8
    box = page.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(box["x"] + 4, box["y"] + box["height"] / 2)
    page.wait_for_timeout(1000)
    assert bars(page) != before
    assert page.locator(".main-svg text", has_text="budget: 100").count() == 1
    assert page.outside == []

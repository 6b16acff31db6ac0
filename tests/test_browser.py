"""The explorers in a real browser: headless Chromium drives JupyterLab, moves a slider by keyboard, and the figure changes.

Skipped where Playwright, JupyterLab or a Chromium is missing. CHROMIUM names another browser than the one found; BROWSER_SHOTS names a folder that keeps the
screenshots."""

import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from conftest import LONG

pytestmark = pytest.mark.browser
PROGRAM = os.environ.get("CHROMIUM") or next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)

EXITS = """import numpy as np
from darkdistill_nb.app import ExitExplorer
rng = np.random.default_rng(0)
skill = rng.random(4000) - np.array([[.55], [.4], [.25], [.15]])
light = np.clip(skill[3] + .15, 0, 1)[:, None, None, None]
images = (light * rng.integers(100, 256, (4000, 3, 12, 12))).astype("uint8")
scores = skill + .1*rng.normal(size=skill.shape)
explorer = ExitExplorer(scores, skill > 0, [100e3, 200e3, 300e3, 400e3], images=images, mode="live")
"""
SPLIT = """import numpy as np
from darkdistill_nb.app import DirichletExplorer
explorer = DirichletExplorer(np.repeat(np.arange(10), 300), mode="live")
"""
DISTILL = """import numpy as np
from darkdistill_nb.app import DistillationExplorer
rng = np.random.default_rng(0)
y = np.arange(20) % 4
explorer = DistillationExplorer(4 * np.eye(4)[y], rng.normal(size=(20, 4)), y, list("abcd"), mode="live")
"""
LAB_04 = Path(__file__).resolve().parent.parent / "tutorials/lab04_early_exits.ipynb"
ALIGNMENT = """from darkdistill_nb.app import AlignmentExplorer
from darkdistill_nb.core.records import asset, load_record
explorer = AlignmentExplorer.from_record(load_record(asset("stage_default.json")), mode="live")
"""
DIFFICULTY = """import numpy as np
from darkdistill_nb.app import DifficultyExplorer
rng = np.random.default_rng(0)
loss = rng.exponential(size=600)
right = rng.random((3, 600)) < np.exp(-loss) + np.array([[.1], [.3], [.5]])
images = (200 * np.exp(-loss)[:, None, None, None] * rng.random((600, 3, 12, 12))).astype("uint8")
explorer = DifficultyExplorer({"loss": loss, "rank": loss.argsort().argsort() / 600}, right, images, mode="live")
"""
DISTREE = """import numpy as np
from darkdistill_nb.app import DistreeExplorer
rng = np.random.default_rng(0)
parts, y, costs = rng.normal(size=(3, 4, 80, 5)), rng.integers(0, 5, 80), 2e5 * np.cumsum(np.ones((3, 4)), 1)
explorer = DistreeExplorer(parts, rng.random((3, 4, 80)), y, costs, deadline=60.0, mode="live")
"""
LATENT = """from darkdistill_nb.app import LatentExplorer
explorer = LatentExplorer.from_records(mode="live")
"""
GENERATOR = """from darkdistill_nb.app import GeneratorExplorer
explorer = GeneratorExplorer.from_records(mode="live")
"""
EXPLORERS = dict(exits=EXITS, split=SPLIT, distill=DISTILL, alignment=ALIGNMENT)
EXPLORERS |= dict(difficulty=DIFFICULTY, distree=DISTREE, latent=LATENT, generator=GENERATOR)
SHOWN = {
    **{name: code + "explorer" for name, code in EXPLORERS.items()},
    "page": EXITS + "explorer.to_page()",
    "stored": EXITS + "explorer.to_page().stored()",
}


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
def lab(tmp_path_factory, wait_until):
    "Address of a JupyterLab on this machine, whose folder holds one notebook per explorer."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    import nbformat

    home = tmp_path_factory.mktemp("lab")
    for name, code in SHOWN.items():
        spec = dict(name="python3", display_name="python3", language="python")
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("")],
            metadata=dict(kernelspec=spec),
        )
        nbformat.write(nb, home / f"{name}.ipynb")
    shutil.copy(LAB_04, home)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = home / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps(dict(fetchNews="false", checkForUpdates=False))
    )  # or it asks
    settings = home / "settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # all cells
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

        def an_answer():
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=LONG)

        try:
            wait_until(an_answer, server)
        except AssertionError as e:
            pytest.fail(f"JupyterLab: {e}\n" + (home / "log").read_text()[-2000:])
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
    context.set_default_timeout(1000 * LONG)
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
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=1000 * LONG)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=1000 * LONG)
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
    page.wait_for_selector(drawn, state="attached", timeout=1000 * LONG)


def field(page, label):
    return page.get_by_label(label, exact=True)


def says(page):
    return page.locator(".explorer-says").inner_text()


def bars(page):
    return page.eval_on_selector_all(
        ".main-svg .barlayer .point path", "e => e.map(p => p.getAttribute('d'))"
    )


def handle(page, label):
    return page.get_by_role("slider", name=f"{label}, slider", exact=True)


def press(page, target, key, times, changed):
    "Focus, press a key some times, and wait until `changed()` differs from what it was; returns before and after."
    before = changed()
    target.focus()
    for _ in range(times):
        page.keyboard.press(key)
    end = time.monotonic() + LONG
    while (after := changed()) == before and time.monotonic() < end:
        page.wait_for_timeout(100)
    seen = None
    while seen != after and time.monotonic() < end:  # all steps have been followed
        seen = after
        page.wait_for_timeout(600)
        after = changed()
    return before, after


def python(page, code):
    "Run a line in the notebook's second cell, and return what it prints."
    cell = page.locator(".jp-CodeCell").nth(1)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    page.wait_for_timeout(1000)
    out = cell.locator(".jp-OutputArea-output")
    out.first.wait_for(timeout=1000 * LONG)
    return out.first.inner_text().strip()


def walk_exits(page):
    "Sliders, fields, Reset and table of the explorer of exits by keyboard."
    first, bars_first = says(page), bars(page)
    assert "budget of 250 k MACs" in first and len(bars_first) == 8
    href = "e => e.getAttribute('href') || e.getAttribute('xlink:href')"
    picture = lambda: page.eval_on_selector(".main-svg .imagelayer image", href)
    image_first = picture()
    label = "mean cost budget (k MACs)"
    value = float(field(page, label).input_value())
    before, after = press(page, handle(page, label), "ArrowLeft", 10, lambda: bars(page))
    assert before == bars_first and after != before and len(after) == 8
    now = float(field(page, label).input_value())
    assert now == pytest.approx(value - 10 * 5), "ten steps of 5 k MACs"
    assert "budget of 200 k MACs" in says(page) and picture() != image_first
    assert handle(page, label).get_attribute("aria-valuetext") == "200"
    for e in (1, 2, 3):
        number = field(page, f"threshold of exit {e} (score)")
        slider = handle(page, f"threshold of exit {e} (score)")
        assert float(number.input_value()) == float(slider.get_attribute("aria-valuetext"))
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "PageUp"):
            slider.press(key)
            page.wait_for_timeout(100)
            assert len(slider.get_attribute("aria-valuetext")) <= 8, "no long tail of digits"
    field(page, "threshold of exit 1 (score)").fill("5")
    page.keyboard.press("Enter")  # above every score: clamped to the top of the range
    page.wait_for_function("document.querySelector('.explorer-says').innerText.includes('by hand')")
    page.locator(".main-svg text", has_text="nobody").wait_for(state="attached", timeout=1000 * LONG)
    page.get_by_text("The numbers as a table", exact=True).click()
    table = page.locator(".explorer-table")
    page.wait_for_function("document.querySelector('.explorer-table').innerText.includes('nobody')")
    assert table.locator("th[scope=col]").count() == 6
    assert table.locator("th[scope=row]").first.inner_text() == "exit 1"
    page.get_by_role("button", name="Reset", exact=True).press("Enter")
    page.wait_for_function("t => document.querySelector('.explorer-says').innerText === t", arg=first)
    page.wait_for_timeout(600)
    assert bars(page) == bars_first
    assert table.locator("caption").inner_text() == first
    names = "e => e.map(b => b.getAttribute('data-title') || b.getAttribute('aria-label') || '')"
    titles = page.eval_on_selector_all(".modebar-btn", names)
    assert titles and not any(re.search(r"cloud|share|plotly|edit in", t, re.I) for t in titles)
    assert page.outside == []


def walk_split(page):
    assert "gamma 0.5" in says(page)
    label = "gamma (concentration)"
    before, after = press(page, handle(page, label), "End", 1, lambda: bars(page))
    assert before != after and len(after) == 100
    assert field(page, label).input_value() == "10000" and "gamma 10000" in says(page)
    field(page, "family").select_option("class")
    page.wait_for_function("document.querySelector('.explorer-says').innerText.includes('class-wise')")
    field(page, "clients (number)").fill("100")
    page.keyboard.press("Enter")
    page.wait_for_timeout(600)
    press(page, handle(page, label), "Home", 1, lambda: says(page))
    assert "No such split" in says(page) and field(page, label).input_value() == "10000"
    assert page.outside == []


def walk_distillation(page):
    first = says(page)
    assert "at T = 1 the teacher" in first
    before, after = press(page, handle(page, "temperature T"), "ArrowRight", 20, lambda: bars(page))
    assert before != after and len(after) == 16
    value = float(field(page, "temperature T").input_value())
    assert value == pytest.approx(10**0.4, rel=0.05)
    field(page, "direction").select_option("reverse")
    page.wait_for_function("document.querySelector('.explorer-says').innerText.includes('reverse')")
    assert page.outside == []


def walk(label, choice, chosen, key="ArrowRight", steps=3):
    "A slider by keyboard changes the sentence, as does a choice from a list; names and values are read aloud; Reset undoes both."

    def walk_one(page):
        first = says(page)
        before, after = press(page, handle(page, label), key, steps, lambda: says(page))
        assert before == first != after
        told = handle(page, label).get_attribute("aria-valuetext")
        assert float(told) == float(field(page, label).input_value())
        field(page, choice).select_option(chosen)
        page.wait_for_function("t => document.querySelector('.explorer-says').innerText !== t", arg=after)
        page.locator(".explorer-reset").click()
        page.wait_for_function("t => document.querySelector('.explorer-says').innerText === t", arg=first)
        names = page.eval_on_selector_all(".explorer input[type=range]", "e => e.map(r => r.ariaLabel)")
        assert all(n and n.endswith(", slider") for n in names) and page.outside == []

    return walk_one


WALKS = dict(
    exits=walk_exits,
    split=walk_split,
    distill=walk_distillation,
    alignment=walk("tier 4 (weight)", "weights of a vote", "equal", "Home", 1),
    difficulty=walk("threshold", "difficulty", "rank"),
    distree=walk("packet loss (share)", "a device sends", "every", steps=20),
    latent=walk("value (number)", "images", "cifar10", steps=2),
    generator=walk("difficulty asked (number)", "class", "ring", steps=2),
)


@pytest.mark.parametrize("name", WALKS)
def test_live_explorers_by_keyboard(page, lab, name):
    run_notebook(page, lab, name)
    WALKS[name](page)


def test_python_and_the_reader_see_each_other(page, lab):
    "A slider moved by keyboard is known to the kernel; what the kernel sets is drawn."
    run_notebook(page, lab, "split")
    press(page, handle(page, "clients (number)"), "ArrowRight", 3, lambda: bars(page))
    assert python(page, "explorer.state['clients'], explorer.now['counts'].shape") == "(13, (13, 10))"
    python(page, "explorer.set(clients=4, seed=7); explorer.says()")
    page.wait_for_function("document.querySelector('.explorer-says').innerText.includes('4 clients')")
    page.wait_for_timeout(600)
    assert len(bars(page)) == 40 and field(page, "seed").input_value() == "7"


def test_page_in_a_notebook(page, lab):
    "What Colab and VS Code show: one output that holds all scripts."
    run_notebook(page, lab, "page")
    walk_exits(page)


def test_a_lab_run_as_a_whole_and_its_explorer_moved_by_keyboard(page, lab):
    "Lab 4 as a student opens it: Run All Cells, then the budget slider; the figure follows, and nothing asked another host."
    run_notebook(page, lab, LAB_04.stem, ".jp-OutputArea-output")  # the set-up: the kernel is there
    last = page.locator(".jp-CodeCell .jp-InputPrompt").last
    for _ in range(20):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(3000)
        if re.search(r"[*\d]", last.inner_text()):
            break
    shown = page.locator(".jp-OutputArea-output:has(.explorer-says)")
    shown.locator(".main-svg .barlayer .point path").first.wait_for(state="attached", timeout=300_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=300_000)
    outputs = "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())
    assert "Exercise 1 is not done yet" in outputs and "Traceback" not in outputs
    drawn = lambda: [
        p.get_attribute("d") for p in shown.locator(".main-svg .barlayer .point path").all()
    ]
    slider = shown.get_by_role("slider", name=re.compile(r"mean cost budget \(million MACs\)")).last
    slider.scroll_into_view_if_needed()
    before, after = press(page, slider, "ArrowLeft", 10, drawn)
    assert len(before) == len(after) > 7 and before != after
    assert page.outside == []


def test_stored_page_is_a_plain_figure_in_a_notebook(page, lab):
    run_notebook(page, lab, "stored")
    assert len(bars(page)) == 8 and page.outside == []


@pytest.mark.parametrize("name", WALKS)
def test_saved_pages_without_a_kernel(page, tmp_path, name):
    scope = {}
    exec(EXPLORERS[name], scope)
    path = scope["explorer"].save_html(tmp_path / f"{name}.html")
    page.goto(path.as_uri())
    page.wait_for_selector(".explorer[data-ready=yes]")
    WALKS[name](page)


LOOKS = [(w, scheme) for w in (1280, 400) for scheme in ("light", "dark")]


@pytest.mark.parametrize("name", WALKS)
def test_saved_pages_wide_and_narrow_light_and_dark(browser, tmp_path, name):
    "Nothing is wider than the window; letters and figure follow the reader's theme; panels stand below each other when it is narrow."
    scope = {}
    exec(EXPLORERS[name], scope)
    path = scope["explorer"].save_html(tmp_path / f"{name}.html")
    heights = {}
    for width, scheme in LOOKS:
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
        page = context.new_page()
        errors = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(path.as_uri())
        page.wait_for_selector(".explorer[data-ready=yes]")
        wide = page.evaluate("document.documentElement.scrollWidth")
        figure = page.locator(".explorer-figure")
        dark = figure.evaluate("e => getComputedStyle(e).filter !== 'none'")
        svg = page.locator(".explorer-figure .main-svg").first.bounding_box()
        assert wide <= width and svg["width"] <= width and not errors
        assert dark == (scheme == "dark")
        heights[width] = svg["height"]
        if folder := os.environ.get("BROWSER_SHOTS"):
            shot = Path(folder) / f"{name}_{width}_{scheme}.png"
            page.screenshot(path=str(shot), full_page=True)
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        page.wait_for_timeout(200)
        turned = figure.evaluate("e => getComputedStyle(e).filter !== 'none'")
        assert turned != dark, "the theme may change while the page is open"
        context.close()
    assert heights[400] > heights[1280]


def test_page_follows_the_window(page, tmp_path):
    scope = {}
    exec(SPLIT, scope)
    page.goto(scope["explorer"].save_html(tmp_path / "a.html").as_uri())
    page.wait_for_selector(".explorer[data-ready=yes]")
    page.set_viewport_size(dict(width=420, height=900))
    narrow = "document.querySelector('.explorer-figure .main-svg').getBoundingClientRect().width < 420"
    page.wait_for_function(narrow)
    press(page, handle(page, "seed"), "ArrowRight", 1, lambda: says(page))
    assert page.evaluate(narrow) and "seed 1" in says(page)

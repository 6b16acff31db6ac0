"""The documentation site in a real browser: no request leaves the machine, every equation and every figure is drawn."""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A freshly built site."
    out = tmp_path_factory.mktemp("site") / "html"
    r = subprocess.run([sys.executable, "tools/build_docs.py", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stdout + r.stderr
    return out


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium, the system's or Playwright's own."
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    with sync_api.sync_playwright() as p:
        if not found and not os.path.exists(p.chromium.executable_path): pytest.skip("no Chromium here; `playwright install chromium` gets one")
        b = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.mark.browser
def test_site_draws_everything_offline(site, browser):
    page, outside, errors = browser.new_page(), [], []
    page.on("request", lambda r: outside.append(r.url) if r.url.startswith(("http:", "https:", "ws")) else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    equations = figures = 0
    for html in sorted(site.glob("[0-9]*.html")):
        page.goto(html.as_uri())
        page.wait_for_function("document.querySelectorAll('.tex, .tex-display').length "
                               "=== document.querySelectorAll('.tex > .katex, .tex-display > .katex').length", timeout=20000)
        page.wait_for_function("[...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('.main-svg'))", timeout=20000)
        equations += page.locator(".katex math").count()
        figures += page.locator(".plotly-graph-div").count()
        wrong = page.locator(".katex-error").all_text_contents()
        assert not wrong, f"{html.name}: equations that KaTeX cannot read: {wrong}"
    assert not outside and not errors, (outside, errors)
    assert equations > 50 and figures > 2


def test_site_has_a_page_for_every_notebook_and_name(site):
    for nb in (ROOT / "nbs").glob("[0-9]*.ipynb"): assert (site / f"{nb.stem}.html").exists()
    text = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("ensure_torchvision", "EarlyExitNet", "simulate", "DarkDistill"): assert name in text, f"{name} is not in the reference"

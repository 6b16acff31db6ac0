"""The documentation site as files: a page for every notebook, its equations, figures and table headings. `test_site.py` looks at it in a browser."""

import json, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import LONG

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A freshly built site."
    out = tmp_path_factory.mktemp("site") / "html"
    r = subprocess.run(
        [sys.executable, "tools/build_docs.py", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return out


def test_site_has_a_page_for_every_notebook_and_name(site):
    notebooks = [*(ROOT / "nbs").rglob("*.ipynb")]
    assert len(notebooks) > 40
    for nb in notebooks:
        assert (site / nb.relative_to(ROOT / "nbs").with_suffix(".html")).exists(), nb
    text = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("ensure_torchvision", "EarlyExitNet", "simulate", "DarkDistill"):
        assert name in text, f"{name} is not in the reference"


def test_site_holds_equations_figures_and_headings(site):
    pages = {
        str(p.relative_to(site)): p.read_text(encoding="utf-8") for p in site.glob("[0-9]_*/*.html")
    }
    assert len(pages) > 30
    whole = "".join(pages.values())
    assert whole.count('class="tex') > 50 and whole.count('class="plotly-graph-div drawing"') > 50
    for name, page in pages.items():
        drawn = "plotly-graph-div" in page or '<div class="explorer"' in page
        assert page.count("plotly.min.js") == page.count("figures.js") == drawn, name
    heads = re.findall(r"<th[\s>][^>]*", whole)
    assert len(heads) > 50 and all("scope=" in h for h in heads)


def test_notebooks_hold_no_control_characters():
    "A TeX command whose backslash was eaten, such as a bell in place of \\a, is a wrong equation."
    for path in sorted([*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "tutorials").rglob("*.ipynb")]):
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found = re.findall(r"[\x00-\x08\x0b-\x1f].{0,20}", "".join(c["source"]))
            assert not found, f"{path.name}: {found}"

"""The documentation site as files: a page for every notebook, its equations, figures and table headings. `test_site.py` looks at it in a browser."""

import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import LONG

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site that SITE names, as `tools/check.py` has just built it, or a fresh one."
    if built := os.environ.get("SITE"):
        return Path(built).resolve()
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
    notebooks = [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "tutorials").glob("*.ipynb")]
    assert len(notebooks) > 50
    for nb in notebooks:
        folder = "labs" if nb.parent.name == "tutorials" else nb.parent.relative_to(ROOT / "nbs")
        name = "map" if nb.stem == "index" else nb.stem
        assert (site / folder / f"{name}.html").exists(), nb
    text = "".join(p.read_text(encoding="utf-8") for p in (site / "api").glob("*.html"))
    for name in ("ensure_torchvision", "EarlyExitNet", "simulate", "DarkDistill", "grade_course"):
        assert name in text, f"{name} is not in the reference"


def hrefs(path, part="article"):
    "Links of a page, without what follows #, from its text or from its sidebar."
    text = path.read_text(encoding="utf-8")
    text = text.split('<article')[1].split("</article>")[0] if part == "article" else text
    return {h.split("#")[0] for h in re.findall(r'href="([^"]+)"', text)}


def test_the_first_page_leads_students_teachers_and_researchers_on(site):
    "And each of them finds the labs, the paths, the how-tos, the glossary and the results."
    first = hrefs(site / "index.html")
    assert {"students.html", "instructors.html", "researchers.html"} <= first
    students = hrefs(site / "students.html")
    labs = {f"labs/{p.stem}.html" for p in (ROOT / "tutorials").glob("*.ipynb")}
    assert labs <= students and "3_federated/darkdistill.html" in students
    assert "labs/INSTRUCTOR.html" in hrefs(site / "instructors.html")
    assert {"results.html", "howto/method.html"} <= hrefs(site / "researchers.html")
    side = hrefs(site / "2_exits/inference.html", "sidebar")
    for name in ("results", "glossary", "reference", "troubleshooting", "howto/data"):
        assert f"../{name}.html" in side, f"{name} is not in the sidebar"


def test_lessons_and_labs_lead_to_each_other(site):
    assert "../labs/lab04_early_exits.html" in hrefs(site / "2_exits/inference.html")
    assert "../2_exits/inference.html" in hrefs(site / "labs/lab04_early_exits.html")


def test_a_lab_that_stands_alone_leads_to_the_documentation(site):
    "A student's copy has no folder beside it; on the site the same links lead from page to page."
    home, seen = "https://darkdistill.github.io/darkdistill_nb/", 0
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "](../" not in text, path.name
        for page in re.findall(rf"\]\({home}([^)]+)\)", text):
            assert (site / page).exists(), (path.name, page)
            assert f"../{page}" in hrefs(site / f"labs/{path.stem}.html")
            seen += 1
    assert seen >= 8


def test_no_solution_and_no_hidden_test_is_on_the_site(site):
    for path in (site / "labs").glob("lab*.html"):
        text = re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))
        assert "HIDDEN TESTS" not in text and "write your solution here" in text, path.name


def test_results_page_has_every_claim(site):
    from darkdistill_nb.experiments import results

    text = (site / "results.html").read_text(encoding="utf-8")
    made = (results.darkdistill_rows, results.latent_rows, results.distree_rows, results.own_rows)
    rows = [row for rows in made for row in rows()]
    assert text.count("<tr") >= len(rows) > 50 and text.count("<strong>undecided") > 5


def test_prose_does_not_speak_of_houses_and_floors(site):
    words = re.compile(r"\b(?:the house|this house|floor \d|(?:lower|upper|ground|first) floor)\b", re.I)
    for path in site.rglob("*.html"):
        found = words.search(re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8")))
        assert not found, f"{path.name}: {found[0]}"


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

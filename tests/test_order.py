"""One order: what the tables in nbs/index.ipynb say is what the folders, the imports and the heads of the lessons follow."""

import ast, importlib, re, subprocess, sys
import pytest
from notebooks import LIB, ROOT, cells, default_exp, goes_to_library, module_file, source, tree_of

sys.path.insert(0, str(ROOT / "tools"))
from order import MAX_TITLE, chapters, head, lessons

ORDER = lessons()
MODULES = [l.module for l in ORDER]
each_lesson = pytest.mark.parametrize("lesson", ORDER, ids=MODULES)


def notebook(lesson):
    return ROOT / "nbs" / lesson.path


def test_tables_name_every_lesson_once():
    files = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").glob("[0-9]_*/*.ipynb")}
    files -= {f"{c.folder}/overview.ipynb" for c in chapters()}
    assert len(ORDER) > 25 and len({l.path for l in ORDER}) == len(ORDER)
    assert {l.path for l in ORDER} == files


def test_chapters_are_folders_and_packages():
    folders = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]_*") if p.is_dir())
    assert [c.folder for c in chapters()] == folders
    for c in chapters():
        package = c.folder[2:]
        assert c.lessons, f"{c.folder} has no lesson"
        for l in c.lessons:
            name = "main" if l.module == "__main__" else l.module.removeprefix(package + ".")
            assert l.path == f"{c.folder}/{name}.ipynb"


def test_every_module_has_a_lesson():
    "No stale module that no notebook exports any more, none that was not exported."
    files = {
        p.relative_to(ROOT / LIB).with_suffix("").as_posix().replace("/", ".")
        for p in (ROOT / LIB).rglob("*.py")
    }
    free = {m for m in files if m.split(".")[-1] in ("__init__", "_modidx")}
    assert files - free == set(MODULES)


@each_lesson
def test_lesson_exports_its_module(lesson):
    assert default_exp(notebook(lesson)) == lesson.module


def imported(tree, module):
    "Modules of this library that a syntax tree imports, at any depth, as dotted names below the package."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix(LIB + ".") for a in node.names if a.name.startswith(LIB + ".")
            }
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                here = module.split(".")
                parts = here[: len(here) - node.level] + parts
            elif parts[:1] == [LIB]:
                parts = parts[1:]
            else:
                continue
            name = ".".join(parts)
            found |= {name} if name in MODULES else {".".join([*parts, a.name]) for a in node.names}
    return found


def exported(lesson):
    "The code of a lesson that goes to the library, as syntax trees."
    return [tree_of(c) for c in cells(notebook(lesson)) if goes_to_library(c)]


@each_lesson
def test_lessons_import_only_from_earlier_ones(lesson):
    "Also inside functions. A name that is no module, such as the version, comes from the package itself."
    at = MODULES.index(lesson.module)
    for tree in exported(lesson):
        for name in imported(tree, lesson.module):
            if name in MODULES:
                assert MODULES.index(name) < at, f"{lesson.module} imports {name}, a later lesson"
            else:
                assert name in ("__version__",), (
                    f"{lesson.module} imports {name}, which is no lesson"
                )


@pytest.mark.parametrize(
    "code, found",
    [
        ("from darkdistill_nb.app.cli import main", {"app.cli"}),
        ("from darkdistill_nb.app import cli, x", {"app.cli", "app.x"}),
        ("def f():\n    import darkdistill_nb.app.cli as c", {"app.cli"}),
        ("from ..app.cli import main", {"app.cli"}),
        ("from .training import fit", {"core.training"}),
        ("from . import training", {"core.training"}),
        ("import torch.cli", set()),
    ],
)
def test_import_check_sees_every_form(code, found):
    assert imported(ast.parse(code), "core.data") == found


def test_import_check_notices_a_later_lesson():
    first, last = MODULES[0], MODULES[-1]
    assert MODULES.index(
        next(iter(imported(ast.parse(f"from {LIB}.{last} import x"), first)))
    ) > MODULES.index(first)


def test_heads_are_in_step():
    r = subprocess.run(
        [sys.executable, "tools/order.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stdout + r.stderr


def test_head_is_brought_in_step_once():
    "A head that was written before is replaced, not added to; what the author wrote stays."
    a, b, c = ORDER[:3]
    text = "# Old\n\n> One line.\n\n**You will learn** much."
    new = head(text, b, a, c)
    assert new == head(new, b, a, c) and new.endswith("**You will learn** much.")
    assert f"# {b.title}" in new and a.title in new and c.title in new and "# Old" not in new


@each_lesson
def test_titles_fit_the_sidebar(lesson):
    assert len(lesson.title) <= MAX_TITLE
    title_cell = source(cells(notebook(lesson))[0])
    assert not re.search(r"\b(floor|house)s?\b", title_cell, re.I)
    assert lesson.minutes <= 45


@each_lesson
def test_module_says_what_it_is_for(lesson):
    "Three lines or more, so that nbdev's llms.txt lists the module."
    text = module_file(lesson.module).read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text))
    assert len(doc.splitlines()) > 3


@pytest.mark.parametrize("chapter", chapters(), ids=[c.folder for c in chapters()])
def test_front_offers_the_names_of_its_modules(chapter):
    "Every function and class of a chapter by its short import; no name hides a module."
    package = importlib.import_module(f"{LIB}.{chapter.folder[2:]}")
    modules = [l.module.split(".")[1] for l in chapter.lessons if "." in l.module]
    assert package.__all__ and not set(package.__all__) & set(modules)
    for m in modules:
        module = importlib.import_module(f"{LIB}.{chapter.folder[2:]}.{m}")
        for name in module.__all__:
            if name in package.__all__:
                assert getattr(package, name) is getattr(module, name), name
            else:
                assert name == "main" or name.isupper(), f"{m}.{name} is not unique"


def reading_paths():
    "Name of each way through the lessons -> the lessons that it names."
    text = source(next(c for c in cells(ROOT / "nbs/index.ipynb") if "## Three ways" in source(c)))
    return {
        name: re.findall(r"\]\(([\w/]+\.ipynb)\)", line)
        for name, line in re.findall(r"^\* \*\*(.+?)\*\*: (.+)$", text, re.M)
    }


def test_reading_paths_follow_the_order():
    rows = {l.path: i for i, l in enumerate(ORDER)}
    paths = reading_paths()
    assert len(paths) == 3
    for name, files in paths.items():
        places = [rows[f] for f in files]
        assert len(places) >= 5 and places == sorted(places), name


def test_two_hours_are_two_hours():
    minutes = {l.path: l.minutes for l in ORDER}
    files = next(files for name, files in reading_paths().items() if "two hours" in name)
    assert 90 <= sum(minutes[f] for f in files) <= 130


NEXT = re.compile(r"\*\*Next\*\*: \[[^\]]*\]\(([^)]*)\)")


@pytest.mark.parametrize("lesson", ORDER, ids=lambda l: l.path)
def test_a_lesson_ends_where_its_head_points(lesson):
    found = [NEXT.findall(source(c)) for c in cells(ROOT / "nbs" / lesson.path)]
    assert len({link for links in found for link in links}) <= 1, found

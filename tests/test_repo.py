"""The repository keeps its own rules: generated files in step, the rhythm of the notebooks, import cost, docstrings."""

import ast, io, json, re, statistics, subprocess, sys, tokenize
import pytest
from conftest import LONG
from notebooks import (
    LIB,
    ROOT,
    cells,
    code_of,
    default_exp,
    goes_to_library,
    is_code,
    is_export,
    module_file,
    source,
    tree_of,
)

NBS = [
    p
    for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if not re.search(r"(^|/)[_.]", str(p.relative_to(ROOT)))
]
PAGES = ("index.ipynb", "glossary.ipynb", "overview.ipynb")  # no module of their own
MODULE_NBS = [p for p in NBS if p.name not in PAGES]
TUTORIALS = [
    p for p in sorted((ROOT / "tutorials").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]


def code_lines(cell):
    return [l for l in source(cell).splitlines() if l.strip() and not l.lstrip().startswith("#|")]


def ids(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


each_module = pytest.mark.parametrize("nb", MODULE_NBS, ids=ids(MODULE_NBS))
each_notebook = pytest.mark.parametrize("nb", NBS + TUTORIALS, ids=ids(NBS + TUTORIALS))


# ---------------------------------------------------------------- generated files


def run_tool(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=LONG
    )


def test_pyproject_and_version_follow_settings():
    r = run_tool("tools/sync_settings.py", "--check")
    assert r.returncode == 0, r.stdout + r.stderr


def test_sync_check_notices_a_change(tmp_path):
    "The check itself can fail: a changed version, an unknown extra, a new sub-package and a missing package file are all differences."
    import shutil

    packages = [p.relative_to(ROOT) for p in (ROOT / LIB).rglob("__init__.py")]
    for name in ("settings.ini", "pyproject.toml", "tools/sync_settings.py", *packages):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tool = tmp_path / "tools/sync_settings.py"
    assert run_tool(tool, "--check").returncode == 0
    ini = tmp_path / "settings.ini"
    ini.write_text(
        ini.read_text().replace("version = 0.", "version = 7.") + "\nextra_requirements = attrs\n"
    )
    r = run_tool(tool, "--check")
    assert r.returncode == 1 and "__init__.py" in r.stdout and "extra = " in r.stdout
    assert run_tool(tool).returncode == 0 and run_tool(tool, "--check").returncode == 0
    (tmp_path / LIB / "sub").mkdir()
    (tmp_path / LIB / "sub/__init__.py").write_text("")
    r = run_tool(tool, "--check")
    assert r.returncode == 1 and f'"{LIB}.sub"' in r.stdout, (
        "a package that the wheel would not hold"
    )
    assert run_tool(tool).returncode == 0
    assert '__version__ = "7.' in (tmp_path / f"{LIB}/__init__.py").read_text()


def test_pyproject_keeps_what_the_migration_would_lose():
    import configparser, tomllib

    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    s, toml = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = {
        k.removesuffix("_requirements"): v.split()
        for k, v in s.items()
        if k.endswith("_requirements")
    }
    assert toml["project"]["optional-dependencies"] == extras and "dev" in extras
    assert toml["project"]["dependencies"] == s["requirements"].split()
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / LIB).rglob("__init__.py")}
    setup = toml["tool"]["setuptools"]
    assert sorted(setup["packages"]) == sorted([*inside, f"{LIB}._assets", f"{LIB}._tutorials"]), (
        "every sub-package, and the files beside the package"
    )
    assert setup["package-dir"] == {f"{LIB}._assets": "assets", f"{LIB}._tutorials": "tutorials"}
    assert setup["package-data"][f"{LIB}._tutorials"] == ["*.ipynb"], (
        "the instructor's folder is not among them"
    )
    assert "nbgrader" in toml["tool"]["nbdev"]["allowed_cell_metadata_keys"]
    assert toml["tool"]["nbdev"]["cell_timeout"] == s.getint("cell_timeout")
    assert toml["project"]["scripts"] == {"darkdistill": f"{LIB}.app.cli:main"}


def test_runtime_requirements_are_lower_bounds():
    "Exact pins in a package break every host that ships another version; exact versions live in constraints.txt."
    import tomllib

    for r in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "dependencies"
    ]:
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=[\d.]+", r), r


def test_constraints_meet_the_requirements():
    "Every requirement of the package and of the dev extra is pinned, to a version that meets its bound."
    import tomllib
    from packaging.requirements import Requirement

    pins = dict(
        l.split(";")[0].strip().lower().replace("_", "-").split("==")
        for l in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in l and not l.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for r in map(
        Requirement, project["dependencies"] + extras["dev"] + extras["lab"] + extras["docs"]
    ):
        if r.name == LIB:
            continue
        name = r.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt"
        assert pins[name] in r.specifier, f"{name}=={pins[name]} does not meet {r.specifier}"


def test_readme_follows_index():
    r = run_tool("tools/make_readme.py", "--check")
    assert r.returncode == 0, r.stdout + r.stderr


# ---------------------------------------------------------------- rhythm


@each_module
def test_title_cell(nb):
    "A reader sees first what the lesson is, in one heading and two lines: the author's, and that of the table of lessons."
    first = cells(nb)[0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S", source(first)), (
        "the first cell is an H1 title"
    )
    quotes = [l for l in source(first).splitlines() if l.startswith(">")]
    assert len(quotes) == 2 and min(map(len, quotes)) > 20, "two blockquote lines under the title"
    assert re.search(r"\bmin(utes?)?\b", source(first), re.I), (
        "the title cell says how many minutes it takes"
    )


LONG_CELLS = 44  # cells of more than 35 lines; the number only falls
MEDIAN_CELL = 6  # lines of the median code cell of a notebook
LONGER = dict.fromkeys(["parallel.ipynb"], 7)
LONGER |= dict.fromkeys(["bench.ipynb"], 8)


def cell_lengths(nb):
    return [n for c in cells(nb) if is_code(c) and (n := len(code_lines(c)))]


@each_module
def test_code_cells_are_short(nb):
    "A cell is one thought: half of a lesson's code cells have six lines or fewer."
    n = cell_lengths(nb)
    most = LONGER.get(nb.name, MEDIAN_CELL)
    assert statistics.median(n) <= most, f"median code cell has {statistics.median(n)} lines"
    assert max(n) <= 90, f"longest code cell has {max(n)} lines"


def test_long_cells_become_fewer():
    found = [f"{nb.name}: {n}" for nb in MODULE_NBS for n in cell_lengths(nb) if n > 35]
    assert len(found) <= LONG_CELLS, found


def functions(text):
    "Syntax nodes per line of each function's body, its docstring left out."
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body:
            own = lines[body[0].lineno - 1 : node.end_lineno]
            own = [l for l in own if l.strip() and not l.lstrip().startswith("#")]
            yield sum(1 for b in body for _ in ast.walk(b)) / max(len(own), 1)


def statements_on_a_shared_line(text):
    "Lines with `;`, and one-line `if ...: raise`."
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.OP and token.string == ";":
            found.append(token.line.strip())
    for line in text.splitlines():
        if re.match(r"\s*(if .+|elif .+|else): raise ", line):
            found.append(line.strip())
    return found


def test_functions_have_one_idea_a_line():
    "Syntax nodes per line, median over the library: 8 to 14 in fedjax, fastcore and nanoGPT."
    modules = [p for p in (ROOT / LIB).rglob("*.py") if p.name != "_modidx.py"]
    density = [d for p in modules for d in functions(p.read_text(encoding="utf-8"))]
    assert len(density) > 1000 and statistics.median(density) <= 14.5


@each_module
def test_no_two_statements_on_a_line(nb):
    for c in cells(nb):
        if is_code(c):
            assert not statements_on_a_shared_line(code_of(c))


def test_shared_lines_are_seen():
    assert len(statements_on_a_shared_line("a = 1; b = 2\nif a: raise ValueError(b)\n")) == 2
    assert not statements_on_a_shared_line("a = ';'  # one; two\nif a:\n    raise b\n")


def ruff(*files):
    "What ruff finds: unused or undefined names, unused values, two statements on a line."
    run = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated"]
    run += ["--select", "F401,F821,F841,E702,E703", "--output-format", "concise"]
    r = subprocess.run([*run, *map(str, files)], capture_output=True, text=True)
    return [l for l in r.stdout.splitlines() if re.match(r".+:\d+:\d+: ", l)]


def test_library_has_no_unused_or_undefined_name():
    found = ruff(ROOT / LIB)
    assert not [l for l in found if "__init__.py" not in l and "_modidx.py" not in l]


def test_unused_names_are_seen(tmp_path):
    (tmp_path / "a.py").write_text("import os\n\ndef f():\n    x = 1\n    return y\n")
    assert {l.split()[1] for l in ruff(tmp_path / "a.py")} == {"F401", "F841", "F821"}


def test_few_lines_are_wider_than_a_page():
    "Code lines of notebooks over 120 columns: under 0.1 %; over 100, a page's width: under 0.5 %."
    n = [len(l) for nb in NBS for c in cells(nb) if is_code(c) for l in code_lines(c)]
    assert sum(x > 120 for x in n) < 0.001 * len(n)
    assert sum(x > 100 for x in n) < 0.005 * len(n)


WIDTH = 160
CODE = [*NBS, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]


def wide_lines(path):
    "Code lines of a notebook or of a Python file with more than `WIDTH` characters, as (place, length, start of the line)."
    parts = (
        [source(c) if is_code(c) else "" for c in cells(path)]
        if path.suffix == ".ipynb"
        else [path.read_text(encoding="utf-8")]
    )
    kind = "cell {i}, line {n}" if path.suffix == ".ipynb" else "line {n}"
    return [
        (kind.format(i=i, n=n), len(l), l.strip()[:60])
        for i, text in enumerate(parts)
        for n, l in enumerate(text.splitlines(), 1)
        if len(l) > WIDTH
    ]


@pytest.mark.parametrize("path", CODE, ids=ids(CODE))
def test_code_lines_are_not_wider_than_160(path):
    found = [f"{place}: {n} characters: {start} ..." for place, n, start in wide_lines(path)]
    assert not found, (
        f"{path.name} has {len(found)} code lines of more than {WIDTH} characters:\n"
        + "\n".join(found)
    )


def test_wide_lines_are_seen(tmp_path):
    "A line of 161 characters in a code cell or a file is found with its place; 160 characters and long prose are not."
    ok, wide = "#" * WIDTH, "#" * (WIDTH + 1)
    cell = lambda kind, text: dict(cell_type=kind, source=[text])
    (tmp_path / "a.ipynb").write_text(
        json.dumps(dict(cells=[cell("markdown", wide), cell("code", f"{ok}\n{wide}")]))
    )
    (tmp_path / "a.py").write_text(f"{ok}\n{ok}\n{wide}\n")
    assert wide_lines(tmp_path / "a.ipynb") == [("cell 1, line 2", 161, "#" * 60)] and wide_lines(
        tmp_path / "a.py"
    ) == [("line 3", 161, "#" * 60)]


def asserts(cell):
    "Does a code cell check something?"
    for node in ast.walk(tree_of(cell)):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            f = node.func
            name = (
                f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
            )
            if re.match(r"(test_|expect_fail|assert_)", name):
                return True
    return False


@each_module
def test_every_export_is_followed_by_a_test(nb):
    "After a cell that exports a function or a class comes, before the next exported cell, an example that asserts something."
    code = [c for c in cells(nb) if is_code(c)]
    for i, c in enumerate(code):
        if not (
            is_export(c)
            and any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in tree_of(c).body)
        ):
            continue
        what = next(l for l in code_lines(c) if re.match(r"(def|class) ", l))
        after = code[i + 1 :]
        examples = after[: next((j for j, a in enumerate(after) if is_export(a)), len(after))]
        assert examples, f"no example after the cell of {what!r}"
        assert any(asserts(e) for e in examples if not goes_to_library(e)), (
            f"no example of {what!r} asserts anything"
        )


@each_notebook
def test_stored_outputs(nb):
    "Small, no widget state, no error, no output on the error stream that a reader would take for one."
    assert nb.stat().st_size < 300_000, f"{nb.stat().st_size:,} bytes"
    d = json.loads(nb.read_text(encoding="utf-8"))
    assert "widgets" not in d["metadata"], "saved widget state"
    for c in d["cells"]:
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", f"stored error: {o.get('ename')}"
            assert not any("jupyter.widget" in k for k in o.get("data", {})), (
                "a widget view is stored; show a static figure instead"
            )
            text = "".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/plain", []))
            assert not re.search(
                r"Traceback \(most recent call last\)|Mime type rendering requires", text
            ), text[:200]


@each_notebook
def test_no_machine_paths_in_notebooks(nb):
    "Nothing of the author's machine is stored: home folders, temporary folders, addresses of objects."
    text = nb.read_text(encoding="utf-8")
    found = re.search(
        r"(/home/|/root/|/Users/|/tmp/|site-packages/|\bobject at 0x[0-9a-f]{6})[^\"\\ ]{0,60}",
        text,
    )
    assert not found, found[0]


@pytest.mark.parametrize("nb", TUTORIALS, ids=ids(TUTORIALS))
def test_tutorials_are_free_of_nbdev(nb):
    for c in cells(nb):
        if is_code(c):
            assert not re.search(r"^#\|\s*\w|\bnbdev\b", source(c), re.M), source(c)[:80]


# ---------------------------------------------------------------- the library


def test_import_is_light():
    "`import darkdistill_nb` loads none of the heavy packages."
    code = (
        f"import sys, {LIB}; print(sorted({{m.split('.')[0] for m in sys.modules}} & "
        "{'torch', 'timm', 'torchvision', 'plotly', 'numpy', 'sklearn', 'scipy', 'fastcore'}))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


HEAVY = "timm torchvision plotly sklearn scipy ipywidgets matplotlib".split()


def test_modules_import_timm_and_friends_late():
    "A module of the library brings torch at most; timm, torchvision, plotly, scikit-learn and scipy wait until a function needs them."
    code = f"""
import importlib, sys
for m in {[default_exp(nb) for nb in MODULE_NBS]}:
    importlib.import_module("{LIB}." + m)
    loaded = sorted(set({HEAVY}) & {{name.split(".")[0] for name in sys.modules}})
    if loaded: sys.exit(f"{{m}} imports {{loaded}} at its top level")
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@each_module
def test_public_docstrings_are_one_paragraph(nb):
    "One line; two where one would be wider than a page."
    path = module_file(default_exp(nb))
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        doc = ast.get_docstring(node)
        assert doc, f"{path.name}: {node.name} has no docstring"
        assert doc.strip().count("\n") < 2 and "\n\n" not in doc.strip(), (
            f"{path.name}: the docstring of {node.name} has more than two lines"
        )


TEXT = {
    ".py",
    ".ipynb",
    ".md",
    ".toml",
    ".ini",
    ".txt",
    ".cff",
    ".html",
    ".js",
    ".css",
    ".json",
    "",
}
OUTSIDE = re.compile(r"\.\./" + r"shared|/work/" + r"(shared|tmp)")


def test_product_names_nothing_outside_the_repository():
    for top in (
        *ROOT.glob("*"),
        *(ROOT / "nbs").rglob("*"),
        *(ROOT / LIB).rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "tutorials").rglob("*"),
        *(ROOT / "tools").rglob("*.py"),
        *(ROOT / "docs").glob("*"),
        *(ROOT / "assets").rglob("*"),
    ):
        if not top.is_file() or top.suffix not in TEXT or top.name == ".git":
            continue
        found = OUTSIDE.search(top.read_text(encoding="utf-8", errors="ignore"))
        assert not found, f"{top.relative_to(ROOT)} names {found[0]}"


@pytest.mark.parametrize(
    "name", ["LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt"]
)
def test_project_files_exist(name):
    assert (ROOT / name).stat().st_size > 200


def test_version_is_told_once():
    "The version in settings.ini is the newest entry of the change log and the one in the citation file."
    version = re.search(
        r"^version = (\S+)", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M
    )[1]
    assert (
        re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
        == version
    )
    assert (
        re.search(
            r"^version: \"?([^\s\"]+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M
        )[1]
        == version
    )


def test_readme_first_screen():
    "Two set-up commands of one line each, near the top, and a map that names every notebook."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text.split("\n## ")[0], re.M | re.S)
    assert len(blocks) == 2 and all(b.count("\n") == 1 for b in blocks), (
        "two commands, one line each"
    )
    assert blocks[0].strip().endswith("darkdistill run")
    assert blocks[1].strip().endswith("tools/check.py")
    assert len(text.split("\n## ")[0].splitlines()) < 40, "the commands are on the first screen"
    for nb in MODULE_NBS:
        name = nb.relative_to(ROOT).as_posix()
        assert f"({name})" in text, f"{name} is not in the README's map of notebooks"
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", text):
        assert (ROOT / target).exists(), f"the README links {target}, which is not there"


def test_a_name_has_one_meaning():
    "A function that two modules export under one name would hide the other where a reader writes `from ... import *`."
    code = f"""
import importlib
from types import FunctionType
found = {{}}
for m in {[default_exp(nb) for nb in MODULE_NBS]}:
    mod = importlib.import_module("{LIB}." + m)
    for n in mod.__all__:
        if isinstance(o := getattr(mod, n), FunctionType) and n != "main":
            found.setdefault(n, {{}}).setdefault(id(o), m)
print({{n: list(w.values()) for n, w in found.items() if len(w) > 1}})
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip() == "{}", r.stdout + r.stderr


def patched(path):
    "(class, name) of each method that a module adds to a class by @patch."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and "patch" in "".join(
            map(ast.unparse, node.decorator_list)
        ):
            yield ast.unparse(node.args.args[0].annotation), node.name


def test_no_method_is_added_to_a_class_twice():
    "The later one would win without a word: this is how a merge brought back an older average of tiers."
    for path in (ROOT / LIB).rglob("*.py"):
        added = list(patched(path))
        assert len(added) == len(set(added)), f"{path.name}: {added}"


@pytest.mark.parametrize("turn", [1, 2])
def test_what_a_test_draws_does_not_depend_on_the_one_before(turn):
    import numpy as np, random, torch

    ours = torch.Generator().manual_seed(0)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=ours))
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert random.random() == random.Random(0).random()


def shows(code):
    "Does a cell print, or end in a figure, when it runs?"

    def prints(s):
        call = s.value if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) else None
        known = call is not None and getattr(call.func, "id", "") in ("print", "display")
        return known and not any(k.arg == "file" for k in call.keywords)

    body = ast.parse(code).body
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    while isinstance(last, (ast.Call, ast.Attribute)):
        last = last.func if isinstance(last, ast.Call) else last.value
    said = [s for b in body for s in (b.body if isinstance(b, ast.For) else [b])]
    return any(map(prints, said)) or getattr(last, "id", "") in ("fig", "figure")


@pytest.mark.parametrize(
    "code, shown",
    [
        ("print(1)", True),
        ("for i in x:\n    print(i)", True),
        ("fig.update_layout(width=3)", True),
        ("figure(a, title='b')", True),
        ("fig = figure(a)", False),
        ("if x:\n    print(1)", False),
        ("print(1, file=f)", False),
        ("def f():\n    print(1)", False),
    ],
)
def test_what_shows_something(code, shown):
    assert shows(code) == shown


@each_module
def test_what_a_cell_shows_is_stored(nb):
    "Pages are made from stored outputs: a cell that lost its own leaves the text beside it hanging."
    lost = [
        source(c)
        for c in cells(nb)
        if is_code(c) and not source(c).startswith("#|") and not c["outputs"] and shows(source(c))
    ]
    assert not lost, lost

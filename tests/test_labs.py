"The labs as a student meets them."
import ast, re, subprocess, sys
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
STUDENT = sorted((ROOT / "tutorials").glob("*.ipynb"))
each_lab = pytest.mark.parametrize("path", STUDENT, ids=lambda p: p.name)


def test_there_are_labs_and_they_are_in_step():
    assert STUDENT and [p.name for p in STUDENT] == [p.name for p in sorted((ROOT / "tutorials/instructor").glob("*.ipynb"))]
    r = subprocess.run([sys.executable, "tools/make_labs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


@each_lab
def test_untouched_lab_fails_only_where_a_solution_is_missing(path):
    "A student who presses `Run all` meets NotImplementedError and nothing else; what is not an exercise works."
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=300, kernel_name="python3", allow_errors=True).execute()
    errors = [(c.metadata.get("nbgrader", {}), o.ename) for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    graded = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade")]
    assert errors and {e for _, e in errors} == {"NotImplementedError"}, errors
    assert all(m.get("grade") for m, _ in errors) and len(errors) == len(graded), "every test cell fails before its exercise is solved, and only test cells do"


@each_lab
def test_lab_is_complete(path):
    nb = nbformat.read(path, 4)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    for part in ("**Goals.**", "**Time**", "## Summary", "## References", "Next:"): assert part in text, f"{path.name} has no {part}"
    exercises, tests = re.findall(r"### Exercise \d", text), [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade")]
    assert len(exercises) == len(tests) >= 1 and text.count("*Difficulty ") == len(exercises), "each exercise has a difficulty, minutes and a test cell"
    for c in tests:
        asserts = [n for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Assert)]
        assert asserts and all(a.msg is not None for a in asserts), "each assert of a test cell says what is wrong"

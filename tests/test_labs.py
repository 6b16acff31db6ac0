"The labs as students meet them, as instructors grade them, and what their tests say to answers."

import ast, contextlib, importlib.util, io, os, re, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest, torch
from conftest import LONG
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTOR = ROOT / "tutorials/instructor"
STUDENT = sorted((ROOT / "tutorials").glob("*.ipynb"))
each_lab = pytest.mark.parametrize("path", STUDENT, ids=lambda p: p.name)
MARKS = ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS")


def cells(path):
    return nbformat.read(path, 4).cells


def grading(cell):
    return cell.metadata.get("nbgrader", {})


def is_graded(cell):
    return bool(grading(cell).get("grade"))


def is_exercise(cell):
    return bool(grading(cell).get("solution"))


def test_there_are_labs_and_they_are_in_step():
    theirs = sorted(p.name for p in INSTRUCTOR.glob("*.ipynb"))
    assert STUDENT and [p.name for p in STUDENT] == theirs
    check = [sys.executable, "tools/make_labs.py", "--check"]
    r = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


@each_lab
def test_untouched_lab_fails_only_where_a_solution_is_missing(path):
    "`Run all` meets NotImplementedError and nothing else; what is not an exercise works."
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=LONG, kernel_name="python3", allow_errors=True).execute()
    code = [c for c in nb.cells if c.cell_type == "code"]
    errors = [(c.id, o.ename) for c in code for o in c.outputs if o.output_type == "error"]
    assert errors and {e for _, e in errors} == {"NotImplementedError"}, errors
    graded = [c.id for c in nb.cells if is_graded(c)]
    assert [i for i, _ in errors] == graded, "an unsolved exercise's test fails, and nothing else"


@each_lab
def test_lab_is_complete(path):
    parts = cells(path)
    text = "\n".join(c.source for c in parts if c.cell_type == "markdown")
    for part in ("**Goals.**", "**Time**", "## Summary", "## References", "Next:"):
        assert part in text, f"{path.name} has no {part}"
    order = "".join("E" if is_exercise(c) else "t" for c in parts if is_exercise(c) or is_graded(c))
    assert re.fullmatch("(Et+)+", order), f"{order}: each exercise is followed by a test"
    n = order.count("E")
    assert len(re.findall(r"### Exercise \d", text)) == text.count("*Difficulty ") == n
    for c in filter(is_graded, parts):
        asserts = [a for a in ast.walk(ast.parse(c.source)) if isinstance(a, ast.Assert)]
        assert all(a.msg is not None for a in asserts), "each assert of a test says what is wrong"


@each_lab
def test_nothing_of_the_instructors_is_in_the_students_version(path):
    "Solutions and hidden tests are in the instructor's version, one for each exercise."
    mine, theirs = ["\n".join(c.source for c in cells(p)) for p in (path, INSTRUCTOR / path.name)]
    exercises = sum(map(is_exercise, cells(path)))
    for mark in MARKS:
        assert mark not in mine and theirs.count(mark) == exercises, mark
    hidden = re.findall(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", theirs, re.S)
    assert not [h for h in hidden if h.strip() in mine]


@pytest.fixture(scope="module")
def tool():
    "tools/make_labs.py as a module."
    spec = importlib.util.spec_from_file_location("make_labs", ROOT / "tools/make_labs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mark", [*MARKS, "BEGN HIDDEN TESTS"])
def test_a_lab_that_would_show_a_solution_is_not_written(mark, tool, tmp_path):
    "A mark without its partner, or misspelt, so that nbgrader overlooks it, stops make_labs.py."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"x = 1\n### {mark}")])
    nbformat.write(nb, tmp_path / "lab.ipynb")
    with pytest.raises(SystemExit, match="lab.ipynb, cell 0:.*do not pair up"):
        tool.student(tmp_path / "lab.ipynb")


# ---------------------------------------------------------------- right and wrong answers


def read_answers(path):
    "(exercise, how, code, words of the message or None for a right one) of each answer in a file."
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"^# (right|wrong) (\w+): (.*)\n", text, flags=re.M)[1:]
    for kind, exercise, title, code in zip(*[iter(parts)] * 4):
        how, _, words = title.partition(" -> ")
        assert bool(words) == (kind == "wrong"), f"{title}: only a wrong answer has a message"
        yield exercise, how, code, words or None


FILES = sorted((ROOT / "tests/lab_answers").glob("*.py"))
ANSWERS = {
    f"{file.stem} {exercise}: {how}": (file.stem, exercise, code, words)
    for file in FILES
    for exercise, how, code, words in read_answers(file)
}
RIGHT = {name: a for name, a in ANSWERS.items() if a[-1] is None}
FIRST = {a[:2]: name for name, a in reversed(RIGHT.items())}  # of each exercise


def lab_file(name):
    return next(p for p in STUDENT if p.stem.startswith(name))


def keep_runs(simulate):
    "The function `simulate`, which trains only what it has not trained before."
    kept = {}

    def run(method, build, train, test, clients, rounds, seed=0, eval_every=1):
        who = tuple((c.tier, *c.train.tolist()) for c in clients)
        key = who, rounds, seed, eval_every
        if key not in kept:
            kept[key] = simulate(method, build, train, test, clients, rounds, seed, eval_every)
        return kept[key]

    return run


@pytest.fixture(scope="module")
def space():
    "The names that the set-up cells of a lab define, as a function of the lab's name."
    spaces, threads = {}, torch.get_num_threads()

    def get(lab):
        if lab not in spaces:
            names = spaces[lab] = {}
            for c in cells(lab_file(lab)):
                if c.cell_type == "markdown" and c.source.startswith("## 1."):
                    break
                if c.cell_type == "code":
                    exec(c.source, names)
            names["simulate"] = keep_runs(names["simulate"])
        return dict(spaces[lab])

    yield get
    torch.set_num_threads(threads)


def grade(path, exercise, code, names):
    "Run an answer and the first test cell of its exercise; raises what the test raises."
    exec(code, names)
    test = next(c for c in cells(path) if grading(c).get("grade_id") == f"{exercise}-test")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(test.source, names)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name, space):
    "Visible tests tell a wrong answer what is wrong; a right one, in any form, passes all tests."
    lab, exercise, code, words = ANSWERS[name]
    path = lab_file(lab)
    if words is None:
        return grade(INSTRUCTOR / path.name, exercise, code, space(lab))  # hidden tests included
    with pytest.raises(AssertionError, match=re.escape(words)):
        grade(path, exercise, code, space(lab))


def test_every_exercise_has_right_and_wrong_answers():
    exercises = {
        (file.stem, grading(c)["grade_id"])
        for file in FILES
        for c in cells(lab_file(file.stem))
        if is_exercise(c)
    }
    assert len(FILES) == len(STUDENT)
    assert {a[:2] for a in RIGHT.values()} == exercises
    assert {a[:2] for name, a in ANSWERS.items() if name not in RIGHT} == exercises


@pytest.mark.parametrize("lab, exercise", FIRST)
def test_hidden_tests_stop_what_knows_the_visible_ones_by_heart(lab, exercise, space):
    path, names, seen, learning = lab_file(lab), space(lab), set(), True
    code = ANSWERS[FIRST[lab, exercise]][2]
    exec(code, names)
    function = re.search(r"^def (\w+)", code, re.M)[1]
    right = names[function]

    def by_heart(*args, **kwargs):
        key = repr((args, kwargs))
        if learning:
            seen.add(key)
        return right(*args, **kwargs) if key in seen else None

    names["by_heart"] = by_heart
    for learning in (True, False):
        grade(path, exercise, f"{function} = by_heart", dict(names))
    with pytest.raises(AssertionError, match="Got None|a dictionary"):
        grade(INSTRUCTOR / path.name, exercise, f"{function} = by_heart", dict(names))


# ---------------------------------------------------------------- nbgrader


def shorter(text):
    "Code of a lab with its long trainings cut to three rounds."
    return re.sub(r"\brounds=(40|20)\b", "rounds=3", text)


def test_nbgrader_gives_a_cell_more_than_a_training_needs():
    "The limit in our settings reaches nbgrader's executor, whose own is 30 s."
    from nbgrader.preprocessors import Execute
    from traitlets.config import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", path=str(INSTRUCTOR)).load_config()
    assert Execute().timeout == 30 and Execute(config=config).timeout >= 300


def hand_in(course, student, name, answers):
    "The released lab with the given answers in its exercises, as a student hands it in."
    nb = nbformat.read(course / "release" / name / f"{name}.ipynb", 4)
    for c in filter(is_exercise, nb.cells):
        c.source = answers[grading(c)["grade_id"]]
    out = course / "submitted" / student / name / f"{name}.ipynb"
    out.parent.mkdir(parents=True)
    nbformat.write(nb, out)


@pytest.mark.slow
@each_lab
def test_nbgrader_makes_and_grades_the_lab(path, tmp_path):
    "All points for the solutions, and all but one exercise's where one answer is wrong."
    name, course = path.stem, tmp_path / "course"
    (course / "source" / name).mkdir(parents=True)
    source = course / "source" / name / path.name
    text = (INSTRUCTOR / path.name).read_text(encoding="utf-8")
    source.write_text(shorter(text), encoding="utf-8")
    shutil.copy(INSTRUCTOR / "nbgrader_config.py", course)

    # as in an activated environment: nbgrader starts `alembic` by its name
    scripts = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}

    def nbgrader(*args):
        command = [sys.executable, "-m", "nbgrader", *args]
        r = subprocess.run(command, cwd=course, capture_output=True, text=True, env=env)
        assert r.returncode == 0, r.stdout + r.stderr

    nbgrader("generate_assignment", name)
    released = cells(course / "release" / name / path.name)
    assert [c.source for c in released] == [shorter(c.source) for c in cells(path)], "as ours"

    solved = {grading(c)["grade_id"]: c.source for c in cells(source) if is_exercise(c)}
    wrong = next(a for key, a in ANSWERS.items() if path.stem.startswith(a[0]) and a[-1])
    hand_in(course, "ada", name, solved)
    hand_in(course, "ben", name, {**solved, wrong[1]: wrong[2]})
    nbgrader("autograde", name)
    nbgrader("generate_feedback", name)
    nbgrader("export")
    pages = list((course / "feedback").rglob("*.html"))
    assert len(pages) == 2 and (course / "grades.csv").is_file()

    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        scores = [book.find_submission(name, student).score for student in ("ada", "ben")]
        most = book.find_assignment(name).max_score
    lost = [
        grading(c)["points"]
        for c in filter(is_graded, cells(source))
        if grading(c)["grade_id"] == f"{wrong[1]}-test"
    ]
    assert scores == [most, most - lost[0]] and lost[0] > 0

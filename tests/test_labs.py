"The labs as students meet them, as instructors grade them, and what their tests say to answers."

import contextlib, dis, importlib.util, io, os, re, shutil, subprocess, sys, types
from pathlib import Path
from unittest import mock
import nbformat, pytest, torch
from conftest import LONG
from nbclient import NotebookClient
from darkdistill_nb.app import labs

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTOR = ROOT / "tutorials/instructor"
STUDENT = sorted((ROOT / "tutorials").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "tools"))
import lab_gates, make_labs
from sync_settings import install_source, settings

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
def test_run_all_on_an_untouched_lab_raises_nothing(path):
    "Each open exercise prints one line, and everything else works, also for a student with a number."
    nb = nbformat.read(path, 4)
    cell = next(c for c in nb.cells if "student" in c.metadata.get("tags", []))
    cell.source = for_student(cell.source)
    NotebookClient(nb, timeout=LONG, kernel_name="python3").execute()
    printed = {c.id: "".join(o.get("text", "") for o in c.outputs) for c in nb.cells if is_code(c)}
    for c in filter(is_graded, nb.cells):
        line = printed[c.id]
        assert re.fullmatch(r"Exercise \d is not done yet: write .* above .*\.\n", line), line
    said = "\n".join(printed.values())
    assert said.count("not done yet: ") == sum(map(is_graded, nb.cells)) + 1  # lab.progress()


def for_student(source):
    "The code of a cell with a student's number in place of everybody's."
    return source.replace('lab.student("")', 'lab.student("4711")')


def is_code(cell):
    return cell.cell_type == "code"


@each_lab
def test_lab_passes_the_gates(path):
    assert lab_gates.faults(INSTRUCTOR / path.name) == []


def test_measured_times_keep_the_promise():
    "A first figure within 5 s and at most 3 minutes of processor, by the last measurement of each lab."
    for name, t in make_labs.read_times().items():
        assert (INSTRUCTOR / f"{name}.ipynb").exists(), f"{name} is gone: measure again"
        assert t["figure"] <= 5 and t["cpu"] <= 180, (name, t)


@each_lab
def test_nothing_of_the_instructors_is_in_the_students_version(path):
    "Solutions and hidden tests are in the instructor's version, one for each exercise."
    mine, theirs = ["\n".join(c.source for c in cells(p)) for p in (path, INSTRUCTOR / path.name)]
    exercises = sum(map(is_exercise, cells(path)))
    for mark in MARKS:
        assert mark not in mine and theirs.count(mark) == exercises, mark
    hidden = re.findall(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", theirs, re.S)
    assert not [h for h in hidden if h.strip() in mine]


@pytest.mark.parametrize("mark", [*MARKS, "BEGN HIDDEN TESTS"])
def test_a_lab_that_would_show_a_solution_is_not_written(mark, tmp_path):
    "A mark without its partner, or misspelt, so that nbgrader overlooks it, stops make_labs.py."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"x = 1\n### {mark}")])
    nbformat.write(nb, tmp_path / "lab.ipynb")
    with pytest.raises(SystemExit, match="lab.ipynb, cell 0:.*do not pair up"):
        make_labs.student(tmp_path / "lab.ipynb")


@each_lab
def test_solutions_can_be_had_folded(path):
    "For those who learn alone: under its tests each exercise shows what the instructor's cell holds."
    source = INSTRUCTOR / path.name
    parts = nbformat.reads(make_labs.student(source, solutions=True), 4).cells
    solved = {grading(c)["grade_id"]: c.source for c in cells(source) if is_exercise(c)}
    folded = {c.id: c.source for c in parts if c.id.endswith("-solution")}
    assert list(folded) == [f"{k}-solution" for k in solved]
    for name, code in solved.items():
        text = folded[f"{name}-solution"]
        assert text.startswith("<details><summary>Solution") and "###" not in text
        inside = text.split("```python\n")[1].split("\n```")[0]
        assert inside == re.sub(r"    ### (BEGIN|END) SOLUTION\n?", "", code).rstrip()
    order = [c.id for c in parts if is_graded(c) or c.id.endswith("-solution")]
    assert order[-1].endswith("-solution") and not order[0].endswith("-solution")


# ---------------------------------------------------------------- set-up and gates


def test_source_and_version_come_from_the_settings():
    "One place says what pip is given; README and every lab say the same."
    s = settings()
    source = install_source(s)
    assert s["version"] in source
    assert f"%pip install -q {source}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    later = {**s, "version": "9.8.7"}
    for path in STUDENT:
        code = "\n".join(c.source for c in cells(path))
        assert re.search(rf'source = "(\S+ @ )?{re.escape(source)}"', code) and f'Lab("{path.stem}", "{s["version"]}")' in code
        assert code.count(f"/blob/v{s['version']}/tutorials/{path.name}") == 3
        assert '"9.8.7")' in make_labs.setup(path.stem, later)
        assert "@v9.8.7" in make_labs.setup(path.stem, later)


@each_lab
def test_only_the_set_up_installs(path):
    "And only this package, with the extra that a lab needs; the extra is in `lab` too, for those who open labs at home."
    for c in cells(path):
        if is_code(c) and "setup" not in c.metadata.get("tags", []):
            assert "pip" not in c.source and "find_spec" not in c.source, c.id
    s, extra = settings(), make_labs.EXTRAS.get(path.stem)
    assert (extra is not None) == (f"[{extra}] @ git+" in make_labs.setup(path.stem, s))
    if extra:
        assert set(s[f"{extra}_requirements"].split()) <= set(s["lab_requirements"].split())


def test_set_up_installs_only_what_is_missing(capsys):
    "Twice without pip where the package is there; one pip, and its last words if it fails, where not."
    code = make_labs.setup("lab99", settings())
    with mock.patch.object(subprocess, "run") as pip:
        exec(code, {})
        exec(code, {})
    assert not pip.called and capsys.readouterr().out.startswith("lab99: ")
    done = types.SimpleNamespace(returncode=0, stderr="")
    for done.returncode, done.stderr in ((0, ""), (1, "no such tag")):
        missing = mock.patch.object(importlib.util, "find_spec", return_value=None)
        with missing, mock.patch.object(subprocess, "run", return_value=done) as pip:
            fails = pytest.raises(AssertionError, match="pip could not install git.*no such tag")
            with fails if done.returncode else contextlib.nullcontext():
                exec(code, {})
        words = pip.call_args.args[0]
        assert words[1:] == ["-m", "pip", "install", "-q", install_source(settings())]


def spoil_cell(pattern, old, new):
    "A function that changes the first cell in which `pattern` is found."

    def spoil(nb):
        c = next(c for c in nb.cells if re.search(pattern, c.source))
        assert re.search(old, c.source, re.S), old
        c.source = re.sub(old, new, c.source, count=1, flags=re.S)

    return spoil


def spoil_tags(nb):
    nb.cells[1].metadata.tags = []


def spoil_number(nb):
    for c in nb.cells:
        c.source = re.sub(r"lab\.(seed|pick)", "lab.id", c.source)


def spoil_count(nb):
    one = [c for c in nb.cells if is_exercise(c)]
    nb.cells += one * 5


SPOILT = {
    "student_does_not_know_what_for_and_how_long": spoil_cell("^# Lab", "Goals", "Aims"),
    "badge_or_set_up_of_another_version": spoil_tags,
    "same_numbers_for_the_whole_course": spoil_number,
    "lab_stops_without_an_end": spoil_cell("(?m)^Next: ", r"Next: [^\n]*$", "Bye."),
    "nobody_knows_what_goes_wrong": spoil_cell("What goes wrong", "What goes wrong", "Hm"),
    "result_seen_before_it_was_guessed": spoil_cell(r"lab\.predict", r"lab\.predict", "print"),
    "nothing_to_play_with": lambda nb: [
        c.update(source=c.source.replace("Explorer", "Table")) for c in nb.cells
    ],
    "not_valid_python": spoil_cell("^import torch", "$", "\n%matplotlib inline"),
    "wall_of_code": spoil_cell("^import torch", "$", "\nx = 1" * 41),
    "wide_line": spoil_cell("^import torch", "$", "  # " + "x" * 100),
    "wrong_answer_breaks_what_comes_later": spoil_cell(
        r"^logits, macs|exits\.scores import confidence", "$", "\neffective(hist)"
    ),
    "too_few_or_too_many_exercises": spoil_count,
    "exercise_without_its_test": spoil_cell("BEGIN SOLUTION", "### BEGIN SOLUTION", "#"),
    "exercise_without_head": spoil_cell("Hint 2", "Hint 2", "Hint 3"),
    "promised_minutes_too_few": spoil_cell("^# Lab", r"Time\*\*: \d+", "Time**: 3"),
    "run_all_ends_at_the_first_exercise": spoil_cell(
        "with lab.exercise", "with lab.exercise", "with x"
    ),
    "assert_that_teaches_nothing": spoil_cell(
        "with lab.exercise", "$", "\n    assert lab.seed >= 0"
    ),
    "answers_known_by_heart": spoil_cell("BEGIN HIDDEN", "BEGIN HIDDEN TESTS", "BEGIN"),
}


@pytest.mark.parametrize("gate", lab_gates.GATES, ids=lambda g: g.__name__)
def test_gate_sees_its_defect(gate):
    nb = nbformat.read(INSTRUCTOR / "lab01_first_federation.ipynb", 4)
    assert list(gate(nb)) == []
    SPOILT[gate.__name__](nb)
    assert list(gate(nb))


def test_cells_get_their_metadata_from_what_stands_in_them():
    "An author writes no metadata: a solution makes an exercise, `with lab.exercise` its tests."
    new = nbformat.v4.new_code_cell
    stub = new("def f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION")
    tests = [new('with lab.exercise(1, "`f`"):\n    pass') for _ in range(2)]
    head = nbformat.v4.new_markdown_cell("### Exercise 1: f\n\n*Difficulty 2 of 3.")
    make_labs.mark([head, stub, *tests, plain := new("x = 1")])
    assert is_exercise(stub) and not is_graded(stub) and not plain.metadata
    found = [(grading(c)["grade_id"], grading(c)["points"]) for c in tests]
    assert found == [("f-test", 3), ("f-run2", 1)]


def test_stub_says_what_the_library_waits_for():
    text = (INSTRUCTOR / "nbgrader_config.py").read_text(encoding="utf-8")
    assert f'raise NotImplementedError("{labs.NOT_DONE}")' in text


# ---------------------------------------------------------------- right and wrong answers


def solutions(name):
    "The instructor's own answers, as {exercise: code}."
    return {
        grading(c)["grade_id"]: c.source
        for c in cells(INSTRUCTOR / lab_file(name).name)
        if is_exercise(c)
    }


def lab_file(name):
    return next(p for p in STUDENT if p.stem.startswith(name))


LABS = [p.stem.split("_")[0] for p in STUDENT]
FILES = {name: ROOT / f"tests/lab_answers/{name}.py" for name in LABS}
SOLVED = {(name, k): code for name in LABS for k, code in solutions(name).items()}
ANSWERS = {
    f"{name} {exercise}: {how}": (name, exercise, code, words)
    for name in LABS
    for exercise, how, code, words in make_labs.read_answers(FILES[name])
} | {f"{name} {k}: the solution": (name, k, code, None) for (name, k), code in SOLVED.items()}


def keep_runs(simulate, kept):
    "The function `simulate`, which trains only what it has not trained before."

    def run(method, build, train, test, clients, rounds, seed=0, eval_every=1):
        who = tuple((c.tier, *c.train.tolist()) for c in clients)
        key = who, rounds, seed, eval_every
        if key not in kept:
            kept[key] = simulate(method, build, train, test, clients, rounds, seed, eval_every)
        return kept[key]

    return run


def globals_of(code, kinds):
    "Names of the cell's own level that instructions of these kinds touch, those inside functions included."
    found, todo = set(), [compile(code, "cell", "exec")]
    while todo:
        block = todo.pop()
        found |= {i.argval for i in dis.get_instructions(block) if i.opname in kinds}
        todo += [c for c in block.co_consts if isinstance(c, types.CodeType)]
    return found


def makes(code):
    "Names that a cell makes: variables, functions, imports."
    return globals_of(code, {"STORE_NAME", "STORE_GLOBAL"})


def uses(code):
    "Names that a cell needs from elsewhere."
    return globals_of(code, {"LOAD_NAME", "LOAD_GLOBAL"}) - makes(code)


def needed(path, exercise, code):
    "The cells before an exercise that make a name which an answer or a test uses, directly or not."
    parts = [c for c in cells(path) if is_code(c)]
    at = next(i for i, c in enumerate(parts) if grading(c).get("grade_id") == exercise)
    tests = [c for c in cells(INSTRUCTOR / path.name) if is_test_of(c, exercise)]
    used = set().union(*map(uses, [code, *(c.source for c in tests)]))
    found = []
    for c in reversed(parts[:at]):
        if is_exercise(c) or is_graded(c):
            continue
        always = {"setup", "student"} & set(c.metadata.get("tags", []))
        if always or makes(c.source) & used:
            used |= uses(c.source)
            found.append(c)
    return found[::-1]


def is_test_of(cell, exercise):
    return is_graded(cell) and grading(cell)["grade_id"].startswith(exercise + "-")


@pytest.fixture(scope="module")
def space():
    "The names that a lab has before an exercise, as a function of lab, exercise, answer, and whose."
    done, kept, threads = {}, {}, torch.get_num_threads()

    def get(lab, exercise, code, whose=str):
        todo = needed(lab_file(lab), exercise, code)
        key = lab, whose, *(c.id for c in todo)
        if key not in done:
            names = done[key] = {}
            with contextlib.redirect_stdout(io.StringIO()):
                for c in todo:
                    exec(whose(c.source), names)
            if "simulate" in names:
                names["simulate"] = keep_runs(names["simulate"], kept)
        return dict(done[key])

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
        names = space(lab, exercise, code)
        return grade(INSTRUCTOR / path.name, exercise, code, names)  # hidden tests included
    with pytest.raises(AssertionError, match=re.escape(words)):
        grade(path, exercise, code, space(lab, exercise, code))


@pytest.mark.parametrize("lab, exercise", SOLVED)
def test_solutions_pass_for_another_student(lab, exercise, space):
    "Tests check properties: with a student's number data and settings differ, and nothing fails."
    code = SOLVED[lab, exercise]
    names = space(lab, exercise, code, whose=for_student)
    assert names["lab"].id == "4711"
    grade(INSTRUCTOR / lab_file(lab).name, exercise, code, names)


def test_every_exercise_has_a_wrong_answer_with_its_message():
    wrong = {a[:2] for a in ANSWERS.values() if a[-1]}
    assert wrong == set(SOLVED), "exercises without a typical wrong answer in tests/lab_answers"


@pytest.mark.parametrize("lab, exercise", SOLVED)
def test_an_open_exercise_fails_where_nbgrader_marks(lab, exercise, space, monkeypatch):
    "In the notebook it prints a line; under nbgrader's autograder it raises, so it gets no points."
    path = lab_file(lab)
    stub = next(c.source for c in cells(path) if grading(c).get("grade_id") == exercise)
    names = space(lab, exercise, stub)
    names["lab"].exercises.clear()
    grade(path, exercise, stub, names)
    assert names["lab"].exercises and set(names["lab"].exercises.values()) == {"not done yet"}
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(NotImplementedError, match=labs.NOT_DONE):
        grade(path, exercise, stub, names)


@pytest.mark.parametrize("lab, exercise", SOLVED)
def test_hidden_tests_stop_what_knows_the_visible_ones_by_heart(lab, exercise, space):
    code = SOLVED[lab, exercise]
    path, names, seen, learning = lab_file(lab), space(lab, exercise, code), set(), True
    exec(code, names)
    function = re.search(r"^def (\w+)", code, re.M)[1]
    right = names[function]

    def by_heart(*args, **kwargs):
        seed = [a.initial_seed() for a in args if isinstance(a, torch.Generator)]
        key = repr([seed, *(a for a in args if not isinstance(a, torch.Generator)), kwargs])
        if learning:
            seen.add(key)
        return right(*args, **kwargs) if key in seen else None

    names["by_heart"] = by_heart
    for learning in (True, False):
        grade(path, exercise, f"{function} = by_heart", dict(names))
    with pytest.raises(AssertionError, match="Got None|a dictionary"):
        grade(INSTRUCTOR / path.name, exercise, f"{function} = by_heart", dict(names))


# ---------------------------------------------------------------- nbgrader


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
def test_nbgrader_makes_and_grades_the_shortest_lab(tmp_path):
    "All points for the solutions, all but one exercise's where one is wrong, none for an untouched lab."
    path = STUDENT[0]  # the gates see to it that the others have the same form
    name, course = path.stem, tmp_path / "course"
    (course / "source" / name).mkdir(parents=True)
    source = course / "source" / name / path.name
    shutil.copy(INSTRUCTOR / path.name, source)
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
    assert [c.source for c in released] == [c.source for c in cells(path)], "as ours"

    solved = {grading(c)["grade_id"]: c.source for c in cells(source) if is_exercise(c)}
    wrong = next(a for key, a in ANSWERS.items() if path.stem.startswith(a[0]) and a[-1])
    hand_in(course, "ada", name, solved)
    hand_in(course, "ben", name, {**solved, wrong[1]: wrong[2]})
    open_still = {grading(c)["grade_id"]: c.source for c in filter(is_exercise, released)}
    hand_in(course, "cleo", name, open_still)
    nbgrader("autograde", name)
    nbgrader("generate_feedback", name)
    nbgrader("export")
    pages = list((course / "feedback").rglob("*.html"))
    assert len(pages) == 3 and (course / "grades.csv").is_file()

    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        scores = [book.find_submission(name, student).score for student in ("ada", "ben", "cleo")]
        most = book.find_assignment(name).max_score
    lost = [
        grading(c)["points"]
        for c in filter(is_graded, cells(source))
        if grading(c)["grade_id"] == f"{wrong[1]}-test"
    ]
    assert scores == [most, most - lost[0], 0] and lost[0] > 0

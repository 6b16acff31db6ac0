"""A course marked from end to end: right, open, wrong and damaged notebooks, nbgrader in an environment of its own, and what students may see."""

import importlib.util, json, subprocess, sys
from pathlib import Path
import nbformat, pytest
from darkdistill_nb.app import grade

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTOR, LAB = ROOT / "tutorials/instructor", "lab00_tour"
sys.path.insert(0, str(ROOT / "tools"))
from make_labs import read_answers
from sync_settings import settings

nbgrader = pytest.mark.skipif(
    importlib.util.find_spec("nbgrader") is None, reason="nbgrader is not installed"
)


def released():
    "The lab as students get it."
    return nbformat.read(ROOT / f"tutorials/{LAB}.ipynb", 4)


def solutions():
    "The instructor's answers by exercise."
    cells = nbformat.read(INSTRUCTOR / f"{LAB}.ipynb", 4).cells
    return {grade._id(c): c.source for c in cells if grade._is(c, "solution")}


def answered(answers, number=""):
    "The lab with these answers and a student number."
    nb = released()
    for c in nb.cells:
        c.source = answers.get(grade._id(c), c.source)
        c.source = c.source.replace('lab.student("")', f'lab.student("{number}")')
    return nb


def by_heart(answers):
    "The first exercise answered for those inputs only that its visible tests have."
    code = answers["largest_share"].replace("def largest_share", "def general", 1)
    known = f"{code}\n\n\ndef largest_share(counts):\n    right = general(counts)\n"
    return {
        **answers,
        "largest_share": known + "    return right if len(counts) > 1 else right * 0\n",
    }


def without_metadata(nb):
    "As a program leaves a notebook that keeps no metadata of cells, and whose student deleted a test."
    nb.cells = [c for c in nb.cells if grade._id(c) != "policy_cost-test"]
    for c in nb.cells:
        c.metadata = nbformat.NotebookNode()
    return nb


def hand_in(folder, student, nb, name=f"{LAB}.ipynb"):
    (folder / student).mkdir(parents=True)
    nbformat.write(nb, folder / student / name)


def a_class(folder):
    "Six students, and one who has handed in nothing."
    right = solutions()
    exercise, how, code, words = next(
        a for a in read_answers(ROOT / "tests/lab_answers/lab00.py") if a[-1]
    )
    hand_in(folder, "ada", answered(right, "4711"))
    hand_in(folder, "ben", answered({**right, exercise: code}, "4711"), "lab00_tour (1).ipynb")
    hand_in(folder, "cleo", released())
    hand_in(folder, "dora", answered(by_heart(right)))
    hand_in(folder, "emil", without_metadata(answered(right)))
    hand_in(folder, "finn", answered({**right, "policy_cost": "def policy_cost(:\n    pass"}))
    for name, text in (("gus", '{"cells": [{"cell_'), ("hal", None)):
        (folder / name).mkdir()
        if text:
            (folder / name / f"{LAB}.ipynb").write_text(text)
    return exercise, words


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    "A marked class: marks, the folder of pages, what was said, and the wrong answer with its words."
    folder = tmp_path_factory.mktemp("course")
    wrong, said = a_class(folder / "in"), []
    marks = grade.grade_course(folder / "in", folder / "out", say=said.append)
    return {m.student: m for m in marks}, folder, said, wrong


@nbgrader
@pytest.mark.slow
def test_a_class_is_marked(course):
    "All points for right answers, none for open ones, and nobody pays for another's damaged notebook."
    marks, folder, said, (exercise, words) = course
    states = {s: {p.exercise: p.state for p in m.parts} for s, m in marks.items()}
    most = marks["ada"].most
    assert marks["ada"].points == most == 8 and not marks["ada"].problem
    assert set(states["cleo"].values()) == {"not done yet"} and marks["cleo"].points == 0
    assert states["ben"].pop(exercise) == "wrong" and set(states["ben"].values()) == {"done"}
    assert words in next(p.said for p in marks["ben"].parts if p.exercise == exercise)
    assert marks["emil"].points == most, "lost metadata and a deleted test cost nothing"
    last = marks["finn"].parts[-1]
    assert last.state == "wrong" and "SyntaxError" in last.said and marks["finn"].points == 6
    assert "no readable notebook" in marks["gus"].problem and marks["gus"].points == 0
    assert set(states["hal"].values()) == {"missing"} and not marks["hal"].problem
    assert len(said) > 6 and "page: " in said[-1]


@nbgrader
@pytest.mark.slow
def test_pages_and_tables_of_a_class(course):
    "The instructor sees exercise x message x count, the shared number, and what is damaged."
    marks, folder, _, (exercise, words) = course
    page = (folder / "out/index.html").read_text(encoding="utf-8")
    for text in (words, "(hidden test)", "is used by ada, ben", "gus", "no readable notebook"):
        assert text in page, text
    assert "1 of 8" in page and "src=" not in page and "http" not in page
    rows = (folder / "out/grades.csv").read_text().splitlines()
    assert rows[0] == "student,lab00_tour,points" and "ada,8,8" in rows and "cleo,0,0" in rows
    parts = (folder / "out/exercises.csv").read_text().splitlines()
    assert len(parts) == 1 + 4 * len(marks)


@nbgrader
@pytest.mark.slow
def test_no_student_reads_a_hidden_test(course):
    "Dora's answer fails in a hidden test only: her page says so and no word of the test."
    marks, folder, *_ = course
    part = marks["dora"].parts[0]
    assert part.state == "wrong" and part.hidden and "five classes" in part.said
    source = nbformat.read(INSTRUCTOR / f"{LAB}.ipynb", 4)
    secret = [
        c.source.split("### BEGIN HIDDEN TESTS")[1] for c in source.cells if grade._is(c, "grade")
    ]
    hints = [s.split('"')[1] for s in secret if '"' in s]
    assert len(hints) > 0
    for path in (folder / "out/feedback").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not [h for h in hints if h in text] and "Traceback" not in text
    assert grade._HIDDEN in (folder / "out/feedback/dora.html").read_text(encoding="utf-8")


@nbgrader
@pytest.mark.slow
def test_called_again_it_marks_only_what_is_new(course, monkeypatch):
    marks, folder, *_ = course
    monkeypatch.setattr(grade, "grader_python", lambda *a: pytest.fail("nbgrader was called"))
    again, said = grade.grade_course(folder / "in", folder / "out", say=lambda text: None), []
    assert {m.student: m for m in again} == marks
    hand_in(folder / "in", "ida", released())
    with pytest.raises(pytest.fail.Exception, match="nbgrader was called"):
        grade.grade_course(folder / "in", folder / "out", say=said.append)
    assert said == [f"{LAB}: 1 to mark, 8 known"]


def test_where_nbgrader_is_missing_one_sentence_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    from darkdistill_nb.app import cli

    hand_in(tmp_path / "in", "ada", released())
    monkeypatch.setattr(grade, "_has_nbgrader", lambda python: False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["grade", "in", "--source", str(INSTRUCTOR)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "darkdistill-nb[instructor]"' in said
    assert not (tmp_path / "marks").exists()


def test_requirement_is_the_one_of_the_settings():
    assert grade._NBGRADER in settings()["instructor_requirements"].split()


@pytest.mark.slow
def test_an_environment_of_its_own_sees_this_one(tmp_path, monkeypatch):
    "Made without a network: pip fails with the way out in one sentence; what is installed here is seen there."
    env = tmp_path / "grading"
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(grade, "_NBGRADER", "no-such-grader>=1")
    with pytest.raises(ValueError, match="PIP_FIND_LINKS=WHEELS") as e:
        grade.grader_python(env, say=lambda text: None)
    assert "\n" not in str(e.value)
    code = "import torch, sys; print(sys.prefix, torch.__version__)"
    r = subprocess.run([grade._python_of(env), "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.split()[0] == str(env), r.stderr


def test_a_wheel_without_the_instructors_notebooks_says_where_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="tutorials/instructor of the repository"):
        grade.find_labs(tmp_path)


def test_marks_survive_their_file():
    part = grade.Part("f", 1.0, 2.0, "wrong", "No.", True)
    mark = grade.Mark("ada", LAB, "7", "", [part])
    assert grade.Mark.from_json(mark.to_json()) == mark and json.loads(mark.to_json())

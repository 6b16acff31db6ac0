#!/usr/bin/env python3
"""What every lab must have and must not have.   lab_gates.py [NOTEBOOK ...]

Each gate is a function named after the defect that it prevents; it yields one sentence for each place where the defect is.
`make_labs.py` runs them all, with and without --check. They look at the instructor's version."""

import ast, re, statistics, sys
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parent.parent
GATES = []


def gate(f):
    "Enter a gate into the list."
    GATES.append(f)
    return f


# ---------------------------------------------------------------- reading a lab


def is_code(c):
    return c.cell_type == "code"


def is_exercise(c):
    "The cell in which a student writes."
    return bool(c.metadata.get("nbgrader", {}).get("solution"))


def is_graded(c):
    "A test cell: what it raises costs its points."
    return bool(c.metadata.get("nbgrader", {}).get("grade"))


def grade_id(c):
    return c.metadata["nbgrader"]["grade_id"]


def tagged(c, tag):
    return tag in c.metadata.get("tags", [])


def shown_to_students(source):
    "The code of a cell without its solution and hidden tests."
    pattern = r"^ *### BEGIN (SOLUTION|HIDDEN TESTS)\n.*?^ *### END \1\n?"
    return re.sub(pattern, "", source, flags=re.M | re.S)


def tree(c):
    "Syntax tree of a code cell; empty where the code is not valid Python, which `not_valid_python` says."
    try:
        return ast.parse(c.source)
    except SyntaxError:
        return ast.parse("")


def text(nb):
    "All prose of a lab."
    return "\n\n".join(c.source for c in nb.cells if not is_code(c))


def heads(nb):
    "The prose from each `### Exercise N` on to the end of its cell, as {N: text}."
    found = [re.search(r"^### Exercise (\d+)\b.*", c.source, re.M | re.S) for c in nb.cells]
    return {int(m[1]): m[0] for m in found if m}


def minutes(text):
    found = re.search(r"\*\*Time\*\*: (\d+) minutes", text)
    return int(found[1]) if found else None


def calls(node, name):
    "Calls of the method `lab.NAME` below a node."
    return [
        n
        for n in ast.walk(node)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == name
        and isinstance(n.func.value, ast.Name)
        and n.func.value.id == "lab"
    ]


# ---------------------------------------------------------------- frame


@gate
def student_does_not_know_what_for_and_how_long(nb):
    "Title, a line that says why, goals and minutes come first."
    first = nb.cells[0].source
    if not re.match(r"# Lab \d+: \S.*\n\n> \S", first):
        yield "the first cell begins with `# Lab N: title`, an empty line and `> ` why"
    if "**Goals.**" not in first:
        yield "the first cell has no **Goals.**"
    if minutes(first) is None:
        yield "the first cell does not say `**Time**: N minutes`"


@gate
def badge_or_set_up_of_another_version(nb):
    "A running course must not move: badges and set-up are generated with the version, in this order."
    wanted = ["badges", "setup", "student"]
    found = [t for c in nb.cells for t in wanted if tagged(c, t)]
    if found != wanted:
        yield f"cells with the tags {wanted} are wanted once each and in this order, not {found}"
    elif not (tagged(nb.cells[1], "badges") and tagged(next(filter(is_code, nb.cells)), "setup")):
        yield "badges are cell 1, and the set-up is the first code cell"


@gate
def same_numbers_for_the_whole_course(nb):
    "Answers travel, so a student number must matter: `lab.student` is called and its seed or a pick used."
    code = [tree(c) for c in nb.cells if is_code(c)]
    names = {n.attr for t in code for n in ast.walk(t) if isinstance(n, ast.Attribute)}
    if not any(calls(t, "student") for t in code):
        yield "no cell calls lab.student"
    if not names & {"seed", "pick"}:
        yield "neither lab.seed nor lab.pick is used, so a student number changes nothing"


@gate
def lab_stops_without_an_end(nb):
    "A lab ends with what was learned, where it is from, and what comes next, which exists."
    if not re.search(r"^## Summary.*^## References", text(nb), re.M | re.S):
        yield "## Summary and then ## References are wanted"
    last = nb.cells[-1].source.strip().split("\n")[-1]
    if not last.startswith("Next: "):
        yield "the last line is not `Next: ...`"
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", last):
        if not (ROOT / "tutorials" / target).exists():
            yield f"Next leads to {target}, which is not there (seen from tutorials/)"


@gate
def nobody_knows_what_goes_wrong(nb):
    if "**What goes wrong.**" not in text(nb):
        yield "no box `> **What goes wrong.** ...`"


@gate
def result_seen_before_it_was_guessed(nb):
    "Each prediction is asked for in one cell and revealed in a later one."
    place = {"predict": {}, "reveal": {}}
    for i, c in enumerate(nb.cells):
        for method in place:
            for call in calls(tree(c), method) if is_code(c) else ():
                place[method].setdefault(ast.unparse(call.args[0]), i)
    if not place["predict"]:
        yield "no cell calls lab.predict"
    for what in place["predict"].keys() | place["reveal"].keys():
        asked, told = (place[m].get(what) for m in place)
        if asked is None or told is None or asked >= told:
            yield f"{what}: lab.predict, and in a later cell lab.reveal"


@gate
def nothing_to_play_with(nb):
    "An explorer of the library stands in the lab."
    if not any("Explorer" in c.source for c in filter(is_code, nb.cells)):
        yield "no explorer"


# ---------------------------------------------------------------- code


@gate
def not_valid_python(nb):
    "A magic or a gap (`x = `) ends Run all, and no test can read the cell."
    for i, c in enumerate(nb.cells):
        if is_code(c):
            try:
                ast.parse(c.source)
            except SyntaxError as e:
                yield f"cell {i}: {e}"


@gate
def wall_of_code(nb):
    "Half of the code cells have at most 10 lines, none of those that students see has more than 40."
    lines = [
        sum(bool(l.strip()) for l in shown_to_students(c.source).splitlines())
        for c in nb.cells
        if is_code(c)
    ]
    if statistics.median(lines) > 10:
        yield f"the median code cell has {statistics.median(lines)} lines"
    if max(lines) > 40:
        yield f"the longest code cell has {max(lines)} lines"


@gate
def wide_line(nb):
    for i, c in enumerate(nb.cells):
        if is_code(c) and max(map(len, c.source.splitlines()), default=0) > 100:
            yield f"cell {i} has a line of more than 100 columns"


@gate
def wrong_answer_breaks_what_comes_later(nb):
    "What a student writes is used in the tests of that exercise only; everything else uses the library."
    own = {}
    for i, c in enumerate(nb.cells):
        if not is_code(c):
            continue
        used = {n.id for n in ast.walk(tree(c)) if isinstance(n, ast.Name)}
        if is_exercise(c):
            theirs = grade_id(c)
            own |= {n.name: theirs for n in tree(c).body if isinstance(n, ast.FunctionDef)}
        for name in used & own.keys():
            mine = is_exercise(c) and grade_id(c) == own[name]
            if not (mine or is_graded(c) and grade_id(c).startswith(own[name] + "-")):
                yield f"cell {i} uses `{name}` of exercise {own[name]}; use the library's"


# ---------------------------------------------------------------- exercises


@gate
def too_few_or_too_many_exercises(nb):
    n = sum(map(is_exercise, nb.cells))
    if not 4 <= n <= 7:
        yield f"{n} exercises; 4 to 7 are wanted"


@gate
def exercise_without_its_test(nb):
    "Head, stub, tests: the stub is one function, and each test cell is named after its exercise."
    part = [c for c in nb.cells if is_exercise(c) or is_graded(c)]
    if not re.fullmatch("(Et+)+", "".join("E" if is_exercise(c) else "t" for c in part)):
        yield "each exercise is followed by its tests"
    now = ""
    for c in part:
        if is_exercise(c):
            now = grade_id(c)
            if "### BEGIN SOLUTION" not in c.source:
                yield f"{now} has no solution"
            if not any(isinstance(n, ast.FunctionDef) for n in tree(c).body):
                yield f"{now}: a stub is a function"
        elif not grade_id(c).startswith(now + "-"):
            yield f"{grade_id(c)} follows exercise {now}; it is to be called {now}-test"


@gate
def exercise_without_head(nb):
    "Each exercise says how hard, how important and how long it is, and gives two hints that are folded."
    found = heads(nb)
    if sorted(found) != list(range(1, 1 + sum(map(is_exercise, nb.cells)))):
        yield f"heads `### Exercise N` are numbered {sorted(found)}"
    for n, head in found.items():
        line = r"\*Difficulty [1-3] of 3\. Importance [1-3] of 3\. About \d+ minutes?\.\*"
        if not re.search(line, head):
            yield f"exercise {n}: `*Difficulty 1 of 3. Importance 2 of 3. About 8 minutes.*`"
        if (
            len(
                re.findall(
                    r"<details><summary>Hint [12]</summary>\n\n.*?\n\n</details>", head, re.S
                )
            )
            != 2
        ):
            yield f"exercise {n}: two folded hints, Hint 1 and Hint 2"


@gate
def promised_minutes_too_few(nb):
    "The minutes of the exercises fit into the time that the lab promises."
    parts = sum(int(m) for h in heads(nb).values() for m in re.findall(r"About (\d+) minute", h))
    whole = minutes(nb.cells[0].source) or 0
    if parts > whole:
        yield f"the exercises take {parts} minutes, the lab promises {whole}"


@gate
def run_all_ends_at_the_first_exercise(nb):
    "The tests of exercise N stand inside one `with lab.exercise(N, ...)`; before it come data and functions only."
    n = 0
    for c in filter(is_code, nb.cells):
        n += is_exercise(c)
        if not is_graded(c):
            continue
        before = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign)
        rest = [s for s in tree(c).body if not isinstance(s, before)]
        found = [call for s in rest for call in calls(s, "exercise")]
        if len(rest) != 1 or len(found) != 1 or not isinstance(rest[0], ast.With):
            yield f"{grade_id(c)}: one `with lab.exercise({n}, ...)` around all its tests"
        elif ast.literal_eval(found[0].args[0]) != n:
            yield f"{grade_id(c)} is a test of exercise {n}"


@gate
def assert_that_teaches_nothing(nb):
    "Each assert says what is wrong."
    for c in filter(is_graded, nb.cells):
        for node in ast.walk(tree(c)):
            if isinstance(node, ast.Assert) and node.msg is None:
                yield f"{grade_id(c)}: `assert {ast.unparse(node.test)}` has no message"


@gate
def answers_known_by_heart(nb):
    "The first test cell of each exercise has hidden tests."
    for c in nb.cells:
        if is_graded(c) and grade_id(c).endswith("-test") and "BEGIN HIDDEN TESTS" not in c.source:
            yield f"{grade_id(c)} has no hidden tests"


def faults(path):
    "Every sentence of every gate about one lab."
    nb = nbformat.read(path, 4)
    nb.metadata["lab"] = Path(path).stem
    return [f"{Path(path).name}: {g.__name__}: {said}" for g in GATES for said in g(nb)]


def main(paths):
    paths = paths or sorted((ROOT / "tutorials/instructor").glob("*.ipynb"))
    found = [f for p in paths for f in faults(p)]
    print("\n".join(found) or f"labs: {len(paths)} pass {len(GATES)} gates")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Make the students' labs from the instructor's.   make_labs.py [--check] [--with-solutions FOLDER] [--times [LAB ...]]

`tutorials/instructor/NAME.ipynb` is the one source of a lab: with its solutions and hidden tests, in nbgrader's format.

1. Its cells get their tags and nbgrader's metadata (`mark`), and those with the tags `badges` and `setup` are written, from the
   name, version and source in settings.ini. Explorers are shown where a kernel is: their outputs are dropped.
2. nbgrader's own preprocessors, with the settings of `nbgrader_config.py` there, strip solutions and hidden tests into
   `tutorials/NAME.ipynb`.
3. The tables in `tutorials/README.md` and `tutorials/INSTRUCTOR.md` are written.
4. The gates of `lab_gates.py` look at every lab.

With --check nothing is written and the exit code is 1 if a file differs or a gate fails. --with-solutions writes, into another
folder, students' versions for those who learn alone: under its tests each exercise has its solution, folded. --times runs the
instructor's labs and keeps the seconds in `tutorials/instructor/times.json`."""

import argparse, json, os, re, sys, time
from pathlib import Path
import nbformat
from nbgrader.preprocessors import ClearHiddenTests, ClearOutput, ClearSolutions, LockCells
from traitlets.config import PyFileConfigLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lab_gates import faults, grade_id, is_exercise, is_graded, minutes
from sync_settings import docs_home, install_source, settings

ROOT = Path(__file__).resolve().parent.parent / "tutorials"
STEPS = (ClearSolutions, ClearOutput, LockCells, ClearHiddenTests)
REGIONS = ("SOLUTION", "HIDDEN TESTS")
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


# ---------------------------------------------------------------- generated cells


def badges(name, s):
    "Links that open the student's version, at the version's tag so that a running course does not move."
    place = f"{s['user']}/{s['repo']}/blob/v{s['version']}/tutorials/{name}.ipynb"
    return (
        f"**Open in** [Colab](https://colab.research.google.com/github/{place}) · "
        f"[Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{place}) · "
        f"[GitHub](https://github.com/{place})"
    )


SETUP = """\
# Set-up: installs this package where it is missing, and nothing else. It can be run again.
import importlib.util, subprocess, sys

if importlib.util.find_spec("{lib}") is None:
    source = "{source}"
    pip = [sys.executable, "-m", "pip", "install", "-q", source]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, f"pip could not install {{source}}: {{done.stderr[-500:]}}"
    importlib.invalidate_caches()

from {lib}.app.labs import Lab

lab = Lab("{name}", "{version}")
print(lab)"""


EXTRAS = {"lab09_distributed_exits": "simulator"}  # of the package, for a lab that needs one


def setup(name, s):
    "The code of the set-up cell."
    source = install_source(s)
    if name in EXTRAS:
        source = f"{s['lib_name'].replace('_', '-')}[{EXTRAS[name]}] @ {source}"
    return SETUP.format(lib=s["lib_name"], source=source, name=name, version=s["version"])


TAGS = {"badges": r"\*\*Open in\*\*", "setup": "# Set-up:", "student": r"lab\.student\("}


def nbgrader_cell(grade_id, **changes):
    "nbgrader's metadata of a cell."
    plain = dict(grade=False, locked=True, schema_version=3, solution=False, task=False)
    return {"nbgrader": {**plain, "grade_id": grade_id, **changes}}


def mark(cells):
    "Tags and nbgrader's metadata for cells that have none, from what stands in them."
    difficulty, now = 1, ""
    for c in cells:
        text, meta = "".join(c["source"]), c["metadata"]
        found = [tag for tag, begin in TAGS.items() if re.match(begin, text)]
        if found:
            meta["tags"] = found
        if found == ["setup"]:
            meta.update(nbgrader_cell("setup"))
        if level := re.search(r"^\*Difficulty (\d)", text, re.M):
            difficulty = int(level[1])
        if "### BEGIN SOLUTION" in text:
            name = re.search(r"^def (\w+)", text, re.M)
            new = nbgrader_cell(name[1] if name else "answer", solution=True, locked=False)
            now, tests = meta.setdefault("nbgrader", new["nbgrader"])["grade_id"], 0
        elif "with lab.exercise(" in text and now:
            tests += 1
            kind, points = ("test", 1 + difficulty) if tests == 1 else (f"run{tests}", 1)
            new = nbgrader_cell(f"{now}-{kind}", grade=True, points=points)
            meta.setdefault("nbgrader", new["nbgrader"])


def instructor(path):
    "Text of an instructor's lab, marked, with its generated cells as settings.ini has them today."
    nb, s = json.loads(path.read_text(encoding="utf-8")), settings()
    mark(nb["cells"])
    for c in nb["cells"]:
        for tag, make in (("badges", badges), ("setup", setup)):
            if tag in c["metadata"].get("tags", []):
                c["source"] = make(path.stem, s).splitlines(keepends=True)
        if c.get("outputs") and re.search(r"^\w*Explorer\b", "".join(c["source"]), re.M):
            c["outputs"] = []
    return as_text(nb)


def as_text(nb):
    "As nbdev-clean leaves a notebook."
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


# ---------------------------------------------------------------- the student's version


def check_marks(nb, name):
    "Stop unless each BEGIN has its END: nbgrader drops an END that is alone, and shows the rest."
    for i, c in enumerate(nb.cells):
        for region in REGIONS:
            begins, ends = [c.source.count(f"### {word} {region}") for word in ("BEGIN", "END")]
            if begins != ends or begins + ends != c.source.count(region):
                sys.exit(
                    f"{name}, cell {i}: ### BEGIN {region} and ### END {region} do not pair up"
                )


def online(text, s):
    "Links to lessons as pages of the documentation: a student's copy of a lab has no repository around it."
    return re.sub(r"\]\(\.\./nbs/([\w/]+)\.ipynb", rf"]({docs_home(s)}\1.html", text)


def student(path, source=None, solutions=False):
    "Text of the student's version of an instructor's lab, of which `source` is the text."
    nb = nbformat.reads(source or path.read_text(encoding="utf-8"), 4)
    check_marks(nb, path.name)
    if solutions:
        add_solutions(nb)
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT / "instructor")).load_config()
    for step in STEPS:
        nb, _ = step(config=config).preprocess(nb, {})
    nb.metadata, s = KERNEL, settings()
    for c in nb.cells:
        text = online(c.source, s) if c.cell_type == "markdown" else c.source
        c.source = text.splitlines(keepends=True)
    return as_text(nb)


FOLDED = (
    "<details><summary>Solution of exercise {n}</summary>\n\n```python\n{code}\n```\n\n</details>"
)


def add_solutions(nb):
    "Put each solution, folded, under the tests of its exercise."
    cells, folded, n = [], None, 0
    for c in nb.cells:
        if folded and not is_graded(c):
            cells.append(folded)
            folded = None
        cells.append(c)
        if is_exercise(c):
            n += 1
            code = re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", c.source, flags=re.M).rstrip()
            folded = nbformat.v4.new_markdown_cell(FOLDED.format(n=n, code=code))
            folded.id = f"{grade_id(c)}-solution"
    nb.cells = cells


# ---------------------------------------------------------------- all files


def table(sources):
    "The table of labs, from the heads of the instructor's versions."
    rows = ["| Lab | Minutes | What for |", "|---|---|---|"]
    for path, text in sources.items():
        head = "".join(json.loads(text)["cells"][0]["source"])
        title, why = re.match(r"# (.*)\n\n> (.*)", head).groups()
        rows.append(f"| [{title}]({path.name}) | {minutes(head)} | {why} |")
    return "\n".join(rows)


def times_table(times):
    "What `--times` measured, lab by lab."
    rows = [
        "| Lab | Minutes | Code, processor | First figure, processor | Code, wall | Measured |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "instructor").glob("*.ipynb")):
        if t := times.get(path.stem):
            rows.append(
                f"| {path.stem} | {t['minutes']} | {t['cpu']:.0f} s | after {t['figure']:.0f} s | "
                f"{t['wall']:.0f} s | {t['day']}, {t['cpus']} cores, {t['load']:.0f} busy |"
            )
    return "\n".join(rows)


def measure(path):
    "Run a lab once: its minutes, seconds of processor and wall, and of processor until a figure stands there."
    import psutil
    from nbclient import NotebookClient

    nb, start, seconds, figures = nbformat.read(path, 4), time.perf_counter(), [0], []

    def look(cell, cell_index, execute_reply):
        spent = psutil.Process(client.km.provisioner.pid).cpu_times()
        seconds.append(spent.user + spent.system)
        kinds = {k for o in cell.get("outputs", []) for k in o.get("data", {})}
        if any("plotly" in k for k in kinds):
            figures.append(seconds[-1])

    client = NotebookClient(nb, timeout=1800, kernel_name="python3", on_cell_executed=look)
    client.execute()
    return dict(
        minutes=minutes(nb.cells[0].source),
        cpu=round(seconds[-1], 1),
        wall=round(time.perf_counter() - start, 1),
        figure=round(figures[0], 1),
        day=time.strftime("%Y-%m-%d"),
        cpus=os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
    )


def read_answers(path):
    "(exercise, how, code, words of the message or None for a right one) of each answer in a file."
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = re.split(r"^# (right|wrong) (\w+): (.*)\n", text, flags=re.M)[1:]
    for kind, exercise, title, code in zip(*[iter(parts)] * 4):
        how, _, words = title.partition(" -> ")
        if bool(words) != (kind == "wrong"):
            sys.exit(f"{path.name}, {title}: a wrong answer has a message, a right one has none")
        yield exercise, how, code, words or None


def wrong_table(paths):
    "Two typical wrong answers to each exercise, and what their authors read."
    rows = ["| Lab | Exercise | What is written | What the message says |", "|---|---|---|---|"]
    for path in paths:
        lab, seen = path.stem.split("_")[0], {}
        for exercise, how, _, words in read_answers(ROOT.parent / f"tests/lab_answers/{lab}.py"):
            seen[exercise] = seen.get(exercise, 0) + (words is not None)
            if words and seen[exercise] <= 2:
                rows.append(f"| {lab[3:]} | `{exercise}` | {how} | ... {words} ... |")
    return "\n".join(rows)


def between(text, mark, new):
    "The text with what stands between the comments `<!-- MARK -->` and `<!-- /MARK -->` replaced."
    return re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda m: f"{m[1]}\n{new}\n\n{m[2]}",
        text,
        flags=re.S,
    )


TIMES = ROOT / "instructor/times.json"


def read_times():
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}


def wanted():
    "Every generated file, as {path: text}."
    paths = sorted((ROOT / "instructor").glob("*.ipynb"))
    sources = {p: instructor(p) for p in paths}
    readme, guide = ROOT / "README.md", ROOT / "INSTRUCTOR.md"
    told = between(guide.read_text(encoding="utf-8"), "times", times_table(read_times()))
    return {
        **sources,
        **{ROOT / p.name: student(p, text) for p, text in sources.items()},
        readme: between(readme.read_text(encoding="utf-8"), "labs", table(sources)),
        guide: between(told, "wrong", wrong_table(paths)),
    }


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true", help="write nothing, fail if a file differs")
    p.add_argument("--with-solutions", metavar="FOLDER", help="write self-study versions there")
    p.add_argument(
        "--times", nargs="*", metavar="LAB", help="run these labs, or all, and keep times"
    )
    a = p.parse_args(argv)
    if a.times is not None:
        for path in sorted((ROOT / "instructor").glob("*.ipynb")):
            if not a.times or path.stem in a.times:
                new = {**read_times(), path.stem: measure(path)}
                TIMES.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                print(path.stem, new[path.stem], flush=True)
    paths = sorted((ROOT / "instructor").glob("*.ipynb"))
    if a.with_solutions:
        folder = Path(a.with_solutions)
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            out = folder / path.name
            out.write_text(student(path, instructor(path), solutions=True), encoding="utf-8")
        return print(f"labs: wrote {len(paths)} with folded solutions to {folder}")
    stale = []
    for path, text in wanted().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not a.check:
            path.write_text(text, encoding="utf-8")
    if a.check and stale:
        sys.exit(
            f"not in step with tutorials/instructor: {', '.join(stale)}; run python tools/make_labs.py"
        )
    print("labs:", f"wrote {', '.join(stale)}" if stale else "in step")
    found = [f for path in paths for f in faults(path)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()

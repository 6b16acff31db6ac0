#!/usr/bin/env python3
"""Make the students' labs from the instructor's.   make_labs.py [--check]

`tutorials/instructor/NAME.ipynb` holds each lab with its solutions and hidden tests (nbgrader format); nbgrader's own
preprocessors, with the settings of `nbgrader_config.py` there, strip both into `tutorials/NAME.ipynb`. With --check nothing is
written and the exit code is 1 if a student's lab differs."""

import json, sys
from pathlib import Path
import nbformat
from nbgrader.preprocessors import ClearHiddenTests, ClearOutput, ClearSolutions, LockCells
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).resolve().parent.parent / "tutorials"
STEPS = (ClearSolutions, ClearOutput, LockCells, ClearHiddenTests)
REGIONS = ("SOLUTION", "HIDDEN TESTS")


def check_marks(nb, name):
    "Stop unless each BEGIN has its END: nbgrader drops an END that is alone, and shows the rest."
    for i, c in enumerate(nb.cells):
        for region in REGIONS:
            begins, ends = [c.source.count(f"### {word} {region}") for word in ("BEGIN", "END")]
            if begins != ends or begins + ends != c.source.count(region):
                sys.exit(
                    f"{name}, cell {i}: ### BEGIN {region} and ### END {region} do not pair up"
                )


def student(path):
    "Text of the student's version of an instructor's lab."
    nb = nbformat.read(path, 4)
    check_marks(nb, path.name)
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT / "instructor")).load_config()
    for step in STEPS:
        nb, _ = step(config=config).preprocess(nb, {})
    nb.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
    }
    for c in nb.cells:
        c.source = c.source.splitlines(keepends=True)
    return (
        json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    )  # as nbdev-clean would leave it


def main(check):
    stale = []
    for src in sorted((ROOT / "instructor").glob("*.ipynb")):
        out, text = ROOT / src.name, student(src)
        if out.exists() and out.read_text(encoding="utf-8") == text:
            continue
        stale.append(out.name)
        if not check:
            out.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(
            f"not in step with tutorials/instructor: {', '.join(stale)}; run python tools/make_labs.py"
        )
    print("labs:", "in step" if not stale else f"wrote {', '.join(stale)}")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])

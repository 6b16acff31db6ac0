#!/usr/bin/env python3
"""Generate README.md from nbs/index.ipynb with its stored outputs.   make_readme.py [--check]

With --check nothing is written and the exit code is 1 if README.md differs. (`nbdev-readme` needs Quarto, which is not on PyPI.)"""

import difflib, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
HEADER = "<!-- Generated from nbs/index.ipynb by `python tools/make_readme.py`; edits here are lost. -->\n\n"


def visible(nb):
    "The notebook without hidden cells and without nbdev's directive lines."
    cells = []
    for c in nb.cells:
        if c.cell_type == "code":
            if re.search(r"^#\|\s*(hide|default_exp)\b", c.source, re.M):
                continue
            c.source = "\n".join(l for l in c.source.splitlines() if not l.startswith("#|")).strip()
        if c.source.strip():
            cells.append(c)
    nb.cells = cells
    return nb


def readme(root=ROOT):
    "The text of README.md."
    text, resources = MarkdownExporter().from_notebook_node(
        visible(nbformat.read(root / "nbs/index.ipynb", 4))
    )
    if resources.get("outputs"):
        raise ValueError("nbs/index.ipynb stores pictures; the README takes text outputs only")
    text = re.sub(r"\]\((?=[\w/]+\.ipynb)", "](nbs/", text).replace(
        "](../", "]("
    )  # links as seen from the root
    return (
        HEADER + re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"
    )


def main(argv, root=ROOT):
    path, new = root / "README.md", readme(root)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if old == new:
        return 0
    if "--check" in argv:
        sys.stdout.writelines(
            difflib.unified_diff(
                old.splitlines(True),
                new.splitlines(True),
                "README.md (now)",
                "README.md (from nbs/index.ipynb)",
            )
        )
        print("README.md is out of step with nbs/index.ipynb; run `python tools/make_readme.py`")
        return 1
    path.write_text(new, encoding="utf-8")
    print("wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

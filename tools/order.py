#!/usr/bin/env python3
"""The order of chapters and lessons, read from the tables in nbs/index.ipynb: the only place where it is written.

    python tools/order.py            write the head of every lesson (title, place, Before and Next) and the overviews' lists
    python tools/order.py --check    write nothing; exit code 1 if a head is out of step

A lesson imports only from earlier lessons (tests/test_order.py); the site's sidebar and the README follow the same tables."""

import json, os, re, sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = "darkdistill_nb"
CHAPTER = re.compile(r"^### (?P<title>.+?) \(`(?P<folder>\w+)`\)\n+(?P<line>[^\n|]+)", re.M)
ROW = re.compile(
    r"^\| \[(?P<title>[^\]]+)\]\((?P<path>[\w/]+\.ipynb)\) \| `(?P<module>[\w.]+)` "
    r"\| (?P<minutes>\d+) \| (?P<line>.+?) \|$",
    re.M,
)
MAX_TITLE = 30


@dataclass(frozen=True)
class Lesson:
    "One row of the tables."

    title: str
    path: str  # below nbs/
    module: str  # below the package
    minutes: int  # to read
    line: str  # what it teaches
    chapter: str  # title of its chapter
    number: int  # within its chapter, from 1
    of: int  # lessons in its chapter


@dataclass(frozen=True)
class Chapter:
    "One section of tables, with its lessons in order."

    title: str
    folder: str
    line: str
    lessons: tuple


def source(cell):
    return "".join(cell["source"])


def index_text(root=ROOT):
    "All prose of the index notebook."
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")


def chapters(root=ROOT):
    "The chapters in order."
    text = index_text(root)
    heads = list(CHAPTER.finditer(text))
    ends = [h.start() for h in heads[1:]] + [len(text)]
    found = []
    for head, end in zip(heads, ends):
        rows = list(ROW.finditer(text, head.end(), end))
        own = tuple(
            Lesson(
                r["title"],
                r["path"],
                r["module"],
                int(r["minutes"]),
                r["line"],
                head["title"],
                n,
                len(rows),
            )
            for n, r in enumerate(rows, 1)
        )
        found.append(Chapter(head["title"], head["folder"], head["line"].strip(), own))
    return found


def lessons(root=ROOT):
    "All lessons in order."
    return [lesson for c in chapters(root) for lesson in c.lessons]


def link(lesson, here):
    "A link to `lesson` from a notebook at `here`."
    return f"[{lesson.title}]({os.path.relpath(lesson.path, Path(here).parent)})"


def place(lesson, before, after):
    "The lines that say where a reader is."
    run = f"**Chapter** {lesson.chapter}, lesson {lesson.number} of {lesson.of}. **Time**: {lesson.minutes} min to read."
    before = link(before, lesson.path) if before else "nothing"
    after = link(after, lesson.path) if after else "your own experiments"
    return f"{run}\n**Before**: {before}. **Next**: {after}."


def head(text, lesson, before, after):
    "The first cell of a lesson, brought in step: its title, the second line of its summary, and its place."
    lines = text.split("\n")
    quote = [l for l in lines if l.startswith("> ")]
    body = "\n".join(lines[lines.index(quote[-1]) + 1 :])
    body = re.sub(r"^\*\*Chapter\*\* .*\n\*\*Before\*\*: .*$", "", body, flags=re.M).strip("\n")
    line = lesson.line[0].upper() + lesson.line[1:].rstrip(".") + "."
    summary = f"{quote[0]}\n> {line}"
    parts = [f"# {lesson.title}", summary, place(lesson, before, after), body]
    return "\n\n".join(parts).rstrip("\n")


LIST = "## The lessons of this chapter"


def contents(chapter):
    "The list of lessons in a chapter's overview."
    rows = [
        f"{l.number}. {link(l, chapter.folder + '/x')} ({l.minutes} min): {l.line}"
        for l in chapter.lessons
    ]
    return "\n".join([LIST, "", *rows])


def bring_in_step(path, find, change, check):
    "Change the first cell of a notebook that `find` accepts; True if it was out of step."
    nb = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if find(source(c)))
    old = source(cell)
    new = change(old)
    if new != old and not check:
        cell["source"] = new.splitlines(keepends=True)
        text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
    return new != old


def main(check, root=ROOT):
    order, stale = lessons(root), []
    for before, lesson, after in zip([None, *order], order, [*order[1:], None]):
        path = root / "nbs" / lesson.path
        if bring_in_step(path, bool, lambda old: head(old, lesson, before, after), check):
            stale.append(lesson.path)
    for c in chapters(root):
        path = root / "nbs" / c.folder / "overview.ipynb"
        if bring_in_step(path, lambda s: s.startswith(LIST), lambda old: contents(c), check):
            stale.append(f"{c.folder}/overview.ipynb")
    if check and stale:
        sys.exit(f"not in step with nbs/index.ipynb: {', '.join(stale)}; run python tools/order.py")
    print("order:", f"{len(order)} lessons in step" if not stale else f"wrote {', '.join(stale)}")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])

#!/usr/bin/env python3
"""Build the documentation site from the notebooks and their stored outputs, without a network.   build_docs.py [OUT_DIR]

The pages of lessons are copies of nbs/*.ipynb without hidden cells and nbdev directives; plotly figures become data that one
script draws in the width of the column with the plotly.min.js of the installed plotly, equations are drawn by the KaTeX inside
sphinxcontrib-katex. The students' labs lie beside them in labs/. Welcome, landing pages, how-tos and troubleshooting are written
in docs/pages; a comment `<!-- NAME -->` there is replaced by what `FILLED[NAME]` makes of the notebooks. Warnings are errors.
The site lies in docs/_build/html unless OUT_DIR is given; open its index.html."""

import ast, importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path
import nbformat

from make_readme import ROOT, visible
from order import chapters, index_text, link
from order import lessons as all_lessons
from sync_settings import docs_home, settings

sys.path.insert(0, str(ROOT))
from darkdistill_nb.app.pages import MIME, page_fragment, page_script
from darkdistill_nb.experiments.report import DRAW_JS, figure_html

DOCS, SRC, LIB = ROOT / "docs", ROOT / "docs/_src", ROOT / "darkdistill_nb"
PAGES, LABS = DOCS / "pages", ROOT / "tutorials"
HOME = docs_home(settings())  # where the site is read: a lab's links lead there
MAP = "map.ipynb"  # what nbs/index.ipynb is called on the site, whose index is the welcome
PLOTLY = "application/vnd.plotly.v1+json"


def to_top(place):
    "From the page at `place`, a path below the top of the site, to the top."
    return "../" * (len(Path(place).parents) - 1)


def links(text, place):
    "Links as seen from the site, where the folder nbs is the top: what lies beside it, such as CONTRIBUTING.md, is there too."
    top = to_top(place)
    text = re.sub(rf"\]\({re.escape(HOME)}([\w/]+)\.html", rf"]({top}\1.ipynb", text)
    text = text.replace(f"](../{top}", f"]({top}").replace("](nbs/", "](")
    text = text.replace(f"]({top}nbs/", f"]({top}").replace(f"]({top}tutorials/", f"]({top}labs/")
    return re.sub(r"\]\(((?:\.\./)*)index\.ipynb", rf"](\1{MAP}", text)


def scripts(place):
    "What a page with figures needs, once."
    names = ("plotly.min.js", "figures.js", "explorers.js")
    return "".join(f'<script defer src="{to_top(place)}_static/{n}"></script>' for n in names)


def drawn(data, name):
    "A plotly figure or an explorer, stored by a notebook, as HTML; None for other outputs."
    spec = data.get(PLOTLY)
    if spec is None:
        return None
    explorer = data.get(MIME)
    return page_fragment({**explorer, "figure": spec}) if explorer else figure_html(spec, name)


def page(path, place):
    "The notebook of the page at `place`: hidden cells and directives dropped, figures turned into HTML."
    nb, n = visible(nbformat.read(path, 4)), 0
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.source = links(c.source, place)
        for o in c.get("outputs", []):
            text = drawn(o.get("data", {}), f"figure-{n + 1}")
            if text is not None:
                n += 1
                o["data"] = {"text/html": scripts(place) * (n == 1) + text}
    if place == MAP:  # the welcome has the name of the project
        nb.cells[0].source = nb.cells[0].source.replace("# darkdistill_nb", "# All lessons", 1)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata["kernelspec"] = kernel
    return nb


# ---------------------------------------------------------------- API


def signature(node):
    "`name(arguments)` of a function or class as it is called, without annotations."
    fn = (
        node
        if isinstance(node, ast.FunctionDef)
        else next(
            (b for b in node.body if isinstance(b, ast.FunctionDef) and b.name == "__init__"), None
        )
    )
    if fn is None:
        return node.name
    args = ast.parse(ast.unparse(fn.args).join(("def f(", "): pass"))).body[0].args
    for a in (
        *args.posonlyargs,
        *args.args,
        *args.kwonlyargs,
        *(x for x in (args.vararg, args.kwarg) if x),
    ):
        a.annotation = None
    if fn is not node:
        args.args = args.args[1:]
    return f"{node.name}({ast.unparse(args)})"


def api(chapter):
    "Every public function and class of a chapter with its one-line description, each module linked to the page that builds it."
    rows = [f"# {chapter.title}: API", "", chapter.line, ""]
    for lesson in chapter.lessons:
        rows += [
            f"## `darkdistill_nb.{lesson.module}`",
            "",
            f"Built in [{lesson.title}](../{lesson.path}).",
            "",
        ]
        file = LIB / f"{lesson.module.replace('.', '/')}.py"
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if isinstance(node, ast.FunctionDef) and any(
                    "patch" in ast.unparse(d) for d in node.decorator_list
                ):
                    node.name = f"{ast.unparse(node.args.args[0].annotation or ast.Constant('self'))}.{node.name}"
                    node.args.args = node.args.args[1:]
                rows += [f"`{signature(node)}`", f": {ast.get_docstring(node) or ''}", ""]
    return "\n".join(rows)


def api_page(chapter):
    return f"api/{chapter.folder.split('_')[1]}"


def reference():
    "The list of the chapters' API pages."
    rows = ["# API by chapter", ""]
    rows += ["Public names by module; a lesson explains, shows and tests each of them.", ""]
    rows += [f"* [{c.title}]({api_page(c)}.md): {c.line}" for c in chapters()]
    tree = toctree("", [f"{c.title} <{api_page(c)}>" for c in chapters()])
    return "\n".join([*rows, "", tree.replace(":caption: \n", "")])


# ---------------------------------------------------------------- landing pages


def labs():
    "The students' labs in order, as (path, first cell)."
    paths = sorted(LABS.glob("*.ipynb"))
    return [(p, nbformat.read(p, 4).cells[0].source) for p in paths]


BESIDE = {  # lab -> lessons that explain its ideas
    "lab01": ["federated.method", "federated.engine"],
    "lab02": ["distill.losses"],
    "lab03": ["distill.latent", "experiments.latent_results"],
    "lab04": ["exits.scores", "exits.inference", "exits.evaluation", "exits.guarantees"],
    "lab05": ["core.scenes", "federated.difficulty"],
    "lab06": ["federated.alignment", "federated.calibration"],
    "lab07": ["federated.generator", "federated.darkdistill"],
    "lab08": ["experiments.against"],
    "lab09": ["distree.students", "distree.policies", "distree.budgets", "distree.simulator"],
}


def title_of(head):
    return head.split("\n")[0].removeprefix("# ")


def lessons_beside(path, place):
    "Links from a page to the lessons that explain a lab's ideas."
    found = {l.module: l for l in all_lessons()}
    return ", ".join(link(found[m], place) for m in BESIDE.get(path.stem.split("_")[0], ()))


def labs_beside(module, place):
    "Links from a page to the labs that practise a lesson's ideas."
    found = [(p, h) for p, h in labs() if module in BESIDE.get(p.stem.split("_")[0], ())]
    return ", ".join(f"[{title_of(h)}]({to_top(place)}labs/{p.name})" for p, h in found)


def labs_table(place):
    "Labs with their minutes, what they are for, and the lessons beside them."
    rows = ["| Lab | Minutes | What for | Lessons beside it |", "|---|---|---|---|"]
    for path, head in labs():
        why = re.search(r"^> (.*)", head, re.M)[1]
        minutes = re.search(r"\*\*Time\*\*: (\d+)", head)[1]
        name = f"[{title_of(head)}]({to_top(place)}labs/{path.name})"
        rows.append(f"| {name} | {minutes} | {why} | {lessons_beside(path, place)} |")
    return "\n".join(rows)


def with_neighbours(nb, path, place):
    "The page with a line under its head that leads from a lesson to its labs, or from a lab to its lessons."
    if path.parent == LABS:
        found, word = lessons_beside(path, place), "Lessons beside this lab"
    else:
        modules = {l.path: l.module for l in all_lessons()}
        found, word = labs_beside(modules.get(place), place), "Practise it"
    if found:
        nb.cells[0].source += f"\n\n**{word}**: {found}."
    return nb


def reading_paths(place):
    "The ways through the lessons that nbs/index.ipynb names."
    text = index_text().split("## Three ways through")[1].split("\n## ")[0].strip()
    return text.replace("](", f"]({to_top(place)}")


def explorer(place, notebook):
    "The first explorer of a lesson, as its notebook stores it."
    nb = nbformat.read(ROOT / "nbs" / notebook, 4)
    stored = [
        o["data"] for c in nb.cells for o in c.get("outputs", []) if MIME in o.get("data", {})
    ]
    return f"{scripts(place)}\n{drawn(stored[0], 'explorer')}"


def claims(place):
    "Figure and tables of the lesson on every claim, with its headings."
    nb, parts, title = nbformat.read(ROOT / "nbs/5_experiments/results.ipynb", 4), [], ""
    for c in nb.cells:
        if c.cell_type == "markdown" and (found := re.match(r"### (.*)", c.source)):
            title = f"## {found[1]}"
        for o in c.get("outputs", []):
            data = o.get("data", {})
            if PLOTLY in data:
                parts.append(f"{scripts(place)}\n{drawn(data, 'claims')}")
            if "text/markdown" in data:
                parts.append(f"{title}\n\n{data['text/markdown']}")
    return "\n\n".join(parts)


def colab(place):
    "What the last run of tools/colab_shadow.py found."
    found = json.loads((DOCS / "colab_shadow.json").read_text(encoding="utf-8"))
    there = ", ".join(f"{k} {v}" for k, v in found["colab"].items())
    ran = ", ".join(f"{k} in {v:.0f} s" for k, v in found["labs"].items())
    rows = {
        "looked at": f"{found['day']}, Python {found['python']}, {there}",
        "pip would install": ", ".join(found["installs"]),
        "for lab 9": ", ".join(found["installs_with_simulator"]),
        "would be replaced": ", ".join(found["changed"]) or "nothing",
        "labs that ran": ran,
    }
    return "\n".join(f"* **{k}**: {v}" for k, v in rows.items())


FILLED = dict(labs=labs_table, paths=reading_paths, explorer=explorer, claims=claims, colab=colab)


def written(path):
    "A page of docs/pages with its comments filled."
    place = path.relative_to(PAGES)

    def fill(m):
        return FILLED[m[1]](place, *m[2].split())

    text = path.read_text(encoding="utf-8")
    return re.sub(r"^<!-- (\w+)(.*?) -->$", fill, text, flags=re.M)


# ---------------------------------------------------------------- site


def toctree(caption, rows):
    "A part of the sidebar; `rows`: lines `title <page>`."
    return "\n".join(
        ["```{toctree}", ":hidden:", f":caption: {caption}", ":maxdepth: 1", "", *rows, "```"]
    )


def sidebar():
    "Landing pages, how-tos, labs, chapters with their lessons in the order of nbs/index.ipynb, and what one looks up."
    begin = ("Students <students>", "Those who teach <instructors>", "Researchers <researchers>")
    how = ("data", "network", "method")
    parts = [
        toctree("Begin", [*begin, f"All lessons <{MAP.removesuffix('.ipynb')}>"]),
        toctree(
            "How to",
            [f"Your own {n} <howto/{n}>" for n in how]
            + ["Several machines <howto/machines>", "Troubleshooting <troubleshooting>"],
        ),
        toctree("Labs", [f"{title_of(h)} <labs/{p.stem}>" for p, h in labs()]),
    ]
    for c in chapters():
        rows = [f"{l.title} <{l.path.removesuffix('.ipynb')}>" for l in c.lessons]
        parts.append(toctree(c.title, [f"Overview <{c.folder}/overview>", *rows]))
    about = ["Results <results>", "Glossary <glossary>", "API by chapter <reference>"]
    about += ["Guide for instructors <labs/INSTRUCTOR>", "How to write a lab <labs/writing>"]
    about += ["Contributing <CONTRIBUTING>", "Changelog <CHANGELOG>"]
    parts.append(toctree("Look up", about))
    return "\n\n".join(parts)


def notebooks():
    "Notebooks of the site, as {place: path}."
    nbs = ROOT / "nbs"
    found = {p.relative_to(nbs).as_posix(): p for p in sorted(nbs.glob("[0-9]_*/*.ipynb"))}
    found |= {p.name: p for p in sorted(nbs.glob("*.ipynb"))}
    found[MAP] = found.pop("index.ipynb")
    return found | {f"labs/{p.name}": p for p in sorted(LABS.glob("*.ipynb"))}


def texts():
    "Pages of text, as {place: Markdown}."
    found = {p.relative_to(PAGES).as_posix(): written(p) for p in sorted(PAGES.rglob("*.md"))}
    found["index.md"] += "\n" + sidebar() + "\n"
    found["reference.md"] = reference()
    found |= {f"{api_page(c)}.md": api(c) for c in chapters()}
    guide, writing = LABS / "INSTRUCTOR.md", LABS / "instructor/README.md"
    own = guide.read_text(encoding="utf-8").replace("(instructor/README.md)", "(writing.md)")
    found["labs/INSTRUCTOR.md"] = own
    own = writing.read_text(encoding="utf-8").replace("(../INSTRUCTOR.md)", "(INSTRUCTOR.md)")
    found["labs/writing.md"] = own
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        found[name] = (ROOT / name).read_text(encoding="utf-8")
    return found


def prepare():
    "Write the pages and the scripts that they need into docs/_src."
    shutil.rmtree(SRC, ignore_errors=True)
    (SRC / "_static").mkdir(parents=True)
    for place, path in notebooks().items():
        (SRC / place).parent.mkdir(exist_ok=True)
        nbformat.write(with_neighbours(page(path, place), path, place), SRC / place)
    for place, text in texts().items():
        (SRC / place).parent.mkdir(exist_ok=True)
        (SRC / place).write_text(text, encoding="utf-8")
    site = {
        m: Path(importlib.util.find_spec(m).origin).parent
        for m in ("plotly", "sphinxcontrib.katex")
    }
    shutil.copy(site["plotly"] / "package_data/plotly.min.js", SRC / "_static")
    (SRC / "_static/figures.js").write_text(DRAW_JS, encoding="utf-8")
    (SRC / "_static/explorers.js").write_text(page_script(), encoding="utf-8")
    shutil.copy(site["sphinxcontrib.katex"] / "katex.min.js", SRC / "_static")
    for name in ("LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, SRC / name)


def external(out):
    "Scripts, styles and pictures that a page would fetch from the network."
    load = re.compile(
        r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//[^\s>]+"
        r"|<link[^>]+rel=[\"']?(?:stylesheet|preload)[^>]+href=[\"']?(?:https?:)?//[^\s>]+"
    )
    return [
        f"{p.name}: {m[0]}"
        for p in sorted(out.rglob("*.html"))
        for m in load.finditer(p.read_text(encoding="utf-8"))
    ]


def main(argv):
    out = Path(argv[0]) if argv else DOCS / "_build/html"
    prepare()
    shutil.rmtree(out, ignore_errors=True)
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "html",
            "-d",
            str(out) + ".doctrees",
            "-c",
            str(DOCS),
            str(SRC),
            str(out),
        ]
    )
    shutil.rmtree(str(out) + ".doctrees", ignore_errors=True)
    if r.returncode:
        return r.returncode
    if found := external(out):
        print("the site is not self-contained:", *found, sep="\n  ")
        return 1
    print(f"{len(list(out.rglob('*.html')))} pages; open {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Build the documentation site from the notebooks and their stored outputs, without a network.   build_docs.py [OUT_DIR]

The pages are copies of nbs/*.ipynb without hidden cells and nbdev directives; plotly figures become data that one script
draws in the width of the column with the plotly.min.js of the installed plotly, equations are drawn by the KaTeX inside
sphinxcontrib-katex. Warnings are errors.
The site lies in docs/_build/html unless OUT_DIR is given; open its index.html."""

import ast, importlib.util, re, shutil, subprocess, sys
from pathlib import Path
import nbformat

from make_readme import ROOT, visible
from order import chapters, lessons

sys.path.insert(0, str(ROOT))
from darkdistill_nb.app.pages import MIME, page_fragment, page_script
from darkdistill_nb.experiments.report import DRAW_JS, figure_html

DOCS, SRC, LIB = ROOT / "docs", ROOT / "docs/_src", ROOT / "darkdistill_nb"
PLOTLY = "application/vnd.plotly.v1+json"


def to_top(path):
    "From the page of a notebook to the top of the site."
    return "../" * (len(path.relative_to(ROOT / "nbs").parents) - 1)


def links(text, path):
    "Links as seen from the site, where the folder nbs is the top: what lies beside it, such as CONTRIBUTING.md, is there too."
    top = to_top(path)
    return text.replace(f"](../{top}", f"]({top}").replace("](nbs/", "](")


def page(path):
    "The notebook of one page: hidden cells and directives dropped, figures turned into HTML."
    nb = visible(nbformat.read(path, 4))
    scripts = "".join(
        f'<script defer src="{to_top(path)}_static/{name}"></script>'
        for name in ("plotly.min.js", "figures.js", "explorers.js")
    )
    drawn = 0
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.source = links(c.source, path)
        for o in c.get("outputs", []):
            spec = o.get("data", {}).get(PLOTLY)
            if spec is None:
                continue
            drawn += 1
            explorer = o["data"].get(MIME)
            text = (
                page_fragment({**explorer, "figure": spec})
                if explorer
                else figure_html(spec, f"figure-{drawn}")
            )
            o["data"] = {"text/html": scripts * (drawn == 1) + text}
    nb.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    return nb


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


def api(order):
    "Every public function and class with its one-line description, by module, each linked to the page that builds it."
    rows = [
        "# Reference",
        "",
        "All public names by module. The page of a module explains, shows and tests each of them.",
        "",
    ]
    for lesson in order:
        rows += [
            f"## `darkdistill_nb.{lesson.module}`",
            "",
            f"Built in [{lesson.title}]({lesson.path}).",
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


def toctree(caption, rows):
    "A part of the sidebar; `rows`: lines `title <page>`."
    return "\n".join(
        ["```{toctree}", ":hidden:", f":caption: {caption}", ":maxdepth: 1", "", *rows, "```"]
    )


def sidebar():
    "Chapters with their lessons in the order of nbs/index.ipynb, then what is about the project."
    parts = []
    for c in chapters():
        rows = [f"{l.title} <{l.path.removesuffix('.ipynb')}>" for l in c.lessons]
        parts.append(toctree(c.title, [f"Overview <{c.folder}/overview>", *rows]))
    about = ("glossary", "reference", "CONTRIBUTING", "CHANGELOG")
    parts.append(toctree("Reference", [f"{name.capitalize()} <{name}>" for name in about]))
    return "\n\n".join(parts)


def prepare():
    "Write the pages and the two scripts that they need into docs/_src."
    shutil.rmtree(SRC, ignore_errors=True)
    (SRC / "_static").mkdir(parents=True)
    found = {p: page(p) for p in sorted((ROOT / "nbs").glob("[0-9]_*/*.ipynb"))}
    found |= {p: page(p) for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
    side = nbformat.v4.new_markdown_cell(sidebar(), id="toctree")
    found[ROOT / "nbs/index.ipynb"].cells.append(side)
    for path, nb in found.items():
        target = SRC / path.relative_to(ROOT / "nbs")
        target.parent.mkdir(exist_ok=True)
        nbformat.write(nb, target)
    (SRC / "reference.md").write_text(api(lessons()), encoding="utf-8")
    site = {
        m: Path(importlib.util.find_spec(m).origin).parent
        for m in ("plotly", "sphinxcontrib.katex")
    }
    shutil.copy(site["plotly"] / "package_data/plotly.min.js", SRC / "_static")
    (SRC / "_static/figures.js").write_text(DRAW_JS, encoding="utf-8")
    (SRC / "_static/explorers.js").write_text(page_script(), encoding="utf-8")
    shutil.copy(site["sphinxcontrib.katex"] / "katex.min.js", SRC / "_static")
    for name in ("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
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

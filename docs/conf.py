"""Sphinx configuration; `python tools/build_docs.py` prepares the pages in docs/_src and runs Sphinx on them."""
import configparser, re
from pathlib import Path
from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
ini = configparser.ConfigParser(interpolation=None)
ini.read(ROOT / "settings.ini", encoding="utf-8")
s = ini["DEFAULT"]

project, release, author = s["lib_name"], s["version"], s["author"]
copyright = s["author"]
extensions = ["myst_nb"]
nb_execution_mode = "off"  # pages show the outputs that the notebooks store
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence", "html_image"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook may go from H2 to H4 for a long explanation
html_theme = "sphinx_book_theme"
html_title = s["lib_name"]
html_static_path = ["_static", "_src/_static"]  # ours, and what build_docs.py has put beside the pages
html_css_files = ["site.css"]
html_js_files = ["katex.min.js", "math.js"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
html_math_renderer = "katex_mathml"


def math(display):
    "Visitor that writes an equation as escaped TeX; `_static/math.js` turns it into MathML, which browsers show without fonts or style sheets."
    def visit(self, node):
        tag = "div" if display else "span"
        self.body.append(self.starttag(node, tag, "", CLASS="tex-display" if display else "tex") + self.encode(node.astext()) + f"</{tag}>")
        raise nodes.SkipNode
    return visit


def scopes(app, pagename, templatename, context, doctree):
    "Every heading of a table says what it heads: a column in the first rows, a row elsewhere."
    def heads(part, scope): return re.sub(r"<th(?=[\s>])(?![^>]*\bscope=)", f'<th scope="{scope}"', part)
    parts = re.split(r"(<thead.*?</thead>)", context.get("body", ""), flags=re.S)
    context["body"] = "".join(heads(p, "col" if p.startswith("<thead") else "row") for p in parts)


def setup(app):
    app.connect("html-page-context", scopes)
    app.add_html_math_renderer("katex_mathml", inline_renderers=(math(False), None), block_renderers=(math(True), None))
    return {"parallel_read_safe": True}

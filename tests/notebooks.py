"""Notebooks as the tests read them: cells, what goes to the library, and the code without IPython's magics."""

import ast, json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = "darkdistill_nb"


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def is_code(cell):
    return cell["cell_type"] == "code"


def has_directive(cell, pattern):
    return is_code(cell) and re.search(rf"^#\|\s*{pattern}\b", source(cell), re.M) is not None


def is_export(cell):
    return has_directive(cell, "exports?")  # public definitions


def goes_to_library(cell):
    return has_directive(cell, "export[si]?")  # also private helpers, `#| exporti`


def code_of(cell):
    "Code of a cell, IPython magics removed."
    return "\n".join(l for l in source(cell).splitlines() if not re.match(r"\s*[%!]", l))


def tree_of(cell):
    "Syntax tree of a code cell."
    return ast.parse(code_of(cell))


def default_exp(path):
    "Name of the module that a notebook exports to."
    found = [
        m[1]
        for c in cells(path)
        if is_code(c)
        for m in [re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)]
        if m
    ]
    assert len(found) == 1, f"{path.name}: {len(found)} default_exp cells"
    return found[0]


def module_file(module):
    "File of a module whose name is given below the package."
    return ROOT / LIB / f"{module.replace('.', '/')}.py"

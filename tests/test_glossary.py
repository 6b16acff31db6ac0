"""The glossary names what is there: every name can be imported as it is written, every link leads to a lesson."""

import importlib, re
from notebooks import ROOT, cells, source

PAGE = ROOT / "nbs/glossary.ipynb"
ROW = re.compile(
    r"^\| \[(?P<term>[^\]]+)\]\((?P<link>[^)]+)\) \| ?(?P<symbol>[^|]*?) ?\| (?P<text>.+?) \| (?:`(?P<name>[\w.]+)`)? ?\|$",
    re.M,
)


def text():
    return "\n".join(map(source, cells(PAGE)))


def rows():
    return list(ROW.finditer(text()))


def test_every_row_is_read():
    assert len(rows()) == sum(l.startswith("| [") for l in text().splitlines()) > 35


def test_names_can_be_imported_as_written():
    for row in rows():
        if row["name"]:
            chapter, name = row["name"].split(".")
            assert hasattr(importlib.import_module(f"darkdistill_nb.{chapter}"), name), (
                f"{row['term']}: {row['name']}"
            )


def test_links_lead_to_lessons():
    for row in rows():
        assert (PAGE.parent / row["link"]).is_file(), f"{row['term']}: {row['link']}"


def test_terms_are_explained_once():
    terms = [row["term"] for row in rows()]
    assert len(set(terms)) == len(terms)

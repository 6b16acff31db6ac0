"""The how-tos and the troubleshooting page of the site: their code runs as it stands there, and the messages are those of the code."""

import re, shlex, sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from darkdistill_nb.app import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs/pages"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    "(language, code) of each fenced block that is meant to be run."
    return BLOCK.findall((PAGES / "howto" / f"{page}.md").read_text(encoding="utf-8"))


def run_page(page, names):
    "Run a page from top to bottom in the current folder; Python in `names`, commands through the command line."
    for language, code in blocks(page):
        if language == "python" and (file := re.match(r"# file: (\S+)\n", code)):
            Path(file[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, page, "exec"), names)
        for line in code.splitlines() if language == "sh" else ():
            word, *argv = line.split()
            assert word == "darkdistill" and cli.main(argv) == 0, line


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to work in, also for imports."
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_every_howto_has_code_that_is_run():
    for path in sorted((PAGES / "howto").glob("*.md")):
        languages = [language for language, _ in blocks(path.stem)]
        assert languages.count("python") >= 2, path.name
        assert set(languages) <= {"python", "sh"}, path.name


def test_howto_code_fits_the_page():
    for path in sorted((PAGES / "howto").glob("*.md")):
        wide = [l for kind, code in blocks(path.stem) for l in code.splitlines() if len(l) > 110]
        assert not wide, (path.name, wide)


@pytest.mark.slow
def test_own_data(here):
    names = {}
    for k, name in enumerate(("cat", "dog")):
        (here / "photos" / name).mkdir(parents=True)
        for i in range(2):
            grey = np.full((40, 30), 60 * k + i, np.uint8)
            Image.fromarray(grey).save(here / "photos" / name / f"{i}.png")
    run_page("data", names)
    assert len(names["train"]) == 1400 and list(here.glob("runs/*/report.html"))
    x, y, classes = names["read_folder"](here / "photos")
    assert x.shape == (4, 3, 32, 32) and y.tolist() == [0, 0, 1, 1] and classes == ["cat", "dog"]


@pytest.mark.slow
def test_own_network(here):
    names = {}
    run_page("network", names)
    assert len(names["net"]) == 4 and len(names["thresholds"]) == 4
    assert len(names["run"].log[-1]["accuracy"]) == 4


@pytest.mark.slow
def test_own_method(here, capsys):
    run_page("method", {})
    said = capsys.readouterr().out
    assert "keep=0.5" in said and "share of the old weights" in said
    report = next(here.glob("runs/*/record.json")).read_text(encoding="utf-8")
    assert "mine:Patient" in report


def test_several_machines(here, capsys):
    names = {}
    run_page("machines", names)
    said = capsys.readouterr().out
    assert "eefl 1 all answered" in said and len(names["record"].runs[0]["rounds"]) == 2


def test_commands_for_several_machines_are_understood():
    from darkdistill_nb.experiments.machines import _parser

    page = (PAGES / "howto/machines.md").read_text(encoding="utf-8")
    lines = re.findall(r"^darkdistill flower (.*)$", page, re.M)
    assert [line.split()[0] for line in lines] == ["certificates", "serve", "join", "join", "run"]
    for line in lines:
        _parser().parse_args(shlex.split(line))


OTHERS = {  # what the shell, Python and PyTorch say
    "darkdistill: command not found",
    "operator torchvision::nms does not exist",
    "NameError",
    "2001",  # these are Flower's; see tests/flower
    "2004",
    "CERTIFICATE_VERIFY_FAILED",
    "left_out",
}


def quoted(page="troubleshooting"):
    "What stands in code letters in the first column of a page's tables, such as the troubleshooting page."
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*)\|", text, re.M)
    return [q for row in rows for q in re.findall(r"`([^`]+)`", row) if q not in OTHERS]


def pieces(said):
    "The parts of a message between what differs from case to case."
    parts = re.split(r"\.\.\.(?=$|[;:, ])|git\+https://\S*|\bnan\b|[\d.]+", said)
    return [p.strip() for p in parts if len(p.strip()) > 3]


def our_code():
    "All text of the package and of the set-up cell, with strings that go over two lines joined."
    files = [*(ROOT / "darkdistill_nb").rglob("*.py"), ROOT / "tools/make_labs.py"]
    text = "\n".join(p.read_text(encoding="utf-8") for p in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_troubleshooting_quotes_what_our_code_says():
    code, found = our_code(), quoted() + quoted("howto/machines")
    assert len(found) > 25
    unknown = [p for said in found for p in pieces(said) if p not in code]
    assert not unknown


def test_a_message_that_nobody_says_is_seen():
    assert pieces("Exercise 2 is not done yet") == ["Exercise", "is not done yet"]
    assert (
        pieces("no live view: ...; to_page() works everywhere")[1] == "; to_page() works everywhere"
    )
    assert "this message was made up" not in our_code()

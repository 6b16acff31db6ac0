"""Figures for slides follow from what the labs have stored."""

import json, shutil, subprocess, sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import make_slides


def test_every_figure_of_a_lab_has_a_slide():
    r = subprocess.run(
        [sys.executable, "tools/make_slides.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stderr


def test_a_figure_that_changes_makes_its_slide_stale(tmp_path, monkeypatch):
    for folder in ("tutorials", "assets/slides"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("ROOT", "SLIDES", "INDEX", "GUIDE"):
        place = getattr(make_slides, name).relative_to(ROOT)
        monkeypatch.setattr(make_slides, name, tmp_path / place)
    make_slides.main(["--check"])
    path = tmp_path / "tutorials/instructor/lab04_early_exits.ipynb"
    text = path.read_text(encoding="utf-8")
    assert "The surer, the more often right" in text
    path.write_text(text.replace("The surer, the more often right", "Sure"), encoding="utf-8")
    with pytest.raises(SystemExit, match="lab04_early_exits_2.svg"):
        make_slides.main(["--check"])


@pytest.mark.parametrize("row", json.loads(make_slides.INDEX.read_text()), ids=lambda r: r["file"])
def test_a_slide_is_a_drawing_of_its_size_that_loads_nothing(row):
    text = (make_slides.SLIDES / row["file"]).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert (root.get("width"), root.get("height")) == ("1280", "720")
    assert row["title"].split("<")[0] in "".join(root.itertext())
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(v.startswith(("#", "data:")) for v in links)

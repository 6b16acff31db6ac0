"""Colab: nothing that is there is replaced, by the versions of its image and by the last run of tools/colab_shadow.py."""

import json, sys, tomllib
from pathlib import Path
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from colab_shadow import COLAB, PRESENT


def requirements():
    "What the package requires, by name in lower letters."
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    return {r.name.lower(): r.specifier for r in found}


def last_run():
    return json.loads((ROOT / "docs/colab_shadow.json").read_text(encoding="utf-8"))


def test_every_requirement_is_on_colab():
    "One that is not would be installed there; one whose version is not would replace what is there."
    there = {**COLAB, **dict.fromkeys(map(str.lower, PRESENT))}
    for name, bound in requirements().items():
        assert name in there, f"{name} is not on Colab"
        version = there[name]
        assert version is None or version in bound, f"{name} {version} does not meet {bound}"


def test_the_shadow_installed_only_this_package_and_ran_a_lab():
    found = last_run()
    assert [name.split()[0] for name in found["installs"]] == ["darkdistill-nb"]
    extra = [name.split()[0] for name in found["installs_with_simulator"]]
    assert extra == ["darkdistill-nb", "simpy"] and found["changed"] == []
    assert found["colab"] == COLAB and found["python"].startswith("3.13")
    assert set(map(str.lower, requirements())) <= {*found["colab"], *found["present"]}
    assert found["labs"] and all(seconds > 0 for seconds in found["labs"].values())

"""What a wheel holds, and that assets and tutorials are found wherever pip puts it; nothing is downloaded."""

import json, os, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from pathlib import Path
import pytest
from conftest import LONG

ROOT = Path(__file__).resolve().parent.parent
LIB = "darkdistill_nb"
PARTS = ("pyproject.toml", "README.md", "LICENSE", LIB, "assets", "tutorials")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
LOCAL = ("--no-index", "--no-deps")
HERE = ("--no-build-isolation", *LOCAL)
# without --ignore-installed pip removes this environment's own installation, with --prefix too
INSTALL = ("install", "--ignore-installed")


def call(*args, cwd, **env):
    "Output of a command, in an environment without this checkout; fails with everything it printed."
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONUSERBASE", "PIP_USER")
    }
    r = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


@pytest.fixture(scope="module", autouse=True)
def own_installation():
    "What is installed here is what was installed before these tests."
    found = "import importlib.metadata as m; print(m.distribution('%s').locate_file(''))" % LIB
    before = call(sys.executable, "-c", found, cwd=ROOT.parent)
    yield
    assert call(sys.executable, "-c", found, cwd=ROOT.parent) == before


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A copy of what is packaged, with the instructor's labs beside the students'."
    out = tmp_path_factory.mktemp("source")
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, out / name)
    assert list((out / "tutorials/instructor").glob("*.ipynb"))
    return out


@pytest.fixture(scope="module")
def sdist(source):
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    call(sys.executable, "-c", code, source / "dist", cwd=source)
    return next((source / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    "Built from the source distribution, so both are complete."
    out = tmp_path_factory.mktemp("wheel")
    call(*PIP, "wheel", *HERE, "-w", out, sdist, cwd=out)
    return next(out.glob("*.whl"))


def make_venv(folder, *options):
    "A virtual environment that sees this one's packages, but not this one's darkdistill_nb; returns its Python."
    call(sys.executable, "-m", "venv", "--without-pip", *options, folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    purelib = call(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).strip()
    (Path(purelib) / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


LOOK = f"""
import json, sys
from pathlib import Path
import {LIB}
from {LIB}.app.cli import tutorials
from {LIB}.core.records import asset, load_record, load_tensors
record, tensors = asset("digits_default.json"), asset("distree_digits_3.safetensors")
load_record(record), load_tensors(tensors)
copies = tutorials("mine")
print(json.dumps(dict(package={LIB}.__file__, asset=str(record), copies=sorted(str(p.relative_to(copies)) for p in copies.rglob("*")))))
"""


def look(python, cwd, **env):
    "What an installation finds, asked in a folder of its own."
    cwd.mkdir(parents=True, exist_ok=True)
    return json.loads(call(python, "-c", LOOK, cwd=cwd, **env).splitlines()[-1])


def site_packages(folder):
    "The one folder below `folder` that holds the package."
    found = [p.parent for p in folder.rglob(LIB) if p.is_dir()]
    assert len(found) == 1, found
    return found[0]


STUDENTS = sorted(p.name for p in (ROOT / "tutorials").glob("*.ipynb"))
ASSETS = sorted(  # figures for slides stay in the repository
    p.name for p in (ROOT / "assets").rglob("*") if p.is_file() and p.parent.name != "slides"
)


def members(path):
    "Name -> text of everything in a wheel or a source distribution."
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as z:
            return {n: z.read(n).decode(errors="ignore") for n in z.namelist()}
    with tarfile.open(path) as t:
        return {m.name: t.extractfile(m).read().decode(errors="ignore") for m in t if m.isfile()}


def test_wheel_holds_the_package_its_assets_and_the_students_labs(wheel):
    names = list(members(wheel))
    assert sorted(n.split("/")[-1] for n in names if n.startswith(f"{LIB}/_assets/")) == ASSETS
    assert sorted(n.split("/")[-1] for n in names if n.startswith(f"{LIB}/_tutorials/")) == STUDENTS
    modules = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / LIB).rglob("*.py"))
    assert sorted(n for n in names if n.endswith(".py")) == modules
    assert {f"{LIB}/app/{name}" for name in ("page.js", "page.css", "marks.html")} <= set(names)
    assert {n.split("/")[0] for n in names} <= {
        LIB,
        next(n for n in names if "dist-info" in n).split("/")[0],
    }, "nothing is put beside the package"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_solutions_are_not_shipped(kind, request):
    "Neither the instructor's labs nor a solution is in what students install."
    found = [
        n
        for n, text in members(request.getfixturevalue(kind)).items()
        if "/tests/" not in n
        and (
            "instructor/" in n
            or n.endswith(".ipynb")
            and ("BEGIN SOLUTION" in text or "BEGIN HIDDEN" in text)
        )
    ]
    assert not found, found


@pytest.mark.parametrize(
    "folder, option",
    [
        ("target", "--target"),
        ("usr/local/lib/python3/dist-packages", "--target"),
        ("prefix", "--prefix"),
    ],
    ids=["target", "debian", "prefix"],
)
def test_found_outside_of_sys_prefix(folder, option, wheel, tmp_path):
    "`--target`, Debian's and Colab's dist-packages, `--prefix`: the package is on the path, its share folder is not below sys.prefix."
    call(*PIP, *INSTALL, *LOCAL, option, tmp_path / folder, wheel, cwd=tmp_path)
    site = site_packages(tmp_path / folder)
    (site / "assets").mkdir()  # somebody else's
    got = look(sys.executable, tmp_path / "work", PYTHONPATH=str(site))
    assert Path(got["asset"]).parent == site / LIB / "_assets" and got["copies"] == STUDENTS


def test_found_in_a_virtual_environment(wheel, tmp_path):
    python = make_venv(tmp_path / "venv")
    call(*PIP, "--python", python, *INSTALL, *LOCAL, wheel, cwd=tmp_path)
    got = look(python, tmp_path / "work")
    assert tmp_path / "venv" in Path(got["asset"]).parents and got["copies"] == STUDENTS


def test_found_in_the_folder_of_a_user(wheel, tmp_path):
    "`pip install --user` puts data files below PYTHONUSERBASE."
    python, home = make_venv(tmp_path / "venv", "--system-site-packages"), str(tmp_path / "home")
    call(
        *PIP,
        "--python",
        python,
        *INSTALL,
        "--user",
        *LOCAL,
        wheel,
        cwd=tmp_path,
        PYTHONUSERBASE=home,
    )
    got = look(python, tmp_path / "work", PYTHONUSERBASE=home)
    assert tmp_path / "home" in Path(got["asset"]).parents and got["copies"] == STUDENTS


def test_found_in_an_editable_installation(source, tmp_path):
    "The files of the checkout itself, so that an edited lab is the one that opens."
    python = make_venv(tmp_path / "venv")
    call(*PIP, "--python", python, *INSTALL, *HERE, "-e", source, cwd=tmp_path)
    got = look(python, tmp_path / "work")
    assert Path(got["package"]).parent == source / LIB
    assert Path(got["asset"]).parent == source / "assets" and got["copies"] == STUDENTS


def test_found_in_a_checkout(source, tmp_path):
    "Without an installation, from any folder."
    got = look(sys.executable, tmp_path / "work", PYTHONPATH=str(source))
    assert Path(got["asset"]).parent == source / "assets" and got["copies"] == STUDENTS

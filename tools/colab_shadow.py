#!/usr/bin/env python3
"""A shadow of Google Colab: does installing this package there add nothing else, and do the labs run?

    python tools/colab_shadow.py --python python3.13                  lab 0
    python tools/colab_shadow.py --python python3.13 --labs all       every lab, with its solutions
    python tools/colab_shadow.py --env FOLDER --labs lab04            an environment that was made before, and one more lab

Makes an environment with the versions of `COLAB` (gigabytes, once; it needs a package index), builds the wheel, asks pip what
installing it would add, installs it, and runs labs in it. What was found is kept in docs/colab_shadow.json, which the site shows and
tests/test_colab.py reads. It is a shadow: Colab's own pages, its widget manager and its graphics card are not there."""

import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOUND = ROOT / "docs/colab_shadow.json"

COLAB = dict(  # Colab's image of August 2026, as its list of packages has it
    torch="2.11.0",
    torchvision="0.26.0",
    timm="1.0.28",
    numpy="2.1.3",
    plotly="5.24.1",
    anywidget="0.9.21",
    ipywidgets="7.7.1",
    ipython="7.34.0",
    ipykernel="6.17.1",
    fastcore="2.2.12",
)
# Also there, in a version that we have not read; the newest that fits the ones above is taken.
PRESENT = "scikit-learn scipy safetensors tqdm Jinja2 nbformat networkx nbclient".split()

RUN_LABS = """
import json, sys, time
import nbformat
from nbclient import NotebookClient

for path in sys.argv[1:]:
    nb, start = nbformat.read(path, 4), time.perf_counter()
    NotebookClient(nb, timeout=1800, kernel_name="python3").execute()
    print("lab: " + json.dumps([path, round(time.perf_counter() - start, 1)]), flush=True)
"""


def python_of(env):
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*args, **kwargs):
    "Run a command and return what it printed; ends with its last lines where it fails."
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kwargs)
    if r.returncode:
        sys.exit(f"{' '.join(map(str, args))[:200]}\n{(r.stdout + r.stderr)[-3000:]}")
    return r.stdout


def make(env, python):
    "An environment like Colab's."
    print(f"making {env} with {python}: gigabytes, once", flush=True)
    run(python, "-m", "venv", env)
    pins = [f"{name}=={version}" for name, version in COLAB.items()]
    run(python_of(env), "-m", "pip", "install", "-q", *pins, *PRESENT)


def build(folder):
    "The wheel of this checkout."
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    return next(Path(folder).glob("*.whl"))


def would_install(env, what):
    "Names and versions that pip would add or replace, without doing it."
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "report.json"
        dry = ["install", "-q", "--dry-run", "--report", report, what]
        run(python_of(env), "-m", "pip", *dry)
        rows = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = [
        (r["metadata"]["name"].lower().replace("_", "-"), r["metadata"]["version"]) for r in rows
    ]
    return sorted(f"{name} {version}" for name, version in found)


def versions(env):
    "What is installed, by name in lower letters."
    rows = json.loads(run(python_of(env), "-m", "pip", "list", "--format", "json"))
    return {r["name"].lower(): r["version"] for r in rows}


def run_labs(env, labs, keep):
    "Run instructor's labs, solutions and hidden tests included, in the environment; `keep` gets the seconds of each."
    folder = ROOT / "tutorials/instructor"
    paths = sorted(folder.glob("lab*.ipynb"))
    wanted = [p for p in paths if labs == ["all"] or p.stem.split("_")[0] in labs]
    env_vars = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as cwd:  # not in the checkout: the wheel is what is imported
        for path in wanted:
            out = run(python_of(env), "-c", RUN_LABS, path, cwd=cwd, env=env_vars)
            line = next(l for l in out.splitlines() if l.startswith("lab: "))
            seconds = json.loads(line.removeprefix("lab: "))[1]
            print(path.stem, seconds, "s", flush=True)
            keep(path.stem, seconds)


def earlier(found):
    "Labs that an earlier run has seen with the same versions."
    if not FOUND.exists():
        return {}
    old = json.loads(FOUND.read_text(encoding="utf-8"))
    return old["labs"] if {**old, "day": 0, "labs": 0} == {**found, "day": 0, "labs": 0} else {}


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--python", default=sys.executable, help="the Python of the environment")
    p.add_argument("--env", type=Path, help="its folder; kept [a temporary one, which goes]")
    p.add_argument("--labs", nargs="+", default=["lab00"], metavar="labNN", help="or: all")
    a = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as tmp:
        env = (a.env or Path(tmp) / "colab").absolute()
        if not python_of(env).exists():
            make(env, a.python)
        ours = ("darkdistill-nb", "darkdistill_nb", "simpy")  # what an earlier run has left
        run(python_of(env), "-m", "pip", "uninstall", "-q", "-y", *ours)
        have = versions(env)
        wheel = build(tmp)
        plain = would_install(env, wheel)
        simulator = would_install(env, f"{wheel}[simulator]")
        print("pip would install:", ", ".join(plain), flush=True)
        run(python_of(env), "-m", "pip", "install", "-q", f"{wheel}[simulator]")
        after = versions(env)
        changed = sorted(k for k in have if after.get(k) != have[k])
        found = dict(
            day=time.strftime("%Y-%m-%d"),
            python=run(python_of(env), "--version").split()[1],
            colab={k: have[k] for k in COLAB},
            present={k.lower(): have[k.lower()] for k in PRESENT},
            installs=plain,
            installs_with_simulator=simulator,
            changed=changed,
        )
        found["labs"] = earlier(found)

        def keep(lab, seconds):
            found["labs"] = dict(sorted({**found["labs"], lab: seconds}.items()))
            FOUND.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

        run_labs(env, a.labs, keep)
    print(f"wrote {FOUND.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

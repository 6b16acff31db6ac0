#!/usr/bin/env python3
"""Run every check of the project, in this order, and stop at the first that fails.

    python tools/check.py                       all steps, then a table of their times
    python tools/check.py --keep-going          all steps, also after one that fails
    python tools/check.py --only tests docs     some steps
    python tools/check.py --fast                what changed since the last commit, under a minute
    python tools/check.py --list                what the steps are

The working tree is left as it is: notebooks are cleaned and exported in a copy, which is then compared."""

import argparse, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = os.environ.get("CHECK_LIMIT")  # minutes of one command, for machines that nobody watches


class Failed(Exception):
    pass


def run(*args, cwd=ROOT, **env):
    "Run a command with its output shown; raises `Failed` if it does not end with 0 within LIMIT, if any."
    words = [str(a) for a in args]
    p = subprocess.Popen(words, cwd=cwd, env={**os.environ, **env})
    try:
        code = p.wait(LIMIT and 60 * float(LIMIT))
    except subprocess.TimeoutExpired:
        stop = p.terminate if os.name == "nt" else lambda: p.send_signal(signal.SIGINT)
        stop()  # pytest then says what it has found so far
        try:
            p.wait(60)
        except subprocess.TimeoutExpired:
            p.kill()
        raise Failed(f"`{' '.join(words)}` did not end within {LIMIT} minutes") from None
    if code:
        raise Failed(f"`{' '.join(words)}` ended with exit code {code}")


def script(name):
    "Path of a console script of this Python's environment."
    found = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if not found:
        raise Failed(
            f'{name} is not installed here; run: {sys.executable} -m pip install -c constraints.txt -e ".[dev]"'
        )
    return found


def settings():
    "pyproject.toml and __version__ follow settings.ini"
    run(sys.executable, "tools/sync_settings.py", "--check")


def contents(root, folders=("nbs", "tutorials", "darkdistill_nb")):
    "Every notebook and module below `root`, as {path: bytes}."
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for f in folders
        for p in sorted((root / f).rglob("*"))
        if p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts
    }


def notebooks():
    "notebooks are clean, and the library is what they export"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        for name in ("settings.ini", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tmp)
        for folder in ("nbs", "tutorials", "darkdistill_nb"):
            if (ROOT / folder).exists():
                shutil.copytree(
                    ROOT / folder,
                    tmp / folder,
                    ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
                )
        before = contents(tmp)
        run(script("nbdev-clean"), cwd=tmp)
        if (tmp / "tutorials").exists():
            run(script("nbdev-clean"), "--fname", "tutorials", cwd=tmp)
        run(script("nbdev-export"), cwd=tmp)
        after = contents(tmp)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if changed:
        raise Failed(
            "not clean or not exported: "
            + ", ".join(changed)
            + "\nrun `nbdev-export` and `nbdev-clean`, look at the change, and commit it"
        )


def order():
    "heads and overviews follow the tables of nbs/index.ipynb"
    run(sys.executable, "tools/order.py", "--check")


def readme():
    "README.md follows nbs/index.ipynb"
    run(sys.executable, "tools/make_readme.py", "--check")


def changed():
    "Changed notebooks of the library and changed test files, as git sees them."
    words = ["git", "status", "--porcelain", "--untracked-files=all", "--no-renames"]
    r = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / line[3:].strip('"') for line in r.stdout.splitlines()]
    paths = [p for p in paths if p.is_file()]
    notebooks = [p for p in paths if p.suffix == ".ipynb" and ROOT / "nbs" in p.parents]
    tests = [p for p in paths if p.name.startswith("test_") and p.suffix == ".py"]
    return notebooks, tests


def fast():
    "changed notebooks and changed tests run, and the rules of the repository hold"
    notebooks, tests = changed()
    rules = [ROOT / "tests/test_repo.py", ROOT / "tests/test_order.py"]
    tests = sorted({*tests, *rules})
    run(sys.executable, "-m", "pytest", "-q", "-m", "not slow and not browser", *tests)
    for path in notebooks:
        run(script("nbdev-test"), path, "--n-workers", 0)


def docs():
    "the documentation site builds without a warning"
    run(sys.executable, "tools/build_docs.py")
    os.environ["SITE"] = str(ROOT / "docs/_build/html")


def side_by_side(dist):
    "Options of pytest for one worker per core, at most two; none on a single core."
    n = min(2, os.cpu_count() or 1)
    return ["-n", n, "--dist", dist, "--no-loadscope-reorder"] if n > 1 else []


def tests():
    "pytest: what crosses notebooks"
    words = ["-q", "-rs", "--durations=40", *side_by_side("loadfile"), "tests"]
    run(sys.executable, "-m", "pytest", *words, PYTHONHASHSEED="0")  # one order in both workers


def nbs():
    "every notebook of the library runs from top to bottom, and its tests pass"
    run(
        script("nbdev-test"),
        "--n-workers",
        min(2, os.cpu_count() or 1),
        "--timing",
        OMP_NUM_THREADS="1",
    )


def labs():
    "the students' labs follow from the instructor's, which run with their solutions"
    run(sys.executable, "tools/make_labs.py", "--check")
    run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--nbmake",
        "--nbmake-timeout=1800",
        *side_by_side("load"),
        "-p",
        "no:cacheprovider",
        *sorted((ROOT / "tutorials/instructor").glob("*.ipynb")),
    )


def site():
    "a browser looks at every page of the site and at the report, wide and narrow, light and dark"
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (os.environ.get("CHROMIUM") or any(map(shutil.which, names))):
        return "skipped: no Chromium on this machine"
    run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-m",
        "browser",
        "--durations=3",
        *side_by_side("load"),
        "tests/test_site.py",
    )


STEPS = (settings, notebooks, order, readme, docs, tests, nbs, labs, site)
FAST = (settings, notebooks, order, readme, fast)


def main(argv=None):
    names = [s.__name__ for s in STEPS]
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="STEP",
        help="run these steps only",
    )
    p.add_argument(
        "--skip", nargs="+", choices=names, default=[], metavar="STEP", help="leave these steps out"
    )
    p.add_argument("--keep-going", action="store_true", help="go on after a step that fails")
    p.add_argument("--fast", action="store_true", help="what changed since the last commit")
    p.add_argument("--list", action="store_true", help="list the steps and stop")
    a = p.parse_args(argv)
    if a.list:
        return print("\n".join(f"{s.__name__:10} {s.__doc__}" for s in STEPS))
    times, errors = [], []
    for s in FAST if a.fast else STEPS:
        if not a.fast and (s.__name__ not in a.only or s.__name__ in a.skip):
            continue
        print(f"\n=== {s.__name__}: {s.__doc__}", flush=True)
        start, state = time.perf_counter(), None
        try:
            state = s() or "ok"  # a step that was skipped says so
        except Failed as e:
            errors.append(e)
            state = "failed"
        times.append((s.__name__, time.perf_counter() - start, state))
        if errors and not a.keep_going:
            break
    print(
        "\n"
        + "\n".join(f"{n:10} {t:7.1f} s  {state}" for n, t, state in times)
        + f"\n{'total':10} {sum(t for _, t, _ in times):7.1f} s"
    )
    for e in errors:
        print(f"\n{e}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

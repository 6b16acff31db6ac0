#!/usr/bin/env python3
"""Set up the environment for Flower beside this checkout, and run a federation of real processes in it.

    python tools/flower_here.py                            eight nodes train a short job; leaves flower/run/report.html
    python tools/flower_here.py run --nodes 4 --set K=V    other nodes and settings, see `run --help`
    python tools/flower_here.py certificates|serve|join    the parts, for several machines
    python tools/flower_here.py --setup                    the environment only
    python tools/flower_here.py --test                     the tests of tests/flower

Flower's packages do not fit beside those of constraints.txt, so they get .venv-flower (about 1.5 GB, two minutes);
the variable FLOWER_ENV names another folder."""

import hashlib, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("FLOWER_ENV") or ROOT / ".venv-flower").absolute()
LOCK = ROOT / "constraints-flower.txt"
SHORT = ["run", "--set", "rounds=2", "seeds=[0]", 'methods=["eefl"]', "alone=false"]


def python():
    "Python of the environment, which is made anew when the lock has changed."
    exe, mark = VENV / "bin/python", VENV / "lock.sha256"
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()
    if not (mark.exists() and mark.read_text() == digest):
        print(f"{VENV.name}: about two minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip = [exe, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", LOCK], check=True)
        subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
        mark.write_text(digest)
    return exe


def main(words):
    off = dict(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    path = os.pathsep.join([str(VENV / "bin"), os.environ.get("PATH", "")])
    module = ["darkdistill_nb", "flower", *(words or SHORT)]
    tests = ["pytest", "-q", "-p", "no:cacheprovider", "--durations=5", ROOT / "tests/flower"]
    if words == ["--setup"]:
        python()
        return 0
    what = [*tests, *words[1:]] if words[:1] == ["--test"] else module
    return subprocess.call([python(), "-m", *what], env={**os.environ, **off, "PATH": path})


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))

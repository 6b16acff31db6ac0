"""Shared by all tests: markers, threads, the folder of real data, and how to wait.

Tests wait for events, not for seconds: on a machine with other work everything takes longer, and nothing is wrong.
`LONG` is the safety net for what would otherwise hang for ever; no test is about it."""

import contextlib, os, sys, time
from importlib.util import find_spec
from pathlib import Path
import pytest

collect_ignore = [] if find_spec("flwr") else ["flower"]  # an environment of its own

LONG = 600  # s
RUN_MAIN = "import sys; from darkdistill_nb.app.cli import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", RUN_MAIN]  # `darkdistill` in a process of its own


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "browser: drives Chromium by Playwright, about a minute; only runs when asked for: -m browser",
    )
    config.addinivalue_line(
        "markers", "slow: takes more than about 20 s (deselect with -m 'not slow')"
    )
    if not config.option.markexpr:
        config.option.markexpr = "not browser"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # inherited by subprocesses
        os.environ.setdefault(name, str(threads(config)))


# files that take minutes come first, so that no worker begins one when the others are done
LONGEST = ("test_main_job", "test_cli", "test_faults", "test_labs", "test_resume", "test_registry")


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def threads(config):
    "Two, or one for each of several workers (pytest-xdist), which would wait for each other's."
    alone = not getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    return min(2, os.cpu_count() or 1) if alone else 1


@pytest.fixture(scope="session", autouse=True)
def _few_threads(pytestconfig):
    "The same arithmetic and the same load on every machine; thread counts may change the last bits of a sum."
    import torch

    torch.set_num_threads(threads(pytestconfig))


def same_draws():
    "What a test draws from the common generators does not depend on the tests before it."
    import numpy as np, random, torch

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    same_draws()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    same_draws()


@pytest.fixture(scope="module")
def one_thread():
    "For tests of tiny networks and tables, where two threads would wait for each other; a file asks for it by `pytestmark`."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def process_state(pid):
    "What Linux says of a process from its state on; None if it is gone."
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def children(pid):
    "Worker processes whose parent is `pid`, without the resource tracker."
    found = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        if (s := process_state(p)) and s[1] == str(pid):
            with contextlib.suppress(OSError):
                found += [int(p)] * (b"spawn_main" in open(f"/proc/{p}/cmdline", "rb").read())
    return found


def running(pid):
    "Is the process there, and no zombie?"
    return (process_state(pid) or "Z")[0] != "Z"


@pytest.fixture(scope="session")
def wait_until():
    "wait_until(event, process): until event() is true; fails if the process ends before, or after LONG seconds."

    def wait(event, process=None):
        end = time.monotonic() + LONG
        while not event():
            over = process is not None and process.poll() is not None and not event()
            assert not over, (
                f"the process ended with code {process.returncode} before {event.__name__} came"
            )
            assert time.monotonic() < end, f"{event.__name__} did not come within {LONG} s"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def real_data():
    "Folder with real data sets as NAME.npz (environment variable DARKDISTILL_DATA), or skip."
    folder = os.environ.get("DARKDISTILL_DATA")
    if not folder:
        pytest.skip("DARKDISTILL_DATA is not set: no folder with real data sets")
    folder = Path(folder)
    if not folder.is_dir():
        pytest.fail(f"DARKDISTILL_DATA={folder} is not a folder")
    return folder

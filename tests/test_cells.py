"Cells in several processes, and after a kill."

import json, math, os, re, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from conftest import children, running
from darkdistill_nb.core.cells import (
    cell_file,
    cell_key,
    each,
    json_or_text,
    key_values,
    run_command,
    run_grid,
    run_stored,
    t_interval,
    verdict,
)
from darkdistill_nb.core.datasets import every_tenth

ROOT = Path(__file__).resolve().parent.parent

JOB = """
import os, sys, time
def slow(cell, folder):
    endless = cell["i"] in (2, 3) and "QUICK" not in os.environ
    time.sleep(600 if endless else .2)
    return dict(square=cell["i"] ** 2, process=os.getpid())
if __name__ == "__main__":
    from darkdistill_nb.core.cells import run_grid
    import slow_job
    run_grid(slow_job.slow, [dict(i=i) for i in range(8)], sys.argv[1], int(sys.argv[2]))
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    "Cells take a moment; in a process without QUICK the third and the fourth wait to be killed."
    monkeypatch.setenv("QUICK", "1")
    (tmp_path / "slow_job.py").write_text(JOB)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("slow_job").slow
    sys.modules.pop("slow_job")


def test_two_processes_give_what_one_gives(job, tmp_path):
    cells = [dict(i=i) for i in range(4)]
    two, one = (run_grid(job, cells, tmp_path / str(w), w) for w in (2, 1))
    assert [r["square"] for r in two] == [r["square"] for r in one] == [0, 1, 4, 9]
    assert {r["process"] for r in one} == {os.getpid()}
    assert os.getpid() not in {r["process"] for r in two}


def test_a_failing_cell_keeps_the_others(job, tmp_path):
    with pytest.raises(TypeError):
        run_grid(job, [dict(i=1), dict(i=2), dict(i="x")], tmp_path, 1)
    assert cell_file(dict(i=1), tmp_path).is_file()
    assert not cell_file(dict(i="x"), tmp_path).exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_killed_grid_goes_on(job, tmp_path, wait_until):
    quick = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    command = [sys.executable, str(tmp_path / "slow_job.py"), str(tmp_path), "2"]
    p = subprocess.Popen(command, env={k: v for k, v in quick.items() if k != "QUICK"})
    done = lambda: sorted((tmp_path / "cells").glob("*.json"))

    def two_cells_are_done():
        return len(done()) >= 2

    wait_until(two_cells_are_done, p)
    workers = children(p.pid)
    p.send_signal(signal.SIGKILL)
    p.wait()

    def all_workers_are_gone():
        return not any(map(running, workers))

    wait_until(all_workers_are_gone)
    before = {f: f.read_bytes() for f in done()}
    assert sorted(json.loads(b)["square"] for b in before.values()) == [0, 1]
    subprocess.run(command, env=quick, check=True)
    assert len(done()) == 8 and all(f.read_bytes() == b for f, b in before.items())


def test_each_needs_no_process_for_one_item():
    assert list(each(lambda i: -i, [3], 4)) == [-3]


def test_the_interval_narrows_with_seeds():
    widths = [t_interval([0, 1] * m)[2] for m in (1, 2, 4)]
    assert widths[0] > 6 > widths[1] > widths[2] > 0.5


# ---------------------------------------------------------------- what a stored result must be


bounds = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])


@settings(deadline=None, derandomize=True, database=None)
@given(bounds, bounds, bounds, bounds)
def test_an_interval_that_contains_or_touches_a_limit_decides_nothing(a, b, above, below):
    assume(above < below)
    low, high = sorted((a, b))
    said = verdict(((a + b) / 2, low, high), above, below)
    if low <= above <= high or low <= below <= high:
        assert said == "undecided"
    else:
        assert said == ("holds" if above < low and high < below else "does not hold")


def test_equal_in_every_seed_is_undecided():
    assert verdict(t_interval([0.0] * 3)) == "undecided"
    assert verdict(t_interval([2.0] * 3), above=2) == verdict((0, 0, 0), -1, 0) == "undecided"


JUDGES = re.compile(
    r"(low|lo|ci\[1\]|interval\[1\]) *> *0\b|(high|hi|ci\[2\]|interval\[2\]) *< *0\b"
)


@pytest.mark.parametrize("chapter", ["nbs", "tutorials/instructor"])
def test_no_page_judges_an_interval_by_itself(chapter):
    "The rule stands once, in `verdict`."
    own = []
    for path in sorted((ROOT / chapter).rglob("*.ipynb")):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        for c in cells:
            own += [f"{path.name}: {line}" for line in c["source"] if JUDGES.search(line)]
    assert not own


def test_numbers_of_numpy_name_the_same_cell():
    plain = dict(seed=1, lr=0.5, sizes=[1, 2], flag=True)
    numpy = dict(
        seed=np.int64(1),
        lr=np.float32(0.5),
        sizes=np.array([1, 2]),
        flag=np.bool_(True),
    )
    assert cell_key(plain) == cell_key(numpy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[3]",
        "null",
        "[" * 100_000,
        '{"square": 4}',
        '{"cell": {"i": 3}, "square": 9}',
        '{"cell": {"i": 2}, "square": NaN}',
    ],
)
def test_a_damaged_result_is_said_and_not_used(tmp_path, text):
    path = cell_file(dict(i=2), tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        run_stored(lambda cell, folder: dict(square=4), dict(i=2), tmp_path)
    assert path.read_text() == text


def test_a_result_with_nan_is_not_stored(tmp_path):
    with pytest.raises(ValueError, match="loss=nan"):
        run_stored(lambda cell, folder: dict(loss=math.nan), dict(i=1), tmp_path)
    assert not cell_file(dict(i=1), tmp_path).exists()


def test_nothing_runs_when_a_cell_is_bad(tmp_path):
    done = []
    with pytest.raises(ValueError, match="lr=inf"):
        run_grid(
            lambda cell, folder: done.append(cell) or {},
            [dict(i=1), dict(lr=math.inf)],
            tmp_path,
            1,
        )
    with pytest.raises(ValueError, match="workers=0"):
        run_grid(lambda cell, folder: done.append(cell) or {}, [dict(i=1)], tmp_path, 0)
    assert not done


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: t_interval([math.nan, 1]), "values.0.=nan"),
        (lambda: t_interval([1, math.inf]), "values.1.=inf"),
        (lambda: t_interval([1, 2], 0), "level=0"),
        (lambda: t_interval([1, 2], 1), "level=1"),
        (lambda: t_interval([1, 2], math.nan), "level=nan"),
        (lambda: t_interval(["1", 2]), "values.0.='1'"),
        (lambda: verdict((1, 2)), "interval="),
        (lambda: verdict((0, 1, -1)), "interval="),
        (lambda: verdict((0, math.nan, 1)), "interval.1.=nan"),
        (lambda: verdict((0, -1, 1), 2, 1), "below=1"),
        (lambda: verdict((0, -1, 1), math.nan), "above=nan"),
        (lambda: cell_key([1]), "cell="),
        (lambda: cell_key(dict(a=object())), "a=<object"),
        (lambda: every_tenth(torch.zeros(3, 1)), "y="),
        (lambda: key_values(["=3"]), "KEY=VALUE"),
        (lambda: key_values(["lr=1", "lr=2"]), "'lr' is set twice"),
    ],
)
def test_bad_arguments_get_one_sentence(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_deeply_nested_words_are_text():
    assert json_or_text("[" * 100_000) == "[" * 100_000


def test_a_training_that_diverged_ends_a_command_with_a_sentence(capsys):
    def diverges():
        raise FloatingPointError("the training loss is nan; lower lr=9")

    assert run_command(diverges) == 2
    assert capsys.readouterr().err == "error: the training loss is nan; lower lr=9\n"

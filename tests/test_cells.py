"Cells in several processes, and after a kill."
import json, os, signal, subprocess, sys, time
import pytest
from darkdistill_nb.cells import cell_file, each, run_grid, t_interval

JOB = """
import os, sys, time
def slow(cell, folder):
    time.sleep(.2)
    return dict(square=cell["i"] ** 2, process=os.getpid())
if __name__ == "__main__":
    from darkdistill_nb.cells import run_grid
    import slow_job
    run_grid(slow_job.slow, [dict(i=i) for i in range(8)], sys.argv[1], int(sys.argv[2]))
"""

@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path/"slow_job.py").write_text(JOB); monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("slow_job").slow
    sys.modules.pop("slow_job")

def test_two_processes_give_what_one_gives(job, tmp_path):
    cells = [dict(i=i) for i in range(4)]
    two, one = (run_grid(job, cells, tmp_path/str(w), w) for w in (2, 1))
    assert [r["square"] for r in two] == [r["square"] for r in one] == [0, 1, 4, 9]
    assert {r["process"] for r in one} == {os.getpid()} and os.getpid() not in {r["process"] for r in two}

def test_a_failing_cell_keeps_the_others(job, tmp_path):
    with pytest.raises(TypeError): run_grid(job, [dict(i=1), dict(i=2), dict(i="x")], tmp_path, 1)
    assert cell_file(dict(i=1), tmp_path).is_file() and not cell_file(dict(i="x"), tmp_path).exists()

def test_a_killed_grid_goes_on(job, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    command = [sys.executable, str(tmp_path/"slow_job.py"), str(tmp_path), "2"]
    p = subprocess.Popen(command, env=env)
    done = lambda: sorted((tmp_path/"cells").glob("*.json"))
    end = time.time() + 60
    while len(done()) < 2 and time.time() < end: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    time.sleep(1.5)                                   # workers see that the parent is gone and leave
    before = {f: f.read_bytes() for f in done()}
    assert 2 <= len(before) < 8 and all(json.loads(b)["square"] >= 0 for b in before.values())
    time.sleep(.5); assert len(done()) == len(before)
    subprocess.run(command, env=env, check=True)
    assert len(done()) == 8 and all(f.read_bytes() == b for f, b in before.items())

def test_each_needs_no_process_for_one_item(): assert list(each(lambda i: -i, [3], 4)) == [-3]

def test_the_interval_narrows_with_seeds():
    widths = [t_interval([0, 1] * m)[2] for m in (1, 2, 4)]
    assert widths[0] > 6 > widths[1] > widths[2] > .5

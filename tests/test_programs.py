"""A program and everything that it has started comes to an end, also what has left its group and lost its parent."""

import sys, time
from pathlib import Path
import pytest
from darkdistill_nb.experiments.machines import Program, _connection, _wait_for_run, free_port

ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
CHILD = f"""import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {ORPHAN!r}], start_new_session=True).wait()
print("orphan", flush=True)
time.sleep(300)"""


def alive(mark):
    "Processes that bear a mark and are no zombies, whose environment cannot be read."
    found = []
    for p in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [p.parent.name] if mark.encode() in p.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_nothing_is_left_of_a_program(tmp_path, how):
    program = Program([sys.executable, "-c", CHILD], tmp_path / "log", tmp_path / "home")
    end = time.monotonic() + 60
    while "orphan" not in program.log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert len(alive(program.mark)) == 2 and len(program.sessions()) == 2
    assert program.cpu_seconds() > 0
    getattr(program, how)()
    while alive(program.mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(program.mark) == [] and not program.alive()


def test_who_waits_for_a_run_notices_that_the_server_is_gone(tmp_path, monkeypatch):
    from darkdistill_nb.experiments import machines

    machines._write_connection(tmp_path, "127.0.0.1", port := free_port())
    assert _connection(tmp_path) == ("127.0.0.1", port)
    monkeypatch.setattr(machines, "SILENT", 1)
    with pytest.raises(RuntimeError, match="the server is gone; start it again"):
        _wait_for_run(tmp_path, "a run", tmp_path / "out", 60, None)

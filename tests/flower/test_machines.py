"""Real processes on this machine: TLS, keys, nodes that fail, a server that dies, nothing left."""

import settings_here  # noqa: F401
import os, subprocess, sys, time
from pathlib import Path
import ill
import pytest
from darkdistill_nb.core.records import load_record
from darkdistill_nb.experiments.machines import (
    Federation,
    Program,
    free_port,
    start_node,
    submit,
    write_certificates,
)
from darkdistill_nb.experiments.runs import run_experiment

SMALL = dict(data="digits", start=None, net=dict(width=8), clients=6, rounds=2, seeds=[0])
SMALL |= dict(methods=["eefl"], alone=False, participation=1.0, tiers=[0.25] * 4)
NODES = 3


def left_behind(folder):
    "Processes whose environment names the folder."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={folder}".encode() in (p / "environ").read_bytes():
                found.append((p / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def wait_until(there, seconds):
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(0.1)
    return there()


def patience_here(record):
    "Seconds that are more than enough for a round on this machine; the first waits for nodes, too."
    return max(12, 3 * record.runs[-1]["rounds"][-1]["seconds"])


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    "One server and three nodes for all tests here; nothing of it is left."
    folder = tmp_path_factory.mktemp("federation")
    os.environ["ILL_WORDS"] = str(tmp_path_factory.mktemp("words"))
    with Federation(folder, NODES) as here:
        yield here
        assert len(left_behind(folder)) > NODES
    wait_until(lambda: not left_behind(folder), 30)
    assert left_behind(folder) == []


def same_weights(a, b):
    name = "weights/eefl-seed0.safetensors"
    return (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "(record, folder) of the same run in this process."
    return run_experiment(SMALL, tmp_path_factory.mktemp("alone") / "run", 1, progress=False)


def test_record_and_weights_are_those_of_one_process(federation, alone, tmp_path):
    far = submit(federation.folder, SMALL, tmp_path / "far", seconds=300)
    here, folder = alone
    assert same_weights(far, folder)
    record = load_record(far)
    federation.patience = round(patience_here(record))
    same = [k for k in here.runs[0]["final"] if "seconds" not in k]
    assert all(record.runs[0]["final"][k] == here.runs[0]["final"][k] for k in same)
    assert (far / "report.html").stat().st_size > 10_000
    files = [p.read_text() for p in (far / "config.json", far / "record.json")]
    assert record.command == "darkdistill flower run" and not any("--token" in t for t in files)
    helpers = [c for c in left_behind(federation.folder) if b"import helper" in c]
    assert len(helpers) > NODES  # ours, which makes copies: the server's and one a node


def node_program(folder, name, server, *how):
    "A SuperNode that is not started as it should be."
    command = ["flower-supernode", "--superlink", server, "--port", free_port(), *how]
    command += ["--isolation", "process"]  # it would start no helper before it is let in
    command += ["--node-config", "partition-id=0 num-partitions=3"]
    return Program(command, folder / f"{name}.log", folder / "flwr")


def test_strangers_are_refused(federation, tmp_path):
    server, folder = f"127.0.0.1:{federation.port}", federation.folder
    foreign = write_certificates(tmp_path / "foreign", NODES)  # an authority of its own
    ca = ["--root-certificates", folder / "ca.crt"]
    mine = ["--auth-supernode-private-key", foreign / "node0.key"]
    strangers = dict(
        foreign_key=node_program(tmp_path, "foreign_key", server, *ca, *mine),
        no_key=node_program(tmp_path, "no_key", server, *ca),
        other_authority=start_node(foreign, 0, server),
        no_tls=node_program(tmp_path, "no_tls", server, "--insecure", "--max-retries", "1"),
    )
    why = dict(foreign_key="2004", no_key="2001", other_authority="CERTIFICATE_VERIFY_FAILED")
    try:
        for name, program in strangers.items():
            assert wait_until(lambda: not program.alive(), 90), name
            said = program.log.read_text(errors="replace")
            assert program.process.returncode != 0 and why.get(name, "") in said, (name, said)
            assert "SuperNode ID" not in said, name
    finally:
        for program in strangers.values():
            program.kill()


def test_a_server_that_is_killed_goes_on_from_its_last_round(federation, alone, tmp_path):
    out = tmp_path / "again"
    checkpoint = out / "jobs/eefl-seed0.safetensors"

    class Enough(Exception):
        pass

    def after_round_1():
        if checkpoint.exists():
            federation.programs["server"].kill()
            raise Enough

    with pytest.raises(Enough):
        submit(federation.folder, SMALL, out, seconds=300, on_step=after_round_1)
    federation.serve(federation.port)
    submit(federation.folder, SMALL, out, seconds=300)
    assert same_weights(out, alone[1])
    assert load_record(out).info["resumed"] is True


def test_a_round_goes_on_without_those_that_fail(federation, tmp_path):
    settings = SMALL | dict(methods=["ill:Ill"], clients=12, rounds=1)
    patience = getattr(federation, "patience", 60)  # where the first test was not run

    def kill_node():
        stuck = federation.programs["node1"]
        if wait_until(lambda: (Path(os.environ["ILL_WORDS"]) / "begun").exists(), 0):
            stuck.alive() and stuck.kill()

    try:
        out = submit(
            federation.folder,
            settings,
            tmp_path / "ill",
            patience=patience,
            seconds=300 + 2 * patience,
            on_step=kill_node,
        )
    finally:
        ill.say("over")
    assert not federation.programs["node1"].alive()
    [row] = [r for run in load_record(out).runs for r in run["rounds"]]
    left = row["left_out"]
    assert row["loss"] is not None and set(left) == set(map(str, range(1, 12)))
    assert "not finite" in left["3"] and "stem.bias" in left["6"]
    assert "RuntimeError: battery empty" in left["9"]
    late = f"has not answered within {patience}"
    assert all(late in left[client] for client in ("2", "5", "8", "11"))
    for client in ("1", "4", "7", "10"):  # of the killed node, which Flower knows after a minute
        assert late in left[client] or "Flower's code 5" in left[client]


COPIES = """
import os, sys
from darkdistill_nb.experiments.machines import _be

for run in (lambda: None, lambda: 3, lambda: sys.exit(4), None):
    if (child := os.fork()) == 0:
        _be(run, ["words"], {})
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
"""


def test_a_copy_ends_with_the_code_of_its_command():
    command = [sys.executable, "-u", "-c", COPIES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 3 4 1 " and "'NoneType' object is not callable" in done.stderr

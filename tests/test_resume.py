"""A run that is killed at random moments, again and again, and resumed, ends with the weights of an uninterrupted one; nothing half-written is ever met."""

import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and SIGKILL")
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from darkdistill_nb.cli import main; sys.exit(main())",
    "run",
]
SETTINGS = "--rounds 12 --seeds 1 --clients 8 --tiers 3 --net width=8 stages=3 --darkdistill server_epochs=1 --eval-every 4".split()
OUT = ["--out", "run"]


def start(folder, *args):
    return subprocess.Popen(
        [*COMMAND, *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(folder, *args):
    "Run to the end: (seconds, output)."
    t = time.time()
    p = start(folder, *args)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    return time.time() - t, out


def kill_after(folder, seconds, *args):
    "Start, kill the whole process group after `seconds`; True if it was still running then."
    p = start(folder, *args)
    try:
        p.wait(seconds)
        alive = False
    except subprocess.TimeoutExpired:
        alive = True
    try:
        os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    p.communicate(timeout=60)
    assert alive or p.returncode == 0, "the run failed by itself"
    return alive


def check_whole(folder):
    "Every file that has its final name reads as a whole one."
    from darkdistill_nb.training import load_record, load_tensors

    if not folder.exists():
        return
    assert (
        json.loads((folder / "config.json").read_text())["config"]["rounds"] == 12
    )  # the folder and its settings appear together
    for p in folder.rglob("*.safetensors"):
        load_tensors(p)
    for p in folder.rglob("*.json"):
        json.loads(p.read_text())
    if (folder / "record.json").exists():
        record = load_record(folder)
        assert len(record.info["files"]) == 2
        for name, sha in record.info["files"].items():
            load_tensors(folder / name, sha)


def weights(folder):
    from darkdistill_nb.training import load_tensors

    return {p.name: load_tensors(p)[0] for p in sorted((folder / "weights").iterdir())}


def numbers(folder):
    "What the record says, without times."
    from darkdistill_nb.training import load_record

    r = load_record(folder)

    def clean(o):
        return (
            {k: clean(v) for k, v in o.items() if "seconds" not in k}
            if isinstance(o, dict)
            else [clean(v) for v in o]
            if isinstance(o, list)
            else o
        )

    return clean([r.config, r.runs, r.info["alone"], r.info["clients"]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run, and how long it took."
    d = tmp_path_factory.mktemp("whole")
    seconds, _ = finish(d, *SETTINGS, *OUT, "--workers", "1")
    return d / "run", seconds


def same_weights(a, b):
    import torch

    a, b = weights(a), weights(b)
    assert list(a) == list(b) == ["darkdistill-seed0.safetensors", "eefl-seed0.safetensors"]
    for name in a:
        assert a[name].keys() == b[name].keys()
        for k, v in a[name].items():
            assert torch.equal(v, b[name][k]), f"{name}: {k}"


def test_killed_at_random_points(whole, tmp_path):
    "Delays are drawn over the length of a run; one kill is very early. Between kills only what has its final name is looked at."
    reference, seconds = whole
    rng, run, killed = random.Random(2025), tmp_path / "run", 0
    for share in (0.02, rng.uniform(0.3, 0.6), rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.95)):
        args = ["--resume", "run"] if run.exists() else [*SETTINGS, *OUT]
        killed += kill_after(tmp_path, share * seconds, *args, "--workers", "1")
        check_whole(run)
    _, out = finish(
        tmp_path, *(["--resume", "run"] if run.exists() else [*SETTINGS, *OUT]), "--workers", "2"
    )
    assert killed >= 1, "the kills came too late to test anything"
    check_whole(run)
    same_weights(run, reference)
    assert numbers(run) == numbers(reference)
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "record.json",
        "report.html",
        "weights",
    ], "checkpoints or halves are left"


def test_killed_between_rounds_of_training(whole, tmp_path):
    "Kills that are aimed: each time as soon as a new checkpoint has appeared, with two worker processes; every resume starts from another round."
    reference, _ = whole
    run = tmp_path / "run"
    for i in range(2):
        before = {p: p.stat().st_mtime_ns for p in run.glob("jobs/*")}
        p = start(
            tmp_path,
            *(["--resume", "run"] if run.exists() else [*SETTINGS, *OUT]),
            "--workers",
            "2",
        )
        end = time.time() + 60
        while (
            p.poll() is None
            and time.time() < end
            and {q: q.stat().st_mtime_ns for q in run.glob("jobs/*.safetensors")}.items()
            <= before.items()
        ):
            time.sleep(0.01)
        time.sleep(0.02 * i)
        try:
            os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        p.communicate(timeout=60)
        check_whole(run)
        assert not (run / "record.json").exists(), "the run was over before it could be killed"
    finish(tmp_path, "--resume", "run", "--workers", "1")
    same_weights(run, reference)
    assert numbers(run) == numbers(reference)


def test_resume_of_a_finished_run_changes_nothing(whole):
    folder, _ = whole
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    _, out = finish(folder.parent, "--resume", "run")
    assert "run is finished" in out and "report: run/report.html" in out
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_half_a_record_is_refused(whole, tmp_path):
    "A record.json that was cut off (by a copy that failed, say) is an error, not a result."
    import shutil
    from darkdistill_nb import cli

    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run/record.json"
    path.write_bytes(path.read_bytes()[:-100])
    for argv in (
        ["report", str(tmp_path / "run")],
        ["compare", str(tmp_path / "run")],
        ["run", "--resume", str(tmp_path / "run")],
    ):
        assert cli.main(argv) == 2


def test_checkpoint_of_another_run_is_refused(whole, tmp_path, capsys):
    "A checkpoint that does not belong to the settings beside it is not continued."
    import shutil
    from darkdistill_nb import cli

    p = start(tmp_path, *SETTINGS, *OUT, "--workers", "1")
    end = time.time() + 60
    while (
        p.poll() is None and time.time() < end and not list(tmp_path.glob("run/jobs/*.safetensors"))
    ):
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate(timeout=60)
    config = tmp_path / "run/config.json"
    saved = json.loads(config.read_text())
    saved["config"]["lr"] = 0.01
    config.write_text(json.dumps(saved))
    assert cli.main(["run", "--resume", str(tmp_path / "run"), "--workers", "1"]) == 1
    assert "other settings" in capsys.readouterr().err

"""A run that is killed at random moments, again and again, and resumed, ends with the weights of an uninterrupted one; nothing half-written is ever met."""

import json, os, random, re, shutil, signal, subprocess, time
import pytest
from conftest import COMMAND, LONG

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and SIGKILL")
RUN = [*COMMAND, "run"]
SETTINGS = "--data digits --rounds 12 --seeds 1 --clients 8 --tiers 3 --net width=8 stages=3 --darkdistill server_epochs=1 --eval-every 4".split()
OUT = ["--out", "run"]


def start(folder, *args):
    return subprocess.Popen(
        [*RUN, *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(folder, *args):
    "Run to the end: its output."
    p = start(folder, *args)
    out, err = p.communicate(timeout=LONG)
    assert p.returncode == 0, err
    return out


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.glob("run/jobs/*-seed*") if p.exists()}


class Steps:
    "Counts the checkpoints that are written, and how long the last one took."

    def __init__(self, folder):
        self.folder = folder
        self.seen = stamps(folder)
        self.n = 0
        self.at = time.monotonic()
        self.took = 0.0

    def __call__(self):
        now = stamps(self.folder)
        new = sum(self.seen.get(p) != t for p, t in now.items())
        if new:
            self.took, self.at = time.monotonic() - self.at, time.monotonic()
        self.seen, self.n = now, self.n + new
        return self.n


def kill(p):
    "Kill the whole process group; True if it was still running."
    alive = p.poll() is None
    try:
        os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    p.communicate(timeout=LONG)
    assert alive or p.returncode == 0, "the run failed by itself"
    return alive


def check_whole(folder):
    "Every file that has its final name reads as a whole one."
    from darkdistill_nb.core.records import load_record, load_tensors

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
    from darkdistill_nb.core.records import load_tensors

    return {p.name: load_tensors(p)[0] for p in sorted((folder / "weights").iterdir())}


def numbers(folder):
    "What the record says, without times."
    from darkdistill_nb.core.records import load_record

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
    "An uninterrupted run."
    d = tmp_path_factory.mktemp("whole")
    finish(d, *SETTINGS, *OUT, "--workers", "1")
    return d / "run"


def go_on(folder):
    return ["--resume", "run"] if (folder / "run").exists() else [*SETTINGS, *OUT]


def same_weights(a, b):
    import torch

    a, b = weights(a), weights(b)
    assert list(a) == list(b) == ["darkdistill-seed0.safetensors", "eefl-seed0.safetensors"]
    for name in a:
        assert a[name].keys() == b[name].keys()
        for k, v in a[name].items():
            assert torch.equal(v, b[name][k]), f"{name}: {k}"


def test_killed_at_random_points(whole, tmp_path, wait_until):
    "After a random number of steps and a random part of the next one, at the very start, and when everything is trained."
    rng, run = random.Random(2025), tmp_path / "run"
    for steps in (
        0,
        rng.randint(3, 9),
        rng.randint(3, 9),
        rng.randint(3, 9),
    ):  # of 12 + 12 rounds and 8 clients
        count = Steps(tmp_path)
        p = start(tmp_path, *go_on(tmp_path), "--workers", "1")

        def enough_steps():
            return count() >= steps

        wait_until(enough_steps, p)
        time.sleep(rng.uniform(0, count.took))
        assert kill(p)
        check_whole(run)
    p = start(tmp_path, *go_on(tmp_path), "--workers", "1")

    def the_end_begins():
        return (run / "weights").exists()

    wait_until(the_end_begins, p)
    kill(p)
    check_whole(run)
    finish(tmp_path, *go_on(tmp_path), "--workers", "2")
    check_whole(run)
    same_weights(run, whole)
    assert numbers(run) == numbers(whole)
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "record.json",
        "report.html",
        "weights",
    ], "checkpoints or halves are left"


def test_killed_between_rounds_of_training(whole, tmp_path, wait_until):
    "Kills that are aimed: each time as soon as a new checkpoint has appeared, with two worker processes; every resume starts from another round."
    run = tmp_path / "run"
    for i in range(2):
        count = Steps(tmp_path)
        p = start(tmp_path, *go_on(tmp_path), "--workers", "2")

        def a_step():
            return count() > 0

        wait_until(a_step, p)
        time.sleep(0.02 * i)
        assert kill(p), "the run was over before it could be killed"
        check_whole(run)
        assert not (run / "record.json").exists()
    finish(tmp_path, "--resume", "run", "--workers", "1")
    same_weights(run, whole)
    assert numbers(run) == numbers(whole)


def test_resume_of_a_finished_run_changes_nothing(whole):
    folder = whole
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    out = finish(folder.parent, "--resume", "run")
    assert "run is finished" in out and "report: run/report.html" in out
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_half_a_record_is_refused(whole, tmp_path):
    "A record.json that was cut off (by a copy that failed, say) is an error, not a result."
    from darkdistill_nb.app import cli

    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run/record.json"
    path.write_bytes(path.read_bytes()[:-100])
    for argv in (
        ["report", str(tmp_path / "run")],
        ["compare", str(tmp_path / "run")],
        ["run", "--resume", str(tmp_path / "run")],
    ):
        assert cli.main(argv) == 2


# ---------------------------------------------------------------- checkpoints that are not what they should be


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, wait_until):
    "A run that was killed when every job had a checkpoint."
    d = tmp_path_factory.mktemp("stopped")
    p = start(d, *SETTINGS, *OUT, "--workers", "3")

    names = ("eefl-seed0.safetensors", "darkdistill-seed0.safetensors", "alone-seed0.json")

    def a_checkpoint_of_each():  # by name: a file that is being written has another one
        return all((d / "run/jobs" / name).exists() for name in names)

    wait_until(a_checkpoint_of_each, p)
    assert kill(p)
    return d / "run"


def flip(path):
    "Other numbers in a file of the right length with a valid header."
    data = bytearray(path.read_bytes())
    for i in range(len(data) - 900, len(data), 97):
        data[i] ^= 0x15
    path.write_bytes(data)


def rewrite(change):
    def f(path):
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(change(saved)))

    return f


def first_client(**new):
    return rewrite(lambda s: {**s, "clients": [{**s["clients"][0], **new}, *s["clients"][1:]]})


DAMAGE = {
    "bits of weights": ("eefl-seed0.safetensors", flip),
    "half the weights": (
        "darkdistill-seed0.safetensors",
        lambda p: p.write_bytes(p.read_bytes()[:999]),
    ),
    "no weights": ("eefl-seed0.safetensors", lambda p: p.write_bytes(b"")),
    "half the clients": ("alone-seed0.json", lambda p: p.write_text(p.read_text()[:-20])),
    "an old list": ("alone-seed0.json", rewrite(lambda s: s["clients"])),
    "a list": ("alone-seed0.json", rewrite(lambda s: [])),
    "no accuracy": ("alone-seed0.json", first_client(accuracy=None)),
    "an accuracy of 7": ("alone-seed0.json", first_client(accuracy=7)),
    "another client": ("alone-seed0.json", first_client(client=5)),
    "another tier": ("alone-seed0.json", first_client(tier=9)),
    "too many clients": (
        "alone-seed0.json",
        rewrite(lambda s: {**s, "clients": s["clients"][:1] * 9}),
    ),
    "clients are text": ("alone-seed0.json", rewrite(lambda s: {**s, "clients": "all"})),
    "nested": ("alone-seed0.json", lambda p: p.write_text("[" * 100_000)),
    "of other settings": ("alone-seed0.json", rewrite(lambda s: {**s, "of": "0"})),
}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named(name, damage, stopped, tmp_path, capsys):
    "One sentence that names the file to delete, and no promise that the same command would do."
    from darkdistill_nb.app import cli

    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run/jobs" / name
    damage(path)
    before = stamps(tmp_path)
    assert cli.main(["run", "--resume", str(tmp_path / "run"), "--workers", "1"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("darkdistill: ") and f"delete {path} " in last, last
    assert last.endswith(f", then continue with: darkdistill run --resume {tmp_path}/run"), last
    assert stamps(tmp_path)[path] == before[path]


def test_after_deleting_the_damaged_file_all_is_well(stopped, whole, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    for name in ("eefl-seed0.safetensors", "alone-seed0.json"):
        (tmp_path / "run/jobs" / name).unlink()
    finish(tmp_path, "--resume", "run", "--workers", "1")
    same_weights(tmp_path / "run", whole)
    assert numbers(tmp_path / "run") == numbers(whole)


@pytest.mark.parametrize("worker", ["1", "2"])
def test_checkpoint_of_another_run_is_refused(worker, stopped, tmp_path, capsys):
    "A checkpoint that does not belong to the settings beside it is not continued."
    from darkdistill_nb.app import cli

    shutil.copytree(stopped, tmp_path / "run")
    config = tmp_path / "run/config.json"
    saved = json.loads(config.read_text())
    saved["config"]["lr"] = 0.01
    config.write_text(json.dumps(saved))
    assert cli.main(["run", "--resume", str(tmp_path / "run"), "--workers", worker]) == 1
    assert re.search("another training: .*lr=0.01|other settings", err := capsys.readouterr().err)
    assert "delete" in err


CONFIGS = {
    "no data": lambda s: s.pop("data_sha256"),
    "a number": lambda s: s.update(command=5),
    "no settings": lambda s: s.update(config=None),
    "unknown": lambda s: s["config"].update(round=3),
    "none": lambda s: s.clear(),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_config_is_named(change, stopped, tmp_path, capsys):
    from darkdistill_nb.app import cli

    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    assert cli.main(["run", "--resume", str(tmp_path / "run")]) == 2
    assert (err := capsys.readouterr().err).startswith(
        f"darkdistill: {path} is not the configuration of a run: "
    )
    assert err.count("\n") == 1


# ---------------------------------------------------------------- a start


STARTED = "--rounds 2 --seeds 0, --n-train 500 --n-test 100 --methods eefl --workers 1 --out run"


def test_a_run_from_a_start_goes_on(tmp_path, wait_until):
    "Killed after a round and resumed, it ends with the weights of an uninterrupted run, of which stem and stages began in the file."
    from darkdistill_nb.core.records import load_record

    args, killed = STARTED.split(), tmp_path / "killed"
    killed.mkdir()
    finish(tmp_path, *args)
    p = start(killed, *args)

    def a_checkpoint():
        return (killed / "run/jobs/eefl-seed0.safetensors").exists()

    wait_until(a_checkpoint, p)
    kill(p)
    finish(killed, "--resume", "run")
    files = [d / "run/weights/eefl-seed0.safetensors" for d in (tmp_path, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    saved = json.loads((killed / "run/config.json").read_text())
    assert saved["config"]["start"] == "stage_start" and len(saved["start_sha256"]) == 64
    assert load_record(killed / "run").info["start_sha256"] == saved["start_sha256"]


def test_another_start_is_refused(tmp_path, capsys):
    "A file of a former run is a start; when it has changed, the run that began with it does not go on."
    from darkdistill_nb.app import cli
    from darkdistill_nb.experiments import runs
    from darkdistill_nb.core.records import asset, load_tensors, save_tensors

    tensors, meta = load_tensors(asset("stage_start.safetensors"))
    file = tmp_path / "mine.safetensors"
    save_tensors(file, tensors, meta)
    exp = runs.Experiment(dict(start=str(file), seeds=1, n_train=300, n_test=50))
    saved = dict(config=exp.config, data_sha256=exp.digest(), start_sha256=exp.start_sha256)
    runs._make_folder(tmp_path / "run", saved | dict(command="", created=""))
    save_tensors(file, {k: v * 2 for k, v in tensors.items()}, meta)
    assert cli.main(["run", "--resume", str(tmp_path / "run"), "--workers", "1"]) == 2
    err = capsys.readouterr().err
    assert "is not the start that the run in" in err and err.count("\n") == 1
    file.unlink()
    assert cli.main(["run", "--resume", str(tmp_path / "run"), "--workers", "1"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_weights_of_a_run_are_a_start(whole, tmp_path):
    "Stem and stages are taken, exits are new: another number of classes fits."
    import torch
    from darkdistill_nb.exits.networks import cnn
    from darkdistill_nb.experiments.runs import put_start, read_start

    file = whole / "weights/eefl-seed0.safetensors"
    trunk, _ = read_start(file)
    assert not any(k.startswith("exits.") for k in trunk)
    net = put_start(cnn((1, 8, 8), 37, stages=3, width=8), trunk)
    assert torch.equal(net.stages[2].convs[0].weight, trunk["stages.2.convs.0.weight"])
    assert net(torch.zeros(1, 1, 8, 8))[2].shape == (1, 37)


def test_checkpoints_of_older_runs_stay_valid():
    "Settings that did not exist then, and do what was done then, are not part of a checkpoint's mark."
    from darkdistill_nb.experiments import runs
    from darkdistill_nb.experiments.settings import make_config

    config = make_config(dict(data="digits"))
    later = "start", "difficulty_bin", "availability"
    then = {k: v for k, v in config.items() if k not in later}
    assert runs._as_before(config) == then and runs._as_before(make_config(then)) == then
    assert "start" in runs._as_before(make_config(dict(data="shapes16")))

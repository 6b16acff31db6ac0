"""The command `darkdistill`: what a user types wrong costs one sentence and nothing else; what is right leaves a whole run folder."""

import contextlib, importlib.metadata, importlib.util, json, os, re, shutil, signal, subprocess, sys, threading
from pathlib import Path
import numpy as np
import pytest
from conftest import COMMAND, LONG
from darkdistill_nb.core import records as core_records
from darkdistill_nb.app import cli
from darkdistill_nb.experiments import runs, settings

TINY = "--rounds 2 --data digits --seeds 1 --clients 6 --tiers 2 --net width=8 stages=2 --darkdistill server_epochs=1 --workers 1".split()


def pretend_jupyterlab(monkeypatch, installed):
    "Is JupyterLab here? All other packages are looked for as ever."
    find = importlib.util.find_spec

    def found(name, *args):
        return installed or None if name == "jupyterlab" else find(name, *args)

    monkeypatch.setattr("importlib.util.find_spec", found)


def darkdistill(*args, cwd, timeout=LONG, **env):
    "The command in a process of its own."
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
    )


def on_two_cores(rounds=2):
    return ["--rounds", str(rounds), *TINY[2:-1], "2"]


def contents(folder):
    return {
        p.relative_to(folder): p.read_bytes() if p.is_file() else None
        for p in Path(folder).rglob("*")
    }


# ---------------------------------------------------------------- bad input


def npz(path, **change):
    "A small data file of 3 classes, with some arrays replaced."
    rng = np.random.default_rng(0)
    arrays = dict(
        x_train=rng.random((60, 8, 8), np.float32),
        y_train=np.arange(60) % 3,
        x_test=rng.random((12, 8, 8), np.float32),
        y_test=np.arange(12) % 3,
    )
    np.savez(path, **{**arrays, **change})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A folder with data files and settings, good ones and bad ones."
    d = tmp_path_factory.mktemp("files")
    npz(d / "good.npz")
    x = np.random.default_rng(0).random((60, 8, 8), np.float32)
    x[3, 2, 1] = np.nan
    npz(d / "nan.npz", x_train=x)
    npz(d / "labels.npz", y_train=np.arange(60) % 3 + 1)
    npz(d / "negative.npz", y_train=np.arange(60) % 3 - 1)
    npz(d / "unseen.npz", y_test=np.arange(12) % 4)
    npz(d / "short.npz", y_train=np.arange(59) % 3)
    np.savez(
        d / "pickle.npz",
        x_train=np.array([{}]),
        y_train=np.array([0]),
        x_test=np.array([{}]),
        y_test=np.array([0]),
    )
    np.savez(d / "lacks.npz", x_train=x)
    whole = (d / "good.npz").read_bytes()
    for name, size in (("cut.npz", len(whole) // 2), ("stump.npz", 30), ("empty.npz", 0)):
        (d / name).write_bytes(whole[:size])
    broken = bytearray(whole)
    broken[len(whole) // 3] ^= 255
    (d / "flipped.npz").write_bytes(broken)
    (d / "text.npz").write_text("not an archive")
    start = core_records.asset("stage_start.safetensors").read_bytes()
    (d / "cut.safetensors").write_bytes(start[: len(start) // 2])
    (d / "empty.safetensors").write_bytes(b"")
    (d / "broken.toml").write_text("rounds = = 3")
    (d / "unknown.toml").write_text("round = 3")
    (d / "value.toml").write_text("rounds = 0")
    (d / "kind.toml").write_text("rounds = true")
    (d / "net.toml").write_text("[net]\nwidht = 8")
    for name, text in dict(
        list="net = [1]",
        number="net = 1.5",
        flags="darkdistill = [true]",
        day="rounds = 1979-05-27",
        tableday="[net]\nwidth = 1979-05-27",
        nested="rounds = " + "[" * 5000,
        home="out = ''",
    ).items():
        (d / f"{name}.toml").write_text(text)
    (d / "utf16.toml").write_bytes("rounds = 0".encode("utf-16"))
    (d / "nomark.toml").write_bytes("rounds = 0".encode("utf-16-le"))
    npz(d / "one.npz", y_train=np.zeros(60, int), y_test=np.zeros(12, int))
    (d / "file").write_text("a file, not a folder")
    (d / "old").mkdir()
    (d / "old" / "note.txt").write_text("keep me")
    (d / "link").symlink_to(d / "nowhere")
    return d


BAD = {  # arguments of `run` -> words that the sentence must contain
    "unknown data": ("--data digts", "'digts'", "did you mean 'digits'"),
    "unknown data 2": ("--data quux", "'quux'", "shapes"),
    "no such file": ("--data none.npz", "none.npz", "no such file"),
    "unknown method": (
        "--methods eefl,darkdistil",
        "methods='darkdistil'",
        "did you mean 'darkdistill'",
    ),
    "method twice": ("--methods eefl,eefl", "methods='eefl,eefl'", "different"),
    "no method": ("--methods ,", "methods=','", "eefl, calibrated_eefl"),
    "unknown objective": (
        "--objective boostnt",
        "objective='boostnt'",
        "did you mean 'boostnet'",
    ),
    "unknown network": ("--arch perceptron", "arch='perceptron'", "timm"),
    "network keyword": ("--net widht=8", "net='widht'", "did you mean 'width'"),
    "network value": ("--net width=7", "width=7", "multiple of 4"),
    "network type": ("--net stages=two", "net=", "two"),
    "keyword without value": ("--net width", "net=['width']", "width=16"),
    "darkdistill keyword": (
        "--darkdistill weight=uniform",
        "darkdistill='weight'",
        "did you mean 'weights'",
    ),
    "darkdistill value": ("--darkdistill weights=none", "weights='none'", "uniform"),
    "gamma zero": ("--gamma 0", "gamma='0'", "above 0"),
    "gamma negative": ("--gamma -0.5", "gamma='-0.5'", "above 0"),
    "gamma nan": ("--gamma nan", "gamma='nan'", "above 0"),
    "gamma word": ("--gamma small", "gamma='small'", "above 0"),
    "unknown family": ("--family iid", "family='iid'", "client or class"),
    "more clients than samples": ("--clients 5000", "clients", "5000", "1438"),
    "no clients": ("--clients 0", "clients='0'", "at least 1"),
    "tier nobody has": ("--clients 3", "tier 4 has no client", "3 clients"),
    "tier of share zero": ("--tiers 0.5,0.5,0,0", "tiers='0.5,0.5,0,0'", "above 0"),
    "tiers not one": ("--tiers 0.5,0.2,0.1,0.1", "tiers='0.5,0.2,0.1,0.1'", "add to 1"),
    "more tiers than exits": ("--tiers 5", "5 tiers", "4 exits"),
    "fewer tiers than exits": ("--tiers 0.5,0.5", "2 tiers", "4 exits"),
    "validation share": ("--valid 1", "valid='1'", "below 1"),
    "rounds zero": ("--rounds 0", "rounds='0'", "at least 1"),
    "rounds fraction": ("--rounds 2.5", "rounds='2.5'", "whole number"),
    "no seeds": ("--seeds 0", "seeds='0'", "at least 1"),
    "seed twice": ("--seeds 1,1", "seeds='1,1'", "different"),
    "participation": ("--participation 1.5", "participation='1.5'", "at most 1"),
    "learning rate": ("--lr -1", "lr='-1'", "above 0"),
    "batch size": ("--batch-size 0", "batch_size='0'", "at least 1"),
    "epochs": ("--epochs 0", "epochs='0'", "at least 1"),
    "too few pictures": ("--n-train 9999", "9999", "1438"),
    "no such start": ("--start none.safetensors", "none.safetensors", "no such file"),
    "unknown start": ("--start stag", "start='stag'", "stage_start"),
    "start of another form": (
        "--start stage_start",
        "start='stage_start'",
        "stem.weight is of shape (24, 3, 3, 3) there and of shape (32, 1, 3, 3) here",
    ),
    "start that does not fit": (
        "--data shapes16 --net width=8",
        "start='stage_start'",
        "use start none",
    ),
    "no start but a file": ("--start {files}/text.npz", "start=", "stage_start"),
    "broken start": ("--start {files}/cut.safetensors", "cut.safetensors", "cannot be read"),
    "empty start": ("--start {files}/empty.safetensors", "empty.safetensors", "cannot be read"),
    "difficulty bin": ("--difficulty-bin 0", "difficulty_bin='0'", "from 0.05 to 5"),
    "availability": ("--availability dropot=0.2", "availability='dropot'", "'dropout'"),
    "never a client": ("--availability unseen=0.95", "unseen=0.95", "at most 16 of 20 clients"),
    "device not there": ("--device cuda:99", "cuda:99"),
    "unknown device": ("--device abacus", "device='abacus'", "unknown"),
    "workers": ("--workers 0", "workers='0'", "at least 1"),
    "broken npz": ("--data {files}/text.npz", "text.npz", "cannot be read"),
    "empty npz": ("--data {files}/empty.npz", "empty.npz", "cannot be read"),
    "truncated npz": ("--data {files}/cut.npz", "cut.npz", "cannot be read"),
    "stump of an npz": ("--data {files}/stump.npz", "stump.npz", "cannot be read"),
    "damaged npz": ("--data {files}/flipped.npz", "flipped.npz", "cannot be read"),
    "pickled npz": ("--data {files}/pickle.npz", "pickle.npz", "never unpickled"),
    "npz lacks arrays": ("--data {files}/lacks.npz", "lacks.npz", "y_train"),
    "label gap": ("--data {files}/labels.npz", "labels.npz", "0..K-1"),
    "negative label": ("--data {files}/negative.npz", "negative.npz", "0..K-1"),
    "label out of range": ("--data {files}/unseen.npz", "unseen.npz", "label 3"),
    "labels missing": ("--data {files}/short.npz", "short.npz", "59 labels for 60 images"),
    "nan pixels": ("--data {files}/nan.npz", "nan.npz", "NaN"),
    "folder exists": ("--out {files}/old", "old'", "exists already"),
    "folder is a file": ("--out {files}/file", "file'", "exists already"),
    "folder is a dead link": ("--out {files}/link", "link'", "exists already"),
    "parent is a file": ("--out {files}/file/run", "file/run'", "not a folder"),
    "cannot be written": ("--out /proc/nothing/run", "out='/proc/nothing/run'", "cannot be made"),
    "no config file": ("--config none.toml", "config='none.toml'", "not a file"),
    "broken toml": ("--config {files}/broken.toml", "broken.toml", "not valid TOML"),
    "unknown toml key": ("--config {files}/unknown.toml", "'round'", "did you mean 'rounds'"),
    "toml value": ("--config {files}/value.toml", "rounds=0", "at least 1"),
    "toml kind": ("--config {files}/kind.toml", "rounds=True", "whole number"),
    "toml network keyword": ("--config {files}/net.toml", "net='widht'", "did you mean 'width'"),
    "toml table is a list": ("--config {files}/list.toml", "net=[1]", "keywords"),
    "toml table is a number": ("--config {files}/number.toml", "net=1.5", "keywords"),
    "toml table is flags": ("--config {files}/flags.toml", "darkdistill=[True]", "keywords"),
    "toml date": ("--config {files}/day.toml", "rounds=datetime.date(1979, 5, 27)", "whole number"),
    "toml date in a table": (
        "--config {files}/tableday.toml",
        "width='1979-05-27'",
        "whole number",
    ),
    "toml nested": ("--config {files}/nested.toml", "nested.toml", "not valid TOML"),
    "toml no name": ("--config {files}/home.toml", "out=''", "path"),
    "toml in UTF-16": ("--config {files}/utf16.toml", "rounds=0", "at least 1"),
    "toml in UTF-16 without mark": ("--config {files}/nomark.toml", "nomark.toml", "UTF-8"),
    "one class": ("--data {files}/one.npz", "one.npz", "single class", "two"),
    "long name": ("--out " + "x" * 5000, "out='xxx", "too long"),
    "long name to resume": ("--resume " + "x" * 5000, "resume='xxx", "not a run folder"),
    "long name of settings": ("--config " + "x" * 5000, "config='xxx", "not a file"),
    "long name of data": ("--data " + "x" * 5000 + ".npz", "xxx"),
    "nobody's home": ("--data ~nobody-at-all/x.npz", "data='~nobody-at-all/x.npz'", "not a path"),
    "endless seeds": ("--seeds 99999999999", "seeds='99999999999'", "how many"),
    "endless tiers": ("--tiers 99999999999", "tiers='99999999999'", "shares"),
    "no tier": ("--tiers 0", "tiers='0'", "shares"),
    "empty keyword": ("--net =8", "net=['=8']", "width=16"),
    "deep keyword": ("--net width=" + "[" * 2000, "net=", "width"),
    "darkdistill nan": ("--darkdistill tau=nan", "tau=nan", "finite number"),
    "darkdistill nan, not used": ("--methods eefl --darkdistill P=nan", "P=nan", "finite number"),
    "darkdistill keyword of another": ("--darkdistill lr=3", "darkdistill='lr'", "unknown"),
    "unknown option": ("--gama 1", "'--gama'", "did you mean '--gamma'"),
    "abbreviated option": ("--round 1", "'--round'", "did you mean '--rounds'"),
    "option without value": ("--rounds", "--rounds", "expected one argument"),
    "stray argument": ("digits", "unexpected argument 'digits'"),
    "resume nothing": ("--resume nowhere", "resume='nowhere'", "not a run folder"),
    "resume a folder of something else": ("--resume {files}/old", "old'", "no config.json"),
    "resume with settings": (
        "--resume {files}/old --rounds 9 --out x",
        "resume=",
        "leave out --rounds, --out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, files, tmp_path, monkeypatch, capsys):
    "Exit code 2 and one line on the error stream that names argument and value; nothing is written, nothing is lost."
    if case == "cannot be written" and not Path("/proc").is_dir():
        pytest.skip("no /proc on this system")
    line, *words = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = contents(files)
    usual = [] if re.search("--(data|resume)", line) else ["--data", "digits"]
    assert cli.main(["run", *usual, *(a.format(files=files) for a in line.split())]) == 2
    out, err = capsys.readouterr()
    assert (
        err.startswith("darkdistill: ") and err.count("\n") == 1 and out == "" and len(err) < 1600
    ), err
    assert "Traceback" not in err
    for w in words:
        assert w in err, err
    assert list(tmp_path.iterdir()) == [] and contents(files) == before


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_no_permission(tmp_path, capsys):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    try:
        assert cli.main(["run", "--out", str(tmp_path / "locked" / "run")]) == 2
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert "permission" in capsys.readouterr().err


ODD = {"empty": "", "a zero inside": "a\0b", "half a character": "\udcff", "endless": "x" * 5000}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "words",
    [
        "run --out",
        "run --config",
        "run --resume",
        "run --data",
        "run --arch",
        "run --start",
        "run --workers",
        "run --net",
        "compare",
        "report",
        "compare x --html",
        "lab",
        "",
    ],
)
def test_odd_words(words, odd, tmp_path, monkeypatch, capsys):
    "Nothing at all, NUL, bytes that are no text, 5000 characters: one sentence, exit code 2, nothing written."
    if (words, odd) == ("run --out", "\udcff"):
        pytest.skip("bytes that are no text may name a folder")
    pretend_jupyterlab(monkeypatch, True)
    monkeypatch.setattr(
        cli.subprocess, "call", lambda argv: pytest.fail("JupyterLab would be started")
    )
    if (words, odd) == ("lab", "\udcff"):
        pytest.skip("bytes that are no text may name a folder")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words.split(), odd]) == 2
    out, err = capsys.readouterr()
    assert (
        err.startswith("darkdistill: ") and err.count("\n") == 1 and out == "" and len(err) < 1600
    ), err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_the_training(tmp_path, monkeypatch, capsys):
    "The room for weights and report is looked for first."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    )
    assert cli.main(["run", *TINY]) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"out='runs/digits-001' needs about \d+ MB of disk, but .* has 1 MB\n$", err
    ), err
    assert list(tmp_path.iterdir()) == []


def test_settings_from_numpy_are_stored_as_plain_numbers():
    config = settings.make_config(
        dict(
            rounds=np.int64(3),
            gamma=np.float32(0.5),
            seeds=np.arange(2),
            tiers=np.array([0.5, 0.5]),
            alone=np.bool_(False),
            lr=np.float64(0.1),
            n_train=np.uint8(200),
            net=dict(width=np.int64(8), list=np.arange(2)),
            data=Path("digits"),
        )
    )
    assert json.loads(json.dumps(config)) == config
    assert (config["seeds"], config["tiers"], config["alone"], config["net"]) == (
        [0, 1],
        [0.5, 0.5],
        False,
        dict(width=8, list=[0, 1]),
    )
    for name, value in (
        ("rounds", np.float64(2)),
        ("rounds", np.bool_(True)),
        ("gamma", np.float32("nan")),
        ("seeds", np.array([0.5])),
        ("alone", np.int64(1)),
        ("net", dict(width={1})),
        ("net", dict(width=b"8")),
        ("net", {1: 2}),
        ("data", np.array(["digits"])),
    ):
        with pytest.raises(ValueError, match=f"^{name}="):
            settings.make_config({name: value})
    for given in ([], 5, "rounds=3"):
        with pytest.raises(ValueError, match="config=.* must be a dict"):
            settings.make_config(given)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["rnu"], "did you mean 'run'?"),
        (["compare"], "RUN"),
        (["compare", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["--verion"], "did you mean '--version'?"),
    ],
)
def test_bad_commands(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("darkdistill: ") and err.count("\n") == 1 and word in err, err


def test_bad_input_from_a_shell(tmp_path):
    "The same through a real process: exit code, one line, no traceback."
    r = darkdistill("run", "--gamma", "0", cwd=tmp_path)
    assert (r.returncode, r.stdout, r.stderr.count("\n")) == (2, "", 1)
    assert r.stderr.startswith("darkdistill: gamma='0'")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- help


def test_help_costs_no_torch(tmp_path):
    "--help, --version and a mistyped option are answered without loading PyTorch or anything else heavy."
    for args in (
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["run", "--gamma", "0"],
        ["run", "--methods", "x"],
    ):
        code = (
            f"import sys; from darkdistill_nb.app.cli import main\ntry: main({args})\nexcept SystemExit: pass\n"
            f"print('LOADED', sorted({{m.split('.')[0] for m in sys.modules}} & {{'torch', 'numpy', 'plotly', 'timm', 'sklearn', 'tqdm'}}))"
        )
        r = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert r.stdout.splitlines()[-1] == "LOADED []", r.stdout + r.stderr


def test_help_teaches(capsys):
    "Every setting is one entry with its default; there are examples; nothing is wider than a terminal."
    with pytest.raises(SystemExit) as e:
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    for o in settings.OPTIONS.values():
        assert re.search(rf"^  --{o.name.replace('_', '-')}\b", text, re.M), o.name
    assert text.count("\n  darkdistill run") >= 6
    shown = " ".join(text.split())
    for default in ("[shapes16]", "[20]", "[0.5]", "[40; shapes16: 20]", "[0,1,2]", "[cpu]"):
        assert default in shown, default
    assert "[none; shapes16: stage_start]" in shown and "[none; shapes16: width=24 pool=1]" in shown
    assert "[eefl,darkdistill; shapes16: eefl,darkdistill,calibrated_eefl]" in shown
    assert not re.search("picture", shown)


def test_every_example_in_the_help_parses():
    for line in (cli.EXAMPLES + cli.TOUR).splitlines():
        if m := re.match(r"  darkdistill (.*?)(  |$)", line):
            cli._parse(m[1].replace(" --help", "").split())


def test_version_and_entry_point(capsys):
    assert cli.main(["--version"]) == 0
    assert (
        capsys.readouterr().out.strip()
        == f"darkdistill {importlib.metadata.version('darkdistill_nb')}"
    )
    scripts = [
        e
        for e in importlib.metadata.entry_points(group="console_scripts")
        if e.name == "darkdistill"
    ]
    assert scripts and scripts[0].value == "darkdistill_nb.app.cli:main"


@pytest.mark.parametrize("module", ["darkdistill_nb", "darkdistill_nb.app.cli"])
def test_the_package_can_be_run(module, tmp_path):
    "python -m darkdistill_nb and python -m darkdistill_nb.app.cli are the command, with worker processes, too."
    command = [sys.executable, "-m", module]
    r = subprocess.run(
        [*command, "run", "--gamma", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert r.returncode == 2 and r.stderr.startswith("darkdistill: gamma='0'")
    tiny = [*on_two_cores(1), "--methods", "eefl", "--out", "run"]
    r = subprocess.run(
        [*command, "run", *tiny], cwd=tmp_path, capture_output=True, text=True, timeout=LONG
    )
    assert r.returncode == 0 and (tmp_path / "run/record.json").is_file(), r.stderr


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    assert "darkdistill COMMAND --help" in capsys.readouterr().out


# ---------------------------------------------------------------- good input


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    "The same command twice in one place, without --out: two folders."
    d = tmp_path_factory.mktemp("runs")
    return d, [darkdistill("run", *TINY, cwd=d) for _ in range(2)]


def test_same_command_twice_same_weights(two_runs):
    d, results = two_runs
    for r in results:
        assert r.returncode == 0, r.stderr
    a, b = d / "runs/digits-001", d / "runs/digits-002"
    assert sorted(p.name for p in a.iterdir()) == [
        "config.json",
        "record.json",
        "report.html",
        "weights",
    ]
    weights = sorted(p.name for p in (a / "weights").iterdir())
    assert weights == ["darkdistill-seed0.safetensors", "eefl-seed0.safetensors"]
    for w in weights:
        assert (a / "weights" / w).read_bytes() == (b / "weights" / w).read_bytes()


def test_output_of_a_run(two_runs):
    "The table with both methods, and the path of the report, on the output stream; progress on the error stream."
    d, (r, _) = two_runs
    for word in (
        "EEFL",
        "DarkDistill",
        "exit 2",
        "mean of exits",
        "minus EEFL",
        "one client alone",
        "report: runs/digits-001/report.html",
    ):
        assert word in r.stdout, word
    assert "100%" in r.stderr and "mean accuracy" not in r.stdout


def test_record_of_a_run(two_runs):
    from darkdistill_nb.core.records import load_record, load_tensors

    folder = two_runs[0] / "runs/digits-001"
    record = load_record(folder)
    assert [(r["method"], r["seed"]) for r in record.runs] == [("eefl", 0), ("darkdistill", 0)]
    assert record.config["clients"] == 6
    assert record.config["tiers"] == [0.5, 0.5]
    assert record.config["net"] == {"width": 8, "stages": 2}
    assert record.command == " ".join(["darkdistill run", *TINY])
    assert record.seconds > 0
    assert record.versions["torch"]
    for r in record.runs:
        assert len(r["rounds"]) == 2
        assert len(r["final"]["accuracy"]) == 2
        assert len(r["final"]["budget"]) == 39
        assert r["final"]["bytes_up"] == sum(row["bytes_up"] for row in r["rounds"]) > 0
        assert set(r["final"]["difficulty"]) == {"1", "2"}
        load_tensors(
            folder / r["weights"], record.info["files"][r["weights"]]
        )  # raises if the hash differs
    assert len(record.info["alone"]["0"]) == 6
    assert sorted(c["tier"] for c in record.info["alone"]["0"]) == [1, 1, 1, 2, 2, 2]
    config = json.loads((folder / "config.json").read_text())
    assert config["config"] == record.config


def test_report_is_self_contained(two_runs):
    "Nothing that a browser would fetch; plotly.js is in the page once."
    page = (two_runs[0] / "runs/digits-001/report.html").read_text()
    tags = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.S)
    assert not re.findall(r"<script[^>]*\ssrc|<img|<iframe|https?://|url\(|@import", tags)
    assert re.findall(r"<link[^>]*>", tags) == ['<link rel="icon" href="data:,">']
    assert page.count("plotly.js v") == 1 and page.count("<figure") == 9
    assert len(re.findall(r'"showSendToCloud": ?false', page)) == 9  # one per figure


def test_compare_and_report(two_runs, capsys, monkeypatch):
    d, _ = two_runs
    monkeypatch.chdir(d)
    r = darkdistill(
        "run", *TINY, "--gamma", "5", "--methods", "eefl", "--no-alone", "--out", "other", cwd=d
    )
    assert r.returncode == 0, r.stderr
    assert "one client alone" not in r.stdout
    assert cli.main("compare runs/digits-001 runs/digits-002 other --html both.html".split()) == 0
    out = capsys.readouterr().out
    row = lambda name: next(l for l in out.splitlines() if l.startswith(name))
    assert "+0.00" in row("digits-002: EEFL") and "not paired" in row(
        "other: EEFL"
    )  # the same run again; other clients
    assert re.search(r"^gamma +0\.5 +0\.5 +5$", out, re.M)
    page = (d / "both.html").read_text()
    assert "other: EEFL" in page and page.count("<figure") == 1
    (d / "runs/digits-001/report.html").unlink()
    assert cli.main(["report", "runs/digits-001"]) == 0
    assert (d / "runs/digits-001/report.html").stat().st_size > 1_000_000
    (d / "notes.html").write_text("my notes")
    assert cli.main("compare runs/digits-001 --html notes.html".split()) == 2
    assert (d / "notes.html").read_text() == "my notes"


def test_config_file_and_options(tmp_path, monkeypatch, capsys, files):
    "A file for all settings; options win; own data from an npz file."
    (tmp_path / "c.toml").write_text(
        f'data = "{files}/good.npz"\nrounds = 9\nseeds = [4]\n'
        'clients = 4\nalone = false\nmethods = ["eefl"]\nout = "from_file"\nworkers = 1\n[net]\nwidth = 8\nstages = 2\n'
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main("run --config c.toml --rounds 1".split()) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "from_file/config.json").read_text())["config"]
    assert (config["rounds"], config["seeds"], config["net"], config["methods"]) == (
        1,
        [4],
        {"width": 8, "stages": 2},
        ["eefl"],
    )
    assert "good" in capsys.readouterr().out or (tmp_path / "from_file/report.html").exists()


def test_workers_do_not_change_the_result(two_runs):
    "One job on two cores: its clients are spread over two processes, and the weights are the same."
    d, _ = two_runs
    r = darkdistill(
        "run", *on_two_cores(), "--methods", "eefl", "--no-alone", "--out", "spread", cwd=d
    )
    assert r.returncode == 0, r.stderr
    name = "weights/eefl-seed0.safetensors"
    assert (d / "spread" / name).read_bytes() == (d / "runs/digits-001" / name).read_bytes()


# ---------------------------------------------------------------- failures on the way


def test_diverging_training_is_one_sentence(tmp_path):
    "A job that fails in its process ends the run with one sentence and exit code 1, and the folder stays."
    args = on_two_cores()
    r = darkdistill("run", *args, "--lr", "1e30", "--out", "run", cwd=tmp_path)
    assert r.returncode == 1
    last = r.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("darkdistill: ")
        and "seed 0 failed: the training loss is" in last
        and "lower lr" in last
    ), r.stderr
    assert "Traceback" not in r.stderr
    assert (tmp_path / "run/config.json").exists()
    assert not (tmp_path / "run/record.json").exists()


def test_a_resume_is_not_promised_where_the_same_would_happen_again(tmp_path, capsys):
    "Too large a learning rate diverges again; a full disk may have room tomorrow."
    args = [*TINY, "--methods", "eefl", "--no-alone", "--out"]
    assert cli.main(["run", *args, str(tmp_path / "a"), "--lr", "1e30"]) == 1
    assert "lower lr" in (err := capsys.readouterr().err) and "--resume" not in err

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as m:
        m.setattr("darkdistill_nb.federated.engine.save_state", full)
        assert cli.main(["run", *args, str(tmp_path / "b")]) == 1
    assert "No space left" in (err := capsys.readouterr().err)
    assert f"continue with: darkdistill run --resume {tmp_path}/b" in err


def group_is_empty(group):
    def no_process_is_left():
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    return no_process_is_left


@pytest.fixture
def long_run(tmp_path, wait_until):
    "A run of many rounds with worker processes, stopped in the middle: long_run() -> its process, with checkpoints in run/jobs."
    started = []

    def start():
        p = subprocess.Popen(
            [*COMMAND, "run", *on_two_cores(rounds=100_000), "--out", "run"],
            cwd=tmp_path,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a background job would ignore it
        started.append(p)

        def a_checkpoint():
            return list(tmp_path.glob("run/jobs/*.safetensors"))

        wait_until(a_checkpoint, p)
        return p

    yield start
    for p in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.communicate()


posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups")


@posix
def test_ctrl_c_stops_everything(tmp_path, long_run, wait_until):
    "Ctrl-C as a terminal sends it, to the whole process group: exit code 130, one sentence on how to go on, no process left."
    p = long_run()
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=LONG)
    assert p.returncode == 130, err
    assert "Traceback" not in err
    assert (
        err.strip().splitlines()[-1]
        == "darkdistill: stopped; finished rounds are kept, continue with: darkdistill run --resume run"
    )
    wait_until(group_is_empty(p.pid))
    assert list((tmp_path / "run/jobs").glob("*.safetensors"))
    assert not (tmp_path / "run/record.json").exists()


@posix
def test_sigterm_stops_everything(long_run, wait_until):
    "SIGTERM for the main process alone, as a computing centre sends it: the same, with exit code 143."
    p = long_run()
    p.terminate()
    out, err = p.communicate(timeout=LONG)
    assert p.returncode == 143 and "Traceback" not in err, err
    assert (
        err.strip().splitlines()[-1]
        == "darkdistill: stopped; finished rounds are kept, continue with: darkdistill run --resume run"
    )
    wait_until(group_is_empty(p.pid))


@posix
def test_children_end_when_the_main_process_is_killed(tmp_path, long_run, wait_until):
    "SIGKILL for the main process alone: its workers end by themselves, and until then the folder stays locked."
    p = long_run()
    p.kill()
    p.wait()
    with runs._locked(tmp_path / "run", LONG):
        wait_until(group_is_empty(p.pid))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_worker_that_is_killed_ends_the_run(tmp_path, long_run, wait_until):
    "By the system, when memory is short: one sentence, a way to go on, and the other workers end."
    p = long_run()
    children = [
        int(c)
        for t in Path(f"/proc/{p.pid}/task").iterdir()
        for c in (t / "children").read_text().split()
    ]
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    out, err = p.communicate(timeout=LONG)
    last = err.strip().splitlines()[-1]
    assert (
        p.returncode == 1
        and "exit code -9 (-9 often means: out of memory); finished rounds are kept" in last
    ), err
    wait_until(group_is_empty(p.pid))


@posix
def test_workers_hold_the_lock(tmp_path):
    "As long as a worker lives, nobody else works in the folder, even if the process that took the lock has gone."
    config = settings.make_config(dict(data="digits", clients=4, net=dict(width=8)))
    folder = runs._make_folder(tmp_path / "run", dict(config=config))
    with runs._locked(folder, 0) as lock:
        workers = runs._workers(1, config, str(folder), 1, lock)
    try:
        with pytest.raises(ValueError, match="in use"):
            with runs._locked(folder, 0):
                pass
    finally:
        workers.close()
    with runs._locked(folder, 0):
        pass


UNGUARDED = {
    "an experiment": "from darkdistill_nb.experiments.runs import run_experiment\n"
    "small = dict(data='digits', rounds=1, seeds=2, clients=4, alone=False, net=dict(width=8, stages=2), n_train=100, n_test=50)\n"
    "run_experiment(small, workers=2, progress=False)",
    "a grid": "from darkdistill_nb.core.cells import each\nprint(list(each(abs, [1, 2, 3], 2)))",
    "a simulation": "from darkdistill_nb.core.datasets import load\nfrom darkdistill_nb.exits.networks import cnn\n"
    "from darkdistill_nb.federated import EEFL, make_clients, simulate\ntrain, test = load('digits', n_train=100, n_test=50)\n"
    "net = lambda: cnn(train.shape, 10, width=8)\n"
    "simulate(EEFL(participation=1.), net, train, test, make_clients(train.y, 4), 1, workers=2, progress=False)",
}


@pytest.mark.parametrize("script", UNGUARDED.values(), ids=UNGUARDED)
def test_a_script_without_a_guard_is_told_so_once(script, tmp_path):
    "Its workers import it, and leave where it would begin its work anew: one sentence, no folder, nothing about memory."
    (tmp_path / "script.py").write_text(script)
    r = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=LONG
    )
    lines = r.stderr.strip().splitlines()
    assert r.returncode == 1 and "__main__" in lines[-1] and "memory" not in r.stderr, r.stderr
    assert r.stderr.count("Traceback") == 1 and [p.name for p in tmp_path.iterdir()] == [
        "script.py"
    ], r.stderr
    guarded = 'if __name__ == "__main__":\n' + "".join(
        f"    {line}\n" for line in script.splitlines()
    )
    (tmp_path / "script.py").write_text(guarded)
    assert (
        subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, timeout=LONG
        ).returncode
        == 0
    )


# ---------------------------------------------------------------- consoles


SHOWS = """
from darkdistill_nb.app.cli import main

assert main(["compare", "ä 漢", "ä 漢", "--html", "é.html"]) == 0
assert main(["report", "ä 漢"]) == 0
assert main(["report", "漢"]) == 2
raise SystemExit(main(["run", "--help"]))
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp932", "cp1252", "utf-8"])
def test_every_console_can_show_the_table(encoding, tmp_path):
    "A character that the console lacks is replaced; in no case does a command fail because of it."
    from darkdistill_nb.core.records import asset

    (tmp_path / "ä 漢").mkdir()
    shutil.copy(asset("digits_default.json"), tmp_path / "ä 漢/record.json")
    r = subprocess.run(
        [sys.executable, "-c", SHOWS],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=LONG,
    )
    assert r.returncode == 0, r.stderr
    r.stdout.decode(encoding), r.stderr.decode(encoding)
    for page in ("é.html", "ä 漢/report.html"):
        assert "±" in (tmp_path / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "env",
    [dict(PYTHONIOENCODING="ascii"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")],
    ids=["ascii", "C"],
)
def test_a_run_ends_well_on_a_console_of_ascii(env, tmp_path):
    "Bar, table and errors, also where file names are read as ASCII; the files are in UTF-8 all the same."
    data = "größe.npz" if "LC_ALL" not in env else "size.npz"
    npz(tmp_path / data)
    words = ["run", *TINY, "--methods", "eefl", "--data", data, "--out", "übung 漢"]
    r = subprocess.run(
        [*COMMAND, *words],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, **env},
        timeout=LONG,
    )
    assert r.returncode == 0 and b"EEFL" in r.stdout, r.stderr
    assert f"on {data[:-4]}" in (tmp_path / "übung 漢/report.html").read_text(encoding="utf-8")


def test_a_closed_pipe_is_no_failure(tmp_path):
    "darkdistill report RUN | head -0"
    from darkdistill_nb.core.records import asset

    shutil.copy(asset("digits_default.json"), tmp_path / "record.json")
    p = subprocess.Popen(
        [*COMMAND, "compare", "."], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    p.stdout.close()
    assert (p.stderr.read(), p.wait(LONG)) == (b"", 0)


# ---------------------------------------------------------------- files from outside


def test_damaged_records_are_one_sentence(tmp_path, capsys):
    "Whatever a record.json holds, `report` and `compare` end with exit code 0, or 2 and one sentence that names it."
    from darkdistill_nb.core.records import asset

    good = json.loads(asset("digits_default.json").read_text(encoding="utf-8"))
    run = good["runs"][0]
    others = dict(
        no_runs=dict(runs=[]),
        number=dict(runs=[3]),
        empty=dict(runs=[{}]),
        config=dict(config={}),
        info=dict(info={}),
        text=dict(runs="x"),
        final=dict(runs=[{**run, "final": {}}]),
        rounds=dict(runs=[{**run, "rounds": 5}]),
        alone=dict(info={**good["info"], "alone": [1]}),
        accuracy=dict(runs=[{**run, "final": {**run["final"], "accuracy": "high"}}]),
        newer=dict(notes="a later version"),
    )
    texts = {
        **{k: json.dumps({**good, **v}) for k, v in others.items()},
        "nested": "[" * 100_000,
        "binary": "\0\1",
        "list": "[]",
        "nothing": "",
    }
    for name, text in texts.items():
        (tmp_path / "record.json").write_text(text)
        for words in (["report", str(tmp_path)], ["compare", str(tmp_path)]):
            code = cli.main(words)
            out, err = capsys.readouterr()
            sentence = code == 2 and err.count("\n") == 1 and str(tmp_path) in err
            assert (code, err) == (0, "") or sentence and name != "newer", (name, code, err)


# ---------------------------------------------------------------- lab


def test_lab(tmp_path, monkeypatch, capsys):
    "Copies of the tutorials never replace a student's work, and JupyterLab is started on them; without it there is one sentence."
    shared = tmp_path / "_tutorials"
    shared.mkdir()
    (shared / "lab1.ipynb").write_text("fresh")
    (shared / "lab2.ipynb").write_text("fresh")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/lab1.ipynb").write_text("my answers")
    started = []
    monkeypatch.setattr(core_records, "shipped", lambda what, here=None: shared)
    monkeypatch.setattr(cli.subprocess, "call", lambda argv: started.append(argv) or 0)
    pretend_jupyterlab(monkeypatch, True)
    assert cli.main(["lab", str(tmp_path / "mine"), "--no-browser"]) == 0
    assert [a for a in started[0] if a != "--allow-root"] == [
        sys.executable,
        "-m",
        "jupyterlab",
        str(tmp_path / "mine"),
        "--no-browser",
    ]
    assert (tmp_path / "mine/lab1.ipynb").read_text() == "my answers"
    assert (tmp_path / "mine/lab2.ipynb").read_text() == "fresh"
    pretend_jupyterlab(monkeypatch, False)
    assert cli.main(["lab"]) == 2
    assert 'pip install "darkdistill-nb[lab]"' in capsys.readouterr().err


def test_lab_opens_jupyterlab_on_the_tutorials(tmp_path):
    "The server really starts (also in a container, where everybody is root) on copies without the instructor's solutions."
    pytest.importorskip("jupyterlab")
    folder = tmp_path / "labs"
    p = subprocess.Popen(
        [*COMMAND, "lab", str(folder), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(LONG, lambda: os.killpg(p.pid, signal.SIGKILL))
    timer.start()
    try:
        seen = ""
        for line in p.stdout:
            seen += line
            if "/lab?token=" in line or "/lab/tree" in line:
                break
        assert "http://" in seen and "/lab" in seen, seen
        assert list(folder.glob("lab01*.ipynb")) and not (folder / "instructor").exists()
    finally:
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()

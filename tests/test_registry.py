"""Methods and objectives by name: one line in the registry is all that the command, its help, reports and runs need.

A class in a user's own file needs no line at all."""

import inspect, json, os, re, signal, subprocess, sys, time
import pytest
from conftest import COMMAND, LONG
from darkdistill_nb.app import cli
from darkdistill_nb.core.records import asset, load_record, load_tensors
from darkdistill_nb.core.registry import (
    CONTROL,
    METHODS,
    OBJECTIVES,
    Registry,
    help_line,
    is_address,
    keywords_of,
    laid_open,
    load_class,
)
from darkdistill_nb.distree.policies import POLICIES
from darkdistill_nb.exits.scores import SCORES
from darkdistill_nb.experiments import report, runs, settings
from darkdistill_nb.federated.generator import GeneratorSettings
from darkdistill_nb.federated.engine import _marks

TINY = (
    "--data digits --seeds 1 --clients 6 --tiers 2 --net width=8 stages=2 "
    "--darkdistill server_epochs=1".split()
)
small = dict(
    data="digits", rounds=1, seeds=1, clients=6, tiers=2, alone=False, n_train=200, n_test=60
)
small["net"] = dict(width=8, stages=2)

MINE = """
from darkdistill_nb.federated import EEFL


class MyMethod(EEFL):
    "The new global weights keep a share of the old ones."

    name = "mine"

    def __init__(self,
        keep=0.5, # share of the old weights, in [0, 1]
        **kwargs  # passed to `EEFL`
    ):
        super().__init__(**kwargs)
        self.keep = keep

    def aggregate(self, state, updates, rnd, streams):
        new, info = super().aggregate(state, updates, rnd, streams)
        for name, v in new["net"].items():
            if v.is_floating_point():
                v.lerp_(state["net"][name], self.keep)
        return new, info
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with a user's module in it; the current one."
    (tmp_path / "my_module.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_module", None)


def darkdistill(*args, cwd):
    return subprocess.run(
        [*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=LONG
    )


# ---------------------------------------------------------------- what is registered


@pytest.mark.parametrize("registry", [METHODS, OBJECTIVES, SCORES, POLICIES], ids=lambda r: r.what)
def test_every_entry_is_a_documented_class(registry):
    "Every name leads to a class of the right kind with a line of help; the class itself carries no other name."
    for name in registry:
        cls = registry[name]
        assert issubclass(cls, registry.kind()) and registry.label(name) == cls.__name__
        assert registry.line(name) == (inspect.getdoc(cls) or "").splitlines()[0] != ""
        assert vars(cls).get("name", name) == name
        assert name.isidentifier() and not is_address(name)


@pytest.mark.parametrize("name", [*METHODS, *OBJECTIVES])
def test_every_keyword_has_a_line_of_help(name):
    "Of the class's own keywords, those that `darkdistill methods NAME` shows."
    cls = METHODS[name] if name in METHODS else OBJECTIVES[name]
    bare = [k.name for k in keywords_of(cls).values() if not k.help and k.name not in WITHOUT]
    assert not bare, f"{name}: no comment behind {', '.join(bare)}"


WITHOUT = ()  # keywords without help: this list only shrinks


def test_names_do_not_clash():
    "The name of a method is a key of the configuration, too, beside the settings."
    names = [*METHODS, *OBJECTIVES, *settings.OPTIONS, *cli.NO_SETTINGS, "alone", "policy"]
    assert len(set(names) - {"alone"}) == len(names) - names.count("alone")
    assert CONTROL == "eefl" and settings.TRAINED == ["eefl", "darkdistill"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_by_its_name(name, tmp_path):
    "A job of one round: its entry is called by the name, and can be read by a report."
    exp = runs.Experiment({**small, "methods": [name]})
    entry = runs.run_job(exp, name, 0, tmp_path)
    assert entry["method"] == name and entry["weights"] == f"weights/{name}-seed0.safetensors"
    assert len(entry["final"]["accuracy"]) == len(exp.net)
    assert (tmp_path / f"jobs/{name}-seed0.safetensors").is_file()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_made_from_the_settings(name):
    exp = runs.Experiment({**small, "objective": name})
    assert type(exp.objective()) is type(exp.method("eefl").objective) is OBJECTIVES[name]


def test_a_new_method_is_one_line(monkeypatch):
    "Once a class is added, choices, help, keywords and the order of jobs know it."
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    METHODS.add("costly", "darkdistill_nb.federated.darkdistill:DarkDistill")
    config = settings.make_config(dict(methods="eefl,costly,darkdistill", seeds=1, costly="P=20"))
    assert config["costly"] == dict(P=20)
    order = [kind for kind, _ in runs.jobs_of(config)]
    assert order == ["costly", "darkdistill", "eefl", "alone"]
    assert "--costly K=V" in cli.make_parser().commands["run"].format_help()
    with pytest.raises(
        ValueError, match="methods='costli' is unknown .did you mean 'costly'.*eefl"
    ):
        settings.make_config(dict(methods="costli"))
    with pytest.raises(ValueError, match="costly='p' is unknown, did you mean 'P'"):
        runs.Experiment({**small, "methods": ["costly"], "costly": dict(p=1)}).method("costly")


# ---------------------------------------------------------------- keywords and addresses


class Base:
    "A base."

    def __init__(self, a, b=2):  # two
        pass


class Deeper(Base):
    def __init__(self, *args, c=3, **kwargs):
        super().__init__(*args, **kwargs)


class Shut(Deeper):
    def __init__(self, d=4):
        pass


class Inherits(Deeper):
    pass


def test_keywords_follow_the_chain_of_kwargs():
    assert list(keywords_of(Deeper)) == list(keywords_of(Inherits)) == ["c", "a", "b"]
    assert list(keywords_of(Shut)) == ["d"] and list(keywords_of(object)) == []
    assert str(keywords_of(Base)["a"]) == "a" and str(keywords_of(Base)["b"]) == "b=2"
    made = {}
    exec("class NoSource:\n    def __init__(self, x=1): pass", made)
    assert keywords_of(made["NoSource"])["x"].help == ""


def test_options_that_belong_together_have_their_own_names():
    "In Python one object, by name single options; both may be given, and the name wins."
    own = GeneratorSettings(d_h=7, gen_steps=9)
    m = METHODS.make("darkdistill", generator=own, gen_steps=3, kd_lr=0.5)
    assert (m.generator.d_h, m.generator.gen_steps, m.kd_lr, own.gen_steps) == (7, 3, 0.5, 9)
    known = keywords_of(METHODS["darkdistill"])
    assert "generator" not in known and known["gen_steps"].help and known["gen_steps"].default == 1
    assert str(keywords_of(METHODS["darkdistill_pl"])["lam_ce"]) == "lam_ce=1.0"
    with pytest.raises(ValueError, match="no option 'gen_stps'.*did you mean 'gen_steps'"):
        METHODS.make("darkdistill", gen_stps=3)
    with pytest.raises(ValueError, match="^gen_lr=-1"):
        METHODS.make("darkdistill", gen_lr=-1)
    everything = laid_open(vars(m))
    assert everything["gen_steps"] == 3 and "generator" not in everything


def test_options_of_a_group_come_from_settings_and_mark_checkpoints():
    "A checkpoint of a run names each of them, as it did when they were arguments of the method."
    config = settings.make_config(
        {**small, "methods": ["darkdistill"], "darkdistill": "gen_steps=3"}
    )
    exp = runs.Experiment(config)
    m = exp.method("darkdistill")
    assert config["darkdistill"] == dict(gen_steps=3) and m.generator.gen_steps == 3
    m.setup(exp.net)
    marks = _marks(m, exp.net, exp.train, exp.test, exp.clients[0], 0)
    assert marks["gen_steps"] == 3 and marks["lam_ce"] == 0.1 and "generator" not in marks


BAD = {  # address -> words of the sentence
    "my_module:MyMethd": "is no class, did you mean 'MyMethod'",
    "my_modul:MyMethod": "No module named 'my_modul'",
    "broken:M": "SyntaxError",
    "raises:M": "RuntimeError: not today",
    "other:M": "must be a class that extends EEFL",
    "other:f": "is no class",
    "empty:M": "is no class; empty has none",
    "my_module.py:MyMethod": "my_module",
}


@pytest.mark.parametrize("address", BAD)
def test_a_class_that_cannot_be_had_is_one_sentence(address, own, capsys):
    "Exit code 2, and nothing is written."
    (own / "broken.py").write_text("class M(\n")
    (own / "raises.py").write_text("raise RuntimeError('not today')")
    (own / "other.py").write_text("class M: pass\ndef f(): pass")
    (own / "empty.py").write_text("x = 1")
    for name in ("broken", "raises", "other", "empty"):
        sys.modules.pop(name, None)
    assert cli.main(["run", "--methods", f"eefl,{address}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and BAD[address] in err and "Traceback" not in err, err
    assert not (own / "runs").exists()


def test_keywords_of_an_own_class(own, capsys):
    "They are checked against its signature, and refused where the class has no part."
    run = ["run", "--rounds", "1", "--methods", "my_module:MyMethod", "--my_module:MyMethod"]
    assert cli.main([*run, "kep=1"]) == 2
    assert "my_module:MyMethod='kep' is unknown, did you mean 'keep'" in capsys.readouterr().err
    assert cli.main(["run", "--my_module:MyMethod", "keep=1"]) == 2
    assert "neither among the methods nor the objective" in capsys.readouterr().err
    assert cli.main(["methods", "my_module:MyMethod"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"keep=0.5 +share of the old weights", out) and "participation" not in out


def test_help_is_read_without_importing():
    for registry in (METHODS, OBJECTIVES):
        code = f"from darkdistill_nb.core.registry import {registry.what.upper()}S as r\n"
        code += "import sys\nprint([r.line(n) for n in r], 'torch' in sys.modules)"
        r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert r.stdout.endswith("False\n") and "''" not in r.stdout, r.stderr
    assert help_line("darkdistill_nb.core.registry:METHODS") == ""


def test_registry_refuses_what_it_cannot_keep():
    for entry in ("eefl", 3, "a b:c", ":C", "m:"):
        with pytest.raises(ValueError, match="a class, or its address"):
            Registry("thing", Base, x=entry)
    things = Registry("thing", Base, x=Shut)
    for name in (None, 3, ["x"], "", "y"):
        with pytest.raises(ValueError, match="^thing=.*choose one of x"):
            things.find(name)
    assert dict(things) == {"x": Shut} and "y" not in things and ["x"] not in things
    with pytest.raises(ValueError, match="address="):
        load_class("x")


# ---------------------------------------------------------------- a method of one's own, from start to end

METHOD = "my_module:MyMethod"


def test_a_method_of_ones_own(own):
    "Twenty lines in a file beside the user: it trains, stands in the table and the report, and is stored with its keywords."
    args = [
        "run",
        *TINY,
        "--rounds",
        "2",
        "--methods",
        f"eefl,{METHOD}",
        f"--{METHOD}",
        "keep=0.25",
    ]
    r = darkdistill(*args, "--workers", "2", "--out", "two", cwd=own)
    assert r.returncode == 0, r.stderr
    row = next(line for line in r.stdout.splitlines() if line.startswith("MyMethod"))
    assert re.search(r"\d\d\.\d\d .* [+-]\d+\.\d\d", row), row
    record = load_record(own / "two")
    assert record.config["methods"] == ["eefl", METHOD] and record.config[METHOD] == dict(keep=0.25)
    assert [run["method"] for run in record.runs] == ["eefl", METHOD]
    page = (own / "two/report.html").read_text(encoding="utf-8")
    assert "EEFL and MyMethod on digits" in page and "MyMethod minus EEFL" in page
    r = darkdistill(*args, "--workers", "1", "--out", "one", cwd=own)
    assert r.returncode == 0, r.stderr
    name = "weights/my_module-MyMethod-seed0.safetensors"
    assert (own / "one" / name).read_bytes() == (own / "two" / name).read_bytes()
    ours, control = (load_tensors(own / "one" / w["weights"])[0] for w in record.runs[::-1])
    assert any((ours[k] != control[k]).any() for k in ours), "keep changed nothing"


def test_its_own_colour_and_name():
    "In figures, by the place of its row; two classes of one name are told apart; nothing is imported."
    old = load_record(asset("digits_default.json"))
    for method in ("gone:Mine", "other.gone:Mine"):
        old.runs += [{**run, "method": method} for run in old.runs if run["method"] == "eefl"]
    rows = report.summary(old)
    assert [w["name"] for w in rows] == ["EEFL", "DarkDistill", "gone:Mine", "other.gone:Mine"]
    lines = {t.name: t.line.color for t in report.accuracy_figure(old).data if t.name}
    assert len(lines) == len(set(lines.values())) == 4
    assert "gone" not in sys.modules


@pytest.mark.skipif(os.name != "posix", reason="process groups and SIGKILL")
def test_a_killed_run_goes_on(own, wait_until):
    "With a method of one's own, on two cores: the resumed run ends with the weights of an uninterrupted one."
    args = ["run", *TINY, "--rounds", "10", "--no-alone", "--methods", f"{METHOD},eefl"]
    p = subprocess.Popen(
        [*COMMAND, *args, "--workers", "2", "--out", "killed"],
        cwd=own,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    file = own / "killed/jobs/my_module-MyMethod-seed0.safetensors"

    def a_checkpoint():
        return file.exists()

    wait_until(a_checkpoint, p)
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate(timeout=LONG)
    assert not (own / "killed/record.json").exists(), "the run was over before it could be killed"
    time.sleep(0.1)
    r = darkdistill("run", "--resume", "killed", "--workers", "2", cwd=own)
    assert r.returncode == 0, r.stderr
    r = darkdistill(*args, "--workers", "1", "--out", "whole", cwd=own)
    assert r.returncode == 0, r.stderr
    for name in ("my_module-MyMethod-seed0.safetensors", "eefl-seed0.safetensors"):
        a, b = (load_tensors(own / d / "weights" / name)[0] for d in ("killed", "whole"))
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a), name


def test_an_objective_of_ones_own(own):
    (own / "softly.py").write_text(
        "from darkdistill_nb.exits import Joint\nclass Last(Joint):\n    'The last exit counts.'\n"
        "    def __init__(self, share=1.0):\n        super().__init__(weights=[0, share])\n"
    )
    exp = runs.Experiment({**small, "objective": "softly:Last", "softly:Last": dict(share=3)})
    assert exp.objective().weights == [0, 3] and exp.config["softly:Last"] == dict(share=3)


# ---------------------------------------------------------------- old words


def test_old_configurations_stay_readable(tmp_path):
    'What older versions stored as "policy" is read as the objective: settings, files, records, pages.'
    old = load_record(asset("digits_default.json"))
    assert "policy" in old.config and "objective" not in old.config
    config = settings.make_config(old.config)
    assert config["objective"] == "boostnet" and "policy" not in config
    (tmp_path / "old.toml").write_text('policy = "joint"\n[darkdistill]\ntau = 1.0\n')
    given = settings.read_toml(tmp_path / "old.toml")
    assert settings.make_config(given)["objective"] == "joint"
    with pytest.raises(ValueError, match="its name is objective now"):
        settings.make_config(dict(policy="joint", objective="l2w"))
    assert "exits trained with boostnet" in report.in_words(old)
    new = load_record(asset("digits_default.json"))
    new.config = {k: v for k, v in config.items() if k != "tiers"} | dict(tiers=old.config["tiers"])
    assert report.differing(old, new) == []
    report.write_report(old, tmp_path / "report.html")


def test_a_run_of_an_older_version_can_be_resumed(tmp_path, capsys):
    "Its config.json says policy, and has an empty table of keywords."
    exp = runs.Experiment(small)
    config = {k: v for k, v in exp.config.items() if k != "objective"}
    config |= dict(policy="boostnet", darkdistill={})
    saved = dict(format=1, config=config, data_sha256=exp.digest(), command="x", created="y")
    runs._make_folder(tmp_path / "run", saved)
    assert cli.main(["run", "--resume", str(tmp_path / "run"), "--workers", "1"]) == 0
    assert "DarkDistill" in capsys.readouterr().out
    assert load_record(tmp_path / "run").config["objective"] == "boostnet"


def test_a_file_names_no_class_to_be_imported(tmp_path):
    "A manifest or a stored network says how it was trained by a registered name only."
    from darkdistill_nb.exits.stored import load_trained
    from darkdistill_nb.core.records import save_tensors

    cell = dict(policy="os:PathLike", options={}, net="vit", net_options={})
    save_tensors(tmp_path / "x.safetensors", {}, dict(cell=cell, shape=[1, 8, 8], classes=["a"]))
    with pytest.raises(ValueError, match="policy='os:PathLike' must be one of joint"):
        load_trained(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- one command


def test_one_page_teaches_all_commands(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^    {command}\b", text, re.M) and f"darkdistill {command}" in text
    for name in cli.EXPERIMENTS:
        assert name in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", cli.EXPERIMENTS)
def test_experiments_are_reached_from_the_command(name, capsys):
    "Their own help, their own errors, and the same through python -m."
    with pytest.raises(SystemExit) as e:
        cli.main(["experiment", name, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: darkdistill experiment {name} ") and "--out" in out
    r = subprocess.run(
        [sys.executable, "-m", cli.EXPERIMENTS[name], "--help"], capture_output=True, text=True
    )
    assert r.returncode == 0 and r.stdout == out


def test_experiments_are_listed(capsys):
    assert cli.main(["experiment"]) == 0
    listed = capsys.readouterr().out
    for name in cli.EXPERIMENTS:
        assert re.search(rf"^  {name} +\w", listed, re.M)
    assert cli.main(["experiment", "lattent"]) == 2
    assert "did you mean 'latent'?" in capsys.readouterr().err


def test_an_experiment_runs_from_the_command(tmp_path, capsys):
    words = "experiment exits pays --data digits --seeds 2 --workers 1 --set epochs=1 n_train=300 n_test=64"
    assert cli.main([*words.split(), "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    found = json.loads(next(tmp_path.rglob("record.json")).read_text(encoding="utf-8"))
    assert found["runs"] and found["command"]


def test_benchmarks_are_reached_from_the_command(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["bench", "exits", "--help"])
    assert e.value.code == 0 and "usage: darkdistill bench exits" in capsys.readouterr().out


def test_methods_are_listed(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in [*METHODS, *OBJECTIVES]:
        assert re.search(rf"^  {name} +\w", out, re.M)
    assert cli.main(["methods", "darkdistil"]) == 2
    assert "did you mean 'darkdistill'?" in capsys.readouterr().err
    assert cli.main(["methods", "pathlib:Path"]) == 2
    assert "must be a method or an objective" in capsys.readouterr().err

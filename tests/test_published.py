"""The paper's experiments, the claims that are judged on them, the fair question to every baseline, and a user's method against stored runs."""

import math, sys
from dataclasses import is_dataclass
import pytest, torch
from darkdistill_nb.app.cli import main as command
from darkdistill_nb.core.cells import run_stored
from darkdistill_nb.core.records import Record, asset
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet
from darkdistill_nb.experiments import darkdistill_results as results
from darkdistill_nb.experiments import federated
from darkdistill_nb.experiments import published as page
from darkdistill_nb.experiments.against import against_stored, against_table
from darkdistill_nb.experiments.federated import (
    COMPARED,
    fair_gain,
    fair_table,
    fair_values,
    own_cell,
    own_record,
)
from darkdistill_nb.experiments.federated import main as experiment
from darkdistill_nb.experiments.settings import make_config, read_toml
from darkdistill_nb.federated.calibration import calibrated
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, Client, make_clients

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = dict(
    data="digits",
    rounds=1,
    clients=8,
    participation=1.0,
    net=dict(width=4),
    methods=["eefl", "darkdistill"],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


def config(**changes):
    return make_config(page.scale_settings("mini") | QUICK | changes)


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("scale", page.SCALES)
def test_a_scale_is_also_a_plain_run(scale):
    "Every key of the file is a setting of `darkdistill run`, and every method can be made."
    given = read_toml(asset(f"configs/{scale}.toml"))
    c = make_config(given)
    assert len(c["seeds"]) >= 2
    for name in c["methods"]:
        page.METHODS.make(name, **c.get(name, {}))
    assert page.paper_cell(c, "darkdistill", 0)["rounds"] == c["rounds"]


def test_scales_differ_in_size_only_as_told():
    mini, cpu, gpu = map(page.scale_settings, page.SCALES)
    assert mini["rounds"] < cpu["rounds"] < gpu["rounds"] == 500
    assert gpu["clients"] == 100 and gpu["participation"] == 0.1 and gpu["data"] == "cifar100"
    assert set(COMPARED) <= set(cpu["methods"])


def test_scale_and_fair_question_use_one_form_of_each_baseline():
    cpu = page.scale_settings("cpu")
    for name, options in COMPARED.items():
        assert cpu.get(name, {}) == options(cpu["rounds"]), name


# ---------------------------------------------------------------- one training


def test_a_watched_server_step_changes_nothing(folder):
    "The weights of a watched DarkDistill are DarkDistill's, to the last bit."
    cell = page.paper_cell(config(), "darkdistill", 3)
    train, test, clients, build = page._federation(cell)
    plain = DarkDistill(
        BoostNet(), **{k: cell[k] for k in ("lr", "decay", "batch_size", "participation")}
    )
    how = dict(rounds=1, seed=3, progress=False)
    a = simulate(page._method(cell), build, train, test, clients, **how)
    b = simulate(plain, build, train, test, clients, **how)
    assert all(torch.equal(a.state["net"][k], b.state["net"][k]) for k in b.state["net"])
    assert set(a.log[0]["moved"]) == {"1", "2", "3", "4"}


def test_moved_by_hand():
    "The clients went from (0, 0) to (3, 4), a way of 5; the server went on to (3, 4.5), a tenth of it."
    net = lambda *v: {"stages.1.w": torch.tensor(v), "stem.w": torch.tensor([7.0])}
    tiers = {2: (net(3.0, 4.0), 9), 1: (net(0.0, 0.0), 9)}
    after = {2: (net(3.0, 4.5), 9), 1: (net(0.0, 0.0), 9)}
    assert page.moved(net(0.0, 0.0), tiers, after) == {"2": pytest.approx(0.1)}


def test_moved_counts_statistics_of_whole_numbers_too():
    "BatchNorm counts its batches in 64-bit integers."
    net = lambda v, n: {"stages.0.w": torch.tensor([v]), "stages.0.seen": torch.tensor(n)}
    told = page.moved(net(0.0, 0), {1: (net(3.0, 4), 9)}, {1: (net(3.0, 9), 9)})
    assert told == {"1": pytest.approx(1.0)}


@pytest.mark.parametrize("name", ["own", "exit_options"])
@pytest.mark.parametrize("value", [3, "x", [1]])
def test_options_are_dicts(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        page.paper_cell(config(), "eefl", 0, **{name: value})


def test_without_a_learning_rate_the_server_moves_nothing(folder):
    cell = page.paper_cell(config(), "darkdistill", 0, kd_lr=0.0)
    assert set(page.train_paper(cell, folder)["moved"].values()) == {0.0}


def test_unconditional_generators_do_not_read_difficulty():
    m = page.Unconditional()
    m.setup(cnn((1, 8, 8), 10, width=4))
    G = m.generators({}, Streams(0))[1]
    assert G.level is None and (m.weights, m.generator.lam_dif) == ("uniform", 0.0)
    y, d = torch.zeros(4).long(), torch.arange(4.0)
    draw = lambda d: G.draw(y, d, torch.Generator().manual_seed(0))
    assert torch.equal(draw(d), draw(d + 3))


def test_a_run_that_diverges_is_told_not_raised(folder):
    "Distillation with an absurd rate; the record has the message, and tables leave the run out."
    cell = page.paper_cell(config(), "darkdistill", 0, kd_lr=1e9, kd_steps=20)
    said = page.train_paper(cell, folder)
    assert "lower kd_lr" in said["diverged"]
    runs = [dict(row="eefl", gamma=1.0, seed=s, exits=[0.5] * 4) for s in (0, 1)]
    runs += [dict(row="wild", gamma=1.0, seed=s, **said) for s in (0, 1)]
    assert "| wild | diverged |" in page.paper_table(Record(dict(gamma=1.0), runs=runs))


def test_marks_are_of_clients_not_of_methods(folder):
    marks = {
        (m, s, g): page.train_paper(page.paper_cell(config(), m, s, g), folder)["pair"]
        for m, s, g in (("eefl", 0, 1.0), ("heterofl", 0, 1.0), ("eefl", 1, 1.0), ("eefl", 0, 0.1))
    }
    assert marks["eefl", 0, 1.0] == marks["heterofl", 0, 1.0]
    assert len(set(marks.values())) == 3


def test_difficulty_is_judged_only_where_it_is_known(folder):
    assert "rank" not in page.train_paper(page.paper_cell(config(), "eefl", 0), folder)


def test_fifths_and_ranks_by_hand():
    "An exit that is right on the easy half and sure of it: accuracy falls by fifths, its loss rises."
    n, hard = 100, torch.linspace(0, 1, 100)
    y, sure = torch.zeros(n).long(), 5 - 10 * hard
    data = type("D", (), dict(y=y, difficulty=hard))
    logits = torch.stack([sure, -sure], 1)[None]
    told = page._assessed(logits, logits.argmax(-1) == y, data)
    assert told["fifths"] == [[1.0, 1.0, 0.5, 0.0, 0.0]]
    assert told["rank"][0] == pytest.approx(1.0)


# ---------------------------------------------------------------- experiments


@pytest.mark.parametrize("name", [n for n in page.PARTS if n != "generator"])
def test_rows_have_names_of_their_own(name):
    own = page.scale_settings("mini") if name == "lora" else config()
    for scale in page.SCALES:
        rows = page._rows(name, scale, own)
        names = [r[:3] for r in rows]
        assert len(set(names)) == len(names) and len({str(r[3]) for r in rows}) == len(rows)


def test_low_rank_corrections_are_for_the_stage_alone():
    with pytest.raises(ValueError, match="data='digits' must be shapes16 with a trunk"):
        page.paper_cell(config(), "eefl", 0, trunk="lora")
    with pytest.raises(ValueError, match="trunk='all' must be one of vit, lora"):
        page.paper_cell(page.scale_settings("mini"), "eefl", 0, trunk="all")


def test_low_rank_corrections_leave_the_trunk_alone():
    "Only corrections and exits are trained and sent; the whole ViT is the same network without them."
    cells = {t: page.paper_cell(page.scale_settings("mini"), "eefl", 0, trunk=t) for t in page.TRUNKS}
    nets = {}
    for trunk, cell in cells.items():
        with page.Streams(0).scope("init"):
            nets[trunk] = page._federation(cell)[3]()
    trained = {t: sum(p.numel() for p in n.parameters() if p.requires_grad) for t, n in nets.items()}
    assert 0 < trained["lora"] < 0.3 * trained["vit"]
    kept = {k for k, p in nets["lora"].named_parameters() if p.requires_grad}
    assert all("lora_" in k or k.startswith("exits.") for k in kept)


def test_l2w_has_the_settings_of_the_paper():
    cell = page.paper_cell(config(), "eefl", 0, objective="l2w")
    objective = page._method(cell).objective
    assert (objective.interval, objective.P) == (10, 30)
    assert "exits" not in page.paper_cell(config(), "eefl", 0)


@pytest.mark.parametrize("name", page.DATA)
def test_other_data_start_from_nothing(name):
    given = make_config(page.scale_settings("cpu") | page.DATA[name])
    assert given["start"] is None and given["data"] != "shapes16"


def test_experiments_share_their_trainings(folder):
    "After the main table nothing is trained again for budgets, difficulties and costs."
    done = []
    how = dict(workers=1, on_cell=lambda *a: done.append(a), **QUICK)
    for name in ("main", "budget", "cost"):
        record = page.run_paper(name, folder, **how)
        assert set(page.PARTS[name]) <= set(record.runs[0])
        if name == "main":
            assert len(done) == 4
    assert (
        len(done) == 6
    )  # and the two of the calibrated method, which `QUICK` leaves out of the table


def test_every_form_is_another_method_of_the_same_kind():
    cpu = dict(page.scale_settings("cpu"), seeds=[0])
    rows = {name: page._method(cell) for name, *_, cell in page._rows("forms", "cpu", cpu)}
    assert len(rows) >= 17 and {name.partition(",")[0] for name in rows} <= set(cpu["methods"])
    plain = lambda m: {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple))}
    groups = lambda m: [vars(m.objective), *(vars(v) for v in vars(m).values() if is_dataclass(v))]
    for name, m in rows.items():
        usual = rows[name.partition(",")[0]]
        same = (plain(m), groups(m)) == (plain(usual), groups(usual))
        assert type(m).__name__ == type(usual).__name__ and same == (m is usual)


def test_options_of_a_method_go_before_those_of_the_federation():
    cell = page.paper_cell(config(), "scalefl", 0, lr=0.5, own=dict(gamma=0.7))
    m = page._method(cell)
    assert (m.lr, m.gamma, cell["gamma"]) == (0.5, 0.7, 1.0)
    cell = page.paper_cell(config(), "scalefl", 0, exit_options=dict(weights="scalefl"))
    assert page._method(cell).objective.weights == "scalefl"


def test_stored_rows_that_are_one_training_have_the_same_numbers():
    "EEFL of the main table is also that of the ablations, of the server's experiment and so on."
    key = lambda r: (r["row"], r["gamma"], r["seed"])
    table = {key(r): r["exits"] for r in page.paper_record("main").runs}
    for name in ("ablation", "forms", "server", "objective", "sizes"):
        shared = {key(r): r["exits"] for r in page.paper_record(name).runs if key(r) in table}
        assert len(shared) >= 3 and shared == {k: table[k] for k in shared}, name


def test_a_record_cannot_have_one_seed(folder):
    with pytest.raises(ValueError, match="seeds=.0. must be at least two"):
        page.run_paper("main", folder, seeds=[0])


def test_values_and_gains_by_hand():
    runs = [
        dict(row=row, gamma=1.0, seed=s, exits=[0.1 * s, 0.3 + 0.1 * b])
        for row, b in (("eefl", 0), ("x", 1))
        for s in (1, 2, 3)
    ]
    r = Record(dict(gamma=1.0), runs=runs)
    assert page.paper_values(r, "eefl", measure="exit 1") == pytest.approx({1: 10, 2: 20, 3: 30})
    assert page.paper_gain(r, "x") == pytest.approx([5, 5, 5])
    assert "+5.00 [+5.00, +5.00] | holds" in page.paper_table(r)


def test_generators_are_asked_on_all_tiers(folder):
    cell = dict(page.paper_cell(config(), "eefl", 0), grid=[[4, 8, True, 2], [4, 8, False, 2]])
    grid = page.train_generators(cell, folder)["grid"]
    assert [e["conditional"] for e in grid] == [True, False]
    assert all(len(e["got"]) == len(page.ASKED) and 0 <= e["hit"] <= 1 for e in grid)


# ---------------------------------------------------------------- the fair question


@pytest.mark.parametrize("name", COMPARED)
def test_calibration_at_strength_0_is_the_method_itself(name, folder):
    "For every baseline: nothing sent, nothing shifted, the same weights to the last bit."
    cell = page.paper_cell(config(), "eefl", 0)
    train, test, clients, build = page._federation(cell)
    options = COMPARED[name](1)
    how = dict(rounds=2, seed=0, progress=False)
    nets = [
        simulate(kind(BoostNet(), **more, **options), build, train, test, clients, **how).state[
            "net"
        ]
        for kind, more in (
            (METHODS[name], {}),
            (calibrated(METHODS[name]), dict(calibration=0, votes="none")),
        )
    ]
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


@pytest.mark.parametrize("name", ["depthfl", "scalefl", "heterofl"])
def test_calibrated_teachers_and_students_are_shifted_alike(name):
    "The method's loss of shifted logits: its value is that of decisions F_e + a."
    m = calibrated(METHODS[name])(BoostNet(), calibration=1.0, **COMPARED[name](0))
    with Streams(0).scope("init"):
        state = m.setup(cnn((1, 8, 8), 3, width=8))
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    data = type("D", (), dict(y=y))
    client = Client(0, 4, torch.arange(6), torch.arange(0))
    sent = m.send(state, client)
    net = m.receive(sent, 4)
    g = torch.Generator().manual_seed(1)
    raw = [torch.randn(6, 3, generator=g) for _ in range(4)]
    a = (torch.tensor([4.0, 2, 3]) / 9).log() + math.log(3)
    boosted = [f + a for f in BoostNet().predict(raw)]
    plain = METHODS[name](page.OBJECTIVES.make("joint"), **COMPARED[name](0))
    plain.setup(m.net)
    expected = plain.local_loss(net, sent, data, 10)(boosted, y)
    assert torch.allclose(m.local_loss(net, sent, data, 10)(raw, y), expected, atol=1e-5)


def test_exits_of_width_methods_are_covered_by_all(folder):
    "HeteroFL's narrow clients train all exits, ExclusiveFL's few clients do: their votes are equal."
    from darkdistill_nb.core.records import load_tensors
    from darkdistill_nb.experiments.federated import train_own

    for name, most in (("heterofl", "all"), ("exclusivefl", "few"), ("scalefl", "tiers")):
        cell = own_cell("digits", 0.0, 1, name, rounds=1, width=8, clients=8, participation=1.0)
        train_own(cell, folder / name)
        stored = load_tensors(next((folder / name / "logits").glob("*")))[0]
        n = stored["samples"].tolist()
        if most == "tiers":
            assert min(n) > 0
        else:
            assert n[:3] == [0, 0, 0] and n[3] > (800 if most == "all" else 0)
        assert (
            all(v.shape[0] == 4 for k, v in stored.items() if k.startswith("valid."))
            or most != "all"
        )


def test_old_cells_of_the_control_keep_their_names():
    "Stored trainings of EEFL are found again: their cells have no new keys."
    assert set(own_cell("digits")) == {
        "experiment",
        "data",
        "n_train",
        "n_test",
        "rounds",
        "lr",
        "batch_size",
        "width",
        "clients",
        "gamma",
        "participation",
        "tau",
        "seed",
    }


def test_fair_values_pair_by_seed():
    run = lambda m, c, s, a: dict(method=m, variant=c, seed=s, accuracy=[a, a])
    runs = [
        run(m, c, s, 0.5 + 0.1 * (m == "x") + 0.01 * s)
        for m in ("eefl", "x")
        for c in ("plain", "+ votes")
        for s in (1, 2)
    ]
    r = Record(dict(seeds=[1, 2], methods=["eefl", "x"]), runs=runs)
    assert fair_values(r, "x", "plain") == pytest.approx({1: 61, 2: 62})
    (mean, low, high), said = fair_gain(r, "x", "plain")
    assert (mean, said) == (pytest.approx(10), "holds")
    assert fair_gain(r, "x", "+ votes", ("x", "plain"))[0] == (0, 0, 0)


def _fair(*methods, control):
    "A record of two seeds in which every method is a point better than the control."
    seeds, ways = (1, 2), ("plain", "calibrated", "+ votes")
    value = lambda m, s: control + 0.01 * (m != "eefl") + 0.001 * s
    runs = [
        dict(method=m, variant=v, seed=s, accuracy=[value(m, s)])
        for m in methods
        for v in ways
        for s in seeds
    ]
    return Record(dict(name="digits", seeds=list(seeds), methods=list(methods)), runs=runs)


def test_a_later_row_is_measured_against_the_control_of_its_own_record():
    "The later record's control is 20 points higher: the row's difference does not see it."
    first, later = _fair("eefl", "depthfl", control=0.5), _fair("eefl", "heterofl", control=0.7)
    lines = fair_table(first, later).splitlines()
    assert [l.split(" | ")[0] for l in lines[2:5]] == ["| eefl", "| depthfl", "| heterofl"]
    assert "| 50.15 |" in lines[2] and "71.15: +1.00" in lines[4]
    assert lines[5:] == [
        "",
        "heterofl: from another record, whose own control has 70.15, 70.15, 70.15.",
    ]


@pytest.mark.parametrize(
    "asked, name, trained",
    [
        (["heterofl"], "fair_digits_heterofl", ["eefl", "heterofl"]),
        (["heterofl", "eefl"], "fair_digits_heterofl", ["eefl", "heterofl"]),
        (["eefl"], "fair_digits_eefl", ["eefl"]),
        (["heterofl", "depthfl"], "fair_digits_depthfl_heterofl", ["eefl", "depthfl", "heterofl"]),
        (list(reversed(COMPARED)), "fair_digits", list(COMPARED)),
    ],
)
def test_some_methods_have_a_record_of_their_own_name(asked, name, trained, tmp_path, monkeypatch):
    "It never takes the place of the record of all methods, and the control is always in it."
    monkeypatch.setattr(federated, "run_grid", lambda job, cells, *rest: [])
    monkeypatch.setattr(federated, "_decisions", lambda *a: [])
    record = federated.run_fair("digits", tmp_path, asked)
    assert record.config["methods"] == trained
    assert [f.parent.name for f in tmp_path.glob("*/record.json")] == [name]


def test_stored_later_records_have_the_settings_of_the_first():
    "Seeds, images and rounds are the same, so its clients and draws are."
    same = lambda r: {k: v for k, v in r.config.items() if k != "methods"}
    for name in results.FAIR_DATA:
        first, *later = federated.fair_records(name)
        for r in later:
            assert same(r) == same(first)
            assert r.config["methods"][0] == "eefl"
            assert not set(r.config["methods"][1:]) & set(first.config["methods"])


# ---------------------------------------------------------------- claims


def test_every_claim_is_told_once_and_judged_where_there_is_a_record():
    table = results.claims_of_paper()
    assert table.count("\n") == len(results.CLAIMS) + 1
    stored = {c.experiment for c in results.CLAIMS if results.result_record(c.experiment)}
    for c in results.CLAIMS:
        line = next(l for l in table.split("\n") if l.startswith(f"| {c.text} |"))
        measured = c.experiment in stored and c.parts is not results._nothing
        assert ("not measured" in line) != measured
        assert c.published and c.source


def test_a_claim_follows_its_record():
    "The same claim on a record in which DarkDistill is better, worse, and both."
    claim = next(c for c in results.CLAIMS if c.text == "DarkDistill beats EEFL at gamma = 1")
    for gains, said in (((3, 3.1), "holds"), ((-3, -3.1), "does not hold"), ((-3, 3), "undecided")):
        runs = [dict(row="eefl", gamma=1.0, seed=s, exits=[0.5]) for s in (0, 1)]
        runs += [
            dict(row="darkdistill", gamma=1.0, seed=s, exits=[0.5 + g / 100])
            for s, g in enumerate(gains)
        ]
        assert results.judge(claim, Record(dict(gamma=1.0), runs=runs))["verdict"] == said


# ---------------------------------------------------------------- a method of one's own

MINE = """
from darkdistill_nb.federated import EEFL

class Same(EEFL):
    "EEFL by another name."

    name = "same"
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "own_same.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_same:Same"
    sys.modules.pop("own_same", None)


def test_a_method_that_is_the_control_differs_from_it_by_nothing(mine, folder, tmp_path):
    stored = page.run_paper("main", folder, workers=1, **QUICK)
    r = against_stored(mine, tmp_path, workers=1, stored=stored)
    assert page.paper_gain(r, f"your {mine}") == [0, 0]
    assert f"| eefl |" in against_table(r)
    with pytest.raises(ValueError, match="gamma=7 must be one of 1"):
        against_stored(mine, tmp_path, gamma=7, workers=1, stored=stored)
    other = Record(stored.config, runs=[dict(run, pair="x") for run in stored.runs])
    with pytest.raises(ValueError, match="the same clients hold the same images"):
        against_stored(mine, tmp_path, workers=1, stored=other)


def test_the_command_says_what_is_wrong(mine, capsys):
    assert command(["compare", "luck", "--against", "stored"]) == 2
    assert "'luck' is unknown" in capsys.readouterr().err
    assert command(["compare", mine, "--against", "yesterday"]) == 2
    assert "against='yesterday' must be stored" in capsys.readouterr().err
    assert command(["compare", mine, "--against", "stored", "--html", "a.html"]) == 2
    assert "html=" in capsys.readouterr().err


def test_one_command_for_each_experiment(tmp_path, capsys):
    words = [
        "main",
        "--out",
        str(tmp_path),
        "--workers",
        "1",
        "--methods",
        "eefl",
        "exclusivefl",
        "--set",
    ]
    assert experiment([*words, "rounds=1", "data=digits", 'net={"width": 4}']) == 0
    told = capsys.readouterr().out
    assert "| exclusivefl |" in told and "s of training" in told
    assert experiment(["main", "--set", "luck=1", "--out", str(tmp_path)]) == 2
    assert experiment(["fair", "--out", str(tmp_path)]) == 2
    assert "data=None must be one of" in capsys.readouterr().err


def test_a_method_that_runs_votes_as_the_experiment_does(folder):
    "HeteroFL's own coverage, from the clients that it has heard of, is that of stored trainings: all exits alike."
    cell = page.paper_cell(config(), "eefl", 0)
    train, test, clients, build = page._federation(cell)
    m = calibrated(METHODS["heterofl"])(BoostNet(), calibration=0, votes="coverage", participation=1.0)
    run = simulate(m, build, train, test, clients, 1, progress=False)
    assert m._coverage(run.state["server"]).tolist() == [1, 1, 1, 1]

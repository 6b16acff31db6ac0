"DistrEE experiments: cells, resuming, what is measured, verdicts, the command; the stored records are whole and say what made them."

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LONG

from darkdistill_nb.experiments import distree as X
from darkdistill_nb.core.cells import cell_file, t_interval
from darkdistill_nb.distree.students import make_answers, system_answers
from darkdistill_nb.core.records import Record, asset, load_record

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = dict(epochs=1, teacher_epochs=1, n_test=60, batch_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distree")


def test_cells_are_json_and_differ_in_every_setting():
    cell = X.distree_cell("cifar10", 4, seed=1, drop=0.2)
    assert json.loads(json.dumps(cell)) == cell
    others = [
        X.distree_cell("cifar10", **k)
        for k in (
            dict(n_students=1),
            dict(seed=3),
            dict(rule="random"),
            dict(w="last"),
            dict(drop=0.1),
            dict(epochs=3),
        )
    ]
    assert len({X.cell_key(c) for c in [cell, *others]}) == 7
    for bad, words in (
        (dict(speed=1), "unknown setting"),
        (dict(rule="fair"), "rule='fair'"),
        (dict(n_students=0), "n_students=0"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(w="best"), "w='best'"),
        (dict(w=[float("nan")]), "a weight of w=nan"),
        (dict(drop=1.0), "drop=1.0"),
        (dict(beta=-1), "beta=-1"),
        (dict(epochs=1.5), "epochs=1.5"),
        (dict(lr=0), "lr=0"),
        (dict(crops=-1), "crops=-1"),
        (dict(n_train=3), "n_train=3"),
        (dict(amp="no"), "amp='no'"),
        (dict(teacher={}), "teacher={}"),
        (dict(student="wrn"), "student='wrn'"),
        (dict(batch_size=0), "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=words):
            X.distree_cell("digits", **bad)
    assert X.distree_cell("digits", np.int64(2), drop=np.float32(0.5)) == X.distree_cell(
        "digits", 2, drop=0.5
    )


def test_a_killed_system_is_finished_with_the_same_answers(folder, tmp_path, monkeypatch):
    cell = X.distree_cell("digits", seed=5, **{**QUICK, "epochs": 2})
    X.run_system(cell, folder)
    whole = X.load_answers(X.answers_file(cell, folder))["test"]

    class Killed(Exception):
        pass

    real, count = X.train_distree, []

    def interrupted(*a, **k):
        def stop(row, system):
            if row["epoch"] == 0:
                raise Killed

        return real(*a, **k, on_epoch=stop)

    monkeypatch.setattr(X, "train_distree", interrupted)
    with pytest.raises(Killed):
        X.run_system(cell, tmp_path)
    monkeypatch.setattr(X, "train_distree", real)
    X.run_system(cell, tmp_path)
    again = X.load_answers(X.answers_file(cell, tmp_path))["test"]
    assert torch.equal(whole.partial, again.partial)
    assert torch.equal(whole.features[0], again.features[0])


def test_pairs_share_the_division_and_what_is_random(folder):
    a, b = (
        X.train_system(X.distree_cell("digits", seed=1, w=w, **QUICK), folder)
        for w in ("rising", "uniform")
    )
    assert a[2] == b[2] and a[0].sizes == b[0].sizes
    table = X.teacher_answers(X.distree_cell("digits", **QUICK), folder)[1]
    r = [
        X.split_filters(X.distree_cell("digits", seed=s, rule="random", **QUICK), table)[0]
        for s in (0, 0, 1)
    ]
    assert r[0] == r[1] != r[2]


def test_measure_policies_is_honest_about_budgets():
    "Costs keep their budgets up to the difference between validation and test, and the record can be written as JSON."
    valid, test = make_answers(2, 7, 400, seed=1), make_answers(2, 7, 600, seed=2)
    m = X.measure_policies(valid, test)
    assert set(m["curves"]) == set(X.rule_pairs(valid, test))
    assert m["curves"]["last exit"]["budget"] == [1.0]
    for name, c in m["curves"].items():
        assert len({len(v) for v in c.values()}) == 1 and all(
            v <= b * 1.15 for v, b in zip(c["cost"], c["budget"])
        ), name
    i = m["curves"]["partial logits"]["budget"].index(0.724)
    assert m["curves"]["partial logits"]["accuracy"][i] > m["mixture"][X.BUDGETS.index(0.724)]
    assert m["sensitivity"][0]["cost"] < m["sensitivity"][-1]["cost"] and m["risk"]["found"] <= 0.05
    json.dumps(m, allow_nan=False)


def test_failures_answer_everybody():
    valid, test = make_answers(4, 4, 200, seed=1), make_answers(4, 4, 300, seed=2)
    c = X.measure_failures(valid, test, 240)["conditions"]
    assert set(c) == set(X.CONDITIONS) and all(v["unanswered"] == 0 for v in c.values())
    assert c["nothing fails"]["accuracy"] >= c["40 % loss"]["accuracy"]
    assert c["30 % loss"]["degraded"] > 0.5
    assert c["1 device dead"]["degraded"] == 1
    assert c["2 devices dead"]["p95"] >= c["nothing fails"]["p95"]


def fake(gain, seeds=3, cost=0.724, budgets=(0.5, 0.724)):
    """Runs whose mixture is .5 + .3 c at cost c (exits at 0 and 1, right in 50 and 80 %); partial logits lie `gain` above the last exit at a
    nominal budget of .724 whose true cost is `cost`; they can have `budgets`."""

    def curve(a, b, costs):
        n = len(costs)
        return dict(
            budget=list(budgets[-n:]),
            cost=list(costs),
            energy=list(costs),
            bytes=[b] * n,
            accuracy=[a - 0.01] * (n - 1) + [a],
        )

    runs = []
    for s in range(seeds):
        true = [0.5, cost][-len(budgets) :]
        curves = {
            "partial logits": curve(0.8 + gain + 0.001 * s, 80, true),
            "feature difference": curve(0.7, 400, true),
            "random": curve(0.6, 80, true),
            "random, shared": curve(0.72, 80, true),
            "last exit": dict(curve(0.8, 80, [1.0]), budget=[1.0]),
        }
        runs.append(
            dict(
                way="2 students",
                seed=s,
                joint=[0.5, 0.8],
                conditions={},
                costs=[1e-9, 1.0],
                curves=curves,
            )
        )
    return Record({}, runs=runs, info=dict(budgets=[0.5, 0.724]))


def test_goals_and_verdicts():
    rows = X.check_goals(fake(0.01))
    assert [r["verdict"] for r in rows] == ["holds"] * 5
    assert rows[0]["interval"] == pytest.approx(
        t_interval([100 * (0.01 + 0.001 * s) for s in range(3)])
    )
    assert X.check_goals(fake(-0.03))[0]["verdict"] == "does not hold"
    assert X.check_goals(fake(-0.001))[0]["verdict"] == "undecided"
    with pytest.raises(ValueError, match="has 0 runs"):
        X.check_goals(fake(0), way="9 students")
    with pytest.raises(ValueError, match="no value 'exit'"):
        X.value_of(fake(0).runs[0], "exit")


def test_rules_are_compared_at_the_cost_they_had():
    "On test images a budget of .724 cost .8: against the mixture at .8, and against the last exit what the mixture gives for the difference is taken off."
    runs = fake(0.01, cost=0.8).runs
    mixture = lambda c: 0.5 + 0.3 * c
    over = [100 * (0.81 + 0.001 * s - mixture(0.8)) for s in range(3)]
    assert X.over_mixture(runs[0], "partial logits", 0.724) == pytest.approx(0.81 - mixture(0.8))
    assert X.compare_rules(runs, "partial logits")["interval"] == pytest.approx(t_interval(over))
    found = X.compare_rules(runs, "partial logits", "last exit")["interval"]
    assert found == pytest.approx(t_interval([o + 100 * (mixture(0.724) - 0.8) for o in over]))
    assert (
        X.check_goals(fake(0.01, cost=0.8))[0]["verdict"] == "does not hold"
    )  # it was only as good because it cost more
    assert X.compare_rules(runs, "partial logits", "feature difference")["interval"][
        0
    ] == pytest.approx(11.1)


def test_budgets_out_of_reach_are_shown():
    rows = {r["goal"].split(" (")[0]: r for r in X.check_goals(fake(0.01, budgets=(0.724,)))}
    assert (
        rows["thresholds for every cost below 0.8"]["verdict"] == "does not hold, out of reach: 0.5"
    )
    assert (
        rows["over the static mixture at every cost below 0.8 that it can have"]["verdict"]
        == "holds"
    )
    runs = fake(0.01, budgets=(0.724,)).runs
    assert X.compare_rules(runs, "partial logits", budget=0.5)["verdict"] == "out of reach"
    table = X.rule_table(
        runs, [("partial logits", "chance"), ("partial logits", "feature difference")], (0.5, 0.724)
    ).splitlines()
    assert table[2] == "| 0.5 | out of reach (static mixture) | out of reach |"
    assert "holds (random, shared)" in table[3]


def test_chance_is_the_strongest_way_that_knows_nothing():
    runs = fake(0.01, cost=0.5).runs  # the mixture has .65 there, an exit drawn for all .72
    row = X.compare_rules(runs, "partial logits", "chance")
    assert row["other"] == "random, shared" and row["interval"][0] == pytest.approx(9.1)
    assert (
        X.compare_rules(runs, "partial logits", "chance", budget=0.5)["other"] == "random, shared"
    )
    assert (
        X.compare_rules(fake(0.01, cost=1.0).runs, "partial logits", "chance")["other"]
        == "static mixture"
    )
    with pytest.raises(ValueError, match="needs two"):
        X.compare_rules(runs[:1], "partial logits")
    with pytest.raises(ValueError, match="rule='luck'"):
        X.compare_rules(runs, "luck")


def test_a_claim_about_every_budget_holds_only_if_each_does():
    assert [
        X._all_of(v)
        for v in (
            ["holds"] * 2,
            ["holds", "undecided"],
            ["undecided", "does not hold"],
            ["holds", "does not hold"],
        )
    ] == ["holds", "undecided", "does not hold", "does not hold"]


def test_what_a_failure_costs():
    runs = [
        dict(
            way="plain",
            seed=s,
            conditions={
                "nothing fails": dict(accuracy=0.9, zeros=0.9, every=0.9),
                "1 device dead": dict(accuracy=0.88 - 0.01 * s, zeros=0.5, every=0.9),
            },
        )
        for s in range(3)
    ]
    record = Record({}, runs=runs)
    assert X.failure_cost(record, "plain", "1 device dead") == pytest.approx(
        t_interval([2.0, 3.0, 4.0])
    )
    assert X.failure_cost(record, "plain", "1 device dead", "every") == (0.0, 0.0, 0.0)
    for bad, words in (
        ((record, "other", "1 device dead"), "way='other'"),
        ((record, "plain", "fire"), "condition='fire'"),
        ((record, "plain", "1 device dead", "luck"), "how='luck'"),
    ):
        with pytest.raises(ValueError, match=words):
            X.failure_cost(*bad)


def test_records_say_what_made_them():
    known = Record(
        {},
        hardware=dict(cpus=4, processor=dict(model="Fast One", threads=2)),
        versions=dict(torch="9"),
        created="2026-11-21T01:00:00Z",
        runs=[dict(seed=0)],
    )
    assert X.made_on(known) == "1 seeds, 2026-11-21, Fast One, 4 CPUs, 2 threads, torch 9"
    assert "processor not recorded" in X.made_on(load_record(asset("distree_systems_digits.json")))


# ---------------------------------------------------------------- any data, other data


def tiny_file(path, seed=0, n=160):
    "An .npz file of colour images of 10 x 10 with three classes that a small network can tell."
    rng = np.random.default_rng(seed)

    def part(n):
        y = np.arange(n) % 3
        x = rng.integers(0, 90, (n, 10, 10, 3)).astype(np.uint8)
        x[np.arange(n), :, :, y] += 120
        return x, y

    (x, y), (u, v) = part(n), part(60)
    np.savez(path, x_train=x, y_train=y, x_test=u, y_test=v)
    return str(path)


FAST = dict(epochs=4, teacher_epochs=2, batch_size=20)


def test_experiments_take_any_file(tmp_path):
    data = tiny_file(tmp_path / "mine.npz")
    record = X.run_distree("partition", data, tmp_path / "runs", 2, ["random"], 1, **FAST)
    assert (tmp_path / "runs" / "distree_partition_mine" / "record.json").is_file()
    assert len(record.runs) == 2
    assert record.config["data"] == data
    assert record.runs[0]["joint"][-1] > 0.5
    assert "curves" in record.runs[0]
    vit = X.distree_cell(data, **{**X.SMALL_VIT, **FAST})
    assert X.run_system(vit, tmp_path / "runs")["joint"][-1] > 0.3
    kept = X.keep_system(X.distree_cell(data, **FAST), tmp_path / "runs", tmp_path / "assets")
    assert X.load_system(tmp_path / "assets" / "distree_mine_2.safetensors")[1]["shape"] == [
        3,
        10,
        10,
    ]
    assert kept.runs


def test_make_cell_takes_every_name():
    assert X.distree_cell("mnist")["data"] == "mnist"
    assert X.distree_cell("mnist")["student"] == X.distree_cell("shapes16")["student"]
    with pytest.raises(FileNotFoundError, match="is not there"):
        X.distree_cell("nowhere.npz")


def test_other_images_under_the_same_name_are_not_taken_for_these(tmp_path, monkeypatch):
    "A data set found by its name in a folder: another folder holds other images; nothing that was stored of the first is used."
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, f in enumerate(folders):
        f.mkdir()
        tiny_file(f / "mine.npz", seed=i)

    def go(folder):
        monkeypatch.setenv("DARKDISTILL_DATA", str(folder))
        X._table.cache_clear()
        X.image_parts.__globals__["three_parts"].__globals__["_three_parts"].cache_clear()
        return X.run_distree("partition", "mine", tmp_path / "runs", 1, ["random"], 1, **FAST)

    go(folders[0])
    with pytest.raises(ValueError, match=r"delete"):
        go(folders[1])
    cell = X.distree_cell("mine", rule="random", **FAST)
    cell_file(
        cell, tmp_path / "runs"
    ).unlink()  # the result is gone, the checkpoint of the training is not
    with pytest.raises(ValueError, match=r"another (data|table).*delete"):
        go(folders[1])


@pytest.mark.parametrize("what", ["teachers", "answers"])
def test_damaged_and_exchanged_files_are_named(what, folder, tmp_path):
    for i, seed in enumerate((11, 12)):
        X.run_system(
            X.distree_cell(
                "digits",
                seed=seed,
                teacher_epochs=1 + i,
                **{k: v for k, v in QUICK.items() if k != "teacher_epochs"},
            ),
            tmp_path,
        )
    cell = X.distree_cell("digits", seed=11, **QUICK)
    files = sorted((tmp_path / what).glob("*.safetensors"))
    X._table.cache_clear()

    def read():
        X.distree_teacher(cell, tmp_path), X.teacher_answers(cell, tmp_path)
        return X.load_answers(
            X.answers_file(cell, tmp_path), dict(cell=cell, **X.image_digests(cell))
        )

    whole = [f.read_bytes() for f in files]
    read()
    mine = [i for i, f in enumerate(files) if _is_read(f, read)]
    assert mine
    for i in mine:
        for data in [whole[i][:-7], *(w for k, w in enumerate(whole) if k != i)]:
            files[i].write_bytes(data)
            X._table.cache_clear()
            with pytest.raises(ValueError, match="delete"):
                read()
            files[i].write_bytes(whole[i])


def _is_read(file, read):
    "Does `read` use this file? It is moved away, and `read` makes it anew, or fails."
    away = file.with_suffix(".away")
    file.rename(away)
    X._table.cache_clear()
    try:
        read()
        return file.is_file()
    except FileNotFoundError:
        return True
    finally:
        away.replace(file)


def test_validation_images_trained_nobody():
    for how in (dict(), dict(n_train=300)):
        teacher, students, valid, test = X.image_parts(X.distree_cell("digits", **how))
        seen = [{x.numpy().tobytes() for x in d.x} for d in (teacher, students, valid)]
        assert seen[1] <= seen[0]
        assert not seen[2] & seen[0]
        assert len(valid) == (30 if how else 139)
        assert len(students) == (270 if how else 1299)
    with pytest.raises(ValueError, match="n_train=3000 must be at most 1438"):
        X.image_parts(X.distree_cell("digits", n_train=3000))
    teacher, students, valid, _ = X.image_parts(X.distree_cell("shapes16", n_train=400))
    assert len(teacher) == len(students) == 400 - len(valid) and 20 < len(valid) < 41


def test_a_teacher_trains_on_one_thread(tmp_path, monkeypatch):
    "Whatever the number of threads outside, which changes the last bits of sums."
    threads, real = [], X.train_exits

    def watched(*a, **k):
        threads.append(torch.get_num_threads())
        return real(*a, **k)

    monkeypatch.setattr(X, "train_exits", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        X.distree_teacher(X.distree_cell("digits", **QUICK), tmp_path)
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_answers_of_many_classes_and_large_logits_survive_the_file(tmp_path):
    a = make_answers(2, 2, 4, 300, length=3)
    a = dataclasses.replace(a, y=torch.tensor([0, 255, 256, 299]), partial=a.partial * 1e5)
    X.save_answers(tmp_path / "a.safetensors", test=a)
    b = X.load_answers(tmp_path / "a.safetensors")["test"]
    assert torch.equal(b.y, a.y)
    assert b.partial.isfinite().all()
    assert torch.allclose(b.partial, a.partial, rtol=1e-3)
    assert b.costs.dtype == a.costs.dtype


def test_command(folder, tmp_path):
    words = [
        sys.executable,
        "-m",
        "darkdistill_nb.experiments.distree",
        "partition",
        "--data",
        "digits",
        "--out",
        str(folder),
        "--seeds",
        "2",
        "--workers",
        "1",
        "--ways",
        "random",
        "--assets",
        str(tmp_path),
        "--set",
        *(f"{k}={v}" for k, v in QUICK.items()),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0 and "2/2 2 students random" in done.stdout, done.stderr
    assert {r["way"] for r in load_record(tmp_path / "distree_partition_digits.json").runs} == {
        "random"
    }
    bad = subprocess.run([*words, "speed=3"], capture_output=True, text=True, timeout=LONG)
    assert bad.returncode == 2
    assert "unknown setting 'speed'" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_kept_system_is_the_trained_one(folder, tmp_path):
    cell = X.distree_cell("digits", 3, seed=2, drop=0.1, **QUICK)
    record = X.keep_system(cell, folder, tmp_path)
    trained = X.train_system(cell, folder)[0].eval()
    kept, head = X.load_system(tmp_path / "distree_digits_3.safetensors")
    assert head["cell"] == cell
    assert load_record(tmp_path / "distree_digits_3.json").runs == record.runs
    for k, v in trained.state_dict().items():
        assert torch.allclose(kept.state_dict()[k].double(), v.double(), rtol=1e-3, atol=1e-6), k
    with pytest.raises(FileNotFoundError):
        X.load_system("distree_digits_9")


def test_the_stored_students_miss_each_other_without_harm():
    "One of three devices dead, its mean in its place: the stored system, trained with student dropout, loses less than three points."
    (train, _, test), (system, head) = X.three_parts("digits"), X.load_system("distree_digits_3")
    table, mean = system_answers(system, test), system_answers(system, train).means()
    last = torch.full((3, len(test)), 3)
    assert X.joint_accuracy(table) == pytest.approx(head["joint"], abs=0.006)
    for dead in range(3):
        here = torch.ones(3, len(test), dtype=torch.bool)
        here[dead] = False
        right = (table.logits(last, here, mean).argmax(-1) == table.y).double().mean()
        assert right > head["joint"][-1] - 0.03


@pytest.mark.parametrize("name", X.VARIANTS)
@pytest.mark.parametrize("data", X.SETUPS)
def test_stored_records(name, data):
    try:
        r = load_record(asset(f"distree_{name}_{data}.json"))
    except FileNotFoundError:
        pytest.skip("not stored")
    assert len({x["seed"] for x in r.runs}) >= 3
    assert "distree_experiments" in r.command
    assert r.versions["torch"]
    for x in r.runs:
        assert x["joint"][-1] > x["joint"][0] or name in ("weights", "vit")

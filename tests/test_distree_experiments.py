"DistrEE experiments: cells, resuming, what is measured, verdicts, the command; the stored records are whole and say what made them."
import json
import subprocess
import sys

import pytest
import torch

from darkdistill_nb import distree_experiments as X
from darkdistill_nb.cells import t_interval
from darkdistill_nb.distributed import make_answers, system_answers
from darkdistill_nb.training import Record, asset, load_record

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = dict(epochs=1, teacher_epochs=1, n_test=60, batch_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("distree")


def test_cells_are_json_and_differ_in_every_setting():
    cell = X.make_cell("cifar10", 4, seed=1, drop=.2)
    assert json.loads(json.dumps(cell)) == cell
    others = [X.make_cell("cifar10", **k) for k in (dict(n_students=1), dict(seed=3), dict(rule="random"), dict(w="last"), dict(drop=.1), dict(epochs=3))]
    assert len({X.cell_key(c) for c in [cell, *others]}) == 7
    for bad, words in ((dict(speed=1), "unknown setting"), (dict(rule="fair"), "rule='fair'")):
        with pytest.raises(ValueError, match=words): X.make_cell("digits", **bad)


def test_a_killed_system_is_finished_with_the_same_answers(folder, tmp_path, monkeypatch):
    cell = X.make_cell("digits", seed=5, **{**QUICK, "epochs": 2})
    X.run_system(cell, folder)
    whole = X.load_answers(X.answers_file(cell, folder))["test"]
    class Killed(Exception): pass
    real, count = X.train_distree, []
    def interrupted(*a, **k):
        def stop(row, system):
            if row["epoch"] == 0: raise Killed
        return real(*a, **k, on_epoch=stop)
    monkeypatch.setattr(X, "train_distree", interrupted)
    with pytest.raises(Killed): X.run_system(cell, tmp_path)
    monkeypatch.setattr(X, "train_distree", real)
    X.run_system(cell, tmp_path)
    again = X.load_answers(X.answers_file(cell, tmp_path))["test"]
    assert torch.equal(whole.partial, again.partial) and torch.equal(whole.features[0], again.features[0])


def test_pairs_share_the_division_and_what_is_random(folder):
    a, b = (X.train_system(X.make_cell("digits", seed=1, w=w, **QUICK), folder) for w in ("rising", "uniform"))
    assert a[2] == b[2] and a[0].sizes == b[0].sizes
    table = X.teacher_answers(X.make_cell("digits", **QUICK), folder)[1]
    r = [X.split_filters(X.make_cell("digits", seed=s, rule="random", **QUICK), table)[0] for s in (0, 0, 1)]
    assert r[0] == r[1] != r[2]


def test_measure_policies_is_honest_about_budgets():
    "Costs keep their budgets up to the difference between validation and test, and the record can be written as JSON."
    valid, test = make_answers(2, 7, 400, seed=1), make_answers(2, 7, 600, seed=2)
    m = X.measure_policies(valid, test)
    assert set(m["curves"]) == set(X.rule_pairs(valid, test)) and m["curves"]["last exit"]["budget"] == [1.]
    for name, c in m["curves"].items():
        assert len({len(v) for v in c.values()}) == 1 and all(v <= b * 1.15 for v, b in zip(c["cost"], c["budget"])), name
    i = m["curves"]["partial logits"]["budget"].index(.724)
    assert m["curves"]["partial logits"]["accuracy"][i] > m["mixture"][X.BUDGETS.index(.724)]
    assert m["sensitivity"][0]["cost"] < m["sensitivity"][-1]["cost"] and m["risk"]["found"] <= .05
    json.dumps(m, allow_nan=False)


def test_failures_answer_everybody():
    valid, test = make_answers(4, 4, 200, seed=1), make_answers(4, 4, 300, seed=2)
    c = X.measure_failures(valid, test, 240)["conditions"]
    assert set(c) == set(X.CONDITIONS) and all(v["unanswered"] == 0 for v in c.values())
    assert c["nothing fails"]["accuracy"] >= c["40 % loss"]["accuracy"] and c["30 % loss"]["degraded"] > .5
    assert c["1 device dead"]["degraded"] == 1 and c["2 devices dead"]["p95"] >= c["nothing fails"]["p95"]


def fake(gain, seeds=3):
    curve = lambda a, b: dict(budget=[.5, .724], cost=[.5, .724], energy=[.5, .724], bytes=[b, b], accuracy=[a - .01, a])
    runs = [dict(way="2 students", seed=s, joint=[.5, .8], mixture=[.7, .75], conditions={}, costs=[.1, 1.],
                 curves={"partial logits": curve(.8 + gain + .001 * s, 80), "feature difference": curve(.75, 400), "last exit": curve(.8, 80)})
            for s in range(seeds)]
    return Record({}, runs=runs, info=dict(budgets=[.5, .724]))


def test_goals_and_verdicts():
    rows = {r["goal"]: r for r in X.check_goals(fake(.01))}
    assert [r["verdict"] for r in rows.values()] == ["reached"] * 4
    want = t_interval([100 * (.01 + .001 * s) for s in range(3)])
    assert rows["no worse than the last exit at cost 0.724"]["interval"] == pytest.approx(want)
    assert X.check_goals(fake(-.03))[0]["verdict"] == "not reached"
    with pytest.raises(ValueError, match="has 0 runs"): X.check_goals(fake(0), way="9 students")
    with pytest.raises(ValueError, match="no value 'exit'"): X.value_of(fake(0).runs[0], "exit")


def test_command(folder, tmp_path):
    words = [sys.executable, "-m", "darkdistill_nb.distree_experiments", "partition", "--data", "digits", "--out", str(folder), "--seeds", "2",
             "--workers", "1", "--ways", "random", "--assets", str(tmp_path), "--set", *(f"{k}={v}" for k, v in QUICK.items())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2/2 2 students random" in done.stdout, done.stderr
    assert {r["way"] for r in load_record(tmp_path/"distree_partition_digits.json").runs} == {"random"}
    bad = subprocess.run([*words, "speed=3"], capture_output=True, text=True, timeout=300)
    assert bad.returncode == 2 and "unknown setting 'speed'" in bad.stderr and "Traceback" not in bad.stderr


def test_a_kept_system_is_the_trained_one(folder, tmp_path):
    cell = X.make_cell("digits", 3, seed=2, drop=.1, **QUICK)
    record = X.keep_system(cell, folder, tmp_path)
    trained = X.train_system(cell, folder)[0].eval(); kept, head = X.load_system(tmp_path/"distree_digits_3.safetensors")
    assert head["cell"] == cell and load_record(tmp_path/"distree_digits_3.json").runs == record.runs
    for k, v in trained.state_dict().items(): assert torch.allclose(kept.state_dict()[k].double(), v.double(), rtol=1e-3, atol=1e-6), k
    with pytest.raises(FileNotFoundError): X.load_system("distree_digits_9")


def test_the_stored_students_miss_each_other_without_harm():
    "One of three devices dead, its mean in its place: the stored system, trained with student dropout, loses less than three points."
    (train, _, test), (system, head) = X.three_parts("digits"), X.load_system("distree_digits_3")
    table, mean = system_answers(system, test), system_answers(system, train).means(); last = torch.full((3, len(test)), 3)
    assert X.joint_accuracy(table) == pytest.approx(head["joint"], abs=.006)
    for dead in range(3):
        here = torch.ones(3, len(test), dtype=torch.bool); here[dead] = False
        right = (table.logits(last, here, mean).argmax(-1) == table.y).double().mean()
        assert right > head["joint"][-1] - .03


@pytest.mark.parametrize("name", X.VARIANTS)
@pytest.mark.parametrize("data", X.SETUPS)
def test_stored_records(name, data):
    try: r = load_record(asset(f"distree_{name}_{data}.json"))
    except FileNotFoundError: pytest.skip("not stored")
    assert len({x["seed"] for x in r.runs}) >= 3 and "distree_experiments" in r.command and r.versions["torch"]
    for x in r.runs: assert x["joint"][-1] > x["joint"][0] or name in ("weights", "vit")

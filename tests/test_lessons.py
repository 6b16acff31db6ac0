"""Lessons that read their trainings from a record: `train_or_load`, and that the stored records are those of the lessons."""

import re
import pytest
from darkdistill_nb.core import records
from notebooks import ROOT, cells, is_code, source

STORED = sorted((ROOT / "assets").glob("lesson_*.json"))
CALL = re.compile(r'train_or_load\(\s*"(\w+)", "(\w+/\w+)"')


@pytest.fixture
def assets(tmp_path, monkeypatch):
    "A folder of assets of its own."
    monkeypatch.setattr(records, "shipped", lambda what: tmp_path)
    monkeypatch.delenv("DARKDISTILL_TRAIN", raising=False)
    return tmp_path


class Trainer:
    def __init__(self, factor=2):
        self.asked, self.factor = [], factor

    def __call__(self, way, seed):
        self.asked.append((way, seed))
        return dict(accuracy=[self.factor * seed, len(way)])


JOBS = [("kd", 0), ("kd", 1), ("hint", 0)]


def test_what_is_not_stored_is_trained_and_not_kept(assets, capsys):
    train = Trainer()
    got = records.train_or_load("a", "1_distill/a", train, JOBS)
    assert train.asked == JOBS and got["kd", 1] == dict(accuracy=[2, 2])
    assert not list(assets.iterdir())
    assert capsys.readouterr().out == "0 of 3 results read\n"


def test_what_is_stored_is_read_and_the_rest_trained(assets, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setenv("DARKDISTILL_TRAIN", "1")
        made = records.train_or_load("a", "1_distill/a", Trainer(), JOBS[:2])
    train = Trainer(factor=100)
    got = records.train_or_load("a", "1_distill/a", train, JOBS)
    assert train.asked == JOBS[2:] and {k: got[k] for k in made} == made
    assert "2 of 3 results read, made on 20" in capsys.readouterr().out
    record = records.load_record(assets / "lesson_a.json")
    assert record.config["lesson"] == "1_distill/a" and len(record.runs) == 2
    assert record.command == "DARKDISTILL_TRAIN=1 jupyter execute nbs/1_distill/a.ipynb"


def test_a_wish_to_train_trains_what_is_stored(assets, monkeypatch):
    monkeypatch.setenv("DARKDISTILL_TRAIN", "1")
    for factor in (2, 100):
        train = Trainer(factor)
        got = records.train_or_load("a", "1_distill/a", train, JOBS)
        assert train.asked == JOBS and got["kd", 1]["accuracy"][0] == factor
    monkeypatch.delenv("DARKDISTILL_TRAIN")
    assert records.train_or_load("a", "1_distill/a", Trainer(), JOBS)["kd", 1]["accuracy"][0] == 100


@pytest.mark.parametrize("word, trains", [("0", False), ("", False), ("1", True)])
def test_what_the_environment_says(assets, monkeypatch, word, trains):
    monkeypatch.setenv("DARKDISTILL_TRAIN", word)
    records.train_or_load("a", "1_distill/a", Trainer(), JOBS)
    assert (assets / "lesson_a.json").exists() == trains


@pytest.mark.parametrize("job", [("kd", float("nan")), ("kd", float("inf")), ["kd", 0], "kd", ("kd", None)])
def test_a_job_that_no_record_holds_is_refused_before_training(assets, job):
    train = Trainer()
    with pytest.raises(ValueError, match="jobs=.* must be a list of tuples of texts and finite numbers"):
        records.train_or_load("a", "1_distill/a", train, [job])
    assert not train.asked


def test_without_assets_it_is_said_before_the_training(monkeypatch):
    def nothing(what):
        raise FileNotFoundError("this installation has no assets")

    monkeypatch.setattr(records, "shipped", nothing)
    monkeypatch.setenv("DARKDISTILL_TRAIN", "1")
    train = Trainer()
    with pytest.raises(FileNotFoundError, match="no assets"):
        records.train_or_load("a", "1_distill/a", train, JOBS)
    assert not train.asked
    monkeypatch.delenv("DARKDISTILL_TRAIN")
    assert len(records.train_or_load("a", "1_distill/a", train, JOBS)) == 3


@pytest.mark.parametrize("value", [float("nan"), object(), [float("inf")]])
def test_results_are_json(assets, value):
    with pytest.raises(ValueError, match="finite number"):
        records.train_or_load("a", "1_distill/a", lambda way, seed: value, JOBS)


def test_results_have_one_form_read_or_trained(assets, monkeypatch):
    train = lambda way, seed: (seed, dict(a=(1, 2)))
    monkeypatch.setenv("DARKDISTILL_TRAIN", "1")
    trained = records.train_or_load("a", "1_distill/a", train, JOBS)
    monkeypatch.delenv("DARKDISTILL_TRAIN")
    assert records.train_or_load("a", "1_distill/a", train, JOBS) == trained
    assert trained["kd", 1] == [1, dict(a=[1, 2])]


def calls():
    "(name of the record, lesson that it says, lesson where it stands) of every call in the lessons."
    for path in sorted((ROOT / "nbs").glob("[0-9]_*/*.ipynb")):
        lesson = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        for cell in cells(path):
            for name, said in CALL.findall(source(cell)):
                if name != "nowhere":
                    yield name, said, lesson


def outputs(path):
    "All text that the cells of a notebook have printed."
    found = [o.get("text", "") for c in cells(path) if is_code(c) for o in c["outputs"]]
    return "".join("".join(t) for t in found)


def test_every_stored_record_is_read_by_its_lesson():
    found = sorted(calls())
    assert len(found) >= 8
    assert [f"lesson_{name}.json" for name, *_ in found] == [p.name for p in STORED]
    assert all(said == lesson for _, said, lesson in found)


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.stem)
def test_a_lesson_finds_all_its_results_in_the_record(path):
    record = records.load_record(path)
    assert record.hardware["processor"]["model"] and record.seconds >= 0
    n, lesson = len(record.runs), record.config["lesson"]
    assert [r["job"] for r in record.runs] == record.config["jobs"]
    text = outputs(ROOT / f"nbs/{lesson}.ipynb")
    assert f"{n} of {n} results read, made on {record.created[:10]}" in text

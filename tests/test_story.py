"""What a run shows: sentences that follow from the numbers of its record, for every verdict, and the default run's stored record."""

import copy
import pytest
import torch
from darkdistill_nb.core.cells import t_interval, verdict
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.records import Record, asset, load_record
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.experiments import report
from darkdistill_nb.experiments.story import (
    ANSWERS,
    HEADLINES,
    LIMITS,
    Judged,
    at_half,
    claim_values,
    findings,
    measure_unalignment,
    receptive_fields,
    story_figure,
    story_text,
)
from darkdistill_nb.federated.alignment import tier_models, unalignment
from darkdistill_nb.federated.difficulty import measure_difficulty
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, make_clients
from darkdistill_nb.federated.widths import HeteroFL

pytestmark = pytest.mark.usefixtures("one_thread")


def final(exits, half=None, counts=(40, 30, 20, 10), gap=None):
    table = gap and {k: {"2": v} for k, v in zip(("naive", "null", "difference"), gap)}
    return dict(
        accuracy=exits,
        mean=sum(exits) / len(exits),
        half=half and dict(zip(("accuracy", "cost", "static"), half)),
        difficulty={"1": list(counts), "2": list(counts)},
        bin_width=0.5,
        unalignment=table,
        budget=None,
    )


def a_record(data="shapes16", **methods):
    "A record with runs of several methods: name=[final of seed 0, final of seed 1, ...]."
    who = dict(tier=[1, 2, 3, 4], classes=[[1, 1]] * 4)
    info = dict(macs=[1e5, 2e5, 3e5, 4e5], input_shape=[3, 16, 16], clients={"0": who})
    runs = [
        dict(method=m, seed=s, final=f, rounds=[])
        for m, finals in methods.items()
        for s, f in enumerate(finals)
    ]
    seeds = list(range(max(map(len, methods.values()))))
    record = Record(dict(data=data, seeds=seeds), runs=runs, info=info)
    record.info["receptive_fields"] = [7, 11, 15, 19]
    return record


def said(record):
    return {f.claim: f for f in findings(record)}


RISING, FALLING = [0.6, 0.7, 0.75, 0.8], [0.8, 0.75, 0.7, 0.6]


def near(exits, by=0.005):
    "Three seeds around the same accuracies."
    return [[a + d for a in exits] for d in (-by, 0.0, by)]


# ---------------------------------------------------------------- sentences follow from numbers


def test_rising_exits_say_that_depth_pays():
    found = said(a_record(eefl=[final(a) for a in near(RISING)]))
    assert found["depth"].headline == "Depth pays."
    assert "exit 4 is right for 80.0 % of the test images, exit 1 for 60.0 %" in found["depth"].text
    assert "+20.0 points" in found["depth"].text
    assert "7 of 16 pixels" in found["why"].text and "global" in found["why"].text


def test_falling_exits_say_the_opposite():
    found = said(a_record("digits", eefl=[final(a) for a in near(FALLING)]))
    assert found["depth"].headline == "Deeper exits are not better here."
    assert "-20.0 points" in found["depth"].text
    assert found["why"].headline == "A likely reason."
    assert "Exit 1 alone is right for 80.0 %" in found["why"].text
    assert "only 25 % of the clients train exit 4" in found["why"].text
    assert "global" not in found["why"].text


def test_seeds_that_disagree_leave_it_undecided():
    finals = [final(a) for a in (RISING, FALLING, [0.7] * 4)]
    found = said(a_record(eefl=finals))
    assert found["depth"].headline == "Whether depth pays is undecided."
    assert "why" not in found


def test_one_seed_gives_no_verdict():
    found = said(a_record(eefl=[final(RISING)], calibrated_eefl=[final(FALLING)]))
    assert {f.verdict for f in found.values()} == {"one seed"}
    assert "(one seed)" in found["depth"].text and "pays" not in found["depth"].headline


@pytest.mark.parametrize("claim", LIMITS)
@pytest.mark.parametrize("word", ["holds", "does not hold", "undecided"])
def test_every_verdict_has_its_headline(claim, word):
    "For each claim three records, whose numbers lie above, below and around the limit."
    at = {"holds": (3, 3.1, 3.2), "does not hold": (-3, -3.1, -3.2), "undecided": (-3, 0, 3)}[word]
    bins = {"holds": (5, 5, 5), "does not hold": (1, 1, 1), "undecided": (2, 5, 6)}[word]
    finals, control = [], []
    for v, n in zip(at, bins):
        exits = [0.5, 0.5, 0.5, 0.5 + v / 100]
        half = (0.6 + v / 100, 2e5, 0.6)
        finals.append(final(exits, half, [10] * n, (0.5, 0.5 - v, v)))
        control.append(final([0.5, 0.5, 0.5, 0.5]))
    found = said(a_record(eefl=control, darkdistill=finals))[claim]
    expected = HEADLINES[claim][ANSWERS.index(word)].format(m="DarkDistill", c="EEFL")
    assert (found.verdict, found.headline) == (word, expected)


def test_the_verdict_is_the_rule():
    for values in ([1.0, 2.0, 3.0], [0.5, 0.6, 0.7], [-1.0, -2.0, -1.5], [4.0, 4.0, 4.0]):
        for above in (0, 3):
            j = Judged(values, above)
            assert j.verdict == verdict(t_interval(values), above)
            assert j.interval == t_interval(values)


def test_every_other_method_is_told_against_the_control():
    finals = lambda exits: [final(a) for a in near(exits)]
    runs = dict(eefl=finals([0.5] * 4), darkdistill=finals([0.5] * 4))
    record = a_record(**runs, calibrated_eefl=finals([0.6] * 4))
    gain = said(record)["gain"]
    assert gain.headline == "CalibratedEEFL beats EEFL."
    assert "CalibratedEEFL minus EEFL, mean of all exits: +10.0 points" in gain.text
    assert "DarkDistill: +0.00 points [0.00, 0.00], undecided." in gain.text


def test_what_was_not_measured_is_not_told():
    record = a_record(darkdistill=[final(a) for a in near(RISING)])
    assert [f.claim for f in findings(record)] == ["depth", "why", "bins"]
    for run in record.runs:
        del run["final"]["half"], run["final"]["unalignment"]
    assert "thresholds" not in said(record)


def test_claim_values_by_hand():
    v = claim_values(
        [0.5, 0.9], dict(accuracy=0.8, static=0.7), [0.9, 0.06, 0.04], None, [0.4, 0.8]
    )
    assert v == pytest.approx(dict(depth=40, thresholds=10, bins=2, gain=10))


def test_older_records_tell_what_they_know():
    "Digits of version 0.1: no half of the cost, no windows, bins of a nat."
    found = said(load_record(asset("digits_default.json")))
    assert set(found) == {"depth", "why", "bins", "gain"}
    assert found["depth"].verdict == "undecided" and "1 nat" in found["bins"].text
    assert found["why"].headline == "Little is left for deeper exits."
    photographs = load_record(asset("cifar10_default.json"))
    assert said(photographs)["depth"].headline == "Deeper exits are not better here."
    assert "Deeper exits are not better here." in story_text(photographs)


def test_a_report_begins_with_the_story(tmp_path):
    record = load_record(asset("digits_default.json"))
    page = report.write_report(record, tmp_path / "r.html").read_text(encoding="utf-8")
    places = [page.index(f"<b>{f.headline}</b>") for f in findings(record)]
    assert places == sorted(places) and places[-1] < page.index("<h2>")
    assert 'id="story"' in page[: page.index("<h2>")]


# ---------------------------------------------------------------- the figure


def test_whiskers_are_intervals_over_seeds():
    finals = [final(a) for a in near(RISING)]
    fig = story_figure(a_record(eefl=finals))
    m, low, _ = t_interval([100 * f["accuracy"][2] for f in finals])
    assert fig.data[0].y[2] == pytest.approx(m)
    assert fig.data[0].error_y.array[2] == pytest.approx(m - low)
    assert list(story_figure(a_record(eefl=finals[:1])).data[0].error_y.array) == [0] * 4


def test_colours_are_those_of_the_other_figures():
    record = load_record(asset("stage_default.json"))
    colour = {t.name: t.line.color for t in report.accuracy_figure(record).data if t.name}
    for t in story_figure(record).data:
        if t.mode == "lines+markers":
            assert t.line.color == colour[t.name.removesuffix(": exits")]


def test_accuracies_stay_inside_of_the_figure():
    wild = a_record(eefl=[final([a] * 4) for a in (0.1, 0.9)])
    assert list(story_figure(wild).layout.yaxis.range) == [0, 100]


# ---------------------------------------------------------------- measuring


def some_logits(seed, n=200):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, n, 3, generator=g), torch.randint(0, 3, (n,), generator=g)


def test_thresholds_never_see_test_labels():
    "Other labels of the test images: the same cost, since the same images leave at the same exits."
    (v, vy), (t, ty) = some_logits(0), some_logits(1)
    a, b = (at_half(v, vy, t, y, [1.0, 2.0, 3.0, 4.0]) for y in (ty, (ty + 1) % 3))
    assert a["cost"] == b["cost"] and a["accuracy"] != b["accuracy"]
    c = at_half(v, (vy + 1) % 3, t, ty, [1.0, 2.0, 3.0, 4.0])
    assert c["cost"] != a["cost"]


def test_half_of_the_cost_that_no_exit_fits_in():
    (v, vy), (t, ty) = some_logits(0), some_logits(1)
    assert at_half(v, vy, t, ty, [3.0, 3.5, 4.0, 5.0]) is None


@pytest.fixture(scope="module")
def short():
    "One round on images of noise."
    g = torch.Generator().manual_seed(0)
    x = torch.rand(160, 1, 8, 8, generator=g)
    data = ArrayData(x, torch.arange(160) % 4, difficulty=torch.linspace(0, 1, 160))
    clients = make_clients(data.y, 8, 5.0, (0.5, 0.5), seed=0, valid=0.2)
    run = simulate(EEFL(participation=1.0), lambda: cnn((1, 8, 8), 4, 2, 8), data, data, clients, 1)
    return run, data, clients


def test_unalignment_is_that_of_the_lesson(short):
    run, data, clients = short
    found = measure_unalignment(run, data, clients, data)
    models = tier_models(run.method, run.state, data, clients, 1, Streams(0))
    d = measure_difficulty(run.net(), run.method.objective, data)
    table = unalignment(*models, run.method.objective, data, d)
    assert found["unalignment"]["difference"] == {"1": table["difference"][1]}
    true = unalignment(*models, run.method.objective, data, data.difficulty)
    assert found["unalignment_true"]["null"] == {"1": true["null"][1]}


def test_unalignment_without_true_difficulties(short):
    run, data, clients = short
    plain = ArrayData(data.x, data.y)
    assert set(measure_unalignment(run, data, clients, plain)) == {"unalignment"}


def test_unalignment_has_no_meaning_everywhere(short):
    "No client of the deepest tier; networks that are cut in width."
    run, data, clients = short
    shallow = [c for c in clients if c.tier == 1]
    assert measure_unalignment(run, data, shallow, data) == {}
    method = HeteroFL(participation=1.0)
    wide = simulate(method, lambda: cnn((1, 8, 8), 4, 2, 8), data, data, clients, 1)
    assert measure_unalignment(wide, data, clients, data) == {}


def test_windows_of_networks_without_convolutions():
    with pytest.raises(ValueError, match="convolution as stem"):
        receptive_fields(torch.nn.Linear(2, 2))
    net = cnn((3, 32, 32), 10, width=8, depth=2)
    assert receptive_fields(net) == sorted(receptive_fields(net))


# ---------------------------------------------------------------- the default run, as stored


@pytest.fixture(scope="module")
def stored():
    return load_record(asset("stage_default.json"))


def test_the_stored_run_is_the_default_one(stored):
    from darkdistill_nb.experiments.settings import LATER, make_config

    config = {k: v for k, v in {**LATER, **stored.config}.items() if k not in ("tiers", "device")}
    usual = {k: v for k, v in make_config().items() if k not in ("tiers", "device")}
    assert config == usual and stored.command == "darkdistill run"
    assert stored.config["tiers"] == [0.25] * 4 and len(stored.config["seeds"]) == 3
    assert stored.hardware["processor"]["model"] and stored.info["cpu_seconds"] > 0


def test_what_the_stored_run_must_show(stored):
    "Depth pays by five points, for ours and for the control; thresholds beat the mixture; four bins; ours beats the control."
    points = lambda m: [
        100 * (r["final"]["accuracy"][-1] - r["final"]["accuracy"][0])
        for r in stored.runs
        if r["method"] == m
    ]
    for m in ("eefl", "calibrated_eefl"):
        assert verdict(t_interval(points(m)), above=5) == "holds", (m, points(m))
    found = said(stored)
    for claim in ("depth", "thresholds", "bins", "gain"):
        assert found[claim].verdict == "holds", found[claim].text
    halves = [r["final"]["half"] for r in stored.runs if r["method"] == "calibrated_eefl"]
    gains = [100 * (h["accuracy"] - h["static"]) for h in halves]
    assert sum(gains) / 3 >= 1, gains
    assert all(h["cost"] <= 0.55 * stored.info["macs"][-1] for h in halves)
    assert "unaligned" in found and found["why"].headline == "Why."


def test_the_same_record_reversed_says_the_opposite(stored):
    turned = copy.deepcopy(stored)
    for run in turned.runs:
        run["final"]["accuracy"].reverse()
        half = run["final"]["half"]
        half["accuracy"], half["static"] = half["static"], half["accuracy"]
    found = said(turned)
    assert {found[c].verdict for c in ("depth", "thresholds")} == {"does not hold"}
    assert found["why"].headline == "A likely reason."

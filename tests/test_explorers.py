"""Explorers of runs: their models against the library they stand for and against cases computed by hand."""

import numpy as np
import pytest
import torch
from darkdistill_nb.app import (
    AlignmentExplorer,
    DifficultyExplorer,
    DistreeExplorer,
    GeneratorExplorer,
    LatentExplorer,
)
from darkdistill_nb.app.alignment_explorer import AlignmentModel, _tiers, vote_shares
from darkdistill_nb.app.difficulty_explorer import DifficultyModel
from darkdistill_nb.app.generator_explorer import _named, map_generators
from darkdistill_nb.app.latent_explorer import LatentModel, _word
from darkdistill_nb.core.records import asset, load_record


def refuses(call, message):
    "One sentence, and a ValueError."
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- alignment


def test_two_tiers_by_hand():
    "Client 0 (tier 1) holds 3 + 1 images, client 1 (tier 2) holds 1 + 3."
    m = AlignmentModel([0] * 4 + [1] * 4, clients=2, exits=2)
    m.split.at = lambda *a, **k: dict(counts=np.array([[3, 1], [1, 3]]))
    r = m.at(1.0, (1, 1), tau=0.5)
    assert r["counts"].tolist() == [[4, 4], [1, 3]] and r["clients"].tolist() == [2, 1]
    assert r["coverage"] == pytest.approx([1, 0.5])
    assert r["distance"] == pytest.approx([0, 0.25])
    assert r["effective"] == pytest.approx([2, 1.6])
    # with one image of each class added, mixes are 4/6 and 2/6, everybody's 1/2
    assert r["skew"] == pytest.approx([1 / 6, 1 / 6])
    a, b = (2 / 3) ** 0.5, (1 / 3) ** 0.5
    assert r["calibrated"] == pytest.approx([a / (a + b) - 0.5] * 2)
    assert r["weights"] == pytest.approx(np.array([[1, 0], [2 / 3, 1 / 3]]))


def test_weights_are_those_of_the_method():
    from darkdistill_nb.federated.calibration import coverage, vote_weights

    c = coverage([400, 300, 200, 100])
    for votes in ("equal", "coverage", "depth"):
        assert vote_shares(c.tolist(), votes) == pytest.approx(vote_weights(votes, c).numpy())


def test_calibrated_mix_is_that_of_the_shift():
    "A client that learns log pi_k of its images under the shift a_k decides log pi_k - a_k."
    from darkdistill_nb.federated.calibration import class_shares, prior_shift

    y = np.repeat(np.arange(5), 80)
    m = AlignmentModel(y, clients=6, exits=2)
    counts = torch.tensor(m.split.at(0.3, 6, "client", 1)["counts"])
    everybody = class_shares(counts.sum(0))
    off = []
    for n in counts:
        q = (class_shares(n).log() - prior_shift(n, counts.sum(0), 0.7)).softmax(0)
        off.append(float((q - everybody).abs().sum() / 2))
    r = m.at(0.3, (1, 1), seed=1, tau=0.7)
    sizes = counts.sum(1).numpy()
    assert r["calibrated"][0] == pytest.approx(np.average(off, weights=sizes))


def test_tiers_have_the_sizes_of_a_run():
    from darkdistill_nb.federated.method import tier_sizes

    rng = np.random.default_rng(0)
    for _ in range(200):
        mix = rng.integers(1, 20, 4).tolist()
        shares = [w / sum(mix) for w in mix]
        try:
            want = tier_sizes(20, shares)
        except ValueError:
            continue  # a run leaves no tier empty
        assert np.bincount(_tiers(20, mix), minlength=4).tolist() == want


def test_difficulties_are_weighed_by_the_images_of_each_tier():
    m = AlignmentModel([0, 1] * 50, clients=2, exits=2, difficulty=[[1, 0], [0, 1]])
    bands = m.at(1e6, (1, 1))["bands"]
    assert bands == pytest.approx(np.array([[0.5, 0.5], [0, 1]]))
    assert m.at(1e6, (1, 0))["bands"].tolist() == [[1, 0], [0, 0]]  # nobody trains exit 2


def test_alignment_from_a_record():
    e = AlignmentExplorer.from_record(load_record(asset("stage_default.json")), mode="page")
    runs = load_record(asset("stage_default.json")).runs
    want = np.mean([r["final"]["accuracy"] for r in runs if r["method"] == "eefl"], 0)
    found = e.model.results["accuracy (%)"]["eefl"]["mean"]
    assert found == pytest.approx(100 * want, abs=1e-3)
    assert e.now["clients"].tolist() == [20, 15, 10, 5]
    assert e.now["bands"].shape == (4, 5) and e.now["bands"].sum(1) == pytest.approx(1)
    frames = e.to_frames("gamma", [0.1, 1.0, 100.0])
    assert len(frames.frames) == 3 and e.state["gamma"] == 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=[]), "non-empty"),
        (dict(clients=0), "clients"),
        (dict(exits=1), "exits"),
        (dict(mix=(1, 1)), "2 weights|4 weights"),
        (dict(mix=(-1, 1, 1, 1)), "weight of a tier"),
        (dict(gamma=0), "gamma"),
        (dict(votes="none"), "equal, coverage, depth"),
        (dict(difficulty=np.ones((3, 4))), r"shape \(4, bins\)"),
        (dict(width=0), "width"),
        (dict(results={"a": {"b": [1, 2]}}), "results"),
        (dict(results=[1]), "results"),
    ],
)
def test_bad_alignment(change, message):
    refuses(lambda: AlignmentExplorer(**{**dict(y=np.arange(400) % 4, mode="page"), **change}), message)


# ---------------------------------------------------------------- devices that answer together


def system(S=40, N=3, E=4, K=5, seed=0):
    "Students made of random numbers, a network of devices, and the model of the same."
    from darkdistill_nb.distree.students import SystemAnswers

    rng = np.random.default_rng(seed)
    f = lambda *shape: torch.tensor(rng.normal(size=shape).astype(np.float32))
    costs = torch.tensor(1e5 * np.cumsum(1 + rng.random((N, E)), 1))
    y = torch.tensor(rng.integers(0, K, S))
    return SystemAnswers(f(N, E, S, K), f(K), 3 * f(N, E, S, K), y, costs, [7] * N)


@pytest.mark.parametrize("send, fallback", [("last", None), ("every", "every")])
@pytest.mark.parametrize("loss, retries", [(0.0, 0), (0.3, 0), (0.6, 2), (1.0, 1)])
@pytest.mark.parametrize("deadline", [6.0, 25.0, 120.0])
def test_devices_do_what_the_simulator_does(send, fallback, loss, retries, deadline):
    "Requests that do not overlap: the same exits, latencies, answers, work and bytes, one by one."
    pytest.importorskip("simpy")
    from darkdistill_nb.distree import devices
    from darkdistill_nb.distree.simulator import simulate_devices

    a, speeds, T = system(), (30.0, 60.0, 20.0), (0.8, 0.7, 0.6)
    e = DistreeExplorer.from_answers(a, seed=3, mode="page")
    m, S = e.model, len(a)
    r = m.at(T, speeds, loss, deadline, retries, send)
    links = (devices.Link(loss=loss, retries=retries),) * 3
    cluster = devices.Cluster(tuple(devices.Device(1e6 * v) for v in speeds), links)
    policy = devices.local_policy(m.scores, [*T, -np.inf])
    o = simulate_devices(
        a, policy, cluster, 10.0 * np.arange(S), deadline=deadline / 1000, fallback=fallback, mean=m.mean, seed=3
    )
    used = m._requests(T, speeds, loss, deadline, retries, send, 0)["used"]
    assert o.exits.T.tolist() == used.tolist()
    assert r["latency"] == pytest.approx(o.latency)
    assert r["accuracy"] == pytest.approx(o.right.mean())
    assert r["bytes"] == pytest.approx(o.bytes.mean())
    assert r["macs"] == pytest.approx(o.macs.sum() / S / float(a.costs[:, -1].sum()))
    s = o.summary()
    assert (r["p50"], r["p95"]) == pytest.approx((s["p50"], s["p95"]))
    assert r["share"].sum(1) == pytest.approx(1)


def test_timeline_is_that_of_the_simulator():
    pytest.importorskip("simpy")
    from darkdistill_nb.distree import devices
    from darkdistill_nb.distree.simulator import simulate_devices

    a, T = system(), (0.8, 0.7, 0.6)
    speeds = dict(speeds=(30.0, 60.0, 20.0), loss=0.4, deadline=20.0, send="every")
    e = DistreeExplorer.from_answers(a, T=T, seed=3, request=5, mode="page", **speeds)
    cluster = devices.Cluster(tuple(devices.Device(1e6 * v) for v in speeds["speeds"]), (devices.Link(loss=0.4),) * 3)
    policy = devices.local_policy(e.model.scores, [*T, -np.inf])
    o = simulate_devices(
        a, policy, cluster, 10.0 * np.arange(40), deadline=0.02, fallback="every", seed=3, trace=True
    )
    lines, words, at = e._timeline()
    mine = [t for t in o.trace if t[2] == 5]
    ms = lambda t: 1000 * (t - 50)
    stages = sorted((ms(t[4]), ms(t[5]), 2 - t[1]) for t in mine if t[0] == "compute")
    found = [(lines[n][i][0], lines[n][i + 1][0], lines[n][i][1]) for n in ("used", "idle") for i in range(0, len(lines[n]), 3)]
    assert np.array(sorted(found)) == pytest.approx(np.array(stages), abs=1e-6)
    arrived = sorted((ms(t[4]), ms(t[5])) for t in mine if t[0] == "up" and t[6])
    up = lines["up"]
    assert np.array(sorted((up[i][0], up[i + 1][0]) for i in range(0, len(up), 3))) == pytest.approx(np.array(arrived))
    assert len(lines["lost"]) // 3 == sum(t[0] == "up" and not t[6] for t in mine) > 0
    assert at == pytest.approx(1000 * o.latency[5])


def test_together_is_the_joint_classifier():
    a = system()
    r = DistreeExplorer.from_answers(a, mode="page").now
    want = [float((a.joint(e).argmax(1) == a.y).double().mean()) for e in range(4)]
    assert r["joint"] == pytest.approx(want)
    assert r["together"][3] == pytest.approx(float(a.costs[:, 3].max()) / 20e6 + 28e-6 + 0.002)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(partial=np.zeros((2, 2, 3))), "4-dimensional"),
        (dict(scores=np.zeros((2, 3, 2))), r"of shape \(2, 2, 3\)"),
        (dict(scores=np.full((2, 2, 3), np.nan)), "scores"),
        (dict(costs=[[2, 1], [1, 2]]), "rise from exit to exit"),
        (dict(y=[0, 1, 4]), "3 labels below 4"),
        (dict(bias=[1.0]), r"of shape \(4,\)"),
        (dict(link=3), "link"),
        (dict(T=(1, 1)), "1 numbers"),
        (dict(speeds=(1, 0)), "speeds"),
        (dict(loss=-1), "loss"),
        (dict(deadline=0), "deadline"),
        (dict(retries=-1), "retries"),
        (dict(send="never"), "last, every"),
        (dict(request=3), "request"),
    ],
)
def test_bad_devices(change, message):
    good = dict(partial=np.zeros((2, 2, 3, 4)), scores=np.zeros((2, 2, 3)), y=[0, 1, 2], costs=[[1, 2]] * 2)
    refuses(lambda: DistreeExplorer(**{**good, "mode": "page", **change}), message)


# ---------------------------------------------------------------- difficulty


def test_bins_are_those_of_the_histogram():
    from darkdistill_nb.federated.difficulty import DifficultyHistogram

    rng = np.random.default_rng(0)
    d = rng.exponential(size=500).astype(np.float32)
    m = DifficultyModel(dict(d=d), rng.random((2, 500)) < 0.5)
    r = m.at("d", 0.5, 1.0)
    want = DifficultyHistogram.of(torch.tensor(d), torch.zeros(500, dtype=int), 1, len(r["counts"]), 0.5)
    assert r["counts"].tolist() == want.counts[0].tolist()
    assert r["hits"].sum(1) == pytest.approx(m.right.sum(1))
    assert r["below"].sum() == (d < 1).sum()


def test_images_are_in_order_of_difficulty():
    rng = np.random.default_rng(1)
    d = rng.random(50)
    m = DifficultyModel(dict(d=d), np.ones((1, 50), bool))
    easiest, below, above, hardest = m.rows("d", 0.5, 40, 5)
    few = np.float32(d)[:40]
    assert few[easiest].max() <= np.sort(few)[4] and few[hardest].min() >= np.sort(few)[-5]
    assert max(few[below]) < 0.5 <= min(few[above])
    assert m.rows("d", 0.0, 40, 5)[1] == [] and m.rows("d", 9.0, 40, 5)[2] == []


def test_difficulty_from_logits_has_the_librarys_loss():
    from torch.nn import functional as F

    rng = np.random.default_rng(2)
    z, y = torch.tensor(rng.normal(size=(2, 60, 5))).float(), torch.tensor(rng.integers(0, 5, 60))
    e = DifficultyExplorer.from_logits(z, y, difficulty=rng.random(60), mode="page")
    assert e.model.scores["loss at exit 1 (nats)"] == pytest.approx(F.cross_entropy(z[0], y, reduction="none").numpy())
    assert list(e.model.scores)[-1] == "true difficulty"
    assert e.model.right.tolist() == (z.argmax(-1) == y).tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scores={}), "scores"),
        (dict(scores=dict(a=[1, 2])), "3 numbers"),
        (dict(scores=dict(a=[1, 2, np.nan])), "scores"),
        (dict(scores=dict(a=[1, 2, -1])), "numbers >= 0"),
        (dict(right=[1, 0, 1]), "True and False"),
        (dict(images=np.zeros((2, 1, 4, 4))), "3 images"),
        (dict(score="b"), "score='b'"),
        (dict(width=0), "width"),
        (dict(threshold=-1), "threshold"),
        (dict(m=0), "m=0"),
    ],
)
def test_bad_difficulty(change, message):
    good = dict(scores=dict(a=[1, 2, 3]), right=np.ones((2, 3), bool), mode="page")
    refuses(lambda: DifficultyExplorer(**{**good, **change}), message)


# ---------------------------------------------------------------- latents


def test_differences_are_paired_and_judged_by_the_rule_of_the_package():
    from darkdistill_nb.core.cells import t_interval, verdict

    record = load_record(asset("latent_n_shapes16.json"))
    m = LatentModel(dict(shapes16=dict(n=record.runs)))
    r = m.at("shapes16", "n", "priv", 2)
    pick = lambda method: [x["priv"] for x in record.runs if x["method"] == method and x["n"] == 256]
    for i, method in enumerate(r["methods"]):
        interval = t_interval([100 * (a - b) for a, b in zip(pick(method), pick("CE"))])
        assert (r["gain"][i], r["low"][i], r["high"][i]) == pytest.approx(interval, abs=1e-9)
        assert r["mean"][i, 2] == pytest.approx(100 * np.mean(pick(method)))
    words = dict(holds="better", undecided="undecided")
    for low, high in ((0.1, 2), (-1, 1), (-2, -0.1), (0, 1), (-1, 0)):
        judged = verdict((0.0, low, high))
        lower = verdict((0.0, -high, -low)) == "holds"
        assert _word(low, high) == words.get(judged, "worse" if lower else "undecided")


def test_latents_from_records():
    e = LatentExplorer.from_records(("shapes16",), mode="page")
    e.set(axis="l", position=99)
    assert e.now["values"] == [4, 16, 64, 256] and e.now["position"] == 3
    assert "CRD" in e._methods() and "CRD" not in e.to_table()["method"]
    e.set(axis="gamma", measure="absent")
    assert "-" in [v for p in range(6) for v in LatentExplorer.to_table(_at(e, p))[f"accuracy (%), gamma = {e.now['values'][e.now['position']]:g}"]]
    frames = e.to_frames("position", range(6))
    assert len(frames.frames) == 6


def _at(e, position):
    e.set(position=position)
    return e


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sweeps=3), "sweeps"),
        (dict(sweeps=dict(a=dict(gamma=[]))), "a list of runs"),
        (dict(sweeps=dict(a=dict(gamma=[dict(method="CE")]))), "runs with"),
        (dict(maps=dict(a=3)), "maps"),
        (dict(maps=dict(b=dict(maps={}, y=[], classes=[], gap={}))), "one for all data"),
        (dict(most=0), "most"),
        (dict(measure="all"), "uni, priv"),
        (dict(position=-1), "position"),
    ],
)
def test_bad_latents(change, message):
    good = dict(sweeps=dict(a=dict(gamma=[dict(method="CE", seed=0, gamma=1.0, uni=0.5)])), mode="page")
    refuses(lambda: LatentExplorer(**{**good, **change}), message)


# ---------------------------------------------------------------- generators


def test_stored_generators_and_their_seeds():
    stored, paper = (load_record(asset(f"{n}.json")) for n in ("generator_map", "paper_generator"))
    e = GeneratorExplorer.from_records(mode="page")
    for run in stored.runs:
        name = _named(run)
        r = e.model.at(name, "all", 2)
        got = np.array(run["got"])
        assert r["got"] == pytest.approx(got.mean(0)) and r["by_class"] == pytest.approx(got[:, 2])
        assert r["off"] == pytest.approx(np.abs(got.mean(0) - stored.config["asked"]).mean())
        grid = [g for p in paper.runs for g in p["grid"] if _named(g) == name]
        assert e.model.seeds[name].tolist() == [g["got"] for g in grid] and len(grid) == 3
    e.set(asked=5, label=e.model.classes[3])
    shown = [c for c in range(10) if e.changes()[9 + c]["visible"]]
    assert shown == [3] and len(e.changes()[12]["x"]) == stored.config["shown"]
    assert len(e.to_frames("asked", range(6)).frames) == 6


def test_generators_are_made_again_in_the_same_way():
    a, b = (map_generators([[4, 16, True, 2]], (0.5, 2.0), 1, 60, 1, 3) for _ in range(2))
    assert a.runs == b.runs and a.info == b.info
    far = np.array(a.info["real"]["points"])
    assert far.mean(0) == pytest.approx([0, 0], abs=0.02)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(generators={}), "generators"),
        (dict(generators=dict(a=3)), "a dict with got"),
        (dict(generators=dict(a=dict(got=[[1, 2, 3]] * 2))), r"\(runs, 2, 2\)"),
        (dict(generators=dict(a=dict(got=[[1, np.inf]] * 2))), "got of a"),
        (dict(generators=dict(a=dict(got=[[1, 2]] * 2, points=[[0, 0]]))), "as many as y and d"),
        (dict(asked=[1]), "at least two"),
        (dict(classes=[]), "classes"),
        (dict(seeds=dict(a=[1, 2])), r"\(seeds, 2\)"),
        (dict(generator="b"), "generator='b'"),
        (dict(label="z"), "label='z'"),
        (dict(difficulty=2), "difficulty=2"),
    ],
)
def test_bad_generators(change, message):
    good = dict(generators=dict(a=dict(got=[[1, 2]] * 2)), asked=[1, 2], classes="xy", mode="page")
    refuses(lambda: GeneratorExplorer(**{**good, **change}), message)

"""Clients that do not answer: off is off, draws are of (seed, round, client), runs resume, surveys and reports cope."""

import math, warnings
import pytest, torch
from helpers import same
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.federated.availability import Attended, Availability, own_mix, seen_and_unseen
from darkdistill_nb.federated.calibration import CalibratedEEFL, FeedbackEEFL
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.engine import Absent, Here, believed, simulate
from darkdistill_nb.federated.method import EEFL, Client, make_clients

TRAIN, TEST = load("digits", n_train=400, n_test=100)
CLIENTS = make_clients(TRAIN.y, 12, gamma=0.5)
NIGHT = Availability(dropout=0.25, slow=1.0, deadline=0.4, unseen=0.2)


def build():
    return cnn(TRAIN.shape, TRAIN.n_classes, width=8)


def go(method=EEFL, rounds=3, availability=NIGHT, seed=0, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return simulate(
            method(), build, TRAIN, TEST, CLIENTS, rounds, seed, availability=availability, **kw
        )


@pytest.mark.parametrize("method", [EEFL, DarkDistill, CalibratedEEFL])
def test_off_is_off_bit_for_bit(method):
    off, plain = go(method, 2, Availability()), go(method, 2, None)
    assert same(off.state["net"], plain.state["net"])
    assert same(off.state["server"], plain.state["server"])
    assert [r["missing"] for r in off.log] == [{}, {}]
    assert "missing" not in plain.log[0] and plain.log[0].keys() | {"missing"} == off.log[0].keys()


def test_the_result_does_not_depend_on_workers_and_can_be_repeated():
    one, two = go(), go(workers=2)
    assert same(one.state["net"], two.state["net"])
    assert [r["missing"] for r in one.log] == [r["missing"] for r in two.log]
    assert any(r["missing"] for r in one.log)


def test_methods_of_one_seed_miss_the_same_clients():
    runs = [go(m, 3, Availability(dropout=0.4)) for m in (EEFL, DarkDistill, CalibratedEEFL)]
    logs = [[(r["clients"], r["missing"]) for r in run.log] for run in runs]
    assert logs[0] == logs[1] == logs[2]


def test_a_seed_of_its_own_is_the_same_for_all_runs():
    of = lambda **kw: [
        Availability(**kw, slow=1.0, unseen=0.3).device(CLIENTS[0], Streams(s)) for s in (0, 1)
    ]
    assert of(seed=7)[0] == of(seed=7)[1] and of()[0] != of()[1]
    who = lambda s: [c.id for c in Availability(unseen=0.3, seed=7).seen(CLIENTS, Streams(s))]
    assert who(0) == who(1)


def test_a_round_with_missing_clients_is_the_round_of_the_others():
    "As if the missing ones had not been drawn."
    run, method = go(rounds=1, availability=Availability(dropout=0.5)), EEFL()
    with Streams(0).scope("init"):
        net = build()
    state, s, row = method.setup(net), Streams(0), run.log[0]
    assert row["missing"] and len(row["missing"]) < len(row["clients"])
    there = [c for c in method.configure(0, CLIENTS, s) if str(c.id) not in row["missing"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    updates = [
        method.local_update(method.send(state, c), TRAIN.subset(c.train), c, 0, s) for c in there
    ]
    torch.set_num_threads(threads)
    assert same(run.state["net"], method.aggregate(state, updates, 0, s)[0]["net"])


def test_bytes_go_down_to_all_and_up_from_those_who_answer():
    row = go(rounds=1, availability=Availability(dropout=0.5)).log[0]
    full = go(rounds=1, availability=None).log[0]
    assert row["bytes_down"] == full["bytes_down"] and 0 < row["bytes_up"] < full["bytes_up"]


def test_nobody_is_left():
    run = go(rounds=2, availability=Availability(dropout=1.0))
    with Streams(0).scope("init"):
        first = build().state_dict()
    assert same(run.state["net"], first) and [r["loss"] for r in run.log] == [None, None]
    assert all(sorted(r["missing"]) == sorted(map(str, r["clients"])) for r in run.log)
    assert set(run.log[0]["missing"].values()) == {"dropped out"} and not run.log[0]["left_out"]


@pytest.mark.parametrize("method", [DarkDistill, FeedbackEEFL])
def test_server_steps_and_surveys_survive_a_round_without_anybody(method):
    assert len(go(method, 2, Availability(dropout=1.0)).log) == 2


def test_unseen_clients_are_never_drawn_and_every_tier_stays():
    a, s = Availability(unseen=0.5), Streams(3)
    seen = a.seen(CLIENTS, s)
    assert len(seen) == 6 and {c.tier for c in seen} == {1, 2, 3, 4}
    drawn = {i for r in go(rounds=6, availability=a, seed=3).log for i in r["clients"]}
    assert drawn <= {c.id for c in seen}
    with pytest.raises(ValueError, match="unseen=0.8 must be a share of at most 8 of 12 clients"):
        go(availability=Availability(unseen=0.8))


def test_time_is_counted():
    method, s = EEFL(epochs=2), Streams(0)
    state, c = method.setup(build()), CLIENTS[0]
    sent = method.send(state, c)
    size = sum(v.numel() * 4 for v in sent.values())
    work = 3 * 2 * len(c.train) * build().prefix(c.tier).macs()[-1]
    t = 2 * size / 1e6 + work / 1e9
    why = lambda deadline, training=True: Attended(
        Here(method, TRAIN, s), Availability(deadline=deadline), method, s
    ).why(c, sent, 0, training)
    assert why(t * 1.001) == "" and why(t * 0.999) == f"too slow: {t:.3g} s"
    short = size / 1e6 + work / 6 / 1e9  # a question: one forward pass, and no weights come back
    assert why(short * 1.001, False) == "" and why(short * 0.999, False).startswith("too slow")


def test_slow_devices_are_slow_all_the_time():
    run = go(rounds=8, availability=Availability(slow=1.5, deadline=0.15))
    late = {i for r in run.log for i in r["missing"]}
    assert late and all(
        (str(i) in r["missing"]) == (str(i) in late) for r in run.log for i in r["clients"]
    )


def test_dropouts_are_as_frequent_as_asked():
    method, s = EEFL(), Streams(0)
    state = method.setup(build())
    e = Attended(Here(method, TRAIN, s), Availability(dropout=0.2), method, s)
    gone = [bool(e.why(c, {}, r)) for c in CLIENTS for r in range(200)]
    assert abs(sum(gone) / len(gone) - 0.2) < 4 * math.sqrt(0.16 / len(gone))


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole = go(FeedbackEEFL, 4)
    go(FeedbackEEFL, 2, checkpoint=tmp_path / "c.safetensors")
    again = go(FeedbackEEFL, 4, checkpoint=tmp_path / "c.safetensors")
    assert same(whole.state["net"], again.state["net"])
    assert same(whole.state["server"], again.state["server"])
    assert [r["missing"] for r in whole.log] == [r["missing"] for r in again.log]


@pytest.mark.parametrize("other", [None, Availability(), Availability(dropout=0.26)])
def test_a_checkpoint_is_of_one_availability(tmp_path, other):
    go(rounds=1, checkpoint=tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="another training: .*availability"):
        go(rounds=2, availability=other, checkpoint=tmp_path / "c.safetensors")


def test_a_survey_counts_those_who_are_there_and_warns_of_nobody():
    method, s = FeedbackEEFL(), Streams(0)
    state = method.setup(build())
    e = Attended(Here(method, TRAIN, s), Availability(dropout=0.5), method, s)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = believed(method, e)("difficulty", state, CLIENTS)
    assert {c.id for c in CLIENTS if not e.why(c, {}, 0)} == set(said) and 0 < len(said) < 12
    assert isinstance(
        e.ask("difficulty", state, CLIENTS)[next(c.id for c in CLIENTS if c.id not in said)], Absent
    )


def test_faults_are_still_faults():
    class Ill(EEFL):
        def local_update(self, weights, data, client, rnd, streams):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        go(Ill, availability=Availability(dropout=0.3), faults="raise")
    row = go(Ill, rounds=1, availability=Availability(dropout=0.3)).log[0]
    assert len(row["left_out"]) + len(row["missing"]) == len(row["clients"]) and row["missing"]


def test_together_and_in_low_precision():
    run = go(rounds=2, stack=True)
    close = go(rounds=2)
    assert [r["missing"] for r in run.log] == [r["missing"] for r in close.log]
    for k, v in run.state["net"].items():
        assert torch.allclose(v, close.state["net"][k], atol=1e-4), k


@pytest.mark.parametrize("bad", [0.2, "dropout=0.2", Availability, dict(dropout=0.1), EEFL()])
def test_what_is_no_availability(bad):
    with pytest.raises(ValueError, match="availability=.* must be None, or an object such as"):
        go(availability=bad)


def test_own_mix_weighs_classes_as_a_client_holds_them():
    run = go(rounds=2, availability=None)
    logits = run.logits(TEST)
    scores = own_mix(logits, TEST.y, TRAIN.y, CLIENTS)
    for c, a in zip(CLIENTS, scores):
        y = TRAIN.y[torch.cat([c.train, c.valid])]
        right = logits[c.tier - 1].argmax(-1) == TEST.y
        want = sum(float(right[TEST.y == k].double().mean()) for k in y.tolist()) / len(y)
        assert abs(a - want) < 1e-9
    some = seen_and_unseen(run, TRAIN, TEST, CLIENTS, CLIENTS[:5])
    assert abs(some["seen"] - sum(scores[:5]) / 5) < 1e-12
    assert abs(some["unseen"] - sum(scores[5:]) / 7) < 1e-12
    assert seen_and_unseen(run, TRAIN, TEST, CLIENTS, CLIENTS)["unseen"] is None


def test_own_mix_without_test_images_of_a_class():
    keep = TEST.y != 3
    logits = torch.nn.functional.one_hot(TEST.y[keep], 10).float().expand(4, -1, -1)
    only3 = [Client(0, 1, (TRAIN.y == 3).nonzero()[:, 0], torch.tensor([]).long())]
    assert own_mix(logits, TEST.y[keep], TRAIN.y, only3) == [None]
    assert own_mix(logits, TEST.y[keep], TRAIN.y, CLIENTS) == [1.0] * 12

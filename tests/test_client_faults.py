"""What must hold for every federated method: a client that answers with nonsense, late, or not at all is left out by name.

The round goes on with the others; a round without anybody keeps the network."""

import json, warnings
import numpy as np
import pytest, torch
from test_faults import CLIENTS, FAULTS, TEST, TRAIN, build, go, nan, put
from helpers import same
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.federated.calibration import CalibratedEEFL
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.generator import GeneratorSettings
from darkdistill_nb.federated.method import EEFL, make_clients
from darkdistill_nb.federated.parallel_variant import DarkDistillPL

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(server_epochs=1, kd_steps=1, generator=GeneratorSettings(d_eps=8, d_h=16))
METHODS = {  # name -> (class, options)
    "eefl": (EEFL, {}),
    "darkdistill": (DarkDistill, SMALL),
    "darkdistill_pl": (DarkDistillPL, SMALL),
    "calibrated_eefl": (CalibratedEEFL, {}),
    "calibrated_eefl, noisy": (CalibratedEEFL, dict(epsilon=1.0)),
}
NEW = ("darkdistill_pl", "calibrated_eefl")  # the others are in test_faults.py


def method(name, spoil, ill=(0,)):
    "A method whose clients `ill` (None: all) do `spoil` to their update; an `Answer` that it returns is sent instead."
    kind, options = METHODS[name]

    class Faulty(kind):
        def local_update(self, weights, data, client, rnd, streams):
            u = super().local_update(weights, data, client, rnd, streams)
            if ill is None or client.id in ill:
                answer = spoil(u)
                return answer.value if isinstance(answer, Answer) else u
            return u

    return Faulty(participation=1.0, **options)


class Answer:
    "An answer that is no update."

    def __init__(self, value):
        self.value = value


def without(name):
    "The same method, when client 0 is never drawn."
    kind, options = METHODS[name]

    class Without(kind):
        def configure(self, rnd, clients, streams):
            return [c for c in super().configure(rnd, clients, streams) if c.id != 0]

    return Without(participation=1.0, **options)


@pytest.fixture(scope="module")
def healthy():
    "For each method: a run without client 0; made when it is needed."
    made = {}

    def of(name):
        if name not in made:
            made[name] = go(without(name), rounds=2)
        return made[name]

    return of


def left_out(name, spoil, words, healthy):
    "Run, and check that it is the run without client 0, that a warning names it, and that the log says why."
    with pytest.warns(UserWarning) as told:
        run = go(method(name, spoil), rounds=2)
    for n, row in enumerate(run.log, 1):
        assert list(row["left_out"]) == ["0"] and 0 in row["clients"]
        assert words in row["left_out"]["0"], row["left_out"]
        said = [str(w.message) for w in told]
        assert any(f"round {n}: client 0 is left out, " in t and words in t for t in said)
        assert row["loss"] > 0
    assert same(run.state["net"], healthy(name).state["net"])
    reports = lambda r: {
        k: v for k, v in r.state["server"].items() if not k.startswith(("tau", "vote_w"))
    }
    assert same(reports(run), reports(healthy(name)))
    assert json.loads(json.dumps(run.log, allow_nan=False)) == run.log


# ---------------------------------------------------------------- what can be wrong with any answer


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", NEW)
def test_a_bad_answer_is_left_out(name, kind, healthy):
    left_out(name, lambda u: FAULTS[kind][0](u), FAULTS[kind][1], healthy)


@pytest.mark.parametrize("value", [None, {}, "done", 1.5, nan], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_and_what_is_no_update(name, value, healthy):
    left_out(name, lambda u: Answer(value), "answer=", healthy)


STALE = {
    "the round before": -1,
    "long ago": -100,
    "a round to come": 1,
    "text": "first",
    "NaN": nan,
    "a list": [1, 2],
    "a tensor": torch.arange(3),
}


@pytest.mark.parametrize("said", STALE)
@pytest.mark.parametrize("name", METHODS)
def test_an_answer_to_another_round_is_left_out(name, said, healthy):
    "It has the right names, shapes and sizes: only its number says that it is late."

    def spoil(u):
        off = STALE[said]
        u.round = u.round + off if isinstance(off, int) else off

    left_out(name, spoil, "it answers round=", healthy)


@pytest.mark.parametrize("name", METHODS)
def test_answers_say_their_round(name):
    rounds = []
    run = go(method(name, lambda u: rounds.append(u.round), None), rounds=2)
    assert rounds == [0] * 8 + [1] * 8 and not any(r["left_out"] for r in run.log)


@pytest.mark.parametrize("said", [None, np.int64(0), torch.tensor(0)])
def test_a_method_of_ones_own_need_not_say_its_round(said):
    "Nothing is said, or a number of numpy or torch: both are fine in round 0."
    run = go(method("eefl", put(round=said), None))
    assert run.log[0]["left_out"] == {}


# ---------------------------------------------------------------- histograms that lie


def lie(key, make):
    def spoil(u):
        u.extra[key] = make(u.extra[key])

    return spoil


def huge(h):
    "Counts whose sum runs over in 64 bit, back to the right total."
    h = h.long().clone()
    h.view(-1)[:4] += 2**62
    return h


LIES = {
    "negative": lambda h: h - 1,
    "one negative, right total": lambda h: h + _shift(h),
    "NaN": lambda h: h.float() * nan,
    "infinite": lambda h: h.float() + torch.inf,
    "too many": lambda h: h * 1000 + 1000,
    "one too many": lambda h: h + (torch.arange(h.numel()).view(h.shape) == 0).to(h.dtype),
    "sum runs over": huge,
    "wrong shape": lambda h: h[:3],
    "one dimension more": lambda h: h[None],
    "empty": lambda h: h[:0],
    "a single number": lambda h: h.sum(),
}
EXACT = {
    "fractions": lambda h: h.float(),
    "yes and no": lambda h: h > 0,
    "all zero": lambda h: h * 0,
}


def _shift(h):
    "+k in one cell, -k in another: the total is right, one count is negative."
    s = torch.zeros_like(h).view(-1)
    s[0], s[1] = 500, -500
    return s.view(h.shape)


WHERE = {"darkdistill": "histogram", "darkdistill_pl": "classes", "calibrated_eefl": "labels"}


@pytest.mark.parametrize("lies", {**LIES, **EXACT})
@pytest.mark.parametrize("name", WHERE)
def test_a_histogram_that_lies_is_left_out(name, lies, healthy):
    words = "not finite" if lies in ("NaN", "infinite") else f"{WHERE[name]}="
    left_out(name, lie(WHERE[name], {**LIES, **EXACT}[lies]), words, healthy)


@pytest.mark.parametrize("name", WHERE)
def test_no_histogram_at_all(name, healthy):
    left_out(name, put(extra={}), "histogram" if name == "darkdistill" else WHERE[name], healthy)


@pytest.mark.parametrize(
    "lies", ["NaN", "infinite", "too many", "wrong shape", "empty", "sum runs over"]
)
def test_noise_is_no_excuse(lies, healthy):
    "Noisy labels may be fractions and negative, but not further off than noise can carry them."
    words = "not finite" if lies in ("NaN", "infinite") else "labels="
    left_out("calibrated_eefl, noisy", lie("labels", LIES[lies]), words, healthy)


def test_honest_noise_is_never_left_out():
    for epsilon in (0.01, 1.0, 100.0):
        m = CalibratedEEFL(participation=1.0, epsilon=epsilon)
        assert not any(r["left_out"] for r in go(m, rounds=2).log)


def test_a_lie_that_cannot_be_seen_does_bounded_harm():
    "Classes moved to another row pass every check: weights stay finite, and the round goes on."
    for name in WHERE:
        run = go(method(name, lie(WHERE[name], lambda h: h.flip(0)), None), rounds=2)
        assert not any(r["left_out"] for r in run.log)
        assert all(v.isfinite().all() for v in run.state["net"].values())


# ---------------------------------------------------------------- nobody is left


@pytest.mark.parametrize("kind", ["no samples", "all NaN", "raises"])
@pytest.mark.parametrize("name", NEW)
def test_nobody_left_keeps_the_network(name, kind, tmp_path):
    with Streams(0).scope("init"):
        start = build().state_dict()
    path = tmp_path / "c.safetensors"
    make = lambda: method(name, lambda u: FAULTS[kind][0](u), None)
    with pytest.warns(UserWarning, match="the network stays as it is"):
        run = go(make(), rounds=2, checkpoint=path)
    assert same(run.state["net"], start) and len(run.log[0]["left_out"]) == 8
    assert [r["loss"] for r in run.log] == [None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(go(make(), rounds=3, checkpoint=path).state["net"], start)


@pytest.mark.parametrize("name", METHODS)
def test_all_answers_are_late(name):
    with Streams(0).scope("init"):
        start = build().state_dict()
    with pytest.warns(UserWarning, match="no client is left, the network stays as it is"):
        run = go(method(name, put(round=7), None), rounds=1)
    assert same(run.state["net"], start)


@pytest.mark.parametrize("name", NEW)
def test_nobody_drawn_keeps_the_network(name):
    kind, options = METHODS[name]
    m = kind(**options)
    m.configure = lambda rnd, clients, streams: []
    with pytest.warns(UserWarning, match="no client was drawn"):
        run = go(m, rounds=2)
    assert run.log[0]["clients"] == [] and len(run.log[1]["accuracy"]) == 4


@pytest.mark.parametrize("name", METHODS)
def test_a_tier_that_is_lost_keeps_its_block(name):
    "All clients of tier 4 fail: blocks 1 to 3 are trained, block 4 stays, and nothing is said of a server step with tier 4."
    deep = [c.id for c in CLIENTS if c.tier == 4]
    with Streams(0).scope("init"):
        start = build().state_dict()
    with pytest.warns(UserWarning):
        run = go(method(name, lambda u: Answer(None), deep), rounds=1)
    assert sorted(run.log[0]["left_out"], key=int) == [str(i) for i in sorted(deep)]
    for k, v in run.state["net"].items():
        if k.split(".")[1] == "3" and not k.startswith("stem"):
            assert torch.equal(v, start[k]), k
    assert not torch.equal(
        run.state["net"]["stages.2.convs.0.weight"], start["stages.2.convs.0.weight"]
    )
    assert "4" not in run.log[0].get("server_step", "")


class LateInWorkers(DarkDistillPL):
    "Client 0 answers the round before."

    def local_update(self, weights, data, client, rnd, streams):
        u = super().local_update(weights, data, client, rnd, streams)
        if client.id == 0:
            u.round = rnd - 1
        return u


def test_workers_leave_out_the_same(healthy):
    with pytest.warns(UserWarning, match="round 2: client 0 is left out, it answers round=0"):
        run = go(LateInWorkers(participation=1.0, **SMALL), rounds=2, workers=2)
    assert same(run.state["net"], healthy("darkdistill_pl").state["net"])


def test_faults_can_be_errors():
    with pytest.raises(
        ValueError, match="round 1: client 0, it answers round=-1, but this is round=0"
    ):
        go(method("eefl", put(round=-1)), faults="raise")
    with pytest.raises(ValueError, match="round 1: client 0, classes=.* must be of"):
        go(method("darkdistill_pl", lie("classes", LIES["too many"])), faults="raise")


def test_a_federation_of_one_client_survives_its_only_fault():
    one = make_clients(TRAIN.y, 4, 0.5)[:1]
    with pytest.warns(UserWarning, match="is left out"):
        run = go(method("eefl", put(round=9), (one[0].id,)), one, train=TRAIN, test=TEST)
    assert run.log[0]["loss"] is None

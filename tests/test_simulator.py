"The simulator of distributed early exit: exact small worlds, what happens when things fail, and that random numbers belong to packets and not to policies."

import dataclasses
import math
import sys
import numpy as np
import pytest
import torch
from helpers import refused
from darkdistill_nb.distree import simulator
from darkdistill_nb.distree.students import SystemAnswers, make_answers
from darkdistill_nb.exits.control import BanditController, LatencyController
from darkdistill_nb.distree.devices import (
    Aggregator,
    Cluster,
    Device,
    Link,
    Policy,
    confidence_of,
    fixed_policy,
    joint_policy,
    local_policy,
    noise,
)
from darkdistill_nb.distree.faults import plot_latency
from darkdistill_nb.distree.simulator import (
    Outcomes,
    arrivals,
    plot_timeline,
    simulate_devices,
    outcome_table,
)

FREE = Link(bandwidth=math.inf, latency=0.0, joule=0.0)
WRN = [
    0.0166,
    0.1936,
    0.3706,
    0.5083,
    0.6853,
    0.8230,
    1.0,
]  # cost of the seven exits of a WRN-16-1, as a share of its MACs


def table(costs, S=4, N=2, K=3, seed=0):
    "Answers with random partial logits and the given costs per exit, the same for all students."
    g, E = torch.Generator().manual_seed(seed), len(costs)
    draw = lambda *s: torch.randn(*s, generator=g)
    macs = torch.tensor([costs] * N, dtype=torch.float64)
    return SystemAnswers(
        draw(N, E, S, K),
        draw(K),
        draw(N, E, S, K),
        torch.randint(K, (S,), generator=g),
        macs,
        [5] * N,
        None,
    )


def same(a, b):
    for f in dataclasses.fields(Outcomes):
        np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name))


def unit(n, **link):
    return Cluster.equal(
        n, Device(speed=1.0, active=1.0, idle=0.0), dataclasses.replace(FREE, **link)
    )


# ---------------------------------------------------------------- where nothing fails


def test_latency_is_the_maximum_and_energy_the_sum():
    "Check 21: students on free links, nothing queues, 1 MAC/s and 1 W; answers are those of the table."
    a, g = make_answers(4, n=200, seed=3), torch.Generator().manual_seed(1)
    depth = torch.randint(7, (4, 200), generator=g)
    o = simulate_devices(a, fixed_policy(depth), unit(4), np.arange(200) * 1e9)
    cost = a.costs.gather(1, depth).numpy()
    np.testing.assert_allclose(o.latency, cost.max(0))
    np.testing.assert_allclose(o.energy, cost.sum(0))
    np.testing.assert_allclose(o.macs, cost.T)
    np.testing.assert_allclose(o.logits, a.logits(depth).numpy(), atol=1e-5)
    assert (o.exits == depth.T.numpy()).all()
    assert not o.degraded.any() and not o.stopped.any() and o.wasted.max() < 1


@pytest.mark.parametrize("depth, fraction", [([6, 6], 1.0), ([3, 6], 0.7541), ([3, 3], 0.5083)])
def test_mean_macs_of_a_mixture(depth, fraction):
    "Check 21: half of the requests at exit 4 and half at exit 7 cost .7541."
    o = simulate_devices(
        table(WRN, S=2, N=1), fixed_policy([depth]), unit(1), np.arange(100.0) * 10
    )
    assert o.summary()["macs"] == pytest.approx(fraction, abs=1e-4)


def test_radio_bytes_and_time():
    "Two reports at once share a radio; 20 bytes at 10 bytes/s; every byte costs 2 J."
    a, link = table([0.0, 0.0, 1.0], N=1), Link(bandwidth=10.0, latency=0.5, joule=2.0)
    o = simulate_devices(
        a, Policy(), Cluster((Device(speed=1.0, active=0.0),), (link,)), [0.0], fallback="every"
    )
    assert (
        o.bytes[0] == 60 and o.energy[0] == 120 and o.latency[0] == pytest.approx(6 + 0.5)
    )  # 2 s each: the last leaves from 4 to 6, ready since 1
    assert (
        simulate_devices(a, Policy(), Cluster.equal(1), [0.0], payload="features").bytes[0]
        == 8 + 4 * 5
    )


def test_queue_agrees_with_theory():
    "M/D/1: the mean wait is rho s / (2 (1 - rho))."
    o = simulate_devices(table([1.0], N=1), Policy(), unit(1), arrivals(8000, 0.6, seed=1))
    assert o.latency.mean() - 1 == pytest.approx(0.6 / (2 * 0.4), rel=0.12)


def test_local_policy_equals_the_fixed_one_it_implies():
    a = make_answers(3, n=100, seed=2)
    conf = a.proxy.softmax(-1).amax(-1)
    leave = conf >= 0.6
    leave[:, -1] = True
    run = lambda p: simulate_devices(a, p, Cluster.equal(3), arrivals(100, 2.0, seed=0), seed=5)
    same(run(local_policy(conf, 0.6)), run(fixed_policy(leave.float().argmax(1))))


# ---------------------------------------------------------------- decision points, by hand

A = table([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "sure, speculative, latency, wasted, bytes",
    [
        (True, False, 1.25, 0.0, 2 * 20 + 2 * 8),  # report at 1, answer at 1.25, STOP
        (
            True,
            True,
            1.25,
            1.0,
            2 * 20 + 2 * 8,
        ),  # STOP arrives at 1.5: half a stage on each of two devices
        (
            False,
            False,
            3.75,
            0.0,
            4 * 20 + 2 * 8,
        ),  # a quarter up, a quarter down, two more stages, a quarter up
        (False, True, 3.25, 0.0, 4 * 20),
    ],
)  # no GO, no waiting
def test_decision_point(sure, speculative, latency, wasted, bytes):
    p = Policy(points=(0,), stop=lambda z, e, lam: sure, speculative=speculative, patience=10.0)
    o = simulate_devices(A, p, unit(2, latency=0.25), [0.0])
    assert o.latency[0] == pytest.approx(latency)
    assert o.wasted[0] == pytest.approx(wasted)
    assert o.bytes[0] == bytes
    assert (o.exits[0] == (0 if sure else 2)).all()
    assert bool(o.stopped[0]) is sure
    assert not o.degraded[0]


def test_joint_confidence_is_exact():
    "With free links the joint rule is `first point where the joint confidence reaches the threshold`."
    a = make_answers(3, n=300, seed=4)
    conf = torch.stack([a.joint(e) for e in range(7)]).softmax(-1).amax(-1)
    o = simulate_devices(
        a, joint_policy((1, 3, 5), 0.8), Cluster.equal(3, link=FREE), np.arange(300.0) * 10
    )
    wanted = torch.full((300,), 6)
    for e in (5, 3, 1):
        wanted[conf[e] >= 0.8] = e
    assert (o.exits == wanted.numpy()[:, None]).all()
    assert 0 < o.stopped.mean() < 1
    assert (o.stopped == (wanted < 6).numpy()).all()
    for w, z in zip(wanted, o.logits):
        assert confidence_of(z) >= 0.8 or w == 6


def test_a_lost_word_costs_patience_and_nothing_else(monkeypatch):
    def deaf(*a):
        f = noise(*a)
        f["down"][:] = 1e-9
        f["up"][:] = 1.0
        return f

    monkeypatch.setattr(simulator, "noise", deaf)
    p = Policy(points=(0,), stop=lambda z, e, lam: False, patience=0.7)
    o = simulate_devices(A, p, unit(2, latency=0.25, loss=0.5), [0.0])
    assert o.latency[0] == pytest.approx(1 + 0.7 + 2 + 0.25) and not o.degraded[0]
    o = simulate_devices(
        A,
        dataclasses.replace(p, stop=lambda z, e, lam: True),
        unit(2, latency=0.25, loss=0.5),
        [0.0],
    )
    assert (
        o.latency[0] == pytest.approx(1.25)
        and o.macs[0].tolist() == [3.0, 3.0]
        and o.wasted[0] == pytest.approx(4.0)
    )  # nobody heard STOP


def test_stop_reaches_requests_that_have_not_begun():
    "Device 1 is slow and still has the first request, which is not sure; the second is, without it, and device 1 never begins it."

    class Count:
        n = 0

        def update(self, *a, **k):
            pass

        @property
        def lam(self):
            self.n += 1
            return self.n

    p = Policy(points=(0,), stop=lambda z, e, lam: lam == 2, need=1)
    o = simulate_devices(A, p, unit(2).with_device(1, speed=0.01), [0.0, 0.0], knob=Count())
    assert o.latency.tolist() == [300.0, 4.0]
    assert o.exits.tolist() == [[2, 2], [0, -1]]
    assert o.missing[1].tolist() == [False, True]
    assert o.lam.tolist() == [1, 2]
    assert o.macs.tolist() == [[3.0, 3.0], [1.0, 0.0]]
    assert o.degraded.tolist() == [False, True]
    assert o.stopped.tolist() == [False, True]


# ---------------------------------------------------------------- deadlines and failures


@pytest.mark.parametrize(
    "fallback, exits, energy", [(None, -1, 5.0), ("every", 1, 5.0), ("last", 1, 4.2)]
)
def test_deadline_fallback(fallback, exits, energy):
    "Stages end at 1, 2 and 3, the deadline is 2.5; `last` reports 0.4 before it."
    o = simulate_devices(
        A, Policy(), unit(2, latency=0.25), [0.0], deadline=2.5, fallback=fallback, margin=0.4
    )
    assert o.latency[0] == pytest.approx(2.5)
    assert (o.exits[0] == exits).all()
    assert o.degraded[0]
    assert o.energy[0] == pytest.approx(energy)
    assert (o.missing.all(), o.late.all()) == ((True, False) if exits < 0 else (False, True))
    wanted = A.logits(torch.ones(2, 4, dtype=torch.long))[0] if exits > 0 else A.bias
    np.testing.assert_allclose(o.logits[0], wanted.numpy(), atol=1e-6)


ROUGH = Cluster.equal(4).with_links(loss=0.3, jitter=0.01).with_devices(jitter=0.3)
FOUR = make_answers(4, n=300, seed=0)
LAST = fixed_policy(torch.full((4, 300), 6))
CONF = FOUR.proxy.softmax(-1).amax(-1)
KINDS = {
    "fixed": LAST,
    "local": local_policy(CONF, 0.7),
    "asking": joint_policy((2, 4), 0.9, patience=0.05),
    "speculative": joint_policy((2, 4), 0.9, speculative=True),
    "need": joint_policy((2, 4), 0.9, patience=0.05, need=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fallback", [None, "every", "last"])
def test_every_request_is_answered_by_its_deadline(kind, fallback):
    "Loss, jitter, a device that dies and load above what the devices can do: no request is left, and what is in an answer follows from its exits."
    cluster = ROUGH.with_device(1, dies=20.0)
    o = simulate_devices(
        FOUR,
        KINDS[kind],
        cluster,
        arrivals(300, 5.0, seed=1),
        deadline=0.5,
        fallback=fallback,
        mean=FOUR.means(),
        suspect=4,
    )
    assert o.answered.all()
    assert o.latency.max() <= 0.5 + 1e-9
    assert (o.latency > 0).all()
    assert o.degraded.any()
    assert ((o.exits < 0) == o.missing).all()
    assert not (o.missing & o.late).any()
    assert o.missing[-50:, 1].all()
    depth, present = torch.tensor(o.exits).clamp(min=0).T, torch.tensor(~o.missing).T
    np.testing.assert_allclose(
        o.logits, FOUR.logits(depth, present, FOUR.means()).numpy(), atol=1e-4
    )
    assert (o.wasted >= 0).all() and (o.macs <= 2.7e7 * (1 + 1e-9)).all() and (o.energy > 0).any()


def test_without_a_deadline_a_lost_packet_is_never_answered():
    o = simulate_devices(FOUR, LAST, ROUGH, np.arange(300.0))
    lost = (noise(0, 4, 300, 7)["up"][..., 0] <= 0.3).any(0)
    assert (~o.answered == lost).all()
    assert 0.6 < lost.mean() < 0.9
    assert not o.right[lost].any()
    assert o.summary()["unanswered"] == pytest.approx(lost.mean())
    assert o.summary()["p99"] == math.inf


def test_three_points_at_thirty_percent_loss_and_with_one_device_dead():
    "The goal of this project, on a synthetic table: no request unanswered, less than 3 points lost."
    come, kw = arrivals(300, 0.8, seed=1), dict(deadline=0.8, mean=FOUR.means())
    whole = simulate_devices(FOUR, LAST, Cluster.equal(4), come, **kw)
    for cluster, extra in (
        (Cluster.equal(4).with_links(loss=0.3), dict(fallback="every")),
        (Cluster.equal(4).with_device(2, dies=0.0), dict(suspect=3)),
    ):
        o = simulate_devices(FOUR, LAST, cluster, come, **kw, **extra)
        assert o.answered.all() and whole.right.mean() - o.right.mean() < 0.03


def test_mean_imputation_does_not_depend_on_the_split():
    "Constants moved between partial logits and bias change nothing with means, and a lot with zeros."
    c = torch.randn(4, 1, 1, 10, generator=torch.Generator().manual_seed(0))
    moved = dataclasses.replace(FOUR, partial=FOUR.partial + c, bias=FOUR.bias - c.sum(0)[0, 0])
    run = lambda t, mean: simulate_devices(
        t, LAST, ROUGH, np.arange(300.0), deadline=0.6, mean=mean
    )
    np.testing.assert_allclose(
        run(FOUR, FOUR.means()).logits, run(moved, moved.means()).logits, atol=1e-4
    )
    assert np.abs(run(FOUR, None).logits - run(moved, None).logits).max() > 0.5
    assert run(moved, moved.means()).right.mean() > run(moved, None).right.mean() + 0.05


def test_death_in_the_middle_of_a_stage():
    o = simulate_devices(A, Policy(), unit(2).with_device(0, dies=1.5), [0.0, 10.0], deadline=5.0)
    assert o.macs.tolist() == [[1.5, 3.0], [0.0, 3.0]]
    assert o.missing.tolist() == [[True, False]] * 2
    assert o.latency.tolist() == [5.0, 5.0]
    assert simulate_devices(
        A, Policy(), unit(2).with_devices(p_dead=1.0), [0.0], deadline=1.0
    ).missing.all()


def test_failure_detector_ends_the_waiting_and_forgives():
    gone = unit(2).with_device(0, dies=0.0)
    o = simulate_devices(A, Policy(), gone, np.arange(6.0) * 10, deadline=5.0, suspect=2)
    assert o.latency.tolist() == [5.0, 5.0, 3.0, 3.0, 3.0, 3.0] and o.degraded.all()
    slow = unit(2).with_device(
        0, speed=lambda t: 0.01 if t < 25 else 1.0
    )  # silent for three requests, then back
    o = simulate_devices(A, Policy(), slow, np.arange(8.0) * 10, deadline=5.0, suspect=2)
    assert o.latency.tolist()[:2] == [5.0, 5.0]
    assert not o.degraded[4:].any()
    assert (o.latency[4:] == 3.0).all()


def test_link_tries():
    l = Link(bandwidth=100.0, latency=1.0, loss=0.1, retries=2, timeout=0.5)
    assert l.fate(10, u=0.5) == (1, pytest.approx(1.1))
    assert l.fate(10, u=0.05) == (2, pytest.approx(0.2 + 0.5 + 1))
    assert l.fate(10, u=0.005)[0] == 3
    assert l.fate(10, u=0.0005) == (3, math.inf)
    assert Link(loss=1.0, retries=4).fate(10, u=1.0) == (5, math.inf)
    assert Link().fate(0, u=1e-300) == (1, 0.002)


# ---------------------------------------------------------------- random numbers


def test_same_seed_same_table():
    for p in KINDS.values():
        run = lambda seed: simulate_devices(
            FOUR,
            p,
            ROUGH,
            arrivals(120, 2.0, seed=0),
            deadline=0.5,
            fallback="every",
            seed=seed,
            trace=True,
        )
        a = run(0)
        same(a, run(0))
        assert (a.latency != run(1).latency).any()


def test_luck_belongs_to_the_packet():
    "Another policy, more requests or more devices: the first packet of a request has the same fate."
    come = np.arange(200.0)
    first = noise(0, 4, 200, 7)["up"][..., 0].T <= 0.3
    runs = [
        simulate_devices(FOUR, fixed_policy(torch.full((4, 300), e)), ROUGH, come[:n], deadline=0.9)
        for e, n in ((0, 200), (3, 200), (0, 90))
    ]
    for o in runs[:2]:
        assert (o.missing == first).all()
    assert (runs[2].missing == first[:90]).all()
    more = [
        simulate_devices(
            FOUR, fixed_policy(torch.zeros(4, 300)), ROUGH.with_links(loss=p), come, deadline=0.9
        ).missing
        for p in (0.1, 0.2, 0.4)
    ]
    assert (more[0] <= more[1]).all()
    assert (more[1] <= more[2]).all()
    assert more[0].sum() < more[2].sum()


# ---------------------------------------------------------------- the aggregator alone


def test_aggregator_under_random_messages():
    "Whatever arrives in whatever order: one answer per request, from the deepest exits that came in time."
    rng, N, E, S = np.random.default_rng(0), 4, 7, 300
    mean = FOUR.means()
    agg, log = Aggregator(FOUR.bias, N, deadline=1.0, mean=mean), {}
    for r in range(S):
        agg.open(r, now=10.0 * r)
        best = [-1] * N
        done = None
        for t, n, e in sorted(
            (rng.random() * 1.3, rng.integers(N), rng.integers(E)) for _ in range(12)
        ):
            if done is None and t > 1.0:
                done = agg.close(r, 10.0 * r + 1.0)
            got, word, to = agg.receive(
                r, n, e, FOUR.partial[n, e, r].double().numpy(), final=e == E - 1, now=10.0 * r + t
            )
            assert word is None and to == ()
            if done is None:
                best[n] = max(best[n], e)
                done = got
            else:
                assert got is None
        log[r] = done or agg.close(r, 10.0 * r + 1.0)
        assert log[r].exits == best
        assert log[r].missing == tuple(n for n in range(N) if best[n] < 0)
        assert log[r].latency <= 1 + 1e-6
        assert log[r].late == tuple(n for n in range(N) if 0 <= best[n] < E - 1)
    depth = torch.tensor([log[r].exits for r in range(S)]).T
    wanted = FOUR.logits(depth.clamp(min=0), depth >= 0, mean)
    np.testing.assert_allclose(
        np.stack([log[r].logits for r in range(S)]), wanted.numpy(), atol=1e-4
    )
    assert [log[r].prediction for r in range(S)] == wanted.argmax(1).tolist()
    assert agg.ignored > 50
    assert not agg.waiting


def test_aggregator_needs_no_float_times():
    "Deadlines in wall-clock time: `due` names what has to be closed, a message after that moment is too late even before `close`."
    agg = Aggregator([0.0, 0.0], 1, deadline=2.0)
    agg.open("x", 100.0)
    agg.open("y", 101.0)
    assert agg.due(101.9) == [] and agg.due(102.0) == ["x"] and agg.due(103.5) == ["x", "y"]
    assert agg.receive("x", 0, 6, np.ones(2), True, 102.1) == (None, None, ()) and agg.ignored == 1
    assert agg.close("x", 102.1).missing == (0,)
    assert agg.receive("y", 0, 6, np.ones(2), True, 102.5)[0].latency == 1.5
    assert agg.receive("never opened", 0, 0, np.ones(2), True, 0.0) == (None, None, ())


def test_every_report_does_not_make_a_decision_point():
    "Reports sent for the deadline's sake change neither decisions nor words."
    a, b = (
        simulate_devices(
            FOUR, KINDS["asking"], Cluster.equal(4), np.arange(300.0), deadline=0.9, fallback=f
        )
        for f in (None, "every")
    )
    for name in ("stopped", "prediction", "exits", "macs"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (b.bytes > a.bytes).all() and a.stopped.any()


# ---------------------------------------------------------------- drift


def test_controller_follows_the_load():
    "The request carries lambda from its arrival; under a burst the controller leaves earlier, and says when a budget cannot be met."
    come = arrivals(900, np.repeat([1.2, 5.0, 1.2], 300), seed=2)
    c = LatencyController(0.3, eta=0.01, lam=0.8, floor=0.1, priority="deadline")
    o = simulate_devices(FOUR, local_policy(CONF), Cluster.equal(4), come, knob=c)
    fixed = simulate_devices(FOUR, local_policy(CONF, 0.8), Cluster.equal(4), come)
    by = lambda v: v.reshape(3, 300).mean(1)
    assert by(o.lam)[1] < by(o.lam)[0]
    assert c.t == 900
    assert abs(by(o.latency)[1] / 0.3 - 1) < 0.35
    assert by(fixed.latency)[1] > 1.5
    held = LatencyController(0.03, eta=0.05, lam=0.8, floor=0.1)
    simulate_devices(FOUR, local_policy(CONF), Cluster.equal(4), come[:300], knob=held)
    assert [e["event"] for e in held.log] == ["infeasible"] and held.lam == 0.1
    b = BanditController([0.2, 0.5, 0.8], 0.3)
    simulate_devices(FOUR, local_policy(CONF), Cluster.equal(4), come[:100], knob=b)
    assert len(b.past) == 100


def test_speed_may_drift():
    o = simulate_devices(
        A, Policy(), unit(2).with_devices(speed=lambda t: 1.0 if t < 10 else 0.5), [0.0, 20.0]
    )
    assert o.latency.tolist() == [3.0, 6.0]


# ---------------------------------------------------------------- figures, errors


def test_figures_say_simulated():
    o = simulate_devices(
        FOUR, KINDS["speculative"], ROUGH, np.arange(5.0), deadline=0.6, trace=True
    )
    for fig in (plot_timeline(o, 2, "One request"), plot_latency({"a": o, "b": o}, 0.6)):
        assert "simulated" in fig.layout.title.text
    assert "simulated" in outcome_table({"a": o}) and plot_latency({"a": o}).data[0].y[-1] == 1
    ups = sum(t[0] == "up" and t[2] == 2 for t in o.trace)
    assert ups == sum(d.name == "partial logits" for d in plot_timeline(o, 2).data) > 3


def test_simpy_is_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(ImportError, match=r"pip install darkdistill-nb\[simulator\]"):
        simulate_devices(A, Policy(), unit(2), [0.0])


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: simulate_devices(A, Policy(), unit(3), [0.0]),
            r"len\(cluster\)=3 must be as many devices as students, 2",
        ),
        (lambda: simulate_devices(A, Policy(), unit(2), []), "rising list"),
        (lambda: simulate_devices(A, Policy(), unit(2), [2.0, 1.0]), "rising list"),
        (lambda: simulate_devices(A, Policy(), unit(2), [0.0], sample=[4]), "in 0..3"),
        (lambda: simulate_devices(A, Policy(), unit(2), [0.0], fallback="some"), "fallback='some'"),
        (lambda: simulate_devices(A, Policy(), unit(2), [0.0], fallback="last"), "finite deadline"),
        (
            lambda: simulate_devices(
                A, Policy(), unit(2), [0.0], deadline=1.0, fallback="last", margin=2.0
            ),
            "below the deadline",
        ),
        (
            lambda: simulate_devices(A, Policy(), unit(2), [0.0], payload="image"),
            "payload='image'",
        ),
        (lambda: simulate_devices(A, Policy(points=(2,)), unit(2), [0.0]), "before the last"),
        (lambda: simulate_devices(A, Policy(patience=math.inf), unit(2), [0.0]), "patience=inf"),
        (lambda: simulate_devices(A, Policy(), unit(2), [0.0], deadline=-1), "deadline=-1"),
        (
            lambda: simulate_devices(A, Policy(), unit(2), [0.0], mean=np.zeros((2, 4))),
            r"mean.shape=\(2, 4\) must be \(2, 3\)",
        ),
        (lambda: simulate_devices(A, Policy(), unit(2), [0.0], suspect=0), "suspect=0"),
        (lambda: simulate_devices(A, Policy(need=3), unit(2), [0.0]), "need=3"),
        (lambda: Device(jitter=-1), "jitter=-1"),
        (lambda: Device(active=-1), "active=-1"),
        (lambda: Link(bandwidth=0), "bandwidth=0"),
        (lambda: Link(retries=-1), "retries"),
        (lambda: Cluster((), ()), "as many as devices"),
        (lambda: arrivals(3, -1.0), "rate=-1.0"),
        (lambda: arrivals(3, 1.0, kind="burst"), "kind='burst'"),
        (lambda: joint_policy(()), "one or more exits"),
        (lambda: fixed_policy([1]), "students, samples"),
        (lambda: plot_latency({}), "one or more named"),
    ],
)
def test_clear_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_go_reaches_a_student_that_waits_deeper_than_the_message_that_releases_it():
    "Student 0 is slow and leaves at its first exit, while student 1 waits at a later one: it must go on at once, not after its patience."
    a = make_answers(2, 5, 4, seed=0)
    policy = Policy(
        leave=lambda n, e, s, lam: n == 0 and e == 0,
        points=(1, 3),
        stop=lambda z, e, lam: False,
        patience=50.0,
    )
    cluster = Cluster.equal(
        2, Device(speed=float(a.costs.max())), Link(latency=0.0, bandwidth=1e12)
    ).with_device(0, speed=float(a.costs.max()) / 3)
    o = simulate_devices(a, policy, cluster, [0.0])
    assert o.exits.tolist() == [[0, 4]] and o.latency[0] < 3


# ---------------------------------------------------------------- energy


def test_energy_of_a_dead_device():
    "A device that dies in the middle of a stage has paid for half of it, and idles no longer; the other idles until the last answer."
    power = Cluster(
        (
            Device(speed=1.0, active=5.0, idle=3.0, dies=1.5),
            Device(speed=1.0, active=5.0, idle=2.0),
        ),
        (FREE, FREE),
    )
    o = simulate_devices(A, Policy(), power, [0.5], deadline=6.0)
    assert o.latency.tolist() == [6.0] and o.exits.tolist() == [[-1, 2]]
    assert o.energy[0] == pytest.approx(5 * (1.0 + 3.0))
    assert o.macs.tolist() == [[1.0, 3.0]]
    assert o.wasted[0] == pytest.approx(1.0)
    assert o.idle == pytest.approx(
        3 * 0.5 + 2 * (6.5 - 3.0)
    )  # until 1.5 s, of which 1 s at work; until 6.5 s


def test_a_device_that_dies_after_the_last_answer_idles_until_that():
    o = simulate_devices(A, Policy(), unit(2).with_devices(idle=1.0, dies=100.0), [0.0])
    assert o.latency.tolist() == [3.0] and o.idle == 0.0 and o.energy[0] == pytest.approx(6.0)
    o = simulate_devices(
        A, Policy(), unit(2).with_devices(idle=1.0, dies=100.0).with_device(1, speed=0.5), [0.0]
    )
    assert o.latency.tolist() == [6.0] and o.idle == pytest.approx(3.0)
    dead = simulate_devices(
        A,
        Policy(),
        unit(2).with_devices(active=7.0, idle=1.0).with_device(0, dies=0.0),
        [0.0],
        deadline=4.0,
    )
    assert dead.energy[0] == pytest.approx(21.0) and dead.idle == pytest.approx(
        1.0
    )  # the dead one costs nothing at all


def test_energy_bytes_and_radio_of_retries(monkeypatch):
    "Two tries are lost and the third arrives: three times the bytes and joules, and the radio is busy for three messages."

    def luck(*a):
        f = noise(*a)
        f["up"][:] = 0.005  # .1 ** 3 < .005 < .1 ** 2: two lost tries
        return f

    monkeypatch.setattr(simulator, "noise", luck)
    link = Link(bandwidth=10.0, latency=0.5, joule=2.0, loss=0.1, retries=3, timeout=0.25)
    a = table([0.0, 1.0], N=1)
    o = simulate_devices(
        a,
        Policy(),
        Cluster((Device(speed=1.0, active=0.0, idle=0.0),), (link,)),
        [0.0],
        fallback="every",
    )
    assert o.bytes[0] == 2 * 3 * 20 and o.energy[0] == pytest.approx(2 * o.bytes[0])
    assert o.latency[0] == pytest.approx(
        2 * 3 * 2.0 + 2 * 0.25 + 0.5
    )  # the second message waits for three tries of the first
    lost = simulate_devices(
        a,
        Policy(),
        Cluster((Device(speed=1.0, active=0.0),), (dataclasses.replace(link, retries=1),)),
        [0.0],
        deadline=9.0,
    )
    assert lost.bytes[0] == 2 * 20 and lost.energy[0] == pytest.approx(80.0) and lost.missing[0, 0]


# ---------------------------------------------------------------- arguments

nan, inf = math.nan, math.inf
BAD = {
    "dies": (lambda: Device(dies=nan), "dies=nan"),
    "jitter": (lambda: Device(jitter=inf), "jitter=inf"),
    "idle": (lambda: Device(idle=nan), "idle=nan"),
    "speed": (lambda: Device(speed=inf), "speed=inf"),
    "p": (lambda: Device(p_dead=1.1), "p_dead=1.1"),
    "death": (lambda: Device(dies=-1), "dies=-1"),
    "no speed": (lambda: Device(speed=lambda t: 0).seconds(1), "speed=0"),
    "MACs": (lambda: Device().seconds(-1), "macs, z"),
    "joule": (lambda: Link(joule=-1), "joule=-1"),
    "latency": (lambda: Link(latency=nan), "latency=nan"),
    "delay": (lambda: Link(jitter=nan), "jitter=nan"),
    "retries": (lambda: Link(retries=1.5), "retries=1.5"),
    "loss": (lambda: Link(loss=nan), "loss=nan"),
    "timeout": (lambda: Link(timeout=inf), "timeout=inf"),
    "bandwidth": (lambda: Link(bandwidth=nan), "bandwidth=nan"),
    "u": (lambda: Link(loss=0.5).fate(8, u=0), "nbytes, u, x"),
    "links": (lambda: Cluster((Device(),), (3,)), "a tuple of Links"),
    "devices": (lambda: Cluster(3, ()), "a tuple of Devices"),
    "equal": (lambda: Cluster.equal(0), "n=0"),
    "factor": (lambda: unit(2).straggler(0, 0), "factor=0"),
    "device": (lambda: unit(2).with_device(2, dies=1.0), "i=2"),
    "n": (lambda: arrivals(-1, 2.0), "n=-1"),
    "half": (lambda: arrivals(1.5, 2.0), "n=1.5"),
    "rate": (lambda: arrivals(3, nan), "rate must be finite"),
    "rate inf": (lambda: arrivals(3, inf), "rate must be finite"),
    "rates": (lambda: arrivals(3, [1.0, 2.0]), "rate.shape"),
    "seed": (lambda: arrivals(3, 1.0, 1.5), "seed=1.5"),
    "noise": (lambda: noise(0, 0, 1, 1), "n_devices=0"),
    "bias": (lambda: Aggregator([nan, 0], 1), "bias must be finite"),
    "students": (lambda: Aggregator([0.0], 0), "n_students=0"),
    "deadline": (lambda: Aggregator([0.0], 1, deadline=nan), "deadline=nan"),
    "mean": (lambda: Aggregator([0.0], 1, mean=[[nan]]), "mean must be finite"),
    "suspect": (lambda: Aggregator([0.0], 1, suspect=nan), "suspect=nan"),
    "stop": (lambda: Aggregator([0.0], 1, stop=3), "stop=3"),
    "open": (lambda: Aggregator([0.0], 1).close("x", 0.0), "open request"),
    "whom": (lambda: Aggregator([0.0], 1).receive("x", -1, 0, [0.0], True, 0.0), "student=-1"),
    "point": (lambda: Policy(points=(1.5,)), "a point=1.5"),
    "patience": (lambda: Policy(patience=0), "patience=0"),
    "need": (lambda: Policy(need=0), "need=0"),
    "speculative": (lambda: Policy(speculative="no"), "speculative='no'"),
    "leave": (lambda: Policy(leave=1), "leave=1"),
    "exits": (lambda: fixed_policy([[0.5]]), "whole numbers"),
    "an exit": (lambda: fixed_policy([[-1]]), "whole numbers"),
    "scores": (lambda: local_policy([[[nan]]], 0.5), "scores must be free of NaN"),
    "shape": (lambda: local_policy([[0.5]], 0.5), "scores.shape"),
    "threshold": (lambda: local_policy([[[0.5]]], nan), "threshold=nan"),
    "thresholds": (lambda: local_policy([[[0.5]]], [0.5, 0.5]), "2 thresholds for 1 exits"),
    "joint": (lambda: joint_policy((1,), nan), "threshold=nan"),
    "joint point": (lambda: joint_policy((-1,)), "a point=-1"),
    "logits": (lambda: confidence_of([nan, 1.0]), "without NaN"),
    "arrival": (lambda: simulate_devices(A, Policy(), unit(2), [nan]), "arrival must be finite"),
    "a deadline": (
        lambda: simulate_devices(A, Policy(), unit(2), [0.0], deadline=nan),
        "deadline=nan",
    ),
    "header": (lambda: simulate_devices(A, Policy(), unit(2), [0.0], header=-1), "header=-1"),
    "sample": (
        lambda: simulate_devices(A, Policy(), unit(2), [0.0], sample=[0.5]),
        "one whole number",
    ),
    "trace": (lambda: simulate_devices(A, Policy(), unit(2), [0.0], trace="x"), "trace='x'"),
    "policy": (lambda: simulate_devices(A, None, unit(2), [0.0]), "a Policy and a Cluster"),
    "knob": (lambda: simulate_devices(A, Policy(), unit(2), [0.0], knob=3), "knob=3"),
    "margin": (
        lambda: simulate_devices(A, Policy(), unit(2), [0.0], deadline=1.0, margin=nan),
        "margin=nan",
    ),
    "runs": (lambda: outcome_table({}), "one or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_in_one_sentence(name):
    call, words = BAD[name]
    refused(call, words)


def test_numbers_of_numpy_and_thresholds_of_records():
    d = Device(speed=np.float32(2), jitter=np.int64(0), dies=torch.tensor(3.0))
    l = Link(retries=np.int32(2), loss=np.float64(0.5))
    assert (d.speed, d.dies, l.retries, l.loss) == (2.0, 3.0, 2, 0.5)
    assert Cluster.equal(np.int64(2)).straggler(np.int64(1), np.float32(2))
    scores = torch.tensor([[[0.2], [0.6], [0.9]]])
    exits = lambda T: [local_policy(scores, T).leave(0, e, 0, None) for e in range(3)]
    assert (
        exits(["inf", 0.5, None])
        == exits([inf, 0.5, -inf])
        == exits(np.array([inf, 0.5, -inf]))
        == [False, True, True]
    )
    assert exits([[0.1, 0.1, 0.1]]) == exits(np.float32(0.1)) == [True] * 3

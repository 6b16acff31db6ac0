"A system on Ray, one process per student: the same answers as the table and the simulator, and what happens when processes die."

import builtins
import itertools
import math
import threading
import time
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.distree.students import DistrEE, make_answers, student_net, system_answers
from darkdistill_nb.distree.actors import (
    RaySystem,
    Seen,
    Student,
    _begin,
    live_policy,
    plot_requests,
    ray_cluster,
)
from darkdistill_nb.distree.devices import Cluster, Policy, fixed_policy, joint_policy, local_policy
from darkdistill_nb.distree.simulator import Outcomes, simulate_devices
from darkdistill_nb.distree.policies import (
    FeatureDifference,
    NeighbourSimilarity,
    PartialLogits,
    ProxyHead,
)

N, E, K, S, LONG = 2, 3, 10, 24, 60.0  # LONG: a deadline that no machine misses


@pytest.fixture(scope="module")
def world():
    "An untrained system of two students with three exits, and the table of its answers to 24 images."
    torch.manual_seed(0)
    system = DistrEE(
        [student_net("wrn", (1, 8, 8), K, m, depth=10, widen=1, exits=(1, 2, 3)) for m in (6, 7)],
        [6, 7],
        K,
    ).eval()
    with torch.no_grad():
        system.joint.weight *= 8
    data = ArrayData(torch.rand(S, 1, 8, 8), torch.randint(K, (S,)))
    table = system_answers(system, data)
    return SimpleNamespace(
        system=system, x=data[:][0], y=data.y, table=table, mean=table.means() + 0.5
    )


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray")
    with ray_cluster(num_cpus=2) as r:
        yield r


@pytest.fixture(scope="module")
def live(world, ray):
    with RaySystem(world.system, deadline=LONG) as s:
        yield s


def simulated(world, policy, **kw):
    return simulate_devices(
        world.table,
        policy,
        Cluster.equal(N),
        np.arange(S) * 1e3,
        deadline=LONG,
        mean=world.mean,
        **kw,
    )


def says(world, o):
    "The table's answer, given which exits were used and who is missing."
    used = torch.tensor(o.exits.T)
    return (
        world.table.subset(torch.tensor(o.sample))
        .logits(used.clamp(min=0), used >= 0, world.mean)
        .numpy()
    )


def middle(scores):
    "A threshold half-way between two neighbouring scores in the middle, far from rounding."
    v = scores.flatten().unique()
    if len(v) < 3:
        return float(v.mean()) + (0.5 if len(v) == 1 else 0.0)
    k = len(v) // 2 - 1
    k += int(torch.diff(v[k:][:8]).argmax())
    return float((v[k] + v[k + 1]) / 2)


# ---------------------------------------------------------------- without Ray


def test_student_reports_rows_of_the_table(world):
    s = Student(
        1, world.system.students[1], world.system.joint.weight.detach()[:, 6:], fallback="every"
    )
    reports = s.serve()
    s.put(0, world.x[3].numpy())
    for e in range(E):
        key, exit, partial, final = next(reports)
        assert (key, exit, final) == (0, e, e == E - 1)
        np.testing.assert_allclose(partial, world.table.partial[1, e, 3].numpy(), atol=1e-4)


def test_student_obeys_words_and_deadlines(world):
    s = Student(
        0,
        world.system.students[0],
        world.system.joint.weight.detach()[:, :6],
        Policy(points=(0,), patience=30.0),
    )
    reports = s.serve()
    x = world.x[0].numpy()
    s.put(0, x, left=0.0)
    s.put(1, x)
    s.tell(1, math.inf)
    s.put(2, x)  # too old; stopped before it was begun; done
    assert next(reports)[:2] == (2, 0)
    start = time.monotonic()
    threading.Timer(0.2, s.tell, (2, 0)).start()
    assert next(reports)[:2] == (2, E - 1)
    assert time.monotonic() - start >= 0.15  # waited for GO
    s.put(3, x)
    assert next(reports)[:2] == (3, 0)
    threading.Timer(0.2, s.tell, (3, math.inf)).start()
    s.put(4, x)
    s.tell(4, 0)  # STOP while it waits
    assert [next(reports)[:2] for _ in range(2)] == [(4, 0), (4, E - 1)]
    s.tell(3, math.inf)
    s.put(5, x, left=1.5)
    next(reports)
    threading.Timer(1.6, s.put, (6, x)).start()
    assert (
        next(reports)[:2] == (6, 0) and s.signals == {}
    )  # nothing is kept about requests that are over


def test_student_goes_on_after_its_patience(world):
    s = Student(
        0,
        world.system.students[0],
        world.system.joint.weight.detach()[:, :6],
        Policy(points=(0, 1), patience=0.1),
    )
    reports = s.serve()
    s.put(0, world.x[0].numpy())
    start = time.monotonic()
    assert [next(reports)[1] for _ in range(3)] == [0, 1, 2] and time.monotonic() - start >= 0.19


def test_pretended_speed_is_a_least_time(world):
    s = Student(
        0,
        world.system.students[0],
        world.system.joint.weight.detach()[:, :6],
        speed=world.table.costs[0, -1].item() / 0.2,
    )
    reports = s.serve()
    s.put(0, world.x[0].numpy())
    start = time.monotonic()
    next(reports)
    assert time.monotonic() - start >= 0.199


RULES = {
    "margin": ProxyHead(),
    "patience": ProxyHead("patience"),
    "difference": FeatureDifference(),
    "similarity": NeighbourSimilarity(),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("each", [False, True], ids=["one threshold an exit", "one a student too"])
def test_live_rules_agree_with_their_table(rule, each):
    "Exit by exit, a student that sees only its past decides as the rule does on the whole (synthetic) table; shut exits stay shut."
    a = make_answers(2, 4, 60, seed=1)
    scores = rule.scores(a)
    T = [
        [9.0] + [middle(v) for v in s[1:-1]] + [-math.inf]
        for s in (scores if each else [scores.transpose(0, 1).flatten(1)])
    ]
    if not rule.needs_features:
        T[0][0] = middle(scores[0, 0])
    if rule.needs_features and not rule.strict:
        T[0][0] = -math.inf  # the first exit has no neighbour
    T = torch.tensor(T if each else T[0])
    policy, depth, got = live_policy(rule, 4, T), rule.depth(a, T), torch.zeros(2, 60).long()
    for n, i in itertools.product(range(2), range(60)):
        seen = Seen()
        for e in range(4):
            seen.features.append(a.features[n][e, i][None])
            seen.logits.append(a.proxy[n, e, i][None])
            got[n, i] = e
            if e == 3 or policy.leave(n, e, seen, None):
                break
    assert torch.equal(got, depth) and len(depth.unique()) > 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: live_policy("quorum", 3), "policy='Quorum' must be LastExit, PartialLogits"),
        (lambda: live_policy("random", 3), "policy='RandomExit'"),
        (lambda: live_policy("shared", 3), "policy='SharedScore'"),
        (lambda: live_policy("proxy", 3, [0.5]), "must be 3 thresholds"),
        (
            lambda: live_policy("proxy", 3).leave(
                0, 0, Seen(logits=[torch.zeros(1, 2)], features=[torch.zeros(1, 2)]), None
            ),
            "T=None",
        ),
        (lambda: [1][Seen()], "sample=None"),
        (lambda: ray_cluster(num_cpus=0).__enter__(), "num_cpus=0"),
        (lambda: ray_cluster(store=1).__enter__(), "store=1"),
        (lambda: ray_cluster(num_cpus=1.5).__enter__(), "num_cpus=1.5"),
        (lambda: live_policy("proxy", 0), "n_exits=0"),
        (lambda: Student(-1, None, None), "n=-1"),
        (lambda: RaySystem(3), "a trained DistrEE"),
        (lambda: plot_requests({}), "runs={}"),
    ],
)
def test_clear_errors(make, words):
    with pytest.raises(ValueError) as e:
        make()
    assert words in str(e.value)


@pytest.mark.parametrize(
    "use, words",
    [
        (dict(speed=math.nan), "speed=nan"),
        (dict(speed=0), "speed=0"),
        (dict(fallback="last"), "fallback='last'"),
        (dict(policy=3), "a Policy"),
    ],
)
def test_a_student_looks_at_its_settings(world, use, words):
    with pytest.raises(ValueError, match=words):
        Student(0, world.system.students[0], world.system.joint.weight.detach()[:, :6]).use(
            **{"policy": Policy(), **use}
        )
    with pytest.raises(ValueError, match="W.shape"):
        Student(0, world.system.students[0], world.system.joint.weight.detach()[:, :5])


def test_ray_missing_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"ray is not installed; `pip install darkdistill-nb\[distributed\]`"
    ):
        ray_cluster().__enter__()


# ---------------------------------------------------------------- where nothing fails


@pytest.mark.parametrize(
    "kind", ["last", "fixed", "fixed, every exit reported", "local", "cosine", "partial logits"]
)
def test_same_answers_as_the_simulator(world, live, kind):
    g, a, settings = torch.Generator().manual_seed(1), world.table, {}
    if kind == "last":
        real = sim = Policy()
    elif kind.startswith("fixed"):
        real = sim = fixed_policy(torch.randint(E, (N, S), generator=g))
        settings = dict(fallback="every") if "every" in kind else {}
    elif kind == "partial logits":
        rule = PartialLogits(points=(0, 1), speculative=False)
        T = middle(rule.scores(a)[0, :2])
        real = live_policy(rule, E, [T] * E, patience=LONG)
        sim = joint_policy((0, 1), T, patience=LONG)
    else:
        rule = ProxyHead() if kind == "local" else FeatureDifference()
        s = rule.scores(a)
        T = [
            middle(s[:, 0]) if kind == "local" else 2.0,
            middle(s[:, 1]),
            0.0,
        ]  # 1 / cos(F_1, F_1) is 1, but for rounding
        real, sim = live_policy(rule, E, T), local_policy(s, T)
    o = live.use(real, deadline=LONG, mean=world.mean, **settings).run(world.x, world.y)
    p = simulated(world, sim, **settings)
    np.testing.assert_array_equal(o.exits, p.exits)
    np.testing.assert_array_equal(o.prediction, p.prediction)
    np.testing.assert_array_equal(o.stopped, p.stopped)
    np.testing.assert_allclose(o.logits, p.logits, atol=1e-4)
    np.testing.assert_allclose(o.logits, a.logits(torch.tensor(o.exits.T)).numpy(), atol=1e-4)
    assert isinstance(o, Outcomes)
    assert not o.degraded.any()
    assert o.answered.all()
    assert (o.latency > 0).all()
    assert (o.y == world.y.numpy()).all()
    if kind != "last":
        assert len(np.unique(o.exits)) > 1
    if kind == "partial logits":
        assert 0 < o.stopped.mean() < 1


def test_many_requests_at_once(world, live):
    "Requests overlap; each gets its own answer, whatever the order in which they are asked for."
    live.use(deadline=LONG)
    keys = [live.submit(v) for v in world.x]
    for i in reversed(range(S)):
        np.testing.assert_allclose(
            live.answer(keys[i], LONG).logits, world.table.joint(E - 1)[i].numpy(), atol=1e-4
        )
    assert not live.futures
    o = live.run(world.x[:5], arrival=np.arange(5) * 0.01, sample=[4, 3, 2, 1, 0])
    assert (np.diff(o.arrival) >= 0).all()
    assert o.arrival[-1] >= 0.04
    assert o.sample.tolist() == [4, 3, 2, 1, 0]
    assert (o.y == -1).all()


def test_requests_carry_the_lambda_of_a_knob(world, live):
    class Falls:
        lam, log = 2.0, []

        def update(self, latency, gain=None):
            self.log.append((latency, gain))
            self.lam -= 1.0

    knob = Falls()
    live.use(live_policy("proxy", E), deadline=LONG, knob=knob)
    o = live.run(world.x[:3])
    assert o.lam.tolist() == [2.0, 1.0, 0.0] and o.exits.tolist() == [
        [2, 2],
        [2, 2],
        [0, 0],
    ]  # a margin is below 1 and above 0
    assert len(knob.log) == 3 and all(t > 0 and 0 < g <= 1 for t, g in knob.log)


def test_speculative_students_need_no_go(world, live):
    "Nobody waits, stop comes when all have reported; what is used is at least as deep as the decision."
    rule = PartialLogits(points=(0, 1))
    live.use(live_policy(rule, E, [0.0] * E), deadline=LONG, mean=world.mean)
    o = live.run(world.x[:6])
    assert o.stopped.all() and not o.degraded.any()
    np.testing.assert_allclose(o.logits, says(world, o), atol=1e-4)


def test_deadline_is_kept_when_students_are_slow(world, live):
    "At this speed even the first exit takes 4 s: the answer is given at the deadline, from what was reported."
    c = world.table.costs[0]
    live.use(deadline=1.0, mean=world.mean, fallback="every", speed=[None, float(c[0]) / 4])
    start = time.monotonic()
    key = live.submit(world.x[0])
    a = live.answer(key, LONG)
    assert 0.9 <= a.latency <= time.monotonic() - start and 1 in a.missing


def test_use_while_requests_are_open(world, live):
    live.use(deadline=LONG, speed=float(world.table.costs[0, -1]) / 0.5)
    key = live.submit(world.x[0])
    with pytest.raises(RuntimeError, match="1 requests are open"):
        live.use()
    with pytest.raises(TimeoutError, match=f"request {key} has no answer after 0.01 s"):
        live.answer(key, 0.01)
    assert not live.answer(key).degraded


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(deadline=0), "deadline, margin=(0.0, 0.01)"),
        (dict(deadline=0.01), "deadline, margin"),
        (dict(fallback="last"), "fallback='last'"),
        (dict(policy=Policy(points=(2,))), "points=(2,) must be exits before the last, 0..1"),
        (dict(mean=np.zeros((1, K))), "mean.shape=(1, 10)"),
        (dict(suspect=0), "suspect=0"),
        (dict(speed=0), "speed=0"),
        (dict(speed=[1.0]), "or 2 of them"),
        (dict(deadline=math.nan), "deadline=nan"),
        (dict(margin=-1), "deadline, margin"),
        (dict(speed=[1.0, math.inf]), "speed=inf"),
        (dict(policy="last"), "a Policy"),
        (dict(knob=3), "knob=3"),
        (dict(mean=np.full((N, K), math.nan)), "mean must be finite"),
        (dict(suspect=math.nan), "suspect=nan"),
    ],
)
def test_impossible_settings(live, settings, words):
    before = live.aggregator
    with pytest.raises(ValueError) as e:
        live.use(**settings)
    assert words in str(e.value) and live.aggregator is before


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: s.submit(torch.zeros(1, 4, 4)), "x.shape=(1, 4, 4) must be (1, 8, 8)"),
        (lambda s: s.answer(10**6), "key=1000000"),
        (lambda s: s.kill(2), "student=2 must be one that is alive, [0, 1]"),
        (lambda s: s.revive(0), "student=0 must be one that is dead, []"),
        (lambda s: s.run(torch.zeros(2, 1, 8, 8), arrival=[1.0, 0.0]), "2 rising times"),
        (lambda s: s.run(torch.zeros(0, 1, 8, 8)), "at least one"),
        (lambda s: s.submit(torch.full((1, 8, 8), math.nan)), "x must be finite"),
        (lambda s: s.submit(torch.zeros(1, 8, 8), sample=0.5), "sample=0.5"),
        (lambda s: s.run(torch.zeros(1, 1, 8, 8), arrival=[math.nan]), "1 rising times"),
        (lambda s: s.run(torch.zeros(2, 1, 8, 8), [1]), "2 labels"),
        (lambda s: s.wait_alive(math.nan), "timeout=nan"),
        (lambda s: s.kill(0.5), "student=0.5"),
    ],
)
def test_impossible_calls(live, call, words):
    with pytest.raises(ValueError) as e:
        call(live)
    assert words in str(e.value)


# ---------------------------------------------------------------- where something fails (the system of above is used up here)


def test_kill_while_requests_flow(world, live):
    "Every request is answered by its deadline; those that lack the dead student are flagged and hold its mean contribution."
    R, when = 40, 15
    live.use(deadline=1.0, mean=world.mean, fallback="every", suspect=3)
    i = np.arange(R) % S
    before = lambda r: live.kill(1) if r == when else None
    o = live.run(world.x[i], world.y[i], arrival=np.arange(R) * 0.02, sample=i, before=before)
    assert o.answered.all() and not live.alive[1] and live.alive[0]
    assert o.missing[when:, 1].all() and o.degraded[when:].all() and (o.exits[when:, 1] == -1).all()
    np.testing.assert_allclose(o.logits, says(world, o), atol=1e-4)
    assert (o.degraded == ((o.exits < 0).any(1) | o.late.any(1))).all()
    fig = plot_requests({"measured": o}, 1.0)
    assert sum(len(t.x) for t in fig.data) == R and len(fig.data[1].x) == o.missing.any(1).sum()


def test_without_a_failure_detector_every_request_waits_for_the_dead(world, live):
    if live.alive[1]:
        live.kill(1)
    o = live.use(deadline=0.3, mean=world.mean).run(world.x[:4], arrival=np.zeros(4))
    assert o.missing[:, 1].all() and o.latency.min() >= 0.28


def test_revived_student_rejoins(world, live, wait_until):
    if live.alive[1]:
        live.kill(1)
    live.use(deadline=2.0, mean=world.mean, suspect=1)
    o = live.run(world.x[:2])
    assert o.missing[:, 1].all() and live.aggregator.silent[1] >= 1
    with pytest.raises(TimeoutError, match="alive"):
        live.wait_alive(0.01)
    live.revive(1)
    live.wait_alive(LONG)
    assert [(what, n) for _, what, n in live.events] == [
        ("up", 0),
        ("up", 1),
        ("down", 1),
        ("up", 1),
    ]
    live.aggregator.deadline = LONG

    def its_first_word():  # until it is heard, it is not waited for
        return not live.answer(live.submit(world.x[0])).degraded

    wait_until(its_first_word)
    a = live.answer(live.submit(world.x[0]))
    np.testing.assert_allclose(a.logits, world.table.joint(E - 1)[0].numpy(), atol=1e-4)
    assert live.aggregator.silent[1] == 0
    assert not live.run(world.x[:5]).degraded.any()


def test_restart_by_itself(world, live):
    "With restart=True nobody has to call `revive`; the Ray that was there before is used."
    if not all(live.alive):
        live.revive(1)
    live.restart = True
    n = len(live.events)
    live.kill(1)
    live.wait_alive(LONG)
    live.restart = False
    assert [(what, k) for _, what, k in live.events[n:]] == [("down", 1), ("up", 1)]
    live.use(deadline=LONG)
    a = live.answer(live.submit(world.x[1]))
    assert not a.degraded and a.exits == [E - 1] * N


def test_an_error_in_a_policy_is_not_taken_for_a_dead_device_and_close_answers(
    world, live, ray, wait_until
):
    "The next request says what is wrong; closing answers what is open, flagged, and leaves a Ray that it did not start."

    def broken(n, e, seen, lam):
        return 1 / 0 if n == 0 else False

    live.use(Policy(leave=broken), deadline=LONG, mean=world.mean)
    key = live.submit(world.x[0])

    def an_error():
        return live.error is not None

    wait_until(an_error)
    with pytest.raises(RuntimeError, match="student 0 failed(.|\n)*division by zero"):
        live.submit(world.x[0])
    live.close()
    a = live.answer(key, LONG)
    assert 0 in a.missing and a.degraded and ray.is_initialized()
    live.error = None
    with pytest.raises(RuntimeError, match="the system is closed"):
        live.submit(world.x[0])


def test_ray_is_asked_again_where_it_gave_up_too_soon():
    "Its own limits in seconds are short on a busy machine; anything else is not tried twice."

    class Slow:
        def __init__(self, *answers):
            self.answers, self.asked, self.ended = list(answers), [], 0

        def init(self, address, **settings):
            self.asked.append((address, settings["num_cpus"]))
            if answer := self.answers.pop(0):
                raise answer

        def shutdown(self):
            self.ended += 1

    late = RuntimeError("The current node timed out during startup. This could happen")
    ray = Slow(late, late, None)
    _begin(ray, "local", num_cpus=2)
    assert ray.asked == [("local", 2)] * 3 and ray.ended == 2
    with pytest.raises(TimeoutError, match="Ray did not start in 3 tries: The current node"):
        _begin(Slow(late, late, late), "local", num_cpus=2)
    with pytest.raises(ValueError, match="no such address"):
        _begin(ray := Slow(ValueError("no such address")), "10.0.0.1:1", num_cpus=2)
    assert len(ray.asked) == 1

"""The smallest parts of students on devices: values by hand, limits, defaults, branches."""

import dataclasses, itertools, logging, math, sys, threading
from types import SimpleNamespace
import numpy as np, pytest, torch
from helpers import default, rng
from darkdistill_nb.core import ArrayData
from darkdistill_nb.distill import kd_loss
from darkdistill_nb.distree import (
    Aggregator,
    Answer,
    Cluster,
    Device,
    DistrEE,
    DistrEELoss,
    FeatureDifference,
    LastExit,
    Link,
    Outcomes,
    PartialLogits,
    Policy,
    ProxyHead,
    Quorum,
    RandomExit,
    RaySystem,
    SharedScore,
    Student,
    SystemAnswers,
    SystemPolicy,
    Teacher,
    arrivals,
    branch_weights,
    communities,
    confidence_of,
    control_system,
    decision_points,
    evaluate_system,
    filter_graph,
    joint_policy,
    lambda_grid,
    live_policy,
    mac_shares,
    make_answers,
    modularity,
    partition_filters,
    partition_report,
    ray_cluster,
    simulate_devices,
    strongest_links,
    student_net,
    system_answers,
    system_curve,
    system_losses,
    system_table,
    system_thresholds,
    train_distree,
    transfer_loss,
)
from darkdistill_nb.exits import cnn

pytestmark = pytest.mark.usefixtures("one_thread")
HOME, ACTORS, SIMULATOR = (
    sys.modules[f.__module__] for f in (partition_filters, RaySystem, simulate_devices)
)
SHAPE, K = (1, 4, 4), 3
inf, nan = math.inf, math.nan


DEFAULTS = {
    filter_graph: dict(top=50, scale=True),
    strongest_links: dict(keep=0.01),
    modularity: dict(resolution=1),
    communities: dict(resolution=1, seed=0),
    partition_filters: dict(cover=True, rule="balanced", resolution=None, seed=0),
    student_net: dict(relu=True),
    branch_weights: dict(kind="rising"),
    DistrEELoss: dict(w="rising", alpha=0.9, tau=4, beta=5, drop=0, local=True, generator=None),
    train_distree: dict(epochs=10, lr=0.03, batch_size=32, weight_decay=5e-4, amp=False),
    system_answers: dict(features=True, batch_size=256),
    make_answers: dict(n_students=2, n_exits=7, n=500, n_classes=10, seed=0, length=16),
    SystemPolicy.costs: dict(header=0),
    RandomExit: dict(shared=False, seed=0),
    PartialLogits: dict(points=None, rtt=0, speculative=True, score="confidence"),
    Quorum: dict(points=None, rtt=0, speculative=True, confident=False),
    SharedScore: dict(local=None, points=None, rtt=0, speculative=True),
    ProxyHead: dict(score="margin"),
    system_thresholds: dict(scheme="lagrange", measure="latency"),
    evaluate_system: dict(T=None, header=0),
    system_curve: dict(budgets=None, scheme="lagrange", measure="latency", header=0),
    system_table: dict(scheme="lagrange", measure="latency"),
    lambda_grid: dict(size=40),
    system_losses: dict(kind="consistency"),
    control_system: dict(delta=0.1, method="ltt", lams=None, kind="consistency", bound=1, seed=0),
    Device: dict(speed=1e8, jitter=0, active=4, idle=2, dies=inf, p_dead=0),
    Device.seconds: dict(z=0, now=0),
    Link: dict(bandwidth=1e6, latency=0.002, jitter=0, loss=0, retries=0, timeout=0.02, joule=1e-6),
    Link.fate: dict(u=1, x=0),
    Answer: dict(stopped=False),
    Aggregator.close: dict(stopped=False),
    Aggregator: dict(deadline=inf, mean=None, stop=None, points=(), need=None, suspect=inf),
    Policy: dict(leave=None, points=(), stop=None, speculative=False, patience=1, need=None),
    joint_policy: dict(threshold=None, score=confidence_of),
    simulate_devices: dict(
        sample=None,
        deadline=inf,
        fallback=None,
        margin=None,
        mean=None,
        suspect=inf,
        knob=None,
        payload="partial",
        header=8,
        seed=0,
        trace=False,
    ),
    arrivals: dict(seed=0, kind="poisson"),
    ray_cluster: dict(address=None, num_cpus=2, store=100),
    Student: dict(policy=None, fallback=None, speed=None),
    RaySystem: dict(policy=None, restart=False, options=None, address=None, num_cpus=2),
    RaySystem.use: dict(deadline=1, fallback=None, suspect=inf, knob=None, speed=None, margin=0.01),
    RaySystem.wait_alive: dict(timeout=60),
}


@pytest.mark.parametrize("f", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_as_documented(f):
    assert {k: default(f, k) for k in DEFAULTS[f]} == DEFAULTS[f]


# ---------------------------------------------------------------- graphs of filters


def test_the_graph_of_many_images_is_the_sum_of_theirs():
    "Also beyond the 64 images that are computed at a time."
    a = torch.rand(130, 6, generator=rng())
    W = filter_graph(a, top=4)
    assert torch.allclose(W, sum(filter_graph(row[None], top=4) for row in a))
    assert W.dtype is torch.float64 and torch.allclose(W, W.T) and not W.diagonal().any()


def test_a_link_by_hand_with_and_without_scaling():
    "a_i a_j |a_i - a_j|, of activities divided by the image's largest one."
    a = torch.tensor([[4.0, 2.0, 1.0]])
    assert filter_graph(a, 2)[0].tolist() == [0, 1 * 0.5 * 0.5, 0]
    assert filter_graph(a, 2, scale=False)[0].tolist() == [0, 4 * 2 * 2, 0]
    assert filter_graph(a, 3)[1, 2] == 0.5 * 0.25 * 0.25
    assert filter_graph(torch.zeros(2, 3)).tolist() == [[0] * 3] * 3
    with pytest.raises(ValueError, match="top=1"):
        filter_graph(a, 1)


def path(*weights):
    "A graph whose neighbours are linked with these weights."
    n = len(weights) + 1
    W = torch.zeros(n, n)
    for i, w in enumerate(weights):
        W[i, i + 1] = W[i + 1, i] = w
    return W


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_strong_links_are_scaled_and_keep_their_precision(dtype):
    S = strongest_links(path(1, 2, 4).to(dtype), 0.5)
    assert S.dtype is (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    assert S.max() == 1 and S[1, 2] == 0.5 and S[0, 1] == 0
    assert not strongest_links(torch.zeros(2, 2)).any()


@pytest.mark.parametrize(
    "W, words",
    [
        (torch.ones(2), "W.shape"),
        (torch.ones(0, 0), "W.shape"),
        (torch.ones(2, 3), "as many rows as columns"),
        (torch.ones(2, 2, dtype=torch.bool), "W.dtype"),
        (torch.ones(2, 2, dtype=torch.complex64), "W.dtype"),
        (torch.tensor([[0, -1.0], [-1.0, 0]]), "W.min"),
        (torch.tensor([[0, 1.0], [2.0, 0]]), "links have no direction"),
        (torch.zeros(2, 2), "at least one link"),
    ],
)
def test_what_is_no_graph_is_told_in_its_own_words(W, words):
    with pytest.raises(ValueError, match=words):
        modularity(W, [[0], [1]])


def test_links_have_a_direction_only_for_the_strongest():
    W = torch.tensor([[0, 1.0], [2.0, 0]])
    assert strongest_links(W, 1).tolist() == [[0, 0.5], [1, 0]]
    assert communities(torch.zeros(2, 2)) == [[0], [1]]
    with pytest.raises(ValueError, match="no direction"):
        communities(W)


def test_modularity_by_hand():
    "Two pairs with a weak bridge: 4 of 5 inside, chance (1/2)^2 each."
    W, groups = path(2, 1, 2), [[0, 1], [2, 3]]
    assert modularity(W, groups) == pytest.approx(0.8 - 0.5)
    assert modularity(W, groups, 2) == pytest.approx(0.8 - 1) and modularity(W, groups, 0) == 0.8
    assert modularity(W, [[0, 1, 2, 3]]) == pytest.approx(0)


@pytest.mark.parametrize(
    "groups",
    [[], [[]], [[0, 1], [2]], [[0, 1], [2, 4]], [[0, 1, 2, 3, -1]], [[0, 1], [1, 2, 3]], 3, [3]],
)
def test_what_is_no_division_of_the_nodes_is_refused(groups):
    with pytest.raises(ValueError, match="groups"):
        modularity(path(1, 1, 1), groups)


# ---------------------------------------------------------------- division among students


def cliques(*sizes, weight=1.0):
    return torch.block_diag(*[weight * (torch.ones(n, n) - torch.eye(n)) for n in sizes])


def test_resolutions_are_tried_upwards_until_there_are_groups_enough(monkeypatch):
    seen, found = [], [[[0, 1, 2, 3]]] * 6

    def look(G, resolution, seed):
        seen.append((resolution, seed))
        return found[len(seen) - 1]

    monkeypatch.setattr(HOME, "communities", look)
    partition_filters(cliques(4), torch.ones(4), 2, seed=7)
    assert seen == [(r, 7) for r in (1.0, 1.2, 1.5, 2.0, 3.0, 5.0)]
    seen.clear()
    found[2] = [[0, 1], [2, 3]]
    assert partition_filters(cliques(4), torch.ones(4), 2) == [[0, 1], [2, 3]] and len(seen) == 3
    seen.clear()
    partition_filters(cliques(4), torch.ones(4), 2, resolution=0.3)
    assert seen == [(0.3, 0)]


def test_filters_with_weak_links_are_handed_out_last_or_not_at_all():
    "Weak: below a twentieth of the strongest filter's links."
    W = torch.block_diag(cliques(2, 2), cliques(2, weight=0.05), cliques(2, weight=0.049))
    I = torch.tensor([4.0, 4, 4, 4, 4, 4, 1, 1])
    assert sorted(sum(partition_filters(W, I, 2, cover=False), [])) == [0, 1, 2, 3, 4, 5]
    assert sorted(sum(partition_filters(W, I, 2), [])) == list(range(8))


@pytest.mark.parametrize("n, used", [(2, 2), (3, 4)])
def test_as_many_strong_filters_as_students_are_enough(n, used):
    "With fewer, all filters count as strong."
    W = torch.block_diag(cliques(2), cliques(2, weight=0.01))
    assert len(sum(partition_filters(W, torch.ones(4), n, cover=False), [])) == used


@pytest.mark.parametrize("heavy, whole", [(5.0, True), (5.2, False)])
def test_groups_are_split_where_a_student_has_more_than_a_quarter_too_much(heavy, whole):
    "Groups of importance 5 and 3: the heavier is 5/4 of the mean, which is still allowed."
    I = torch.tensor([heavy / 2, heavy / 2, 1.5, 1.5])
    found = sorted(partition_filters(cliques(2, 2), I, 2))
    assert (found == [[0, 1], [2, 3]]) is whole and len(found[0]) == len(found[1]) == 2


def test_the_heaviest_group_is_halved_alternately_by_importance():
    I = torch.tensor([4.0, 3, 2, 1, 1, 1])
    found = partition_filters(cliques(4, 2), I, 2)
    assert found == [[0, 2], [1, 3, 4, 5]]


@pytest.mark.parametrize("I, ok", [([0, 0.5], True), ([0, 0], False), ([-0.1, 1], False)])
def test_some_filters_may_have_no_importance_but_not_all(I, ok):
    if ok:
        assert partition_filters(cliques(2), torch.tensor(I), 1) == [[0, 1]]
        return
    with pytest.raises(ValueError, match="importance=.* must be nowhere negative"):
        partition_filters(cliques(2), torch.tensor(I), 1)


@pytest.mark.parametrize("keep", [0, 1.001])
def test_a_share_of_links_is_above_0_and_at_most_1(keep):
    with pytest.raises(ValueError, match="keep="):
        strongest_links(path(1, 2), keep)


def test_a_single_student_gets_everything_and_as_many_as_filters_get_one_each():
    W, I = cliques(3, 2), torch.arange(1.0, 6)
    assert partition_filters(W, I, 1) == [[0, 1, 2, 3, 4]]
    assert sorted(partition_filters(W, I, 5)) == [[i] for i in range(5)]
    with pytest.raises(ValueError, match="n_parts=6"):
        partition_filters(W, I, 6)


def test_the_authors_rule_by_hand():
    "Without the largest group; filters without links are one; the rest goes to the smallest part."
    W = torch.block_diag(cliques(5, 4, 3), torch.zeros(2, 2), cliques(2))
    authors = lambda n: partition_filters(W, torch.ones(16), n, rule="authors")
    assert authors(4) == [[5, 6, 7, 8], [9, 10, 11], [14, 15], [12, 13]]
    assert authors(2) == [[5, 6, 7, 8, 12, 13], [9, 10, 11, 14, 15]]
    with pytest.raises(ValueError, match="n_parts=5: the strong links form only 4 groups"):
        authors(5)


def test_a_report_by_hand():
    W, I = path(2, 1, 2, 1), torch.tensor([1.0, 1, 2, 2, 3])
    report = partition_report([[2, 3], [0, 1]], W, I)
    assert report == dict(sizes=[2, 2], importance=[0.4444, 0.2222], left_out=1, Q=0.3)
    assert partition_report([[0, 1], [2, 3, 4]], W, I)["left_out"] == 0


# ---------------------------------------------------------------- networks and losses


def test_a_student_has_a_linear_layer_more_and_a_relu_unless_told_otherwise():
    names = lambda **kw: [
        type(m).__name__ for m in student_net("cnn", SHAPE, K, 5, stages=2, **kw).exits[0].reduce
    ][1:]
    assert names() == ["Linear", "ReLU"] and names(relu=False) == ["Linear"]
    net = student_net("cnn", SHAPE, K, 5, stages=2)
    assert [e.reduce[1].out_features for e in net.exits] == [5, 5] and net.n_classes == K
    one = student_net("wrn", (1, 8, 8), K, 1, depth=10, widen=1, exits=(0, 3))
    assert len(one) == 2


def make(sizes=(2, 3), stages=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nets = [student_net("cnn", SHAPE, K, m, stages=stages, width=4) for m in sizes]
        return DistrEE(nets, sizes, K)


def test_the_joint_classifier_reads_each_student_s_slice():
    system = make((2, 3, 1))
    F = [torch.randn(5, m, generator=rng(m)) for m in (2, 3, 1)]
    W = system.joint.weight
    for n, (a, b) in enumerate([(0, 2), (2, 5), (5, 6)]):
        assert torch.allclose(system.partial(n, F[n]), F[n] @ W[:, a:b].T)
    assert torch.allclose(system.logits(F), system.joint(torch.cat(F, 1)), atol=1e-6)
    assert (len(system), system.n_exits, system.n_classes, system.joint.in_features) == (3, 2, K, 6)


def test_students_and_sizes_belong_together():
    one, other = make((2,)).students[0], make((2,), stages=3).students[0]
    for students, sizes in [([one, other], [2, 2]), ([one], [2, 2]), ([one, one], [2])]:
        with pytest.raises(ValueError, match="one size a student, and equally many exits"):
            DistrEE(students, sizes, K)
    with pytest.raises(ValueError, match="lengths of the students' features"):
        DistrEE([one], [3], K)


def test_students_are_early_exit_networks():
    with pytest.raises(ValueError, match=r"students=\['Linear'\] must be EarlyExitNets"):
        DistrEE([torch.nn.Linear(2, 2)], [2], K)


def test_a_teacher_is_the_last_exit_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = cnn(SHAPE, K, stages=3, width=4).eval()
    x = torch.rand(2, *SHAPE, generator=rng())
    assert torch.equal(Teacher(net)(x), net(x)[-1])


def test_transfer_by_hand():
    "Features of length 1: the same direction costs nothing, a right angle 2, the opposite 4."
    t = torch.tensor([[1.0, 0], [0, 2]])
    assert float(transfer_loss(3 * t, t)) == 0 and float(transfer_loss(-t, t)) == 4
    s = torch.stack([t, -t, torch.tensor([[0, 1.0], [0, 1]])])
    assert transfer_loss(s, t).tolist() == [0, 4, 1]
    for bad in (t[0], t[:1], torch.ones(2, 3)):
        with pytest.raises(ValueError, match="student.shape"):
            transfer_loss(bad, t)
    with pytest.raises(ValueError, match="student.shape"):
        transfer_loss(t[0], t[0])


def test_weights_of_the_exits_by_hand():
    known = [0.5, 0.75, 1, 1.25, 1.25, 1, 1.5]
    assert branch_weights(7).tolist() == pytest.approx([7 / 7.25 * v for v in known])
    assert branch_weights(2).tolist() == pytest.approx([0.5, 1.5])
    assert branch_weights(3).tolist() == pytest.approx([3 * v / 3.25 for v in (0.5, 1.25, 1.5)])
    assert branch_weights(1).tolist() == [1] and branch_weights(2, "uniform").tolist() == [1, 1]
    assert branch_weights(3, "last").tolist() == [0, 0, 3]


def a_loss(system, **kw):
    parts, at = [], 0
    for m in system.sizes:
        parts.append(list(range(at, at + m)))
        at += m
    return DistrEELoss(system, parts, **kw)


def a_batch(system, B=6, seed=0):
    "Features of the students, the teacher's answers and labels."
    F = [torch.randn(system.n_exits, B, m, generator=rng(m)).relu() for m in system.sizes]
    t = dict(
        logits=torch.randn(B, K, generator=rng(9)),
        features=torch.rand(B, sum(system.sizes), generator=rng(8)),
    )
    return F, t, torch.arange(B) % K


def test_students_are_missing_as_often_as_told_but_never_all():
    loss = a_loss(make(), drop=0.5, generator=rng())
    gone = loss.missing(2, 20_000)
    assert not gone.all(0).any()
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.01)  # half of those not spared
    assert not a_loss(make(), drop=0.0).missing(2, 500).any()
    assert a_loss(make(), drop=0.999, generator=rng()).missing(3, 500).sum(0).float().mean() > 1.9


@pytest.mark.parametrize("name, low, high", [("alpha", 0, 1), ("drop", 0, 0.999), ("beta", 0, 1e9)])
def test_limits_belong_to_what_is_allowed(name, low, high):
    system = make()
    for v in (low, high):
        assert getattr(a_loss(system, **{name: v}), name) == v
    for v in (-0.001, *([1.001] if high < 2 else [])):
        with pytest.raises(ValueError, match=f"{name}="):
            a_loss(system, **{name: v})
    with pytest.raises(ValueError, match="drop=1"):
        a_loss(system, drop=1)


@pytest.mark.parametrize("alpha", [0, 0.25, 1])
def test_the_share_of_the_teacher_by_hand(alpha):
    loss, (_, t, y) = a_loss(make(), alpha=alpha, tau=2), a_batch(make())
    z = torch.randn(6, K, generator=rng())
    ce = torch.nn.functional.cross_entropy(z, y)
    want = (1 - alpha) * ce + alpha * kd_loss(z, t["logits"], 2.0)
    assert torch.allclose(loss.kd(z, t["logits"], y), want)


@pytest.mark.parametrize("w", [[1.0, 0], [0, 1.0], [0.5, 2.0]])
def test_the_loss_is_a_weighted_sum_over_the_exits(w):
    "Of the joint answers, and of the transfer of each student's filters."
    system = make()
    F, t, y = a_batch(system)
    loss, want = a_loss(system, w=w, beta=3.0, local=False), 0
    for e, weight in enumerate(w):
        z = system.logits([f[e] for f in F])
        transfer = sum(transfer_loss(f[e], t["features"][:, p]) for f, p in zip(F, loss.parts))
        want = want + weight * (loss.kd(z, t["logits"], y) + 3 * transfer)
    assert float(loss(F, t, y).detach()) == pytest.approx(float(want.detach()), rel=1e-5)


def test_local_heads_learn_from_features_that_stay_as_they_are():
    "Each student's heads add their mean loss; no gradient reaches the features."
    system = make()
    F, t, y = a_batch(system)
    F = [f.requires_grad_() for f in F]
    both = [a_loss(system, local=v, beta=1.0)(F, t, y) for v in (True, False)]
    heads = sum(
        sum(a_loss(system).kd(v, t["logits"], y) for v in s.classify(list(f))) / 2
        for s, f in zip(system.students, F)
    )
    assert float((both[0] - both[1]).detach()) == pytest.approx(float(heads.detach()), rel=1e-4)
    grads = [torch.autograd.grad(v, F, retain_graph=True) for v in both]
    assert all(torch.allclose(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda F, t, y: (F[:1], t, y), "the features' shapes"),
        (lambda F, t, y: ([f[:1] for f in F], t, y), "the features' shapes"),
        (lambda F, t, y: (F, t | dict(logits=t["logits"][:, :2]), y), "t.'logits'..shape"),
        (lambda F, t, y: (F, t | dict(features=t["features"][:, :4]), y), "at least 5 of them"),
        (lambda F, t, y: (F, t | dict(features=t["features"][:5]), y), "t.'features'..shape"),
        (lambda F, t, y: (F, t | dict(features=t["features"][0]), y), "t.'features'..shape"),
    ],
)
def test_a_batch_that_does_not_belong_together_is_refused(change, words):
    system = make()
    with pytest.raises(ValueError, match=words):
        a_loss(system)(*change(*a_batch(system)))


def test_filters_beyond_those_named_may_exist():
    system = make()
    F, t, y = a_batch(system)
    more = t | dict(features=torch.cat([t["features"], torch.ones(6, 2)], 1))
    assert torch.equal(a_loss(system)(F, t, y), a_loss(system)(F, more, y))


@pytest.mark.parametrize("w", [[1.0], [1.0, 1, 1], [-1.0, 2], [0.0, 0]])
def test_there_is_one_weight_for_each_exit(w):
    with pytest.raises(ValueError, match="w has|w=|'w'|somewhere above 0"):
        a_loss(make(), w=w)
    assert a_loss(make(), w=[0.0, 0.1]).w.tolist() == pytest.approx([0, 0.1])


# ---------------------------------------------------------------- training


def lesson(n=10, sizes=(2, 3)):
    "A system, images and the teacher's table."
    x = torch.rand(n, *SHAPE, generator=rng(1))
    table = dict(
        logits=torch.randn(1, n, K, generator=rng(2)),
        features=torch.rand(1, n, sum(sizes), generator=rng(3)),
    )
    return make(sizes), ArrayData(x, torch.arange(n) % K), table


class Spy(torch.optim.SGD):
    "SGD that notes the learning rate of each step."

    def __init__(self, p, rates):
        super().__init__(p, lr=1.0)
        self.rates = rates

    def step(self):
        self.rates.append(self.param_groups[0]["lr"])
        super().step()


def test_the_learning_rate_falls_along_half_a_cosine():
    "Ten images in batches of four are three steps; two epochs are six."
    system, data, table = lesson()
    rates = []
    rows = train_distree(
        system, a_loss(system), data, table, 2, 0.08, 4, optimizer=lambda p: Spy(p, rates)
    )
    want = [0.04 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx(want) and [r["epoch"] for r in rows] == [0, 1]
    assert all(0 <= r["seconds"] < 60 for r in rows)


def weights(system):
    return {k: v.detach().clone() for k, v in system.state_dict().items()}


def test_the_default_optimizer_is_sgd_with_momentum_point_9():
    def trained(**kw):
        system, data, table = lesson()
        train_distree(system, a_loss(system), data, table, 2, 0.05, 4, weight_decay=0.1, **kw)
        return weights(system)

    sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)
    a, b = trained(), trained(optimizer=sgd)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_loss_of_an_epoch_is_its_mean_over_images():
    "With a rate of 0 the weights stay, so that it can be looked up; four images count twice two."
    system, data, table = lesson(n=6)
    for m in system.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    loss = a_loss(system)
    rows = train_distree(system, loss, data, table, 1, 0.0, 4)
    with torch.no_grad():
        parts = [
            len(data.y[i])
            * loss(system(data[i][0]), {k: v[0, i] for k, v in table.items()}, data.y[i])
            for i in (slice(0, 4), slice(4, 6))
        ]
    assert rows[0]["loss"] == pytest.approx(float(sum(parts)) / 6, rel=1e-4)


def test_no_epochs_change_nothing_and_hooks_are_called_after_each():
    system, data, table = lesson()
    before = weights(system)
    assert train_distree(system, a_loss(system), data, table, 0) == []
    assert all(torch.equal(v, before[k]) for k, v in weights(system).items())
    seen = []
    rows = train_distree(
        system, a_loss(system), data, table, 2, on_epoch=lambda r, s: seen.append((r, s))
    )
    assert [r for r, _ in seen] == rows and all(s is system for _, s in seen)


def test_a_loss_that_is_not_finite_ends_the_training():
    system, data, table = lesson()
    with pytest.raises(FloatingPointError, match="the loss is .*; lower lr=1e\\+20 or beta=5"):
        train_distree(system, a_loss(system), data, table, 5, 1e20, 2)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | dict(logits=t["logits"][:, :9]), "the teacher's logits have shape"),
        (lambda t: t | dict(features=t["features"].repeat(2, 1, 1)), "the teacher's features have"),
        (lambda t: t | dict(features=t["features"] / 0), "table.'features'. must be finite"),
        (lambda t: t | dict(logits=t["logits"] * nan), "table.'logits'. must be finite"),
        (lambda t: dict(features=t["features"]), "a table with 'logits' and 'features'"),
    ],
)
def test_a_table_of_other_images_is_refused(change, words):
    system, data, table = lesson()
    with pytest.raises(ValueError, match=words):
        train_distree(system, a_loss(system), data, change(table), 1)


def test_what_is_of_another_kind_is_named_in_one_sentence():
    system, data, table = lesson()
    loss = a_loss(system)
    for args, words in [
        ((system.students[0], loss, data, table), "system='EarlyExitNet' must be a DistrEE"),
        ((system, a_loss(make()), data, table), "a DistrEELoss of this system"),
        ((system, loss.kd, data, table), "loss='method' must be"),
        ((system, loss, data.x, table), "data='Tensor' must be an ArrayData, or Views"),
    ]:
        with pytest.raises(ValueError, match=words):
            train_distree(*args)
    with pytest.raises(ValueError, match="system='EarlyExitNet' must be a DistrEE"):
        system_answers(system.students[0], data)
    for bad in (data.x, data.subset(slice(0))):
        with pytest.raises(ValueError, match="must be an ArrayData with samples"):
            system_answers(system, bad)


def test_labels_and_weights_that_cannot_be_trained_are_refused():
    system, data, table = lesson()
    other = ArrayData(data.x, data.y + 1)
    with pytest.raises(ValueError, match="data.y=.1, 3. must be labels from 0 to 2"):
        train_distree(system, a_loss(system), other, table, 1)
    with pytest.raises(ValueError, match="weights to train"):
        train_distree(system.requires_grad_(False), a_loss(system), data, table, 1)


# ---------------------------------------------------------------- answers


def test_answers_of_a_system_by_hand():
    "In batches of any size; the mode of the system comes back."
    system, data, _ = lesson()
    system.train()
    a = system_answers(system, data, batch_size=4)
    assert system.training and a.sizes == [2, 3] and torch.equal(a.y, data.y)
    system.eval()
    with torch.no_grad():
        F = system(data[:][0])
        for n, f in enumerate(F):
            assert torch.allclose(a.partial[n], system.partial(n, f), atol=1e-6)
            assert torch.allclose(a.features[n], f, atol=1e-6)
            local = torch.stack(system.students[n].classify(list(f)))
            assert torch.allclose(a.proxy[n], local, atol=1e-6)
        assert torch.allclose(a.joint(1), system.logits([f[1] for f in F]), atol=1e-6)
    assert a.costs.tolist() == [s.macs() for s in system.students]
    assert system_answers(system, data, features=False).features is None


def by_hand(**change):
    "Two students, two exits, three images, two classes."
    got = dict(
        partial=torch.arange(24.0).view(2, 2, 3, 2),
        bias=torch.tensor([0.5, -0.5]),
        proxy=torch.zeros(2, 2, 3, 2),
        y=torch.tensor([0, 1, 0]),
        costs=torch.tensor([[1.0, 2], [0, 3]]),
        sizes=[1, 2],
        features=[torch.zeros(2, 3, 1), torch.zeros(2, 3, 2)],
    )
    return SystemAnswers(**(got | change))


def test_joint_answers_by_hand():
    a, p = by_hand(), torch.arange(24.0).view(2, 2, 3, 2)
    assert torch.equal(a.joint(0), p[0, 0] + p[1, 0] + a.bias)
    assert torch.equal(a.means(), p[:, 1].mean(1))
    assert (len(a), a.n_students, a.n_exits) == (3, 2, 2)
    depth = torch.tensor([[0, 1, 1], [1, 0, 1]])
    own = torch.stack([p[n, depth[n], torch.arange(3)] for n in (0, 1)])
    assert torch.equal(a.logits(depth), own.sum(0) + a.bias)
    here = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(a.logits(depth, here), (own * here[..., None]).sum(0) + a.bias)
    filled = torch.where(here[..., None], own, a.means()[:, None])
    assert torch.equal(a.logits(depth, here, a.means()), filled.sum(0) + a.bias)
    few = a.subset(torch.tensor([2, 0]))
    assert torch.equal(few.partial, p[:, :, [2, 0]]) and few.y.tolist() == [0, 0] and len(few) == 2
    assert [f.shape[1] for f in few.features] == [2, 2] and by_hand(features=None).subset(
        [0]
    ).y == 0


@pytest.mark.parametrize(
    "depth",
    [
        [[0, 1, 2], [0, 0, 0]],
        [[0, -1, 0], [0, 0, 0]],
        [[0, 1, 1]],
        [[0.0] * 3] * 2,
        [[True] * 3] * 2,
    ],
)
def test_exits_that_do_not_exist_have_no_answers(depth):
    with pytest.raises(ValueError, match="depth must have shape .* with exits 0..1"):
        by_hand().logits(torch.tensor(depth))


def test_who_is_present_and_what_stands_in_must_fit():
    a, depth, here = by_hand(), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3).bool()
    for present, mean, words in [
        (here[:, :2], None, "present"),
        (here.int(), None, "present"),
        (here, torch.zeros(2), "mean.shape"),
        (here, torch.full((2, 2), nan), "mean must be finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            a.logits(depth, present, mean)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(partial=torch.zeros(2, 2, 3)), "partial"),
        (dict(partial=[[1]]), "partial"),
        (dict(partial=torch.zeros(2, 0, 3, 2)), "partial.shape"),
        (dict(bias=torch.zeros(3)), "bias.shape"),
        (dict(proxy=torch.zeros(2, 2, 3, 3)), "proxy.shape"),
        (dict(y=torch.zeros(2)), "y.shape"),
        (dict(sizes=[1]), "len.sizes."),
        (dict(sizes=[1, 0]), "a size"),
        (dict(costs=torch.tensor([[2.0, 1], [0, 3]])), "costs"),
        (dict(costs=torch.tensor([[-1.0, 1], [0, 3]])), "costs"),
        (dict(costs=torch.tensor([[0.0, 0], [0, 3]])), "costs"),
        (dict(costs=torch.tensor([[1.0], [3]])), "costs.shape"),
        (dict(features=[torch.zeros(2, 3, 1)] * 2), "features' shapes"),
        (dict(features=[torch.zeros(2, 3, 1), torch.full((2, 3, 2), inf)]), "features must be"),
    ],
)
def test_a_table_of_answers_that_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        by_hand(**change)


def test_costs_may_stand_still_and_parts_may_be_missing():
    assert by_hand(costs=torch.tensor([[1.0, 1], [0, 3]])).costs[0].tolist() == [1, 1]
    assert by_hand(costs=None, features=None, proxy=None).costs is None
    none = by_hand().subset(torch.zeros(0, dtype=torch.int64))
    assert len(none) == 0 and dataclasses.replace(none, sizes=[1, 2]).n_exits == 2


def test_the_synthetic_table_is_the_same_for_everybody():
    "No constant that it is made with may change."
    a = make_answers(2, 3, 50, 4, seed=5, length=3)
    w = lambda v: float((v.double().flatten() * torch.cos(torch.arange(v.numel()))).sum())
    found = [w(v) for v in (a.partial, a.proxy, *a.features)]
    assert found == pytest.approx([-24.932, -36.678, -3.332, 3.665], abs=2e-3)
    assert a.costs.tolist() == [pytest.approx([0.9e7, 1.8e7, 2.7e7])] * 2
    assert a.sizes == [3, 3] and not a.bias.any()


def test_without_a_generator_images_come_in_their_order(monkeypatch):
    seen = []
    monkeypatch.setattr(HOME, "_pass", lambda *a: seen.append(torch.cat(a[7]).tolist()) or 0.0)
    views = type("Twelve", (), dict(n=1, __len__=lambda self: 12))()
    for g in (None, torch.Generator().manual_seed(0)):
        HOME._epoch(0, 1, 0.1, None, None, views, None, None, 5, g, False)
    assert seen[0] == list(range(12)) and seen[1] != seen[0] and sorted(seen[1]) == seen[0]


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("scheme", ["lagrange", "msdnet", "path"])
def test_a_policy_of_one_cost_has_one_row_of_thresholds(scheme):
    T = system_thresholds("last", make_answers(2, 3, 20), 1.0, scheme)
    assert T == [inf, inf, -inf]


@pytest.mark.parametrize(
    "n_exits, points", [(1, ()), (2, (0,)), (3, (0, 1)), (4, (1, 2)), (7, (2, 4, 5))]
)
def test_points_of_decision_by_hand(n_exits, points):
    "Exits 3, 5 and 6 of seven, never the last."
    assert decision_points(n_exits) == points == PartialLogits().at(n_exits)


@pytest.mark.parametrize("points, ok", [((0, 1), True), ((), True), ((2,), False), ((1, 0), False)])
def test_points_rise_and_come_before_the_last_exit(points, ok):
    rule = Quorum(points=points)
    if ok:
        assert rule.at(3) == points
        return
    with pytest.raises(ValueError, match=r"must rise and lie in 0..1, the exits before the last"):
        rule.at(3)


def test_thresholds_of_the_paper_and_their_path_by_hand():
    "1 at the first exit, then 1.08, 1.12, ...; lambda scales what is above 1."
    rule = FeatureDifference()
    assert [rule.default(E) for E in (1, 2, 4)] == [[1], [1, 1.08], [1, 1.08, 1.12, 1.16]]
    assert rule.path(2.0, 4) == pytest.approx([1, 1.16, 1.24, -inf]) and rule.path(2.0, 1) == [-inf]
    s = torch.tensor([[[3.0], [1.16], [1.24], [1.16]]]).double()
    assert rule.levels(s)[0, 1:, 0].tolist() == pytest.approx([2, 2, 1])
    plain = ProxyHead()
    assert plain.path(0.3, 3) == [0.3, 0.3, -inf] and plain.levels(s) is s


def test_random_exits_are_equally_likely_by_their_own_thresholds():
    assert RandomExit().default(3) == pytest.approx([2 / 3, 1 / 2, 0])
    a = make_answers(2, 3, 50)
    own, shared = RandomExit().scores(a), RandomExit(shared=True).scores(a)
    assert (
        own.shape == (2, 3, 50)
        and shared.shape == (1, 3, 50)
        and LastExit().default(2) == [inf] * 2
    )
    assert not torch.equal(own, RandomExit(seed=1).scores(a))


@pytest.mark.parametrize(
    "costs, words",
    [
        ([[1.0, 2], [0, 0]], "above 0 at the last exit"),
        ([[1.0, 2], [-1, 2]], "at least 0"),
        ([[1.0, 2]], "must be .students, exits. and depth"),
        ([1.0, 2], "must be .students, exits. and depth"),
    ],
)
def test_shares_of_a_full_pass_by_hand(costs, words):
    "Latency is the largest, energy the sum, over a full pass of all."
    latency, energy = mac_shares([[1.0, 2], [0, 6]], [[0, 1], [1, 0]])
    assert latency.tolist() == [1, 2 / 6] and energy.tolist() == [7 / 8, 2 / 8]
    with pytest.raises(ValueError, match=words):
        mac_shares(costs, [[0], [0]])
    for depth, words in [([[2], [0]], "0..1, the exits"), ([[-1], [0]], "0..1, the exits")]:
        with pytest.raises(ValueError, match=words):
            mac_shares([[1.0, 2]] * 2, depth)
    with pytest.raises(ValueError, match="depth.dtype"):
        mac_shares([[1.0, 2]] * 2, [[0.0], [1.0]])


def test_heads_of_a_message_count_for_every_message():
    "Two students send 3 features of 4 bytes each, or at most K logits."
    a = make_answers(2, 3, 5, n_classes=2, length=3)
    depth = torch.zeros(2, 5, dtype=torch.int64)
    cost = lambda rule, **kw: rule.costs(a, depth, **kw)["bytes"].tolist()
    assert cost(FeatureDifference()) == [24] * 5 and cost(ProxyHead()) == [16] * 5
    assert cost(FeatureDifference(), header=10) == [44] * 5


def test_a_grid_of_lambdas_spreads_over_the_scores_and_falls():
    a = make_answers(2, 3, 30)
    v = ProxyHead().scores(a)[:, :-1].flatten().numpy()
    want = np.quantile(v, [1, 0.5, 0])
    assert lambda_grid("proxy", a, 3).tolist() == pytest.approx(want.tolist())
    with pytest.raises(ValueError, match="LastExit has no scores on these answers"):
        lambda_grid("last", a)


# ---------------------------------------------------------------- the simulator


def test_arrivals_evenly_spaced_by_hand():
    assert arrivals(3, 2.0, kind="fixed").tolist() == [0.5, 1, 1.5]
    assert arrivals(2, [1.0, 4.0], kind="fixed").tolist() == [1, 1.25]
    same, other = arrivals(5, 1.0), arrivals(5, 1.0, seed=1)
    assert (arrivals(5, 2.0) * 2).tolist() == pytest.approx(same.tolist()) != other.tolist()
    for rate in (0.0, [1.0, 2.0], [[1.0]], -1):
        with pytest.raises(ValueError, match="rate"):
            arrivals(3, rate)


def test_a_margin_is_twice_the_mean_time_of_the_slowest_message():
    links = [Link(bandwidth=10.0, latency=1.0, jitter=0.5), Link(bandwidth=10.0, latency=2.0)]
    margin = lambda m, sizes, deadline: SIMULATOR._margin(m, links, sizes, deadline)
    assert margin(None, [20, 1], inf) == 7 and margin(None, [1, 20], inf) == 8
    assert margin(0, [1, 1], 1.0) == 0 and margin(0.9, [1, 1], 1.0) == 0.9
    for m in (1.0, None):
        with pytest.raises(ValueError, match="at least 0 and below the deadline, 1.0 s"):
            margin(m, [1, 1], 1.0)


def a_worker():
    "A device at work of which nothing is known, and the words that reached it."
    told, worker = [], SIMULATOR._Worker(*[None] * 10)
    worker.process = SimpleNamespace(interrupt=told.append)
    return worker, told


@pytest.mark.parametrize(
    "asking, heard",
    [(None, False), ((4, 1), True), ((4, 0), True), ((4, 2), False), ((3, 1), False)],
)
def test_go_is_heard_by_who_waits_for_it_or_for_an_earlier_exit(asking, heard):
    worker, told = a_worker()
    worker.asking = asking
    worker.go(4, 1)
    assert told == ["GO"] * heard


@pytest.mark.parametrize("current", [4, 5, None])
def test_stop_ends_the_work_on_its_request_alone(current):
    worker, told = a_worker()
    worker.current = current
    worker.stop(4, 1)
    assert told == ["STOP"] * (current == 4) and worker.stopped == {4}


def test_a_report_is_sent_once():
    worker, sent = a_worker()[0], []
    worker.n, worker.deliver = 1, lambda *a: sent.append(a)
    for e, final in [(0, False), (0, False), (1, False), (1, True), (1, True)]:
        worker.report(7, e, final)
    assert sent == [(1, 7, 0, False), (1, 7, 1, False), (1, 7, 1, True)]


def tiny(costs=(1.0, 2.0, 3.0), S=2):
    "Two students with the given costs; partial logits are all 0."
    none = torch.zeros(2, len(costs), S, K)
    return SystemAnswers(
        none, torch.zeros(K), none, torch.arange(S), torch.tensor([costs] * 2).double(), [5, 5]
    )


def world_of(latency):
    return Cluster.equal(2, Device(speed=1.0), Link(bandwidth=inf, latency=latency))


def test_a_word_that_comes_too_late_disturbs_nobody():
    "GO needs half a second, patience is a tenth: it arrives in the middle of the next stage."
    go_on = Policy(points=(0,), stop=lambda z, e, lam: False, patience=0.1)
    o = simulate_devices(tiny(), go_on, world_of(0.25), [0.0, 0.0])
    assert o.latency.tolist() == pytest.approx([3.35, 6.45]) and not o.degraded.any()
    assert o.exits.tolist() == [[2, 2]] * 2 and o.macs == pytest.approx(3)


def test_images_come_again_and_again_unless_told_otherwise():
    run = lambda **kw: simulate_devices(tiny(), Policy(), world_of(0.0), np.arange(5.0), **kw)
    assert run().sample.tolist() == [0, 1, 0, 1, 0] == run().y.tolist()
    assert run(sample=[1, 1, 0, 0, 1]).y.tolist() == [1, 1, 0, 0, 1]
    for sample in ([0] * 4, [0.0] * 5, [2] * 5, [-1] * 5):
        with pytest.raises(ValueError, match="sample="):
            run(sample=sample)
    for arrival in ([], [-1.0], [1.0, 0.5], [[0.0]]):
        with pytest.raises(ValueError, match="a rising list of times from 0 on"):
            simulate_devices(tiny(), Policy(), world_of(0.0), arrival)


def test_a_straggler_is_so_many_times_slower():
    c = Cluster.equal(2, Device(speed=6.0)).straggler(1, 3)
    assert [d.speed for d in c.devices] == [6, 2]
    drifting = Cluster.equal(2, Device(speed=lambda t: 6.0 + t)).straggler(0, 2)
    assert drifting.devices[0].speed(2.0) == 4 and drifting.devices[1].speed(2.0) == 8
    with pytest.raises(ValueError, match="factor=0"):
        c.straggler(0, 0)


def test_a_message_that_is_told_no_luck_arrives_at_once():
    assert Link(bandwidth=10.0, latency=0.5, jitter=3.0, loss=0.999).fate(5) == (1, 1.0)
    assert Link(bandwidth=10.0, latency=0.5, jitter=3.0).fate(5, x=2.0) == (1, 7.0)


FREE = ("idle", "trace")  # what is no column


def outcomes(**change):
    "Four requests to two devices, two classes; the last was never answered."
    no, yes = [False] * 2, [True, False]
    got = dict(
        arrival=[0.0, 1, 2, 3],
        sample=[0, 1, 2, 3],
        y=[0, 1, 0, 1],
        logits=[[2.0, 1], [2, 1], [1, 0], [nan, nan]],
        exits=[[0, 1]] * 4,
        latency=[1.0, 3, 2, inf],
        bytes=[10.0, 20, 30, 60],
        energy=[1.0, 2, 3, 6],
        macs=[[1.0, 2], [3, 4], [5, 6], [7, 8]],
        wasted=[0.0, 1, 2, 5],
        missing=[no, yes, no, no],
        late=[no, no, no, no],
        stopped=[False] * 4,
        lam=[nan] * 4,
    )
    columns = {k: np.array(v) for k, v in got.items()}
    return Outcomes(**columns | dict(idle=8.0, trace=[]) | change)


def test_a_summary_by_hand():
    "Means per request; a percentile is one of the latencies; no answer is not right."
    o = outcomes()
    assert o.prediction.tolist() == [0, 0, 0, -1] and o.right.tolist() == [True, False, True, False]
    assert o.degraded.tolist() == [False, True, False, True] and len(o) == 4
    assert o.summary() == dict(
        requests=4,
        accuracy=0.5,
        mean=inf,
        p50=2,
        p95=inf,
        p99=inf,
        energy=3,
        idle=2,
        bytes=30,
        macs=9,
        wasted=2,
        degraded=0.5,
        unanswered=0.25,
    )
    assert outcomes(latency=np.array([1.0, 3, 2, 6])).summary()["mean"] == 3


def test_percentiles_are_those_of_all_requests():
    hundred = {k: np.repeat(v, 25, 0) for k, v in vars(outcomes()).items() if k not in FREE}
    hundred["latency"] = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    told = Outcomes(**hundred, idle=0.0, trace=[]).summary()
    assert [told[k] for k in ("p50", "p95", "p99", "mean")] == [50, 95, 99, 50.5]


# ---------------------------------------------------------------- students as actors


class RayActorError(Exception):
    "As Ray's own: the actor is gone."


class HereRay:
    "What `RaySystem` asks of Ray, with its actors in this process: all but the processes themselves."

    exceptions = SimpleNamespace(RayActorError=RayActorError, RayError=RayActorError)
    put = get = staticmethod(lambda v: v)

    def __init__(self, there=True):
        self.there, self.began, self.ended, self.made = there, [], 0, []

    def is_initialized(self):
        return self.there

    def init(self, *args, **kw):
        self.began.append((args, kw))

    def shutdown(self):
        self.ended += 1

    def remote(self, **groups):
        def options(**kw):
            def start(n, *args):
                self.made.append((n, groups, kw))
                return HereActor(Student(n, *args))

            return SimpleNamespace(remote=start)

        return lambda kind: SimpleNamespace(options=options)

    def kill(self, actor):
        actor.dead = True
        actor.gate.set()
        actor.student.inbox.put(None)


class HereActor:
    "A student whose methods are called as those of an actor; it computes while its gate is open."

    def __init__(self, student):
        self.student, self.dead, self.used = student, False, []
        self.gate, stage = threading.Event(), student.stage
        self.gate.set()
        student.stage = lambda *args: self.gate.wait() and stage(*args)

    def _serve(self):
        try:
            for report in self.student.serve():
                if self.dead:
                    raise RayActorError
                yield report
        except Exception as e:
            raise RayActorError if self.dead else e

    def __getattr__(self, name):
        def call(*args):
            self.used.append((name, *args))
            return self._serve() if name == "serve" else getattr(self.student, name)(*args)

        return SimpleNamespace(options=lambda **kw: SimpleNamespace(remote=call))


@pytest.fixture
def here(monkeypatch):
    ray = HereRay()
    monkeypatch.setattr(ACTORS, "_ray", lambda: ray)
    return ray


S = 8


@pytest.fixture(scope="module")
def world():
    "Two students with two exits, eight images, and the table of their answers."
    system = make((2, 3)).eval()
    with torch.no_grad():
        system.joint.weight *= 8
    data = ArrayData(torch.rand(S, *SHAPE, generator=rng(1)), torch.arange(S) % K)
    return SimpleNamespace(
        system=system, x=data[:][0], y=data.y, table=system_answers(system, data)
    )


def middle(scores):
    v = scores.flatten().sort().values
    return float(v[len(v) // 2 - 1 : len(v) // 2 + 1].mean())


RULES = {"proxy": ProxyHead, "partial": lambda: PartialLogits(points=(0,), speculative=False)}


@pytest.mark.parametrize("name", [*RULES, "last", "every"])
def test_actors_answer_as_their_table_does(name, world, here):
    a, rule = world.table, RULES.get(name, LastExit)()
    T = [middle(rule.scores(a)[:, 0]), -inf]
    depth = rule.depth(a, T)
    fallback = "every" if name == "every" else None
    with RaySystem(world.system, live_policy(rule, 2, T), deadline=60, fallback=fallback) as s:
        o = s.run(world.x, world.y)
    assert o.exits.tolist() == depth.T.tolist() and o.y.tolist() == world.y.tolist()
    assert torch.allclose(torch.tensor(o.logits).float(), a.logits(depth), atol=1e-4)
    assert not o.degraded.any() and (o.latency > 0).all() and (o.latency < 60).all()
    assert (0 < o.stopped.mean() < 1) if name == "partial" else not o.stopped.any()
    assert len(depth.unique()) == (2 if name in RULES else 1)


def test_what_a_run_on_actors_cannot_measure_is_nan(world, here):
    with RaySystem(world.system, deadline=60) as s:
        o = s.run(world.x[:3])
        later = s.run(world.x[:2], [1, 2], arrival=[0.0, 0.05], sample=[5, 6])
    assert o.y.tolist() == [-1] * 3 and o.sample.tolist() == [0, 1, 2] and o.trace == []
    assert [getattr(o, k).shape for k in ("bytes", "energy", "wasted", "lam")] == [(3,)] * 4
    unknown = (o.bytes, o.energy, o.wasted, o.lam, o.macs)
    assert o.macs.shape == (3, 2) and all(math.isnan(v) for u in unknown for v in u.flat)
    assert math.isnan(o.idle) and o.missing.shape == o.late.shape == o.exits.shape == (3, 2)
    assert later.sample.tolist() == [5, 6] and later.y.tolist() == [1, 2]
    assert 0 <= later.arrival[0] < later.arrival[1] and later.arrival[1] >= 0.05
    assert all(o.arrival[i + 1] >= o.arrival[i] + o.latency[i] for i in (0, 1))


def test_a_single_image_is_a_run(world, here):
    with RaySystem(world.system, deadline=60) as s:
        assert len(s.run(world.x[:1])) == 1
        for kw, words in [
            (dict(sample=[0, 1]), "one for each of the 1 images"),
            (dict(y=[0, 1]), "1 labels, or None"),
            (dict(arrival=[-1.0]), "1 rising times from 0 on"),
            (dict(arrival=[0.0, 1]), "1 rising times from 0 on"),
        ]:
            with pytest.raises(ValueError, match=words):
                s.run(world.x[:1], **kw)
        with pytest.raises(ValueError, match="one for each of the 0 images, at least one"):
            s.run(world.x[:0])


def test_each_student_becomes_an_actor_of_its_own(world, here):
    place = lambda n: dict(resources={f"machine{n}": 1}) if n else {"num_cpus": 3}
    with RaySystem(world.system, speed=[None, 1e12], options=place) as s:
        groups = dict(concurrency_groups={"inbox": 1})
        want = [(0, groups, {"num_cpus": 3})]
        want.append((1, groups, dict(num_cpus=0, resources={"machine1": 1})))
        assert here.made == want and s.alive == [True, True]
        assert [e[1:] for e in s.events] == [("up", 0), ("up", 1)]
        W = world.system.joint.weight
        for n, at in enumerate((slice(0, 2), slice(2, 5))):
            student = s.actors[n].student
            assert torch.equal(student.W, W[:, at]) and student.n == n
            assert student.net is not world.system.students[n]
        assert not s.actors[0].student.seconds.any() and s.actors[1].student.seconds.all()
    assert here.ended == 0 and here.began == []


def test_new_settings_reach_actors_and_aggregator(world, here):
    policy, mean = Policy(points=(0,), stop=lambda *a: False, need=2, patience=7), torch.ones(2, K)
    with RaySystem(world.system) as s:
        assert s.aggregator.deadline == pytest.approx(1 - 0.01) and s.fallback is None
        told = s.use(policy, 5.0, "every", mean, 3, speed=2e9, margin=0.5)
        assert told is s and s.aggregator.deadline == 4.5 and s.aggregator.suspect == 3
        assert (s.aggregator.need, s.aggregator.points) == (2, (0,))
        assert s.aggregator.stop is policy.stop and s.aggregator.mean.tolist() == mean.tolist()
        for actor in s.actors:
            name, own, fallback, speed = actor.used[-1]
            assert (name, fallback, speed) == ("use", "every", 2e9)
            assert (own.stop, own.need, own.patience, own.points) == (None, None, 7, (0,))


@pytest.mark.parametrize("margin, deadline, ok", [(0, 1e-9, True), (1, 1, False), (-0.1, 1, False)])
def test_an_answer_is_given_before_its_deadline(margin, deadline, ok, world, here):
    with RaySystem(world.system) as s:
        if ok:
            assert s.use(deadline=deadline, margin=margin).aggregator.deadline == deadline
            return
        with pytest.raises(ValueError, match="deadline, margin="):
            s.use(deadline=deadline, margin=margin)


def test_at_its_deadline_a_request_is_answered_without_those_that_are_slow(world, here, wait_until):
    mean = world.table.means()
    with RaySystem(world.system, deadline=60, mean=mean) as s:
        s.actors[1].gate.clear()
        key = s.submit(world.x[0])

        def the_other_is_done():
            return s.aggregator.waiting[key]["final"] == [True, False]

        wait_until(the_other_is_done)
        with s.lock:
            s.aggregator.deadline = 0.05
            s.lock.notify_all()
        a = s.answer(key, 60)
    assert (a.missing, a.exits) == ((1,), [1, -1]) and a.latency >= 0.05
    p = world.table.partial[0, 1, 0] + mean[1] + world.table.bias
    assert torch.allclose(torch.tensor(a.logits).float(), p, atol=1e-4)


class Falls:
    "A threshold that falls by 1 with each answer."

    def __init__(self):
        self.lam, self.told = 2.0, []

    def update(self, latency, gain=None):
        self.told.append((latency, gain))
        self.lam -= 1


def test_a_request_carries_the_threshold_of_its_time(world, here):
    knob = Falls()
    with RaySystem(world.system, live_policy("proxy", 2), deadline=60, knob=knob) as s:
        o = s.run(world.x[:3])
    assert o.lam.tolist() == [2, 1, 0] and o.exits.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert [t for t, _ in knob.told] == o.latency.tolist()
    assert [g for _, g in knob.told] == pytest.approx([confidence_of(z) for z in o.logits])


def test_an_answer_is_handed_out_once(world, here):
    with RaySystem(world.system, deadline=60) as s:
        key = s.submit(world.x[0])
        assert s.answer(key, 60).key == key == 0 and s.submit(world.x[1]) == 1
        with pytest.raises(ValueError, match="key=0"):
            s.answer(key)
        s.answer(1)
        assert s.futures == {}


def test_open_requests_are_answered_when_a_system_closes(world, here):
    with RaySystem(world.system, deadline=60) as s:
        for actor in s.actors:
            actor.gate.clear()
        key = s.submit(world.x[0])
        with pytest.raises(TimeoutError, match="request 0 has no answer after 0.01 s"):
            s.answer(key, 0.01)
        with pytest.raises(RuntimeError, match="1 requests are open"):
            s.use()
    assert s.answer(key, 0).missing == (0, 1) and s.closed
    assert all(a.dead for a in s.actors) and not any(t.is_alive() for t in s.threads)
    with pytest.raises(RuntimeError, match="the system is closed"):
        s.submit(world.x[0])


def test_a_killed_actor_is_missing_until_it_is_revived(world, here):
    with RaySystem(world.system, deadline=60, suspect=1) as s:
        s.kill(1)
        assert s.alive == [True, False] and s.events[-1][1:] == ("down", 1)
        with pytest.raises(ValueError, match=r"one that is alive, \[0\]"):
            s.kill(1)
        with pytest.raises(TimeoutError, match=r"students \[True, False\] .alive. after 0.01 s"):
            s.wait_alive(0.01)
        s.aggregator.silent[1] = 1
        assert s.answer(s.submit(world.x[0]), 60).missing == (1,)
        assert s.actors[1].used[-1][0] != "put"
        with pytest.raises(ValueError, match=r"one that is dead, \[1\]"):
            s.revive(0)
        s.revive(1)
        s.wait_alive(0)
        assert s.events[-1][1:] == ("up", 1) and [m[0] for m in here.made] == [0, 1, 1]
        times = [e[0] for e in s.events]
        assert times == sorted(times)


def test_an_actor_restarts_by_itself_where_that_is_wanted(world, here):
    with RaySystem(world.system, deadline=60, restart=True) as s:
        s.kill(0)
        s.wait_alive(60)
        assert [e[1:] for e in s.events[2:]] == [("down", 0), ("up", 0)]
        assert s.answer(s.submit(world.x[0]), 60).exits == [1, 1]
    assert [m[0] for m in here.made] == [0, 1, 0]


def test_an_error_of_a_policy_is_told_with_the_next_request(world, here, wait_until):
    broken = Policy(leave=lambda n, e, seen, lam: 1 / 0 if n == 1 else False)
    with RaySystem(world.system, broken, deadline=60, restart=True) as s:
        s.submit(world.x[0])

        def told():
            return not s.alive[1]

        wait_until(told)
        with pytest.raises(RuntimeError, match="student 1 failed: division by zero"):
            s.submit(world.x[0])
    assert [m[0] for m in here.made] == [0, 1]


@pytest.mark.parametrize("address", [None, "auto", "10.0.0.1:6379", "ray://a.b:1"])
def test_a_ray_of_one_s_own_is_small_and_ends_with_its_block(address, monkeypatch):
    ray = HereRay(there=False)
    monkeypatch.setattr(ACTORS, "_ray", lambda: ray)
    own = dict(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20)
    quiet = dict(log_to_driver=False, logging_level=logging.ERROR)
    with pytest.raises(KeyError), ray_cluster(address) as got:
        assert got is ray and ray.ended == 0
        raise KeyError
    assert ray.began == [((address or "local",), quiet | ({} if address else own))]
    assert ray.ended == 1
    for bad in (dict(address="nowhere"), dict(address=5), dict(num_cpus=0), dict(store=79)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            ray_cluster(**bad).__enter__()


@pytest.mark.parametrize("T", [[[0.9, 0.2], [0.1, 0.8]], [0.9, 0.2], None])
def test_a_live_threshold_belongs_to_a_student_and_an_exit(T):
    rows = T if T and isinstance(T[0], list) else [T, T]
    limit = ACTORS._limit_of(ProxyHead(), ACTORS._table_of(T, 2), 2)
    for n, e in itertools.product(range(2), range(2)):
        want = (0.5, -1e300)[e] if T is None else rows[n][e]
        assert limit(n, e, 0.5) == want
    assert ACTORS._limit_of(ProxyHead(), ACTORS._table_of([-inf, 0], 2), 2)(0, 0, 9.0) == -1e300
    with pytest.raises(ValueError, match="2 thresholds, or as many for each student"):
        ACTORS._table_of([0.5], 2)

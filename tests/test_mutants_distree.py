"""The smallest parts of students on devices: values by hand, limits, defaults, branches."""

import dataclasses, inspect, math, sys
import pytest, torch
from darkdistill_nb.core import ArrayData
from darkdistill_nb.distill import kd_loss
from darkdistill_nb.distree import (
    DistrEE,
    DistrEELoss,
    SystemAnswers,
    Teacher,
    branch_weights,
    communities,
    filter_graph,
    make_answers,
    modularity,
    partition_filters,
    partition_report,
    strongest_links,
    student_net,
    system_answers,
    train_distree,
    transfer_loss,
)
from darkdistill_nb.exits import cnn

pytestmark = pytest.mark.usefixtures("one_thread")
HOME = sys.modules[partition_filters.__module__]
SHAPE, K = (1, 4, 4), 3
inf, nan = math.inf, math.nan


def default(f, name):
    return inspect.signature(f).parameters[name].default


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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

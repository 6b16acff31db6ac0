"""Calibrated clients, voting exits, feedback: values by hand, gradients, and what must not change."""

import copy, math, pickle, warnings
import pytest, torch
import torch.nn.functional as F
from helpers import same
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet, Joint
from darkdistill_nb.experiments.federated import (
    SETTINGS,
    decide_own,
    own_cell,
    own_gain,
    own_record,
    train_own,
)
from darkdistill_nb.federated.calibration import (
    CalibratedEEFL,
    DifficultyFeedback,
    ExitVotes,
    FeedbackEEFL,
    PriorCalibration,
    calibrated,
    class_bias,
    class_shares,
    coverage,
    noisy_counts,
    prior_shift,
    shifted,
    simplex_fit,
    stacked_votes,
    tau_rule,
    vote,
    vote_sums,
    vote_weights,
)
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, Client, make_clients

pytestmark = pytest.mark.usefixtures("one_thread")
TINY_SERVER = dict(server_epochs=1, kd_steps=1)


@pytest.fixture(scope="module")
def images():
    train, test = load("digits")
    return train, test, make_clients(train.y, 8, 0.5)


def go(method, images, rounds=2, clients=None, **how):
    train, test, own = images
    build = lambda: cnn(train.shape, 10, width=8)
    how = {"eval_every": rounds, "progress": False, **how}
    return simulate(method, build, train, test, clients or own, rounds, **how)


# ---------------------------------------------------------------- the shift


def test_shares_and_shift_by_hand():
    own, everybody = torch.tensor([3, 1, 0]), torch.tensor([5, 5, 10])
    assert torch.allclose(class_shares(own), torch.tensor([4, 2, 1]).double() / 7)
    assert torch.allclose(class_shares(own, 0.5), torch.tensor([3.5, 1.5, 0.5]).double() / 5.5)
    expected = [math.log(4 / 7 * 23 / 6), math.log(2 / 7 * 23 / 6), math.log(1 / 7 * 23 / 11)]
    assert torch.allclose(prior_shift(own, everybody), torch.tensor(expected).double())
    assert torch.allclose(prior_shift(own, everybody, 0.5), torch.tensor(expected).double() / 2)
    uniform = prior_shift(own, torch.zeros(3))  # nothing is known yet
    assert torch.allclose(uniform, class_shares(own).log() + math.log(3))


def test_negative_noisy_counts_count_as_none():
    assert torch.equal(class_shares(torch.tensor([-3.0, 2])), class_shares(torch.tensor([0.0, 2])))


@pytest.mark.parametrize("objective", [BoostNet(0.2), BoostNet(0.7), Joint()])
def test_the_gradient_is_that_of_shifted_decisions(objective):
    "d loss / d f_e = (softmax(F_e + a) - onehot) / n: the shift is in the loss, and does not pile up."
    g = torch.Generator().manual_seed(0)
    raw = [torch.randn(5, 3, generator=g).double().requires_grad_() for _ in range(4)]
    a, y = torch.tensor([1.0, -2, 0.3]).double(), torch.tensor([0, 1, 2, 0, 0])
    objective.loss(shifted(objective, raw, a), y)[0].backward()
    plain = objective.predict([f.detach() for f in raw])
    for f, F_ in zip(raw, plain):
        expected = ((F_ + a).softmax(1) - F.one_hot(y, 3)) / 5
        assert torch.allclose(f.grad, expected, atol=1e-12)


def test_a_client_trains_with_its_own_shift(images):
    "The loss of a client is the objective's, of logits shifted by what was sent and what it holds."
    train, _, clients = images
    m, s = PriorCalibration(calibration=0.7, smoothing=2.0), Streams(0)
    with s.scope("init"):
        state = m.setup(cnn(train.shape, 10, width=8))
    told = torch.arange(10).int()
    state["server"] = {"labels.3": told, "labels.5": told}
    sent = m.send(state, clients[0])
    data = train.subset(clients[0].train)
    net = m.receive(sent, clients[0].tier)
    raw, y = list(net(data[:8][0])), data[:8][1]
    a = prior_shift(torch.bincount(data.y, minlength=10), 2 * told, 0.7, 2.0).float()
    expected = sum(F.cross_entropy(f + a, y) for f in BoostNet().predict(raw))
    assert torch.allclose(m.local_loss(net, sent, data, 0)(raw, y), expected, atol=1e-5)


def test_before_the_first_upload_the_federation_is_uniform(images):
    train, _, clients = images
    m = PriorCalibration(calibration=1.0)
    state = m.setup(cnn(train.shape, 10, width=8))
    sent = m.send(state, clients[0])
    assert torch.equal(sent["calibration.labels"], torch.zeros(10))
    assert float(sent["calibration.tau"]) == 1


def test_every_client_is_counted_once(images):
    "After some rounds N(y) is the histogram of all who ever took part."
    train, _, clients = images
    run = go(PriorCalibration(), images, 4)
    heard = sorted({i for r in run.log for i in r["clients"]})
    held = torch.cat([clients[i].train for i in heard])
    sent = run.method.send(run.state, clients[0])
    assert torch.equal(sent["calibration.labels"].long(), torch.bincount(train.y[held], minlength=10))
    assert len(heard) < len([i for r in run.log for i in r["clients"]])  # some took part twice


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (None, "labels"),
        (torch.ones(9).int(), "labels"),
        (torch.zeros(10).int(), "labels=0 must be"),
        (torch.tensor([-1] + [1] * 9).int(), "whole numbers >= 0"),
        (torch.ones(10), "whole numbers >= 0"),
    ],
)
def test_a_histogram_that_cannot_be_is_left_out(labels, word, images):
    class Liar(CalibratedEEFL):
        def local_update(self, weights, data, client, rnd, streams):
            u = super().local_update(weights, data, client, rnd, streams)
            if client.id == 0:
                u.extra = {} if labels is None else {"labels": labels}
            return u

    with pytest.warns(UserWarning, match=word):
        run = go(Liar(participation=1.0), images, 1)
    assert list(run.log[0]["left_out"]) == ["0"]
    assert "labels.0" not in run.state["server"] and "labels.1" in run.state["server"]


# ---------------------------------------------------------------- what must not change


@pytest.mark.parametrize("method", [EEFL, DarkDistill])
def test_switched_off_it_is_the_method_itself(method, images):
    "tau = 0 and votes = none: weights, messages and accuracies to the last bit."
    how = TINY_SERVER if method is DarkDistill else {}
    plain, off = (go(m, images) for m in (method(**how), calibrated(method)(calibration=0, votes="none", **how)))
    assert same(plain.state["net"], off.state["net"])
    for k in ("accuracy", "bytes_up", "bytes_down", "loss"):
        assert plain.log[-1][k] == off.log[-1][k]


@pytest.mark.parametrize("tau", [0.0, 1.0, "auto"])
def test_votes_and_feedback_leave_training_alone(tau, images):
    "Decisions only: the weights are those of the same training without votes."
    weights = [
        go(m, images).state["net"]
        for m in (
            CalibratedEEFL(calibration=tau, votes="none"),
            CalibratedEEFL(calibration=tau, votes="validation"),
            CalibratedEEFL(calibration=tau, votes="coverage"),
        )
    ]
    assert same(weights[0], weights[1]) and same(weights[0], weights[2])
    assert tau != 0 or same(weights[0], go(FeedbackEEFL(), images).state["net"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: CalibratedEEFL(calibration="auto", votes="validation", epsilon=2.0),
        lambda: FeedbackEEFL(votes="validation"),
        lambda: calibrated(DarkDistill)(**TINY_SERVER),
    ],
)
def test_workers_and_resuming_change_nothing(make, images, tmp_path):
    whole = go(make(), images, 4, workers=2)
    file = tmp_path / "run.safetensors"
    go(make(), images, 2, checkpoint=file)
    resumed = go(make(), images, 4, checkpoint=file)
    for part in ("net", "server"):
        assert same(whole.state[part], resumed.state[part])
    assert whole.log[-1]["accuracy"] == resumed.log[-1]["accuracy"]
    finished = go(make(), images, 4, checkpoint=file)  # nothing left to do
    assert torch.equal(finished.logits(images[1]), whole.logits(images[1]))


def test_a_checkpoint_is_of_one_tau(images, tmp_path):
    file = tmp_path / "run.safetensors"
    go(CalibratedEEFL(calibration=1.0), images, 1, checkpoint=file)
    with pytest.raises(ValueError, match="calibration"):
        go(CalibratedEEFL(calibration=0.5), images, 1, checkpoint=file)


def test_the_rule_is_tau_1_where_images_are_hard(images):
    "In the first rounds exit 1 errs on more than a tenth: the same training as with tau = 1."
    ruled, fixed = (go(CalibratedEEFL(calibration=t, votes="none"), images) for t in ("auto", 1.0))
    assert [r["tau"] for r in ruled.log] == [1.0, 1.0]
    assert same(ruled.state["net"], fixed.state["net"])


def test_the_rule_gives_way_on_easy_images(images):
    assert [tau_rule(e) for e in (0, 0.05, 0.1, 0.5)] == [0, pytest.approx(1 / 16), 1, 1]
    assert tau_rule(0.05, at=0.2, power=2) == pytest.approx(1 / 16)
    assert tau_rule(0.05, power=1) == 0.5
    told = dict(net={"stem.w": torch.ones(1)}, server={"tau.errors": torch.tensor([5.0, 100.0])})
    ruled = {p: CalibratedEEFL(fall=p)._tau(told) for p in (1, 2, 4)}
    assert ruled == {p: pytest.approx(0.5**p) for p in (1, 2, 4)}
    m, s = CalibratedEEFL(calibration="auto"), Streams(0)
    state = m.setup(cnn((1, 8, 8), 10, width=8))
    state["server"]["tau.errors"] = torch.tensor([2.0, 100.0])
    assert float(m.send(state, images[2][0])["calibration.tau"]) == pytest.approx(0.2**4)


def test_without_validation_images_there_is_nothing_to_follow(images):
    train, test, clients = images
    bare = [Client(c.id, c.tier, c.train, c.valid[:0]) for c in clients]
    run = go(CalibratedEEFL(calibration="auto"), images, 2, bare)
    assert [r["tau"] for r in run.log] == [1.0, 1.0]
    samples = [sum(len(c.train) for c in bare if c.tier == m) for m in (1, 2, 3, 4)]
    seen = {i for r in run.log for i in r["clients"]}
    if len(seen) == len(bare):
        assert torch.allclose(run.state["server"]["vote_weights"], vote_weights("coverage", coverage(samples)))


# ---------------------------------------------------------------- privacy


def test_noise_is_laplace_and_drawn_once(images):
    noise = noisy_counts(torch.zeros(100_000), 2.0, torch.Generator().manual_seed(1)).double()
    assert noise.abs().mean() == pytest.approx(0.5, abs=0.01)  # the scale, 1 / epsilon
    assert noise.var() == pytest.approx(0.5, abs=0.02)  # 2 / epsilon^2
    assert noise.median() == pytest.approx(0, abs=0.01)
    train, _, clients = images
    m, s, c = PriorCalibration(epsilon=0.5), Streams(0), clients[0]
    state = m.setup(cnn(train.shape, 10, width=8))
    data = train.subset(c.train)
    told = [m.local_update(m.send(state, c), data, c, r, s).extra["labels"] for r in (0, 1)]
    assert torch.equal(*told)  # a new draw every round would average out
    assert not torch.equal(told[0].double(), torch.bincount(data.y, minlength=10).double())


def test_a_federation_with_noisy_histograms_runs(images):
    run = go(PriorCalibration(epsilon=0.05), images, 2)
    assert not run.log[-1]["left_out"] and run.log[-1]["loss"] > 0


# ---------------------------------------------------------------- votes


def test_coverage_and_votes_by_hand():
    c = coverage([10, 30, 40, 20])
    assert torch.allclose(c, torch.tensor([1, 0.9, 0.6, 0.2]).double())
    W = vote_weights("coverage", c)
    assert torch.allclose(W[3], torch.tensor([1, 0.9, 0.6, 0.2]).double() / 2.7)
    assert torch.allclose(vote_weights("depth", c)[2, :3], torch.tensor([1, 1.8, 2.4]).double() / 5.2)
    assert torch.allclose(vote_weights("equal", c)[1, :2], torch.full((2,), 0.5).double())
    for votes in ("none", "equal", "coverage", "depth"):
        W = vote_weights(votes, c)
        assert torch.allclose(W.sum(1), torch.ones(4).double()) and torch.equal(W, W.tril())


def test_votes_as_a_running_sum():
    "V_e of the page, and the two sums that a streaming runner keeps."
    g = torch.Generator().manual_seed(0)
    F_, c = torch.randn(4, 6, 3, generator=g).double(), coverage([1, 1, 1, 1])
    V, top, below = vote(F_, vote_weights("coverage", c)), 0, 0
    for e in range(4):
        top, below = top + c[e] * F_[e], below + c[e]
        assert torch.allclose(V[e], top / below)
    assert torch.equal(V[0], F_[0]) and torch.equal(vote(F_[:2], vote_weights("coverage", c)), V[:2])


def test_sums_by_hand():
    F_ = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, math.log(3)], [math.log(4), 0.0]]])
    sums = vote_sums(F_, torch.tensor([1, 1]))
    assert torch.equal(sums[0], torch.zeros(2, 3).double())
    p = torch.tensor([[1 / 4, 3 / 4], [4 / 5, 1 / 5]]).double()
    expected = [[1.0, 1.0, 1.0], [1.0, float((p**2).sum()), 3 / 4 + 1 / 5]]
    assert torch.allclose(sums[1], torch.tensor(expected).double())


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_the_best_point_of_the_simplex(seed):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(6, 3, generator=g).double()
    G, b = A.T @ A / 6, torch.randn(3, generator=g).double()
    prior, pull = torch.tensor([0.5, 0.3, 0.2]).double(), 0.05
    value = lambda w: ((w @ G) * w).sum(-1) - 2 * w @ b + pull * ((w - prior) ** 2).sum(-1)
    grid = torch.cartesian_prod(*(torch.arange(101) / 100,) * 2).double()
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    best = value(grid[grid[:, 2] >= 0]).min()
    w = simplex_fit(G, b, prior, pull)
    assert w.sum() == pytest.approx(1) and bool((w >= 0).all())
    assert float(value(w)) <= float(best) + 1e-3
    far = simplex_fit(G, b, prior, 1e6)
    assert torch.allclose(far, prior, atol=1e-3)


def test_stacking_weighs_classes_not_images():
    "An exit that is right on the class everybody at hand holds, and wrong on the rare one, gains nothing by it."
    say = lambda *k: 6 * torch.eye(2)[list(k)]
    y = torch.tensor([0] * 90 + [1] * 10)
    lean, fair = say(*[0] * 100), say(*y.tolist())
    F_ = torch.stack([0.1 * fair, lean])
    deep = (vote_sums(F_, y), torch.tensor([90, 10]))
    shallow = (vote_sums(F_[:1, :0], y[:0]), torch.tensor([0, 80]))  # who else holds class 1
    W = stacked_votes([deep[0], shallow[0]], [deep[1], shallow[1]], coverage([1, 1]), 0)
    alone = stacked_votes([deep[0]], [deep[1]], coverage([1, 1]), 0)
    assert W[1, 1] < 0.2 < 0.35 < alone[1, 1]


def test_stacking_uses_only_clients_that_have_the_exit():
    sure = 9 * torch.eye(2).repeat(20, 1)
    y = torch.arange(40) % 2
    wrong = torch.stack([sure, -sure])
    n = torch.tensor([20, 20])
    W = stacked_votes([vote_sums(wrong, y), vote_sums(sure[None], y)], [n, n], coverage([1, 1, 1]), 0)
    assert torch.allclose(W[1, :2], torch.tensor([1.0, 0]).double(), atol=1e-3)
    assert torch.allclose(W[2], vote_weights("coverage", coverage([1, 1, 1]))[2])  # nobody has exit 3


def test_the_runs_votes_are_those_of_its_state(images):
    train, test, clients = images
    run = go(ExitVotes(votes="coverage"), images, 4)
    heard = {i for r in run.log for i in r["clients"]}
    samples = [sum(len(c.train) for c in clients if c.tier == m and c.id in heard) for m in (1, 2, 3, 4)]
    plain = EEFL.decide(run.method, run.net(), test)
    expected = vote(plain, vote_weights("coverage", coverage(samples)))
    assert torch.equal(run.logits(test), expected)
    assert run.log[-1]["accuracy"] == (expected.argmax(-1) == test.y).double().mean(1).tolist()


# ---------------------------------------------------------------- feedback


def test_feedback_by_hand(images):
    b = class_bias(torch.tensor([2.0, 9.0, 0.0]), torch.tensor([2, 3, 0]))
    assert b.tolist() == [-1.0, 1.0, 0.0]
    train, test, clients = images
    run = go(DifficultyFeedback(feedback=0.5, images=30), images, 1)
    total, seen = torch.zeros(10).double(), torch.zeros(10).long()
    for c in clients:
        g = Streams(0).generator("feedback", c.id)
        data = train.subset(c.train[torch.randperm(len(c.train), generator=g)[:30]])
        d = F.cross_entropy(run.net().prefix(1).eval()(data[:][0])[0], data.y, reduction="none")
        total.index_add_(0, data.y, d.detach().double())
        seen += torch.bincount(data.y, minlength=10)
    expected = 0.5 * class_bias(total, seen)
    assert torch.allclose(run.state["server"]["feedback.bias"], expected, atol=1e-5)
    plain = EEFL.decide(run.method, run.net(), test)
    assert torch.allclose(run.logits(test), plain + expected.float(), atol=1e-5)


# ---------------------------------------------------------------- any method


@pytest.mark.parametrize("method", [EEFL, DarkDistill])
def test_any_method_can_be_calibrated(method, images):
    cls = calibrated(method)
    assert issubclass(cls, method) and cls is calibrated(method) and method.name in cls.name
    how = TINY_SERVER if method is DarkDistill else {}
    m = cls(calibration=0.5, votes="equal", lr=0.02, **how)
    again = pickle.loads(pickle.dumps(m))
    assert type(again) is cls and vars(again).keys() == vars(m).keys() and again.calibration == 0.5
    assert type(copy.deepcopy(m)) is cls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = go(m, images)
    assert run.log[-1]["accuracy"] != go(method(lr=0.02, **how), images).log[-1]["accuracy"]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: CalibratedEEFL(calibration=-1), "calibration=-1"),
        (lambda: CalibratedEEFL(calibration="always"), "calibration='always'"),
        (lambda: CalibratedEEFL(smoothing=0), "smoothing=0"),
        (lambda: CalibratedEEFL(fall=0), "fall=0"),
        (lambda: CalibratedEEFL(epsilon=0), "epsilon=0"),
        (lambda: CalibratedEEFL(votes="loud"), "votes='loud'"),
        (lambda: FeedbackEEFL(feedback=-1), "feedback=-1"),
        (lambda: FeedbackEEFL(images=0), "images=0"),
        (lambda: calibrated(EEFL()), "method"),
        (lambda: coverage([0, 0]), "samples"),
        (lambda: vote_weights("validation", [1, 1]), "votes='validation'"),
        (lambda: vote(torch.zeros(3, 2, 2), torch.eye(2)), "weights"),
    ],
)
def test_what_cannot_be_is_said_at_once(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# ---------------------------------------------------------------- the experiment


@pytest.mark.parametrize("votes", ["none", "coverage", "validation"])
def test_stored_logits_decide_as_the_method_does(votes, images, tmp_path):
    "What the experiment computes from stored logits is what a run with these votes reports."
    from darkdistill_nb.core.cells import cell_key
    from darkdistill_nb.core.records import load_tensors

    cell = own_cell("digits", 1.0, 3, rounds=3, width=8, clients=8, participation=1.0)
    train_own(cell, tmp_path)
    stored = load_tensors(tmp_path / "logits" / f"{cell_key(cell)}.safetensors")[0]
    train, test = images[:2]
    method = CalibratedEEFL(calibration=1.0, votes=votes, participation=1.0)
    clients = make_clients(train.y, 8, 0.5, seed=3)
    run = go(method, images, 3, clients, seed=3)
    assert decide_own(stored, votes) == run.log[-1]["accuracy"]


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "cifar10_full"])
def test_the_stored_records_bear_out_the_lessons(name):
    "Better than the control; and no interval in which it loses to one of its own parts."
    record = own_record(f"own_{name}")
    assert own_gain(record, "ours")[1] == "holds"
    for part in ("coverage votes", "validation votes", "calibration", "calibration by rule"):
        assert own_gain(record, "ours", part)[1] != "does not hold", part

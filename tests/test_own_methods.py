"""Methods as researchers write them: with losses that hold tensors in any place, objectives that change, visits of two
phases, and images of a class of their own. The tape and the stack give what one client after the other gives."""

import functools
import threading
import types
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import Joint
from darkdistill_nb.federated import method as federated
from darkdistill_nb.federated.calibration import CalibratedEEFL
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.engine import _jobs, save_state, simulate
from darkdistill_nb.federated.method import EEFL, make_clients, steady

pytestmark = pytest.mark.usefixtures("one_thread")


def images(n, seed, kind=ArrayData):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=g)
    for i, c in enumerate(y.tolist()):
        x[i, 0, (c // 2) * 4 : (c // 2) * 4 + 4, (c % 2) * 4 : (c % 2) * 4 + 4] += 1
    return kind(x, y)


def build():
    return cnn((1, 8, 8), 4, stages=2, width=4)


def run(kind, rounds=8, data=ArrayData, **how):
    train, test = images(240, 0, data), images(60, 1)
    clients = make_clients(train.y, 6, 0.5, tiers=(0.5, 0.5))
    method = kind(Joint(), participation=1.0, lr=0.05, batch_size=8)
    return simulate(method, build, train, test, clients, rounds, progress=False, **how)


def apart(a, b):
    a, b = a.state["net"], b.state["net"]
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def log_prior(data):
    n = torch.bincount(data.y, minlength=4).float() + 1
    return (n / n.sum()).log()


class ByDefault(EEFL):
    def local_loss(self, net, weights, data, rnd):
        return lambda raw, y, p=log_prior(data): sum(F.cross_entropy(f + p, y) for f in raw)


class ByKeyword(EEFL):
    def local_loss(self, net, weights, data, rnd):
        def loss(raw, y, *, p=log_prior(data)):
            return sum(F.cross_entropy(f + p, y) for f in raw)

        return loss


class InSelf(EEFL):
    def local_loss(self, net, weights, data, rnd):
        self.prior = log_prior(data)
        return lambda raw, y: sum(F.cross_entropy(f + self.prior, y) for f in raw)


class TwoPhases(EEFL):
    def local_update(self, weights, data, client, rnd, streams):
        u = super().local_update(weights, data, client, rnd, streams)
        return super().local_update({**weights, **u.weights}, data, client, rnd, streams)


class Anneal(EEFL):
    def local_update(self, weights, data, client, rnd, streams):
        self.objective.weights = [float(1 + rnd % 7) / (e + 1) for e in range(client.tier)]
        return super().local_update(weights, data, client, rnd, streams)


class ByTheServer(EEFL):
    def configure(self, rnd, clients, streams):
        self.objective = Joint(weights=[1.0, 3.0] if rnd >= 5 else [1.0, 0.2])
        return [c for c in super().configure(rnd, clients, streams) if c.tier == 2]


class InPrivate(EEFL):
    def local_loss(self, net, weights, data, rnd):
        self._prior = log_prior(data)
        return lambda raw, y: sum(F.cross_entropy(f + self._prior, y) for f in raw)


class InABox(EEFL):
    box = types.SimpleNamespace()

    def local_loss(self, net, weights, data, rnd):
        box = self.box
        box.prior = log_prior(data)
        return lambda raw, y: sum(F.cross_entropy(f + box.prior, y) for f in raw)


class InAnArray(EEFL):
    def local_loss(self, net, weights, data, rnd):
        self.rate = getattr(self, "rate", np.ones(1))
        self.rate[0] = 0.5 + client_share(data)
        return lambda raw, y: sum(float(self.rate[0]) * F.cross_entropy(f, y) for f in raw)


def client_share(data):
    return float((data.y == 0).double().mean())


class ArrayOfTheServer(EEFL):
    def configure(self, rnd, clients, streams):
        if rnd == 0:
            self.objective.weights = np.array([1.0, 0.2])
        self.objective.weights[1] = 3.0 if rnd >= 5 else 0.2
        return [c for c in super().configure(rnd, clients, streams) if c.tier == 2]


class ListOfTheRound(EEFL):
    rates = [1.0]

    @steady
    def local_loss(self, net, weights, data, rnd):
        rates = self.rates
        rates[0] = 1.0 + rnd % 3
        return lambda raw, y: rates[0] * self.objective.loss(raw, y)[0]


class Dequantised(EEFL):
    @steady
    def receive(self, weights, tier):
        return EEFL.receive(self, {k: 0.9 * v if v.is_floating_point() else v for k, v in weights.items()}, tier)


class Noisy(EEFL):
    @steady
    def before_step(self, net, x, y, optimizer):
        x.mul_(0.9)


@functools.wraps(DarkDistill.local_update)
def halved(self, weights, data, client, rnd, streams):
    u = DarkDistill.local_update(self, weights, data, client, rnd, streams)
    u.weights = {k: (v + weights[k]) / 2 if v.is_floating_point() else v for k, v in u.weights.items()}
    return u


class Wrapped(DarkDistill):
    local_update = halved


OWN = [ByDefault, ByKeyword, InSelf, InPrivate, InABox, InAnArray, TwoPhases, Anneal, ByTheServer, ArrayOfTheServer]
MARKED = [ListOfTheRound, Dequantised, Noisy, Wrapped]


@pytest.mark.parametrize("kind", OWN + MARKED)
def test_the_tape_follows_what_a_method_changes(kind, monkeypatch):
    taped = run(kind)
    monkeypatch.setattr(federated, "Taped", lambda: None)
    plain = run(kind)
    assert all(torch.equal(v, plain.state["net"][k]) for k, v in taped.state["net"].items())
    assert [r["loss"] for r in taped.log] == [r["loss"] for r in plain.log]


@pytest.mark.parametrize("kind", OWN)
def test_a_stack_does_not_mix_clients_up(kind):
    assert apart(run(kind, 4, stack=True), run(kind, 4)) < 1e-5


@pytest.mark.parametrize("kind", [InSelf, Anneal])
def test_who_keeps_something_in_itself_is_told(kind):
    with pytest.warns(UserWarning, match="one by one, because its method changes while clients are asked"):
        run(kind, 1, stack=True)


class Turned(ArrayData):
    "Its batches are other images than it holds."

    def batches(self, *args, **kwargs):
        for x, y in super().batches(*args, **kwargs):
            yield x.flip(-1), y


def test_images_of_a_class_of_ones_own_are_not_stacked():
    with pytest.warns(UserWarning, match="because its images are of a class of your own"):
        stacked = run(EEFL, 2, data=Turned, stack=True)
    assert apart(stacked, run(EEFL, 2, data=Turned)) == 0


class Rated(EEFL):
    "A number of its loss is another one each round."

    def local_loss(self, net, weights, data, rnd):
        rate = 1.0 + rnd
        return lambda raw, y: rate * sum(F.cross_entropy(f, y) for f in raw)


def test_stacks_that_do_not_come_back_are_let_go(monkeypatch):
    from darkdistill_nb.federated import engine

    held, real = [], engine.fit_together
    monkeypatch.setattr(engine, "fit_together", lambda v, s: (real(v, s), held.append(len(s)))[0])
    run(Rated, 40, stack=True)
    assert max(held) < 100 and held[-1] <= held[20] + 16


# ---------------------------------------------------------------- before any work, in one sentence


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(checkpoint=3), "checkpoint=3 must be the path of a file"),
        (dict(on_round=3), "on_round=3 must be a function"),
    ],
)
def test_what_cannot_be_used_is_told_before_the_first_round(how, words):
    with pytest.raises(ValueError, match=words):
        run(EEFL, 1, **how)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="must be a file, not a folder"):
        run(EEFL, 1, checkpoint=tmp_path)
    run(EEFL, 1, checkpoint=tmp_path / "new" / "c.safetensors")
    assert (tmp_path / "new" / "c.safetensors").exists()


@pytest.mark.parametrize("clients", [None, 5, "abc", [1, 2], {}])
def test_what_are_no_clients_is_told(clients):
    train = images(40, 0)
    with pytest.raises(ValueError, match="must be a list of at least one Client"):
        simulate(EEFL(), build, train, train, clients, 1, progress=False)


class Tells(EEFL):
    info = {}

    def server_step(self, state, tiers, updates, rnd, streams):
        return tiers, state["server"], self.info


@pytest.mark.parametrize(
    "info, words",
    [
        (dict(loss=1), "the log has these itself"),
        (dict(accuracy=1), "the log has these itself"),
        (None, "a dict"),
        ({1: 2}, "texts"),
    ],
)
def test_what_a_method_tells_the_log_is_looked_at(info, words):
    kind = type("Telling", (Tells,), dict(info=info))
    with pytest.raises(ValueError, match=words):
        run(kind, 1)


def test_a_state_is_tensors_with_names(tmp_path):
    for odd in ({1: torch.ones(1)}, dict(a=1.0), None):
        with pytest.raises(ValueError, match="must be a dict of tensors whose names are texts"):
            save_state(tmp_path / "s.safetensors", dict(net={}, server=odd, objective={}), {})


class Locked(EEFL):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lock = threading.Lock()


def test_a_method_that_cannot_be_copied_stays_in_one_process():
    assert apart(run(Locked, 2, workers="auto"), run(Locked, 2)) == 0


def test_calibrated_clients_go_to_workers_in_groups():
    "What a message holds for each client is small, and made anew; the weights are those of all."
    train = images(480, 0)
    clients = make_clients(train.y, 24, 0.5, tiers=(0.5, 0.5))
    sizes = {}
    for kind in (EEFL, CalibratedEEFL):
        method = kind(Joint(), participation=1.0, batch_size=8)
        state = method.setup(build())
        sent = [method.send(state, c) for c in clients]
        sizes[kind] = [len(job) for job in _jobs(method, sent, clients, 2)]
    assert sizes[EEFL] == sizes[CalibratedEEFL] and max(sizes[EEFL]) > 1


class Odd(EEFL):
    "From the sixth round on, when all are on tape, one client reports what is no tensor."

    def report(self, weights, data, client, rnd, streams):
        if client.id == 2 and rnd > 5:
            return dict(f=lambda: 0)
        return {}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_odd_report_is_the_clients_own_fault(workers):
    with pytest.warns(UserWarning, match="client 2 is left out"):
        log = run(Odd, 7, workers=workers).log
    assert [len(r["left_out"]) for r in log] == [0] * 6 + [1]

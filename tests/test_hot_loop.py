"What a client's visit and the server's sum cost, and that nothing of it changes a bit of the weights."

import copy, weakref
import pytest, torch
from torch import nn
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.training import SGD, fit
from darkdistill_nb.exits.networks import cnn, wrn
from darkdistill_nb.federated.baselines import DepthFL
from darkdistill_nb.federated.engine import play_round, simulate
from darkdistill_nb.federated.method import (
    EEFL,
    Added,
    Client,
    Mean,
    Updates,
    average,
    make_clients,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits", n_train=400, n_test=60)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_steps_are_those_of_torch(momentum, weight_decay):
    "Also for parameters whose gradient is missing in some steps."

    def path(kind):
        g = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=g).requires_grad_() for s in ((3, 5), (7,), ())]
        opt = kind(params, lr=0.05, momentum=momentum, weight_decay=weight_decay)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=g) if (step + i) % 3 else None
            opt.step()
        return params

    for a, b in zip(path(SGD), path(torch.optim.SGD)):
        assert torch.equal(a, b)


def test_a_gradient_is_not_changed_by_the_step():
    "The first velocity is a copy of the gradient, not the gradient itself."
    p = torch.ones(3, requires_grad=True)
    p.grad = g = torch.ones(3)
    opt = SGD([p], lr=0.1, momentum=0.9)
    opt.step()
    opt.step()
    assert torch.equal(g, torch.ones(3))


def test_fit_gives_the_weights_of_a_loop_with_torchs_optimiser(digits):
    train, _ = digits
    with Streams(0).scope("init"):
        net = cnn(train.shape, 10, stages=1, width=8)
    other = copy.deepcopy(net)
    loss = lambda out, y: torch.nn.functional.cross_entropy(out[0], y)
    draws = lambda: torch.Generator().manual_seed(3)
    fit(net, train, 2, 0.05, 0.9, 1e-4, 32, loss=loss, generator=draws())
    opt = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    g = draws()
    for _ in range(2):
        for i in torch.randperm(len(train), generator=g).split(32):
            x, y = train[i]
            opt.zero_grad()
            loss(other(x), y).backward()
            opt.step()
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_batches_are_those_of_indexing(digits):
    train, _ = digits
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    batches = train.batches(32, torch.Generator().manual_seed(1))
    for (x, y), i in zip(batches, order.split(32), strict=True):
        assert torch.equal(x, train[i][0]) and torch.equal(y, train[i][1])


def test_drawing_a_batch_leaves_the_images_alone():
    from darkdistill_nb.core.data import ArrayData

    x = torch.rand(10, 1, 4, 4)
    data, before = ArrayData(x, torch.arange(10) % 2), x.clone()
    list(data.batches(3, torch.Generator().manual_seed(0)))
    list(data.batches(3))
    assert torch.equal(data.x, before) and data[0][0].shape == (1, 4, 4)


def test_the_order_of_arrival_has_no_influence():
    g = torch.Generator().manual_seed(0)
    sets = [(dict(w=torch.randn(2000, generator=g)), 20 + 7 * i) for i in range(12)]
    means = []
    for seed in range(5):
        mean = Mean()
        for i in torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist():
            mean.add(*sets[i])
        means.append(mean.value()["w"])
    assert all(torch.equal(means[0], m) for m in means[1:])
    exact = sum(w["w"].double() * n for w, n in sets) / sum(n for _, n in sets)
    assert torch.equal(means[0], exact.float())
    assert torch.equal(average([w for w, _ in sets], [n for _, n in sets])["w"], means[0])


@pytest.mark.parametrize(
    "weights, words",
    [
        (dict(w=torch.zeros(2)), "of shape"),
        (dict(v=torch.zeros(3)), "same names"),
        ({}, "same names"),
    ],
)
def test_a_set_that_does_not_fit_changes_nothing(weights, words):
    mean = Mean()
    mean.add(dict(w=torch.ones(3)), 2)
    with pytest.raises(ValueError, match=words):
        mean.add(weights, 1)
    with pytest.raises(ValueError, match="n=0"):
        mean.add(dict(w=torch.ones(3)), 0)
    assert torch.equal(mean.value()["w"], torch.ones(3)) and mean.n == 2


class Watched(EEFL):
    "Counts how many clients' weights are alive when the next client is asked."

    def setup(self, net):
        self.seen, self.alive = [], []
        return super().setup(net)

    def local_update(self, *args):
        self.alive.append(sum(r() is not None for r in self.seen))
        u = super().local_update(*args)
        self.seen.append(weakref.ref(u.weights["stem.weight"]))
        return u


def one_round(method, digits):
    train, _ = digits
    clients = make_clients(train.y, 8, gamma=10.0)
    with Streams(0).scope("init"):
        state = method.setup(cnn(train.shape, 10, width=8))
    return play_round(method, state, train, clients, 0, Streams(0))


def test_memory_does_not_grow_with_the_number_of_clients(digits):
    method = Watched(participation=1.0)
    one_round(method, digits)
    assert len(method.alive) == 8 and max(method.alive) <= 1


def test_a_method_that_needs_them_keeps_the_weights_of_all(digits):
    class Keeps(Watched):
        needs_weights = True

        def aggregate(self, state, updates, rnd, streams):
            self.kept = [u.weights["stem.weight"] for u in updates]
            return super().aggregate(state, updates, rnd, streams)

    kept, dropped = Keeps(participation=1.0), EEFL(participation=1.0)
    (state, row), (other, plain) = one_round(kept, digits), one_round(dropped, digits)
    assert len(kept.kept) == 8 and kept.alive == list(range(8))
    assert all(torch.equal(v, other["net"][k]) for k, v in state["net"].items())
    assert (row["bytes_up"], row["loss"]) == (plain["bytes_up"], plain["loss"])
    assert DepthFL(alpha=0.1).needs_weights and not DepthFL(alpha=0.0).needs_weights


def test_whoever_looks_at_weights_that_are_gone_is_told_what_to_do(digits):
    class Looks(EEFL):
        def aggregate(self, state, updates, rnd, streams):
            return super().aggregate(state, updates, rnd, streams) + (list(updates[0].weights),)

    with pytest.raises(RuntimeError, match="needs_weights = True"):
        one_round(Looks(participation=1.0), digits)
    for look in (len, list, lambda w: w["a"], lambda w: w.get("a"), lambda w: {**w}):
        with pytest.raises(RuntimeError, match="let go"):
            look(Added())


def test_weights_that_do_not_fit_are_refused_as_by_pytorch(digits):
    train, _ = digits
    m = EEFL()
    state = m.setup(cnn(train.shape, 10, width=8))
    sent = m.send(state, Client(0, 2, torch.arange(9), torch.arange(0)))
    for wrong in ({**sent, "stem.bias": torch.zeros(1)}, {k: sent[k] for k in list(sent)[1:]}):
        with pytest.raises(RuntimeError, match="state_dict"):
            m.receive(wrong, 2)


def test_a_network_that_was_used_before_starts_from_what_is_sent(digits):
    "The working network of a tier is written over completely, counters of batches included."
    train, test = digits
    clients = make_clients(train.y, 4, gamma=10.0, tiers=(0.5, 0.25, 0.25))
    build = lambda: wrn(10, 1, exits=(1, 2, 3), input_shape=train.shape, n_classes=10)
    go = lambda m: simulate(m, build, train, test, clients, 2, progress=False).state["net"]
    used = EEFL(batch_size=25)
    first = go(used)
    again = go(used)
    assert all(torch.equal(v, again[k]) for k, v in first.items())


def test_a_visit_takes_an_image_apart_only_where_a_batch_of_one_is_due():
    "A look at the normalisations needs one image; every visit of a client begins with `fit`."
    taken = []

    class Watched(ArrayData):
        def __getitem__(self, i):
            if isinstance(i, slice) and i.stop == 1:
                taken.append(i)
            return super().__getitem__(i)

    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = Watched(torch.randn(9, 1, 2, 2), torch.arange(9) % 3)
    fit(net, data, batch_size=3)
    assert taken == []
    with pytest.raises(ValueError, match="batch_size=4 must be another number: 9 samples"):
        fit(net, data, batch_size=4)
    assert len(taken) == 1


@pytest.mark.parametrize("limit", [10, 2**28])
@pytest.mark.parametrize("kind", ["uint8", "float32", "as trained on", "difficulty known"])
def test_images_at_hand_are_those_of_the_data_set(kind, limit):
    "A client's images are rows of all images; what is made of them is an ordinary data set again."
    from darkdistill_nb.federated.engine import _shares

    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (60, 3, 4, 4), generator=g, dtype=torch.uint8), torch.arange(60) % 5
    how = dict(mean=[0.0] * 3, std=[1.0] * 3) if kind == "as trained on" else {}
    how |= dict(difficulty=torch.rand(60, generator=g)) if kind == "difficulty known" else {}
    train = ArrayData(x if kind == "uint8" else x / 255.0, y, range(5), **how)
    client = Client(0, 1, torch.randperm(60, generator=g)[:35], torch.arange(0))
    share = _shares(train, [client], limit)
    plain, ready = train.subset(client.train), share(client)
    assert share(client) is ready and len(ready) == 35 and repr(ready) == repr(plain)
    draws = lambda: torch.Generator().manual_seed(3)
    for order in (draws, lambda: None):
        pairs = zip(plain.batches(8, order()), ready.batches(8, order()), strict=True)
        for (a, y), (b, z) in pairs:
            assert torch.equal(a, b) and torch.equal(y, z)
    for idx in (3, slice(2, 9), [4, 4, 1], torch.tensor([5, -1])):
        assert all(map(torch.equal, plain[idx], ready[idx]))
    assert torch.equal(ready.x, plain.x) and ready.shape == plain.shape
    for made in (ready.subset([3, 4]), copy.copy(ready), ready.to("cpu")):
        assert type(made) is ArrayData and not hasattr(made, "_rows")
    subset = plain.subset([3, 4])
    assert all(map(torch.equal, ready.subset([3, 4])[:], subset[:]))
    if kind == "difficulty known":
        assert torch.equal(ready.difficulty, plain.difficulty)


def test_clients_of_other_data_are_cut_out_of_them():
    "Who writes their own kind of data set gets their own kind of subset."
    from darkdistill_nb.federated.engine import _shares

    class Own(ArrayData):
        pass

    train = Own(torch.zeros(6, 1, 2, 2), torch.arange(6) % 2)
    assert type(_shares(train, [])(Client(0, 1, torch.arange(3), torch.arange(0)))) is Own


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e7, -3e7, 1e25])
def test_norms_find_what_extremes_find(value, digits):
    "A norm only says that all is well; who it is that is wrong is looked up."
    train, _ = digits
    m, s = EEFL(), Streams(0)
    state = m.setup(cnn(train.shape, 10, width=8))
    c = Client(0, 2, torch.arange(40), torch.arange(0))
    sent = m.send(state, c)
    u = m.local_update(sent, train.subset(c.train), c, 0, s)
    m.check_update(u, sent, c)
    u.weights["stages.0.convs.0.weight"][0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="stages.0.convs.0.weight"):
        m.check_update(u, sent, c)


def test_factors_of_one_are_left_out_of_the_loss_and_change_nothing():
    from darkdistill_nb.exits.training import Joint

    g = torch.Generator().manual_seed(0)
    y = torch.randint(5, (8,), generator=g)
    raw = [torch.randn(8, 5, generator=g).requires_grad_() for _ in range(3)]
    value = Joint().loss(raw, y)[0]
    other = sum(1.0 * torch.nn.functional.cross_entropy(f, y) for f in raw)
    assert torch.equal(value, other)
    a, b = torch.autograd.grad(value, raw), torch.autograd.grad(other, raw)
    assert all(map(torch.equal, a, b))

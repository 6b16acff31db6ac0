"Clients that train as one batch of networks: beside the loop, who is trained alone and why, and that nobody asks for it unasked."

import warnings
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.core.training import fit
from darkdistill_nb.exits.networks import cnn, wrn
from darkdistill_nb.federated import engine, stacked
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import make_clients
from darkdistill_nb.federated.stacked import Visit, fit_together

pytestmark = pytest.mark.usefixtures("one_thread")


def cross_entropy(raw, y):
    return sum(F.cross_entropy(f, y) for f in raw)


def of_the_batch(raw, y):
    "A loss in which images of a batch have to do with each other."
    return sum(F.cross_entropy(f - f.mean(0), y) for f in raw)


NETS = {
    "cnn": lambda: cnn((1, 8, 8), 4, stages=2, width=4),
    "wrn": lambda: wrn(10, 1, (1, 8, 8), 4),  # batch normalisation: short batches stay short
}


def visits(net, loss=cross_entropy, lr=0.02, epochs=2, lengths=(24, 20, 9)):
    "Clients with unequal numbers of images, as `Visit`s."
    g = torch.Generator().manual_seed(0)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    images = ArrayData(torch.randn(24, 1, 8, 8, generator=g), torch.arange(24) % 4, range(4))
    data = [images.subset(slice(0, n)) for n in lengths]
    kind = next(net.parameters()).dtype
    rest = epochs, lr, 0.9, 1e-4, 8, loss, lambda x: net(x.to(kind))
    draw = lambda: torch.Generator().manual_seed(7)
    return [Visit(net, start, d, *rest, draw()) for d in data]


def alone(v):
    "Weights and loss of one client, by `fit`."
    v.net.load_state_dict(v.start)
    rest = v.epochs, v.lr, v.momentum, v.weight_decay, v.batch_size, v.loss
    loss = fit(v.net, v.data, *rest, torch.Generator().manual_seed(7), forward=v.forward)
    return {k: w.clone() for k, w in v.net.state_dict().items()}, loss


def largest(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("loss", [cross_entropy, of_the_batch])
@pytest.mark.parametrize("name", NETS)
def test_equal_to_the_loop(name, loss):
    "In float64: in float32 a rounding can push a unit to the other side of 0, and then more differs."
    torch.manual_seed(0)
    net = NETS[name]().double()
    for v, mine in zip(visits(net, loss), fit_together(visits(net, loss))):
        weights, value = alone(v)
        assert largest(weights, mine.weights) < 1e-7
        assert mine.losses[-1] == pytest.approx(value, rel=1e-5)


def test_frozen_weights_and_a_rest_of_one_image():
    net = NETS["cnn"]()
    net.stem.requires_grad_(False)
    made = visits(net, lengths=(17, 9))
    for v, mine in zip(made, fit_together(visits(net, lengths=(17, 9)))):
        assert largest(alone(v)[0], mine.weights) < 1e-5
        assert torch.equal(mine.weights["stem.weight"], v.start["stem.weight"])


def counting():
    calls = 0

    def loss(raw, y):
        nonlocal calls
        calls += 1
        return cross_entropy(raw, y)

    return loss


def beside(net):
    return lambda raw, y: cross_entropy(raw, y) + 0 * net.stem.weight.sum()


def many(tensors):
    return lambda raw, y: cross_entropy(raw, y) + tensors[0].sum()


@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda net: counting(), "its loss remembers something from step to step"),
        (beside, "its loss looks at a network"),
        (lambda net: many([torch.zeros(2)]), "its loss looks at a collection of tensors"),
    ],
)
def test_who_is_trained_alone_is_told_why(loss, words):
    net = NETS["cnn"]()
    assert fit_together(visits(net, loss(net))) == [words] * 3


def test_networks_that_cannot_be_stacked():
    net = NETS["cnn"]()
    net.stem = nn.Sequential(net.stem, nn.Dropout(0.5))
    assert "draws random numbers" in fit_together(visits(net))[0]


def test_a_loss_that_runs_away_is_told_as_fit_tells_it():
    net = NETS["cnn"]()
    made = visits(net, lr=1e20)
    for v, mine in zip(made, fit_together(made)):
        with pytest.raises(FloatingPointError, match="lower lr"):
            mine(net, v.data, v.epochs, v.lr)


@pytest.fixture(scope="module")
def digits():
    train, test = load("digits")[:2]
    train = train.subset(slice(0, 300))
    return train, test.subset(slice(0, 60)), make_clients(train.y, 5, seed=0)


def final(digits, name="eefl", **how):
    "Weights of a round."
    train, test, clients = digits
    method = METHODS.make(name, lr=0.02, participation=1.0)
    build = lambda: cnn(train.shape, train.n_classes, width=4)
    return simulate(method, build, train, test, clients, 1, progress=False, **how).state["net"]


@pytest.mark.parametrize("name", ["eefl", "calibrated_eefl", "scalefl"])
def test_a_round_is_the_loops_round(digits, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody is trained alone
        assert largest(final(digits, name), final(digits, name, stack=True)) < 1e-5


@pytest.mark.parametrize("name, words", [("inclusivefl", "ahead of each step"), ("depthfl", "tensors")])
def test_a_method_that_cannot_be_stacked_says_so_and_trains_as_ever(digits, name, words):
    with pytest.warns(UserWarning, match=f"one by one, because .*{words}"):
        got = final(digits, name, stack=True)
    assert largest(final(digits, name), got) == 0


def test_nothing_is_stacked_unasked(digits, monkeypatch):
    monkeypatch.setattr(engine, "fit_together", lambda *a: pytest.fail("stacked"))
    monkeypatch.setattr(stacked.Noted, "note", lambda *a: pytest.fail("noted"))
    want = final(digits)
    assert largest(want, final(digits, stack="auto")) == 0  # a CPU


def test_bf16_is_another_training_of_the_same_kind(digits):
    full, half = final(digits), final(digits, precision="bf16")
    assert 0 < largest(full, half) < 0.05


def test_bf16_gives_the_same_bits_with_two_processes(digits):
    assert largest(final(digits, precision="bf16"), final(digits, precision="bf16", workers=2)) == 0


def test_a_processor_that_is_slower_in_bf16_says_so_at_the_callers_line(digits, monkeypatch):
    from darkdistill_nb.exits import runner

    monkeypatch.setattr(runner, "_slower", lambda dtype: "bfloat16 is slower here")
    with pytest.warns(UserWarning, match="slower here") as told:
        final(digits, precision="bf16")
    assert [Path(w.filename).name for w in told if "slower here" in str(w.message)] == [
        "test_stacked.py"
    ]


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(stack="yes"), "stack='yes'"),
        (dict(precision="fp8"), "precision='fp8'"),
        (dict(stack=True, workers=2), "workers=2"),
        (dict(precision="bf16", engine="mine"), "engine='mine'"),
    ],
)
def test_clear_errors(digits, how, words):
    with pytest.raises(ValueError, match=words):
        final(digits, **how)


class Far:
    "An engine elsewhere."

    def answers(self, sent, drawn, rnd):
        return []

    def ask(self, question, state, clients):
        return {}


def test_an_engine_elsewhere_trains_in_its_own_way(digits):
    with pytest.raises(ValueError, match="None with stack or precision"):
        final(digits, engine=Far(), stack=True)

"""A federation that is small enough for tests: eight clients, digits, a CNN of width 4."""

from darkdistill_nb.core.datasets import load
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import make_clients

TRAIN, TEST = load("digits", n_train=320, n_test=60)
CLIENTS = make_clients(TRAIN.y, 8, 0.5)


def build():
    return cnn(TRAIN.shape, 10, width=4)


def go(method, clients=CLIENTS, rounds=2, net=build, **kw):
    "A run of a method, evaluated after its last round."
    kw = {"eval_every": rounds, "progress": False, **kw}
    return simulate(method, net, TRAIN, TEST, clients, rounds, **kw)

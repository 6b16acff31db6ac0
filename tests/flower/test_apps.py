"""Any method on Flower's simulation engine ends with the weights that `simulate` finds."""

import settings_here  # noqa: F401
import numpy as np
import pytest
import torch
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.federated.flower import FlowerPost, Parcel, _parcels, _records, flower_apps
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import make_clients

TRAIN, TEST = load("digits")
CLIENTS = make_clients(TRAIN.y, 8, gamma=0.5)
NAMES, ROUNDS, NODES = ["eefl", "darkdistill", "depthfl", "calibrated_eefl"], 5, 4


def build():
    return cnn(TRAIN.shape, 10, width=8)


class Marked:
    "A grid whose messages bear the name of a method."

    def __init__(self, grid, name):
        self.grid, self.name = grid, name

    def __getattr__(self, k):
        return getattr(self.grid, k)

    def push_messages(self, messages):
        for m in messages:
            m.metadata.group_id = self.name
        return self.grid.push_messages(messages)


@pytest.fixture(scope="module")
def runs():
    "The runs of several methods' apps; the engine starts once for all, with one worker."
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    got, apps = {}, {}
    for name in NAMES:
        keep = lambda run, name=name: got.__setitem__(name, run)
        work = TRAIN, TEST, CLIENTS, ROUNDS
        apps[name] = flower_apps(
            METHODS.make(name), build, *work, on_run=keep, nodes=NODES, wait=300
        )
    server, client = ServerApp(), ClientApp()

    @server.main()
    def play(grid, context):
        for name in NAMES:
            apps[name][0](Marked(grid, name), context)

    for kind in ("query", "train", "evaluate"):
        getattr(client, kind)()(lambda m, context: apps[m.metadata.group_id][1](m, context))
    one = dict(client_resources=dict(num_cpus=1, num_gpus=0), init_args=dict(num_cpus=1))
    run_simulation(server, client, num_supernodes=NODES, backend_config=one)
    return got


@pytest.mark.parametrize("name", NAMES)
def test_five_rounds_are_those_of_simulate(runs, name):
    here = simulate(METHODS.make(name), build, TRAIN, TEST, CLIENTS, ROUNDS, progress=False)
    far = runs[name]
    for part in ("net", "server", "objective"):
        assert far.state[part].keys() == here.state[part].keys()
        for k, v in here.state[part].items():
            assert torch.equal(v, far.state[part][k]), (part, k)
    kept = [k for k in here.log[0] if "seconds" not in k]
    for a, b in zip(far.log, here.log):
        assert {k: a[k] for k in kept} == {k: b[k] for k in kept}


def test_records_hold_every_kind_of_array():
    from flwr.app import Message

    arrays = dict(
        empty=np.zeros((0, 3), np.float32),
        scalar=np.array(7),
        flags=np.array([True, False]),
        double=np.array([1e-300]),
    )
    words = dict(client=3, loss=0.5, question="votes", seed=0)
    both = [Parcel(words, arrays), Parcel(dict(client=4))]
    message = Message(_records(both), dst_node_id=1, message_type="train")
    back, other = _parcels(message)
    assert other == both[1]
    assert back.words == words
    for k, a in arrays.items():
        assert back.arrays[k].dtype == a.dtype and back.arrays[k].shape == a.shape
        np.testing.assert_array_equal(back.arrays[k], a)


class Grid:
    "Flower's nodes and what each says it is; None: it never says."

    def __init__(self, nodes):
        self.nodes, self.asked, self.there = nodes, [], list(nodes)

    def get_node_ids(self):
        return self.there

    def push_messages(self, messages):
        start = len(self.asked)
        self.asked += messages
        return [f"m{start + i}" for i in range(len(messages))]

    def pull_messages(self, receipts):
        from flwr.app import Message

        out = []
        for i, m in enumerate(self.asked):
            words = self.nodes[m.metadata.dst_node_id]
            if words is not None and f"m{i}" in receipts:
                m.metadata._message_id = f"m{i}"
                m.metadata.__dict__["_src_node_id"] = 1
                out.append(Message(_records([Parcel(words)]), reply_to=m))
        return out


def found(post):
    return {k: (p.address, p.of) for k, p in post.where().items()}


def test_a_node_that_stays_silent_is_not_there():
    grid = Grid({11: dict(number=0, of=2), 22: None})
    assert found(FlowerPost(grid, enough=2, wait=0.5, pause=0.01)) == {0: (11, 2)}


def test_a_node_that_talks_nonsense_is_named():
    grid = Grid({11: dict(number=0, of=2), 22: dict(number=7, of=2), 33: {}})
    post = FlowerPost(grid, enough=2, wait=0.1, pause=0.01)
    with pytest.warns(UserWarning, match="node 22 has not said.*number=7 must be"):
        assert found(post) == {0: (11, 2)}


def test_a_number_belongs_to_the_first_that_names_it():
    grid = Grid({11: dict(number=0, of=2), 22: dict(number=0, of=2)})
    post = FlowerPost(grid, enough=2, wait=0.1, pause=0.01)
    with pytest.warns(UserWarning, match="node 22 says it is node 0, which another is already"):
        assert found(post) == {0: (11, 2)}
    grid.there = [22]  # the first is gone
    assert found(post) == {0: (22, 2)}


def test_a_node_with_a_key_is_not_asked():
    grid = Grid({11: dict(number=1, of=2), 22: dict(number=0, of=2)})
    post = FlowerPost(grid, enough=1, wait=1, known={11: 0}, pause=0.01)
    with pytest.warns(UserWarning, match="node 22 says it is node 0"):
        assert found(post) == {0: (11, None)}  # not what it, or another, would say
    assert [m.metadata.dst_node_id for m in grid.asked] == [22]

"""Methods whose clients fail, each in its own way; nodes import this file by its name."""

import os, sys, time
from pathlib import Path
import torch
from darkdistill_nb.federated.method import EEFL

ON_A_NODE = "clientapp" in sys.argv[0]  # the server trains clients, too, when it measures a run
NAN, SHAPE, BREAKS = 3, 6, 9  # clients of node 0 of 3
STUCK, LATE = 1, 2  # nodes


def wait_for(word, seconds=300):
    "Until the test says a word; tests and nodes here have one folder of words."
    end = time.monotonic() + seconds
    while not (Path(os.environ["ILL_WORDS"]) / word).exists() and time.monotonic() < end:
        time.sleep(0.1)


def say(word):
    (Path(os.environ["ILL_WORDS"]) / word).touch()


class Ill(EEFL):
    "Node 0: clients send NaN, a wrong shape, break down; node 1 never ends, node 2 ends too late."

    name = "ill"

    def local_update(self, weights, data, client, rnd, streams):
        update = super().local_update(weights, data, client, rnd, streams)
        if not ON_A_NODE:
            return update
        if client.id == NAN:
            update.weights["stem.bias"][0] = float("nan")
        if client.id == SHAPE:
            update.weights["stem.bias"] = torch.zeros(1)
        if client.id == BREAKS:
            raise RuntimeError("battery empty")
        if client.id % 3 == STUCK:
            say("begun")
            time.sleep(3600)
        if client.id == LATE:
            wait_for("over")
        return update

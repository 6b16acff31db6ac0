"""Clients from index lists that other tools have made, such as flwr-datasets: the structure of its partitioners stands in for them."""

import numpy as np
import pytest
import torch
from darkdistill_nb.core.datasets import load
from darkdistill_nb.federated.method import check_clients, make_clients

TRAIN, _ = load("digits", n_train=200, n_test=100)


class Partitioner:
    "What flwr-datasets' partitioners have: a dict from 0, 1, ... to a list or an array of indices, made at first use."

    def __init__(self, num_partitions, kind):
        self.num_partitions, self.kind = num_partitions, kind

    @property
    def partition_id_to_indices(self):
        order = np.random.default_rng(42).permutation(len(TRAIN))
        parts = np.array_split(order, self.num_partitions)
        return {i: self.kind(p) for i, p in enumerate(parts)}


@pytest.mark.parametrize("kind", [list, np.array, np.int32, torch.tensor, np.ndarray.tolist])
def test_every_kind_of_list_gives_the_same_clients(kind):
    lists = Partitioner(8, kind).partition_id_to_indices
    clients = make_clients(TRAIN.y, lists)
    check_clients(clients, len(TRAIN), 4)
    plain = make_clients(TRAIN.y, Partitioner(8, list).partition_id_to_indices)
    for a, b, (i, held) in zip(clients, plain, sorted(lists.items())):
        assert a.id == i and a.tier == b.tier
        assert torch.equal(a.train, b.train) and torch.equal(a.valid, b.valid)
        assert sorted(torch.cat([a.train, a.valid]).tolist()) == sorted(map(int, held))


def test_a_number_gives_the_clients_that_it_gave():
    "And their lists give them back, but for the order in which each list is shuffled."
    drawn = make_clients(TRAIN.y, 8)
    lists = [torch.cat([c.train, c.valid]) for c in drawn]
    again = make_clients(TRAIN.y, lists)
    assert [c.tier for c in again] == [c.tier for c in drawn]
    for a, b in zip(again, drawn):
        assert set(torch.cat([a.train, a.valid]).tolist()) == set(
            torch.cat([b.train, b.valid]).tolist()
        )


@pytest.mark.parametrize(
    "lists, words",
    [
        ([], "at least one client"),
        ([[0], [], [1], [2]], "client 1.*at least one image"),
        ([[0], [200], [1], [2]], "client 1.*within the 200 images"),
        ([[0], [-1], [1], [2]], "client 1.*within the 200 images"),
        ([[0], [1.5], [2], [3]], "client 1.*a tensor of indices"),
        ([[0], [True], [2], [3]], "client 1.*a tensor of indices"),
        ([[0, 1], [1], [2], [3]], "1 images twice"),
        ({"a": [0], "b": [1]}, "clients 0, 1"),
        ({0: [0], 2: [1]}, "clients 0, 1"),
        ([[0], [1]], "tier"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lists, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make_clients(TRAIN.y, lists)

"""DarkDistill's server step keeps gradients of the compared samples only; the weights are those of the plain loss."""

import pytest, torch
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn, wrn
from darkdistill_nb.exits.training import exit_partition
from darkdistill_nb.federated import darkdistill
from darkdistill_nb.federated.darkdistill import DarkDistill, alignment_weights
from darkdistill_nb.federated.method import Updates, make_clients

TRAIN, _ = load("digits", n_train=400)
CLIENTS = make_clients(TRAIN.y, 8, gamma=1.0)


def plain_loss(teacher, student, x, d, objective, rkd, tau, weights, generator, P):
    "The equation as it stands: features of the whole batch, then those of S."
    with torch.no_grad():
        at = teacher.features(x)
        S = exit_partition(objective.predict(teacher.classify(at)), P)[-1]
    a = student.features(x)
    with torch.no_grad():
        Q = exit_partition(objective.predict(student.classify(a)), P)
    if len(S) < 2 or min(map(len, Q)) == 0:
        return None
    w = torch.full((len(a),), 1 / len(a))
    if weights == "distance":
        w = alignment_weights(d[S], torch.stack([d[q].mean() for q in Q]), tau)
    return sum(w[e] * rkd(a[e][S], at[-1][S]) for e in range(len(a))) / len(a)


def stepped(build, tiers, **options):
    "Tier weights after one server step."
    method, s = DarkDistill(**options), Streams(0)
    with s.scope("init"):
        net = build()
    state = method.setup(net)
    asked = [c for c in CLIENTS if c.tier in tiers]
    updates = [
        method.local_update(method.send(state, c), TRAIN.subset(c.train), c, 0, s) for c in asked
    ]
    after, _, info = method.server_step(state, Updates(updates).tiers(), updates, 0, s)
    assert info["server_step"] and not info["server_step"].startswith("nothing")
    return {(m, k): v for m, (w, _) in after.items() for k, v in w.items()}


NETS = {
    "cnn": (lambda: cnn(TRAIN.shape, 10, width=8), (1, 2, 3, 4)),
    "wrn": (lambda: wrn(10, 1, TRAIN.shape, 10), (1, 2, 3)),  # batch norm
    "features": (lambda: wrn(10, 1, TRAIN.shape, 10, features=16), (1, 2, 3)),
}


@pytest.mark.parametrize("weights", ["distance", "uniform"])
@pytest.mark.parametrize("net", NETS)
def test_a_server_step_is_that_of_the_plain_loss(net, weights, monkeypatch):
    ours = stepped(*NETS[net], weights=weights)
    monkeypatch.setattr(darkdistill, "pair_loss", plain_loss)
    plain = stepped(*NETS[net], weights=weights)
    assert ours.keys() == plain.keys()
    for k, v in plain.items():
        assert float((ours[k] - v).abs().max()) <= 1e-6, k


def test_only_compared_samples_carry_a_graph():
    net, rows = cnn(TRAIN.shape, 10, width=8).eval(), []
    x = torch.randn(10, *net.latent_shape())
    real, net.features = (
        net.features,
        lambda z: rows.append((len(z), torch.is_grad_enabled())) or real(z),
    )
    part, every = darkdistill._asked_of(net, x, torch.tensor([2, 5, 9]))
    assert rows == [(3, True), (7, False)]
    assert [len(v) for v in part] == [3] * 4 and [len(v) for v in every] == [10] * 4
    rows.clear()
    part, every = darkdistill._asked_of(net, x, torch.arange(10))
    assert rows == [(10, True)] and part is every

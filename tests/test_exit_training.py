"""Ways to train exits: the acceptance numbers of BoostNet, gradient equilibrium, L2W-DEN and the exit partition, and what no objective may do."""

import copy, math, pickle
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import load
from darkdistill_nb.distill.losses import CropFlip, kd_loss
from darkdistill_nb.exits.networks import EarlyExitNet, Exit, cnn, vit, wrn
from darkdistill_nb.core.registry import OBJECTIVES
from darkdistill_nb.exits.training import (
    BoostNet,
    Joint,
    L2W,
    Mutual,
    SelfDistillation,
    WeightNet,
    compare_exits,
    difficulty_experiment,
    exit_losses,
    exit_partition,
    exit_shares,
    exit_weights,
    fit_exits,
    gradient_share,
    paired_gain,
    objective_by_name,
    sample_weights,
    sgd_step,
    train_exits,
)
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")

g = torch.Generator()


def logits(E, n=16, K=10, seed=0, grad=True):
    return [
        torch.randn(n, K, generator=g.manual_seed(100 * seed + e)).requires_grad_(grad)
        for e in range(E)
    ]


def labels(n=16, K=10):
    return torch.arange(n) % K


def batch(n, shape, K=10, seed=0):
    return torch.randn(n, *shape, generator=g.manual_seed(seed)), torch.arange(n) % K


def sgd(net, **kwargs):
    return torch.optim.SGD(
        net.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **kwargs}
    )


def small(shape=(1, 8, 8), stages=3, seed=0, **kwargs):
    with Streams(seed).scope("init"):
        return cnn(shape, 10, stages=stages, width=4, **kwargs)


# ---------------------------------------------------------------- joint training and its weights


def test_weightings():
    assert exit_weights(None, 3) == exit_weights("msdnet", 3) == [1, 1, 1]
    for E in (1, 3, 4, 7):
        assert exit_weights("eenet", E) == pytest.approx(
            [e / (E * (E + 1)) for e in range(1, E + 1)]
        )
        assert (
            exit_weights("pabee", E)
            == exit_weights("scalefl", E)
            == pytest.approx([e / sum(range(1, E + 1)) for e in range(1, E + 1)])
        )
    raw, y = logits(3), labels()
    ce = [F.cross_entropy(f, y) for f in raw]
    for weights, expected in (
        ("eenet", (1 / 12, 2 / 12, 3 / 12)),
        ("pabee", (1 / 6, 2 / 6, 3 / 6)),
        ([1, 0.3, 0.3], (1, 0.3, 0.3)),
        ([2, 1, 1, 5], (2, 1, 1)),
    ):
        assert torch.allclose(
            Joint(weights).loss(raw, y)[0], sum(w * c for w, c in zip(expected, ce))
        )


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0, 0.3], "has 2 entries, but the network has 3 exits"),
        ([0, 0, 0], "not all 0"),
        ([1, -1, 1], r"weights\[1\]=-1 must be"),
        ([1, math.nan, 1], r"weights\[1\]=nan must be"),
        ("last", "weights='last' is unknown; choose one of msdnet"),
    ],
)
def test_bad_weights(weights, message):
    for objective in (Joint, lambda w: BoostNet(weights=w)):
        with pytest.raises(ValueError, match=message):
            objective(weights).loss(logits(3), labels())


def test_eenet_adds_the_last_exits_divergence_late():
    p, raw, y = Joint("eenet", kl=0.01), logits(4), labels()
    plain = Joint("eenet").loss(raw, y)[0]
    p.at(299, of=400)
    assert p.loss(raw, y)[0] == plain
    p.at(300, of=400)
    assert torch.allclose(
        p.loss(raw, y)[0] - plain, 0.01 * sum(kd_loss(f, raw[-1], 3.0) for f in raw[:-1]), atol=1e-6
    )
    p.at(300)
    assert p.loss(raw, y)[0] == plain, "nobody said how long training is"


# ---------------------------------------------------------------- checks 7 and 8: BoostNet and gradient equilibrium


def test_boostnet_by_hand():
    raw = [torch.tensor([v], requires_grad=True) for v in ([2.0, 0], [0.0, 1], [1.0, 1])]
    p, y = BoostNet(0.2), torch.tensor([0])
    loss, out = p.loss(raw, y)
    for f, expected in zip(out, ([2, 0], [0.4, 1], [1.08, 1.2])):
        assert torch.allclose(f, torch.tensor([expected]).float(), atol=1e-7)
    assert torch.autograd.grad(out[2].sum(), raw, allow_unused=True, retain_graph=True)[:2] == (
        None,
        None,
    ), "dF_3/df_1 and dF_3/df_2 are cut"
    assert all(map(torch.equal, p.predict(raw), out))
    for e, d in enumerate(torch.autograd.grad(loss, raw)):
        assert torch.allclose(d, out[e].softmax(-1) - F.one_hot(y, 2), atol=1e-6)


@pytest.mark.parametrize("objective", [Joint(), BoostNet(0.5), L2W(), Mutual(), SelfDistillation()])
def test_step_by_step_is_predict(objective):
    raw, before = logits(4), None
    for f, decided in zip(raw, objective.predict(raw)):
        before = objective.step(f, before)
        assert torch.equal(before, decided)


def test_prefix_uses_its_own_exits():
    raw, y = logits(4), labels()
    for name in OBJECTIVES:
        if name == "l2w":
            continue  # its weights depend on all losses it sees
        assert all(
            map(
                torch.equal,
                objective_by_name(name).predict(raw)[:2],
                objective_by_name(name).predict(raw[:2]),
            )
        )
        assert torch.equal(
            objective_by_name(name).loss(raw[:1], y)[0], F.cross_entropy(raw[0], y)
        ), "one exit: plain cross-entropy"


@pytest.mark.parametrize(
    "ge, expected",
    [("full", [1, 1, 1, 1]), ("released", [0.4167, 0.6667, 1, 1]), ("none", [4, 3, 2, 1])],
)
def test_gradient_equilibrium(ge, expected):
    "Identity trunk, unit own gradients; an objective's `ge` goes to the network, and forward values do not depend on it."
    seen = {}

    class Tap(nn.Module):
        def __init__(self, e):
            super().__init__()
            self.e = e

        def forward(self, z):
            z = z * 1.0
            z.register_hook(lambda v: seen.__setitem__(self.e, v.item()))
            return z

    def net(E):
        return EarlyExitNet(
            nn.Identity(),
            [Tap(e) for e in range(E)],
            [Exit(nn.Identity(), 1, 1) for _ in range(E)],
            (1,),
            1,
        )

    for E, want in ((4, expected), (1, [1])):
        a = net(E).features(torch.full((1, 1), 3.0, requires_grad=True), BoostNet(ge=ge).ge)
        assert [v.item() for v in a] == [3.0] * E
        sum(v.sum() for v in a).backward()
        assert [seen[e] for e in range(E)] == pytest.approx(want, abs=1e-4)
    for objective in (BoostNet, Joint):
        with pytest.raises(ValueError, match="ge='half' must be one of full, released, none"):
            objective(ge="half")


# ---------------------------------------------------------------- check 9: the weights of L2W-DEN


def test_weights_by_hand():
    w = sample_weights(torch.tensor([[0.5, -0.5, 0.2, 0.0]]), 0.8, "col")
    assert torch.allclose(w, torch.tensor([[1.36, 0.56, 1.12, 0.96]]), atol=1e-6)
    assert float(w.sum()) == pytest.approx(4, abs=1e-6)


@pytest.mark.parametrize("mode, axes", [("col", 1), ("row", 0), ("mat", (0, 1))])
def test_weights_have_mean_one(mode, axes):
    u = torch.rand(32, 4, generator=g.manual_seed(3)) * 2 - 1
    w = sample_weights(u, 0.8, mode)
    assert float(w.mean()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(w.mean(axes), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("mode", ["col", "row", "mat"])
def test_constant_weight_net_is_joint_training(mode):
    p, raw, y = L2W(mode=mode), logits(4), labels()
    with torch.no_grad():
        W = p.weight_net(4)
        W.outer.weight.zero_()
        W.outer.bias.fill_(0.7)
    assert torch.allclose(p.loss(raw, y)[0], Joint().loss(raw, y)[0], atol=1e-6)


def test_one_exit_has_weight_one():
    p, raw, y = L2W(), logits(1), labels()
    assert torch.equal(p.weights_of(exit_losses(raw, y)), torch.ones(16, 1))
    assert torch.isclose(p.loss(raw, y)[0], Joint().loss(raw, y)[0], rtol=1e-6)  # other sums
    net, (x, y) = small(stages=1), batch(8, (1, 8, 8))
    old = copy.deepcopy(p.weight_net(1).state_dict())
    assert p.meta_step(net, x, y, sgd(net)) is None
    assert all(torch.equal(v, old[k]) for k, v in p.weight_net(1).state_dict().items())


def test_sign_of_weights():
    "tanh bounds w by 1 - 2 eps from below: eps 0.5 keeps all weights positive, 0.8 does not from three exits on."
    u = torch.tanh(
        50 * (1.3 + torch.randn(4000, 4, generator=g.manual_seed(0)))
    )  # saturated, nine of ten near +1
    for mode in ("col", "row", "mat"):
        assert sample_weights(u, 0.5, mode).min() >= 0
        assert sample_weights(u, 0.8, mode).min() < 0
    assert sample_weights(u[:, :2], 0.8, "col").min() > 0


def test_weight_net_of_a_prefix():
    p, y = L2W(exits=4), labels()
    for E in (1, 3, 4):
        assert p.weights_of(exit_losses(logits(E), y)).shape == (16, E)
    W = WeightNet(4, 8)
    full = WeightNet(2, 8)
    with torch.no_grad():
        full.inner.weight.copy_(W.inner.weight[:, :2])
        full.inner.bias.copy_(W.inner.bias)
        full.outer.weight.copy_(W.outer.weight[:2])
        full.outer.bias.copy_(W.outer.bias[:2])
    v = torch.rand(5, 2)
    assert torch.allclose(W(v), full(v), atol=1e-6)
    with pytest.raises(
        ValueError, match="losses have 5 columns, but this weight net was made for 4 exits"
    ):
        p.weights_of(torch.rand(3, 5))


# ---------------------------------------------------------------- check 10: the meta step


@pytest.mark.parametrize("mode", ["col", "row", "mat"])
def test_meta_gradient_against_finite_differences(mode):
    "A two-layer network in 64 bit; relative error of the whole gradient in a random direction and entry by entry."
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(i, 8), nn.Tanh()) for i in (6, 8)]
    net = EarlyExitNet(
        nn.Flatten(), stages, [Exit(nn.Identity(), 8, 3) for _ in range(2)], (6,), 3
    ).double()
    p = L2W(mode=mode, hidden=5)
    W = p.weight_net(2).double()
    opt = sgd(net, lr=0.5)
    (x, y), (x2, y2) = batch(10, (6,), 3), batch(11, (6,), 3, seed=1)
    learn, judge = (x.double(), y), (x2.double(), y2)
    p.loss(net(learn[0]), learn[1])[0].backward()
    opt.step()
    params = list(W.parameters())
    meta = lambda: p.meta_loss(net, learn, judge, opt)
    exact = torch.autograd.grad(meta(), params)
    direction = [torch.randn_like(v) for v in params]

    def at(h):
        with torch.no_grad():
            for v, d in zip(params, direction):
                v += h * d
        value = float(meta().detach())
        with torch.no_grad():
            for v, d in zip(params, direction):
                v -= h * d
        return value

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    got = float(sum((d * e).sum() for d, e in zip(direction, exact)))
    assert abs(got) > 1e-4 and abs(slope - got) < 1e-3 * abs(got)


@pytest.mark.parametrize(
    "kind",
    [dict(momentum=0.0), dict(), dict(nesterov=True), dict(dampening=0.3), dict(weight_decay=0.0)],
)
def test_virtual_step_is_the_optimisers_step(kind):
    net = small()
    opt = sgd(net, **({"weight_decay": 0.01} | kind))
    x, y = batch(12, (1, 8, 8))
    for _ in range(3):
        opt.zero_grad()
        Joint().loss(net(x), y)[0].backward()
        after = sgd_step(net, {n: p.grad for n, p in net.named_parameters()}, opt)
        opt.step()
        for n, p in net.named_parameters():
            assert torch.allclose(after[n], p, atol=1e-6), n
    with pytest.raises(ValueError, match="optimizer='Adam' must be an SGD"):
        sgd_step(net, {}, torch.optim.Adam(net.parameters()))


class Noisy(nn.Module):
    "A stage with everything that has a state: batch normalisation and dropout."

    def __init__(self, i, o):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, z):
        return self.body(z)


def noisy_net():
    return EarlyExitNet(
        nn.Flatten(),
        [Noisy(6, 8), Noisy(8, 8)],
        [Exit(nn.Identity(), 8, 3) for _ in range(2)],
        (6,),
        3,
    )


@pytest.mark.parametrize(
    "build, shape, K", [(noisy_net, (6,), 3), (lambda: wrn(10, 1, (1, 8, 8), 10), (1, 8, 8), 10)]
)
def test_meta_step_leaves_everything_else_alone(build, shape, K):
    net = build()
    opt = sgd(net)
    x, y = batch(13, shape, K)
    p = L2W()
    p.loss(net(x), y)[0].backward()
    opt.step()
    grads = [v.grad.clone() for v in net.parameters()]
    old = copy.deepcopy((net.state_dict(), opt.state_dict()))
    W = copy.deepcopy(p.weight_net(len(net)).state_dict())
    rng = torch.get_rng_state()
    assert torch.isfinite(p.meta_step(net, x, y, opt))
    assert torch.equal(torch.get_rng_state(), rng) and net.training
    for k, v in net.state_dict().items():
        assert torch.equal(v, old[0][k]), k
    assert all(torch.equal(v.grad, d) for v, d in zip(net.parameters(), grads))
    state = opt.state_dict()
    assert state["param_groups"] == old[1]["param_groups"]
    assert state["state"].keys() == old[1]["state"].keys()
    for k, v in state["state"].items():
        assert torch.equal(v["momentum_buffer"], old[1]["state"][k]["momentum_buffer"])
    now = p.weight_net(len(net))
    assert any(not torch.equal(v, W[k]) for k, v in now.state_dict().items())
    assert all(v.grad is None for v in now.parameters())


def test_fresh_optimiser_stays_fresh():
    "Looking for a momentum buffer must not create an entry in the optimiser's state."
    net = small()
    opt = sgd(net)
    L2W().meta_step(net, *batch(8, (1, 8, 8)), opt)
    assert len(opt.state) == 0


def test_meta_step_trains_what_the_optimiser_trains():
    "Frozen parameters, as under LoRA, take no part; neither do parameters that the optimiser does not hold."
    net = small()
    net.stem.weight.requires_grad_(False)
    head = torch.optim.SGD(net.exits.parameters(), lr=0.1)
    assert torch.isfinite(L2W().meta_step(net, *batch(8, (1, 8, 8)), head))


def test_interval_and_small_batches():
    net = small()
    opt = sgd(net)
    x, y = batch(8, (1, 8, 8))
    p = L2W(interval=3)
    assert [p.meta_step(net, x, y, opt) is not None for _ in range(7)] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert L2W().meta_step(net, x[:1], y[:1], opt) is None, "one sample has no halves"
    assert L2W().meta_step(net, x[:3], y[:3], opt) is not None
    for bad in (
        dict(interval=0),
        dict(eps=-0.1),
        dict(eps=1.2),
        dict(mode="all"),
        dict(P=0),
        dict(hidden=0),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            L2W(**bad)


def test_meta_step_through_attention():
    "Fused attention cannot be differentiated twice; the meta step asks for the plain one."
    net = vit(
        "vit_tiny_patch16_224",
        exits=(1, 2),
        n_classes=10,
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=16,
        depth=2,
        num_heads=2,
    )
    assert torch.isfinite(L2W().meta_step(net, *batch(8, (1, 8, 8)), sgd(net)))


def test_weight_net_learns_which_samples_help():
    "Some labels are wrong, and their loss gives them away: judged by samples with right labels, W learns to ignore them."
    y = torch.arange(64) % 4
    x = 3.0 * F.one_hot(y, 4) + 0.1 * torch.randn(64, 4, generator=g.manual_seed(0))
    with Streams(0).scope("init"):
        net = EarlyExitNet(
            nn.Flatten(),
            [nn.Identity()] * 2,
            [Exit(nn.Identity(), 4, 4) for _ in range(2)],
            (4,),
            4,
        )
    opt = sgd(net, lr=0.3, momentum=0.0)
    for _ in range(30):
        opt.zero_grad()
        Joint().loss(net(x), y)[0].backward()
        opt.step()
    noisy = y.clone()
    noisy[::5] = (y[::5] + 1) % 4
    wrong = noisy != y
    p = L2W(mode="row", P=20, hidden=20)
    W = p.weight_net(2)
    adam = torch.optim.Adam(W.parameters(), lr=0.02)
    for _ in range(40):
        adam.zero_grad()
        p.meta_loss(net, (x, noisy), (x, y), opt).backward(inputs=list(W.parameters()))
        adam.step()
    w = p.weights_of(exit_losses(net(x), noisy)).detach()
    assert w[wrong].mean() < 0.5 and w[~wrong].mean() > 1.05


# ---------------------------------------------------------------- check 11: the exit partition


def test_exit_partition():
    for E, expected in ((2, [12, 20]), (3, [6, 10, 16]), (4, [3, 5, 8, 16])):
        parts = exit_partition(logits(E, 32), 30)
        assert [len(p) for p in parts] == expected
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(32))
    assert [len(p) for p in exit_partition(logits(4, 4), 30)] == [0, 0, 1, 3]
    raw = logits(3, 32)
    first = exit_partition(raw, 30)[0]
    conf = raw[0].softmax(-1).amax(-1)
    assert set(first.tolist()) == set(conf.topk(6).indices.tolist()), (
        "the most confident leave first"
    )
    assert exit_shares(5, 15) == pytest.approx([0.3278, 0.2458, 0.1844, 0.1383, 0.1037], abs=1e-4)


# ---------------------------------------------------------------- exits that teach each other (check 13, the parts without federation)


def ramp(t):
    m = Mutual()
    m.at(t)
    return m.share()


def test_mutual_distillation():
    assert [ramp(t) for t in (0, 150, 300, 500)] == pytest.approx([0.00674, 0.2865, 1, 1], abs=5e-5)
    m, raw, y = Mutual(ramp=0), logits(4), labels()
    joint = Joint().loss(raw, y)[0]
    assert torch.equal(m.loss([raw[0]] * 4, y)[0], Joint().loss([raw[0]] * 4, y)[0]), (
        "equal logits: KD = 0"
    )
    assert torch.equal(m.loss(raw[:1], y)[0], Joint().loss(raw[:1], y)[0]), "one exit: no KD term"
    assert torch.allclose(
        m.loss(raw, y)[0],
        joint + sum(kd_loss(f, h, 1.0) for f in raw for h in raw if f is not h) / 3,
        atol=1e-5,
    )
    late = Mutual()
    late.at(150)
    assert torch.allclose(
        late.loss(raw, y)[0] - joint, 0.2865 * (m.loss(raw, y)[0] - joint), rtol=1e-3
    )
    for e in range(4):  # the gradient at an exit is that of a student whose teachers are constants
        alone = (
            F.cross_entropy(raw[e], y)
            + sum(kd_loss(raw[e], raw[j].detach(), 1.0) for j in range(4) if j != e) / 3
        )
        assert torch.allclose(
            torch.autograd.grad(m.loss(raw, y)[0], raw[e])[0],
            torch.autograd.grad(alone, raw[e])[0],
            atol=1e-6,
        )


def test_last_exit_learns_from_labels_alone():
    raw, y = logits(4), labels()
    d = torch.autograd.grad(SelfDistillation(alpha=0.5).loss(raw, y)[0], raw)
    assert torch.allclose(
        d[3], torch.autograd.grad(F.cross_entropy(raw[3], y), raw[3])[0], atol=1e-6
    )
    student = 0.5 * F.cross_entropy(raw[0], y) + 0.5 * kd_loss(raw[0], raw[3].detach(), 3.0)
    assert torch.allclose(d[0], torch.autograd.grad(student, raw[0])[0], atol=1e-6)
    assert torch.allclose(
        SelfDistillation(alpha=0.0).loss(raw, y)[0], Joint().loss(raw, y)[0], atol=1e-5
    )


# ---------------------------------------------------------------- all policies


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "n, E, dtype, scale",
    [
        (1, 4, torch.float32, 1),
        (8, 4, torch.bfloat16, 1),
        (8, 4, torch.float16, 1),
        (8, 1, torch.float32, 1),
        (8, 3, torch.float32, 1e4),
    ],
)
def test_edges(name, n, E, dtype, scale):
    p = objective_by_name(name)
    raw = [(scale * f.detach()).to(dtype).requires_grad_() for f in logits(E, n)]
    value, out = p.loss(raw, labels(n))
    value.backward()
    assert torch.isfinite(value) and value.dtype == torch.float32 and len(out) == E
    assert all(torch.isfinite(f.grad).all() for f in raw)
    assert all(map(torch.equal, out, p.predict(raw)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policies_train_and_travel(name):
    "Every objective drives `fit_exits` on float32 and bfloat16 networks, and can be sent to another process."
    data = load("digits", 200)[0]
    for amp in (False, True):
        net, p = small(), objective_by_name(name)
        rows = fit_exits(
            net, data, p, 2, lr=0.05, batch_size=40, amp=amp, augment=CropFlip(1, flip=False)
        )
        assert [r["epoch"] for r in rows] == [0, 1]
        assert rows[1]["loss"] < rows[0]["loss"]
        assert all(torch.isfinite(v).all() for v in net.parameters())
    raw, y = logits(3), labels()
    assert torch.equal(pickle.loads(pickle.dumps(p)).loss(raw, y)[0], p.loss(raw, y)[0])
    assert torch.equal(copy.deepcopy(p).loss(raw, y)[0], p.loss(raw, y)[0])


def test_names_and_options():
    assert set(OBJECTIVES) == {"joint", "boostnet", "l2w", "self_distillation", "mutual"}
    assert objective_by_name("l2w", eps=0.3, mode="mat").eps == 0.3
    assert objective_by_name("joint", weights="eenet").weights == "eenet"
    with pytest.raises(
        ValueError,
        match="objective='boost' is unknown .did you mean 'boostnet'..; choose one of joint, boostnet, l2w, self_distillation, mutual",
    ):
        objective_by_name("boost")
    with pytest.raises(ValueError, match="objective 'mutual' has no option 'w'; it has ramp, T"):
        objective_by_name("mutual", w=1)


# ---------------------------------------------------------------- the driver and the comparison


def test_driver_repeats_fit():
    data = load("digits", 200)[0]
    a, b = small(), small()
    fit(
        a,
        data,
        2,
        0.05,
        batch_size=64,
        forward=lambda x: a(x, "full"),
        loss=lambda raw, y: BoostNet().loss(raw, y)[0],
        generator=g.manual_seed(1),
    )
    fit_exits(b, data, BoostNet(), 2, 0.05, cosine=False, generator=g.manual_seed(1))
    assert all(map(torch.equal, a.parameters(), b.parameters()))


def test_meta_steps_do_not_disturb_training():
    "With eps = 0 all weights are 1: L2W with meta steps and Joint end in the same place, also with batch normalisation and dropout."
    y = labels(120, 3)
    data = ArrayData(torch.randn(120, 1, 1, 6, generator=g.manual_seed(0)), y)

    def end(objective):
        with Streams(0).scope("init"):
            net = noisy_net()
        with Streams(0).scope("train"):
            fit_exits(net, data, objective, 3, generator=Streams(0).generator("order"))
        return net.state_dict()

    a, b, c = end(Joint()), end(L2W(eps=0.0)), end(L2W())
    same = lambda other: all(
        torch.allclose(v.float(), other[k].float(), atol=1e-5) for k, v in a.items()
    )
    assert same(b) and not same(c)


def test_cosine_and_epochs_reach_the_policy():
    seen, steps = [], []

    class Spy(Joint):
        def at(self, t, of=None):
            super().at(t, of)
            seen.append((t, of))

        def meta_step(self, net, x, y, optimizer):
            steps.append(optimizer.param_groups[0]["lr"])

    fit_exits(small(), load("digits", 128)[0], Spy(), 2, lr=0.1, batch_size=64)
    assert seen[1:] == [(0, 2), (1, 2)]
    assert steps == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit_exits(small(), load("digits", 128)[0], Joint(), lr=1e30)


def test_pairs_share_first_weights_and_order():
    train, test = load("digits", 100, 50)
    ways = dict(Joint=Joint, twin=lambda: Joint([1, 1, 1]), L2W=lambda: L2W(interval=2))
    r = compare_exits(ways, lambda: small(), train, test, seeds=(3, 4), epochs=1)
    assert r["Joint"][0]["accuracy"] == r["twin"][0]["accuracy"]
    assert [v["seed"] for v in r["L2W"]] == [3, 4]
    assert all(
        map(torch.equal, r["Joint"][1]["net"].parameters(), r["twin"][1]["net"].parameters())
    )
    again = train_exits(lambda: small(), train, test, L2W(interval=2), 3, epochs=1)
    assert again["accuracy"] == r["L2W"][0]["accuracy"]
    assert all(map(torch.equal, again["net"].parameters(), r["L2W"][0]["net"].parameters()))
    gain = paired_gain(r)
    assert gain["twin"].shape == (2, 3) and not gain["twin"].any()
    with pytest.raises(ValueError, match="base='Boost' was not trained"):
        paired_gain(r, "Boost")


# ---------------------------------------------------------------- a checkpoint belongs to one training


def with_checkpoint(
    path, objective=None, data=None, seed=0, dropout=0.0, global_seed=0, net=None, **how
):
    data = data or load("digits", 100)[0]
    net = net or small(seed=seed)
    net.stem = nn.Sequential(net.stem, nn.Dropout(dropout))
    torch.manual_seed(global_seed)
    settings = {
        **dict(epochs=2, lr=0.05, batch_size=40, generator=torch.Generator().manual_seed(seed)),
        **how,
    }
    rows = fit_exits(net, data, objective or Joint(), checkpoint=path, **settings)
    return net.state_dict(), rows


def other_data(what):
    data = load("digits", 100)[0]
    data = data.subset(slice(None))
    if what == "labels":
        data.y = data.y.roll(1)
    elif what == "pixel":
        data.x = data.x.clone()
        data.x[0, 0, 3, 3] += 1
    else:
        data = ArrayData(data.x, data.y, data.classes, (0.2,), data.std)
    return data


def frozen_net():
    net = small()
    net.stem.weight.requires_grad_(False)
    return net


OTHERS = dict(
    objective=(lambda: dict(objective=BoostNet()), "objective"),
    option=(lambda: dict(objective=Joint(kl=0.1)), "objective"),
    own_objective=(
        lambda: dict(
            objective=type(
                "Joint", (Joint,), dict(loss=lambda self, raw, y: Joint.loss(self, raw, y))
            )()
        ),
        "objective",
    ),
    lr=(lambda: dict(lr=0.5), r"lr=0.5 \(in the file 0.05\)"),
    epochs=(lambda: dict(epochs=1), r"epochs=1 \(in the file 2\)"),
    more=(lambda: dict(epochs=3), r"epochs=3 \(in the file 2\)"),
    batch_size=(lambda: dict(batch_size=20), "batch_size=20"),
    momentum=(lambda: dict(momentum=0.5), "momentum=0.5"),
    weight_decay=(lambda: dict(weight_decay=0.0), "weight_decay=0"),
    cosine=(lambda: dict(cosine=False), "cosine=False"),
    amp=(lambda: dict(amp=True), "amp=True"),
    augment=(lambda: dict(augment=CropFlip(1)), "augment"),
    optimizer=(lambda: dict(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01)), "optimizer"),
    order=(lambda: dict(generator=torch.Generator().manual_seed(5)), "another generator"),
    stored_order=(lambda: dict(generator=None), "another generator"),
    seed=(lambda: dict(seed=1), "another weights, another generator"),
    labels=(lambda: dict(data=other_data("labels")), "another data"),
    pixel=(lambda: dict(data=other_data("pixel")), "another data"),
    mean=(lambda: dict(data=other_data("mean")), "another data"),
    fewer=(lambda: dict(data=load("digits", 90)[0]), "another data"),
    frozen=(lambda: dict(net=frozen_net()), "another weights"),
)


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, case):
    path, (how, text) = tmp_path / "c.safetensors", OTHERS[case]
    with_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=text) as e:
        with_checkpoint(path, **how())
    assert str(path) in str(e.value)
    assert f"delete {path}" in str(e.value)
    assert path.read_bytes() == before


def test_augmentations_differ_by_their_numbers(tmp_path):
    def noise(size):
        return lambda x, g: x + size * torch.randn(x.shape, generator=g)

    with_checkpoint(tmp_path / "c", augment=noise(0.1))
    assert len(with_checkpoint(tmp_path / "c", augment=noise(0.1))[1]) == 2
    with pytest.raises(ValueError, match="another augment"):
        with_checkpoint(tmp_path / "c", augment=noise(0.2))


def test_dropout_follows_the_global_generator(tmp_path):
    "Without dropout nobody asks where torch's own generator stands; with it the weights depend on that."
    with_checkpoint(tmp_path / "a")
    assert len(with_checkpoint(tmp_path / "a", global_seed=7)[1]) == 2
    with_checkpoint(tmp_path / "b", dropout=0.5)
    assert len(with_checkpoint(tmp_path / "b", dropout=0.5)[1]) == 2
    with pytest.raises(ValueError, match="rng"):
        with_checkpoint(tmp_path / "b", dropout=0.5, global_seed=7)


def test_the_same_training_is_continued(tmp_path):
    "numpy's numbers and a copy of the data are the same training; a finished one is read."
    first, rows = with_checkpoint(tmp_path / "c")
    data = load("digits", 100)[0]
    again, read = with_checkpoint(
        tmp_path / "c", data=data.subset(torch.arange(100)), lr=np.float64(0.05), epochs=np.int64(2)
    )
    assert read == rows and all(torch.equal(v, first[k]) for k, v in again.items())


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    from darkdistill_nb.core.records import save_tensors

    save_tensors(tmp_path / "w.safetensors", small().state_dict())
    for path, text in (
        (tmp_path / "w.safetensors", "does not say which training"),
        (tmp_path, "the name of a file"),
    ):
        with pytest.raises(ValueError, match=text):
            with_checkpoint(path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with_checkpoint(tmp_path / "c")
    data = bytearray((tmp_path / "c").read_bytes())
    data[-20] ^= 4
    (tmp_path / "c").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        with_checkpoint(tmp_path / "c")


# ---------------------------------------------------------------- frozen parts, shared parts, batches of one


def test_frozen_normalisation_stays_frozen():
    with Streams(0).scope("init"):
        net = wrn(10, 1, (1, 8, 8), 10)
    norm = (
        net.stages[1].bn1
        if hasattr(net.stages[1], "bn1")
        else next(m for m in net.stages[1].modules() if isinstance(m, nn.BatchNorm2d))
    )
    norm.requires_grad_(False).eval()
    other = next(m for m in net.stages[0].modules() if isinstance(m, nn.BatchNorm2d))
    start = norm.running_mean.clone(), other.running_mean.clone()
    fit_exits(net, load("digits", 100)[0], Joint(), 2, on_epoch=lambda row, net: net.eval())
    assert torch.equal(norm.running_mean, start[0])
    assert not torch.equal(other.running_mean, start[1])


def shared_net():
    with Streams(0).scope("init"):
        net = cnn((1, 8, 8), 10, stages=2, width=4)
    net.exits[1].fc = net.exits[0].fc
    return net


def test_exits_that_share_a_classifier(tmp_path):
    "Both names keep one value, also after a kill; the result is that of training without a checkpoint."

    class Killed(Exception):
        pass

    def kill(row, net):
        raise Killed

    data, go = (
        load("digits", 100)[0],
        lambda net, **how: fit_exits(
            net, data, Joint(), 2, generator=torch.Generator().manual_seed(0), **how
        ),
    )
    whole, resumed = shared_net(), shared_net()
    go(whole)
    with pytest.raises(Killed):
        go(shared_net(), checkpoint=tmp_path / "c", on_epoch=kill)
    go(resumed, checkpoint=tmp_path / "c")
    assert resumed.exits[1].fc.weight is resumed.exits[0].fc.weight
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize(
    "objective, n, good",
    [(Joint, 33, False), (Joint, 34, True), (L2W, 34, False), (L2W, 35, False), (L2W, 36, True)],
)
def test_batches_too_small_for_normalisation_are_refused(objective, n, good):
    data = ArrayData(torch.randn(n, 1, 1, 6, generator=g.manual_seed(0)), labels(n, 3))
    go = lambda: fit_exits(noisy_net(), data, objective(), batch_size=32)
    if good:
        assert len(go()) == 1
    else:
        with pytest.raises(ValueError, match="batch_size=32 must be another number"):
            go()


# ---------------------------------------------------------------- arguments

nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: Joint(T=nan), "T=nan"),
        (lambda: Joint(T=0), "T=0"),
        (lambda: Joint(kl=inf), "kl=inf"),
        (lambda: Joint(late=nan), "late=nan"),
        (lambda: Joint(weights=5), "weights=5"),
        (lambda: Joint(weights=[]), "weights="),
        (lambda: Joint(weights=["1"]), "weights.0.='1'"),
        (lambda: Joint(ge=None), "ge=None"),
        (lambda: Joint().at(nan), "t=nan"),
        (lambda: BoostNet(w=nan), "w=nan"),
        (lambda: BoostNet(w=-1), "w=-1"),
        (lambda: BoostNet(w="x"), "w='x'"),
        (lambda: L2W(lr=nan), "lr=nan"),
        (lambda: L2W(weight_decay=-1), "weight_decay=-1"),
        (lambda: L2W(interval=1.5), "interval=1.5"),
        (lambda: L2W(hidden=2.5), "hidden=2.5"),
        (lambda: L2W(exits=0), "exits=0"),
        (lambda: L2W(seed=0.5), "seed=0.5"),
        (lambda: L2W(P=inf), "P=inf"),
        (lambda: Mutual(ramp=1.5), "ramp=1.5"),
        (lambda: Mutual(T=inf), "T=inf"),
        (lambda: SelfDistillation(alpha=nan), "alpha=nan"),
        (lambda: exit_weights(None, 0), "E=0"),
        (lambda: exit_weights([1, 2], 1.5), "E=1.5"),
        (lambda: exit_shares(0), "E=0"),
        (lambda: exit_shares(4, nan), "P=nan"),
        (lambda: exit_shares(4, 1e308), "P=1e.308"),
        (lambda: exit_shares(4, 5e-324), "P=5e-324"),
        (lambda: exit_partition(logits(3), -1), "P=-1"),
        (lambda: exit_partition([]), "logits="),
        (lambda: exit_partition([torch.rand(4, 3), torch.rand(5, 3)]), "must be equal"),
        (lambda: exit_partition([torch.full((4, 3), nan)]), "logits of exit 1 must be free of NaN"),
        (lambda: exit_losses(logits(2), labels(3)), "one label per sample"),
        (lambda: Mutual().loss([torch.rand(4, 3), torch.rand(4, 1)], labels(4, 1)), "equal"),
        (lambda: sample_weights(torch.rand(3), 0.5), "u="),
        (lambda: sample_weights(torch.rand(3, 2), nan), "eps=nan"),
        (lambda: WeightNet(0), "exits=0"),
        (lambda: WeightNet(2, 1.5), "hidden=1.5"),
        (lambda: objective_by_name(["joint"]), "objective="),
        (lambda: fit_exits(small(), load("digits", 100)[0], "joint"), "objective='joint'"),
        (lambda: fit_exits(small(), load("digits", 100)[0], Joint(), nan), "epochs=nan"),
        (lambda: fit_exits(small(), load("digits", 100)[0], Joint(), lr=-1), "lr=-1"),
        (lambda: fit_exits(small(), load("digits", 100)[0], Joint(), batch_size=1.5), "batch_size"),
        (
            lambda: fit_exits(small(), load("digits", 100)[0].subset(slice(0, 0)), Joint()),
            "at least one image",
        ),
        (lambda: compare_exits({}, small, None, None), "ways="),
        (lambda: compare_exits(dict(a=Joint), small, None, None, seeds=(1, 1)), "seeds="),
        (lambda: compare_exits(dict(a=Joint), small, None, None, seeds=(0.5,)), "seeds.0.=0.5"),
        (lambda: difficulty_experiment(n_train=0), "n_train=0"),
        (lambda: difficulty_experiment(power=nan), "power=nan"),
        (
            lambda: gradient_share(Joint(), logits(2), labels(), torch.full((16,), nan)),
            "difficulty=",
        ),
        (lambda: gradient_share(Joint(), logits(2), labels(), torch.rand(16), bins=0), "bins=0"),
        (lambda: gradient_share(Joint(), logits(2), labels(), torch.rand(3)), "equal"),
    ],
)
def test_bad_arguments_get_one_sentence(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_numbers_of_numpy_are_numbers():
    assert Joint(np.array([1.0, 2.0]), kl=np.float64(0.1)).weights == [1, 2]
    assert L2W(interval=np.int64(5)).interval == 5
    assert exit_shares(np.int64(2), np.float64(30)) == pytest.approx([0.4, 0.6])
    assert Mutual(np.int64(3)).ramp == 3


def test_gradient_share_by_hand():
    raw = [torch.tensor([[0.0, 0]] * 3 + [[-9.0, 0]]), torch.tensor([[0.0, 0]] * 4)]
    share = gradient_share(
        Joint(), raw, torch.zeros(4).long(), torch.tensor([0.1, 0.2, 0.3, 1.0]), bins=2
    )
    assert torch.allclose(
        share, torch.tensor([[1.5, 1.0], [1.5, 0.5]]) / torch.tensor([[2.5], [2.0]]), atol=1e-3
    )
    one = lambda objective: gradient_share(
        objective, raw[:1], torch.zeros(4).long(), torch.tensor([0.1, 0.2, 0.3, 1.0])
    )
    assert torch.equal(one(BoostNet()), one(Joint())), "at exit 1 both losses are the cross-entropy"


def test_experiment_on_shapes():
    r, train, test = difficulty_experiment(n_train=60, n_test=40, seeds=(0, 1), epochs=1, width=4)
    assert list(r) == ["Joint", "Joint, equilibrium", "BoostNet", "L2W"]
    assert all(len(v) == 2 and len(v[0]["accuracy"]) == 4 for v in r.values())
    assert test.mean == train.mean and float((train.difficulty < 0.125).float().mean()) > 0.3, (
        "most images are easy"
    )


def test_experiment_on_cifar(real_data):
    if not (real_data / "cifar10.npz").is_file():
        pytest.skip("needs cifar10.npz in DARKDISTILL_DATA")
    r, train, _ = difficulty_experiment(
        "cifar10", 100, 100, seeds=(0,), epochs=1, ways=dict(Joint=Joint, L2W=L2W)
    )
    assert train.shape == (3, 32, 32) and len(r["L2W"][0]["accuracy"]) == 4

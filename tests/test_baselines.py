"The baselines of federated early exits: values by hand, reduction to FedAvg, and what every method must survive."

import pytest, torch
from darkdistill_nb.core.data import load
from darkdistill_nb.core.training import Streams
from darkdistill_nb.distill.losses import kd_loss
from darkdistill_nb.exits.lora import add_lora
from darkdistill_nb.exits.networks import block_of, cnn, vit, wrn
from darkdistill_nb.exits.training import BoostNet, Joint, L2W
from darkdistill_nb.federated.baselines import (
    DepthFL,
    ExclusiveFL,
    InclusiveFL,
    blended,
    own_accuracy,
    peer_divergence,
    ramp,
)
from darkdistill_nb.federated.method import (
    EEFL,
    Client,
    Update,
    block_average,
    load_state,
    make_clients,
    save_state,
    simulate,
)

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "exclusivefl": ExclusiveFL,
    "exclusivefl, level 2": lambda *a, **k: ExclusiveFL(*a, level=2, **k),
    "inclusivefl": InclusiveFL,
    "inclusivefl, all exits": lambda *a, **k: InclusiveFL(*a, exits="all", **k),
    "depthfl": DepthFL,
    "depthfl, FedAvg": lambda *a, **k: DepthFL(*a, alpha=0.0, **k),
}
POLICIES = {"joint": Joint, "boostnet": BoostNet, "l2w": lambda: L2W(hidden=8)}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def small_cnn(stages=3):
    return cnn((1, 8, 8), 10, stages=stages, width=8)


def small_vit(exits=(2, 3, 4)):
    return vit(
        "vit_tiny_patch16_224",
        exits=exits,
        n_classes=10,
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=24,
        depth=exits[-1],
        num_heads=2,
    )


@pytest.fixture(scope="module")
def digits():
    return load("digits", n_train=400, n_test=100)


def dealt(digits, tiers=(0.4, 0.3, 0.3)):
    return make_clients(digits[0].y, 10, 1.0, tiers)


def run(method, digits, build=small_cnn, rounds=2, tiers=(0.4, 0.3, 0.3), **kwargs):
    clients = dealt(digits, tiers)
    return simulate(
        method, build, *digits, clients, rounds, eval_every=rounds, faults="raise", **kwargs
    )


def first_net(build):
    with Streams(0).scope("init"):
        return build()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gap(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


# what every method must survive


@each_method
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_cnn_with_every_objective(method, policy, digits):
    r = run(method(policy(), participation=1.0), digits)
    assert len(r.log[-1]["accuracy"]) == len(r.method.net)
    for part in r.state.values():
        assert all(bool(v.isfinite().all()) for v in part.values())
    assert not same(r.method.setup(first_net(small_cnn))["net"], r.state["net"])
    assert len(own_accuracy(r.method, r.state, digits[1])) == len(r.method.net)


@each_method
def test_a_vit(method, digits):
    r = run(method(participation=1.0), digits, small_vit, rounds=1)
    start, moved = r.method.setup(first_net(small_vit))["net"], 0
    for k, v in r.state["net"].items():
        assert bool(v.isfinite().all())
        moved += not torch.equal(v, start[k])
    assert moved > len(start) / 2


@each_method
def test_workers_and_repetition_give_the_same_weights(method, digits):
    one, again, two = (run(method(), digits, workers=w) for w in (1, 1, 2))
    for other in (again, two):
        assert all(same(one.state[part], other.state[part]) for part in one.state)


@each_method
def test_resumed_run_is_the_complete_one(method, digits, tmp_path):
    "State is in the checkpoint, not in the object: a new object goes on where another one stopped."
    complete, path = run(method(L2W(hidden=8)), digits, rounds=4), tmp_path / "c.safetensors"
    run(method(L2W(hidden=8)), digits, rounds=2, checkpoint=path)
    resumed = run(method(L2W(hidden=8)), digits, rounds=4, checkpoint=path)
    assert all(same(complete.state[part], resumed.state[part]) for part in complete.state)
    save_state(tmp_path / "s.safetensors", complete.state, {})
    assert same(load_state(tmp_path / "s.safetensors")[0]["server"], complete.state["server"])


REDUCED = {
    "eefl": EEFL,
    "exclusivefl": ExclusiveFL,
    "inclusivefl": InclusiveFL,
    "inclusivefl, all exits": lambda *a, **k: InclusiveFL(*a, exits="all", **k),
    "depthfl": lambda *a, **k: DepthFL(*a, alpha=0.0, **k),
}


def fedavg(digits, build, rounds=3):
    "Textbook FedAvg, without anything of the methods: mean of whole networks, weighted by samples."
    from darkdistill_nb.core.training import fit

    net, clients, s = first_net(build), dealt(digits, (1.0,)), Streams(0)
    for r in range(rounds):
        parts, start = [], {k: v.clone() for k, v in net.state_dict().items()}
        for c in clients:
            net.load_state_dict(start)
            fit(
                net,
                digits[0].subset(c.train),
                lr=0.05 * 0.99**r,
                batch_size=16,
                loss=lambda out, y: torch.nn.functional.cross_entropy(out[0], y),
                generator=s.generator("order", r, c.id),
            )
            parts.append(({k: v.clone() for k, v in net.state_dict().items()}, len(c.train)))
        total = sum(n for _, n in parts)
        net.load_state_dict(
            {k: sum(w[k].double() * n for w, n in parts) / total for k in net.state_dict()}
        )
    return net.state_dict()


@pytest.mark.parametrize("method", REDUCED.values(), ids=REDUCED)
@pytest.mark.parametrize("build", [lambda: small_cnn(1), lambda: small_vit((2,))], ids=["cnn", "vit"])
def test_one_tier_and_one_exit_is_fedavg(method, build, digits):
    "Check 1."
    r = run(method(Joint(), participation=1.0), digits, build, rounds=3, tiers=(1.0,))
    assert gap(r.state["net"], fedavg(digits, build)) <= 1e-6


def test_block_average_with_shares_of_samples():
    "Check 2."
    names = [f"stages.{b}.w" for b in range(4)]
    tiers = {m: ({k: torch.eye(4)[m - 1] for k in names[:m]}, 100 * m) for m in (1, 2, 3, 4)}
    old = {k: torch.full((4,), 7.0) for k in names}
    new = block_average(old, tiers)
    want = [[0.1, 0.2, 0.3, 0.4], [0, 0.2222, 0.3333, 0.4444], [0, 0, 0.4286, 0.5714], [0, 0, 0, 1]]
    for k, w in zip(names, want):
        assert torch.allclose(new[k], torch.tensor(w, dtype=torch.float), atol=1e-4)
    assert torch.equal(block_average(old, {2: tiers[2]})[names[2]], old[names[2]])


# ExclusiveFL


def test_exclusivefl_trains_those_who_can_hold_the_network(digits):
    clients = dealt(digits)
    for level in (None, 1, 2, 3):
        m = ExclusiveFL(level=level)
        m.setup(small_cnn())
        drawn = m.configure(0, clients, Streams(0))
        assert all(c.tier >= (level or 3) for c in drawn)
        able = sum(c.tier >= (level or 3) for c in clients)
        assert len(drawn) == min(5, able)  # as many as with EEFL, as far as there are


def test_exclusivefl_with_level_1_is_fedavg_of_a_prefix(digits):
    r = run(ExclusiveFL(level=1, participation=1.0), digits, rounds=3)
    one = run(
        EEFL(Joint(), participation=1.0), digits, lambda: small_cnn().prefix(1), 3, (1.0,)
    )
    assert set(r.state["net"]) == set(one.state["net"])
    assert len(r.log[-1]["accuracy"]) == 1


def test_exclusivefl_says_what_is_missing(digits):
    with pytest.raises(ValueError, match="level=4 must be at most 3, the network's stages"):
        ExclusiveFL(level=4).setup(small_cnn())
    m = ExclusiveFL()
    m.setup(small_cnn())
    with pytest.raises(ValueError, match="must be some of tier 3 or above"):
        m.configure(0, [Client(0, 1, torch.arange(3), torch.arange(0))], Streams(0))


# InclusiveFL


def shifted(method, state, deltas):
    "Updates of one client per tier: what it received, plus a number per name, deltas[tier](name)."
    out = []
    for tier, delta in deltas.items():
        sent = method.send(state, Client(tier, tier, torch.arange(9), None))
        out.append(Update(tier, tier, 9, {k: v + delta(k) for k, v in sent.items()}, 0.0))
    return out


def moved(method, state, after, tier):
    "name -> by how much a tier's own network changed, as one number."
    c = Client(0, tier, None, None)
    before, now = method.send(state, c), method.send(after, c)
    return {k: float((now[k] - before[k]).double().mean()) for k in before}


def test_inclusivefl_momentum_by_hand():
    "Check 12: layers 1, 2, 3, 6 of the larger tier and own change 5 give 0.2 * 3 + 0.8 * 5 = 4.6."
    assert float(blended(torch.tensor(5.0), [torch.tensor(v) for v in (1.0, 2.0, 3.0, 6.0)])) == (
        pytest.approx(4.6)
    )
    m = InclusiveFL()  # exits after blocks 2 and 5: tier 2 has layers 2, 3, 4, 5 from L_1 to L_2
    state = m.setup(first_net(lambda: small_vit((2, 5))))
    change = {"stages.0.1.": 1.0, "stages.1.0.": 2.0, "stages.1.1.": 3.0, "stages.1.2.": 6.0}
    larger = lambda k: next((v for p, v in change.items() if k.startswith(p)), 0.0)
    own = lambda k: 5.0 if k.startswith(("stages.0.1.", "exits.0.")) else 0.0
    after, _ = m.aggregate(state, shifted(m, state, {1: own, 2: larger}), 0, Streams(0))
    for k, v in moved(m, state, after, 1).items():
        want = 4.6 if k.startswith("stages.0.1.") else 5.0 if k.startswith("exits.0.") else 0.0
        assert v == pytest.approx(want, abs=1e-5), k


def test_inclusivefl_uses_changes_before_they_are_blended():
    "Three tiers: what tier 1 takes from tier 2 does not depend on what tier 2 takes from tier 3."
    m = InclusiveFL(beta=0.5)
    state = m.setup(first_net(small_cnn))
    ups = shifted(m, state, {1: lambda k: 0.0, 2: lambda k: 2.0, 3: lambda k: 8.0})
    after, _ = m.aggregate(state, ups, 0, Streams(0))
    assert moved(m, state, after, 1)["stages.0.convs.0.weight"] == pytest.approx(1.0, abs=1e-5)
    assert moved(m, state, after, 2)["stages.1.convs.0.weight"] == pytest.approx(5.0, abs=1e-5)
    assert moved(m, state, after, 1)["exits.0.fc.weight"] == pytest.approx(0.0, abs=1e-5)


def test_inclusivefl_without_momentum_is_private():
    "beta=0: what larger tiers do has no effect on a private layer."
    m = InclusiveFL(beta=0.0)
    state = m.setup(first_net(small_cnn))
    after = [
        m.aggregate(state, shifted(m, state, {1: lambda k: 1.0, 2: lambda k: d}), 0, Streams(0))[0]
        for d in (0.0, 5.0)
    ]
    private = [{k: v for k, v in a["server"].items() if k.startswith("tier1.")} for a in after]
    assert same(*private) and private[0]
    assert not torch.equal(after[0]["net"]["stem.weight"], after[1]["net"]["stem.weight"])


@pytest.mark.parametrize("exits", ["last", "all"])
def test_inclusivefl_shared_layers_are_equal_and_last_ones_are_not(exits, digits):
    m = InclusiveFL(exits=exits, participation=1.0)
    r = run(m, digits, small_vit)
    views = {t: m.send(r.state, Client(0, t, None, None)) for t in (1, 2, 3)}
    for a, b in ((1, 2), (1, 3), (2, 3)):
        for k in views[a]:
            private = m._private(a, k) or m._private(b, k)
            if exits == "last" and k.startswith("exits.") and block_of(k) == a:
                private = False  # nobody else trains it: the others hold that tier's
            assert torch.equal(views[a][k], views[b][k]) != private, (a, b, k)


def test_inclusivefl_absent_tier_keeps_its_own(digits):
    m = InclusiveFL()
    state = m.setup(first_net(small_cnn))
    after, _ = m.aggregate(state, shifted(m, state, {1: lambda k: 1.0, 3: lambda k: 4.0}), 0, Streams(0))
    mine = {k: v for k, v in state["server"].items() if k.startswith("tier2.")}
    assert same(mine, {k: v for k, v in after["server"].items() if k.startswith("tier2.")})
    assert moved(m, state, after, 1)["stages.0.convs.0.weight"] == pytest.approx(1.0, abs=1e-5)


def test_inclusivefl_trains_only_the_last_exit(digits):
    m, s = InclusiveFL(BoostNet()), Streams(0)
    state, c = m.setup(first_net(small_cnn)), next(c for c in dealt(digits) if c.tier == 2)
    up = m.local_update(m.send(state, c), digits[0].subset(c.train), c, 0, s)
    still = {k for k in up.weights if torch.equal(up.weights[k], state["net"][k])}
    assert still == {k for k in up.weights if k.startswith("exits.0.")}
    m1 = InclusiveFL(Joint())  # one exit: every objective is the cross-entropy
    m1.setup(first_net(small_cnn))
    up1 = m1.local_update(m.send(state, c), digits[0].subset(c.train), c, 0, s)
    assert same(up.weights, up1.weights)


def test_inclusivefl_refuses_layers_of_different_shape():
    build = lambda: wrn(10, 1, (1, 8, 8), exits=(1, 2, 3))
    with pytest.raises(ValueError, match="beta=0.2 must be 0 for this network: layers stages.0.0."):
        InclusiveFL().setup(build())
    assert InclusiveFL(beta=0.0).setup(build())["server"]


# DepthFL


def test_depthfl_ramp():
    "Check 13."
    assert [ramp(r) for r in (0, 150, 300, 500)] == pytest.approx([0.00674, 0.2865, 1, 1], abs=5e-5)


def test_depthfl_peers():
    "Check 13: equal logits say nothing, a single exit has no peer, and no gradient flows into a teacher."
    f = [torch.randn(6, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert float(peer_divergence([f[0]] * 3)) == pytest.approx(0, abs=1e-6)
    assert float(peer_divergence(f[:1])) == 0
    live = [v.clone().requires_grad_() for v in f]
    peer_divergence(live).backward()
    for i, v in enumerate(live):  # what exit i feels is what it feels as a student of fixed teachers
        alone = f[i].clone().requires_grad_()
        (sum(kd_loss(alone, f[j], 1.0) for j in range(3) if j != i) / 2).backward()
        assert torch.allclose(v.grad, alone.grad, atol=1e-6)


def test_depthfl_loss_of_a_client(digits):
    m = DepthFL(alpha=0.0, rounds=0, kd=0.5)
    state = m.setup(first_net(small_cnn))
    c = Client(0, 3, torch.arange(9), torch.arange(0))
    sent = m.send(state, c)
    net = m.receive(sent, 3)
    raw, y = [v.detach() for v in net(torch.rand(9, 1, 8, 8))], torch.arange(9)
    got = m.local_loss(net, sent, digits[0], 0)(raw, y)
    assert torch.allclose(got, Joint().loss(raw, y)[0] + 0.5 * peer_divergence(raw))
    one = m.local_loss(net, sent, digits[0], 0)(raw[:1], y)
    assert torch.equal(one, Joint().loss(raw[:1], y)[0])


def test_feddyn_by_hand():
    "Check 13: K=10, two clients with 1 and 3 from 0, alpha=0.1: mean 2, h=-0.04, new 2.4."
    m = DepthFL(alpha=0.1)
    net = first_net(small_cnn)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    state = m.setup(net)
    m.configure(0, [Client(i, 3, torch.arange(9), None) for i in range(10)], Streams(0))
    ups = shifted(m, state, {3: lambda k: 1.0})
    ups += [Update(7, 3, 5, {k: v + 3 for k, v in state["net"].items()}, 0.0)]
    new, _ = m.aggregate(state, ups, 0, Streams(0))
    for k in m._trained:
        assert torch.allclose(new["net"][k], torch.tensor(2.4))
        assert torch.allclose(new["server"][f"h.{k}"], torch.tensor(-0.04))
        assert torch.allclose(new["server"][f"client7.{k}"], torch.tensor(-0.3))


def test_feddyn_leaves_blocks_without_owner_alone():
    m = DepthFL()
    state = m.setup(first_net(small_cnn))
    new, _ = m.aggregate(state, shifted(m, state, {1: lambda k: 1.0}), 0, Streams(0))
    for k, v in new["net"].items():
        assert torch.equal(v, state["net"][k]) == (block_of(k) > 1), k


def test_feddyn_memory_travels_and_changes_the_training(digits):
    m, s = DepthFL(participation=1.0), Streams(0)
    clients = dealt(digits)
    state, c = m.setup(first_net(small_cnn)), clients[0]
    m.configure(0, clients, s)
    data = digits[0].subset(c.train)
    sent = m.send(state, c)
    assert set(sent) == set(m.net.prefix(c.tier).state_dict())  # nothing to remember yet
    up = m.local_update(sent, data, c, 0, s)
    m.check_update(up, sent, c)
    state, _ = m.aggregate(state, [up], 0, s)
    sent = m.send(state, c)
    names = {k for k in sent if k.startswith("memory.")}
    assert names == {f"memory.{k}" for k, p in m.net.prefix(c.tier).named_parameters()}
    up = m.local_update(sent, data, c, 1, s)
    m.check_update(up, sent, c)
    forgot = m.local_update({k: v for k, v in sent.items() if k not in names}, data, c, 1, s)
    assert not names & set(up.weights) and not same(up.weights, forgot.weights)


def test_feddyn_finds_the_common_minimum():
    "Two clients with different minima: FedDyn's fixed point is that of the mean loss, with zero tilt left over."
    a, alpha, K = torch.tensor([1.0, 3.0]), 0.5, 2  # losses w_k/2 (theta - c_k)^2
    c, theta, h, g = torch.tensor([0.0, 4.0]), torch.tensor(0.0), torch.tensor(0.0), torch.zeros(2)
    for _ in range(200):  # exact local minima of w/2 (t-c)^2 - t g + alpha/2 (t-theta)^2
        local = (a * c + g + alpha * theta) / (a + alpha)
        g = g - alpha * (local - theta)
        h = h - alpha * (2 / K) * (local.mean() - theta)
        theta = local.mean() - h / alpha
    assert float(theta) == pytest.approx(3.0, abs=1e-3)  # (1*0 + 3*4) / 4; the mean of minima is 2


def test_lora_networks_go_through(digits):
    "Only corrections and exits are trained, sent and remembered."
    build = lambda: add_lora(small_vit(), rank=2, alpha=4)
    for method in METHODS.values():
        r = run(method(participation=1.0), digits, build, rounds=1)
        start = r.method.setup(first_net(build))["net"]
        moved = {k for k, v in r.state["net"].items() if not torch.equal(v, start[k])}
        assert moved and all(k.startswith("exits.") or ".lora_" in k for k in moved)

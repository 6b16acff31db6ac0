"The baselines of federated early exits: values by hand, reduction to FedAvg, and what every method must survive."

import pytest, torch
from helpers import same
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.seeds import Streams
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
from darkdistill_nb.federated.reefl import ReeFL, recurrent_net, taught_by_best
from darkdistill_nb.federated.widths import (
    HeteroFL,
    ScaleFL,
    cover_average,
    cut,
    exact_rate,
    masked_logits,
    measure_statistics,
    narrow,
    taught_by_last,
    width_index,
)
from darkdistill_nb.federated.engine import load_state, save_state, simulate
from darkdistill_nb.federated.method import EEFL, Client, Update, block_average, make_clients

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "exclusivefl": ExclusiveFL,
    "exclusivefl, level 2": lambda *a, **k: ExclusiveFL(*a, level=2, **k),
    "inclusivefl": InclusiveFL,
    "inclusivefl, all exits": lambda *a, **k: InclusiveFL(*a, exits="all", **k),
    "inclusivefl, Adam": lambda *a, **k: InclusiveFL(*a, server_lr=1e-3, **k),
    "depthfl": DepthFL,
    "depthfl, FedAvg": lambda *a, **k: DepthFL(*a, alpha=0.0, **k),
    "scalefl": lambda *a, **k: ScaleFL(*a, wait=0, **k),
    "heterofl": HeteroFL,
    "reefl": lambda *a, **k: ReeFL(*a, ramp_rounds=0, **k),
}
OBJECTIVES = {"joint": Joint, "boostnet": BoostNet, "l2w": lambda: L2W(hidden=8)}
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


def gap(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


# what every method must survive


@each_method
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_cnn_with_every_objective(method, objective, digits):
    r = run(method(objective(), participation=1.0), digits)
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
    "scalefl": lambda *a, **k: ScaleFL(*a, widths=(1,), average="samples", **k),
    "heterofl": lambda *a, **k: HeteroFL(*a, mask=False, average="samples", **k),
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
@pytest.mark.parametrize(
    "build", [lambda: small_cnn(1), lambda: small_vit((2,))], ids=["cnn", "vit"]
)
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
    one = run(EEFL(Joint(), participation=1.0), digits, lambda: small_cnn().prefix(1), 3, (1.0,))
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


def test_adam_at_the_server_takes_steps_of_one_length_along_each_change():
    "By torch's own Adam, over three rounds; the first step is the rate, wherever something changed."
    m = InclusiveFL(server_lr=0.01)
    m.setup(small_cnn())
    before = {1: {k: v.clone() for k, v in m.net.prefix(1).state_dict().items()}}
    name = "stages.0.convs.0.weight"
    weight = torch.nn.Parameter(before[1][name].clone())
    reference, kept = torch.optim.Adam([weight], lr=0.01), {}
    for r in range(3):
        d = torch.randn(weight.shape, generator=torch.Generator().manual_seed(r))
        new = {1: {**before[1], name: before[1][name] + d}}
        kept |= m._adam(new, before, kept)
        weight.grad = -d
        reference.step()
        assert torch.allclose(new[1][name], weight, atol=1e-6)
        if r == 0:
            assert torch.allclose(new[1][name] - before[1][name], 0.01 * d.sign(), atol=1e-6)
        before = new
    other = "stages.0.convs.0.bias" if "stages.0.convs.0.bias" in before[1] else "exits.0.fc.bias"
    assert torch.equal(before[1][other], m.net.prefix(1).state_dict()[other])


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
    after, _ = m.aggregate(
        state, shifted(m, state, {1: lambda k: 1.0, 3: lambda k: 4.0}), 0, Streams(0)
    )
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
    for i, v in enumerate(
        live
    ):  # what exit i feels is what it feels as a student of fixed teachers
        alone = f[i].clone().requires_grad_()
        (sum(kd_loss(alone, f[j], 1.0) for j in range(3) if j != i) / 2).backward()
        assert torch.allclose(v.grad, alone.grad, atol=1e-6)


def test_depthfl_loss_of_a_client(digits):
    m = DepthFL(alpha=0.0, ramp_rounds=0, kd=0.5)
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
        trained = ("exits.", "stages.0.accumulator.")
        assert moved and all(k.startswith(trained) or ".lora_" in k for k in moved)


# widths


WIDE = {"cnn": small_cnn, "vit": small_vit, "wrn": lambda: wrn(10, 1, (1, 8, 8), exits=(1, 2, 3))}
each_wide = pytest.mark.parametrize("build", WIDE.values(), ids=WIDE)


@each_wide
def test_the_whole_width_is_the_whole_network(build):
    "Check 14: a cut at rate 1 computes what the network computes."
    net, x = first_net(build).eval(), torch.rand(4, 1, 8, 8)
    whole = narrow(net, 1.0)
    assert same(net.state_dict(), whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net(x), whole(x)))
    assert len(ScaleFL().default_widths(4)) == 4 and ScaleFL().default_widths(1) == (1.0,)


@each_wide
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.8])
def test_cut_and_put_back(build, rate):
    "Check 14: identity on what is covered; what is not covered keeps its value."
    net = first_net(build)
    state, index = net.state_dict(), width_index(net, rate)
    small = cut(state, index)
    assert same(small, narrow(net, rate).state_dict())
    assert same(cover_average(state, [(small, index, 2.0)]), state)
    up = {k: v + 1 for k, v in small.items()}
    new, inside = cover_average(state, [(up, index, 3.0)]), {}
    for k, v in state.items():
        if not v.ndim:
            continue  # a counter of batches
        inside[k] = torch.zeros(v.shape, dtype=torch.bool)
        inside[k][torch.meshgrid(*index[k], indexing="ij")] = True
        assert torch.equal(new[k][~inside[k]], v[~inside[k]]), k
        assert torch.allclose(new[k][inside[k]], v[inside[k]] + 1), k
    whole = all(bool(m.all()) for m in inside.values())
    assert whole == (exact_rate(net, rate) == 1)


def test_heads_stay_whole():
    "A cut attention computes with the first channels of every head of the wide one."
    net = small_vit().eval()  # two heads of 12
    small = narrow(net, 0.5)
    wide, cut_ = net.stages[0][0].attn, small.stages[0][0].attn
    assert (cut_.num_heads, cut_.head_dim, cut_.scale) == (2, 6, 6**-0.5)
    rows = [*range(6), *range(12, 18)]
    q = wide.qkv.weight[:24][rows][:, :12]
    assert torch.equal(cut_.qkv.weight[:12], q)
    assert torch.equal(cut_.proj.weight, wide.proj.weight[:12][:, rows])
    assert exact_rate(net, 0.51) == 7 / 12


def test_cut_lora_network():
    net, x = add_lora(small_vit(), rank=2, alpha=4, dropout=0.0).eval(), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for k, p in net.named_parameters():
            if ".lora_B" in k:
                p.normal_()
    small = narrow(net, 0.5)
    layer = small.stages[0][0].attn.qkv
    assert layer.parts == {"q": (0, 12), "v": (24, 36)} and layer.lora_B["q"].shape == (12, 2)
    assert [f.shape for f in small(x)] == [(2, 10)] * 3
    assert {k for k, p in small.named_parameters() if p.requires_grad} == {
        k for k, p in net.named_parameters() if p.requires_grad
    }


def test_elements_are_averaged_over_those_who_have_them():
    old = {"w": torch.zeros(2, 3)}
    index = lambda *n: {"w": [torch.arange(i) for i in n]}
    parts = [
        ({"w": torch.full((1, 2), 1.0)}, index(1, 2), 3.0),
        ({"w": torch.full((2, 2), 5.0)}, index(2, 2), 1.0),
    ]
    want = torch.tensor([[2.0, 2.0, 0.0], [5.0, 5.0, 0.0]])
    assert torch.equal(cover_average(old, parts)["w"], want)


def test_widths_are_checked():
    for widths in ((0.5, 0.7, 0.9), (1, 0.5, 1), (0, 0.5, 1)):
        with pytest.raises(ValueError, match="widths"):
            ScaleFL(widths=widths)
    with pytest.raises(ValueError, match="3 rates, one per tier"):
        ScaleFL(widths=(0.5, 1)).setup(small_cnn())


def test_scalefl_loss():
    "Check 14: cross-entropy for one exit; no distillation while waiting; by hand for three exits."
    g = torch.Generator().manual_seed(0)
    raw, y = [torch.randn(6, 10, generator=g) for _ in range(3)], torch.arange(6)
    ce = [torch.nn.functional.cross_entropy(f, y) for f in raw]
    m = ScaleFL(gamma=0.5, wait=5)
    at = lambda rnd, raw: m.local_loss(None, {}, None, rnd)(raw, y)
    assert torch.allclose(at(9, raw[:1]), ce[0])
    plain = (3 * ce[2] + ce[0] + 2 * ce[1]) / 6
    kd = [kd_loss(f, raw[2], 3.0) for f in raw]
    assert torch.allclose(at(4, raw), plain)
    assert torch.allclose(at(5, raw), plain + 0.5 * (kd[0] + 2 * kd[1]) / 6)
    live = [f.clone().requires_grad_() for f in raw]
    taught_by_last(live).backward()
    assert live[2].grad is None and live[0].grad is not None


def test_scalefl_sends_cuts_of_a_depth_and_a_width(digits):
    m = ScaleFL(widths=(0.5, 0.5, 1))
    state = m.setup(first_net(small_cnn))
    sent = m.send(state, Client(0, 2, None, None))
    assert {block_of(k) for k in sent} == {1, 2}
    assert sent["stages.1.convs.0.weight"].shape == (4, 4, 3, 3)
    assert sent["exits.0.fc.weight"].shape == (10, 64)


def test_heterofl_masks_absent_classes(digits):
    m, s = HeteroFL(participation=1.0), Streams(0)
    state = m.setup(first_net(small_cnn))
    few = torch.arange(len(digits[0]))[digits[0].y < 3][:40]
    c = Client(0, 1, few, few[:0])
    up = m.check_update(
        m.local_update(m.send(state, c), digits[0].subset(few), c, 0, s), m.send(state, c), c
    )
    assert up.extra["classes"].tolist() == [True] * 3 + [False] * 7
    new = m.aggregate(state, [up], 0, s)[0]["net"]
    for e in range(3):  # weight decay would have moved the other rows at the client
        old = state["net"][f"exits.{e}.fc.weight"]
        assert torch.equal(new[f"exits.{e}.fc.weight"][3:], old[3:])
        assert not torch.equal(new[f"exits.{e}.fc.weight"][:3], old[:3])
    up.extra["classes"] = torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match="classes"):
        m.check_update(up, m.send(state, c), c)
    f = torch.randn(2, 10)
    p = masked_logits(f, torch.arange(10) < 3).softmax(-1)
    assert torch.allclose(p[:, :3], f[:, :3].softmax(-1)) and not p[:, 3:].any()


def test_heterofl_scales_while_training_only():
    m, plain = HeteroFL(widths=(0.5, 0.5, 1)), HeteroFL(widths=(0.5, 0.5, 1), scaler=False)
    net, x = first_net(small_cnn), torch.rand(2, 1, 8, 8)
    nets = []
    for method in (m, plain):
        state = method.setup(net)
        nets.append(method.receive(method.send(state, Client(0, 1, None, None)), 1))
    a, b = (n.stem(x) for n in nets)
    assert torch.allclose(a, 2 * b)
    a, b = (n.eval().stem(x) for n in nets)
    assert torch.equal(a, b)
    assert torch.equal(m.tier_net(3).stem(x), net.stem(x))


def test_static_batch_normalisation(digits):
    "Statistics of a batch norm are those of one pass over the data, and reach the global network."
    build = WIDE["wrn"]
    r = run(HeteroFL(participation=1.0, batch_size=64), digits, build)
    k = "stages.0.0.bn1.running_mean"
    assert not torch.equal(r.state["net"][k], torch.zeros_like(r.state["net"][k]))
    net, train = r.net(), digits[0]
    before = {k: v.clone() for k, v in net.named_parameters()}
    measure_statistics(net, train, batch_size=len(train))
    assert same(before, dict(net.named_parameters()))
    with torch.no_grad():
        h = net.stem(train[:][0])
    assert torch.allclose(net.stages[0][0].bn1.running_mean, h.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(net.stages[0][0].bn1.running_var, h.var((0, 2, 3)), atol=1e-4)


# ReeFL


@pytest.mark.parametrize("build", [small_cnn, small_vit], ids=["cnn", "vit"])
def test_reefl_has_one_module_and_looks_back_only(build):
    "Check 15."
    net, x = first_net(lambda: recurrent_net(build())), torch.rand(3, 1, 8, 8)
    shared = net.stages[0].accumulator
    assert all(stage.accumulator is shared for stage in net.stages)
    assert all(exit.fc is net.exits[0].fc and exit.norm is net.exits[0].norm for exit in net.exits)
    names = [k for k, _ in net.named_parameters()]
    assert len(names) == len(set(names)) and all(
        block_of(k) == 1 for k in names if "accumulator" in k or k.startswith("exits.")
    )
    for e, f in enumerate(net(x)):
        net.zero_grad(set_to_none=True)
        f.sum().backward(retain_graph=True)
        used = {block_of(k) for k, p in net.named_parameters() if p.grad is not None}
        assert used == set(range(1, e + 2))
    for m in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(net.prefix(m)(x), net(x)))


@pytest.mark.parametrize("build", [small_cnn, small_vit], ids=["cnn", "vit"])
def test_reefl_identity_leaves_the_trunk(build):
    "Check 15: with Y = X and P = 0 the trunk computes what it did."
    plain = first_net(build).eval()
    net, x = recurrent_net(plain).eval(), torch.rand(3, 1, 8, 8)
    A = net.stages[0].accumulator
    with torch.no_grad():
        for p in (A.position, A.proj.weight, A.proj.bias, A.fc2.weight, A.fc2.bias):
            p.zero_()
        z = packed = plain.stem(x)
        for a, b in zip(plain.stages, net.stages):
            z, packed = a(z), b(packed)
            assert torch.allclose(packed[:, : z[0].numel()], z.flatten(1), atol=1e-5)


def test_reefl_teacher():
    "Check 15: the argmin of (1.2, 0.7, 0.9) is exit 2, which gets no distillation."
    f = [torch.randn(4, 10, requires_grad=True) for _ in range(3)]
    loss = taught_by_best(f, (1.2, 0.7, 0.9))
    assert torch.allclose(loss, kd_loss(f[0], f[1], 1.0) + kd_loss(f[2], f[1], 1.0))
    loss.backward()
    assert f[1].grad is None and f[0].grad is not None and f[2].grad is not None


def test_reefl_moving_average_and_batch_choose_differently():
    y = torch.zeros(4, dtype=torch.long)
    good, bad, better = (torch.tensor([[v, 0.0]]).repeat(4, 1) for v in (2.0, -2.0, 2.5))
    first, second = [good, bad], [good, better]
    kinds = {
        k: ReeFL(teacher=k, ramp_rounds=0).local_loss(None, {}, None, 0)
        for k in ("average", "batch")
    }
    base = Joint().loss(second, y)[0]
    for kind, loss in kinds.items():
        loss(first, y)
        best = 0 if kind == "average" else 1
        assert torch.allclose(loss(second, y), base + kd_loss(second[1 - best], second[best], 1.0))


def test_reefl_with_one_exit_is_fedavg_of_its_network(digits):
    "Check 1, for the network with the module."
    import copy

    r = run(ReeFL(participation=1.0, clip=0.0), digits, lambda: small_cnn(1), 3, (1.0,))
    start = r.method.net
    want = run(EEFL(Joint(), participation=1.0), digits, lambda: copy.deepcopy(start), 3, (1.0,))
    assert gap(r.state["net"], want.state["net"]) <= 1e-6


def test_reefl_clips_gradients(digits):
    m, s = ReeFL(momentum=0.0, weight_decay=0.0, lr=1.0, clip=1e-3), Streams(0)
    state, c = m.setup(first_net(small_cnn)), dealt(digits)[0]
    m.batch_size = 1000  # one step
    up = m.local_update(m.send(state, c), digits[0].subset(c.train), c, 0, s)
    step = max(float((v - state["net"][k]).abs().max()) for k, v in up.weights.items())
    assert 0 < step <= 1.001e-3


def test_reefl_refuses_stages_of_different_width():
    with pytest.raises(ValueError, match="stages all have one width"):
        ReeFL().setup(WIDE["wrn"]())

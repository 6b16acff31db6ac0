"""Early-exit networks and LoRA: what the notebooks' examples do not reach, and the acceptance numbers."""

import copy, hashlib, os, subprocess, sys
import pytest, torch
from conftest import LONG
from torch import nn
from darkdistill_nb.exits.networks import (
    EarlyExitNet,
    Exit,
    PooledMap,
    TokenMean,
    block_of,
    build_net,
    cnn,
    msdnet,
    pack,
    scale_gradient,
    take_rows,
    unpack,
    vit,
    wrn,
)
from darkdistill_nb.exits.lora import TARGETS, LoRALinear, add_lora, lora_state, merge_lora

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(n_classes=10, img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=4)


def tiny(**kw):
    return vit("vit_tiny_patch16_224", **{**TINY, **kw})


def count(m):
    return sum(p.numel() for p in m.parameters())


# ---------------------------------------------------------------- names that stored runs depend on


def names_of(net):
    return hashlib.sha256(
        repr([(k, tuple(v.shape)) for k, v in net.state_dict().items()]).encode()
    ).hexdigest()[:16]


@pytest.mark.parametrize(
    "net, mark",
    [
        (lambda: cnn(), "0d7bfefd12b5a02a"),
        (lambda: wrn(), "d34c05c5e7c38a43"),
        (lambda: wrn(16, 2, exits=(1, 2, 4, 6)), "c68e08f308d35e17"),
        (lambda: vit(exits=(3, 6, 9, 12)), "74ee614c4412619a"),
        (lambda: tiny(), "421ae6873101afc5"),
    ],
)
def test_parameter_names_and_shapes_do_not_change(net, mark):
    "Weights in assets and in users' run folders are found by name; a change here makes them unreadable."
    assert names_of(net()) == mark


# ---------------------------------------------------------------- latents


def test_take_rows_of_tensors_and_nests():
    z, keep = torch.randn(5, 3, 4), torch.tensor([4, 0])
    assert torch.equal(take_rows(z, keep), z[[4, 0]])
    mask = torch.tensor([True, False, False, True, False])
    out = take_rows([z, (z[:, 0], z[:, 1])], mask)
    assert isinstance(out, list)
    assert isinstance(out[1], tuple)
    assert torch.equal(out[1][1], z[[0, 3], 1])
    assert take_rows(z, torch.zeros(5, dtype=torch.bool)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    "net",
    [
        lambda: cnn((3, 16, 16)),
        lambda: wrn(10, 1, (3, 16, 16), exits=(0, 1, 3)),
        lambda: msdnet((3, 16, 16), first=2),
        lambda: msdnet((3, 16, 16), norm="group"),
        lambda: vit(
            "vit_tiny_patch16_224", n_classes=10, img_size=16, patch_size=4, embed_dim=48, depth=4
        ),
    ],
)
def test_samples_can_leave_between_stages(net):
    "Stage by stage with fewer and fewer samples gives each sample the logits of the whole batch."
    torch.manual_seed(0)
    net = net().eval()
    x = torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        whole, z, left = net(x), net.stem(x), torch.arange(9)
        assert z.shape[1:] == net.latent_shape()
        for stage, exit, f in zip(net.stages, net.exits, whole):
            z = stage(z)
            assert isinstance(z, torch.Tensor) and len(z) == len(left)
            torch.testing.assert_close(exit(z), f[left], atol=1e-5, rtol=1e-4)
            keep = torch.arange(0, len(left), 2)
            z, left = take_rows(z, keep), left[keep]


@pytest.mark.parametrize(
    "net",
    [
        lambda: wrn(10, 1, (3, 8, 8), exits=(0, 1, 2, 3), pool=1, features=8),
        lambda: msdnet((3, 8, 8), first=2),
    ],
)
@pytest.mark.parametrize("ge", ["none", "full", "released"])
def test_every_parameter_is_trained(net, ge):
    "No layer is built that no exit reads, under any gradient equilibrium."
    net = net()
    sum(f.square().sum() for f in net(torch.randn(4, 3, 8, 8), ge)).backward()
    assert all(p.grad is not None for p in net.parameters())


# ---------------------------------------------------------------- WideResNet: acceptance check 19


def test_wrn_counts_of_check_19():
    one = lambda d, k: wrn(d, k, exits=((d - 4) // 2,), pool=1, bias=True)
    assert count(one(16, 1)) == 175_626 and one(16, 1).macs() == [26_657_408]
    assert abs(count(one(16, 4)) / 1e6 - 2.75) < 0.005
    assert abs(one(16, 4).macs()[0] / 1e6 - 392.6) < 0.05
    assert count(one(40, 4)) == 8_955_050


def test_wrn_seven_exits_of_check_19():
    net = wrn(16, 1, exits=(0, 1, 2, 3, 4, 5, 6), pool=1, features=48, bias=True)
    trunk, with_heads = net.macs(heads=False), net.macs()
    for got, want in zip(
        [c / 26_657_408 for c in trunk], [0.0166, 0.1936, 0.3706, 0.5083, 0.6853, 0.8230, 1.0]
    ):
        assert abs(got - want) <= 5e-4
    assert (with_heads[-1] - trunk[-1]) / trunk[-1] < 0.01
    assert 0.05 <= sum(map(count, net.exits[:6])) / 175_626 <= 0.07
    assert {a.shape[1] for a in net.eval().features(net.stem(torch.randn(2, 3, 32, 32)))} == {48}
    assert block_of("stem.weight") == 1
    assert len(net.stages[0]) == 0
    assert len(net.prefix(1)(torch.randn(2, 3, 32, 32))) == 1


@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(depth=17), "6n"),
        (dict(exits=(-1, 2)), "rise"),
        (dict(exits=(2, 1)), "rise"),
        (dict(exits=(0, 7)), "and 6"),
        (dict(pool=0), "pool=0"),
        (dict(features=0), "features=0"),
    ],
)
def test_wrn_refuses(kw, text):
    with pytest.raises(ValueError, match=text):
        wrn(**kw)


# ---------------------------------------------------------------- MSDNet


def by_the_equation(net, z0, scale, depth):
    "x^s_l by recursion on the definition, from the layers taken out of the stages."
    layers, seen, known = {}, {}, {}
    for layer in (l for s in net.stages for l in s.layers):
        seen[layer.scale] = seen.get(layer.scale, 0) + 1
        layers[layer.scale, seen[layer.scale]] = layer

    def x(s, l):
        if (s, l) not in known:
            if l == 0:
                known[s, l] = z0 if s == 0 else net.stages[0].start[s - 1](x(s - 1, 0))
            else:
                known[s, l] = layers[s, l](
                    x(s, l - 1), x(s - 1, l - 1) if layers[s, l].down is not None else None
                )
        return known[s, l]

    return x(scale, depth)


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(norm="group"),
        dict(exits=3, first=1, step=1),
        dict(exits=2, first=7, step=5),
        dict(scales=1),
        dict(scales=2, exits=6, step=1),
        dict(scales=4, exits=5),
        dict(scales=4, exits=2, first=1, step=1),
    ],
)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_lazy_order_computes_the_equation(kw, shape):
    torch.manual_seed(0)
    net = msdnet(shape, **kw).eval()
    S = len(net.stages[0].start) + 1
    first, step = kw.get("first", 4), kw.get("step", 2)
    with torch.no_grad():
        z0 = net.stem(torch.randn(2, *shape))
        for e, (a, exit) in enumerate(zip(net.features(z0), net.exits)):
            m = by_the_equation(net, z0, S - 1, first + step * e)
            assert m.shape[1:] == exit.reduce.shape
            torch.testing.assert_close(a, exit.features(m.flatten(1)), atol=1e-5, rtol=1e-4)


def test_msdnet_structure():
    net = msdnet()
    assert [list(s.leave) for s in net.stages] == [[0, 1, 2], [1, 2], [1, 2], [2]]
    assert [l.scale for l in net.stages[0].layers] == [
        2,
        1,
        2,
        0,
        1,
        2,
        0,
        1,
        2,
    ]  # diagonals, finest first
    assert (
        sum(l.transition is not None for s in net.stages for l in s.layers) == 3
    )  # layer 5 of scales 2 and 3; layer 9 of scale 3
    assert all(
        l.down is None or l.down[1][0].stride == (2, 2) for s in net.stages for l in s.layers
    )
    cost, trunk = net.macs(), net.macs(heads=False)
    assert cost == sorted(set(cost)) and all(a > b for a, b in zip(cost, trunk))
    assert msdnet((1, 8, 8)).latent_shape() == (16, 8, 8)
    assert len(msdnet((1, 8, 8)).stages[0].leave) == 2
    m = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(m, unpack(pack(m), [(3, 4, 4), (5, 2, 2)])))


def test_msdnet_learns_digits():
    from darkdistill_nb.core.datasets import load
    from darkdistill_nb.core.training import accuracy, fit, predict

    train, test = load("digits")
    torch.manual_seed(0)
    net = msdnet(
        train.shape,
        train.n_classes,
        exits=2,
        first=1,
        step=1,
        channels=8,
        growth=4,
        head=32,
        norm="group",
    )
    fit(
        net,
        train.subset(torch.arange(800)),
        4,
        0.05,
        batch_size=32,
        loss=lambda fs, y: sum(nn.functional.cross_entropy(f, y) for f in fs),
        generator=torch.Generator().manual_seed(0),
    )
    assert accuracy(predict(net, test), test.y).min() > 0.85


def test_a_batch_of_one_trains_with_batch_norm():
    net = msdnet((1, 8, 8), exits=2, first=2)
    sum(f.sum() for f in net(torch.randn(1, 1, 8, 8))).backward()


@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(growth=3), "growth=3"),
        (dict(exits=0), "exits=0"),
        (dict(norm="layer"), "norm=.layer. must be one of batch, group"),
        (dict(scales=6), "scales=6"),
        (dict(input_shape=(1, 1, 1)), "too many"),
    ],
)
def test_msdnet_refuses(kw, text):
    with pytest.raises(ValueError, match=text):
        msdnet(**kw)


# ---------------------------------------------------------------- ViTs


def test_plain_vits_compute_what_they_computed():
    "The stem borrows timm's code; for a model with one class token that is bit for bit what was written out here before."
    for name, kw in (("vit_tiny_patch16_224", {}), ("deit3_small_patch16_224", dict(num_heads=3))):
        torch.manual_seed(0)
        net = vit(name, n_classes=10, img_size=32, patch_size=8, embed_dim=48, depth=2, **kw).eval()
        s, x = net.stem, torch.randn(3, 3, 32, 32)
        z, cls = s.patch_embed(x), s.cls_token.expand(3, -1, -1)
        z = (
            torch.cat([cls, z + s.pos_embed], 1)
            if s.no_embed_class
            else torch.cat([cls, z], 1) + s.pos_embed
        )
        assert torch.equal(s(x), s.norm_pre(z)) and torch.equal(net.exits[0].features(z), z[:, 0])


KINDS = [
    ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8), 1),
    ("deit_tiny_distilled_patch16_224", dict(img_size=32, patch_size=8), 2),
    ("vit_small_patch14_reg4_dinov2", dict(img_size=28), 5),
    ("vit_base_patch16_rpn_224", dict(img_size=32, embed_dim=48, num_heads=3), 0),
    ("deit3_small_patch16_224", dict(img_size=32, embed_dim=48, num_heads=3), 1),
    ("vit_base_patch32_clip_224", dict(img_size=64, embed_dim=48, num_heads=3), 1),
    ("vit_small_patch16_18x2_224", dict(img_size=32, embed_dim=48, num_heads=3), 1),
    ("vit_tiny_r_s16_p8_224", dict(img_size=64), 1),
    ("vit_base_patch16_siglip_224", dict(img_size=32, embed_dim=48, num_heads=3), 0),
    ("vit_tiny_patch16_224", dict(img_size=32, class_token=False, global_pool="avg"), 0),
    ("vit_tiny_patch16_224", dict(img_size=32, reg_tokens=2, no_embed_class=True), 3),
    ("vit_tiny_patch16_224", dict(img_size=32, pos_embed="none"), 1),
    ("vit_tiny_patch16_224", dict(img_size=32, dynamic_img_size=True), 1),
    ("vit_tiny_patch16_224", dict(img_size=32, in_chans=1), 1),
]


@pytest.mark.parametrize("name, kw, prefix", KINDS)
def test_every_kind_of_vit_equals_timm(name, kw, prefix):
    import timm

    kw = {**kw, "depth": 3}
    torch.manual_seed(0)
    net = vit(name, exits=(1, 3), n_classes=10, **kw).eval()
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0, **kw).eval()
    assert net.stem.num_prefix_tokens == prefix
    assert net.input_shape == (kw.get("in_chans", 3), kw["img_size"], kw["img_size"])
    x = torch.randn(2, *net.input_shape)
    with torch.no_grad():
        tokens = whole.forward_intermediates(
            x,
            indices=[0, 2],
            output_fmt="NLC",
            norm=False,
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        for z, a in zip(tokens, net.features(net.stem(x))):
            patches, before = z if prefix else (z, None)
            if "distilled" in name:
                want = before.mean(1)
            elif prefix:
                want = before[:, 0]
            else:
                want = patches.mean(1)
            torch.testing.assert_close(a, want, atol=1e-5, rtol=1e-4)
    assert len(net(x)) == 2 and len(net.macs()) == 2
    again = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(again(x)[1], net(x)[1])


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet18", "eva02_tiny_patch14_224"]
)
def test_other_networks_are_refused(name):
    with pytest.raises(ValueError, match="is not a plain ViT but a"):
        vit(name)


def test_vit_arguments_are_checked():
    with pytest.raises(ValueError, match="not a timm model"):
        vit("vit_huge_indeed")
    with pytest.raises(ValueError, match="cannot be built"):
        vit(img_sise=8)
    with pytest.raises(ValueError, match="rise"):
        vit(exits=())
    assert (
        len(vit("vit_tiny_patch16_224", img_size=32, depth=3)) == 3 and len(tiny(depth=8)) == 4
    )  # default: quarters of the depth


def test_weights_that_cannot_be_fetched(tmp_path):
    "A real attempt, on a machine told to stay offline and without a cache: one clear error with both ways on."
    code = "from darkdistill_nb.exits.networks import vit\ntry: vit('deit_tiny_patch16_224', pretrained=True)\nexcept ConnectionError as e: print('ERR', e)"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "TORCH_HOME": str(tmp_path),
    }
    for k in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        env.pop(k, None)
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=LONG
    )
    said = [l for l in r.stdout.splitlines() if l.startswith("ERR")]
    assert said and all(
        t in said[0]
        for t in ("deit_tiny_patch16_224", "could not be fetched", "pretrained=False", "file=")
    ), r.stdout + r.stderr


def test_weights_from_a_file(tmp_path):
    import timm

    kw = dict(img_size=32, patch_size=8, embed_dim=48, depth=2)
    torch.manual_seed(3)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, **kw)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    net = vit(
        "vit_tiny_patch16_224",
        exits=(1, 2),
        n_classes=10,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path)),
        **kw,
    )
    assert torch.equal(net.stem.pos_embed, source.pos_embed)
    assert torch.equal(net.stages[1][0].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        vit(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "gone.pth")))
    with pytest.raises(ValueError, match="no weights of .* that fit"):
        vit(
            "vit_tiny_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path)),
            **{**kw, "embed_dim": 96},
        )


def test_build_net_knows_all_families():
    for arch, kw in (
        ("cnn", {}),
        ("wrn", dict(depth=10)),
        ("msdnet", {}),
        ("vit_tiny_patch16_224", dict(embed_dim=48, depth=4)),
    ):
        net = build_net(arch, (1, 8, 8), 10, **kw)
        assert [tuple(f.shape) for f in net.eval()(torch.randn(2, 1, 8, 8))] == [(2, 10)] * len(net)


# ---------------------------------------------------------------- LoRA


def test_lora_parameters_of_the_paper():
    net = add_lora(vit())
    for stage in net.stages:
        for block in stage:
            assert sum(p.numel() for p in block.parameters() if p.requires_grad) == 24_576
    assert (
        count(net.exits)
        == 4 * 19_684
        == sum(p.numel() for p in net.exits.parameters() if p.requires_grad)
    )
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 12 * 24_576 + 4 * 19_684
    m = net.stages[0][0].attn.qkv
    assert m.scale == 2
    assert m.dropout.p == 0.01
    assert list(m.parts) == ["q", "v"]
    assert m.parts["v"] == (384, 576)


@pytest.mark.parametrize("targets", [("q", "v"), "k", ("proj",), ("fc1", "fc2"), tuple(TARGETS)])
def test_lora_starts_as_the_plain_net_and_merges_back(targets):
    torch.manual_seed(0)
    net, x = tiny().eval(), torch.randn(5, 1, 8, 8)
    plain, names = net(x), list(net.state_dict())
    add_lora(net, rank=3, alpha=6, targets=targets)
    assert all(torch.equal(a, b) for a, b in zip(plain, net(x)))
    for n, p in net.named_parameters():
        if ".lora_B." in n:
            nn.init.normal_(p, std=0.2)
    out, merged = net(x), merge_lora(copy.deepcopy(net))
    assert max((a - b).abs().max() for a, b in zip(out, plain)) > 0.01
    for a, b in zip(out, merged(x)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert list(merged.state_dict()) == names
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("targets", ["v", "fc1"])
def test_lora_trains_its_corrections_on_inputs_without_gradient(targets):
    "The first adapted layer of a frozen network gets an input, and gives an output, that no gradient flows to but its own."
    net = add_lora(tiny(), rank=2, targets=targets)
    sum(f.square().sum() for f in net(torch.randn(2, 1, 8, 8))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert net.macs() > tiny().macs()


def test_lora_corrects_only_its_thirds():
    torch.manual_seed(0)
    base = nn.Linear(6, 18)
    layer = LoRALinear(base, dict(k=1), of=3, rank=2, alpha=4, dropout=0.0)
    nn.init.normal_(layer.lora_B["k"])
    x = torch.randn(4, 6)
    d = layer(x) - base(x)
    assert d[:, :6].abs().max() == 0 and d[:, 12:].abs().max() == 0
    torch.testing.assert_close(d[:, 6:12], 2 * x @ layer.lora_A["k"].T @ layer.lora_B["k"].T)
    assert layer.weight is base.weight


def test_lora_dropout_is_on_the_correction_only_and_only_in_training():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 6), dict(proj=0), rank=2, alpha=4, dropout=0.5)
    x = torch.randn(4, 6)
    assert torch.equal(layer.train()(x), layer.eval()(x))  # B = 0
    nn.init.normal_(layer.lora_B["proj"])
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    net = add_lora(tiny().eval(), rank=2)
    assert not any(m.training for m in net.modules() if isinstance(m, LoRALinear))


def test_lora_with_prefix_names_and_state():
    net = add_lora(tiny(), rank=4)
    part = net.prefix(2)
    assert set(part.state_dict()) < set(net.state_dict())
    assert part.stages[0][0].attn.qkv is net.stages[0][0].attn.qkv
    state = lora_state(net)
    assert all(".lora_" in k or k.startswith("exits.") for k in state)
    assert {block_of(k) for k in state} == {1, 2, 3, 4}
    other = add_lora(tiny(), rank=4)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())
    assert not set(missing) & set(state)


@pytest.mark.parametrize(
    "make, kw, text",
    [
        (tiny, dict(targets=("q", "x")), "must be some of"),
        (tiny, dict(targets=()), "must be some of"),
        (tiny, dict(rank=0), "rank=0"),
        (tiny, dict(dropout=1.0), "dropout"),
        (cnn, {}, "no linear layer"),
        (lambda: add_lora(tiny()), {}, "already"),
    ],
)
def test_lora_refuses_and_leaves_the_net_alone(make, kw, text):
    net = make()
    before = [(n, p.requires_grad) for n, p in net.named_parameters()]
    with pytest.raises(ValueError, match=text):
        add_lora(net, **kw)
    assert before == [(n, p.requires_grad) for n, p in net.named_parameters()]


def test_merge_and_state_need_lora():
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(tiny())
    with pytest.raises(ValueError, match="no LoRA"):
        lora_state(tiny())


def test_a_federated_round_changes_only_what_is_trained():
    from darkdistill_nb.core.datasets import load
    from darkdistill_nb.federated.engine import simulate
    from darkdistill_nb.federated.method import EEFL, make_clients
    from darkdistill_nb.core.seeds import Streams

    train, test = load("digits")
    train = train.subset(torch.arange(200))
    with Streams(0).scope("init"):
        start = lora_net().state_dict()
    run = simulate(
        EEFL(participation=1.0), lora_net, train, test, make_clients(train.y, 4), rounds=1
    )
    moved = {k for k, v in run.state["net"].items() if not torch.equal(v, start[k])}
    assert moved == set(lora_state(run.net()))


@pytest.mark.parametrize("darkdistill", [False, True])
def test_only_what_is_trained_is_sent(darkdistill):
    "Uploads hold LoRA and exits only; the result is that of clients who send everything, and workers do not change it."
    from darkdistill_nb.federated.darkdistill import DarkDistill
    from darkdistill_nb.core.datasets import load
    from darkdistill_nb.federated.engine import simulate, train_alone
    from darkdistill_nb.federated.method import EEFL, make_clients, nbytes

    base = DarkDistill if darkdistill else EEFL

    class Whole(base):
        def local_update(self, weights, data, client, rnd, streams):
            u = super().local_update(weights, data, client, rnd, streams)
            u.weights = {
                k: v.detach().clone() for k, v in self.tier_net(client.tier).state_dict().items()
            }
            return u

    train, test = load("digits")
    train = train.subset(torch.arange(200))
    clients = make_clients(train.y, 4)
    go = lambda method, workers: simulate(
        method(participation=1.0),
        lora_net,
        train,
        test,
        clients,
        rounds=2,
        eval_every=2,
        workers=workers,
    )
    run, whole, pool = go(base, 1), go(Whole, 1), go(base, 2)
    for k, v in run.state["net"].items():
        assert torch.equal(v, whole.state["net"][k]) and torch.equal(v, pool.state["net"][k]), k
    nets = [run.method.tier_net(c.tier) for c in clients]
    histograms = 4 * 10 * 10 * 4 if darkdistill else 0
    for row, more in zip(run.log, whole.log):
        assert row["bytes_up"] == sum(nbytes(lora_state(n)) for n in nets) + histograms
        assert (
            row["bytes_down"]
            == sum(nbytes(n.state_dict()) for n in nets)
            == more["bytes_up"] - histograms
        )
    if not darkdistill:
        assert len(train_alone(EEFL(), lora_net, train, test, clients[:1], rounds=4)) == 1


def lora_net():
    return add_lora(tiny(), rank=4, alpha=8)


# ---------------------------------------------------------------- arguments

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: cnn((0, 8, 8), 3), "input_shape.0.=0"),
        (lambda: cnn((1, -8, 8), 3), "input_shape.1.=-8"),
        (lambda: cnn((1, 8), 3), "input_shape="),
        (lambda: cnn((1, 8.5, 8), 3), "input_shape.1.=8.5"),
        (lambda: cnn("178", 3), "input_shape='178'"),
        (lambda: cnn(n_classes=0), "n_classes=0"),
        (lambda: cnn(stages=0), "stages=0"),
        (lambda: cnn(stages=nan), "stages=nan"),
        (lambda: cnn(stages=10**9), "stages=1000000000"),
        (lambda: cnn(width=6), "width=6"),
        (lambda: cnn(depth=1.5), "depth=1.5"),
        (lambda: wrn(input_shape=(1, -8, 8)), "input_shape.1.=-8"),
        (lambda: wrn(depth=nan), "depth=nan"),
        (lambda: wrn(depth=10**7), "depth=10000000"),
        (lambda: wrn(widen=0), "widen=0"),
        (lambda: wrn(exits=()), "must rise"),
        (lambda: wrn(exits=(1, 2.5)), "exits.1.=2.5"),
        (lambda: wrn(features=0), "features=0"),
        (lambda: wrn(bias=1), "bias=1"),
        (lambda: msdnet(scales=1.5), "scales=1.5"),
        (lambda: msdnet(head=-1), "head=-1"),
        (lambda: vit(n_classes=0), "n_classes=0"),
        (lambda: vit(5), "name=5"),
        (lambda: vit("vit_tiny_patch16_224", img_size=32, patch_size=0), "cannot be built"),
        (lambda: vit("vit_tiny_patch16_224", img_size=32, depth=0), "depth=0"),
        (lambda: build_net(None, (1, 8, 8), 3), "arch=None"),
        (lambda: build_net("wrn", (1, 8, 8), 3, stages=4), "has no option 'stages'"),
        (lambda: build_net("cnn", (8, 8), 3), "input_shape="),
        (
            lambda: EarlyExitNet(nn.Identity(), [nn.Identity()], [nn.Identity()], (), 3),
            "input_shape=",
        ),
        (
            lambda: EarlyExitNet(nn.Identity(), [nn.Identity()], [nn.Identity()], (1,), 1.5),
            "n_classes=1.5",
        ),
        (lambda: EarlyExitNet(None, [nn.Identity()], [nn.Identity()], (1,), 1), "stem="),
        (lambda: EarlyExitNet(nn.Identity(), [3], [nn.Identity()], (1,), 1), "stages="),
        (lambda: cnn()(torch.zeros(1, 1, 8, 8), "half"), "ge='half'"),
        (lambda: cnn().prefix(0), "m=0"),
        (lambda: cnn().prefix(1.5), "m=1.5"),
        (lambda: block_of("head.weight"), "name='head.weight'"),
        (lambda: block_of("stages.x"), "name='stages.x'"),
        (lambda: Exit(nn.Identity(), 0, 3), "width=0"),
        (lambda: PooledMap(0), "grid=0"),
        (lambda: TokenMean(3, 2), "stop=2"),
        (lambda: scale_gradient(torch.ones(1), nan), "s=nan"),
        (lambda: unpack(torch.zeros(1, 5), [(1, 2, 2)]), "shapes="),
        (lambda: LoRALinear(nn.Linear(4, 6), dict(q=3), of=3), "parts.'q'.=3"),
        (lambda: LoRALinear(nn.Linear(4, 5), dict(q=0), of=3), "of=3"),
        (lambda: LoRALinear(nn.Linear(4, 6), {}), "parts="),
        (lambda: add_lora(tiny(), alpha=inf), "alpha=inf"),
        (lambda: add_lora(tiny(), rank=1.5), "rank=1.5"),
        (lambda: add_lora(tiny(), dropout=nan), "dropout=nan"),
        (lambda: add_lora(tiny(), targets=(3,)), "targets="),
    ],
)
def test_bad_arguments_get_one_sentence(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    one = np.int64(1)
    net = cnn((one, 8 * one, 8), 3 * one, stages=2 * one, width=8 * one)
    assert net.input_shape == (1, 8, 8) and len(net.prefix(one)) == 1
    assert len(wrn(10 * one, one, (one, 8, 8), exits=(one, 3 * one))) == 2


def test_counting_leaves_frozen_parts_as_they_are():
    net = wrn(10, 1, (1, 8, 8))
    norm = net.stages[0][0].bn1.requires_grad_(False).eval()
    net.macs(), net.latent_shape()
    assert not norm.training and net.training and net.stages[0][0].bn2.training

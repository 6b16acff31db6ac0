"The runner: its answers against the loop over single images, for all families, scores, policies, kernels and sizes; streams; ONNX; clear errors."

import builtins, copy, functools, json, math
import numpy as np
import pytest
import torch
from torch import nn
from darkdistill_nb.experiments import bench
from darkdistill_nb.exits import runner as R
from darkdistill_nb.exits.networks import cnn, msdnet, vit, wrn
from darkdistill_nb.exits.training import BoostNet, Joint
from darkdistill_nb.exits.inference import take_exit
from darkdistill_nb.exits.scores import (
    Confidence,
    Difference,
    Energy,
    Entropy,
    Gate,
    Margin,
    Patience,
    Saturation,
    Score,
    confidence,
)
from darkdistill_nb.exits.runner import (
    ExitRunner,
    FusedBlock,
    OnnxRunner,
    PackedLinear,
    export_onnx,
    fuse,
    loop_exits,
    onednn_route,
    route_is_exact,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    name="vit_tiny_patch16_224",
    img_size=16,
    patch_size=4,
    embed_dim=48,
    num_heads=3,
    depth=4,
    exits=(1, 2, 4),
)


def noisy(net, seed=0):
    "A network whose gains, biases and running statistics are not at their trivial start."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(
                torch.randn(p.shape, generator=g) * (0.5 * p.std() + 0.02 if p.numel() > 1 else 0.1)
            )
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.2, generator=g)
                m.running_var.uniform_(0.5, 2, generator=g)
    return net.eval()


NETS = {
    "vit": lambda: vit(n_classes=7, **TINY),
    "vit, LayerScale, no qkv bias": lambda: vit(
        n_classes=7, **{**TINY, "num_heads": 4}, init_values=0.5, qkv_bias=False
    ),
    "vit, deep stages": lambda: vit(
        n_classes=3, **{**TINY, "depth": 6, "exits": (3, 6), "num_heads": 1}
    ),
    "vit, no class token": lambda: vit(n_classes=7, **TINY, class_token=False, global_pool="avg"),
    "vit, registers": lambda: vit(n_classes=7, **TINY, reg_tokens=2),
    "vit, normalised queries": lambda: vit(n_classes=7, **TINY, qk_norm=True),
    "cnn": lambda: cnn((3, 16, 16), 7, width=8),
    "wrn": lambda: wrn(10, 1, (3, 16, 16), 7),
    "msdnet": lambda: msdnet((3, 16, 16), 7, exits=3, channels=4, growth=2, head=8),
}
FUSED = {
    "vit": True,
    "vit, LayerScale, no qkv bias": True,
    "vit, deep stages": True,
    "vit, no class token": True,
    "vit, registers": True,
}


def build(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return noisy(NETS[name](), seed)


def images(n, seed=1, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Ranks(Score):
    "A score with few values, of which thresholds can be equal: the predicted class."

    def of(self, F):
        return F.argmax(-1).float()


@functools.cache
def raw(name, n=20):
    "A network by name, images, and its raw logits and features at all exits, one image at a time, in float64."
    net, x = build(name), images(n)
    wide, f, a = copy.deepcopy(net).double(), [], []
    with torch.inference_mode():
        for v in x.double():
            z, fs, As = wide.stem(v[None]), [], []
            for stage, exit in zip(wide.stages, wide.exits):
                z = stage(z)
                As.append(exit.features(z))
                fs.append(exit.classify(As[-1]))
            f.append(fs)
            a.append(As)
    return net, x, [torch.cat(t) for t in zip(*f)], [torch.cat(t) for t in zip(*a)]


def reference(name, score=None, objective=None, n=20):
    "Network, images, deciding logits (E, N, K) and scores (E, N)."
    net, x, f, a = raw(name, n)
    F = torch.stack((objective or Joint()).predict(f))
    score = score or Confidence()
    with torch.inference_mode():
        S = (copy.deepcopy(score).double() if isinstance(score, nn.Module) else score).score(F, a)
    return net, x, F, S.double()


def clear_cases(F, S, T, eps=1e-5):
    "Pictures that no rounding error can move: scores away from their thresholds, or few-valued, and a clear class."
    T = torch.tensor(T, dtype=torch.double)[:, None]
    near = ((S - T).abs() < eps) & (S != T)
    top = F.topk(2, -1).values
    return ~(near[:-1].any(0) | ((top[..., 0] - top[..., 1]) < eps).any(0))


def one_of(s, g):
    "A threshold that is itself a score."
    t = float(s[torch.randint(len(s), (1,), generator=g)])
    return t if math.isfinite(t) else 0.5


def between(s, g):
    "A threshold in the middle of one of the five widest gaps between scores: no rounding crosses it."
    s = s[s.isfinite()].sort().values
    if len(s) < 6:
        return 0.5
    wide = s.diff().topk(5).indices
    k = int(wide[torch.randint(5, (1,), generator=g)])
    return float(s[k] + s[k + 1]) / 2


def gate(name, seed=3):
    "A learned score with the same weights in each run: another draw may tell no image from another."
    net = raw(name)[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Gate(len(net), net.n_classes)


SCORES = [
    Confidence(),
    Margin(),
    Entropy(),
    Energy(),
    Patience(),
    Saturation(),
    Difference(),
    Ranks(),
]


@pytest.mark.parametrize("i,name", list(enumerate(NETS)), ids=list(NETS))
def test_compaction_gives_the_answers_of_the_loop(i, name):
    g, seen, E = torch.Generator().manual_seed(3), set(), len(raw(name)[0])
    scores = SCORES + [gate(name)]
    for j, score in enumerate(scores if name in ("vit", "cnn") else scores[i % 3 :: 3]):
        objective = (Joint(), BoostNet())[j % 2]
        net, x, F, S = reference(name, score, objective)
        few = isinstance(score, (Patience, Ranks))  # few values: thresholds are among them
        T = [one_of(s, g) if few else between(s, g) for s in S[:-1]] + [-math.inf]
        ok, want = clear_cases(F, S, T), take_exit(S, T)
        assert ok.float().mean() > 0.8, "too few clear cases to test anything"
        o = ExitRunner(net, T, score, objective, micro=(24, 5, 1)[(i + j) % 3])(x, logits=True)
        loop, logits, _ = loop_exits(net, x, T, score, objective)
        assert torch.equal(o.exit[ok], want[ok]) and torch.equal(loop[ok], want[ok])
        every, tol = F[want, torch.arange(len(x))], 1e-4 * (1 + F.abs().max())
        assert torch.equal(o.prediction[ok], every.argmax(-1)[ok])
        assert (o.logits[ok] - every[ok]).abs().max() < tol
        same = o.exit == loop
        assert (o.logits[same] - logits[same]).abs().max() < tol
        assert torch.equal(o.macs, torch.tensor(net.macs())[o.exit]) and o.ids == list(range(20))
        seen |= set(want.tolist())
    assert len(seen) > 1, "the thresholds used one exit only"


@pytest.mark.parametrize("name", NETS)
def test_which_networks_are_fused(name):
    net = raw(name)[0]
    r = ExitRunner(net, [0.5] * len(net))
    assert r.fused == [FUSED.get(name, False)] * len(r)
    assert all(t is not None for t in r.tokens) == (
        FUSED.get(name, False) and "no class" not in name
    )


@pytest.mark.parametrize("objective", [None, BoostNet])
@pytest.mark.parametrize("score", [None, Patience])
@pytest.mark.parametrize("name", ["vit", "cnn", "wrn"])
def test_every_plan_gives_the_answers_of_the_loop(name, score, objective):
    "On a CPU the same functions run as on a GPU, unrecorded; in float64 no image lies at its threshold."
    net, x = build(name).double(), images(24).double()
    score, objective = score and score(), objective and objective()
    T = [2.0] * len(net) if score else middle(net, x, objective)
    exit, logits, _ = loop_exits(net, x, T, score, objective)
    assert score or len(set(exit.tolist())) > 1
    for plan in R.PLANS:
        r = ExitRunner(net, T, score, objective, plan=plan)
        for n in (24, 7, 24, 1):  # a smaller batch in the room of a larger one, and back
            o = r(x[:n], logits=True)
            assert torch.equal(o.exit, exit[:n]), plan
            assert (o.logits - logits[:n]).abs().max() < 1e-4
        assert plan == "gather" or str(r.plan[R.size_for(24)]) == f"{plan}: asked for"


def middle(net, x, objective):
    "A threshold for each exit, halfway between two scores."
    r = ExitRunner(net, [0.0] * len(net), objective=objective, plan="gather")
    ranked = confidence(r.all_exits(x)).sort(1).values
    return ((ranked[:, 11] + ranked[:, 12]) / 2).tolist()


def test_new_thresholds_reach_the_recordings():
    net, x = build("cnn"), images(12)
    for plan in R.PLANS:
        r = ExitRunner(net, [0.0] * len(net), plan=plan)
        assert set(r(x).exit.tolist()) == {0}
        R._set_rule(r, r.costs, [2.0] * len(net), r.score, r.objective)
        assert set(r(x).exit.tolist()) == {len(net) - 1}


def test_a_plan_that_cannot_be_recorded_is_left_out(monkeypatch):
    def fails(self, *args):
        raise RuntimeError("not while recording")

    monkeypatch.setattr(R.Launches, "run", fails)
    r = ExitRunner(build("cnn"), [0.5] * len(build("cnn")), plan="auto")
    assert r._try_plans(images(8)).name == "gather"
    assert "not while recording" in r._try_plans(images(8)).why


def test_ties_are_decided_alike_at_every_size():
    "A score equal to its threshold leaves; so do all images at threshold -inf; none does at +inf or just above."
    net, x, F, S = reference("vit", Ranks())
    for t in range(7):
        for micro in (1, 7, 64):
            o = ExitRunner(net, [t, t, 0], Ranks(), micro=micro)(x)
            assert torch.equal(o.exit, take_exit(S, [t, t, 0.0])), (t, micro)
    assert ExitRunner(net, [-math.inf] * 3)(x).exit.max() == 0
    assert ExitRunner(net, [math.inf] * 3)(x).exit.min() == 2
    o = ExitRunner(net, [2.0] * 3)(x)
    c = ExitRunner(net, [2.0] * 3, micro=1)(
        x
    ).score  # the last exit's own confidences, which are no threshold: it takes all
    assert o.exit.min() == 2 and torch.allclose(o.score, c, atol=1e-6)


def test_every_stage_runs_on_those_who_need_it_and_on_nobody_else():
    net, x, F, S = reference("cnn", n=50)
    T = [float(S[e].median()) + 1e-4 for e in range(4)]
    r, sizes = ExitRunner(net, T, micro=8), {e: [] for e in range(4)}
    plain = r.stage
    r.stage = lambda e, z: (sizes[e].append(len(z)), plain(e, z))[1]
    need = [int((take_exit(S, T) >= e).sum()) for e in range(4)]
    r(x)
    assert [sum(sizes[e]) for e in range(4)] == need
    assert [len(sizes[e]) for e in range(4)] == [-(-n // 8) for n in need], (
        "survivors were not put together again"
    )


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", [n for n in NETS if n in FUSED])
def test_fused_kernels_are_as_exact_as_the_modules(name):
    "Logits within 1e-5 of float64, and no worse than a few times the error of the modules."
    net, x, exact, _ = reference(name)
    fast = ExitRunner(net, [2.0] * len(net))
    slow = ExitRunner(net, [2.0] * len(net), kernels="modules")
    scale = exact.abs().max()
    errors = [float((r.all_exits(x) - exact).abs().max() / scale) for r in (fast, slow)]
    assert errors[0] < 1e-5 and errors[0] < 5 * errors[1] + 1e-6, errors
    assert (fast.always_last(x) - exact[-1]).abs().max() / scale < 1e-5


def test_the_class_token_alone_is_algebra_not_approximation():
    "In float64 the token of a fused block equals the module's to 1e-12, for any number of heads, LayerScale and biases."
    from timm.models.vision_transformer import Block

    tanh = dict(act_layer=lambda: nn.GELU("tanh"), proj_bias=False)
    for heads, kw in (
        (1, {}),
        (3, dict(qkv_bias=True)),
        (4, dict(init_values=0.3, qkv_bias=True)),
        (2, tanh),
    ):
        b, z = noisy(Block(24, heads, **kw).double()), torch.randn(3, 11, 24, dtype=torch.double)
        f = FusedBlock(b, torch.double)
        with torch.inference_mode():
            assert (f.token(z) - b(z)[:, 0]).abs().max() < 1e-12
            assert (f(z) - b(z)).abs().max() < 1e-12


def test_blocks_that_are_not_understood_are_left_alone():
    net = build("vit")

    class Odd(type(net.stages[0][0])):
        pass

    assert fuse(net.stages[0], (17, 48)) is not None
    net.stages[0][0].__class__ = Odd
    assert fuse(net.stages[0], (17, 48)) is None
    other = build("vit")
    plain = other.stages[1][0].mlp.forward
    other.stages[1][0].mlp.forward = lambda z: (
        1.01 * plain(z)
    )  # right types, other function: noticed by the answer
    assert fuse(other.stages[1], (17, 48)) is None and fuse(other.stages[0], (17, 48)) is not None
    r = ExitRunner(net, [2.0] * 3)
    assert r.fused == [False, True, True]
    with torch.inference_mode():
        assert torch.allclose(r.all_exits(images(5)), torch.stack(net(images(5))), atol=1e-5)


def test_without_onednn_the_answers_are_the_same(monkeypatch):
    net, x = build("vit"), images(9)
    here = ExitRunner(net, [2.0] * 3).all_exits(x)
    monkeypatch.setattr(R, "_packs", lambda dtype: False)
    monkeypatch.setattr(R, "route_is_exact", lambda: False)
    there = ExitRunner(net, [2.0] * 3)
    assert there.fused == [True] * 3 and not there.bodies[1][0].qkv.packed and not there.routed
    assert torch.allclose(there.all_exits(x), here, atol=1e-5)


def test_the_route_is_probed_and_never_left_on(monkeypatch):
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this PyTorch has no such setting")
    m = torch.backends.mkldnn.matmul
    was = m.fp32_precision
    with pytest.raises(KeyError):
        with onednn_route():
            assert m.fp32_precision == "bf16"
            raise KeyError
    assert m.fp32_precision == was
    net = build("vit")
    ExitRunner(net, [2.0] * 3)(images(3))
    assert m.fp32_precision == was
    with pytest.raises(ValueError, match="NaN"):
        ExitRunner(net, [2.0] * 3)(images(3) * math.nan)
    assert m.fp32_precision == was
    rough = torch.bmm  # a machine that uses the permission: bf16 inside
    monkeypatch.setattr(
        torch,
        "bmm",
        lambda a, b: (
            rough(a.bfloat16().float(), b.bfloat16().float())
            if m.fp32_precision == "bf16"
            else rough(a, b)
        ),
    )
    assert not route_is_exact.__wrapped__()


def test_bf16_agrees_where_the_class_is_clear():
    net, x, exact, _ = reference("vit", n=64)
    got = ExitRunner(net, [2.0] * 3, dtype=torch.bfloat16).all_exits(x)
    error = (got - exact).abs().max()
    assert got.dtype == torch.float32 and error < 0.05 * exact.abs().max()
    top = exact.topk(2, -1).values
    clear = top[..., 0] - top[..., 1] > 2 * error
    assert clear.float().mean() > 0.5
    assert torch.equal(got.argmax(-1)[clear], exact.argmax(-1)[clear])
    for name in ("cnn", "wrn", "msdnet"):
        n = build(name)
        with torch.inference_mode():
            want = torch.stack(n(x))
        assert (
            ExitRunner(n, [2.0] * len(n), dtype=torch.bfloat16).all_exits(x) - want
        ).abs().max() < 0.1 * want.abs().max()


def test_packed_linear_on_odd_shapes():
    for n, i, o in ((1, 1, 1), (3, 17, 5), (65, 48, 7)):
        w, b, x, r = torch.randn(o, i), torch.randn(o), torch.randn(n, i), torch.randn(n, o)
        lin = PackedLinear(w, b)
        assert torch.allclose(lin(x), x @ w.T + b, atol=1e-5)
        assert torch.allclose(lin(x, add=r), x @ w.T + b + r, atol=1e-5)
        assert torch.allclose(lin(x, gelu="none"), nn.functional.gelu(x @ w.T + b), atol=1e-5)
        assert torch.allclose(PackedLinear(w)(x), x @ w.T, atol=1e-5)


# ---------------------------------------------------------------- the runner as an object


def test_a_runner_is_a_snapshot_in_eval_mode():
    net, x = build("wrn"), images(6)
    r = ExitRunner(net, [2.0] * 3)
    before, stats = r.all_exits(x), net.stages[0][0].bn1.running_mean.clone()
    net.train()
    with torch.no_grad():
        [p.zero_() for p in net.parameters()]
    assert torch.equal(r.all_exits(x), before)
    assert net.training
    assert torch.equal(net.stages[0][0].bn1.running_mean, stats)
    assert all(p.requires_grad for p in net.parameters())
    net.eval()
    assert not torch.allclose(ExitRunner(net, [2.0] * 3).all_exits(x), before)


def test_errors_are_clear():
    net, x = build("cnn"), images(4)
    for T in ([0.5] * 3, [0.5] * 5, []):
        with pytest.raises(ValueError, match=f"{len(T)} thresholds for 4 exits: give one per exit"):
            ExitRunner(net, T)
    with pytest.raises(ValueError, match="contains NaN"):
        ExitRunner(net, [0.5, math.nan, 0.5, 0])
    with pytest.raises(ValueError, match="score='sure' is unknown"):
        ExitRunner(net, [0.5] * 4, "sure")
    with pytest.raises(ValueError, match="kernels='quick' must be one of auto"):
        ExitRunner(net, [0.5] * 4, kernels="quick")
    for m in (0, -3):
        with pytest.raises(ValueError, match=f"micro={m} must be a whole number of at least 1"):
            ExitRunner(net, [0.5] * 4, micro=m)
    r = ExitRunner(net, [0.9, 0.9, 0.9, 0])
    with pytest.raises(ValueError, match="no images"):
        r(x[:0])
    with pytest.raises(
        ValueError, match=r"shape \(4, 3, 8, 8\); this network takes \(n, 3, 16, 16\)"
    ):
        r(x[:, :, :8, :8])

    class Late(Confidence):
        def step(self, F, a=None, state=None):
            s, _ = super().step(F)
            return (s if state is None else s * math.nan), {"seen": s}

    with pytest.raises(ValueError, match="Late is NaN for 4 of 4 images at exit 2"):
        ExitRunner(net, [2.0] * 4, Late())(x)
    one = x.clone()
    one[2] = math.nan
    with pytest.raises(ValueError, match="Confidence is NaN for 1 of 4 images at exit 1"):
        r(one)
    s = r.stream()
    with pytest.raises(ValueError, match="no images"):
        s.push(x[:0])
    with pytest.raises(ValueError, match="ids has 3 entries for 4 images"):
        s.push(x, [1, 2, 3])
    with pytest.raises(ValueError, match="batch=0"):
        r.stream(0)
    with pytest.raises(ValueError, match="repeats=0"):
        r.latency(x, 0)


def test_latency_reports_what_was_run():
    net, x = build("cnn"), images(8)
    m = ExitRunner(net, [-math.inf] * 4).latency(x, 2)
    assert m["macs"] == net.macs()[0] and m["shares"] == [1, 0, 0, 0] and 0 < m["best"] <= m["us"]


def test_compiled_stages_are_the_same_loop(monkeypatch):
    "kernels='compile' hands every stage, and the stem, to torch.compile with a free batch axis."
    calls = []
    monkeypatch.setattr(torch, "compile", lambda m, dynamic: calls.append(dynamic) or m)
    net, x = build("cnn"), images(4)
    r = ExitRunner(net, [2.0] * 4, kernels="compile")
    assert calls == [True] * 5 and r.fused == [False] * 4
    with torch.inference_mode():
        assert torch.allclose(r.all_exits(x), torch.stack(net(x)), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["vit", "cnn", "wrn"])
def test_on_a_gpu(name):
    net, x, F, S = reference(name)
    T = [float(s.median()) + 1e-4 for s in S]
    ok = clear_cases(F, S, T, 1e-3)
    assert torch.equal(ExitRunner(net, T, device="cuda")(x).exit[ok].cpu(), take_exit(S, T)[ok])


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_a_stream_gives_every_picture_its_answer(name):
    rng = np.random.default_rng(0)
    net, x, F, S = reference(name, Patience(), BoostNet(), n=70)
    T = [1.0, 1, 1, 0][-len(net) :]
    want = take_exit(S, T)
    s = ExitRunner(net, T, Patience(), BoostNet()).stream(batch=8, logits=True)
    got, i = {}, 0
    while i < 70:
        n = int(rng.integers(1, 12))
        o = s.push(x[i : i + n], ids=[("image", j) for j in range(i, min(i + n, 70))])
        i += n
        assert max(s.waiting()) < 8
        got.update(
            {
                k: (e, p, l)
                for k, e, p, l in zip(o.ids, o.exit.tolist(), o.prediction.tolist(), o.logits)
            }
        )
        if i > 35 and i - n <= 35:
            o = s.flush()
            got.update(
                {
                    k: (e, p, l)
                    for k, e, p, l in zip(o.ids, o.exit.tolist(), o.prediction.tolist(), o.logits)
                }
            )
    assert 0 < sum(s.waiting()) == 70 - len(got)
    o = s.flush()
    got.update(
        {
            k: (e, p, l)
            for k, e, p, l in zip(o.ids, o.exit.tolist(), o.prediction.tolist(), o.logits)
        }
    )
    assert set(got) == {("image", j) for j in range(70)}
    assert sum(s.waiting()) == 0
    assert len(s.flush()) == 0
    ok = clear_cases(F, S, T)
    for j in range(70):
        e, p, l = got["image", j]
        if ok[j]:
            assert e == want[j]
            assert p == F[e, j].argmax()
            assert (l - F[e, j]).abs().max() < 1e-4 * (1 + F.abs().max())


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name,objective", [("vit", "joint"), ("cnn", "boostnet")])
def test_onnx_gives_the_same_answers(name, objective, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    p, options = (BoostNet(w=0.5), dict(w=0.5)) if objective == "boostnet" else (Joint(), None)
    net, x, F, S = reference(name, Margin(), p)
    net, F, S = net.prefix(2).eval(), F[:2], S[:2]
    T = [float(S[0].median()) + 1e-4, -math.inf]
    m = json.loads(
        export_onnx(net, tmp_path / "phone", T, "margin", objective, options).read_text()
    )
    assert m["macs"] == net.macs()
    assert m["thresholds"] == [T[0], "-inf"]
    assert m["input_shape"] == [3, 16, 16]
    r = OnnxRunner(tmp_path / "phone", micro=7)
    assert not any(isinstance(v, nn.Module) for v in vars(r).values())
    ok = clear_cases(F, S, T)
    o = r(x, logits=True)
    assert torch.equal(o.exit[ok], take_exit(S, T)[ok])
    assert (o.logits - F[o.exit, torch.arange(20)])[ok].abs().max() < 1e-4 * (1 + F.abs().max())
    assert 0 < o.exit.sum() < 20
    assert torch.allclose(r.all_exits(x).double(), F, atol=1e-4 * float(1 + F.abs().max()))
    s = r.stream(4)
    parts = [s.push(x[:11]), s.push(x[11:]), s.flush()]
    assert dict(sum([list(zip(q.ids, q.exit.tolist())) for q in parts], [])) == dict(
        enumerate(o.exit.tolist())
    )


def test_onnx_errors_are_clear(tmp_path, monkeypatch):
    net = build("cnn")
    with pytest.raises(FileNotFoundError, match="export_onnx writes it"):
        OnnxRunner(tmp_path)
    real = builtins.__import__

    def missing(name, *a, **k):
        if name in ("onnx", "onnxruntime"):
            raise ImportError(name)
        return real(name, *a, **k)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install darkdistill_nb\[onnx\]"):
        export_onnx(net, tmp_path, [0.5] * 4)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed"):
        OnnxRunner(tmp_path)


BROKEN = {
    "not JSON": "{",
    "nested": "[" * 100_000,
    "a list": "[1]",
    "nothing": "{}",
    "one field": '{"macs": [1, 2]}',
    "bytes": "\xff\xfe",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_manifest_is_named(tmp_path, name):
    pytest.importorskip("onnxruntime")
    (tmp_path / "manifest.json").write_bytes(BROKEN[name].encode("latin-1"))
    with pytest.raises(ValueError, match="manifest.json") as e:
        OnnxRunner(tmp_path)
    assert "export_onnx" in str(e.value) and len(str(e.value)) < 500


def test_a_manifest_holds_both_infinities(tmp_path):
    import json

    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    net, T = build("cnn"), [math.inf, 0.5, -math.inf, -math.inf]
    path = export_onnx(net, tmp_path, T)
    assert json.loads(path.read_text())["thresholds"] == ["inf", 0.5, "-inf", "-inf"]
    assert (
        OnnxRunner(tmp_path).thresholds
        == T
        == OnnxRunner(tmp_path, ["inf", 0.5, "-inf", None]).thresholds
    )
    for bad in (dict(micro=0), dict(micro=1.5), dict(threads=0)):
        with pytest.raises(ValueError, match="must be a whole number"):
            OnnxRunner(tmp_path, **bad)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda n: ExitRunner(n, [0.5] * 4, micro=1.5), "micro=1.5"),
        (lambda n: ExitRunner(n, [0.5] * 4, dtype=torch.int8), "dtype=torch.int8"),
        (lambda n: ExitRunner(n, [0.5] * 4, dtype="bf16"), "dtype='bf16'"),
        (lambda n: ExitRunner(nn.Linear(2, 2), [0.5] * 4), "net='Linear'"),
        (lambda n: ExitRunner(n, 0.5), "must be a list"),
        (lambda n: ExitRunner(n, [[0.5]] * 4), "must be a number"),
        (lambda n: ExitRunner(n, ["half"] + [0.5] * 3), "'half'"),
        (lambda n: ExitRunner(n, [0.5] * 4, objective="boost"), "objective='boost'"),
        (lambda n: ExitRunner(n, [0.5] * 4).stream(2.5), "batch=2.5"),
        (lambda n: ExitRunner(n, [0.5] * 4).stream(4, "yes"), "logits='yes'"),
        (lambda n: ExitRunner(n, [0.5] * 4).latency(images(2), 1.5), "repeats=1.5"),
        (lambda n: ExitRunner(n, [0.5] * 4)([1, 2]), "x='list'"),
        (lambda n: loop_exits(n, images(2), [0.5] * 3), "3 thresholds for 4 exits"),
        (lambda n: loop_exits(n, images(2)[:0], [0.5] * 4), "at least 1"),
    ],
)
def test_hostile_settings_get_one_sentence(call, words):
    with pytest.raises(ValueError) as e:
        call(build("cnn"))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_numpy_numbers_and_arrays():
    import numpy as np

    r = ExitRunner(
        build("cnn"), np.array([0.5, math.inf, 0.5, -math.inf], np.float32), micro=np.int64(3)
    )
    assert r.thresholds == [0.5, math.inf, 0.5, -math.inf] and len(r(images(5))) == 5


# ---------------------------------------------------------------- the benchmark


def test_bench_exits_command(tmp_path, monkeypatch, capsys):
    toy = vit(n_classes=5, **{**TINY, "exits": (1, 2, 3, 4)}).eval()
    real = bench.bench_exits
    monkeypatch.setattr(
        bench, "bench_exits", lambda rounds, device: real(rounds, device, net=toy, batches=(1, 8))
    )
    threads = torch.get_num_threads()
    try:
        assert bench.main(["exits", "--rounds", "1", "--save", str(tmp_path / "r.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "plain PyTorch, always last" in out and "stream" in out and "realised" in out
    from darkdistill_nb.core.records import load_record

    record = load_record(tmp_path / "r.json")
    assert record.info["table"] in out and len(record.info["rows"]) == 13 and record.seconds > 0
    with pytest.raises(SystemExit):
        bench.main(["exits", "--rounds", "0"])
    assert "--rounds 0 must be at least 1" in capsys.readouterr().err


def test_prescribed_exits_and_the_arithmetic_of_the_table():
    who = bench.exit_list(256)
    assert torch.bincount(who).tolist() == [128, 51, 38, 39]
    net, x = build("cnn"), images(20)
    o = ExitRunner(net, [0.0] * 4, bench.Replay(who[:20]), micro=3)(x)
    assert torch.equal(o.exit, who[:20])
    named = {
        ("plain PyTorch, always last", 4): [[8.0], None],
        ("always last", 4): [[4.0], [5.0]],
        ("always last", 2): [[1.0, 2], [3, 1]],
        ("runner", 4): [[1.0], [1.0]],
    }
    row = bench.exit_rows({("float32", *k): t for k, t in named.items()}, lambda n: 2.5, n=4)[-1]
    assert (
        row["full"] == 2 and row["eager"] == 8 and row["realised"] == 0.8
    )  # best always-last: 1 + 1 seconds

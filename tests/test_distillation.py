"What crosses notebooks 02-02c: limits of all losses, awkward batches, the driver with every method, and the benchmark command."

import copy, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch, torch.nn.functional as F
from conftest import LONG
from torch import nn
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.scenes import shapes
from darkdistill_nb.distill.losses import (
    RKD,
    CropFlip,
    Taps,
    Views,
    distill,
    dist_loss,
    dkd_loss,
    kd_loss,
    logit_mse,
    rkd_angle,
    rkd_distance,
    teacher_table,
)
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.distill.features import (
    CRD,
    METHODS,
    Hint,
    at_loss,
    attention_map,
    lpd_loss,
    method_loss,
)
from darkdistill_nb.distill.online import (
    BDKD,
    DML,
    bidirectional_loss,
    entropy,
    self_distillation,
    train_together,
)
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.training import fit

ROOT = Path(__file__).resolve().parent.parent
Y = torch.tensor([0, 1, 2, 3, 0, 1])
maps = lambda v: v.reshape(len(v), 2, 2, 2) if v.shape[1] == 8 else v.reshape(len(v), -1, 1, 1)

# loss(student, teacher, labels) on (B, 8) logits or features
ZERO = {  # 0 for a perfect copy
    "kd": lambda s, t, y: kd_loss(s, t),
    "kd T=1": lambda s, t, y: kd_loss(s, t, 1),
    "mse": lambda s, t, y: logit_mse(s, t, y, 1.0),
    "dkd": lambda s, t, y: dkd_loss(s, t, y),
    "dist": lambda s, t, y: dist_loss(s, t, T=2.0),
    "at": lambda s, t, y: at_loss(maps(s), maps(t)),
    "rkd": lambda s, t, y: RKD()(s, t),
    "rkd distance": lambda s, t, y: rkd_distance(s, t),
    "rkd angle": lambda s, t, y: rkd_angle(s, t),
    "bdkd": lambda s, t, y: bidirectional_loss(s, t),
}
crd = CRD(Y, 8, 8, negatives=7, generator=torch.Generator().manual_seed(0))
ALL = {
    **ZERO,
    "mse .5": lambda s, t, y: logit_mse(s, t, y),
    "lpd": lambda s, t, y: lpd_loss(s, t),
    "crd": lambda s, t, y: crd(s, t, torch.arange(len(s))),
    "hint": lambda s, t, y: Hint(8, 8)(s, t),
    "dml": lambda s, t, y: DML()(0, [s, t], y),
    "bdkd student": lambda s, t, y: BDKD()(0, [s, t], y),
    "bdkd teacher": lambda s, t, y: BDKD()(1, [t, s], y),
    "self": lambda s, t, y: self_distillation([s, t], y, [s, t]),
}
FEATURE = {
    "at",
    "rkd",
    "rkd distance",
    "rkd angle",
    "lpd",
    "crd",
    "hint",
    "mse",
    "mse .5",
    "self",
}  # a constant added to all logits matters


def rows(n=6, seed=0, scale=1.0):
    return scale * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_relations_of_the_teacher_may_be_made_once(n, dtype):
    "The loss is to the last bit that of the two losses by themselves, the gradient up to rounding; nothing flows into the teacher."
    teacher, out = rows(n, 1).to(dtype).requires_grad_(), {}
    once = RKD(5, 10).relations(teacher)
    for name, loss in {
        "once": lambda s: RKD(5, 10)(s, once),
        "each": lambda s: RKD(5, 10)(s, teacher),
        "by hand": lambda s: 5 * rkd_distance(s, teacher) + 10 * rkd_angle(s, teacher),
    }.items():
        s = rows(n).to(dtype).requires_grad_()
        loss(s).backward()
        out[name] = loss(s), s.grad
    for v, g in out.values():
        assert torch.equal(v, out["by hand"][0])
        close = {torch.float64: 1e-14, torch.float32: 1e-8, torch.bfloat16: 1e-3}[dtype]
        assert torch.allclose(g, out["by hand"][1], rtol=0, atol=close)
    assert teacher.grad is None and (n < 3 or float(out["once"][0].detach()) > 0)


def relations_written_out(h):
    "Distances and cosines from the (n, n, h) differences, as in the paper's equations 5 and 7."
    away = h.unsqueeze(0) - h.unsqueeze(1)
    sq = away.pow(2).sum(-1)
    d = sq.clamp_min(1e-12).sqrt() * (sq > 0)
    u = away * (sq > 0)[..., None] / sq.clamp_min(1e-12).sqrt()[..., None]
    return d / d[d > 0].mean(), u @ u.transpose(1, 2)


@pytest.mark.parametrize("width", [3, 64, 512])
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("kind", ["apart", "equal rows", "nearly equal rows"])
def test_relations_from_the_gram_matrix(width, shift, kind):
    "One product of matrices gives the relations of the differences, loss and gradient, equal rows included."
    g, out = torch.Generator().manual_seed(1), {}
    student, teacher = (torch.randn(20, w, generator=g).double() + shift for w in (width, width + 1))
    if kind != "apart":
        student[3], student[5], teacher[2] = student[7], student[9], teacher[7]
    if kind == "nearly equal rows":
        student[3] += 1e-4 * torch.randn(width, generator=g)
    for name, of in {"gram": RKD().relations, "written out": relations_written_out}.items():
        s = student.clone().requires_grad_()
        pairs = zip(of(s), of(teacher))
        value = sum(w * F.smooth_l1_loss(a, b) for w, (a, b) in zip((5, 10), pairs))
        value.backward()
        out[name] = value.detach(), s.grad
    (v, grad), (v0, grad0) = out.values()
    assert abs(float(v - v0)) < 7e-9 and bool(grad.isfinite().all())
    assert torch.allclose(grad, grad0, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ZERO)
def test_a_perfect_copy_has_no_loss_and_no_gradient(name):
    s = rows().requires_grad_()
    value = ZERO[name](s, s.detach().clone(), Y)
    value.backward()
    assert abs(float(value.detach())) < 1e-5 and float(s.grad.abs().max()) < 1e-4


def test_attraction_and_contrast_are_not_zero_for_a_copy():
    s = rows()
    assert lpd_loss(s, s) > 0.01 and crd(s, s, torch.arange(6)) > 0.1
    assert lpd_loss(torch.ones(6, 3), s) == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", ["duplicates", "all equal", "zeros", "one", "large"])
def test_gradients_are_finite(name, case):
    a, b = rows(), rows(seed=1)
    a, b = {
        "duplicates": (a[[0, 0, 1, 1, 2, 2]], b[[0, 0, 1, 1, 2, 2]]),
        "all equal": (a[[0] * 6], b[[0] * 6]),
        "zeros": (0 * a, 0 * b),
        "one": (a[:1], b[:1]),
        "large": (100 * a, 100 * b),
    }[case]
    a.requires_grad_()
    value = ALL[name](a, b, Y[: len(a)])
    assert torch.isfinite(value) and value.ndim == 0
    if value.requires_grad:
        value.backward()
        assert a.grad is None or torch.isfinite(a.grad).all()
    assert value.requires_grad, "a loss without a gradient teaches nothing"


@pytest.mark.parametrize("name", ALL)
def test_half_precision(name):
    "bf16 inputs give the value of the same numbers in 32 bit: the arithmetic runs in 32 bit."
    a, b = rows().bfloat16(), rows(seed=1).bfloat16()
    torch.manual_seed(0)
    crd.generator.manual_seed(0)
    half = ALL[name](a.clone().requires_grad_(), b, Y)
    torch.manual_seed(0)
    crd.generator.manual_seed(0)
    full = ALL[name](a.float(), b.float(), Y)
    assert half.dtype == torch.float32 and torch.allclose(
        half, full, rtol=1e-3 if name != "crd" else 0.3
    )  # CRD's banks have moved in between
    half.backward()


@pytest.mark.parametrize("name", ALL)
def test_the_teacher_gets_no_gradient(name):
    a, b = rows().requires_grad_(), rows(seed=1).requires_grad_()
    ALL[name](a, b, Y).backward()
    if name == "self":
        b.grad -= torch.autograd.grad(F.cross_entropy(b, Y) / 2, b)[0]  # the deep exit's own labels
    assert b.grad is None or float(b.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", sorted(ALL.keys() - FEATURE))
def test_a_constant_added_to_logits_changes_nothing(name):
    a, b = rows(), rows(seed=1)
    assert torch.allclose(ALL[name](a + 3.0, b, Y), ALL[name](a, b, Y), atol=1e-4)


def test_logit_mse_sees_a_constant():
    assert logit_mse(rows() + 3, rows(), Y, 1.0).item() == pytest.approx(9, rel=1e-4)


def test_logit_mse_limits():
    "alpha=0: the gradient of the cross-entropy; alpha=1: no label matters."
    grad = lambda f: torch.autograd.grad(f(a := rows().requires_grad_()), a)[0]
    assert torch.equal(
        grad(lambda a: logit_mse(a, rows(seed=1), Y, 0.0)), grad(lambda a: F.cross_entropy(a, Y))
    )
    assert torch.equal(
        grad(lambda a: logit_mse(a, rows(seed=1), Y, 1.0)),
        grad(lambda a: logit_mse(a, rows(seed=1), Y.flip(0), 1.0)),
    )


def test_decoupled_distillation_recombines():
    "KL = TCKD + (1 - p_t) NCKD on random logits, also for a very certain teacher."
    for scale in (1.0, 30.0):
        a, b = rows(scale=scale).double(), rows(seed=1, scale=scale).double()
        rest = 1 - b.softmax(1)[range(6), Y]
        assert torch.allclose(dkd_loss(a, b, Y, 1.0, rest, 1.0), kd_loss(a, b, 1.0), atol=1e-8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kd_loss(rows(), rows(), -4), "T=-4"),
        (lambda: kd_loss(rows(), rows(), float("nan")), "T=nan"),
        (lambda: dkd_loss(rows(), rows(), Y, T=0), "T=0"),
        (lambda: dist_loss(rows(), rows(), T=-1), "T=-1"),
        (lambda: logit_mse(rows(), rows(), Y, -0.1), "alpha=-0.1"),
        (lambda: logit_mse(rows(), rows(), Y, 0.5, 0), "tau=0"),
        (lambda: method_loss("kd", alpha=1.5), "alpha=1.5"),
        (lambda: lpd_loss(rows(), rows(), 0), "k=0"),
        (lambda: CRD(Y, 8, 8, tau=-1), "tau=-1"),
        (lambda: CRD(Y, 8, 8, negatives=0), "negatives=0"),
        (lambda: CRD(Y, 8, 8, mode="loose"), "mode='loose'"),
        (lambda: bidirectional_loss(rows(), rows(), 0), "T=0"),
        (lambda: self_distillation([rows()], Y, alpha=2), "alpha=2"),
        (lambda: CropFlip()(rows(), None), "x's shape"),
    ],
)
def test_bad_settings_are_told(call, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        call()


# ---------------------------------------------------------------- CRD's bookkeeping


def test_crd_banks_move_only_where_the_batch_was():
    torch.manual_seed(0)
    c = CRD(torch.arange(40) % 4, 8, 5, negatives=20)
    before, idx = c.banks.clone(), torch.tensor([3, 17, 20])
    c(rows(3).requires_grad_(), torch.randn(3, 5), idx).backward()
    moved = (c.banks != before).any(-1)
    assert moved.sum(1).tolist() == [3, 3] and moved[:, idx].all()
    assert torch.allclose(c.banks.norm(dim=-1), torch.ones(2, 40), atol=1e-6)
    c.eval()
    z, banks = c.log_z.clone(), c.banks.clone()
    c(rows(3), torch.randn(3, 5), idx)
    assert torch.equal(banks, c.banks) and torch.equal(z, c.log_z), "evaluation changes nothing"


def test_crd_draws_negatives_of_other_classes_evenly():
    labels = torch.tensor([2, 0, 0, 1, 1, 1, 2, 0])
    for mode in ("exact", "relax"):
        c = CRD(
            labels, 8, 8, negatives=20000, mode=mode, generator=torch.Generator().manual_seed(0)
        )
        at = c.draw(torch.arange(8))
        assert (labels[at[:, 1:]] != labels[:, None]).all()
        assert torch.equal(labels[at[:, 0]], labels)
        if mode == "exact":
            assert torch.equal(at[:, 0], torch.arange(8))
        share = torch.bincount(at[3, 1:], minlength=8) / 20000
        assert torch.allclose(share[labels != 1], torch.tensor(0.2), atol=0.02)


# ---------------------------------------------------------------- the driver


@pytest.fixture(scope="module")
def data():
    return shapes(96, seed=3, size=16)


def convnet(c=4, seed=0):
    with Streams(seed).scope("net", c):
        return nn.Sequential(
            nn.Conv2d(3, c, 3, 2, 1),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, 2 * c, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * c, 8),
            nn.ReLU(),
            nn.Linear(8, 10),
        )


LAYERS = {"maps": "4", "features": "7"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("augment", [None, CropFlip(2)])
def test_every_method_through_the_driver(name, augment, data):
    "One line per method; weights stay finite, own parameters move, and the same seeds repeat bit for bit."
    teacher = convnet(8, 1)
    extra = {
        "hint": dict(student_width=8, teacher_width=16, maps=True),
        "crd": dict(labels=data.y, student_width=8, teacher_width=8, negatives=50),
    }.get(name, {})

    def run():
        net = convnet()
        with Streams(0).scope("loss"):
            loss = method_loss(name, **extra)
            before = [p.clone() for p in loss.parameters()]
            log = distill(
                net,
                teacher,
                data,
                loss,
                2,
                lr=0.01,
                layers=LAYERS,
                augment=augment,
                generator=Streams(0).generator("order"),
                batch_size=32,
            )
        assert all(not torch.equal(p, q) for p, q in zip(before, loss.parameters())), (
            "the loss's own parameters are trained along"
        )
        assert all(torch.isfinite(p).all() for p in net.parameters())
        return [r["loss"] for r in log]

    assert run() == run()


def test_loss_gets_the_samples_places_in_the_data(data):
    teacher, seen, table = convnet(8, 1), [], None
    table = teacher_table(teacher, data, LAYERS)

    def loss(s, t, y, idx):
        seen.append(idx)
        assert torch.equal(y, data.y[idx])
        assert t.keys() == s.keys() == {"logits", "maps", "features"}
        for k in t:
            assert torch.equal(t[k], table[k][0, idx].float()) and not t[k].requires_grad
        return F.cross_entropy(s["logits"], y)

    distill(
        convnet(),
        teacher,
        data,
        loss,
        1,
        layers=LAYERS,
        generator=Streams(0).generator("order"),
        batch_size=40,
    )
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(96))
    assert [len(i) for i in seen] == [40, 40, 16]


def test_looked_up_answers_belong_to_the_crop_that_the_student_sees(data):
    "Views in the table and views asked afresh give the same training, up to 16 bits."
    teacher = convnet(8, 1)
    views = Views(data, CropFlip(2), views=3, generator=torch.Generator().manual_seed(5))
    kd = lambda s, t, y, idx: kd_loss(s["logits"], t["logits"])
    run = lambda cache: distill(
        convnet(),
        teacher,
        data,
        kd,
        4,
        lr=0.01,
        augment=views,
        cache=cache,
        generator=Streams(0).generator("order"),
    )
    cached, fresh = run(True), run(False)
    assert [r["loss"] for r in cached] == pytest.approx([r["loss"] for r in fresh], rel=1e-2)
    plain = distill(
        convnet(), teacher, data, kd, 4, lr=0.01, generator=Streams(0).generator("order")
    )
    assert abs(plain[0]["loss"] - cached[0]["loss"]) > 1e-4 * plain[0]["loss"], (
        "the crops differ from the images"
    )
    a, b = views(torch.arange(96), 0)[0], views(torch.arange(96), 1)[0]
    assert not torch.equal(a, b) and teacher_table(teacher, views)["logits"].shape == (3, 96, 10)


def test_the_order_of_batches_does_not_depend_on_augmentation_or_cache(data):
    orders = []
    for kw in (
        dict(),
        dict(cache=False),
        dict(augment=CropFlip(1)),
        dict(augment=CropFlip(1), cache=False),
        dict(augment=lambda x, g: x + torch.rand(1, generator=g)),
    ):
        seen = []
        distill(
            convnet(),
            convnet(8, 1),
            data,
            lambda s, t, y, idx: (seen.append(idx), F.cross_entropy(s["logits"], y))[1],
            2,
            generator=Streams(0).generator("order"),
            **kw,
        )
        orders.append(torch.cat(seen))
    assert all(torch.equal(orders[0], o) for o in orders)


def test_the_teacher_is_left_alone(data):
    teacher = convnet(8, 1).train()
    before = copy.deepcopy(teacher.state_dict())
    for cache in (True, False):
        distill(convnet(), teacher, data, method_loss("kd"), 1, layers=LAYERS, cache=cache)
        assert teacher.training
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        assert all(p.grad is None for p in teacher.parameters())
        assert not any(m._forward_hooks for m in teacher.modules())
    net = convnet()
    with pytest.raises(ValueError, match="needs 'features'"):
        distill(net, teacher, data, method_loss("rkd"), 1)
    assert not any(m._forward_hooks for m in (*net.modules(), *teacher.modules())), (
        "hooks are removed after an error too"
    )


def test_learning_rate_callback_and_epoch_hook(data):
    log = distill(
        convnet(),
        None,
        data,
        lambda s, t, y, i: F.cross_entropy(s["logits"], y),
        3,
        lr=lambda e: 0.1 * 0.1**e,
        on_epoch=lambda row, net: row.update(norm=float(net[0].weight.detach().norm())),
        optimizer="adam",
    )
    assert [r["epoch"] for r in log] == [0, 1, 2] and all("norm" in r for r in log)
    assert abs(log[2]["norm"] - log[1]["norm"]) < abs(log[1]["norm"] - log[0]["norm"])
    still = convnet()
    w = still[0].weight.clone()
    distill(
        still, None, data, lambda s, t, y, i: F.cross_entropy(s["logits"], y), 2, lr=lambda e: 0.0
    )
    assert torch.equal(w, still[0].weight)


def test_tables_of_awkward_teachers(data):
    class Loud(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * 1e5

    t = teacher_table(Loud(), data)
    assert t["logits"].dtype == torch.float32 and torch.isfinite(t["logits"]).all(), (
        "16 bit would overflow"
    )

    class Many(nn.Module):
        def forward(self, x):
            return [x.mean((2, 3))] * 2

    with pytest.raises(TypeError, match="'logits' is a list"):
        teacher_table(Many(), data)
    assert (
        distill(
            convnet(),
            Many(),
            data,
            lambda s, t, y, i: F.mse_loss(s["logits"][:, :3], t["logits"][1]),
            cache=False,
        )[0]["loss"]
        > 0
    )
    with pytest.raises(ValueError, match="layers\\['x'\\]='9' is no submodule"):
        Taps(convnet(), {"x": "9"})

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x)

    with pytest.raises(ValueError, match="never reached b"):
        Taps(Unused(), {"x": "b"})(torch.ones(1, 3))


def test_a_warm_up_rises_to_the_full_weight():
    loss, s, t = method_loss("dkd", warmup=4), {"logits": rows()}, {"logits": rows(seed=1)}
    ce, full = F.cross_entropy(s["logits"], Y), dkd_loss(s["logits"], t["logits"], Y)
    for step in (1, 2, 3, 4, 4):
        assert loss(s, t, Y, Y).item() == pytest.approx(float(ce + step / 4 * full), rel=1e-5)
    both = method_loss("ce", kd=0.5)(s, t, Y, Y)
    assert both.item() == pytest.approx(
        float(ce + 0.5 * kd_loss(s["logits"], t["logits"])), rel=1e-5
    )


# ---------------------------------------------------------------- several networks, several exits


def test_peers_take_turns_and_never_touch_each_other(data):
    seen = []

    class Watch(DML):
        def __call__(self, m, z, y):
            seen.append([v.requires_grad for v in z])
            return super().__call__(m, z, y)

    for alternate in (True, False):
        seen.clear()
        nets = [convnet(4, k) for k in range(3)]
        train_together(nets, data, Watch(), 1, batch_size=48, alternate=alternate)
        assert seen == [[m == n for n in range(3)] for m in range(3)] * 2
    a, b = convnet(4, 0), convnet(4, 1)
    DML()(0, [a(data[:8][0]), b(data[:8][0])], data.y[:8]).backward()
    assert all(p.grad is None for p in b.parameters()) and a[0].weight.grad.abs().sum() > 0


def test_in_turns_the_second_network_sees_the_first_one_after_its_step():
    torch.manual_seed(0)
    nets, got = [nn.Linear(4, 3), nn.Linear(4, 3)], []

    class Flat(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.flatten(1))

    data = ArrayData(torch.randint(256, (8, 1, 2, 2), dtype=torch.uint8), torch.arange(8) % 3)
    a, b = map(Flat, nets)
    x = data[:][0]
    first = a(x).detach()

    def loss(m, z, y):
        got.append((m, [v.detach().clone() for v in z]))
        return F.cross_entropy(z[m], y)

    train_together([a, b], data, loss, 1, lr=0.5, momentum=0.0, weight_decay=0.0, batch_size=8)
    assert torch.equal(got[0][1][0], first) and not torch.equal(got[1][1][0], first)
    assert torch.allclose(got[1][1][0], a(x), atol=1e-6), "the answer after the step"


def test_self_distillation_trains_an_early_exit_network(data):
    with Streams(0).scope("exits"):
        net = cnn((3, 16, 16), 10, stages=3, width=8)
    first = fit(net, data, 1, loss=lambda z, y: self_distillation(z, y), lr=0.01)
    assert fit(net, data, 3, loss=lambda z, y: self_distillation(z, y), lr=0.01) < first
    log = distill(
        net, None, data, lambda s, t, y, i: self_distillation(s["logits"], y), 1, lr=0.01
    )  # a list of logits goes through the driver too
    assert log[0]["loss"] > 0


# ---------------------------------------------------------------- the benchmark command


def test_bench_command():
    run = lambda *a: subprocess.run(
        [sys.executable, "-m", "darkdistill_nb.experiments.bench", *a],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    r = run("distill", "--rounds", "2", "--batch", "4")
    assert r.returncode == 0, r.stderr
    for word in ("ce ", "kd, table", "hint, table", "kd, online", "at most 1.02", "torchdistill"):
        assert word in r.stdout
    assert run("distill", "--rounds", "0").returncode == 2 and run("fly").returncode == 2


# ---------------------------------------------------------------- what does not fit, and what cannot occur

NAN, INF = float("nan"), float("inf")
PEERS = {
    "dml",
    "bdkd student",
    "bdkd teacher",
    "self",
}  # both sides train: a NaN goes to the driver


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "teacher",
    [rows()[:1], rows()[:3], torch.tensor(1.0), rows()[0], rows()[:, :0]],
    ids=["1 row", "3 rows", "scalar", "vector", "empty"],
)
def test_nothing_is_stretched_to_fit(name, teacher):
    if name in ("at", "crd") and teacher.ndim < 2:
        return  # the helpers above would fail first
    with pytest.raises(ValueError):
        ALL[name](rows(), teacher, Y)
    with pytest.raises(ValueError):
        ALL[name](teacher, rows(), Y)


@pytest.mark.parametrize(
    "name", sorted(ALL.keys() - {"at", "rkd", "rkd distance", "rkd angle", "lpd", "crd", "hint"})
)
def test_a_column_is_not_a_table(name):
    with pytest.raises(ValueError):
        ALL[name](rows()[:, :1], rows(), Y)


@pytest.mark.parametrize("name", sorted(ALL.keys() - PEERS))
def test_a_teacher_with_nan_is_refused_and_a_student_with_nan_is_seen_by_the_driver(name):
    bad = rows()
    bad[2, 3] = NAN
    with pytest.raises(ValueError, match="NaN|finite"):
        ALL[name](rows(), bad, Y)
    if name != "at":
        assert not torch.isfinite(ALL[name](bad, rows(seed=1), Y))


@pytest.mark.parametrize(
    "y",
    [Y[:5], Y.float(), Y.clone().fill_(8), -Y - 1, Y[:, None], Y.tolist()],
    ids=["5", "float", "8", "negative", "column", "list"],
)
@pytest.mark.parametrize("name", ["mse .5", "dkd", "dml", "bdkd student", "self"])
def test_labels_that_do_not_fit(name, y):
    with pytest.raises(ValueError, match="y"):
        ALL[name](rows(), rows(seed=1), y)


def masked(z, classes=(0,)):
    return z.index_fill(1, torch.tensor(classes), -INF)


POSSIBLE = {
    "kd": lambda s, t, y: kd_loss(s, t),
    "dkd": dkd_loss,
    "mse": logit_mse,
    "dist": lambda s, t, y: dist_loss(s, t),
    "bdkd": lambda s, t, y: bidirectional_loss(s, t, 2.0),
    "dml": lambda s, t, y: DML()(0, [s, t], y),
    "bdkd teacher": lambda s, t, y: BDKD()(1, [t, s], y),
    "self": lambda s, t, y: self_distillation([s, t], y),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_classes_that_cannot_occur_add_nothing(name):
    "The loss of masked logits is that of the other classes; gradients are finite, and 0 at what is masked."
    a, b, y = rows(), rows(seed=1), torch.tensor([1, 2, 3, 4, 1, 7])
    s = masked(a).requires_grad_()
    value = POSSIBLE[name](s, masked(b), y)
    value.backward()
    assert value.item() == pytest.approx(POSSIBLE[name](a[:, 1:], b[:, 1:], y - 1).item(), abs=1e-5)
    assert torch.isfinite(s.grad).all() and (s.grad[:, 0] == 0).all() and s.grad.abs().sum() > 0


@pytest.mark.parametrize("name", POSSIBLE)
def test_only_the_label_is_possible(name):
    "Classes masked for some samples only, down to one that is left: loss and gradient stay finite."
    a, b = rows(), rows(seed=1)
    for z in (a, b):
        z[0, 1:] = -INF
        z[1, 2:] = -INF
    s = a.requires_grad_()
    value = POSSIBLE[name](s, b, Y)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(s.grad).all()


def test_a_class_that_only_the_student_excludes_costs_infinitely_much():
    s = masked(rows()).requires_grad_()
    value = kd_loss(s, rows(seed=1))
    value.backward()
    assert value == INF and torch.isfinite(s.grad).all()
    assert torch.isfinite(kd_loss(rows(), masked(rows(seed=1))))
    with pytest.raises(ValueError, match="no class that is possible"):
        kd_loss(rows(), torch.full((6, 8), -INF))
    with pytest.raises(ValueError, match=r"\+inf"):
        kd_loss(rows(), rows().index_fill(1, torch.tensor([0]), INF))


# ---------------------------------------------------------------- what a layer put out, and modes


class Inplace(nn.Module):
    "Every way in which the numbers of a tapped layer are overwritten later in the same forward pass."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        h = self.act(h)  # a module in place
        z = self.b(h)
        v = z.view(2, -1)  # a view of the output
        v.mul_(3.0)
        z.relu_()
        return z + h


def test_taps_show_the_value_and_not_what_became_of_it():
    torch.manual_seed(0)
    net, x = Inplace(), torch.randn(6, 4)
    a = net.a(x).detach()
    h = a.relu()
    b = net.b(h).detach()
    with Taps(net, {"a": "a", "act": "act:input", "b": "b", "b in": "b:input"}) as taps:
        out = taps(x)
    for name, want in {"a": a, "act": a, "b": b, "b in": h}.items():
        assert torch.equal(out[name].detach(), want), name
    assert float(out["a"].detach().min()) < 0 and torch.equal(out["logits"], net(x))
    out["a"].pow(2).sum().backward()
    assert torch.allclose(net.a.bias.grad, 2 * a.sum(0), atol=1e-5)
    d = ArrayData(x.reshape(6, 1, 2, 2), Y)
    table = teacher_table(nn.Sequential(nn.Flatten(), Inplace()), d, {"a": "1.a"})["a"]
    assert float(table.min()) < 0


def test_taps_keep_copies_of_nested_outputs_and_inputs_by_name():
    class Two(nn.Module):
        def forward(self, *, x):
            return dict(a=[x + 0], b=(x + 1,))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            o = self.two(x=x)
            o["a"][0].zero_()
            o["b"][0].zero_()
            return x

    x = torch.ones(2, 3)
    with Taps(Net(), {"o": "two", "i": "two:input"}) as taps:
        out = taps(x)
    assert torch.equal(out["o"]["a"][0], x)
    assert torch.equal(out["o"]["b"][0], x + 1)
    assert torch.equal(out["i"], x)


def normed():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)
    )


def frozen(net):
    net[2].requires_grad_(False).eval()
    return net


def modes(net):
    return [m.training for m in net.modules()]


def small(n):
    return ArrayData(
        3 + torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 4
    )


CE = lambda s, t, y, i: F.cross_entropy(s["logits"], y)


def test_frozen_parts_keep_mode_and_statistics():
    "Student, peers and teacher: what was in evaluation mode without gradients stays so."
    teacher = frozen(normed().train())
    before = modes(teacher)
    teacher_table(teacher, small(16))
    assert modes(teacher) == before
    for cache in (True, False):
        s = frozen(normed())
        distill(
            s, teacher, small(16), lambda s, t, y, i: kd_loss(s["logits"], t["logits"]), cache=cache
        )
        assert modes(teacher) == before
        assert not s[2].training
        assert (s[2].running_mean == 0).all()
        assert (s[4].running_mean != 0).any()
    a, b = frozen(normed()), normed()
    train_together([a, b], small(16), DML())
    assert (a[2].running_mean == 0).all() and (b[2].running_mean != 0).any()


def test_modes_come_back_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    net = nn.Sequential(nn.BatchNorm2d(1), Fails())
    net[0].eval()
    before = modes(net)
    with pytest.raises(RuntimeError, match="broken"):
        teacher_table(net, small(4))
    assert modes(net) == before


def test_a_last_batch_of_one_is_refused_only_where_it_would_fail():
    "Before any step: batch normalisation over one value per channel; other networks train as before."
    point = lambda: nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten()
    )  # a map of one pixel
    map_ = lambda: nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)
    )
    for make in (normed, point):
        net = make()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="batch_size=4 leaves a last batch of one of 9 images"):
            distill(net, None, small(9), CE, batch_size=4)
        with pytest.raises(ValueError, match="batch_size=1 leaves"):
            train_together([map_(), net], small(9), DML(), batch_size=1)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        distill(make(), None, small(9), CE, batch_size=3)
        distill(make(), None, small(9), CE, batch_size=9)
    distill(map_(), None, small(9), CE, batch_size=4)
    train_together([map_()], small(9), DML(), batch_size=4)
    still = normed()
    [m.requires_grad_(False).eval() for m in (still[2], still[4])]
    distill(still, None, small(9), CE, batch_size=4)
    with pytest.raises(ValueError, match="at least one image"):
        distill(map_(), None, small(9).subset([]), CE)


def test_the_check_of_the_last_batch_draws_no_random_numbers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="last batch of one"):
        distill(net, None, small(9), CE, batch_size=4)
    assert torch.equal(torch.rand(3), want)


def test_numbers_that_16_bits_cannot_hold():
    class Wide(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 7e4, INF, 1.0]).expand(len(x), 4)

    t = teacher_table(
        nn.Sequential(Wide(), nn.Identity()), ArrayData(torch.ones(3, 1, 2, 2), torch.arange(3))
    )["logits"][0]
    assert t[:, 1].tolist() == [7e4] * 3
    assert t[:, 2].tolist() == [INF] * 3
    assert t.dtype == torch.float32
    masks = teacher_table(nn.Sequential(Mask()), small(3))["logits"]
    assert masks.dtype == torch.float16 and (masks[0, :, 0] == -INF).all()

    class Nan(nn.Module):
        def forward(self, x):
            return x.flatten(1) * NAN

    with pytest.raises(ValueError, match="the teacher's 'logits' must be free of NaN"):
        teacher_table(nn.Sequential(Nan()), small(3))


class Mask(nn.Module):
    def forward(self, x):
        return masked(x.flatten(1))


# ---------------------------------------------------------------- tokens of transformers


def test_token_features():
    "The attention map of tokens says where: one entry per token; regressors act on the width; relations flatten."
    a, b = torch.randn(4, 17, 32), torch.randn(4, 17, 48)
    q = a.pow(2).mean(-1)
    assert torch.allclose(attention_map(a), q / q.norm(dim=1, keepdim=True))
    assert at_loss(a, b) > 0 and at_loss(a, 5 * a) < 1e-12
    h = Hint(32, 48)
    assert torch.allclose(h(a, b), F.mse_loss(h.regressor(a), b))
    for loss in (rkd_distance, rkd_angle, RKD(), lpd_loss):
        assert torch.equal(loss(a, b), loss(a.flatten(1), b.flatten(1)))
    maps4 = torch.randn(4, 2, 3, 3)
    assert torch.equal(rkd_distance(maps4, a), rkd_distance(maps4.flatten(1), a.flatten(1)))


@pytest.mark.parametrize(
    "call",
    [
        lambda a: at_loss(a, a[:, 1:]),
        lambda a: at_loss(a, a[..., None]),
        lambda a: at_loss(a[:, 0], a[:, 0]),
        lambda a: attention_map(a[0]),
        lambda a: Hint(32, 32)(a, a[:, 1:]),
        lambda a: Hint(32, 48)(a, a),
        lambda a: Hint(32, 32, maps=True)(a, a),
        lambda a: Hint(32, 32)(a[..., None], a[..., None]),
        lambda a: Hint(32, 32)(a, a[:, 0]),
        lambda a: Hint(32, 32)(a[:1], a),
        lambda a: rkd_distance(a[0, 0], a[0, 0]),
        lambda a: CRD(Y, 32, 32)(a, a, torch.arange(4)),
        lambda a: CRD(Y, 32, 32)(a[:, 0], a[:, 0], torch.tensor([0, 1, 2, 6])),
        lambda a: CRD(Y, 32, 32)(a[:, 0], a[:, 0], torch.arange(3)),
    ],
)
def test_layers_that_do_not_fit(call):
    with pytest.raises(ValueError):
        call(torch.randn(4, 17, 32))


# ---------------------------------------------------------------- hostile settings

BAD = {
    "temperature": (0, -1, NAN, INF, "1", None, True),
    "weight": (-1, NAN, INF, "1"),
    "count": (0, -1, 1.5, NAN, "3", True),
    "share": (-0.1, 1.1, NAN),
}
SETTINGS = [
    ("temperature", lambda v: kd_loss(rows(), rows(), v)),
    ("temperature", lambda v: dkd_loss(rows(), rows(), Y, T=v)),
    ("temperature", lambda v: dist_loss(rows(), rows(), T=v)),
    ("temperature", lambda v: logit_mse(rows(), rows(), Y, tau=v)),
    ("share", lambda v: logit_mse(rows(), rows(), Y, alpha=v)),
    ("weight", lambda v: dkd_loss(rows(), rows(), Y, v)),
    ("weight", lambda v: dkd_loss(rows(), rows(), Y, 1.0, v)),
    ("weight", lambda v: dist_loss(rows(), rows(), v)),
    ("weight", lambda v: dist_loss(rows(), rows(), 1.0, v)),
    ("weight", RKD),
    ("weight", lambda v: RKD(1.0, v)),
    ("temperature", DML),
    ("temperature", BDKD),
    ("weight", lambda v: BDKD(forward=v)),
    ("weight", lambda v: BDKD(reverse=v)),
    ("temperature", lambda v: BDKD(boost=v)),
    ("weight", lambda v: BDKD(teacher=v)),
    ("share", lambda v: self_distillation([rows()], Y, alpha=v)),
    ("weight", lambda v: self_distillation([rows()], Y, weight=v)),
    ("temperature", lambda v: self_distillation([rows()], Y, T=v)),
    ("temperature", lambda v: entropy(rows(), v)),
    ("temperature", lambda v: bidirectional_loss(rows(), rows(), v)),
    ("weight", lambda v: bidirectional_loss(rows(), rows(), reverse=v)),
    ("count", lambda v: Hint(v, 3)),
    ("count", lambda v: Hint(3, v)),
    ("count", lambda v: lpd_loss(rows(), rows(), v)),
    ("weight", lambda v: lpd_loss(rows(), rows(), sigma=v)),
    ("count", lambda v: CRD(Y, v, 3)),
    ("count", lambda v: CRD(Y, 3, 3, dim=v)),
    ("count", lambda v: CRD(Y, 3, 3, negatives=v)),
    ("temperature", lambda v: CRD(Y, 3, 3, tau=v)),
    ("share", lambda v: CRD(Y, 3, 3, momentum=v)),
    ("weight", lambda v: method_loss("kd", kd=v)),
    ("temperature", lambda v: method_loss("kd", T=v)),
    ("weight", lambda v: method_loss("at", weight=v)),
    ("weight", lambda v: method_loss("rkd", angle=v)),
    ("count", lambda v: method_loss("lpd", k=v)),
    ("weight", lambda v: method_loss("dkd", beta=v)),
    ("temperature", lambda v: method_loss("dist", T=v)),
    ("temperature", lambda v: method_loss("mse", tau=v)),
    ("count", lambda v: Views(small(4), views=v)),
    ("count", lambda v: teacher_table(normed(), small(4), batch_size=v)),
    ("temperature", lambda v: teacher_table(normed(), small(4), limit=v)),
    ("count", lambda v: distill(normed(), None, small(8), CE, batch_size=v)),
    ("weight", lambda v: distill(normed(), None, small(8), CE, lr=v)),
    ("weight", lambda v: distill(normed(), None, small(8), CE, momentum=v)),
    ("weight", lambda v: distill(normed(), None, small(8), CE, weight_decay=v)),
    ("weight", lambda v: distill(normed(), None, small(8), CE, lr=lambda e: v)),
    ("count", lambda v: train_together([normed()], small(8), DML(), batch_size=v)),
    ("weight", lambda v: train_together([normed()], small(8), DML(), lr=v)),
    ("weight", lambda v: CropFlip(v)),
]


@pytest.mark.parametrize("n", range(len(SETTINGS)))
def test_hostile_settings_get_one_sentence(n):
    kind, call = SETTINGS[n]
    for v in BAD[kind]:
        with pytest.raises(ValueError) as e:
            call(v)
        assert "must" in str(e.value) and "\n" not in str(e.value)


def test_numpy_numbers_are_numbers():
    f, i = np.float32(2.0), np.int64(2)
    assert kd_loss(rows(), rows(seed=1), f) == kd_loss(rows(), rows(seed=1), 2.0)
    assert dkd_loss(rows(), rows(seed=1), Y, f, f, torch.tensor(2.0)) == dkd_loss(
        rows(), rows(seed=1), Y, 2.0, 2.0, 2.0
    )
    assert Hint(i, np.int32(3)).widths == (2, 3)
    assert lpd_loss(rows(), rows(seed=1), i) == lpd_loss(rows(), rows(seed=1), 2)
    assert len(distill(normed(), None, small(8), CE, i, f / 100, np.int64(4))) == 2
    assert method_loss("kd", T=f, kd=f, warmup=i).warmup == 2


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: method_loss("kd", beta=3), "does not take these settings: beta"),
        (lambda: method_loss("hint"), "does not take these settings"),
        (lambda: method_loss("magic"), "one of ce, kd"),
        (lambda: method_loss(["kd"]), "one of ce, kd"),
        (lambda: method_loss("lpd", reduction="max"), "reduction='max'"),
        (lambda: distill(normed(), None, small(4), CE, optimizer="newton"), "one of sgd, adam"),
        (lambda: distill(normed(), None, small(4), CE, cache="yes"), "cache='yes'"),
        (lambda: distill(normed(), normed(), small(4), CE, cache={"a": rows()}), "no 'logits'"),
        (lambda: Taps(normed(), {"x": 2}), "is no submodule"),
        (lambda: DML()(2, [rows()], Y), "m=2"),
        (lambda: DML()(0, [], Y), "z=[]".replace("[", r"\[")),
        (lambda: self_distillation([], Y), "z="),
        (lambda: dkd_loss(rows()[:, :1], rows()[:, :1], 0 * Y), "at least 2"),
        (lambda: dkd_loss(rows(), rows(), Y, beta=torch.ones(3)), "one weight per sample"),
        (lambda: CRD(Y.float(), 3, 3), "whole numbers"),
        (lambda: CRD(Y[:0], 3, 3), "whole numbers"),
    ],
)
def test_bad_words_get_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()

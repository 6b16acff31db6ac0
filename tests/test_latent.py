"""Latent-space distillation: the acceptance numbers of clients, tests and networks, and experiments that survive being killed."""

import json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from conftest import children, running
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.parallel import one_thread
from darkdistill_nb.core.splits import dirichlet_draw
from darkdistill_nb.distill.losses import distill
from darkdistill_nb.distill.latent import (
    LatentNet,
    NETS,
    ORDERS,
    client_task,
    conv_group,
    latent_net,
    latent_variance,
    latents,
    lkd,
    lkd_loss,
    map_latents,
    match_shape,
    match_transfer,
    plot_latents,
)
from darkdistill_nb.core.scenes import small_shapes
from darkdistill_nb.core.cells import cell_key
from darkdistill_nb.experiments.latent import (
    CLAIMS,
    HYPER,
    METHODS,
    SETUPS,
    check_claims,
    chosen_hyper,
    compare,
    differences,
    latent_teacher,
    latent_space,
    main,
    latent_cell,
    images,
    run_cells,
    setup,
    sweep_n,
    trend,
    tune,
)
from darkdistill_nb.experiments.latent_results import (
    CLAIM_LIST,
    Claim,
    at_an_edge,
    best_value,
    judge,
    step_differences,
    latent_record,
    verdict_table,
)
from darkdistill_nb.core.records import Record, load_record
from darkdistill_nb.core.training import accuracy, predict


def blank(per_class, size=4, classes=10):
    "Empty images with `per_class` labels of each class."
    y = torch.arange(classes).repeat(per_class)
    return ArrayData(torch.zeros(len(y), 1, size, size, dtype=torch.uint8), y)


# ---------------------------------------------------------------- the client and its tests (checks 12 and 13; the draws themselves are tested in test_data)


@pytest.mark.parametrize("gamma", [0.25, 5000])
def test_client_has_exactly_n_different_pictures(gamma):
    pool = blank(5000, 1)
    pool.x = torch.arange(50_000).remainder(251).to(torch.uint8)[:, None, None, None]
    parts, _ = dirichlet_draw(pool.y, 4096, gamma, seed=3)
    task = client_task(pool, blank(1000, 1), 4096, gamma, seed=3)
    assert len(task.data) == 4096 == len(parts[0].unique())
    assert torch.equal(task.data.x, pool.x[parts[0]])


def test_class_that_runs_out_raises():
    with pytest.raises(ValueError, match="class . has 100 samples"):
        client_task(blank(100), blank(10), 900, 0.25, seed=0)


def test_private_test_set_has_the_mix_of_the_training_set():
    pool, test = blank(5000, 1), blank(1000, 1)
    for seed in range(5):
        task = client_task(pool, test, 512, 0.5, seed)
        assert torch.equal(
            torch.bincount(task.priv.y, minlength=10), (task.p * 1000).round().long()
        )
        have = torch.bincount(task.data.y, minlength=10)
        assert int(have.sum()) == 512 and float((have - 512 * task.p).abs().max()) <= 1, (
            "the same p"
        )
        assert len(task.uni) == 10_000 and torch.bincount(task.uni.y).tolist() == [1000] * 10


def test_even_client_scores_alike_on_both_tests():
    "With gamma = 5000 the two tests ask the same question: 4000 against 10,000 images agree within four standard errors."
    pool, test = small_shapes(2000, 10_000)
    task = client_task(pool, test, 500, 5000, n_priv=4000, seed=0)
    assert len(task.priv) in range(3995, 4006)
    torch.manual_seed(0)
    net = latent_net("mini", 16, in_shape=pool.shape)
    with one_thread():
        distill(
            net,
            None,
            task.data,
            lambda s, t, y, i: F.cross_entropy(s["logits"], y),
            10,
            lr=2e-3,
            batch_size=32,
            optimizer="adam",
            weight_decay=0.0,
        )
        priv, uni = (float(accuracy(predict(net, d), d.y)) for d in (task.priv, task.uni))
    assert uni > 0.2 and abs(priv - uni) < 0.03


# ---------------------------------------------------------------- networks and loss (check 14)


@pytest.mark.parametrize(
    "name, l, want",
    [
        ("student-1", 128, 100_416),
        ("student-1", 500, 128_316),
        ("student-4", 500, 1_277_308),
        ("teacher", 500, 9_582_844),
    ],
)
def test_parameter_counts(name, l, want):
    assert sum(p.numel() for p in latent_net(name, l).parameters()) == want


@pytest.mark.parametrize(
    "name, d",
    [
        ("student-1", 64),
        ("student-2", 128),
        ("student-3", 128),
        ("student-4", 128),
        ("teacher", 18816),
    ],
)
def test_width_of_perception(name, d):
    net = latent_net(name, 8).eval()
    with torch.no_grad():
        assert net.d == d == net.perception(torch.zeros(1, 3, 32, 32)).shape[1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("between", [False, True])
def test_order_and_activations(order, between):
    net = latent_net("student-1", 16, order=order, relu_between=between)
    kinds = [type(m).__name__ for m in net.perception[0]]
    assert kinds[-4:-2] == (
        ["BatchNorm2d", "ReLU"] if order == "conv-bn-relu" else ["ReLU", "BatchNorm2d"]
    )
    assert kinds.count("ReLU") == (3 if between else 1) and kinds.count("Conv2d") == 3
    assert (net.eval().latent(torch.randn(8, 3, 32, 32)) < 0).any() and net.output.bias is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 16, 16), (3, 32, 32)])
@pytest.mark.parametrize("name", [n for n in NETS if n != "teacher"])
def test_students_take_pictures_of_any_size(name, shape):
    net = latent_net(name, 5, 7, shape).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, *shape)).shape == (1, 7)


@pytest.mark.parametrize(
    "bad, word",
    [
        (dict(l=0), "l=0"),
        (dict(l=2.5), "l=2.5"),
        (dict(order="bn-conv"), "order="),
        (dict(dropout=1), "dropout=1"),
        (dict(pools=(2,)), "pools="),
    ],
)
def test_bad_networks(bad, word):
    with pytest.raises(ValueError, match=word):
        LatentNet(**{**dict(groups=((4,), (4,)), pools=(2, 2), l=4), **bad})


def test_gradients_reach_the_student_only():
    t = latent_net("midi", 12, in_shape=(3, 16, 16))
    s = latent_net("mini", 12, in_shape=(3, 16, 16))
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6)
    z = s.latent(x)
    lkd_loss(z, t.latent(x), s.output(z), y, alpha=1).backward()
    assert t.d != s.d and all(p.grad is None for p in t.parameters())
    assert s.output.weight.grad is None and float(s.representation.weight.grad.abs().sum()) > 0


def test_distilling_latents_leaves_the_teacher_alone_and_comes_nearer():
    pool, _ = small_shapes(200, 10)
    torch.manual_seed(0)
    t, s = (latent_net("midi", 12, in_shape=pool.shape) for _ in range(2))
    for _ in range(3):
        predict(t.train(), pool)
    before, z = {k: v.clone() for k, v in t.state_dict().items()}, latents(t, pool)
    gap = lambda: float((latents(s, pool) - z).pow(2).mean()) / latent_variance(z)
    first = gap()
    distill(
        s,
        t,
        pool,
        lkd(0.9, scale=latent_variance(z)),
        12,
        lr=2e-3,
        batch_size=32,
        optimizer="adam",
        weight_decay=0.0,
        layers={"latent": "representation"},
    )
    assert all(torch.equal(v, before[k]) for k, v in t.state_dict().items()) and gap() < 0.6 * first


@pytest.mark.parametrize("scale", [None, 2.0, torch.arange(1.0, 5.0)])
def test_scale_and_tau(scale):
    z, zt, y = torch.randn(3, 4), torch.randn(3, 4), torch.arange(3)
    want = ((z - zt).pow(2) / (1.0 if scale is None else scale)).mean()
    assert torch.isclose(lkd_loss(z, zt, z, y, 1.0, 1.0, scale), want)
    assert torch.isclose(lkd_loss(z, zt, z, y, 1.0, 2.0, scale), want / 4)


def test_unequal_l_is_an_error_wherever_it_appears():
    a, b = latent_net("mini", 4, in_shape=(1, 8, 8)), latent_net("mini", 6, in_shape=(1, 8, 8))
    data = blank(2, 8)
    for f in (
        lambda: lkd_loss(latents(a, data), latents(b, data), predict(a, data), data.y),
        lambda: match_transfer(a, b, data),
        lambda: map_latents({"a": latents(a, data), "b": latents(b, data)}),
        lambda: distill(a, b, data, lkd(), 1, layers={"latent": "representation"}),
    ):
        with pytest.raises(ValueError, match="same( size)? l|same l"):
            f()


def test_match_shape_keeps_grey_levels():
    "A constant grey image stays the same constant, in colour, in grey and at any size; floats in [0, 1] become bytes."
    like_rgb, like_grey = small_shapes(10, 10)[0], blank(1, 28)
    grey = ArrayData(torch.full((2, 1, 8, 8), 77, dtype=torch.uint8), torch.tensor([0, 1]))
    assert (match_shape(grey, like_rgb).x == 77).all()
    assert match_shape(grey, like_rgb).shape == (3, 16, 16)
    rgb = ArrayData(torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 1]))
    assert (match_shape(rgb, like_grey).x == 128).all()
    assert match_shape(rgb, like_grey).shape == (1, 28, 28)


UNITS = {
    "bytes": lambda u: u,
    "0..255": lambda u: u.float(),
    "0..1": lambda u: u / 255,
    "-1..1": lambda u: u / 127.5 - 1,
}


@pytest.mark.parametrize("a", UNITS)
@pytest.mark.parametrize("b", UNITS)
def test_match_shape_in_all_units(a, b):
    "The unit of the transfer set and that of the private data change nothing; the normalised images have the private data's scale"
    pool, other = small_shapes(40, 40)
    want = match_shape(other, pool)[:][0]
    got = match_shape(ArrayData(UNITS[a](other.x), other.y), ArrayData(UNITS[b](pool.x), pool.y))
    assert torch.allclose(got[:][0], want, atol=1e-4)
    assert abs(want.mean()) < 0.1
    assert abs(want.std() - 1) < 0.1


@pytest.mark.parametrize(
    "change",
    [
        lambda u: (u - 127) / 74,
        lambda u: u / 16,
        lambda u: u * 257,
        lambda u: u / 255 - 0.5,
        lambda u: u - 127,
    ],
)
def test_match_shape_refuses_what_it_cannot_tell(change):
    pool, _ = small_shapes(40, 40)
    strange = ArrayData(change(pool.x.float()), pool.y)
    for args, name in (
        ((strange, pool), "data holds floats"),
        ((pool, strange), "like holds floats"),
    ):
        with pytest.raises(ValueError, match=name):
            match_shape(*args)


NAN = float("nan")
Z, LABELS = torch.arange(12.0).view(3, 4) / 7, torch.arange(3)
SMALL = blank(4, 8, 3)
HOSTILE = {
    "l": lambda: latent_net("mini", NAN),
    "K": lambda: latent_net("mini", 4, 0),
    "in_shape": lambda: latent_net("mini", 4, 2, (3, -8, 8)),
    "in_shape 2": lambda: latent_net("mini", 4, 2, (8, 8)),
    "name": lambda: latent_net(["mini"], 4),
    "dropout": lambda: latent_net("mini", 4, dropout=NAN),
    "relu": lambda: latent_net("mini", 4, relu_between="no"),
    "widths": lambda: conv_group((1, 8, 8), (1.5,), 2),
    "no widths": lambda: conv_group((1, 8, 8), (), 2),
    "pool 0": lambda: conv_group((1, 8, 8), (4,), 0),
    "pool stride": lambda: conv_group((1, 8, 8), (4,), (4, 0)),
    "pool text": lambda: conv_group((1, 8, 8), (4,), "all"),
    "alpha": lambda: lkd(NAN),
    "tau": lambda: lkd(0.5, float("inf")),
    "scale": lambda: lkd(0.5, 1.0, -1),
    "scale NaN": lambda: lkd(0.5, 1.0, torch.tensor([1.0, NAN])),
    "scale shape": lambda: lkd_loss(Z, Z, Z, LABELS, scale=torch.ones(3)),
    "teacher NaN": lambda: lkd_loss(Z, Z * NAN, Z, LABELS),
    "z broadcasts": lambda: lkd_loss(Z, Z[:1], Z, LABELS),
    "z 1-d": lambda: lkd_loss(Z[0], Z[0], Z, LABELS),
    "y": lambda: lkd_loss(Z, Z, Z, LABELS[:1]),
    "logits": lambda: lkd_loss(Z, Z, Z[:1], LABELS),
    "variance NaN": lambda: latent_variance(Z * NAN),
    "variance 1-d": lambda: latent_variance(Z[0]),
    "latents of nothing": lambda: latents(latent_net("mini", 4, 3, (1, 8, 8)), SMALL.subset([])),
    "batch_size": lambda: latents(latent_net("mini", 4, 3, (1, 8, 8)), SMALL, 0.5),
    "client n": lambda: client_task(SMALL, SMALL, 2.5, 1.0),
    "client n 0": lambda: client_task(SMALL, SMALL, 0, 1.0),
    "client gamma": lambda: client_task(SMALL, SMALL, 3, 1e308),
    "client n_priv": lambda: client_task(SMALL, SMALL, 3, 1e3, n_priv=0),
    "client test": lambda: client_task(SMALL, SMALL.subset(SMALL.y != 1), 3, 1e3),
    "client shapes": lambda: client_task(SMALL, blank(4, 4, 3), 3, 1.0),
    "client classes": lambda: client_task(SMALL, blank(4, 8, 4), 3, 1.0),
    "shapes": lambda: small_shapes(0),
    "shapes n": lambda: small_shapes(10**15),
    "shapes hardest": lambda: small_shapes(10, 10, NAN),
    "shapes seed": lambda: small_shapes(10, 10, seed=1000),
    "map how": lambda: map_latents({"a": torch.rand(9, 3)}, "mds"),
    "map nothing": lambda: map_latents({}),
    "map few": lambda: map_latents({"a": Z}),
    "map NaN": lambda: map_latents({"a": torch.full((9, 3), NAN)}),
    "map l": lambda: map_latents({"a": torch.rand(9, 1)}),
    "map seed": lambda: map_latents({"a": torch.rand(9, 3)}, seed=-1),
    "plot y": lambda: plot_latents({"a": torch.rand(9, 2)}, LABELS),
    "plot classes": lambda: plot_latents({"a": torch.rand(3, 2)}, LABELS, ["x"]),
    "plot nothing": lambda: plot_latents({}, LABELS),
    "plot height": lambda: plot_latents({"a": torch.rand(3, 2)}, LABELS, height=NAN),
    **{
        f"transfer {k}": lambda k=k, v=v: match_transfer(
            *(latent_net("mini", 4, 3, (1, 8, 8)) for _ in "ab"), SMALL, **{k: v}
        )
        for k, v in dict(target="z", epochs=-1, lr=NAN, batch_size=0, scale=0).items()
    },
}


@pytest.mark.parametrize("call", HOSTILE.values(), ids=HOSTILE)
def test_hostile_arguments_are_one_sentence(call):
    with pytest.raises(ValueError) as e:
        call()
    assert 10 < len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_numpy_numbers_are_numbers():
    i, f = np.int64, np.float32
    net = latent_net("mini", i(4), i(3), (i(1), i(8), i(8)), dropout=f(0.25))
    assert latents(net, SMALL, i(5)).shape == (12, 4)
    assert conv_group((1, 8, 8), (i(4),), i(2))[1] == (4, 4, 4)
    assert lkd_loss(Z, Z + 1, Z, LABELS, f(0.5), i(1), np.float64(2)) == lkd_loss(
        Z, Z + 1, Z, LABELS, 0.5, 1.0, 2.0
    )
    assert torch.equal(
        small_shapes(i(20), i(10), f(0.5), i(8), i(3))[0].x, small_shapes(20, 10, 0.5, 8, 3)[0].x
    )
    assert len(client_task(SMALL, SMALL, i(3), f(1e3), i(0), i(6)).data) == 3


def test_latents_leave_every_mode_as_it_was():
    net = latent_net("mini", 4, 3, (1, 8, 8)).train()
    net.perception[0].eval()
    latents(net, SMALL)
    assert net.training and not net.perception[0].training and net.perception[1].training


# ---------------------------------------------------------------- experiments

QUICK = dict(n=64, epochs=2, teacher_epochs=1)


def test_cells_of_all_methods_are_paired(tmp_path):
    "Same client, same test and same first weights for every method; one teacher file."
    from darkdistill_nb.experiments import latent as X

    cells = [latent_cell("shapes16", m, 1, **{**QUICK, "epochs": 0}) for m in METHODS]
    tasks = [X.train_cell(c, tmp_path) for c in cells]
    for net, _, task in tasks[1:]:
        assert torch.equal(task.data.x, tasks[0][2].data.x)
        assert torch.equal(task.priv.x, tasks[0][2].priv.x)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), tasks[0][0].parameters()))
    assert len(list((tmp_path / "teachers").iterdir())) == 1


def test_validation_pictures_are_nobody_elses():
    pool, val = images("shapes16", "val")
    assert images("shapes16")[0].x.shape == pool.x.shape
    assert not {v.numpy().tobytes() for v in val.x} & {v.numpy().tobytes() for v in pool.x}


def test_workers_do_not_change_results(tmp_path):
    cells = [latent_cell("shapes16", m, 0, **QUICK) for m in ("CE", "LKD", "CRD")]
    one = run_cells(cells, tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "teachers").rename(tmp_path / "b" / "teachers")
    two = run_cells(cells, tmp_path / "b", 2)
    assert [(r["priv"], r["uni"]) for r in one] == [(r["priv"], r["uni"]) for r in two]


def test_same_transfer_and_new_latent_size(tmp_path):
    "A transfer set changes the result, a new l changes the parameters, and both keep the client."
    base = latent_cell("shapes16", "LKD", 0, **QUICK, transfer="digits")
    r = run_cells(
        [
            base,
            latent_cell("shapes16", "LKD", 0, match="latent", **QUICK, transfer="digits"),
            latent_cell("shapes16", "LKD", 0, l=8, **QUICK),
        ],
        tmp_path,
        1,
    )
    assert base["transfer"] is None
    assert r[1]["cell"]["transfer"] == "digits"
    assert len({cell_key(x["cell"]) for x in r}) == 3
    assert r[2]["parameters"] < r[0]["parameters"] == r[1]["parameters"]
    assert len({x["classes"] for x in r}) == 1
    assert (
        latent_teacher(r[2]["cell"]["teacher"], tmp_path)[1]["d"]
        == latent_teacher(base["teacher"], tmp_path)[1]["d"]
    )


def test_verdicts_follow_the_data():
    "Known accuracies give known verdicts; more noise makes them undecided."
    level = dict(CE=0.6, KD=0.605, CRD=0.65, LPD=0.3, LKD=0.7)

    def record(noise):
        return Record(
            {},
            runs=[
                dict(
                    method=m,
                    seed=s,
                    gamma=0.5,
                    n=1,
                    l=1,
                    match=None,
                    priv=v + noise * i * (-1) ** s,
                    uni=v + noise * i * (-1) ** s,
                )
                for i, (m, v) in enumerate(level.items())
                for s in range(6)
            ],
        )

    assert [r["verdict"] for r in check_claims(record(0.001))] == ["holds"] * 4 + [
        "does not hold"
    ] + ["holds"] * 3
    assert {r["verdict"] for r in check_claims(record(0.5))} == {"undecided"}
    assert max(abs(d - 0.1) for d in differences(record(0.0), "LKD", "CE")) < 1e-9
    with pytest.raises(ValueError, match="at least two values"):
        trend(record(0.0))


ARGS = [
    "-m",
    "darkdistill_nb.experiments.latent",
    "compare",
    "--data",
    "shapes16",
    "--seeds",
    "3",
    "--methods",
    "CE",
    "LKD",
    "--workers",
    "2",
    "--set",
    "n=128",
    "epochs=12",
    "teacher_epochs=1",
    "--out",
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_experiment_continues_and_leaves_no_process(tmp_path, wait_until):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    p = subprocess.Popen(
        [sys.executable, *ARGS, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def a_cell_is_done():
        return bool(list((out / "cells").glob("*.json")))

    wait_until(a_cell_is_done, p)
    workers = children(p.pid)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = {f: f.stat().st_mtime_ns for f in (out / "cells").glob("*.json")}
    assert 1 <= len(done) < 6 and len(workers) >= 2
    assert not (out / "latent_compare_shapes16").exists()

    def all_workers_are_gone():
        return not any(map(running, workers))

    wait_until(all_workers_are_gone)
    assert all(
        json.loads(f.read_text())["cell"]["data"] == "shapes16"
        for f in (out / "cells").glob("*.json")
    ), "no half-written result"
    done = {f: f.stat().st_mtime_ns for f in (out / "cells").glob("*.json")}
    (whole / "teachers").mkdir(parents=True)
    for f in (out / "teachers").iterdir():
        (whole / "teachers" / f.name).write_bytes(f.read_bytes())
    for folder in (out, whole):
        subprocess.run([sys.executable, *ARGS, str(folder)], check=True, capture_output=True)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items()), "finished cells were run again"
    a, b = (load_record(f / "latent_compare_shapes16") for f in (out, whole))
    drop = lambda runs: [{k: v for k, v in r.items() if k != "seconds"} for r in runs]
    assert len(a.runs) == 6 and drop(a.runs) == drop(b.runs)


@pytest.mark.parametrize(
    "args, word",
    [
        (["--set", "n=100000"], "n=100000 exceeds"),
        (["--set", "speed=1"], "unknown setting 'speed'"),
        (["--set", "student=huge"], "student='huge': that net is unknown"),
        (["--set", "gamma=-1"], "gamma=-1 must be"),
    ],
)
def test_bad_settings_are_one_sentence(args, word, tmp_path, capsys):
    assert (
        main(
            [
                "compare",
                "--data",
                "shapes16",
                "--out",
                str(tmp_path),
                "--seeds",
                "1",
                "--workers",
                "1",
                "--methods",
                "CE",
                args[0],
                "teacher_epochs=0",
                args[1],
            ]
        )
        == 2
    )
    assert word in capsys.readouterr().err


# ---------------------------------------------------------------- any data set


def own_file(path, seed=0, size=12, channels=(), per_class=20, classes=3):
    "A small npz whose classes differ in brightness."
    rng, y = np.random.default_rng(seed), np.arange(per_class * classes) % classes
    draw = lambda y: (
        rng.integers(0, 120, (len(y), size, size, *channels))
        + 60 * (y % 3).reshape(-1, *[1] * (2 + len(channels)))
    ).astype(np.uint8)
    np.savez(path, x_train=draw(y), y_train=y, x_test=draw(y[:30]), y_test=y[:30])
    return path


@pytest.mark.parametrize(
    "size, channels, like", [(12, (), "digits"), (24, (), "fashion_mnist"), (24, (3,), "cifar10")]
)
def test_setup_of_an_own_file(tmp_path, size, channels, like):
    path = own_file(tmp_path / "mine.npz", size=size, channels=channels)
    s = setup(path)
    assert s["student"] == SETUPS[like]["student"] and s["n"] == 18 and s["transfer"] == "shapes"
    assert setup(str(path)) == s
    assert json.loads(json.dumps(latent_cell(path, "LKD"))) == latent_cell(path, "LKD")


def test_experiments_on_an_own_file(tmp_path, capsys):
    "All experiments run from the command line; a transfer set may be an own file too; the name of the file names the record."
    path = str(own_file(tmp_path / "mine.npz"))
    quick = [
        "--data",
        path,
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--set",
        "epochs=1",
        "teacher_epochs=1",
    ]
    for words in (
        ["tune", "--seeds", "1", "--methods", "LKD"],
        ["compare", "--seeds", "2"],
        ["sweep_gamma", "--seeds", "1", "--values", "0.5", "10"],
        ["sweep_n", "--seeds", "1", "--values", "9", "18", "--methods", "CE"],
        ["sweep_l", "--seeds", "1", "--values", "4", "8", "--methods", "LKD"],
        ["sweep_transfer", "--seeds", "1", "--methods", "LKD"],
        ["latent_space", "--methods", "CE", "LKD"],
    ):
        more = (
            [f"transfer={own_file(tmp_path / 'other.npz', 1)}"]
            if words[0] == "sweep_transfer"
            else []
        )
        assert main([words[0], *quick, *more, *words[1:]]) == 0, capsys.readouterr().err
    names = sorted(p.name for p in (tmp_path / "out").glob("latent_*"))
    assert names == [
        f"latent_{n}_mine" for n in ("compare", "gamma", "l", "n", "space", "transfer", "tune")
    ]
    record = load_record(tmp_path / "out" / "latent_compare_mine")
    assert record.config["data"] == path and len(record.runs) == 10 and record.runs[0]["n"] == 18
    assert len(check_claims(record)) == len(CLAIMS)


def test_a_changed_file_is_another_cell(tmp_path):
    path = own_file(tmp_path / "mine.npz")
    cell = latent_cell(path, "CE")
    os.utime(own_file(path, 1), (10, 10))
    other = latent_cell(path, "CE")
    assert cell["digest"] != other["digest"] != other["teacher"]["net"]
    assert cell_key(cell["teacher"]) != cell_key(other["teacher"])
    os.utime(own_file(path, 0), (20, 20))
    assert latent_cell(path, "CE") == cell


def test_tuned_settings_of_another_file_of_that_name_are_not_taken(tmp_path):
    a, b = tmp_path / "a" / "mine.npz", tmp_path / "b" / "mine.npz"
    for p in (a, b):
        p.parent.mkdir()
        own_file(p)
    tune(
        a, tmp_path, 1, ("LKD",), {"LKD": [dict(alpha=0.9)]}, workers=1, epochs=1, teacher_epochs=1
    )
    assert chosen_hyper(a, tmp_path)["LKD"]["alpha"] == 0.9
    assert chosen_hyper(b, tmp_path)["LKD"] == HYPER["LKD"]


def test_a_teacher_does_not_depend_on_the_number_of_threads(tmp_path):
    code = (
        "import sys, torch; from darkdistill_nb.experiments.latent import *; "
        "t, _ = latent_teacher(latent_cell('shapes16', 'CE', teacher_epochs=1)['teacher'], sys.argv[1]); print(t.output.weight.double().sum().item())"
    )
    out = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / n)],
            env=os.environ | {"OMP_NUM_THREADS": n},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "2", "3")
    ]
    assert out[0] == out[1] == out[2] and float(out[0])


HOSTILE_EXPERIMENTS = {
    "data": lambda d: latent_cell("mnits", "CE"),
    "data 5": lambda d: latent_cell(5, "CE"),
    "method": lambda d: latent_cell("shapes16", "AT"),
    "gamma": lambda d: latent_cell("shapes16", "CE", gamma=NAN),
    "seed": lambda d: latent_cell("shapes16", "CE", 1.5),
    "l": lambda d: latent_cell("shapes16", "CE", l=0),
    "split": lambda d: latent_cell("shapes16", "CE", split="train"),
    "match": lambda d: latent_cell("shapes16", "CE", match="labels"),
    "keep": lambda d: latent_cell("shapes16", "CE", keep=-1),
    "hyper": lambda d: latent_cell("shapes16", "LKD", hyper=dict(beta=1)),
    "hyper 3": lambda d: latent_cell("shapes16", "LKD", hyper=3),
    "setting": lambda d: latent_cell("shapes16", "CE", speed=1),
    **{
        k: lambda d, k=k, v=v: latent_cell("shapes16", "CE", **{k: v})
        for k, v in dict(
            n=0,
            epochs=1.5,
            lr=NAN,
            batch_size=0,
            teacher="big",
            student=3,
            teacher_lr=-1,
            teacher_epochs=-1,
            transfer=3,
        ).items()
    },
    "seeds": lambda d: compare("shapes16", d, 0),
    "methods": lambda d: compare("shapes16", d, 1, ("AT",)),
    "no methods": lambda d: compare("shapes16", d, 1, ()),
    "values": lambda d: sweep_n("shapes16", d, 1, ()),
    "no cells": lambda d: run_cells([], d),
    "workers": lambda d: compare("shapes16", d, 1, workers=-3),
    "space": lambda d: latent_space("shapes16", d, keep=3),
    "metric": lambda d: differences(Record({}), "CE", "KD", "all"),
    "where": lambda d: differences(Record({}), "CE", "KD", seed=1),
    "axis": lambda d: trend(Record({}), axis="seed"),
    "no runs": lambda d: best_value(Record({}), "n"),
    "no pairs": lambda d: step_differences(Record({}), "CE", "n", 1, 2),
    "experiment": lambda d: latent_record("sweep_all", "cifar10"),
    "edge": lambda d: at_an_edge("AT", {}),
}


@pytest.mark.parametrize("call", HOSTILE_EXPERIMENTS.values(), ids=HOSTILE_EXPERIMENTS)
def test_hostile_settings_of_experiments_are_one_sentence(call, tmp_path):
    with pytest.raises(ValueError) as e:
        call(tmp_path)
    assert (
        10 < len(str(e.value)) < 400 and "\n" not in str(e.value) and not list(tmp_path.iterdir())
    ), "before any work"


def test_a_claim_is_as_good_as_its_weakest_part():
    "A part that is refuted refutes the claim; else one that is undecided leaves it open; a record without the data says nothing."
    sure, open_, never = [0.1, 0.11, 0.12], [-0.2, 0.3, 0.25], [-0.1, -0.11, -0.12]
    for parts, want in (
        ([sure, sure], "holds"),
        ([sure, open_], "undecided"),
        ([open_, never], "does not hold"),
        ([], "no data"),
    ):
        j = judge(Claim("c", "compare", lambda r: dict(enumerate(parts))), Record({}))
        assert j["verdict"] == want and len(j["parts"]) == len(parts)
        assert want in verdict_table({("c", "d"): j})


def test_best_width_needs_every_other_size():
    "The claim that l = d is best: known accuracies, known verdicts; without l = d among the sizes there is no verdict."
    claim = next(c for c in CLAIM_LIST if "as wide as" in c.text and "T_uni" in c.text)

    def record(at, noise=0.001):
        runs = [
            dict(method="LKD", seed=s, l=l, uni=v + noise * (-1) ** (s + i))
            for i, (l, v) in enumerate(at.items())
            for s in range(4)
        ]
        return Record({}, runs=runs, info=dict(teachers=[dict(d=64)]))

    assert judge(claim, record({16: 0.5, 64: 0.6, 256: 0.55}))["verdict"] == "holds"
    assert judge(claim, record({16: 0.5, 64: 0.6, 256: 0.599}, 0.05))["verdict"] == "undecided"
    assert judge(claim, record({16: 0.5, 64: 0.6, 256: 0.65}))["verdict"] == "does not hold"
    assert judge(claim, record({16: 0.5, 32: 0.6}))["verdict"] == "no data"


# ---------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_protocol_on_real_pictures(name, real_data):
    "The pool keeps nine tenths of each class; the most one-sided client of many seeds still gets its private test."
    if not (real_data / f"{name}.npz").is_file():
        pytest.skip(f"needs {name}.npz in DARKDISTILL_DATA")
    pool, test = images(name)
    assert torch.bincount(pool.y).tolist() == [len(pool) // 10] * 10
    least = int(torch.bincount(test.y).min())
    for seed in range(20):
        task = client_task(pool, test, 4096, 0.25, seed)
        assert len(task.data) == 4096
        assert abs(len(task.priv) - min(1000, least)) <= 5
        assert len(task.uni) == len(test)
    with pytest.raises(ValueError, match="samples but"):
        client_task(pool, test, len(pool), 0.25)

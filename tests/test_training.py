"""What stands under every training: fingerprints, batches of one, damaged files and records."""

import functools, json, math, platform, subprocess, sys, textwrap
import numpy as np
import pytest
import torch
from torch import nn
from darkdistill_nb.core import seeds as core_seeds
from darkdistill_nb.core import seeds as core_seeds
from darkdistill_nb.core import plots as core_plots
from darkdistill_nb.core import records as core_records
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.core import training as T
from darkdistill_nb.core.records import (
    Record,
    check_fingerprints,
    data_digest,
    fingerprint,
    fingerprints,
    load_record,
    load_tensors,
    save_record,
    save_tensors,
)
from darkdistill_nb.core.training import check_batches, fit, shared_names


def images(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return ArrayData(torch.rand(n, 1, 8, 8, generator=g), torch.arange(n) % 4, range(4))


# ---------------------------------------------------------------- optimisers


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [{}, dict(lr=0.3), dict(betas=(0.0, 0.5)), dict(eps=0.1)])
def test_adam_takes_the_steps_of_pytorch(how, kind):
    "Bit for bit on a small network, also where a layer has no gradient for a while."
    nets, x = [], images()[:16][0].to(kind)
    for make in (T.Adam, torch.optim.Adam):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 4)).to(kind)
        opt = make(net.parameters(), **how)
        for i in range(6):
            opt.zero_grad()
            net(x).pow(2).sum().backward()
            if i in (0, 3):
                net[1].weight.grad = None
            opt.step()
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in nets)))


def test_a_server_step_needs_no_compiler():
    "Importing PyTorch's compiler takes seconds of every process; optimisers of torch.optim do so at their first step."
    code = """
        import sys
        from darkdistill_nb.core.datasets import load
        from darkdistill_nb.exits.networks import cnn
        from darkdistill_nb.federated.darkdistill import DarkDistill
        from darkdistill_nb.federated.parallel_variant import DarkDistillPL
        from darkdistill_nb.federated.engine import simulate
        from darkdistill_nb.federated.method import make_clients

        train, test = load("digits", n_train=120, n_test=20)
        clients = make_clients(train.y, 4, 5.0, tiers=(0.5, 0.5))
        build = lambda: cnn(train.shape, 10, stages=2, width=4)
        for kind in (DarkDistill, DarkDistillPL):
            run = simulate(kind(participation=1.0), build, train, test, clients, 1, progress=False)
            print(run.log[0]["kd_loss"] >= 0 or run.log[0]["server_step"])
        print("torch._dynamo" in sys.modules)
    """
    r = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert r.stdout.split() == ["True", "True", "False"], r.stdout + r.stderr


# ---------------------------------------------------------------- fingerprints


class Settings:
    def __init__(self, lr, scratch=0):
        self.lr, self._scratch = lr, scratch


def adds(n):
    return lambda x: x + n


@pytest.mark.parametrize(
    "a, b",
    [
        (1, 1.0),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Settings(0.1, 1), Settings(0.1, 2)),
        ({3, 1}, {1, 3}),
        (adds(1), adds(1)),
        (torch.ones(2), torch.ones(2)),
        (functools.partial(max, 1), functools.partial(max, 1)),
        (torch.float32, torch.float32),
        (object(), object()),
    ],
)
def test_equal_things_have_one_fingerprint(a, b):
    assert fingerprint(a) == fingerprint(b)


@pytest.mark.parametrize(
    "a, b",
    [
        (1, True),
        (1, 2),
        ("1", 1),
        (None, "None"),
        ([1, 2], [2, 1]),
        (0.1, 0.1000001),
        (Settings(0.1), Settings(0.2)),
        (adds(1), adds(2)),
        (torch.sin, torch.cos),
        (lambda x: x.sin(), lambda x: x.cos()),
        (torch.zeros(2), torch.zeros(2).double()),
        (np.zeros(2), np.zeros((2, 1))),
        (b"a", b"b"),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (torch.bfloat16, torch.float16),
        (int, float),
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16()),
    ],
)
def test_different_things_have_different_fingerprints(a, b):
    assert fingerprint(a) != fingerprint(b)


def test_the_global_generator_is_seeded_without_looking_for_a_gpu(monkeypatch):
    "The numbers of `torch.manual_seed`, which every client's visit would pay for with three stack traces."
    torch.manual_seed(core_seeds.Streams(3).seed_of("local", 1))
    expected = torch.rand(5)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        pytest.skip("the GPU's generator is seeded, too")
    monkeypatch.setattr(torch, "manual_seed", None)
    with core_seeds.Streams(3).scope("local", 1):
        assert torch.equal(torch.rand(5), expected)


def test_a_network_is_its_layers_its_weights_and_what_is_frozen():
    def net(stages=2, seed=0):
        torch.manual_seed(seed)
        return cnn((1, 8, 8), 4, stages=stages, width=8)

    mark = fingerprint(net())
    assert fingerprint(net()) == mark
    assert mark not in (
        fingerprint(net(3)),
        fingerprint(net(seed=1)),
        fingerprint(net().requires_grad_(False)),
    )
    other = net()
    other.exits[0].reduce.grid = 2  # a setting that no tensor shows
    assert fingerprint(other) != mark
    assert fingerprint(net().eval()) == mark  # the mode alone is set by the training


def test_a_generator_is_where_it_stands():
    g = torch.Generator().manual_seed(1)
    mark = fingerprint(g)
    assert fingerprint(torch.Generator().manual_seed(1)) == mark
    torch.rand(1, generator=g)
    assert fingerprint(g) != mark


def test_things_that_contain_themselves_end():
    a = []
    a.append(a)

    def again(n):
        return again(n - 1) if n else 0

    assert fingerprint(a) == fingerprint(a) and len(fingerprint(again)) == 16


@pytest.mark.parametrize("change", ["pixel", "label", "mean", "order"])
def test_every_change_of_data_is_seen(change):
    a, b = images(), images()
    assert data_digest(a) == data_digest(b)
    if change == "pixel":
        b.x[3, 0, 2, 2] += 1e-3
    elif change == "label":
        b.y[3] = 0
    elif change == "mean":
        b = ArrayData(b.x, b.y, b.classes, (0.1,), b.std)
    else:
        b = b.subset(torch.arange(39, -1, -1))
    assert data_digest(a) != data_digest(b)


def test_the_message_says_what_differs_and_what_to_delete():
    asked = fingerprints(lr=0.1, epochs=3, data=images())
    with pytest.raises(ValueError) as e:
        check_fingerprints(
            "runs/c.safetensors", fingerprints(lr=0.1, epochs=2, data=images(seed=1)), asked
        )
    assert "epochs=3 (in the file 2), another data" in str(e.value)
    assert "delete runs/c.safetensors" in str(e.value)
    assert "lr" not in str(e.value)
    with pytest.raises(ValueError, match="does not say which training"):
        check_fingerprints("c", None, asked)
    with pytest.raises(ValueError, match="seed=None .in the file 7"):
        check_fingerprints("c", {**asked, "seed": 7}, asked)


# ---------------------------------------------------------------- batches of one


def mlp(norm=nn.BatchNorm1d):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm(8), nn.Linear(8, 4))


def one_pixel():
    return nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))


def maps():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))


@pytest.mark.parametrize("build", [mlp, one_pixel])
@pytest.mark.parametrize("n, batch_size", [(33, 32), (1, 32), (4, 1)])
def test_a_batch_of_one_is_refused_before_training(build, n, batch_size):
    net = build()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"batch_size={batch_size} must be another number: {n} samples"
    ):
        fit(net, images(n), batch_size=batch_size)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_batch_of_one_trains_where_it_can():
    for net, n in ((maps(), 33), (mlp(), 34), (mlp(nn.LayerNorm), 33)):
        assert fit(net, images(n), batch_size=32) > 0
    frozen = mlp()
    frozen[2].requires_grad_(False).eval()
    assert fit(frozen, images(33), batch_size=32) > 0 and not frozen[2].running_mean.any()
    part = mlp()  # a frozen part holds a normalisation without weights
    part[1] = nn.Sequential(part[1], nn.BatchNorm1d(8, affine=False)).requires_grad_(False).eval()
    part[2] = nn.Identity()
    assert fit(part, images(33), batch_size=32) > 0


def test_the_look_at_one_image_leaves_no_trace():
    net = nn.Sequential(one_pixel(), nn.Dropout())
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError):
        check_batches(net, 33, 32, images(1)[:1][0])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())


# ---------------------------------------------------------------- files of tensors


def stored(tmp_path):
    tensors = dict(
        a=torch.arange(6.0).view(2, 3),
        n=torch.tensor(3),
        b=torch.tensor([1.5, 2.0]).bfloat16(),
        m=torch.tensor([True, False]),
        e=torch.empty(0, 2),
    )
    save_tensors(
        tmp_path / "t.safetensors", tensors, dict(rows=[dict(loss=0.25, note='a "b" é\n')])
    )
    return tmp_path / "t.safetensors", tensors


def test_tensors_come_back(tmp_path):
    path, tensors = stored(tmp_path)
    back, meta = load_tensors(path)
    assert meta == dict(rows=[dict(loss=0.25, note='a "b" é\n')]) and set(back) == set(tensors)
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    data = path.read_bytes()
    stored(tmp_path)
    assert path.read_bytes() == data  # the same file from the same tensors


def test_no_bit_of_a_file_flips_unseen(tmp_path):
    path, _ = stored(tmp_path)
    data, bad = bytearray(path.read_bytes()), tmp_path / "bad.safetensors"
    for i in range(len(data)):
        for bit in range(8):
            data[i] ^= 1 << bit
            bad.write_bytes(data)
            data[i] ^= 1 << bit
            with pytest.raises(ValueError, match="bad.safetensors"):
                load_tensors(bad)


def test_swapped_tensors_are_seen(tmp_path):
    "Both are whole, only their names were exchanged."
    path, _ = stored(tmp_path)
    save_tensors(path, dict(a=torch.ones(2), b=torch.zeros(2)))
    path.write_bytes(
        path.read_bytes()
        .replace(b'"a":{', b'"?":{')
        .replace(b'"b":{', b'"a":{')
        .replace(b'"?":{', b'"b":{')
    )
    with pytest.raises(ValueError, match="checksum"):
        load_tensors(path)


def test_files_without_a_checksum_stay_readable(tmp_path):
    from safetensors.torch import save

    for metadata, meta in (
        ({"json": '{"round": 3}'}, {"round": 3}),
        ({"format": "pt"}, {}),
        (None, {}),
    ):
        (tmp_path / "old.safetensors").write_bytes(save(dict(a=torch.ones(2)), metadata=metadata))
        tensors, got = load_tensors(tmp_path / "old.safetensors")
        assert got == meta and torch.equal(tensors["a"], torch.ones(2))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 40,
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (2).to_bytes(8, "little") + b"[]",
        (22).to_bytes(8, "little") + b'{"__metadata__": "ab"}',
    ],
)
def test_what_is_no_file_of_tensors_is_said_so(tmp_path, data):
    (tmp_path / "no.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="no.safetensors is not a whole safetensors file"):
        load_tensors(tmp_path / "no.safetensors")


def test_two_names_of_one_tensor_are_both_stored(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    assert shared_names(net) == [["0.weight", "1.weight"]]
    save_tensors(tmp_path / "n.safetensors", net.state_dict())
    back = load_tensors(tmp_path / "n.safetensors")[0]
    assert torch.equal(back["0.weight"], net[0].weight)
    assert torch.equal(back["1.weight"], net[0].weight)
    with pytest.raises(ValueError, match="names with tensors"):
        save_tensors(tmp_path / "x", dict(a=[1]))


# ---------------------------------------------------------------- records


def written(tmp_path, **changes):
    record = dict(
        format=1,
        config=dict(lr=0.1),
        runs=[dict(seed=0)],
        info={},
        versions={},
        hardware={},
        command="c",
        created="",
        seconds=1.0,
    )
    d = {k: v for k, v in {**record, **changes}.items() if v is not ...}
    (tmp_path / "record.json").write_text(json.dumps(d))
    return tmp_path


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(config=...), "it has no 'config'"),
        (dict(info=...), "it has no 'info'"),
        (dict(runs=...), "it has no 'runs'"),
        (dict(info=None), "'info' must be an object, not None"),
        (dict(config=[1]), "'config' must be an object"),
        (dict(runs={}), "'runs' must be a list"),
        (dict(runs=[3]), "runs.0. must be an object"),
        (dict(runs=[{}]), "runs.0. must be an object"),
        (dict(runs=[dict(seed=0), None]), "runs.1. must be an object"),
        (dict(seconds="1"), "'seconds' must be a number"),
        (dict(seconds=True), "'seconds' must be a number"),
        (dict(command=None), "'command' must be a text"),
        (dict(files=[]), "'files' must be"),
        (dict(hardware=3), "'hardware' must be"),
        (dict(format=2), "its format is 2"),
        (dict(format=True), "its format is True"),
        (dict(format=...), "its format is None"),
    ],
)
def test_a_record_of_another_structure_is_refused_in_one_sentence(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text) as e:
        load_record(written(tmp_path, **changes))
    assert "record.json" in str(e.value) and "\n" not in str(e.value)


def test_a_record_of_a_newer_version_is_read(tmp_path):
    assert load_record(written(tmp_path, mood="good", versions=...)).runs == [dict(seed=0)]


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"",
        b"{",
        b"\xff\xfe\x00",
        b'{"format": 1, "runs": [{"loss": NaN}]}',
        b'{"format": 1, "seconds": 1e999}',
        b"[]",
        b"null",
        b"3",
    ],
)
def test_what_is_no_record_is_said_so(tmp_path, text):
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(ValueError, match="record.json"):
        load_record(tmp_path)


def test_the_stored_records_are_read():
    from darkdistill_nb.core.records import asset

    found = sorted(asset("digits_default.json").parent.glob("*.json"))
    assert len(found) > 20
    for path in found:
        assert load_record(path).config


def test_nothing_begins_that_cannot_be_written(tmp_path):
    for bad in (math.nan, math.inf, object(), {1, 2}, b"x"):
        with pytest.raises(ValueError, match="config.net.lr"):
            Record.begin(dict(net=dict(lr=bad)))
    with pytest.raises(ValueError, match=r"runs\[0\].loss=nan"):
        save_record(
            Record({}, runs=[dict(loss=torch.tensor(math.nan))]),
            tmp_path / "r",
            dict(w=dict(a=torch.ones(1))),
        )
    assert not (tmp_path / "r").exists()
    path = save_record(
        Record.begin(
            dict(lr=np.float32(0.5), seeds=np.arange(2), flag=np.bool_(True), where=tmp_path)
        ),
        tmp_path / "r",
    )
    assert load_record(path).config == dict(lr=0.5, seeds=[0, 1], flag=True, where=str(tmp_path))


# ---------------------------------------------------------------- the processor


def test_the_processor_is_kept(tmp_path):
    cpu = load_record(save_record(Record.begin({}), tmp_path)).hardware["processor"]
    assert set(cpu) == {"model", "instructions", "threads", "torch"}
    assert cpu["threads"] == torch.get_num_threads()
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert cpu["model"] and set(cpu["instructions"]) <= set(core_records._INSTRUCTIONS)
        assert ("avx2" in cpu["instructions"]) == (" avx2 " in open("/proc/cpuinfo").read())


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows", "Plan9"])
def test_an_unusual_system_has_a_record_too(monkeypatch, system):
    def fails(*a, **k):
        raise OSError("no such thing")

    monkeypatch.setattr(core_records.platform, "system", lambda: system)
    monkeypatch.setattr(core_records.Path, "read_text", fails)
    monkeypatch.setattr(subprocess, "run", fails)
    assert core_records.processor()["instructions"] is None and core_records.processor()["model"]


def test_macos_and_arm_are_read(monkeypatch):
    said = {
        "machdep.cpu.brand_string": "Intel(R) Core(TM) i7\n",
        "machdep.cpu.features": "FPU SSE AVX1.0\n",
        "machdep.cpu.leaf7_features": "AVX2 BMI2\n",
    }
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda words, **k: subprocess.CompletedProcess(words, 0, said[words[-1]], ""),
    )
    monkeypatch.setattr(core_records.platform, "system", lambda: "Darwin")
    assert core_records.processor()["model"] == "Intel(R) Core(TM) i7"
    assert core_records.processor()["instructions"] == ["avx2"]
    assert core_records._read_cpuinfo(
        "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU part\t: 0xd40\n"
    ) == (None, ["fp", "asimd", "sve", "bf16"])


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: fit(mlp(), images(), lr=math.nan), "lr=nan"),
        (lambda: fit(mlp(), images(), epochs=1.5), "epochs=1.5"),
        (lambda: fit(mlp(), images(), batch_size=0), "batch_size=0"),
        (lambda: fit(mlp(), images(), momentum=-1), "momentum=-1"),
        (lambda: fit(mlp(), images(), weight_decay=math.inf), "weight_decay=inf"),
        (lambda: T.predict(mlp(), images(), 0), "batch_size=0"),
        (lambda: T.predict(mlp(), images().subset(slice(0, 0))), "at least one image"),
        (lambda: T.accuracy(torch.zeros(0, 3), torch.zeros(0)), "N > 0"),
        (
            lambda: T.accuracy(torch.full((2, 3), math.nan), torch.zeros(2)),
            "logits must be free of NaN",
        ),
        (lambda: T.accuracy(torch.zeros(4, 1), torch.zeros(4, 1)), "shape"),
        (lambda: T.mean_std([math.nan]), "values.0.=nan"),
        (lambda: T.mean_std(["1"]), "values.0.='1'"),
        (lambda: T.plus_minus([1.0], digits=-1), "digits=-1"),
        (lambda: T.plus_minus([1.0], scale=math.nan), "scale=nan"),
        (lambda: core_plots.style(-1), "i=-1"),
        (lambda: core_plots.style(0.5), "i=0.5"),
        (lambda: core_seeds.Streams("a"), "seed='a'"),
        (lambda: core_seeds.seed_for(0.5), "seed=0.5"),
        (lambda: T.pick_device(5), "device=5"),
        (lambda: T.pick_device(None), "device=None"),
        (lambda: check_batches(mlp(), 1.5, 32), "n=1.5"),
        (lambda: check_batches(mlp(), 5, 0), "batch_size=0"),
    ],
)
def test_bad_arguments_get_one_sentence(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_numbers_of_numpy_are_numbers():
    a, b = mlp(nn.LayerNorm), mlp(nn.LayerNorm)
    b.load_state_dict(a.state_dict())
    fit(a, images(), 2, 0.1, batch_size=16)
    fit(b, images(), np.int64(2), np.float64(0.1), batch_size=np.int32(16))
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert core_seeds.Streams(np.int64(3)).seed_of("a") == core_seeds.Streams(3).seed_of("a")
    assert T.mean_std(np.arange(3)) == (1.0, 1.0)
    assert (
        T.accuracy(torch.tensor([[0.0, -math.inf]]), torch.tensor([0])) == 1
    )  # a masked class is not a missing number

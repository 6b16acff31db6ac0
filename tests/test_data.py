"""Data sets, files and splits under bad conditions: damaged files, no internet, extreme parameters (the notebook core/data tests the normal ones)."""

import hashlib, io, os, pickle, struct, subprocess, sys, threading, warnings, zipfile
from pathlib import Path
import numpy as np, pytest, torch
from darkdistill_nb.core import datasets as core_datasets
from darkdistill_nb.core import scenes as core_scenes
from darkdistill_nb.core import splits as core_splits
from darkdistill_nb.core import data as D
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import DownloadError, load, read_npz
from darkdistill_nb.core.splits import (
    class_mix,
    client_histogram,
    dirichlet_draw,
    dirichlet_split,
    resample_test,
)
from darkdistill_nb.core.scenes import shapes

Y10K = torch.arange(10_000) % 10


def arrays(n=30, m=12, shape=(6, 6), dtype=np.uint8, classes=None):
    rng = np.random.default_rng(0)
    x = lambda k: (rng.random((k, *shape)) * 255).astype(dtype)
    out = dict(x_train=x(n), y_train=np.arange(n) % 3, x_test=x(m), y_test=np.arange(m) % 3)
    return out if classes is None else out | dict(classes=np.array(classes))


@pytest.fixture
def npz(tmp_path):
    def write(name="my.npz", **change):
        got = {k: v for k, v in (arrays() | change).items() if v is not None}
        np.savez(tmp_path / name, **got)
        return tmp_path / name

    return write


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "No data folder, an empty cache, and downloads allowed"
    monkeypatch.delenv("DARKDISTILL_DATA", raising=False)
    monkeypatch.delenv("DARKDISTILL_OFFLINE", raising=False)
    monkeypatch.setenv("DARKDISTILL_CACHE", str(tmp_path / "cache"))
    from darkdistill_nb.core.compat import ensure_torchvision

    ensure_torchvision()
    return tmp_path / "cache"


# ---- Dirichlet splits (check 5 of the federated specification)


@pytest.mark.parametrize("family", ["client", "class"])
@pytest.mark.parametrize("gamma", [0.01, 0.1, 1, 1e6])
@pytest.mark.parametrize("clients", [1, 7, 10])
def test_every_index_exactly_once(family, gamma, clients):
    try:
        parts = dirichlet_split(Y10K, clients, gamma, family, seed=4, min_size=1, tries=50)
    except ValueError as e:
        assert family == "class" and gamma == 0.01 and "raise gamma" in str(e)
        return
    assert torch.equal(torch.cat(parts).sort()[0], torch.arange(10_000))
    assert len(parts) == clients and all(p.dtype == torch.int64 for p in parts)
    if family == "client":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_large_gamma_is_nearly_uniform(seed):
    hist = client_histogram(Y10K, dirichlet_split(Y10K, 10, 1e6, "class", seed), 10)
    assert ((hist - 100).abs() <= 2).all()
    hist = client_histogram(Y10K, dirichlet_split(Y10K, 10, 1e6, "client", seed), 10).double()
    assert ((hist / 1000 - 0.1).abs().sum(1) / 2 < 0.3).all()


@pytest.mark.parametrize("family", ["client", "class"])
def test_small_gamma_is_skewed(family):
    for seed in range(5):
        hist = client_histogram(
            Y10K, dirichlet_split(Y10K, 10, 0.1, family, seed, min_size=1), 10
        ).double()
        top3 = (hist / hist.sum(1, keepdim=True)).sort(1, descending=True)[0][:, :3].sum(1)
        assert top3.median() >= 0.5


@pytest.mark.parametrize("family", ["client", "class"])
def test_seed_decides_and_global_state_does_not(family):
    digest = lambda seed: hashlib.sha256(
        b"".join(p.numpy().tobytes() + b"|" for p in dirichlet_split(Y10K, 10, 0.5, family, seed))
    ).hexdigest()
    np.random.seed(1)
    torch.manual_seed(1)
    first, before = digest(0), (np.random.get_state()[1].copy(), torch.get_rng_state())
    np.random.seed(2)
    torch.manual_seed(2)
    assert digest(0) == first != digest(1)
    np.random.seed(1)
    torch.manual_seed(1)
    digest(0)
    shapes(50)
    dirichlet_draw(Y10K, 100, 0.5)
    resample_test(Y10K, torch.full((10,), 0.1))
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def test_min_size_is_kept_or_refused():
    for seed in range(20):
        assert (
            min(map(len, dirichlet_split(Y10K, 20, 0.5, "class", seed, min_size=160, tries=100)))
            >= 160
        )
    with pytest.raises(ValueError, match="no split in 7 tries.*best"):
        dirichlet_split(Y10K, 20, 0.05, "class", min_size=400, tries=7)
    assert [len(p) for p in dirichlet_split(Y10K[:40], 40, 0.5)] == [1] * 40


def test_imbalanced_labels_and_missing_classes():
    y = torch.cat(
        [torch.zeros(900), torch.full((90,), 2), torch.full((10,), 5)]
    ).long()  # classes 1, 3 and 4 do not occur
    for family in ("client", "class"):
        for gamma in (0.05, 1e-3, 1e4):
            try:
                parts = dirichlet_split(y, 8, gamma, family, min_size=1, tries=300)
            except ValueError:
                continue
            assert torch.equal(torch.cat(parts).sort()[0], torch.arange(1000))
    assert torch.equal(torch.cat(dirichlet_split(y, 8, 1e-6)).sort()[0], torch.arange(1000))


def test_splits_take_lists_and_arrays():
    want = [p.tolist() for p in dirichlet_split(Y10K[:100], 5, 1.0)]
    for y in (Y10K[:100].tolist(), Y10K[:100].numpy(), Y10K[:100].to(torch.uint8)):
        assert [p.tolist() for p in dirichlet_split(y, 5, 1.0)] == want


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(gamma=0), "gamma=0 must be"),
        (dict(gamma=-1), "gamma=-1 must be"),
        (dict(gamma=float("nan")), "gamma=nan must be"),
        (dict(gamma="x"), "gamma='x' must be"),
        (dict(gamma=1e308), "at most 1e"),
        (dict(min_size=float("nan")), "min_size=nan"),
        (dict(min_size=-5), "min_size=-5"),
        (dict(tries=0), "tries=0"),
        (dict(tries=2.5), "tries=2.5"),
        (dict(y=[0, 10**12]), "labels must be 0..65535"),
        (dict(clients=0), "clients=0 must be"),
        (dict(clients=2.5), "clients=2.5 must be"),
        (dict(clients=10_001), "must not exceed the number of samples"),
        (dict(seed=-1), "seed=-1 must be"),
        (dict(family="iid"), "family='iid' must be"),
        (dict(y=torch.tensor([0.5])), "y must be"),
        (dict(y=torch.zeros(0).long()), "y must be"),
        (dict(min_size=5000), "needs 50000 samples"),
    ],
)
def test_bad_split_arguments(change, word):
    with pytest.raises(ValueError, match=word):
        dirichlet_split(**(dict(y=Y10K, clients=10, gamma=0.5) | change))


# ---- drawing from a pool (checks 12 and 13 of the distillation specification)


@pytest.mark.parametrize(
    "gamma, want",
    [(0.25, 0.3571), (0.5, 0.25), (1, 0.1818), (2.5, 0.1346), (5, 0.1176), (5000, 0.1)],
)
def test_mean_squared_share(gamma, want):
    p = class_mix(10_000, 10, gamma, seed=1)
    assert abs((p**2).sum(1).mean().item() - want) < 0.004


def test_draw_is_exact_and_disjoint():
    y = torch.arange(50_000) % 10
    for overlap in (False, True):
        parts, p = dirichlet_draw(y, 500, 0.25, clients=30, seed=1, overlap=overlap)
        assert p.shape == (30, 10) and all(len(q) == len(q.unique()) == 500 for q in parts)
        assert (len(torch.cat(parts).unique()) == 15_000) == (not overlap)
        assert torch.equal(
            torch.cat(parts),
            torch.cat(dirichlet_draw(y, 500, 0.25, clients=30, seed=1, overlap=overlap)[0]),
        )
    with pytest.raises(ValueError, match="has 5000 samples but"):
        dirichlet_draw(y, 20_000, 0.25, seed=0)
    with pytest.raises(ValueError, match="has 5000 samples but"):
        dirichlet_draw(y, 4096, 5000, clients=13, overlap=False)
    assert len(dirichlet_draw(y, 4096, 5000, clients=13, overlap=True)[0]) == 13
    assert len(dirichlet_draw(y, 50_000, 1e12)[0][0].unique()) == 50_000  # all of it
    for kw in (dict(n=0), dict(gamma=0), dict(clients=0), dict(seed=-3)):
        with pytest.raises(ValueError, match="must be"):
            dirichlet_draw(**(dict(y=y, n=10, gamma=0.5) | kw))


def test_private_test_set_has_the_mix_of_the_draw():
    y, y_test = torch.arange(50_000) % 10, Y10K
    assert torch.equal(
        client_histogram(y_test, [slice(None)], 10)[0], torch.full((10,), 1000)
    )  # the uniform test set: 1,000 of each
    for seed in range(20):
        _, p = dirichlet_draw(y, 512, 0.25, seed=seed)
        idx = resample_test(y_test, p[0], seed=seed)
        assert torch.equal(client_histogram(y_test, [idx], 10)[0], (p[0] * 1000).round().long())
        assert len(idx.unique()) == len(idx)
    hit = (
        torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.2 + 0.06 * y_test
    )  # accuracy differs by class
    near = [
        hit[resample_test(y_test, q, seed=s)].float().mean() - hit.float().mean()
        for s, q in enumerate(class_mix(50, 10, 5000))
    ]
    assert (torch.stack(near).abs() < 0.032).float().mean() >= 0.9
    assert hit[resample_test(y_test, torch.eye(10)[9])].float().mean() > hit.float().mean() + 0.1
    with pytest.raises(ValueError, match="sum to 1"):
        resample_test(y_test, torch.full((10,), 0.2))
    with pytest.raises(ValueError, match="test samples"):
        resample_test(y_test[:500], torch.eye(10)[0])


# ---- shapes


HASH_OF_IMAGES = """import hashlib
from darkdistill_nb.core.scenes import shapes
print(hashlib.sha256(shapes(400, size=16).x.numpy().tobytes()).hexdigest())"""


@pytest.mark.parametrize("way", ["", "COMPATIBLE", "AVX2"])
def test_the_same_images_on_every_processor(way):
    "Pixels come from exactly rounded operations, whatever the processor's kernels do in their last bit."
    env = os.environ | (dict(MKL_CBWR=way) if way else {})
    r = subprocess.run([sys.executable, "-c", HASH_OF_IMAGES], env=env, capture_output=True, text=True)
    assert r.stdout.strip() == "9eb549fb9e13a76edc51b529fc080dff6d407dbbb4f4de9050aeb9987d174cf0", r.stderr


def test_shapes_do_not_depend_on_threads_or_count():
    before = torch.get_num_threads()
    digest = lambda d: hashlib.sha256(
        d.x.numpy().tobytes() + d.y.numpy().tobytes() + d.difficulty.numpy().tobytes()
    ).hexdigest()
    want = digest(shapes(100, seed=2))
    for n in (100, 101, 137, 700):
        assert digest(shapes(n, seed=2).subset(slice(100))) == want
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert digest(shapes(100, seed=2)) == want and torch.get_num_threads() == threads
    torch.set_num_threads(before)
    got = []
    rest = [
        threading.Thread(target=lambda: got.append(digest(shapes(100, seed=2)))) for _ in range(3)
    ]
    for t in rest:
        t.start()
    for t in rest:
        t.join()
    assert got == [want] * 3
    # another process, and with several threads inside each operation
    code = (
        "import hashlib; from darkdistill_nb.core import scenes; from contextlib import nullcontext; "
        "scenes.one_thread = nullcontext; d = scenes.shapes(100, seed=2); "
        "print(hashlib.sha256(d.x.numpy().tobytes() + d.y.numpy().tobytes() + d.difficulty.numpy().tobytes()).hexdigest())"
    )
    for n in ("1", "3"):
        assert (
            subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"OMP_NUM_THREADS": n},
                capture_output=True,
                text=True,
            ).stdout.strip()
            == want
        )


def test_shapes_difficulty():
    d = shapes(20_000, seed=9).difficulty
    assert 0 <= d.min() < 0.001 and 0.999 < d.max() < 1 and abs(d.mean() - 0.5) < 0.01
    ramp = torch.linspace(0, 1, 130)
    mixed = shapes(130, seed=1, difficulty=ramp)
    assert torch.equal(mixed.difficulty, ramp)
    for v in (0, 1):
        alone = shapes(130, seed=1, difficulty=v)
        i = 0 if v == 0 else 129
        assert torch.equal(alone.x[i], mixed.x[i]) and torch.equal(alone.y, mixed.y)
    noise = [
        (shapes(200, difficulty=v).x.float().diff(dim=3).abs().mean()) for v in (0, 0.3, 0.6, 1)
    ]
    assert noise == sorted(noise)
    assert shapes(10, size=17).shape == (3, 17, 17)
    assert len(shapes(3, seed=2**70)) == 3


def test_load_shapes_keeps_train_and_test_apart():
    train, test = load("shapes", n_train=1000, n_test=1000, seed=0)
    other, _ = load("shapes", n_train=1000, n_test=10, seed=1)
    flat = lambda d: {x.tobytes() for x in d.x.numpy()}
    assert not flat(train) & flat(test)
    assert not flat(other) & flat(test)
    assert not flat(train) & flat(other)
    assert test.mean == train.mean and test.difficulty is not None
    with pytest.raises(ValueError, match="seed="):
        load("shapes", seed=2**32)


# ---- one's own file


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(classes=np.array(list("aba"))), "the name 'a' 2 times"),
        (dict(y_train=np.zeros(30, int), y_test=np.zeros(12, int)), "single class"),
        (
            dict(y_train=np.ones(30, int), y_test=np.ones(12, int), classes=np.array(list("abc"))),
            "single class",
        ),
        (dict(x_test=None), "lacks x_test"),
        (dict(y_train=np.array([{}] * 30)), "never unpickled"),
        (dict(y_train=np.arange(29) % 3), "29 labels for 30 images"),
        (dict(y_train=np.arange(30) % 3 - 1), "0..K-1"),
        (dict(y_train=np.arange(30) % 3 * 2), "0..K-1"),
        (dict(y_train=np.arange(30) % 3 + 10**12), "0..K-1"),
        (dict(y_test=np.arange(12)), "y_test holds the label 11"),
        (dict(classes=np.array(["a", "b"])), "y_train holds the label 2"),
        (dict(y_test=-np.ones(12, int)), "label -1"),
        (dict(classes=np.array(list("abcd")), y_test=np.full(12, 3)), "no training sample"),
        (dict(classes=np.zeros((2, 2))), "classes must be"),
        (dict(y_train=np.zeros(30)), "vector of integers"),
        (dict(y_train=np.zeros((30, 1), int)), "vector of integers"),
        (dict(y_train=np.int64(0)), "vector of integers"),
        (
            dict(x_train=np.full((30, 6, 6), np.nan), x_test=np.zeros((12, 6, 6))),
            "x_train holds 1080 values that are NaN",
        ),
        (
            dict(x_train=np.zeros((30, 6, 6)), x_test=np.full((12, 6, 6), np.inf)),
            "x_test holds 432",
        ),
        (dict(x_train=np.zeros((30, 6, 6)), x_test=np.full((12, 6, 6), 1e300)), "x_test holds 432"),
        (
            dict(x_test=np.zeros((0, 6, 6), np.uint8), y_test=np.zeros(0, int)),
            "test split is empty",
        ),
        (dict(x_train=np.zeros((30, 6), np.uint8)), "may be clips of sound; then rate must say"),
        (dict(x_train=np.zeros(30, np.uint8)), "x_train must have shape"),
        (dict(x_train=np.zeros((30, 6, 6), np.int32)), "uint8 or float"),
        (dict(x_train=np.zeros((30, 6, 6), complex)), "uint8 or float"),
        (dict(x_train=np.zeros((30, 6, 6, 2), np.uint8)), "1, 3 or 4 channels"),
        (dict(x_train=np.zeros((30, 3, 6, 3), np.uint8)), "first or last"),
        (dict(x_test=np.zeros((12, 5, 6), np.uint8)), "differ"),
        (dict(x_test=np.zeros((12, 6, 6))), "differ"),
        (
            dict(x_train=np.zeros((30, 0, 6), np.uint8), x_test=np.zeros((12, 0, 6), np.uint8)),
            "empty",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_files(npz, change, word):
    path = npz(**change)
    with pytest.raises(ValueError, match=word) as e:
        load(path)
    assert "my.npz" in str(e.value) and len(str(e.value)) < 500


def test_no_file_and_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "folder.npz")
    for name, blob in dict(
        empty=b"",
        text=b"hello",
        npy=(lambda b: (np.save(b, np.zeros(3)), b.getvalue())[1])(io.BytesIO()),
        pickle=pickle.dumps([1]),
    ).items():
        (tmp_path / f"{name}.npz").write_bytes(blob)
        with pytest.raises(ValueError, match="not an npz"):
            load(str(tmp_path / f"{name}.npz"))


def test_damaged_files_give_one_error(npz, tmp_path):
    blob, rng = npz(classes=np.array(["a", "b", "c"])).read_bytes(), np.random.default_rng(0)
    want = read_npz(tmp_path / "my.npz")
    for cut in rng.integers(0, len(blob), 150):
        (tmp_path / "cut.npz").write_bytes(blob[:cut])
        with pytest.raises(ValueError, match="cut.npz"):
            load(tmp_path / "cut.npz")
    refused = 0
    for _ in range(300):  # a flipped bit is noticed, or sits in a place that carries no data
        bad = bytearray(blob)
        bad[rng.integers(len(blob))] ^= 1 << rng.integers(8)
        (tmp_path / "bit.npz").write_bytes(bad)
        try:
            got = load(tmp_path / "bit.npz")
        except ValueError as e:
            refused += "bit.npz" in str(e)
        else:
            assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(got, want))
    assert refused > 200


def header(shape, descr="|u1"):
    "The header of a npy file that claims this shape."
    h = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    h += b" " * (63 - (len(h) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(h)) + h


@pytest.fixture
def forged(npz, tmp_path):
    "Write my.npz anew, with these bytes as the member x_train.npy"

    def write(body, method=zipfile.ZIP_STORED):
        with (
            zipfile.ZipFile(npz()) as old,
            zipfile.ZipFile(tmp_path / "bomb.npz", "w", method) as new,
        ):
            for k in old.namelist():
                new.writestr(k, body if k == "x_train.npy" else old.read(k))
        return tmp_path / "bomb.npz"

    return write


@pytest.mark.parametrize(
    "body, word",
    [
        (header("(100000000, 1000, 1000)"), "100,000,000,000,000 bytes, but holds 0"),
        (header("(10, 6, 6)") + bytes(359), "360 bytes, but holds 359"),
        (header("(10, 6, 6)") + bytes(361), "360 bytes, but holds 361"),
        (header("(-10, 6, 6)") + bytes(360), "claims the shape"),
        (header("(10, 6, 6").replace(b"}", b" ") + bytes(360), "damaged|parse"),
        (header("(10.5, 6, 6)") + bytes(360), "shape"),
        (header("(10, 6, 6)", "|O") + bytes(2880), "never unpickled"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "version"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "header|EOF"),
        (b"no array at all", "magic"),
        (b"", "damaged|EOF"),
        (header("(" * 3000 + "6," + ")" * 3000), "bomb.npz"),
    ],
)
def test_headers_are_not_believed(forged, body, word):
    with pytest.raises(ValueError, match=word) as e:
        load(forged(body))
    assert "bomb.npz" in str(e.value) and len(str(e.value)) < 500 and "\n" not in str(e.value)


def test_large_claims_are_refused_before_memory_is_asked_for(forged, monkeypatch):
    "A file that packs zeros well is read, unless it unpacks to more than the memory"
    path = forged(header("(30, 600, 600)") + bytes(30 * 600 * 600), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="differ"):
        load(path)  # read, and then the test images are smaller
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("read before it was checked"))
    with pytest.raises(ValueError, match="would take 10,8.* this machine has 1,000,000 bytes"):
        load(path)


def test_bytes_missing_in_the_middle(npz, tmp_path):
    blob = npz(classes=np.array(["a", "b", "c"])).read_bytes()
    for start in range(0, len(blob) - 41, 37):
        (tmp_path / "hole.npz").write_bytes(blob[:start] + blob[start + 40 :])
        with pytest.raises(ValueError, match="hole.npz"):
            load(tmp_path / "hole.npz")


def test_member_twice(npz, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(npz(), "a") as z:
        z.writestr("y_test.npy", z.read("y_test.npy"))
    with pytest.raises(ValueError, match="y_test twice"):
        load(tmp_path / "my.npz")


@pytest.mark.parametrize("name", ["a" * 5000 + ".npz", "\0.npz", ".npz"])
def test_names_that_no_file_has(name):
    with pytest.raises(FileNotFoundError, match="no such file") as e:
        load(name)
    assert len(str(e.value)) < 200


# ---- units

UNITS = {
    "0..255": lambda u: u,
    "0..1": lambda u: u / 255,
    "-1..1": lambda u: u / 127.5 - 1,
    "standardised": lambda u: (u - 120) / 65,
}


def natural(n, seed=0):
    "Something like images: smooth, dark and bright ones, floats 0..255"
    x = torch.nn.functional.interpolate(
        torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)),
        (12, 12),
        mode="bilinear",
    )
    return ((x - x.min()) / (x.max() - x.min()) * 255).round()


def in_units(npz, a, b):
    x, t = UNITS[a](natural(90)), UNITS[b](natural(60, 1))
    return npz(
        x_train=x[:, 0].numpy(),
        y_train=np.arange(90) % 3,
        x_test=t[:, 0].numpy(),
        y_test=np.arange(60) % 3,
    )


@pytest.mark.parametrize("a", UNITS)
@pytest.mark.parametrize("b", UNITS)
def test_train_and_test_in_different_units(npz, a, b):
    "The same unit gives the same batches as any other, without a warning; two units are refused, or warned of"
    path = in_units(npz, a, b)
    if a == b:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train, test = load(path)
        want = load(in_units(npz, "0..1", "0..1"))[1]
        assert torch.allclose(test[:][0], want[:][0], atol=1e-4)
    elif "standardised" in (a, b):
        with pytest.warns(UserWarning, match="same unit"):
            load(path)
    else:
        with pytest.raises(ValueError, match="my.npz: .* must be in the same unit"):
            load(path)


@pytest.mark.parametrize("a", UNITS)
@pytest.mark.parametrize("b", UNITS)
def test_statistics_of_another_unit(a, b):
    "A test split with mean and std of a training split: the same, a warning, or (bytes) an error; -1..1 and standardised lie too close to tell"
    y = torch.arange(60) % 3
    train = ArrayData(UNITS[a](natural(60)), y)
    test = lambda: ArrayData(UNITS[b](natural(60, 1)), y, None, train.mean, train.std)
    if a == b:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert abs(test()[:][0].std() - 1) < 0.2
    elif {a, b} == {"-1..1", "standardised"}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test()
    else:
        with pytest.warns(UserWarning, match="unit of x"):
            test()
    byte = lambda: ArrayData(natural(60, 1).to(torch.uint8), y, None, train.mean, train.std)
    if a == "0..255":
        with pytest.raises(ValueError, match="that of x/255"):
            byte()
    if a == "0..1":
        assert torch.allclose(
            byte()[:][0],
            ArrayData(natural(60, 1) / 255, y, None, train.mean, train.std)[:][0],
            atol=1e-4,
        )


@pytest.mark.parametrize(
    "mean, std",
    [
        (0.5, 0.2),
        ((0.5,), (0.2,)),
        ((0.5,) * 3, (0.2,) * 2),
        ((0.5,) * 3, (0.2, 0.0, 0.2)),
        ((0.5,) * 3, (0.2, -1, 0.2)),
        ((0.5, float("nan"), 0.5), (0.2,) * 3),
        ((0.5,) * 3, (float("inf"),) * 3),
        ((0.5,) * 3, "abc"),
        ((0.5,) * 3, 5j),
        ((0.5,) * 3, (1e-60,) * 3),
        (dict(), (0.2,) * 3),
    ],
)
def test_statistics_that_cannot_be(mean, std):
    with pytest.raises(ValueError, match="(mean|std)=.* must be"):
        ArrayData(torch.rand(8, 3, 4, 4), torch.arange(8) % 2, mean=mean, std=std)


@pytest.mark.parametrize(
    "make",
    [
        tuple,
        list,
        np.array,
        torch.tensor,
        lambda v: torch.tensor(v, requires_grad=True),
        lambda v: np.array(v, np.float32),
    ],
)
def test_statistics_in_any_container(make):
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 2
    want = (x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.2
    assert torch.allclose(
        ArrayData(x, y, mean=make([0.4, 0.5, 0.6]), std=make([0.2] * 3))[:][0], want, atol=1e-5
    )


# ---- hostile arguments

NAN, INF = float("nan"), float("inf")
IMAGES = ArrayData(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 3)
HOSTILE = {
    "x of numpy": lambda: ArrayData(np.zeros((6, 1, 8, 8), np.uint8), torch.arange(6)),
    "label 10**12": lambda: ArrayData(IMAGES.x, torch.arange(6) + 10**12),
    "classes 'abc'": lambda: ArrayData(IMAGES.x, IMAGES.y, "abc"),
    "classes 3": lambda: ArrayData(IMAGES.x, IMAGES.y, 3),
    "difficulty NaN": lambda: ArrayData(IMAGES.x, IMAGES.y, difficulty=torch.full((6,), NAN)),
    "difficulty 2": lambda: ArrayData(IMAGES.x, IMAGES.y, difficulty=torch.full((6,), 2.0)),
    "difficulty text": lambda: ArrayData(IMAGES.x, IMAGES.y, difficulty="hard"),
    "batches 1.5": lambda: IMAGES.batches(1.5),
    "batches NaN": lambda: IMAGES.batches(NAN),
    "batches None": lambda: IMAGES.batches(None),
    "generator 3": lambda: IMAGES.batches(2, 3),
    "drop_last 'no'": lambda: IMAGES.batches(2, drop_last="no"),
    "subset 6": lambda: IMAGES.subset([6]),
    "subset -7": lambda: IMAGES.subset([-7]),
    "subset .5": lambda: IMAGES.subset([0.5]),
    "subset mask": lambda: IMAGES.subset([True, False]),
    "subset 2-d": lambda: IMAGES.subset([[0]]),
    "subset 0": lambda: IMAGES.subset(0),
    "device": lambda: IMAGES.to("toaster"),
    "pixel_stats list": lambda: D.pixel_stats([1]),
    "pixel_stats empty": lambda: D.pixel_stats(IMAGES.x[:0]),
    "outlines 0": lambda: core_scenes.outlines(0),
    "outlines 2.5": lambda: core_scenes.outlines(2.5),
    "difficulty_law 2": lambda: core_scenes.difficulty_law(2),
    "difficulty_law NaN": lambda: core_scenes.difficulty_law(NAN),
    "difficulty_law tensor": lambda: core_scenes.difficulty_law(torch.tensor([0.5, NAN])),
    "shapes 1.5": lambda: shapes(1.5),
    "shapes 10**13": lambda: shapes(10**13),
    "shapes size": lambda: shapes(10, size=INF),
    "shapes difficulty": lambda: shapes(10, difficulty="easy"),
    "shapes seed": lambda: shapes(10, seed=NAN),
    "sheet of nothing": lambda: core_scenes.show_images(IMAGES, []),
    "sheet columns": lambda: core_scenes.show_images(IMAGES, columns=0),
    "sheet rows": lambda: core_scenes.show_images(IMAGES, rows=["a", "b"]),
    "sheet zoom": lambda: core_scenes.show_images(IMAGES, zoom=0.5),
    "sheet data": lambda: core_scenes.show_images([1]),
    "sheet idx": lambda: core_scenes.show_images(IMAGES, [9]),
    "load 5": lambda: load(5),
    "load n": lambda: load("digits", n_train=2.5),
    "load None": lambda: load(None),
    "load one class": lambda: load("digits", n_train=1),
    "load seed": lambda: load("digits", seed=-1),
    "effective_classes": lambda: core_splits.effective_classes(-1, 10),
    "effective_classes K": lambda: core_splits.effective_classes(1, 0),
    "effective_classes inf": lambda: core_splits.effective_classes(INF, 10),
    "class_mix clients": lambda: class_mix(0, 3, 1.0),
    "class_mix K": lambda: class_mix(3, 2.5, 1.0),
    "class_mix gamma": lambda: class_mix(3, 2, 1e308),
    "class_mix huge": lambda: class_mix(10**12, 10**3, 1.0),
    "class_mix seed": lambda: class_mix(3, 2, 1.0, seed=0.5),
    "histogram parts": lambda: client_histogram([0, 1], [[5]], 2),
    "histogram no parts": lambda: client_histogram([0, 1], [], 2),
    "histogram K": lambda: client_histogram([0, 1], [[0]], NAN),
    "histogram y": lambda: client_histogram([0.5], [[0]], 2),
    "plot NaN": lambda: core_splits.plot_clients(torch.full((2, 3), NAN)),
    "plot negative": lambda: core_splits.plot_clients(-torch.ones(2, 3)),
    "plot classes": lambda: core_splits.plot_clients(torch.ones(2, 3), ["a"]),
    "plot gamma": lambda: core_splits.plot_clients(torch.ones(2, 3), gamma=-1),
    "plot nobody": lambda: core_splits.plot_clients(torch.ones(0, 3)),
    "draw overlap": lambda: dirichlet_draw([0, 1], 1, 1.0, overlap="no"),
    "draw n": lambda: dirichlet_draw([0, 1], NAN, 1.0),
    "draw more": lambda: dirichlet_draw([0, 1], 10**9, 1.0),
    "draw y": lambda: dirichlet_draw("abc", 1, 1.0),
    "resample NaN": lambda: resample_test([0, 1], [NAN, 1]),
    "resample text": lambda: resample_test([0, 1], "ab"),
    "resample n": lambda: resample_test([0, 1], [0.5, 0.5], INF),
    "resample empty": lambda: resample_test([0, 1], []),
}


@pytest.mark.parametrize("call", HOSTILE.values(), ids=HOSTILE)
def test_hostile_arguments_are_one_sentence(call):
    with pytest.raises(ValueError) as e:
        call()
    assert 10 < len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_numpy_and_torch_scalars_are_numbers():
    i, f, t = np.int64, np.float32, torch.tensor
    assert torch.equal(shapes(i(10), t(3), f(0.5), np.uint8(16)).x, shapes(10, 3, 0.5, 16).x)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert same(
        dirichlet_split(Y10K, i(7), f(0.5), seed=t(3), min_size=i(2), tries=t(4)),
        dirichlet_split(Y10K, 7, 0.5, seed=3),
    )
    assert same(
        dirichlet_draw(Y10K, t(50), t(0.5), i(3), np.uint8(1), np.bool_(True))[0],
        dirichlet_draw(Y10K, 50, 0.5, 3, 1, True)[0],
    )
    assert torch.equal(class_mix(i(3), t(4), f(0.5)), class_mix(3, 4, 0.5))
    assert core_splits.effective_classes(f(0.5), i(10)) == 4
    assert torch.equal(
        resample_test(Y10K, np.full(10, 0.1, np.float64), i(100), t(0)),
        resample_test(Y10K, [0.1] * 10, 100),
    )
    assert [len(y) for _, y in IMAGES.batches(i(4), drop_last=np.bool_(False))] == [4, 2]
    assert len(load("digits", n_train=i(50))[0]) == 50
    assert same(IMAGES.subset(np.array([1, 2], np.int32))[:], IMAGES.subset([1, 2])[:])
    assert len(IMAGES.subset([])) == 0


def test_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    a = np.empty(1, object)
    a[0] = Bomb()
    np.savez(tmp_path / "bomb.npz", **(arrays() | dict(x_train=a)))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb", "raw"):
        with pytest.raises(ValueError):
            load(tmp_path / f"{name}.npz")
    assert not (tmp_path / "exploded").exists()


def test_layouts_agree(npz):
    x = np.random.default_rng(0).integers(0, 256, (42, 3, 6, 7), np.uint8)
    last = npz(
        "last.npz", x_train=x[:30].transpose(0, 2, 3, 1), x_test=x[30:].transpose(0, 2, 3, 1)
    )
    first = npz("first.npz", x_train=np.asfortranarray(x[:30]), x_test=x[30:])
    a, b = load(last)[1], load(first)[1]
    assert torch.equal(a.x, b.x)
    assert a.mean == b.mean
    assert a.x.is_contiguous()
    assert a.shape == (3, 6, 7)
    big = npz(
        "big.npz",
        x_train=(x[:30] / 255).astype(">f8"),
        x_test=(x[30:] / 255).astype(">f4"),
        y_train=(np.arange(30) % 3).astype(">i2"),
    )
    assert torch.allclose(load(big)[1][:][0], a[:][0], atol=1e-4)


# ---- public data sets


def fake(width=32, n=50):
    class Fake:
        made = 0

        def __init__(self, root, train, download):
            type(self).made += 1
            (Path(root) / "raw.bin").write_bytes(b"raw")
            assert download
            k = n if train else n // 5
            self.data = np.random.default_rng(k).integers(0, 256, (k, width, width, 3), np.uint8)
            self.targets = (np.arange(k) % 10).tolist()
            self.classes = [f"class {i}" for i in range(10)]

    return Fake


def test_download_is_cached_and_checked(nowhere, monkeypatch):
    Fake = fake()
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    train, test = load("cifar10")
    assert (train.shape, len(train), len(test), train.classes[3], Fake.made) == (
        (3, 32, 32),
        50,
        10,
        "class 3",
        2,
    )
    assert sorted(p.name for p in nowhere.rglob("*")) == [
        "cifar10",
        "cifar10.npz",
        "cifar10.npz.sha256",
    ]  # raw download and temporary files are gone
    monkeypatch.setenv("DARKDISTILL_OFFLINE", "1")
    again, _ = load("cifar10")
    assert torch.equal(again.x, train.x) and Fake.made == 2
    path = nowhere / "cifar10" / "cifar10.npz"
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest() in path.with_suffix(".npz.sha256").read_text()
    )
    good = path.read_bytes()
    for bad in (
        good[:-1000],
        good[:3000] + b"?" + good[3001:],
        b"",
    ):  # damaged: not used; fetched again when that is allowed
        path.write_bytes(bad)
        monkeypatch.setenv("DARKDISTILL_OFFLINE", "1")
        with pytest.raises(DownloadError, match="DARKDISTILL_OFFLINE"):
            load("cifar10")
        monkeypatch.delenv("DARKDISTILL_OFFLINE")
        assert torch.equal(load("cifar10")[0].x, train.x)
    assert sorted(p.name for p in nowhere.rglob("*")) == [
        "cifar10",
        "cifar10.npz",
        "cifar10.npz.sha256",
    ]


def test_other_torchvision_layouts(nowhere, monkeypatch):
    class Fashion(fake(28)):
        def __init__(self, root, train, download):
            super().__init__(root, train, download)
            self.data, self.targets = (
                torch.from_numpy(self.data[..., 0]),
                torch.tensor(self.targets),
            )

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Fashion)
    assert load("fashion_mnist")[0].shape == (1, 28, 28)


def test_real_torchvision_classes_have_what_we_read():
    "The names of the constructor arguments that the download relies on"
    from darkdistill_nb.core.compat import ensure_torchvision

    ensure_torchvision()
    import inspect
    from torchvision import datasets

    for name, cls in core_datasets._PUBLIC.items():
        args = inspect.signature(getattr(datasets, cls).__init__).parameters
        assert {"root", "download", "split" if name == "svhn" else "train"} <= set(args)


def test_two_processes_fill_the_cache_at_once(nowhere):
    nowhere.mkdir()
    got = {k: v.repeat(20, 0) for k, v in arrays().items()}
    threads = [threading.Thread(target=core_datasets._store, args=("svhn", got, nowhere)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert core_datasets._stored("svhn", nowhere)
    assert sorted(p.name for p in nowhere.rglob("*")) == ["svhn", "svhn.npz", "svhn.npz.sha256"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("Network is unreachable"),
        RuntimeError("File not found or corrupted."),
        TimeoutError("timed out"),
        EOFError("truncated"),
    ],
)
def test_failed_download_names_the_choices(nowhere, monkeypatch, error):
    def fail(*a, **k):
        raise error

    monkeypatch.setattr("torchvision.datasets.SVHN", fail)
    with pytest.raises(DownloadError, match="digits or shapes.*npz file.*DARKDISTILL_DATA") as e:
        load("svhn")
    assert str(error) in str(e.value)
    assert isinstance(e.value, ConnectionError)
    assert "\n" not in str(e.value)
    assert not any(nowhere.rglob("*"))


class MadeUpSVHN:
    "What torchvision.datasets.SVHN looks like from outside."

    def __init__(self, root, split, download):
        n = dict(train=40, test=20)[split]
        self.data = np.random.default_rng(n).integers(0, 256, (n, 3, 32, 32), np.uint8)
        self.labels = np.arange(n) % 10


def test_a_download_is_stored_and_read_again_without_internet(nowhere, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.SVHN", MadeUpSVHN)
    train, test = load("svhn")
    assert (len(train), len(test), train.shape) == (40, 20, (3, 32, 32))
    assert torch.equal(train.x, torch.from_numpy(MadeUpSVHN(None, "train", True).data))
    monkeypatch.setattr("torchvision.datasets.SVHN", lambda *a, **k: pytest.fail("asked again"))
    again, _ = load("svhn")
    assert torch.equal(train.x, again.x) and torch.equal(train.y, again.y)


def test_no_answer_does_not_hang(nowhere, monkeypatch):
    "A server that accepts and never answers: the socket time limit ends it"
    import socket

    server = socket.create_server(("127.0.0.1", 0))
    seen = []

    def wait(*a, **k):
        seen.append(socket.getdefaulttimeout())
        socket.setdefaulttimeout(0.2)
        import urllib.request

        urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}/")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", wait)
    with pytest.raises(DownloadError, match="timed out"):
        load("cifar100")
    assert 0 < seen[0] <= 60 and socket.getdefaulttimeout() is None
    server.close()


def test_offline_forbids(nowhere, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.SVHN", lambda *a, **k: pytest.fail("tried to download")
    )
    monkeypatch.setenv("DARKDISTILL_OFFLINE", "1")
    with pytest.raises(DownloadError, match="DARKDISTILL_OFFLINE forbids"):
        load("svhn")


def test_cache_that_cannot_be_made(nowhere, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DARKDISTILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="set DARKDISTILL_CACHE"):
        load("svhn")


def test_data_folder_comes_first(nowhere, npz, monkeypatch, tmp_path):
    npz("cifar10.npz", classes=np.array(["a", "b", "c"]))
    npz("flowers.npz")
    monkeypatch.setenv("DARKDISTILL_DATA", str(tmp_path))
    monkeypatch.setenv("DARKDISTILL_OFFLINE", "1")
    assert load("cifar10")[0].classes == ["a", "b", "c"]
    assert len(load("flowers")[0]) == 30
    with pytest.raises(ValueError, match="did you mean 'flowers'.*choose from digits.*flowers"):
        load("flower")
    with pytest.raises(DownloadError):
        load("svhn")
    monkeypatch.setenv("DARKDISTILL_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="DARKDISTILL_DATA names .*gone"):
        load("cifar10")


@pytest.mark.parametrize(
    "name, word",
    [
        ("cifra10", "did you mean 'cifar10'"),
        ("Digits", "did you mean 'digits'"),
        ("", "choose from"),
        ("/tmp/data.npy", "path of an .npz"),
    ],
)
def test_unknown_names(nowhere, name, word):
    with pytest.raises(ValueError, match=word):
        load(name)


@pytest.mark.parametrize(
    "name, shape",
    [("cifar10", (3, 32, 32)), ("fashion_mnist", (1, 28, 28)), ("tinyimagenet20", (3, 64, 64))],
)
def test_real_data(name, shape):
    root = os.environ.get("DARKDISTILL_DATA")
    if not root or not (Path(root) / f"{name}.npz").is_file():
        pytest.skip(f"needs DARKDISTILL_DATA with {name}.npz")
    train, test = load(name)
    assert train.shape == shape
    assert len(train) >= 10_000
    assert len(test) >= 800
    assert set(test.y.tolist()) <= set(train.y.tolist())
    assert test.mean == train.mean
    assert max(abs(m) for m in test[:][0].mean((0, 2, 3)).tolist()) < 0.1
    if name == "cifar10":
        assert np.allclose(train.mean, [0.4914, 0.4822, 0.4465], atol=0.002)
        assert np.allclose(train.std, [0.247, 0.2435, 0.2616], atol=0.002)
    if name == "fashion_mnist":
        assert abs(train.mean[0] - 0.2860) < 0.001 and abs(train.std[0] - 0.3530) < 0.001
    parts = dirichlet_split(train.y, 20, 0.5)
    assert sum(map(len, parts)) == len(train)


# ---- the container


def test_digits_are_fixed():
    train, test = load("digits")
    assert (len(train), len(test), train.shape, train.n_classes) == (1438, 359, (1, 8, 8), 10)
    assert not {x.tobytes() for x in train.x.numpy()} & {x.tobytes() for x in test.x.numpy()}
    assert torch.equal(load("digits")[0].x, train.x) and train.x.max() == 255
    small, _ = load("digits", n_train=50, seed=3)
    assert small.mean == train.mean
    assert torch.equal(small.y, load("digits", n_train=50, n_test=9, seed=3)[0].y)


def test_indexing_is_the_formula():
    d = shapes(40)
    want = (d.x.double() / 255 - torch.tensor(d.mean).double().view(3, 1, 1)) / torch.tensor(
        d.std
    ).double().view(3, 1, 1)
    assert (d[:][0] - want).abs().max() < 1e-5
    for idx in ([3, 7], torch.tensor([3, 7]), torch.arange(40) % 4 == 3, slice(3, 8, 4)):
        x, y = d[idx]
        assert x.dtype == torch.float32
        assert torch.equal(x[:2], d[[3, 7]][0])
        assert y.dtype == torch.int64
    before = d.x.clone()
    d[:][0].zero_()
    f = ArrayData(d.x.float(), d.y)
    f[:][0].zero_()
    assert torch.equal(d.x, before) and torch.equal(f.x, before.float())  # a batch is a copy
    loader = torch.utils.data.DataLoader(d, 8)
    assert torch.equal(next(iter(loader))[0], d[:8][0])


def test_batches_are_all_samples_once():
    d = shapes(103)
    for g in (None, torch.Generator().manual_seed(0)):
        for drop in (False, True):
            seen = torch.cat([x for x, _ in d.batches(10, g, drop)])
            assert len(seen) == (100 if drop else 103)
            assert len({x.numpy().tobytes() for x in seen}) == len(seen)
    assert list(shapes(5).batches(10, drop_last=True)) == []
    for bad in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            d.batches(bad)


def test_import_is_light():
    code = "import sys; import darkdistill_nb.core.data; print([m for m in ('sklearn', 'scipy', 'torchvision', 'timm', 'plotly', 'PIL') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )

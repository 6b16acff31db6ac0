"""The smallest parts of data sets and splits: values by hand, limits, defaults, branches."""

import math, socket, sys, warnings, zipfile
import numpy as np, pytest, torch
from helpers import default, rng
from darkdistill_nb.core.training import Adam
from darkdistill_nb.core import (
    ArrayData,
    class_look,
    class_mix,
    client_histogram,
    difficulty_law,
    dirichlet_draw,
    dirichlet_split,
    effective_classes,
    every_tenth,
    hatched,
    load,
    of_file,
    outlines,
    pixel_stats,
    pixel_unit,
    read_npz,
    resample_test,
    show_images,
    three_parts,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HOME = sys.modules[load.__module__]
shapes = HOME.shapes  # the function: in a front the name may stand for a module


def bytes_of(n=12, channels=1, side=5, seed=0):
    return torch.randint(0, 256, (n, channels, side, side), generator=rng(seed)).to(torch.uint8)


def labels(n=12, k=3):
    return torch.arange(n) % k


DEFAULTS = {
    outlines: dict(steps=1024),
    hatched: dict(shape="", ink=None, size=6),
    class_look: dict(mark="bar"),
    shapes: dict(seed=0, difficulty=None, size=32),
    load: dict(n_train=None, n_test=None, seed=0),
    class_mix: dict(seed=0),
    dirichlet_split: dict(family="client", seed=0, min_size=None, tries=20),
    dirichlet_draw: dict(clients=1, seed=0, overlap=False),
    resample_test: dict(n=1000, seed=0),
    ArrayData.batches: dict(generator=None, drop_last=False),
    Adam: dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8),
}


@pytest.mark.parametrize("f", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_as_documented(f):
    assert {k: default(f, k) for k in DEFAULTS[f]} == DEFAULTS[f]


# ---------------------------------------------------------------- pixels and their unit


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_statistics_are_those_of_all_pixels_of_a_channel(kind):
    "Of x/255 for bytes; the deviation divides by N, and is 1 for a constant channel."
    x = bytes_of(3, 2)
    x[:, 1] = 51
    mean, std = pixel_stats(x.to(kind))
    v = x[:, 0].double() / (255 if kind is torch.uint8 else 1)
    assert mean[0] == pytest.approx(float(v.mean()))
    assert std[0] == pytest.approx(float(((v - v.mean()) ** 2).mean().sqrt()))
    assert (mean[1], std[1]) == (pytest.approx(0.2 if kind is torch.uint8 else 51), 1)


RANGES = {
    (-0.05, 1.05): (0, 1),
    (0.0, 0.0): (0, 1),
    (-0.051, 1.0): None,
    (0.0, 1.051): None,
    (-12.75, 267.75): (0, 255),
    (0.0, 128.1): (0, 255),
    (0.0, 128.0): None,
    (-12.8, 255.0): None,
    (0.0, 267.8): None,
    (-1.1, 1.1): (-1, 1),
    (-0.751, 0.751): (-1, 1),
    (-0.75, 1.0): None,
    (-1.0, 0.75): None,
    (-1.11, 1.0): None,
    (-1.0, 1.11): None,
}


@pytest.mark.parametrize("low, high", RANGES)
def test_the_unit_follows_from_the_range_which_may_overshoot_a_little(low, high):
    x = torch.tensor([low, high], dtype=torch.float64).view(2, 1, 1, 1)
    assert pixel_unit(x) == RANGES[low, high]


def test_bytes_are_0_to_255_whatever_they_hold():
    assert pixel_unit(torch.zeros(1, 1, 1, 1, dtype=torch.uint8)) == (0, 255)


# ---------------------------------------------------------------- the container


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.zeros(2, 1, 3), "x must have shape"),
        (torch.zeros(2, 1, 0, 3), "x is empty"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.int64), "uint8 or float32, not torch.int64"),
        (torch.full((2, 1, 3, 3), math.inf), "x holds 18 values that are NaN or infinite"),
        ([[1]], "must be a torch tensor, uint8 or float32, not list"),
    ],
)
def test_what_is_no_image_is_told_in_its_own_words(x, words):
    with pytest.raises(ValueError, match=words):
        ArrayData(x, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "y, words",
    [
        (torch.zeros(2, 1, dtype=torch.int64), "one label per"),
        (torch.zeros(3, dtype=torch.int64), "one label per"),
        (torch.tensor([0, -1]), "holds the label -1; labels must be 0 or larger"),
        (torch.tensor([0, 65_536]), "with 65536 classes labels must be 0..65535"),
        (torch.zeros(2, dtype=torch.int32), "must be an int64 tensor, not torch.int32"),
        ([0, 1], "must be an int64 tensor, not list"),
    ],
)
def test_what_is_no_label_is_told_in_its_own_words(y, words):
    with pytest.raises(ValueError, match=words):
        ArrayData(bytes_of(2), y)


def test_the_largest_label_names_the_last_class():
    d = ArrayData(bytes_of(2), torch.tensor([0, 65_535]))
    assert d.n_classes == 65_536 and d.classes[-1] == "65535"
    assert ArrayData(bytes_of(2), torch.tensor([0, 1]), ["a", "b"]).classes == ["a", "b"]
    with pytest.raises(ValueError, match="label 2, but with 2 classes labels must be 0..1"):
        ArrayData(bytes_of(2), torch.tensor([0, 2]), ["a", "b"])


def test_statistics_of_bytes_lie_from_0_to_1_ends_included():
    x, y = bytes_of(2, 2), torch.tensor([0, 1])
    assert ArrayData(x, y, mean=(0, 1), std=(1, 1)).mean == (0, 1)
    for mean, std in [((-0.01, 0.5), (1, 1)), ((0, 1.01), (1, 1)), ((0, 1), (1, 1.01))]:
        with pytest.raises(ValueError, match="for uint8"):
            ArrayData(x, y, mean=mean, std=std)
    assert ArrayData(x.float(), y, mean=(-3, 300), std=(2, 200)).std == (2, 200)


def test_mean_or_std_alone_leaves_the_other_to_the_images():
    x, y = bytes_of(), labels()
    mean, std = pixel_stats(x)
    assert ArrayData(x, y, mean=[0.1]).std == std and ArrayData(x, y, mean=[0.1]).mean == (0.1,)
    assert ArrayData(x, y, std=[0.3]).mean == mean and ArrayData(x, y, std=[0.3]).std == (0.3,)


def warned(x, mean, std):
    "Is there a warning that the statistics are of another unit?"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ArrayData(x, torch.arange(len(x)) % 2, mean=mean, std=std)
    assert all("are they in the unit of x?" in str(w.message) for w in seen)
    return len(seen)


def wave(n, channels=1):
    "Floats with mean 0 and deviation 1, in no known unit."
    v = torch.tensor([-1.0, 1.0]).repeat(8).view(1, 1, 4, 4).expand(n, channels, 4, 4)
    return v.clone() * torch.linspace(0.9, 1.1, n).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "mean, std, told",
    [
        (0, 0.55, 0),  # deviations 1.83, 1.90, .26 and .24
        (0, 0.53, 1),
        (0, 3.85, 0),
        (0, 4.2, 1),
        (-2.4, 1, 0),  # means 2.4, 2.6, -2.4 and -2.6
        (-2.6, 1, 1),
        (2.4, 1, 0),
        (2.6, 1, 1),
        (0, 1, 0),
    ],
)
def test_statistics_of_another_unit_are_warned_of_beyond_these_limits(mean, std, told):
    assert warned(wave(8), [mean], [std]) == told


def test_few_images_or_many_channels_are_not_judged():
    assert [warned(wave(n), [0], [9]) for n in (7, 8)] == [0, 1]
    assert [warned(wave(8, c), [0] * c, [9] * c) for c in (4, 5)] == [1, 0]


def test_statistics_of_the_images_themselves_are_never_warned_of():
    "Of one grey in all of them neither mean nor deviation is about that of others."
    for x in (torch.full((8, 1, 4, 4), 51, dtype=torch.uint8), 9 * wave(8)):
        assert warned(x, None, None) == warned(x, [0.3], None) == 0


def test_a_split_on_another_device_has_all_its_tensors_there():
    d = ArrayData(bytes_of(4), torch.arange(4) % 2, difficulty=torch.zeros(4)).to("meta")
    found = {k: v.device.type for k, v in vars(d).items() if isinstance(v, torch.Tensor)}
    assert found == dict.fromkeys(("x", "y", "difficulty", "_scale", "_shift"), "meta")
    with pytest.raises(ValueError, match="device='nowhere' must be a torch.device or its name"):
        d.to("nowhere")


def test_images_as_they_are_need_no_unit():
    "Mean 0 and deviation 1 say: leave them alone."
    assert warned(wave(8) * 9, [0], [1]) == 0 and warned(wave(8) * 9, [0.01], [1]) == 1


@pytest.mark.parametrize("std, told", [(0.5, 0), (0.52, 1)])
def test_a_deviation_that_a_unit_does_not_allow_is_warned_of(std, told):
    "In 0..1 with mean 1/2 none is larger than 1/2."
    x = bytes_of(8, side=9)
    assert warned(x, [0.5], [std]) == told


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_difficulties_lie_from_0_to_1_ends_included(bad):
    x, y = bytes_of(2), torch.tensor([0, 1])
    d = ArrayData(x, y, difficulty=torch.tensor([0.0, 1.0]))
    assert d.difficulty.tolist() == [0, 1] and "difficulty known" in repr(d)
    with pytest.raises(ValueError, match=r"difficulty must lie in \[0, 1\]"):
        ArrayData(x, y, difficulty=torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match=r"difficulty must have shape \(2,\), not \(\)"):
        ArrayData(x, y, difficulty=torch.tensor(0.5))


def test_samples_are_counted_from_either_end():
    d = ArrayData(bytes_of(), labels(), difficulty=torch.linspace(0, 1, 12))
    for idx in ([-12, 11], np.array([-12, 11], np.int16), torch.tensor([0, 11])):
        s = d.subset(idx)
        assert s.y.tolist() == [0, 2] and s.difficulty.tolist() == [0, 1]
    mask = torch.arange(12) > 9
    assert d.subset(mask).y.tolist() == [1, 2] and len(d.subset(slice(3))) == 3
    assert len(d.subset([])) == 0 and "difficulty" not in repr(ArrayData(bytes_of(), labels()))
    for bad in ([12], [-13], mask[:3], [[0]], [0.5]):
        with pytest.raises(ValueError, match="idx must hold sample numbers in 0..11"):
            d.subset(bad)


def test_batches_end_with_what_is_left_over_or_before_it():
    d = ArrayData(bytes_of(), labels())
    sizes = lambda **kw: [len(y) for _, y in d.batches(5, **kw)]
    for kw in ({}, dict(generator=rng())):
        assert sizes(**kw) == [5, 5, 2] and sizes(drop_last=True, **kw) == [5, 5]
        assert [len(y) for _, y in d.batches(6, drop_last=True, **kw)] == [6, 6]
    order = torch.randperm(12, generator=rng(3))
    assert torch.equal(torch.cat([y for _, y in d.batches(5, rng(3))]), d.y[order])
    assert torch.equal(torch.cat([y for _, y in d.batches(5)]), d.y)


# ---------------------------------------------------------------- shapes


TIPS = {  # radius at 0, 1/8, 1/4, 1/2 and 3/4 of a turn
    "disc": (0.9, 0.9, 0.9, 0.9, 0.9),
    "half disc": (1.05, 1.05, 1.05, 1.05, 0.25),
    "square": (0.78, 0.78 * 2**0.5, 0.78, 0.78, 0.78),
    "bar": (1.15, 0.36 * 2**0.5, 0.36, 1.15, 0.36),
    "cross": (1, 0.3 * 2**0.5, 1, 1, 1),
    "trefoil": (1.1, 0.68 - 0.42 / 2**0.5, 0.68, 0.26, 0.68),
}


@pytest.mark.parametrize("name", TIPS)
def test_outlines_by_hand(name):
    from darkdistill_nb.core import SHAPES

    outer, inner = outlines(8)
    k = SHAPES.index(name)
    assert outer[k, [0, 1, 2, 4, 6]].tolist() == pytest.approx(TIPS[name], abs=1e-5)
    assert inner[k].tolist() == [-1] * 8


def test_outlines_with_corners_by_hand():
    "Triangle and star touch a circle with 3 and 5 tips; ring and crescent have holes."
    outer, inner = outlines(120)
    assert outer[4, [0, 40, 80]].tolist() == pytest.approx([1.15] * 3, abs=1e-5)
    assert outer[4, [20, 60, 100]].tolist() == pytest.approx([1.15 / 2] * 3, abs=1e-5)
    assert outer[8, ::24].tolist() == pytest.approx([1.1] * 5, abs=1e-5)
    assert outer[8, 12::24].tolist() == pytest.approx([0.42] * 5, abs=1e-5)
    assert outer[7, 0] == outer[7, 30] and set(outer[1].tolist()) == {1} == set(outer[2].tolist())
    assert inner[1].tolist() == pytest.approx([0.58] * 120)
    assert inner[2, [0, 60]].tolist() == pytest.approx([1, 0.25], abs=1e-6)
    assert float(inner[2, 30]) == pytest.approx(math.sqrt(0.75**2 - 0.5**2), abs=1e-6)


LAW = dict(  # at difficulty 0, 1/2 and 1
    contrast=(0.5, 0.275, 0.05),
    noise=(0.02, 0.09, 0.3),
    bar=(0, 0.14, 0.28),
    clutter=(0, 0.175, 0.35),
    texture=(0, 0.06, 0.12),
    turn=(0.04, 0.27, 0.5),
    stretch=(0, 0.175, 0.35),
    shear=(0, 0.225, 0.45),
    wave=(0, 0.06, 0.12),
    shift=(0.15, 0.275, 0.4),
    shrink=(0, 0.06, 0.12),
)


def test_the_law_of_difficulty_by_hand():
    for i, d in enumerate((0, 0.5, 1)):
        law = difficulty_law(d)
        assert law == pytest.approx({k: v[i] for k, v in LAW.items()})
        many = difficulty_law(torch.full((2, 2), d, dtype=torch.float64))
        assert {k: v[1, 1].item() for k, v in many.items()} == pytest.approx(law)


DRAWN = {  # difficulty -> means of the channels, deviation, and a weighted mean for each class
    0: (
        (130.18, 133.42, 119.29),
        51.46,
        (-5.7, -10.7, -6.5, -42.3, 24.8, -14.5, -5.1, 11.1, 25.8, 59.2),
    ),
    1: (
        (127.03, 132.03, 118.90),
        66.19,
        (-178.5, 99.5, -302.9, -457.6, 100.0, -123.2, -108.2, 140.9, -437.5, -251.2),
    ),
}


@pytest.mark.parametrize("d", DRAWN)
def test_the_same_seed_draws_the_same_images_everywhere(d):
    "A single pixel may round differently on another CPU; no constant of the drawing may change."
    mean, std, weighted = DRAWN[d]
    data = shapes(100, seed=3, difficulty=d, size=16)
    x = data.x.double()
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(std, abs=0.02)
    w = torch.cos(1.7 * torch.arange(768, dtype=torch.float64)).view(3, 16, 16)
    sums = (x * w).sum((1, 2, 3))
    assert [float(sums[data.y == c].mean()) for c in range(10)] == pytest.approx(weighted, abs=0.3)


def test_the_smallest_image_has_8_pixels_a_side():
    assert shapes(1, size=8).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="size=7"):
        shapes(1, size=7)


@pytest.mark.parametrize("pages, fits", [(30_720, True), (30_719, False)])
def test_what_memory_cannot_hold_is_refused(monkeypatch, pages, fits):
    "Ten images are 30,720 bytes; 384 clients with 10 shares of 8 bytes each are as many."
    pages = dict(SC_PAGE_SIZE=1, SC_PHYS_PAGES=pages)
    monkeypatch.setattr("os.sysconf", lambda name: pages.get(name, 1))
    for call in (lambda: shapes(10), lambda: class_mix(384, 10, 1.0)):
        if fits:
            assert len(call()) in (10, 384)
            continue
        with pytest.raises(ValueError, match="would take 30,720 bytes, but .* has 30,719 bytes"):
            call()


def test_a_block_is_drawn_as_far_as_it_is_asked_for():
    "Difficulties follow the images across the border of a block of 100."
    d = torch.linspace(0, 1, 103)
    got = shapes(103, seed=1, difficulty=d)
    assert torch.equal(got.difficulty, d) and got.y.bincount().sum() == 103
    one = shapes(103, seed=1, difficulty=float(d[101]))
    assert torch.equal(got.x[101], one.x[101]) and not torch.equal(got.x[102], one.x[102])


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize(
    "colour, ink",
    [
        ("#808080", "#ffffff"),
        ("#818181", "#222222"),
        ("#0000FF", "#ffffff"),
        ("#00DD00", "#222222"),
    ],
)
def test_ink_is_dark_on_what_looks_light(colour, ink):
    "Green counts most (.587), then red (.299) and blue (.114)."
    fill = hatched(colour, "/")
    assert fill["color"] == colour and fill["line"] == dict(width=0.5, color="#777777")
    assert fill["pattern"] == dict(shape="/", fillmode="overlay", fgcolor=ink, size=6, solidity=0.3)
    assert "pattern" not in hatched(colour) and hatched(colour, "x", "red", 4)["pattern"] == dict(
        shape="x", fillmode="overlay", fgcolor="red", size=4, solidity=0.3
    )


@pytest.mark.parametrize(
    "colour, ink", [("#FF8080", "#222222"), ("#FF5A00", "#222222"), ("#FF5000", "#ffffff")]
)
def test_each_channel_has_its_weight(colour, ink):
    assert hatched(colour, "/")["pattern"]["fgcolor"] == ink


def test_the_first_eight_classes_have_colours_that_anyone_can_tell_apart():
    "Blue, vermilion, green, purple, orange, sky blue, grey and yellow, in both kinds of figure."
    names = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #999999 #F0E442".split()
    for mark in ("bar", "dot"):
        assert [class_look(c, mark)["color"] for c in range(16)] == names * 2


def test_looks_of_classes_by_hand():
    "Eight colours, then seven patterns or other symbols, then larger ones."
    bar = lambda c: class_look(c).get("pattern", {})
    assert [bar(c).get("shape") for c in (7, 8, 15, 16, 63, 64)] == [None, "/", "/", "x", "+", "/"]
    assert [bar(c)["size"] for c in (8, 63, 64, 119, 120)] == [5, 5, 7, 7, 9]
    dot = lambda c: class_look(c, "dot")
    assert [dot(c)["symbol"] for c in (0, 1, 8, 15)] == ["circle", "square", "square", "circle"]
    assert [dot(c)["symbol"] for c in (63, 64, 128, 192)] == [
        "cross",
        "circle-open",
        "circle-dot",
        "circle-open-dot",
    ]
    assert [dot(c)["size"] for c in (0, 255, 256)] == [5, 5, 6] and dot(256)["symbol"] == "circle"


def sheet(x, columns):
    "The pixels of a contact sheet, (H, W, 3)."
    import base64, io
    from PIL import Image

    data = ArrayData(x, torch.arange(len(x)) % 2)
    png = show_images(data, columns=columns).data[0].source.partition("base64,")[2]
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")))


def test_images_stand_in_rows_with_a_white_line_after_each():
    "Three images in rows of two: the fourth place stays white; grey is shown as grey."
    x = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 3)
    got = sheet(x.contiguous(), 2)
    white = torch.full((3, 4), 255)
    a, b, c = (white.clone() for _ in range(3))
    for tile, grey in ((a, 0), (b, 100), (c, 200)):
        tile[:2, :3] = grey
    want = torch.cat([torch.cat([a, b], 1), torch.cat([c, white], 1)])
    assert torch.equal(got, want[..., None].expand(-1, -1, 3))
    rgb = torch.tensor([10, 20, 30, 99], dtype=torch.uint8).view(1, 4, 1, 1).expand(2, 4, 2, 2)
    assert sheet(rgb.contiguous(), 2)[0, 0].tolist() == [10, 20, 30]


def test_floats_are_shown_from_their_darkest_to_their_brightest():
    x = torch.tensor([-1.0, 0, 1]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert sheet(x.contiguous(), 3)[0, ::3, 0].tolist() == [0, 127, 255]
    assert sheet(torch.ones(2, 1, 2, 2), 2)[0, 0].tolist() == [0] * 3


# ---------------------------------------------------------------- files


@pytest.fixture
def file(tmp_path):
    "Writes an .npz file of 12 training and 6 test images, changed as told."

    def write(**change):
        x = bytes_of(18).numpy()[:, 0]
        y = labels(18).numpy()
        got = dict(x_train=x[:12], y_train=y[:12], x_test=x[12:], y_test=y[12:]) | change
        np.savez(tmp_path / "my.npz", **{k: v for k, v in got.items() if v is not None})
        return tmp_path / "my.npz"

    return write


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_come_first_or_last(file, channels):
    x = bytes_of(18, channels, 6).numpy()
    first = read_npz(file(x_train=x[:12], x_test=x[12:]))[1]
    x = x.transpose(0, 2, 3, 1)
    last = read_npz(file(x_train=x[:12], x_test=x[12:]))[1]
    assert first.shape == last.shape == (channels, 6, 6) and torch.equal(first.x, last.x)


@pytest.mark.parametrize("shape", [(2, 6, 6), (6, 6, 2), (5, 6, 6), (3, 6, 3), (4, 6, 1)])
def test_channels_that_cannot_be_told_are_refused(file, shape):
    with pytest.raises(ValueError, match="channels"):
        read_npz(file(x_train=np.zeros((12, *shape), np.uint8)))


def test_one_pixel_is_one_pixel(file):
    x = np.arange(18, dtype=np.uint8).reshape(18, 1, 1, 1)
    assert read_npz(file(x_train=x[:12], x_test=x[12:]))[0].shape == (1, 1, 1)


def test_labels_and_names_of_a_file(file):
    y = labels(18).numpy()
    assert read_npz(file())[0].classes == ["0", "1", "2"]
    names = read_npz(file(classes=np.array([b"a", b"b", b"c", b"d"])))[0]
    assert names.classes == ["a", "b", "c", "d"] and read_npz(file(classes=np.arange(3, 6)))
    assert read_npz(file(y_train=y[:12].astype(np.uint16)))[0].y.dtype is torch.int64
    for change, words in [
        (dict(y_train=y[:12] + 1), "the labels of y_train must be 0..K-1"),
        (dict(y_train=2 * y[:12]), "the labels of y_train must be 0..K-1"),
        (dict(y_train=y[:12] % 2), "y_test holds the label 2"),
        (dict(y_train=y[:11]), "y_train has 11 labels for 12"),
        (dict(y_train=y[:12, None]), "y_train must be a vector of integers"),
        (dict(classes=np.array(["a", "b"])), "y_train holds the label 2"),
        (dict(classes=np.array([["a", "b", "c"]])), "classes must be a vector of names"),
        (dict(classes=np.zeros(3)), "classes must be a vector of names"),
        (dict(y_test=None), "it lacks y_test; it has x_train"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_npz(file(**change))


def test_each_class_of_the_test_split_is_trained_but_not_the_other_way_round(file):
    y, names = labels(18).numpy(), np.array(["a", "b", "c"])
    assert read_npz(file(y_test=y[12:] % 2, classes=names))[1].y.max() == 1
    with pytest.raises(ValueError, match="y_test holds the label 2, which no training sample has"):
        read_npz(file(y_train=y[:12] % 2, classes=names))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_header_that_are_known(tmp_path, version):
    "Version 3 is for names of fields, which images do not have."
    x, y = bytes_of(12).numpy()[:, 0], labels(12).numpy()
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as z:
        for name, a in dict(x_train=x, y_train=y, x_test=x, y_test=y).items():
            with z.open(f"{name}.npy", "w") as f:
                np.lib.format.write_array(f, a, version)
    if version == (3, 0):
        with pytest.raises(ValueError, match=r"npy version \(3, 0\), which is not known"):
            read_npz(tmp_path / "v.npz")
    else:
        assert len(read_npz(tmp_path / "v.npz")[0]) == 12


def test_images_that_pack_well_are_read(tmp_path):
    "A thousand times smaller is what packing black images gives; labels are smaller still."
    x, y = np.zeros((400, 80, 80), np.uint8), np.arange(400) % 2
    x[::2, 0, 0] = 200
    np.savez_compressed(tmp_path / "p.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert len(read_npz(tmp_path / "p.npz")[0]) == 400


def told_of_units(file, train, test):
    "warning, error or nothing for floats of two splits."
    shape = lambda v: np.resize(np.array(v, np.float32), (12, 4, 4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            read_npz(file(x_train=shape(train), x_test=shape(test)[:6]))
        except ValueError as e:
            assert "both must be in the same unit" in str(e)
            return "error"
    return "warning" if seen else "nothing"


@pytest.mark.parametrize(
    "scale, shift, told",
    [
        (1, 0, "nothing"),
        (0.78, 0, "nothing"),
        (0.76, 0, "warning"),
        (1.29, 0, "nothing"),
        (1.31, 0, "warning"),
        (1, 0.49, "nothing"),
        (1, 0.51, "warning"),
        (1, -0.49, "nothing"),
        (1, -0.51, "warning"),
    ],
)
def test_splits_may_differ_a_little_but_not_as_units_do(file, scale, shift, told):
    "In deviations of the training split."
    train = np.array([-3.0, 3.0])
    assert told_of_units(file, train, scale * train + 3 * shift) == told


def test_half_a_deviation_is_still_a_little(file):
    "Values -1, 0 and 1 three times over: their deviation is 1, to the last bit of N - 1."
    grey = lambda v: np.array(v, np.float32).reshape(3, 1, 1)
    for shift, told in ((0.5, 0), (0.51, 1), (-0.5, 0), (-0.51, 1)):
        split = [torch.from_numpy(grey(v))[:, None] for v in ([-1, 0, 1], [-1, 0, 1])]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            HOME._check_same_unit(split[0], split[1] + shift)
        assert len(seen) == told


def test_known_units_must_be_the_same(file):
    v = np.array([0.0, 1.0])
    assert told_of_units(file, v, 255 * v) == "error" == told_of_units(file, 2 * v - 1, v)
    assert told_of_units(file, v, v) == "nothing" == told_of_units(file, v, 0 * v + 5)


def test_every_fifth_digit_of_a_class_is_for_testing():
    "The third, the eighth, ..., of each class; grey values 0..16 become 0..255."
    from sklearn.datasets import load_digits

    raw, (train, test) = load_digits(), load("digits")
    assert train.classes == test.classes == list("0123456789") and test.std == train.std
    for c in range(10):
        of = raw.images[raw.target == c]
        at = np.arange(len(of)) % 5 == 2
        for part, data in ((of[at], test), (of[~at], train)):
            mine = data.x[data.y == c][:, 0].numpy()
            assert np.array_equal(mine, np.rint(part * 255 / 16))


def test_a_choice_of_samples_depends_on_the_seed_and_differs_for_test():
    whole, test = load("digits")
    one, few = load("digits", 100, 90, seed=1)
    for data, part, seed in ((whole, one, 2), (test, few, 3)):
        assert torch.equal(
            part.y, data.y[torch.randperm(len(data), generator=rng(seed))[: len(part)]]
        )
    assert len(load("digits", 1438, 359)[0]) == 1438
    with pytest.raises(ValueError, match="digits has 359 samples in this split, not 360"):
        load("digits", n_test=360)


def test_shapes_for_testing_are_of_another_seed(monkeypatch):
    "The seed of the training images plus 2**32, which no training seed reaches; 20,000 and 4,000."
    asked = []

    def draw(n, seed=0):
        asked.append((n, seed))
        return shapes(20, seed)

    monkeypatch.setattr(HOME, "shapes", draw)
    train, test = load("shapes", seed=5)
    assert test.mean == train.mean and torch.equal(
        test.difficulty, shapes(20, 5 + 2**32).difficulty
    )
    load("shapes", 7, 8, seed=2**32 - 1)
    assert asked == [(20_000, 5), (4_000, 5 + 2**32), (7, 2**32 - 1), (8, 2**33 - 1)]


def test_small_shapes_are_4000_and_2000_unless_told_otherwise(monkeypatch):
    asked = []

    def draw(n_train, n_test, seed):
        asked.append((n_train, n_test, seed))
        return (ArrayData(bytes_of(), labels()),) * 2

    monkeypatch.setattr(HOME, "small_shapes", draw)
    load("shapes16")
    load("shapes16", 7, 8, seed=3)
    assert asked == [(4000, 2000, 0), (7, 8, 3)]


def test_every_tenth_of_a_class_is_set_aside():
    "The tenth, the twentieth, ..., whatever stands between them."
    y = torch.tensor([0] * 9 + [1] * 20 + [0] * 3)
    assert every_tenth(y).nonzero()[:, 0].tolist() == [18, 28, 29]
    for bad in (y.tolist(), y[None]):
        with pytest.raises(ValueError, match="y=.* must be a tensor .N,. of labels"):
            every_tenth(bad)


def test_three_parts_need_ten_images_of_a_class():
    with pytest.raises(ValueError, match="ten training images of a class; every tenth is set"):
        three_parts("digits", 20)
    train, val, test = three_parts("digits", 200, 50)
    whole = load("digits", 200, 50)[0]
    assert torch.equal(val.y, whole.y[every_tenth(whole.y)]) and len(test) == 50
    assert len(train) == 200 - len(val) and train.mean == val.mean == test.mean


def test_a_file_is_known_by_its_bytes_and_a_name_by_itself(tmp_path):
    import hashlib

    (tmp_path / "my.NPZ").write_bytes(b"some bytes")
    told = dict(data_sha256=hashlib.sha256(b"some bytes").hexdigest())
    assert of_file(tmp_path / "my.NPZ") == told and of_file("digits") == {}
    with pytest.raises(FileNotFoundError, match="no.npz' is not there"):
        of_file(tmp_path / "no.npz")


def test_a_download_waits_20_seconds_for_an_answer(monkeypatch, tmp_path):
    "And leaves the time limit of other connections as it was."
    seen = []

    def fetch(name, root):
        seen.append(socket.getdefaulttimeout())
        raise OSError("no network here")

    monkeypatch.setattr(HOME, "_from_torchvision", fetch)
    monkeypatch.setenv("DARKDISTILL_CACHE", str(tmp_path))
    for name in ("DARKDISTILL_OFFLINE", "DARKDISTILL_DATA"):
        monkeypatch.delenv(name, raising=False)
    for offline in (None, "", "0"):
        if offline is not None:
            monkeypatch.setenv("DARKDISTILL_OFFLINE", offline)
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            load("svhn")
    assert seen == [20, 20, 20] and socket.getdefaulttimeout() is None


# ---------------------------------------------------------------- splits


def test_effective_classes_by_hand():
    assert effective_classes(1, 3) == 2 and effective_classes(0.5, 4) == 2
    assert effective_classes(5, 1) == 1


def test_labels_end_at_65535():
    assert client_histogram([0, 65_535], [[0, 1]], 65_536)[0, -1] == 1
    for bad in ([65_536], [-1], [], [[0]], [True]):
        with pytest.raises(ValueError, match="labels"):
            dirichlet_split(bad, 1, 1.0)


def test_clients_hold_the_mix_that_was_drawn_for_them():
    "With plenty of images of each class; in some order of the clients."
    y = torch.arange(100_000) % 5
    mix = class_mix(10, 5, 0.3, seed=2)
    held = client_histogram(y, dirichlet_split(y, 10, 0.3, seed=2), 5) / 10_000
    early = [float((mix - h).abs().sum(1).min()) for h in held]
    assert sorted(early)[5] < 0.03  # the later ones get what is left


def test_one_client_more_image_or_not():
    y = torch.arange(11) % 3
    assert sorted(map(len, dirichlet_split(y, 4, 1.0))) == [2, 3, 3, 3]
    assert sorted(map(len, dirichlet_split(y, 11, 0.1))) == [1] * 11
    with pytest.raises(ValueError, match="clients=12 must not exceed the number of samples .11."):
        dirichlet_split(y, 12, 1.0)


@pytest.mark.parametrize(
    "samples, clients, least", [(1000, 10, 10), (100, 10, 5), (70, 10, 3), (19, 10, 1)]
)
def test_the_fewest_images_of_a_client_dealt_by_class(samples, clients, least):
    "Half of the mean, from 1 to 10; the first deal that keeps it stands."
    y = np.arange(samples) % 7
    for seed in range(5):
        told, plain = (
            dirichlet_split(y, clients, 0.5, "class", seed, tries=500, **kw)
            for kw in (dict(min_size=least), {})
        )
        assert all(torch.equal(a, b) for a, b in zip(told, plain))
        assert min(map(len, plain)) >= least


def test_a_deal_by_class_is_tried_as_often_as_told():
    y, args = np.arange(60) % 3, (6, 0.3, "class")
    with pytest.raises(ValueError, match="no split in 1 tries"):
        dirichlet_split(y, *args, seed=0, min_size=10, tries=1)
    ok = [seed for seed in range(40) if smallest(y, args, seed, 1) >= 4]
    again = [seed for seed in range(40) if smallest(y, args, seed, 20) >= 4]
    assert set(ok) < set(again)


def smallest(y, args, seed, tries):
    "Fewest images of a client where at least 4 are asked for; 0 where that fails."
    try:
        return min(map(len, dirichlet_split(y, *args, seed=seed, min_size=4, tries=tries)))
    except ValueError:
        return 0


def test_a_full_client_gets_no_more_of_a_later_class():
    "Dealt by class: whoever has its share of all images is passed over."
    y = torch.arange(4000) % 4
    for seed in range(10):
        held = client_histogram(y, dirichlet_split(y, 8, 1.0, "class", seed, min_size=0), 4)
        before = held.cumsum(1) - held
        assert not ((before >= 500) & (held > 0)).any()


def test_min_size_may_take_all_there_is():
    y = torch.arange(12) % 2
    assert {len(p) for p in dirichlet_split(y, 4, 1.0, min_size=3)} == {3}
    with pytest.raises(ValueError, match="min_size=4 for 4 clients needs 16 samples, there are 12"):
        dirichlet_split(y, 4, 1.0, min_size=4)


def test_counts_of_classes_take_any_kind_of_index():
    y = [0, 1, 1, 2]
    parts = [[0, 1], slice(1, 3), torch.tensor([False, False, False, True])]
    assert client_histogram(y, parts, 3).tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 1]]
    assert client_histogram(y, parts, 4).shape == (3, 4)
    with pytest.raises(ValueError, match="n_classes=2 must exceed the largest label 2"):
        client_histogram(y, parts, 2)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_draw_has_the_rounded_mix_of_each_client(overlap):
    y = torch.arange(900) % 3
    parts, p = dirichlet_draw(y, 100, 0.7, 2, seed=4, overlap=overlap)
    held = client_histogram(y, parts, 3)
    edges = torch.cat([torch.zeros(2, 1), (p.cumsum(1) * 100).round()], 1)
    assert torch.equal(held, edges.diff(dim=1).long()) and torch.equal(p, class_mix(2, 3, 0.7, 4))
    assert held.sum(1).tolist() == [100, 100]


def test_a_class_may_be_used_up_but_no_further():
    "Each of two clients asks for about all of the only class; with overlap each may have it."
    y = [0] * 10
    assert sorted(dirichlet_draw(y, 10, 1.0)[0][0].tolist()) == list(range(10))
    assert [len(p) for p in dirichlet_draw(y, 10, 1.0, 2, overlap=True)[0]] == [10, 10]
    assert [len(p) for p in dirichlet_draw(y, 5, 1.0, 2)[0]] == [5, 5]
    with pytest.raises(ValueError, match="class 0 has 10 samples but 12 are asked for"):
        dirichlet_draw(y, 6, 1.0, 2)


def test_no_client_can_hold_more_than_2_to_the_40_samples():
    for draw in (lambda n: dirichlet_draw([0], n, 1.0), lambda n: resample_test([0], [1.0], n)):
        with pytest.raises(ValueError, match="class 0 has 1 "):
            draw(2**40)
        with pytest.raises(ValueError, match=f"n={2**40 + 1} must be a whole number"):
            draw(2**40 + 1)


def test_a_test_set_of_a_mix_by_hand():
    y = [0, 0, 0, 1, 1, 2]
    held = client_histogram(y, [resample_test(y, [0.5, 0.25, 0.25], 4)], 3)
    assert held.tolist() == [[2, 1, 1]]
    assert (
        len(resample_test(y, [0.5, 0.5, 1e-7], 4)) == 4 and len(resample_test(y, [1, 0, 0], 3)) == 3
    )
    for p, words in [
        ([0.5, 0.5, 2e-6], "sum to 1"),
        ([1.5, -0.5, 0], "shares >= 0"),
        ([[1.0, 0, 0]], "vector"),
        ([0.5, 0.5], "y holds the label 2, p has 2 classes"),
        ([0, 0, 1], "class 2 has 1 test samples, 4 are needed for n = 4"),
    ]:
        with pytest.raises(ValueError, match=words):
            resample_test(y, p, 4)
    assert len(resample_test(y, [0.5, 0.5, 0, 0], 4)) == 4  # a class that the test set lacks

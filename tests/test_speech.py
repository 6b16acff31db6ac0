"""Clips of sound as images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.speech import hertz, log_mel, mel, mel_filters

RATE = 16000
TIME = np.arange(RATE) / RATE


def tone(f, loud=0.5):
    return loud * np.sin(2 * np.pi * f * TIME)


def test_the_scale_is_nearly_straight_below_and_bends_above():
    assert float(mel(0)) == 0 and float(mel(1000)) == pytest.approx(1000, abs=0.02)
    assert np.all(np.diff(mel(np.linspace(0, 8000, 50)), 2) < 0)
    assert hertz(mel([1.0, 7999.0])) == pytest.approx([1.0, 7999.0])


def test_each_filter_is_a_triangle_with_its_tip_at_one():
    W = mel_filters(16, 2048, RATE)
    f = torch.arange(W.shape[1]) * RATE / 2048
    tips = hertz(np.linspace(mel(20), mel(RATE / 2), 18))
    for i, w in enumerate(W):
        assert 0.9 < float(w.max()) <= 1  # a frequency of the grid is near each tip
        inside = (f > tips[i]) & (f < tips[i + 2])
        assert torch.equal(w > 1e-9, inside)


@pytest.mark.parametrize("f", [100, 440, 1000, 3000, 7000])
def test_a_tone_is_loudest_in_the_row_of_its_pitch(f):
    x = log_mel(tone(f)[None])[0, 0]
    tips = hertz(np.linspace(mel(20), mel(RATE / 2), 34))[1:-1][::-1]
    assert abs(int(x[:, 16].argmax()) - int(np.abs(tips - f).argmin())) <= 1


def test_twice_as_loud_is_one_step_up():
    quiet, loud = log_mel(np.stack([tone(1000, 0.2), tone(1000, 0.4)]))[:, 0, :, 16].amax(-1)
    assert float(loud - quiet) == pytest.approx(np.log(4), abs=1e-3)


def test_whole_numbers_and_floats_are_the_same_clip():
    x = tone(500)
    whole = np.round(x * 2**15).astype(np.int16)
    assert torch.allclose(log_mel(whole[None]), log_mel(whole[None] / 2**15), atol=1e-5)
    assert torch.equal(log_mel(torch.from_numpy(whole)[None]), log_mel(whole[None]))


def test_many_clips_are_cut_as_each_alone():
    x = np.stack([tone(f) for f in np.linspace(200, 4000, 300)])
    assert torch.allclose(log_mel(x)[270], log_mel(x[270:271])[0], atol=1e-5)


def test_a_file_of_clips_is_a_data_set(tmp_path):
    x = np.stack([tone(300 if i % 2 else 3000) for i in range(12)])
    file = dict(x_train=x, y_train=np.arange(12) % 2, x_test=x[:4], y_test=np.arange(4) % 2)
    np.savez(tmp_path / "tones.npz", rate=RATE, **file)
    train, test = load(tmp_path / "tones.npz")
    assert train.shape == (1, 32, 32) and (len(train), len(test)) == (12, 4)
    assert test.mean == train.mean
    assert not torch.equal(train.x[0], train.x[1]) and torch.equal(train.x[0], train.x[2])


@pytest.mark.parametrize("rate, word", [(None, "rate must say"), (16000.5, "rate must say"), (-1, "rate=-1")])
def test_clips_without_a_rate_are_refused_with_the_name_of_the_file(tmp_path, rate, word):
    x = np.zeros((4, RATE)) + tone(400)
    file = dict(x_train=x, y_train=np.arange(4) % 2, x_test=x, y_test=np.arange(4) % 2)
    np.savez(tmp_path / "bad.npz", **file, **({} if rate is None else dict(rate=rate)))
    with pytest.raises(ValueError, match=f"bad.npz: .*{word}"):
        load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "waves, word",
    [
        (np.zeros(9), "clips, samples"),
        (np.zeros((1, RATE), np.int32), "int16"),
        (np.full((1, RATE), np.nan), "finite"),
        (np.full((1, RATE), 9.0), "floats of -1 to 1"),
        (np.zeros((0, RATE)), "at least one"),
    ],
)
def test_what_is_no_clip_is_refused(waves, word):
    with pytest.raises(ValueError, match=word):
        log_mel(waves)


FILE = Path(os.environ.get("DARKDISTILL_DATA", "nowhere")) / "speechcommands12.npz"


@pytest.mark.skipif(not FILE.exists(), reason="needs the spoken words in DARKDISTILL_DATA")
def test_spoken_words_are_learned():
    "Better than a ridge classifier on coarse features (48 %) after four passes."
    from darkdistill_nb.core.training import accuracy, predict
    from darkdistill_nb.exits.networks import cnn
    from darkdistill_nb.exits.training import BoostNet, fit_exits

    train, test = load("speechcommands12")
    torch.manual_seed(0)
    net = cnn(train.shape, train.n_classes, width=16)
    fit_exits(net, train, BoostNet(), 4, 0.05, batch_size=32)
    assert float(accuracy(predict(net, test), test.y).max()) > 0.55

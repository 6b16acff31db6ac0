"""Experiments with trained networks: any data set or file, settings looked at first, claims judged."""

import math
import numpy as np
import pytest
from darkdistill_nb.exits import stored as exits_stored
from darkdistill_nb.experiments import exits as X
from darkdistill_nb.exits.training import by_rate, rate_claim, rate_table
from darkdistill_nb.core.records import Record, load_record, load_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--set", "epochs=1", 'net_options={"width": 8}', "batch_size=32"]


def own_file(folder, seed=0, n=120, size=16):
    "A data set of somebody's own: three classes of noise."
    draw = np.random.default_rng(seed)
    images = lambda k: draw.integers(0, 255, (k, size, size), dtype=np.uint8)
    np.savez(
        folder / "mine.npz",
        x_train=images(n),
        y_train=np.arange(n) % 3,
        x_test=images(30),
        y_test=np.arange(30) % 3,
    )
    return str(folder / "mine.npz")


def test_every_experiment_takes_a_file(tmp_path):
    base = [
        "--data",
        own_file(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--assets",
        str(tmp_path / "assets"),
    ]
    assert X.main(["train", *base, *SMALL]) == 0
    assert X.main(["pays", *base, "--seeds", "2", "--workers", "1", *SMALL]) == 0
    assert load_tensors(tmp_path / "assets" / "exits_mine_cnn.safetensors")[1]["cell"][
        "data_sha256"
    ]
    assert len(load_record(tmp_path / "assets" / "exits_pays_mine.json").runs) == 8
    assert exits_stored.load_trained(tmp_path / "assets" / "exits_mine_cnn.safetensors")[3]["classes"] == [
        "0",
        "1",
        "2",
    ]


def test_a_file_that_was_written_anew_is_other_data(tmp_path):
    how = dict(epochs=1, net_options=dict(width=8), workers=1, seeds=2, ways=["Joint"])
    first = X.pays(own_file(tmp_path), tmp_path / "out", **how).runs
    assert X.pays(own_file(tmp_path), tmp_path / "out", **how).runs == first
    assert X.pays(own_file(tmp_path, seed=1), tmp_path / "out", **how).runs != first


def test_names_find_their_cells_as_before():
    "A field more in the description of a named data set would orphan all stored cells."
    assert set(X.exit_cell("digits")) == {
        "data",
        "net",
        "policy",
        "options",
        "seed",
        "epochs",
        "lr",
        "batch_size",
        "n_train",
        "n_test",
        "amp",
        "net_options",
    }
    assert X.exit_cell("digits", seed=np.int64(1), lr=np.float32(0.5)) == X.exit_cell(
        "digits", seed=1, lr=0.5
    )


@pytest.mark.parametrize(
    "how, text",
    [
        (dict(lr=0), "lr=0"),
        (dict(lr=math.nan), "lr=nan"),
        (dict(epochs=1.5), "epochs=1.5"),
        (dict(epochs=0), "epochs=0"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(batch_size=-1), "batch_size=-1"),
        (dict(n_train=0), "n_train=0"),
        (dict(n_test=2.5), "n_test=2.5"),
        (dict(amp=1), "amp=1"),
        (dict(net="mlp"), "net='mlp'"),
        (dict(options=3), "options=3"),
        (dict(net_options=[1]), "net_options="),
        (dict(objective="best"), "objective='best'"),
        (dict(objective="l2w", options=dict(eps=9)), "eps=9"),
    ],
)
def test_bad_settings_get_one_sentence(how, text):
    with pytest.raises(ValueError, match=text):
        X.exit_cell("digits", **how)


@pytest.mark.parametrize(
    "words, text",
    [
        (["train", "--data", "nope.npz"], "nope.npz"),
        (["train", "--data", "nope"], "unknown data set"),
        (["pays", "--data", "digits", "--seeds", "1"], "seeds=1"),
        (["train", "--data", "digits", "--set", "net=wrn"], "net has an option of its own"),
        (["train", "--data", "digits", "--device", "abacus"], "abacus"),
        (["train", "--data", "digits", "--set", "lr=1", "lr=2"], "'lr' is set twice"),
        (["rates", "--data", "digits", "--set", "lr=1"], "setting='lr'"),
        (["train", "--data", "digits", "--set", 'net_options={"deep": 3}'], "no option 'deep'"),
        (["pays", "--data", "digits", "--workers", "0"], "workers=0"),
    ],
)
def test_a_bad_command_ends_with_a_sentence(tmp_path, capsys, words, text):
    assert X.main([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert text in said and said.startswith("error: ") and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_claims_are_judged_by_their_intervals():
    "A gain of every seed, a gain of some, and a loss."
    gain = dict(sure=(0.10, 0.11, 0.12), maybe=(0.3, -0.2, 0.1), worse=(-0.10, -0.11, -0.12))
    runs = [
        dict(way=w, lr=lr, seed=s, accuracy=[0.5 + g[s] - (lr == 0.02) * 0.4] * 2)
        for w, g in (gain | dict(joint=(0, 0, 0))).items()
        for s in range(3)
        for lr in (0.01, 0.02)
    ]
    record = Record({}, runs)
    assert [rate_claim(record, w, "joint")[1] for w in gain] == [
        "holds",
        "undecided",
        "does not hold",
    ]
    assert rate_claim(record, "sure", "joint", 0.02)[0][0] == pytest.approx(11)
    assert by_rate(record)["sure", 0.01] == pytest.approx([0.6, 0.61, 0.62])
    assert rate_table(record).splitlines()[2] == "| sure | **61.0** | 21.0 |"
    table = X.gain_table(
        Record(
            dict(budgets=[1.0]),
            [
                dict(way=w, seed=s, curve=[[0.5 + g], [1.0]], exits=[0.5])
                for w, gs in {
                    "Joint": (0, 0),
                    "Joint, equilibrium": (0.1, 0.1),
                    "BoostNet": (0.2, -0.2),
                }.items()
                for s, g in enumerate(gs)
            ],
        )
    )
    assert "+10.00 [+10.00, +10.00]: holds" in table and ": undecided" in table

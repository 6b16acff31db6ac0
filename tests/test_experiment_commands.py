"The command lines of experiments: bad words end with exit code 2 and one sentence, before any training."

import importlib
import pytest

BAD = {
    "experiments.latent": [
        ("nothing --data digits --out o", "choose from"),
        ("compare --data digits --out o --seeds nan", "nan"),
        ("compare --data digits --out o --workers 0", "workers=0"),
        ("compare --data digits --out o --set epochs=-1", "epochs=-1"),
        ("compare --data digits --out o --set nope=1", "nope"),
        ("compare --data digits --out /dev/null/x --workers 1", "/dev/null/x"),
    ],
    "experiments.exits": [
        ("train --data nowhere --out o", "nowhere"),
        ("pays --data digits --out o --seeds 1", "seeds=1"),
        ("pays --data digits --out o --workers -2", "workers=-2"),
        ("pays --data digits --out o --set epochs=nan", "epochs='nan'"),
        ("pays --data digits --out /dev/null/x --workers 1", "/dev/null/x"),
    ],
    "experiments.distree": [
        ("systems --data nowhere --out o", "nowhere"),
        ("systems --data digits --out o --workers 0", "workers=0"),
        ("systems --data digits --out o --set epochs=x", "epochs='x'"),
        ("systems --data digits --out /dev/null/x --workers 1", "/dev/null/x"),
    ],
    "experiments.federated": [
        ("own --data nowhere --out o", "nowhere"),
        ("own --data digits --out o --seeds 1", "seeds=[1]"),
        ("own --data digits --out o --seeds 1 1", "seeds=[1, 1]"),
        ("own --data digits --out o --workers 0", "workers=0"),
        ("own --data digits --out o --set rounds=0 --workers 1", "rounds=0"),
        ("own --data digits --out o --set nope=1", "nope"),
        ("own --data digits --out /dev/null/x --workers 1", "/dev/null/x"),
        ("fair --data digits --out o --methods nope", "nope"),
        ("own --data digits --out o --methods eefl", "methods="),
        ("tau --data digits --out o --device cuda", "device='cuda'"),
        ("tau --data digits --out o --seeds 1", "seeds=[1]"),
        ("main --scale huge --out o", "huge"),
        ("main --scale mini --out o --workers 0", "workers=0"),
    ],
    "experiments.rung": [
        ("--data nowhere --out o", "nowhere"),
        ("--data digits --out o --levers luck", "luck"),
        ("--data digits --out o --seeds 7", "seeds=[7]"),
        ("--data digits --out o --seeds 0 7", "those of the choice"),
        ("--data digits --out o --finalists 99", "finalists=99"),
        ("--data digits --out o --workers 0", "workers=0"),
        ("--data digits --out o --set nope=1", "nope"),
        ("--data digits --out /dev/null/x --workers 1", "/dev/null/x"),
    ],
    "experiments.stage": [
        ("measure --out o --seeds 1", "seeds=1"),
        ("measure --out o --workers 0", "workers=0"),
        ("measure --out o --set rounds=0", "rounds=0"),
        ("measure --out o --set nope=2", "nope"),
    ],
    "experiments.bench": [("nothing", "choose from"), ("exits --rounds 0", "rounds"), ("", "")],
    "app.speed": [("--rounds 0", "rounds"), ("--rounds x", "rounds")],
}


@pytest.mark.parametrize(
    "module, words, named", [(m, w, n) for m, rows in BAD.items() for w, n in rows]
)
def test_bad_words_end_with_one_sentence(module, words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"darkdistill_nb.{module}").main
    try:
        code = main(words.split())
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    assert named in said.strip().splitlines()[-1]
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".json", ".safetensors")]

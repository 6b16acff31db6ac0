"""What several test files do: fixed random numbers, defaults of a signature, equal weights, classes made from flat options, one sentence for bad input."""

import inspect
import pytest, torch
from darkdistill_nb.core.registry import grouped


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def default(f, name):
    "The default of a parameter."
    return inspect.signature(f).parameters[name].default


def same(a, b):
    "Have two sets of weights the same names and, to the last bit, the same values?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copied(weights):
    return {k: v.clone() for k, v in weights.items()}


def made(cls, *args, **options):
    "An object of a class from options by the names that the command line knows."
    return cls(*args, **grouped(cls, options))


def refused(call, words):
    "A `ValueError` in one sentence with these words."
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert "\n" not in str(e.value)

"""torchvision beside a PyTorch it was not built for: repaired where broken, untouched where healthy. Each case runs in its own process."""

import subprocess, sys, textwrap
import pytest
from conftest import LONG


def python(code, ok=True):
    "Run `code` in a fresh interpreter and return what it printed."
    r = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=LONG
    )
    assert (r.returncode == 0) == ok, r.stdout + r.stderr
    return r.stdout + r.stderr


BROKEN = """
import torch
def fail(path): raise OSError(f"Could not load this library: {path}")
torch.ops.load_library = fail            # what a CUDA build's library does beside a CPU build of PyTorch
"""
# What loading a healthy torchvision's library does: it puts the operators, with kernels, into PyTorch's table.
REGISTER = """
import torch
lib = torch.library.Library("torchvision", "DEF")
def register(path=None):
    for name in ("nms", "qnms"):
        lib.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lib.impl(name, lambda dets, scores, iou: torch.tensor([41]), "CPU")
"""
ASK = """
from darkdistill_nb.core import compat
shimmed = compat.ensure_torchvision()
"""
USE = """
assert torch.ops.torchvision.nms(torch.zeros(1, 4), torch.ones(1), 0.5).tolist() == [41]
"""


def test_broken_install_is_repaired():
    python(
        BROKEN
        + ASK
        + """
assert shimmed is True and compat.ensure_torchvision() is True
import torchvision
from torchvision import datasets
from torchvision.transforms import v2
assert v2.Resize(8)(torch.zeros(3, 16, 16)).shape == (3, 8, 8)
fake = datasets.FakeData(2, (3, 8, 8), 4, transform=v2.PILToTensor())
assert fake[0][0].shape == (3, 8, 8) and 0 <= fake[1][1] < 4
import timm
net = timm.create_model("deit_tiny_patch16_224", num_classes=10).eval()
with torch.no_grad(): assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
"""
    )


def test_without_the_repair_the_broken_install_fails():
    out = python(BROKEN + "import torchvision", ok=False)
    assert "torchvision::nms does not exist" in out


@pytest.mark.parametrize("first", ["torchvision", "timm"])
def test_repair_after_a_failed_import(first):
    python(
        BROKEN
        + f"""
import sys
try: import {first}
except Exception: pass
else: raise SystemExit("the import was expected to fail")
"""
        + ASK
        + """
assert shimmed and "torchvision" not in sys.modules and not [m for m in sys.modules if m.startswith("torchvision.")]
import torchvision, timm, torchvision.transforms
assert torchvision.extension._has_ops() is False
assert timm.create_model("vit_tiny_patch16_224", num_classes=2).num_classes == 2
"""
    )


def test_a_missing_operator_is_an_error_not_an_answer():
    out = python(
        BROKEN
        + ASK
        + """
import torchvision
for call in (torchvision.ops.nms, torch.ops.torchvision.nms, torch.ops.torchvision.qnms):
    try: call(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5)
    except RuntimeError as e: print("refused:", e)
"""
    )
    assert out.count("refused:") == 3 and out.count("torchvision") >= 3


def test_healthy_install_operators_already_there():
    python(
        REGISTER + "register()\n" + ASK + "assert shimmed is False and not compat._declared\n" + USE
    )


def test_healthy_install_library_loads():
    python(
        REGISTER
        + "torch.ops.load_library = register\n"
        + ASK
        + "assert shimmed is False and not compat._declared\n"
        + USE
    )


def test_torchvision_already_imported_is_left_alone():
    python(
        REGISTER
        + "register()\nimport torchvision\n"
        + ASK
        + "assert shimmed is False and not compat._declared\n"
        + USE
    )


def test_asking_does_not_import_torchvision():
    python(
        BROKEN
        + ASK
        + "import sys; assert not [m for m in sys.modules if m.split('.')[0] in ('torchvision', 'timm')]"
    )


def test_missing_torchvision_is_named():
    out = python("""
        import importlib.util as u
        real = u.find_spec
        u.find_spec = lambda name, *a: None if name == "torchvision" else real(name, *a)
        from darkdistill_nb.core.compat import ensure_torchvision
        try: ensure_torchvision()
        except ImportError as e: print("ImportError:", e)
    """)
    assert "ImportError: torchvision is not installed" in out


def test_this_install_imports_after_one_call():
    "Whatever this machine has, after the call torchvision and timm import, and a real nms either works or refuses."
    python(
        ASK
        + """
import torch, torchvision, timm
try: keep = torchvision.ops.nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5)
except RuntimeError: assert shimmed
else: assert not shimmed and keep.tolist() == [0]
"""
    )

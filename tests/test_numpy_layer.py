"""What explorers and guarantees compute needs numpy only: everything here runs where PyTorch cannot be imported."""

import subprocess, sys, textwrap
import pytest

MODULES = """core.checks core.registry core.plots core.parallel core.seeds core.splits core.fronts
exits.thresholds exits.bounds exits.guarantees exits.control distree.devices distree.simulator distree.faults app.explorer
app.pages app.exit_explorer app.split_explorer app.distillation_explorer
app.alignment_explorer app.distree_explorer app.difficulty_explorer
app.latent_explorer app.generator_explorer""".split()

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def without_torch(code):
    "Run code in a Python where torch cannot be imported; what it printed."
    code = BLOCKED + textwrap.dedent(code)
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout


def test_the_block_works():
    assert "no" in without_torch("""
        try:
            import torch
        except ImportError:
            print("no")
    """)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports(module):
    assert without_torch(f"import darkdistill_nb.{module}\nprint('torch' in sys.modules)") == "False\n"


def test_exit_explorer():
    out = without_torch("""
        import numpy as np
        from darkdistill_nb.app import ExitExplorer
        rng = np.random.default_rng(0)
        scores = rng.random((4, 200))
        right = rng.random((4, 200)) < scores
        e = ExitExplorer(scores, right, [1, 2, 3, 4])
        print(len(e.to_table("budgets", 5)), len(e.to_page().spec["controls"]))
    """)
    assert out == "5 4\n"


def test_dirichlet_explorer():
    out = without_torch("""
        import numpy as np
        from darkdistill_nb.app import DirichletExplorer
        e = DirichletExplorer(np.arange(300) % 3, ["a", "b", "c"])
        print(len(e.to_table()), len(e.to_page().spec["controls"]))
    """)
    assert out == "10 4\n"


def test_alignment_explorer():
    out = without_torch("""
        import numpy as np
        from darkdistill_nb.app import AlignmentExplorer
        e = AlignmentExplorer(np.arange(300) % 3, clients=9, exits=3)
        print(len(e.to_table()), len(e.to_page().spec["controls"]))
    """)
    assert out == "3 7\n"


def test_a_promise():
    out = without_torch("""
        import numpy as np
        from darkdistill_nb.exits import control_risk, sample_losses
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(3, 500, 4))
        logits[1:] = logits[:1]  # all exits say the same: leaving at once loses nothing
        losses = sample_losses(logits)
        c = control_risk(np.abs(logits).max(-1), losses, 0.05, grid=[3.0, 0.0])
        print(losses.max(), c.thresholds[0])
    """)
    assert out == "0.0 0.0\n"


def test_simulated_devices():
    pytest.importorskip("simpy")
    out = without_torch("""
        from darkdistill_nb.distree import fixed_policy
        p = fixed_policy([[0, 1], [1, 1]])
        print(p.leave(0, 0, 0, 0.5), p.leave(1, 0, 0, 0.5))
    """)
    assert out == "True False\n"

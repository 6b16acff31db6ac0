"What only a GPU can show: recordings, stacked clients and bf16 beside the CPU. Skipped where there is none."

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.exits.inference import budget_thresholds
from darkdistill_nb.exits.scores import confidence
from darkdistill_nb.exits.networks import cnn, vit, wrn
from darkdistill_nb.exits.runner import PLANS, ExitRunner, record
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import make_clients

TINY = dict(img_size=16, patch_size=4, embed_dim=48, num_heads=3, depth=4)
NETS = {
    "vit": lambda: vit("vit_tiny_patch16_224", exits=(1, 2, 4), n_classes=7, **TINY),
    "cnn": lambda: cnn((3, 16, 16), 7, width=8),
    "wrn": lambda: wrn(10, 1, (3, 16, 16), 7),
}


def ready(name):
    "A network on the GPU, images, thresholds between the scores, and who leaves where in float64 on the CPU."
    torch.manual_seed(0)
    net = NETS[name]().eval()
    x = torch.randn(40, 3, 16, 16)
    with torch.inference_mode():
        wide = torch.stack(net.double()(x.double()))
    net.float()
    S = confidence(wide)
    E = len(net)
    T = [float(t) for t in budget_thresholds(S, [1 / E] * E)]
    near = (S[:-1] - torch.tensor(T[:-1]).double()[:, None]).abs() < 1e-4
    return net.cuda(), x.cuda(), T, wide, ~near.any(0)


def taken(S, T):
    goes = S >= torch.tensor(T).double()[:, None]
    goes[-1] = True
    return goes.int().argmax(0)


@pytest.mark.parametrize("plan", [*PLANS, "auto"])
@pytest.mark.parametrize("name", NETS)
def test_every_plan_gives_the_loops_answers(name, plan):
    net, x, T, wide, clear = ready(name)
    r = ExitRunner(net, T, plan=plan)
    want = taken(confidence(wide), T)
    for n in (40, 40, 7, 40):
        o = r(x[:n], logits=True)
        ok = clear[:n]
        assert torch.equal(o.exit[ok], want[:n][ok])
        own = wide[want[:n], torch.arange(n)].float()
        assert (o.logits.cpu()[ok] - own[ok]).abs().max() < 2e-3
    assert (r.always_last(x).cpu() - wide[-1].float()).abs().max() < 2e-3


def test_a_recording_does_the_work_again():
    a, b = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    again = record(lambda: b.add_(a), a.device)
    before = b.clone()
    again()
    a.fill_(2)
    again()
    torch.cuda.synchronize()
    assert torch.equal(b, before + 3)


@pytest.fixture(scope="module")
def digits():
    train, test = load("digits")[:2]
    return train, test, make_clients(train.y, 8, seed=0)


def final(digits, name="eefl", rounds=2, device="cuda", build=None, **how):
    train, test, clients = digits
    build = build or (lambda: cnn(train.shape, train.n_classes, width=16))
    method = METHODS.make(name, lr=0.02, participation=1.0)
    run = simulate(method, build, train, test, clients, rounds, device=device, **how)
    return {k: v.double().cpu() for k, v in run.state["net"].items()}, run


def apart(a, b):
    "Distance of all weights, relative to their size."
    flat = lambda d: torch.cat([v.flatten() for v in d.values()])
    return float((flat(a) - flat(b)).norm() / flat(a).norm())


@pytest.mark.parametrize("name", ["eefl", "calibrated_eefl", "scalefl"])
def test_stacked_clients_train_as_one_by_one(digits, name):
    loop, stacked = final(digits, name)[0], final(digits, name, stack=True)[0]
    cpu = final(digits, name, device="cpu")[0]
    assert apart(loop, stacked) < 1e-3 and apart(cpu, stacked) < 1e-3


def test_batch_normalisation_stacked(digits):
    build = lambda: wrn(10, 1, digits[0].shape, 10)
    clients = make_clients(digits[0].y, 8, tiers=(0.4, 0.3, 0.3), seed=0)
    digits = *digits[:2], clients
    loop = final(digits, build=build, rounds=1)[0]
    stacked = final(digits, build=build, rounds=1, stack=True)[0]
    assert apart(loop, stacked) < 2e-2


def test_steps_are_recorded(digits, monkeypatch):
    from darkdistill_nb.federated import stacked

    made, start = [], stacked.Stack.__init__
    monkeypatch.setattr(stacked.Stack, "__init__", lambda s, *a: made.append(s) or start(s, *a))
    final(digits, stack=True)
    assert not [s.failed for s in made if s.failed]
    assert any(s.replay is not None for s in made)


def test_bf16_learns_as_well(digits):
    full = final(digits, rounds=6, stack=True)[1].log[-1]["accuracy"]
    half = final(digits, rounds=6, stack=True, precision="bf16")[1].log[-1]["accuracy"]
    assert abs(sum(full) - sum(half)) / len(full) < 0.1

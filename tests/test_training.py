"""What stands under every training: fingerprints, batches of one, records and files that are not what they should be."""
import functools
import numpy as np
import pytest
import torch
from torch import nn
from darkdistill_nb.data import ArrayData
from darkdistill_nb.early_exit import cnn
from darkdistill_nb.training import check_batches, check_fingerprints, data_digest, fingerprint, fingerprints, fit


def images(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return ArrayData(torch.rand(n, 1, 8, 8, generator=g), torch.arange(n) % 4, range(4))


# ---------------------------------------------------------------- fingerprints

class Settings:
    def __init__(self, lr, scratch=0):
        self.lr, self._scratch = lr, scratch


def adds(n): return lambda x: x + n


@pytest.mark.parametrize("a, b", [
    (1, 1.), (np.int64(3), 3), (np.float32(.5), .5), ([1, 2], (1, 2)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    (Settings(.1, 1), Settings(.1, 2)), ({3, 1}, {1, 3}), (adds(1), adds(1)), (torch.ones(2), torch.ones(2)),
    (functools.partial(max, 1), functools.partial(max, 1)), (torch.float32, torch.float32), (object(), object())])
def test_equal_things_have_one_fingerprint(a, b):
    assert fingerprint(a) == fingerprint(b)


@pytest.mark.parametrize("a, b", [
    (1, True), (1, 2), ("1", 1), (None, "None"), ([1, 2], [2, 1]), (.1, .1000001), (Settings(.1), Settings(.2)),
    (adds(1), adds(2)), (torch.sin, torch.cos), (lambda x: x.sin(), lambda x: x.cos()),
    (torch.zeros(2), torch.zeros(2).double()), (np.zeros(2), np.zeros((2, 1))), (b"a", b"b"),
    (functools.partial(max, 1), functools.partial(max, 2)), (torch.bfloat16, torch.float16), (int, float),
    (torch.tensor([1., 2.]).bfloat16(), torch.tensor([1., 3.]).bfloat16())])
def test_different_things_have_different_fingerprints(a, b):
    assert fingerprint(a) != fingerprint(b)


def test_a_network_is_its_layers_its_weights_and_what_is_frozen():
    def net(stages=2, seed=0):
        torch.manual_seed(seed)
        return cnn((1, 8, 8), 4, stages=stages, width=8)
    mark = fingerprint(net())
    assert fingerprint(net()) == mark
    assert mark not in (fingerprint(net(3)), fingerprint(net(seed=1)), fingerprint(net().requires_grad_(False)))
    other = net()
    other.exits[0].reduce.grid = 2                     # a setting that no tensor shows
    assert fingerprint(other) != mark
    assert fingerprint(net().eval()) == mark           # the mode alone is set by the training


def test_a_generator_is_where_it_stands():
    g = torch.Generator().manual_seed(1)
    mark = fingerprint(g)
    assert fingerprint(torch.Generator().manual_seed(1)) == mark
    torch.rand(1, generator=g)
    assert fingerprint(g) != mark


def test_things_that_contain_themselves_end():
    a = []
    a.append(a)
    def again(n): return again(n - 1) if n else 0
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
        b = ArrayData(b.x, b.y, b.classes, (.1,), b.std)
    else:
        b = b.subset(torch.arange(39, -1, -1))
    assert data_digest(a) != data_digest(b)


def test_the_message_says_what_differs_and_what_to_delete():
    asked = fingerprints(lr=.1, epochs=3, data=images())
    with pytest.raises(ValueError) as e:
        check_fingerprints("runs/c.safetensors", fingerprints(lr=.1, epochs=2, data=images(seed=1)), asked)
    assert "epochs=3 (in the file 2), another data" in str(e.value) and "delete runs/c.safetensors" in str(e.value)
    assert "lr" not in str(e.value)
    with pytest.raises(ValueError, match="does not say which training"):
        check_fingerprints("c", None, asked)
    with pytest.raises(ValueError, match="seed=None .in the file 7"):
        check_fingerprints("c", {**asked, "seed": 7}, asked)


# ---------------------------------------------------------------- batches of one

def mlp(norm=nn.BatchNorm1d): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm(8), nn.Linear(8, 4))
def one_pixel(): return nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
def maps(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))


@pytest.mark.parametrize("build", [mlp, one_pixel])
@pytest.mark.parametrize("n, batch_size", [(33, 32), (1, 32), (4, 1)])
def test_a_batch_of_one_is_refused_before_training(build, n, batch_size):
    net = build()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be another number: {n} samples"):
        fit(net, images(n), batch_size=batch_size)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_batch_of_one_trains_where_it_can():
    for net, n in ((maps(), 33), (mlp(), 34), (mlp(nn.LayerNorm), 33)):
        assert fit(net, images(n), batch_size=32) > 0
    frozen = mlp()
    frozen[2].requires_grad_(False).eval()
    assert fit(frozen, images(33), batch_size=32) > 0 and not frozen[2].running_mean.any()
    part = mlp()                                       # a frozen part holds a normalisation without weights
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

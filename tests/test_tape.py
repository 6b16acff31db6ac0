"A step on tape gives the bits of autograd, or is not used."

import contextlib, copy, pickle, threading
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.training import fit
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet, Joint
from darkdistill_nb.experiments.bench import Workload, _as_exits
from darkdistill_nb.federated import method as federated
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, make_clients
from darkdistill_nb.federated.tape import Step, Tape, Taped, _channels_last, _four_max, in_bf16
from small import NETS, SHAPE, images

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name):
    torch.manual_seed(0)
    return NETS[name]()


def trained(net, fit, loss, data=None, epochs=4):
    net, draw = copy.deepcopy(net), torch.Generator().manual_seed(7)
    how = epochs, 0.05, 0.9, 1e-4, 8
    ge = lambda x: net(x, "full")
    value = fit(net, data or images(), *how, loss=loss, forward=ge, generator=draw)
    return value, net.state_dict()


def equal(a, b):
    return a[0] == b[0] and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


@pytest.mark.parametrize("objective", [Joint(), BoostNet(), Joint([0.3, 1.0])])
@pytest.mark.parametrize("name", NETS)
def test_training_is_that_of_fit_to_the_bit(name, objective):
    net, taped = made(name), Taped()
    loss = lambda raw, y: objective.loss(raw, y)[0]
    assert equal(trained(net, fit, loss), trained(net, taped, loss))
    steps = {s.net: s for s in taped.steps.values()}
    assert all(s.ready or s.uses < 4 for s in taped.steps.values()) and len(steps) == 1
    assert any(s.ready for s in taped.steps.values())


@pytest.mark.parametrize("name", NETS)
def test_in_bf16_too(name):
    "The same bits as without a tape, and other ones than in fp32."
    net, taped = made(name), Taped(low=True)
    loss = lambda raw, y: Joint().loss(raw, y)[0]
    rows = lambda *a, forward, **kw: fit(*a, forward=_channels_last(forward), **kw)
    with in_bf16():
        low = trained(net, rows, loss)
        assert equal(low, trained(net, taped, loss))
    assert all(s.ready or s.uses < 4 for s in taped.steps.values())
    assert any(s.ready for s in taped.steps.values())
    assert not equal(low, trained(net, fit, loss))


@pytest.mark.parametrize("low", [False, True])
def test_a_tape_is_for_its_own_precision(low):
    net, taped = made("cnn"), Taped(low=low)
    loss = lambda raw, y: Joint().loss(raw, y)[0]
    way = contextlib.nullcontext() if low else in_bf16()
    with way:
        trained(net, taped, loss)
        assert not taped.steps and not taped.takes(net, images(), 8)
    again = pickle.loads(pickle.dumps(taped))
    assert again.low is low


def test_bf16_ends_with_its_block():
    cuda, x = torch.backends.cuda, torch.randn(8, 8)
    before = cuda.fp16_bf16_reduction_math_sdp_allowed(), cuda.flash_sdp_enabled()
    with pytest.raises(KeyError), in_bf16():
        assert (x @ x).dtype == torch.bfloat16 and not cuda.flash_sdp_enabled()
        raise KeyError
    assert (cuda.fp16_bf16_reduction_math_sdp_allowed(), cuda.flash_sdp_enabled()) == before
    assert (x @ x).dtype == torch.float32


def test_bf16_in_two_threads_at_once_ends_with_the_last():
    "The one that came first leaves first; the switches are the process's."
    cuda, inside, out = torch.backends.cuda, threading.Event(), threading.Event()
    state = lambda: (cuda.fp16_bf16_reduction_math_sdp_allowed(), cuda.flash_sdp_enabled())
    before, during = state(), []

    def second():
        with in_bf16():
            inside.set()
            out.wait(20)
            during.append(state())

    t = threading.Thread(target=second)
    with in_bf16():
        t.start()
        assert inside.wait(20)
    out.set()
    t.join()
    assert during == [(True, False)] and state() == before


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_bf16_is_known_on_other_devices(device):
    flash = torch.backends.cuda.flash_sdp_enabled()
    with in_bf16(device):
        assert torch.is_autocast_enabled(device)
        assert torch.backends.cuda.flash_sdp_enabled() == (flash and device != "cpu")
    assert not torch.is_autocast_enabled(device)
    with pytest.raises(ValueError, match="device='tpu'"), in_bf16("tpu"):
        pass


def from_outside(weights):
    return lambda raw, y: sum(F.cross_entropy(f, y, weights) for f in raw)


def looks(raw, y):
    "Another loss where the first one is large: Python looks at a value."
    value = sum(F.cross_entropy(f, y) for f in raw)
    return 2 * value if float(value) > 1 else value


@pytest.mark.parametrize(
    "loss, words", [(from_outside(torch.rand(4)), "from elsewhere"), (looks, "shows a value")]
)
def test_what_may_change_is_not_taped_and_trains_as_ever(loss, words):
    net, taped = made("cnn"), Taped()
    assert equal(trained(net, fit, loss), trained(net, taped, loss))
    assert any(words in s.why for s in taped.steps.values())
    assert not any(s.ready for s in taped.steps.values())


def test_random_numbers_are_drawn_as_ever():
    net = made("cnn")
    net.stem = nn.Sequential(net.stem, nn.Dropout(0.5))
    found, loss = [], lambda raw, y: sum(F.cross_entropy(f, y) for f in raw)
    for way in (fit, taped := Taped()):
        torch.manual_seed(5)
        found.append(trained(net, way, loss))
    assert equal(*found) and any("draws random" in s.why for s in taped.steps.values())


def test_a_step_that_changes_after_it_was_recorded_is_found_by_the_check():
    net, calls = made("cnn"), []

    def loss(raw, y):
        calls.append(1)
        return sum(F.cross_entropy(f, y) for f in raw) * (1.0 if len(calls) < 4 else 2.0)

    step, g = Step(net), torch.Generator().manual_seed(0)
    for i in range(6):
        x, y = torch.randn(5, *SHAPE, generator=g), torch.tensor([0, 1, 2, 3, 0])
        step(x, y, net, loss)
    assert step.why == "its tape gives other numbers" and len(calls) == 6


def test_a_network_with_hooks_is_not_taped():
    net = made("cnn")
    net.stem.register_forward_hook(lambda m, args, out: out * 2)
    assert Step(net).why == "a module calls a hook"


def test_a_copy_records_its_own_networks(digits):
    "A tape holds the tensors of the working networks; those of a copy, or in another process, are others."
    train, _ = digits
    method = EEFL(participation=1.0)
    client = make_clients(train.y, 2, gamma=10.0, tiers=(0.5, 0.5))[0]
    state = method.setup(cnn(train.shape, 10, stages=2, width=8))
    method.local_update(method.send(state, client), train, client, 0, Streams(0))
    assert any(s.ready for s in method._taped.steps.values())
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert type(other._taped) is Taped and not other._taped.steps


def test_freezing_between_two_visits_is_seen():
    net, taped = made("cnn"), Taped()
    loss = lambda raw, y: sum(F.cross_entropy(f, y) for f in raw)
    how = 4, 0.05, 0.9, 1e-4, 8
    taped(net, images(), *how, loss=loss, forward=net)
    net.stem.requires_grad_(False)
    before = net.stem.weight.clone()
    taped(net, images(), *how, loss=loss, forward=net)
    assert torch.equal(before, net.stem.weight)
    net.stem.requires_grad_(True)
    taped(net, images(), *how, loss=loss, forward=net)
    assert not torch.equal(before, net.stem.weight)


def test_a_loss_that_is_no_number_ends_as_with_fit():
    data = images()
    data.x[3] = float("nan")
    loss = lambda raw, y: sum(F.cross_entropy(f, y) for f in raw)
    for way in (fit, Taped()):
        with pytest.raises(FloatingPointError, match="the training loss is nan; lower lr=0.05"):
            trained(made("cnn"), way, loss, data)


def test_the_memory_of_a_step_is_let_go():
    "A variable of the program is gone after its last use."
    net, step = made("cnn"), None
    step = Step(net)
    for _ in range(5):
        step(*images()[:6], net, lambda raw, y: sum(F.cross_entropy(f, y) for f in raw))
    text = step.play.source
    made_names = {n for line in text.splitlines() if " = " in line for n in line.split(" = ")[0].split(", ")}
    made_names = {n.strip(" ,") for n in made_names} - {"_"}
    kept = {n.strip(" (),") for n in text.splitlines()[-1].split("return")[1].split(",")}
    gone = {n.strip() for line in text.splitlines() if line.strip().startswith("del ") for n in line.strip()[4:].split(",")}
    assert made_names == gone | (kept & made_names) and not gone & kept


@pytest.fixture(scope="module")
def digits():
    return load("digits", n_train=300, n_test=60)


@pytest.mark.parametrize("name", ["eefl", "darkdistill", "calibrated_eefl", "depthfl", "inclusivefl"])
def test_simulate_gives_the_weights_of_fit(name, digits, monkeypatch):
    train, test = digits
    clients = make_clients(train.y, 8, gamma=1.0, tiers=(0.5, 0.5))

    def go():
        method = METHODS.make(name, participation=1.0)
        build = lambda: cnn(train.shape, 10, stages=2, width=8)
        return simulate(method, build, train, test, clients, 2, progress=False)

    first = go()
    monkeypatch.setattr(federated, "Taped", lambda: None)
    second = go()
    assert all(torch.equal(v, second.state["net"][k]) for k, v in first.state["net"].items())
    assert [r["loss"] for r in first.log] == [r["loss"] for r in second.log]


def test_only_plain_clients_are_taped():
    "Whoever changes a client's part, on the class or on the object, is trained as ever."
    plain = [name for name in METHODS if METHODS.make(name)._same_step()]
    assert {"eefl", "darkdistill", "calibrated_eefl"} <= set(plain)
    assert not {"depthfl", "inclusivefl", "reefl"} & set(plain)
    own = EEFL()
    own.local_loss = lambda *args: None
    assert not own._same_step() and EEFL()._same_step()


def test_a_name_that_a_program_cannot_hold_is_refused():
    for name in ("a.b", "v1", "c3", "aten_mm", "1x"):
        with pytest.raises(ValueError, match="a name of Python"):
            Tape({name: torch.ones(1)})


class Skips(nn.Module):
    "Its second layer takes part every other time, which Python decides."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(64, 64), nn.Linear(64, 4), 0

    def forward(self, x, how="full"):
        self.calls += 1
        h = x.flatten(1)
        return [self.b(self.a(h) if self.calls % 5 == 0 else h)]


def test_a_module_of_your_own_is_never_taped():
    torch.manual_seed(0)
    net, taped = Skips(), Taped()
    loss = lambda raw, y: F.cross_entropy(raw[0], y)
    assert equal(trained(net, fit, loss), trained(net, taped, loss))
    assert {s.why for s in taped.steps.values()} == {"a module of your own may do something else each time"}
    own = nn.Linear(64, 4)
    own.forward = lambda x: x.flatten(1)[:, :4]
    assert Step(own).why and not Step(nn.Linear(64, 4)).why


def test_any_name_of_a_layer_will_do():
    "Names that Python forbids, that a tape gives itself, and two that look the same."
    odd = nn.ModuleDict({"lambda": nn.Linear(64, 64, bias=False), "a_b": nn.Module(), "a": nn.Module()})
    odd["a_b"].register_parameter("c", nn.Parameter(torch.ones(64)))
    odd["a"].register_parameter("b_c", nn.Parameter(2 * torch.ones(64)))
    net = nn.Sequential(odd, nn.Linear(64, 4))
    net.v1, net.x = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    torch.manual_seed(0)

    def forward(net, x):
        h = net[0]["lambda"](x.flatten(1)) * net[0]["a_b"].c + net[0]["a"].b_c
        return net[1](h * net.v1 + net.x)

    loss, found = lambda raw, y: F.cross_entropy(raw, y), []
    for how in fit, Taped():
        own = copy.deepcopy(net)
        words = dict(loss=loss, forward=lambda x: forward(own, x))
        how(own, images(48), 4, 0.01, 0.9, 1e-4, 8, generator=torch.Generator().manual_seed(3), **words)
        found.append(own.state_dict())
    assert all(s.ready for s in how.steps.values())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_modes_that_change_between_visits_make_new_tapes():
    "Statistics of a part that does not learn stand still once it is put into evaluation mode."
    loss, found = lambda raw, y: F.cross_entropy(raw, y), []
    for how in fit, Taped():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4))
        net[1].requires_grad_(False)
        words = dict(loss=loss, forward=lambda x: net(x))
        how(net, images(48), 3, 0.05, 0.9, 1e-4, 8, generator=torch.Generator().manual_seed(3), **words)
        net[1].eval()
        how(net, images(48), 3, 0.05, 0.9, 1e-4, 8, generator=torch.Generator().manual_seed(4), **words)
        found.append(net.state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_a_copy_of_a_method_that_has_trained_is_whole():
    "What a copied method trains is what it returns."
    data = images(48)
    clients = make_clients(data.y, 3, 5.0, (0.5, 0.5))
    method = EEFL(participation=1.0)
    run = simulate(method, NETS["cnn"], data, data, clients, 2)
    used = EEFL(participation=1.0)
    state = used.setup(made("cnn"))
    weights = used.send(state, clients[0])
    streams = Streams(0)
    first = used.local_update(dict(weights), data, clients[0], 0, streams)
    again = copy.deepcopy(used).local_update(dict(weights), data, clients[0], 0, streams)
    assert all(torch.equal(v, again.weights[k]) for k, v in first.weights.items())
    assert any(not torch.equal(v, again.weights[k]) for k, v in weights.items()) and run.log


def test_weights_that_move_to_other_memory_are_taped_anew():
    taped, net = Taped(), made("cnn")
    loss = lambda raw, y: F.cross_entropy(raw[-1], y)
    other, draw = copy.deepcopy(net), [torch.Generator().manual_seed(7) for _ in range(2)]
    for n, train, g in ((net, fit, draw[0]), (other, taped, draw[1])):
        for _ in range(3):
            train(n, images(), 4, 0.05, 0.9, 1e-4, 8, loss=loss, forward=lambda x: n(x, "none"), generator=g)
            for p in n.parameters():
                p.data = p.data.clone()
    assert equal((0, net.state_dict()), (0, other.state_dict()))
    assert any(s.ready for s in taped.steps.values())


def test_what_is_done_once_is_what_no_step_changes():
    w, x = torch.arange(6.0).view(2, 3), torch.ones(4, 3)
    with Tape(dict(w=w, x=x)) as tape:
        ones, changed = torch.ones_like(x), torch.ones_like(x)
        changed.add_(x)
        out = (x * ones + changed) @ w.t().t().t()
    step = tape.program([out], ["x"])
    assert step.source.count("aten_t(") == 0 and step.source.count("ones_like") == 1
    w += 1
    for _ in range(2):
        assert torch.equal(step(x)[0], 3 * x @ w.T)
    assert torch.equal(step(2 * x)[0], 5 * x @ w.T)


def test_a_view_of_what_is_given_is_made_anew():
    x = torch.ones(2, 3)
    with Tape(dict(x=x)) as tape:
        out = x.t() * 2
    step = tape.program([out], ["x"])
    assert torch.equal(step(5 * x)[0], 10 * x.T)


def read_again(z):
    a = F.relu(z)
    return F.max_pool2d(a, 2) + a[..., :4, 4:]


def two_of_one(z):
    a = F.relu(z)
    return F.max_pool2d(a, 2) * F.max_pool2d(a, 2)


def changed(z):
    a, b = F.relu(z), z.detach().mul_(-3)
    return F.max_pool2d(a, 2) + b[..., :4, :4]


def changed_by_another_name(z):
    a = F.relu(z)
    z.detach().view(-1).mul_(-3)
    return F.max_pool2d(a, 2)


def changed_behind(z):
    a = F.relu(z)
    a.data.mul_(-3)
    return F.max_pool2d(a, 2)


def changed_afterwards(z):
    b = F.max_pool2d(F.relu(z), 2)
    b += 1
    return b


def with_places(z):
    best, places = F.max_pool2d(z, 2, return_indices=True)
    return best + places


FOUR = {  # what is done with images of eight by eight, and whether the faster way is taken
    "relu": (lambda z: F.max_pool2d(F.relu(z), 2), True),
    "alone": (lambda z: F.max_pool2d(z, 2), True),
    "twice": (lambda z: F.max_pool2d(F.max_pool2d(F.relu(z), 2), 2), True),
    "relu after": (lambda z: F.relu(F.max_pool2d(z, 2)), True),
    "relu elsewhere": (lambda z: F.max_pool2d(F.relu(z), 2) + F.relu(z)[..., :4, 4:], True),
    "relu read again": (read_again, True),
    "changed": (changed, True),
    "changed by another name": (changed_by_another_name, True),
    "changed behind": (changed_behind, True),
    "changed afterwards": (changed_afterwards, True),
    "in place": (lambda z: F.max_pool2d(F.relu(z + 0, inplace=True), 2), True),
    "leaky": (lambda z: F.max_pool2d(F.leaky_relu(z), 2), True),
    "two of one": (two_of_one, True),
    "one image": (lambda z: F.max_pool2d(z[0], 2), True),
    "odd": (lambda z: F.max_pool2d(z[..., 1:, 1:], 2), False),
    "overlapping": (lambda z: F.max_pool2d(z, 2, 1), False),
    "three": (lambda z: F.max_pool2d(z, 3), False),
    "at the edge": (lambda z: F.max_pool2d(z, 2, padding=1), False),
    "turned": (lambda z: F.max_pool2d(z.transpose(2, 3), 2), False),
    "with places": (with_places, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FOUR)
def test_maxima_of_four_are_those_of_pytorch(name, dtype):
    "With many ties, whose gradient goes to the first."
    f, faster = FOUR[name]
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(-3, 4, (5, 1, 8, 8), generator=g).to(dtype)
    x, own = draw(), draw()[0].clone().requires_grad_()  # one number for each place of an image

    def done(x):
        value = ((f(torch.cat([x + own, x * own], 1)) + 1) ** 2).sum()
        return value, *torch.autograd.grad(value, [own])

    with Tape(dict(own=own, x=x)) as tape:
        out = done(x)
    play = tape.program(out, ["x"])
    assert ("four_max" in play.source) == ("four_back" in play.source) == faster
    for x in (x, draw(), draw().abs(), -draw().abs(), torch.zeros_like(x)):
        assert all(map(torch.equal, play(x), done(x)))


def test_nan_passes_through_the_maxima():
    x = torch.zeros(1, 1, 2, 4)
    x[..., 1, 1] = float("nan")
    assert _four_max(x)[0].isnan().tolist() == [[[[True, False]]]]


def test_what_is_asked_for_is_what_pytorch_gives():
    "Places of maxima, and the gradient in front of a ReLU's."
    x = torch.randn(2, 1, 4, 4)
    own = torch.randn(4, 4, requires_grad=True)
    for results in ("places", "between"):
        with Tape(dict(own=own, x=x)) as tape:
            a = F.relu(x + own)
            best, places = F.max_pool2d(a, 2, return_indices=True)
            g = torch.autograd.grad((best**2).sum(), [own, a] if results == "between" else [own])
        want = [*g, *([places] if results == "places" else [])]
        assert all(map(torch.equal, want, tape.program(want, ["x"])(x)))


def test_maxima_of_four_side_by_side():
    "In LeNet, with clients of different numbers of images."
    net, taped = _as_exits(Workload("lenet")), Taped()
    g = torch.Generator().manual_seed(0)
    every = ArrayData(torch.randn(20, 3, 32, 32, generator=g), torch.arange(20) % 10, range(10))
    loss, take = lambda raw, y: F.cross_entropy(raw[0], y), lambda x: net(x, "full")
    data = [every.subset(range(n)) for n in (16, 11, 8)]
    how = 2, 0.05, 0.9, 1e-4, 8
    start, draw = copy.deepcopy(net.state_dict()), lambda i: torch.Generator().manual_seed(i)
    for _ in range(4):  # until all steps are on tape
        for d in data[:2]:
            taped(net, d, *how, loss=loss, forward=take, generator=draw(0))
    alone = []
    for i, d in enumerate(data):
        net.load_state_dict(start)
        value = fit(net, d, *how, loss=loss, forward=take, generator=draw(i))
        alone.append((value, copy.deepcopy(net.state_dict())))
    found = taped.abreast(net, [start] * 3, data, *how, [draw(i) for i in range(3)])
    assert all("four_max" in s.play.source for s in taped.steps.values())
    assert all(map(equal, alone, zip(*found)))

"Clients that train side by side get the bits that they get alone."

import copy, warnings
import pytest, torch
from torch import nn
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.parallel import WorkerLost
from darkdistill_nb.core.registry import METHODS
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import BoostNet, Joint
from darkdistill_nb.federated.availability import Availability
from darkdistill_nb.federated import method as federated
from darkdistill_nb.federated.engine import Here, play_round, simulate
from darkdistill_nb.federated.method import EEFL, Client, steady
from darkdistill_nb.federated.tape import MOST, Abreast, Given, Step, Taped
from small import NETS, SHAPE, images

pytestmark = pytest.mark.usefixtures("one_thread")


def federation(data):
    "Six clients of two tiers, with 8 to 43 images."
    at, out = 0, []
    for i, n in enumerate((43, 20, 8, 36, 24, 19)):
        out.append(Client(i, 1 + i % 2, torch.arange(at, at + n), torch.arange(0)))
        at += n
    return out


@pytest.fixture
def calls(monkeypatch):
    "Numbers of clients that trained side by side, call by call."
    seen, real = [], Taped.abreast

    def noted(self, net, sent, *args):
        seen.append(len(sent))
        return real(self, net, sent, *args)

    monkeypatch.setattr(Taped, "abreast", noted)
    return seen


def alone(monkeypatch):
    monkeypatch.setattr(Taped, "width", lambda *args: 1)


def run(method, build=NETS["cnn"], data=None, rounds=7, **kw):
    data = data or images(150)
    return simulate(method, build, data, data.subset(range(40)), federation(data), rounds, progress=False, **kw)


def same(a, b):
    assert a.state["net"].keys() == b.state["net"].keys()
    assert all(torch.equal(v, b.state["net"][k]) for k, v in a.state["net"].items())
    assert [r["loss"] for r in a.log] == [r["loss"] for r in b.log]
    assert [r["left_out"] for r in a.log] == [r["left_out"] for r in b.log]
    assert [r["bytes_up"] for r in a.log] == [r["bytes_up"] for r in b.log]


SETTINGS = dict(participation=1.0, batch_size=8, lr=0.02)
HOW = [
    dict(objective=Joint(), momentum=0.0, weight_decay=0.0),
    dict(objective=BoostNet(), momentum=0.9, weight_decay=1e-3, epochs=2),
]


@pytest.mark.parametrize("how", HOW, ids=["plain", "momentum"])
@pytest.mark.parametrize("name", NETS)
def test_weights_and_losses_are_those_of_training_alone(name, how, calls, monkeypatch):
    method = lambda: EEFL(**SETTINGS, **how)
    beside = run(method(), NETS[name])
    assert 3 in calls
    alone(monkeypatch)
    same(beside, run(method(), NETS[name]))


@pytest.mark.parametrize("name", ["feedback_eefl", "eefl"])
def test_a_few_at_a_time(name, calls, monkeypatch):
    "Where not all fit side by side."
    made = lambda: METHODS.make(name, **SETTINGS)
    monkeypatch.setattr(Taped, "width", lambda *args: 2)
    beside = run(made())
    assert set(calls) == {2}
    alone(monkeypatch)
    same(beside, run(made()))


class Keeps(EEFL):
    "Keeps what clients sent."
    needs_weights = True
    kept = ()

    def aggregate(self, state, updates, rnd, streams):
        self.kept = [(u.client, u.weights) for u in updates]
        return super().aggregate(state, updates, rnd, streams)


def test_weights_that_are_kept_stay_what_they_are(calls, monkeypatch):
    found = []
    for narrow in (False, True):
        if narrow:
            alone(monkeypatch)
        method = Keeps(**SETTINGS)
        run(method)
        found.append(method.kept)
    assert calls
    for (a, first), (b, second) in zip(*found, strict=True):
        assert a == b and all(torch.equal(v, second[k]) for k, v in first.items())
    heads = [w["stem.weight"] for _, w in found[0]]
    assert not any(torch.equal(heads[0], h) for h in heads[1:])


def test_an_engine_lends_nothing_unless_told(calls):
    data = images(150)
    clients, method = federation(data)[::2], EEFL(Joint(), **SETTINGS)
    state = method.setup(NETS["cnn"]())
    sent, here = [method.send(state, c) for c in clients], Here(method, data, Streams(0))
    answers = lambda here: [u.weights for _, u in here.answers(sent, clients, 0)]
    for _ in range(5):
        first = answers(here)
    before = copy.deepcopy(first)
    second = answers(here)
    assert calls and all(torch.equal(v, b[k]) for a, b in zip(first, before) for k, v in a.items())
    lent = answers(Here(method, data, Streams(0), lend=True))
    assert all(torch.equal(v, b[k]) for a, b in zip(second, lent) for k, v in a.items())
    again = answers(Here(method, data, Streams(0), lend=True))
    assert lent[0]["stem.weight"].data_ptr() == again[0]["stem.weight"].data_ptr()


def test_a_client_whose_loss_is_no_number_is_left_out_alone(calls, monkeypatch):
    data, logs = images(150), []
    data.x[50] = float("inf")  # an image of the second client
    for narrow in (False, True):
        if narrow:
            alone(monkeypatch)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            logs.append((run(EEFL(Joint(), **SETTINGS), data=data), [str(w.message) for w in said]))
    (a, first), (b, second) = logs
    same(a, b)
    assert first == second and all(list(r["left_out"]) == ["1"] for r in a.log) and calls


def test_whoever_raises_is_found_when_asked_alone(calls, monkeypatch):
    "A label that does not exist stops the operation for all; then each is asked alone."
    method, data = EEFL(Joint(), **SETTINGS), images(150)
    clients, state = federation(data), method.setup(NETS["cnn"]())
    for rnd in range(6):
        state, row = play_round(method, state, data, clients, rnd, Streams(0))
        assert not row["left_out"]
    assert calls
    data.y[45] = 9
    with pytest.warns(UserWarning, match="client 1 is left out, it raised"):
        state, row = play_round(method, state, data, clients, 6, Streams(0))
    assert list(row["left_out"]) == ["1"] and len(row["clients"]) == 6


def test_frozen_parts_and_shared_tensors_stay_so(calls, monkeypatch):
    def build():
        net = cnn(SHAPE, 4, stages=2, width=4)
        net.stem.requires_grad_(False)
        net.exits[1].fc = net.exits[0].fc
        return net

    beside = run(EEFL(Joint(), **SETTINGS), build)
    assert calls
    alone(monkeypatch)
    same(beside, run(EEFL(Joint(), **SETTINGS), build))


def test_clients_that_come_and_go(calls, monkeypatch):
    who = lambda: Availability(dropout=0.3)
    beside = run(EEFL(Joint(), **SETTINGS), availability=who(), rounds=9)
    assert calls
    alone(monkeypatch)
    same(beside, run(EEFL(Joint(), **SETTINGS), availability=who(), rounds=9))


class Own(EEFL):
    "Trains in a way of its own."

    def local_update(self, *args):
        return super().local_update(*args)


class Loss(EEFL):
    def local_loss(self, net, weights, data, rnd):
        return lambda raw, y: sum(nn.functional.cross_entropy(f, y) for f in raw)


@pytest.mark.parametrize("kind", [Own, Loss])
def test_a_method_with_a_part_of_its_own_is_asked_client_by_client(kind, calls):
    run(kind(**SETTINGS))
    assert not calls


def test_two_precisions_and_stacks_are_left_alone(calls):
    run(EEFL(Joint(), **SETTINGS), precision="bf16", rounds=5)
    run(EEFL(Joint(), **SETTINGS), stack=True, rounds=5)
    assert not calls


def test_freezing_between_two_rounds_is_seen(calls):
    method, data = EEFL(Joint(), **SETTINGS), images(150)
    clients, state = federation(data), method.setup(NETS["cnn"]())
    for rnd in range(6):
        state, _ = play_round(method, state, data, clients, rnd, Streams(0))
    assert calls
    for tier in (1, 2):
        method.tier_net(tier).stem.requires_grad_(False)
    before = state["net"]["stem.weight"].clone()
    method._frozen |= {k for k in state["net"] if k.startswith("stem.")}
    state, row = play_round(method, state, data, clients, 6, Streams(0))
    assert torch.equal(before, state["net"]["stem.weight"]) and not row["left_out"]


def test_how_many_fit():
    taped, net = Taped(), nn.Linear(1024, 256)  # a megabyte
    assert taped.width(net) == 3 and taped.width(nn.Linear(2, 2)) == 12
    assert taped.width(nn.Linear(4096, 1024)) == 1


def test_what_is_no_network_or_no_number_is_refused():
    with pytest.raises(ValueError, match="net='net' must be a network"):
        Abreast("net", 2)
    with pytest.raises(ValueError, match="width=0"):
        Abreast(nn.Linear(2, 2), 0)
    assert len(Abreast(nn.Linear(2, 2), 3)) == 3 and Step(nn.Linear(2, 2)).several is None


def test_two_processes_get_a_few_clients_at_a_time():
    "Weights, losses and log are those of one process."
    method = lambda: EEFL(**SETTINGS, momentum=0.9, weight_decay=1e-3)
    same(run(method()), run(method(), workers=2))


class Loses:
    "Stands for `Workers` whose processes die of client 3."
    procs = 1, 2

    def __init__(self, method, data, clients):
        self.method, self.data, self.clients, self.asked = method, data, clients, []

    def run(self, jobs, again, here):
        assert here is None  # all of it is for the workers
        for k, (weights, ids, rnd) in list(enumerate(jobs))[::-1]:
            self.asked.append((ids, rnd, again))
            mine = [self.clients[i] for i in ids]
            here = Here(self.method, self.data, Streams(0))
            gone = WorkerLost(k, 7, -9, True)
            found = dict(here.answers([weights] * len(ids), mine, rnd))
            yield k, gone if 3 in ids else [found[i] for i in range(len(ids))]


def test_whoever_kills_a_process_is_found_among_those_who_went_with_it():
    data = images(200)
    clients = [Client(i, 1, torch.arange(20) + 20 * i, torch.arange(0)) for i in range(10)]
    method = EEFL(Joint(), **SETTINGS)
    state, pool = method.setup(NETS["cnn"]()), Loses(method, data, clients)
    sent = [method.send(state, c) for c in clients]
    found = dict(Here(method, data, Streams(0), pool).answers(sent, clients, 4))
    assert {i for i, a in found.items() if isinstance(a, WorkerLost)} == {3} and len(found) == 10
    alone = dict(Here(method, data, Streams(0)).answers(sent, clients, 4))
    for i in set(found) - {3}:
        assert all(torch.equal(v, alone[i].weights[k]) for k, v in found[i].weights.items())
    sizes = [len(ids) for ids, _, _ in pool.asked]
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2, 2] and {a for _, _, a in pool.asked} == {1}


def test_a_method_of_its_own_is_sent_client_by_client():
    data = images(200)
    clients = [Client(i, 1, torch.arange(20) + 20 * i, torch.arange(0)) for i in range(4)]
    method = Own(Joint(), **SETTINGS)
    state, pool = method.setup(NETS["cnn"]()), Loses(method, data, clients)
    list(Here(method, data, Streams(0), pool).answers([method.send(state, c) for c in clients], clients, 0))
    assert [len(ids) for ids, _, _ in pool.asked] == [1] * 4


def test_the_first_fault_of_the_first_round_is_that_of_the_first_client():
    "Also where tiers alternate."
    data = images(150)
    data.x[50], data.x[70] = float("inf"), float("inf")  # clients 1 and 2
    with pytest.raises(FloatingPointError, match="round 1: client 1,"):
        run(EEFL(Joint(), **SETTINGS), data=data, faults="raise")


class Noisy(ArrayData):
    "Images that are others each time."

    def batches(self, *args):
        for x, y in super().batches(*args):
            yield x + 0.1 * torch.randn(x.shape), y


class Twice(ArrayData):
    "Each batch comes twice in training, where an order is drawn."

    def batches(self, batch_size, generator=None, *more):
        for batch in super().batches(batch_size, generator, *more):
            yield from [batch] * (1 if generator is None else 2)


@pytest.mark.parametrize("kind", [Noisy, Twice])
def test_images_of_a_readers_own_kind_are_trained_on_alone(kind, calls):
    "Their random numbers come from the client's stream, whatever was drawn outside."
    x = images(150)
    data, found = kind(x.x, x.y, range(4)), []
    for seed in 1, 2:
        torch.manual_seed(seed)
        found.append(run(EEFL(Joint(), **SETTINGS), data=data))
    same(*found)
    assert not calls


class Keeper(EEFL):
    "A check that keeps what it sees."
    seen = ()

    def check_update(self, update, sent, client):
        self.seen = [*self.seen, (client.id, update.weights["stem.weight"])]
        return super().check_update(update, sent, client)


def test_a_check_of_its_own_is_lent_nothing(calls):
    method = Keeper(Joint(), **SETTINGS)
    run(method)
    heads = [w for cid, w in method.seen if cid == 0]
    assert calls and len({w.data_ptr() for w in heads}) == len(heads) == 7


def test_abreast_refuses_what_it_cannot_do():
    net, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), images(8)
    taped, how = Taped(), (1, 0.02, 0.0, 0.0, 8)
    ask = lambda n, how=how: taped.abreast(net, [net.state_dict()] * n, [data] * n, *how, [None] * n)
    with pytest.raises(ValueError, match="images whose batches are all on tape"):
        ask(2)
    for _ in range(5):
        taped(net, data, *how, loss=nn.functional.cross_entropy, forward=net)
    assert len(ask(2)[0]) == 2
    with pytest.raises(ValueError, match="at most 12 clients"):
        ask(13)
    with pytest.raises(ValueError, match="epochs=0"):
        ask(2, (0, *how[1:]))
    net[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="on tape"):
        ask(2)


def test_a_client_of_no_tier_is_left_out_as_ever():
    method, data = EEFL(Joint(), **SETTINGS), images(150)
    clients, state = federation(data), method.setup(NETS["cnn"]())
    clients[1].tier = 7
    with pytest.warns(UserWarning, match="client 1 is left out, it raised ValueError"):
        _, row = play_round(method, state, data, clients, 0, Streams(0))
    assert list(row["left_out"]) == ["1"]


def test_a_weight_called_zip_is_no_trouble(calls):
    "The program for several clients uses a function of that name."
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    net.zip = nn.Parameter(torch.ones(4))
    taped, data, how = Taped(), images(8), (1, 0.02, 0.0, 0.0, 8)
    forward = lambda x: net[1](net[0](x)) * net.zip
    for _ in range(5):
        taped(net, data, *how, loss=nn.functional.cross_entropy, forward=forward)
    start = copy.deepcopy(net.state_dict())
    losses, states = taped.abreast(net, [start] * 2, [data] * 2, *how, [None] * 2)
    alone = taped(net, data, *how, loss=nn.functional.cross_entropy, forward=forward)
    assert losses == [alone] * 2 and torch.equal(states[1]["zip"], net.zip)


METHODS_ON_TAPE = ["calibrated_eefl", "calibrated_mean", "darkdistill", "darkdistill_pl"]


@pytest.mark.parametrize("name", METHODS_ON_TAPE)
def test_clients_that_report_and_have_losses_of_their_own_train_beside_each_other(name, calls, monkeypatch):
    "The bits of `fit`: weights, what the server remembers, what was reported."
    beside = run(METHODS.make(name, **SETTINGS), rounds=7)
    assert calls and max(calls) == 3
    monkeypatch.setattr(federated, "Taped", lambda: None)
    alone_ = run(METHODS.make(name, **SETTINGS), rounds=7)
    same(beside, alone_)
    for part in ("server", "objective"):
        mine, theirs = beside.state[part], alone_.state[part]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())


class Ramp(EEFL):
    "A number in its loss changes from round to round."

    @steady
    def local_loss(self, net, weights, data, rnd):
        k = 1.0 + rnd
        return lambda raw, y: k * self.objective.loss(raw, y)[0]


class Tilted(EEFL):
    "A tensor in its loss belongs to the client: so many images of each class."

    @steady
    def local_loss(self, net, weights, data, rnd):
        tilt = torch.bincount(data.y, minlength=net.n_classes).float().log1p()
        return lambda raw, y: self.objective.loss([f + tilt for f in raw], y)[0]


class Mixed(EEFL):
    "The loss is a kind of its own for every other client."

    @steady
    def local_loss(self, net, weights, data, rnd):
        factor = 1.0 + len(data) % 2
        return lambda raw, y: factor * self.objective.loss(raw, y)[0]


class Remembers(EEFL):
    "A loss that counts cannot be taken apart; marked or not, it trains as ever."

    @steady
    def local_loss(self, net, weights, data, rnd):
        calls = 0

        def loss(raw, y):
            nonlocal calls
            calls += 1
            return calls * self.objective.loss(raw, y)[0]

        return loss


@pytest.mark.parametrize("kind", [Ramp, Tilted, Mixed, Remembers])
def test_a_marked_loss_gives_the_bits_of_fit(kind, monkeypatch):
    taped = run(kind(Joint(), **SETTINGS), rounds=11)
    monkeypatch.setattr(federated, "Taped", lambda: None)
    same(taped, run(kind(Joint(), **SETTINGS), rounds=11))


def test_only_the_first_kinds_of_a_loss_get_a_tape():
    method = Ramp(Joint(), **SETTINGS)
    run(method, rounds=MOST + 3)
    kinds = {key[2] for key in method._taped.steps}
    assert len(kinds) == MOST


def test_tilted_clients_train_beside_each_other(calls):
    run(Tilted(Joint(), **SETTINGS))
    assert calls


def test_a_mark_counts_only_if_what_it_calls_is_marked_too():
    class Plain(EEFL):
        def local_loss(self, *given):
            return EEFL.local_loss(self, *given)

    class Marked(Plain):
        @steady
        def local_loss(self, *given):
            return Plain.local_loss(self, *given)

    assert Tilted()._same_step() and not Marked()._same_step()
    own = Tilted()
    own.local_loss = steady(lambda *given: None)  # on the object: nobody knows what it replaces
    assert not own._same_step()


class Scribbles(EEFL):
    "Its report spoils what the client was sent; not marked, so it gets copies."

    def report(self, weights, data, client, rnd, streams):
        for v in weights.values():
            v.zero_()
        return dict(size=torch.tensor(len(data)))


def test_a_report_may_write_into_what_it_is_given(calls):
    spoiled, plain = Scribbles(Joint(), **SETTINGS), EEFL(Joint(), **SETTINGS)
    for m in (spoiled, plain):
        state, s = m.setup(NETS["cnn"]()), Streams(0)
        data = images(150)
        before = {k: v.clone() for k, v in state["net"].items()}
        for rnd in range(7):
            play_round(m, state, data, federation(data), rnd, s)
        assert all(torch.equal(v, before[k]) for k, v in state["net"].items())
    assert calls


def test_a_report_that_fails_is_the_clients_own_fault(calls):
    class Fails(EEFL):
        def report(self, weights, data, client, rnd, streams):
            if client.id == 2 and rnd > 5:
                raise ValueError("no report today")
            return {}

    with pytest.warns(UserWarning, match="no report today"):
        log = run(Fails(Joint(), **SETTINGS)).log
    assert [len(r["left_out"]) for r in log] == [0] * 6 + [1]
    assert calls


def test_a_loss_is_taken_apart():
    a = torch.tensor([1.0, 2.0])
    loss = Given(lambda raw, y: (raw + a).sum())
    assert loss.tensors == [a] and float(loss.of([2 * a])(a, None)) == 9 == float(loss(2 * a, None))
    for odd in (3, lambda raw, y: layer(raw)):
        with pytest.raises(ValueError, match="loss"):
            Given(odd)


layer = nn.Linear(2, 2)


def test_clients_of_two_kinds_are_not_beside_each_other():
    net, data = nn.Linear(3, 2), ArrayData(torch.randn(16, 1, 1, 3), torch.arange(16) % 2)
    net = nn.Sequential(nn.Flatten(), net)
    of = lambda k: Given(lambda raw, y: k * nn.functional.cross_entropy(raw, y))
    taped, how = Taped(), (1, 0.05, 0.9, 0.0, 8)
    for _ in range(4):
        taped(net, data, *how, loss=of(1.0), forward=net)
    ask = lambda losses: taped.abreast(net, [net.state_dict()] * 2, [data] * 2, *how, [None] * 2, losses)
    ask([of(1.0), of(1.0)])
    for odd in ([of(1.0), of(2.0)], [of(2.0)] * 2, None):
        with pytest.raises(ValueError, match="of the kind that is on tape"):
            ask(odd)

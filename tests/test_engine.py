"What crosses notebooks 04-10: every family of networks goes through every method, and the engine's answer does not depend on how it computes."

import copy, json, os
import pytest, torch
from helpers import same
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.scenes import shapes
from darkdistill_nb.federated.difficulty import measure_difficulty
from darkdistill_nb.exits.networks import cnn, vit, wrn
from darkdistill_nb.exits.training import BoostNet, Joint, L2W
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, block_average, make_clients
from darkdistill_nb.core.seeds import Streams

BUILDERS = {
    "cnn": lambda: cnn((3, 32, 32), 10, width=8),
    "wrn": lambda: wrn(10, 1, exits=(1, 2, 3)),
    "vit": lambda: vit(
        "vit_tiny_patch16_224",
        exits=(1, 2, 3),
        n_classes=10,
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
    ),
}


@pytest.fixture(scope="module")
def pictures():
    return shapes(400, seed=5), shapes(100, seed=6)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("method", [EEFL, DarkDistill])
def test_every_network_with_every_method(family, method, pictures):
    "Two rounds run, every block moves, weights stay finite, and all repeats bit for bit."
    train, test = pictures
    tiers = (1 / 3,) * 3 if family != "cnn" else (0.25,) * 4
    clients = make_clients(train.y, 8, 1.0, tiers)
    go = lambda: simulate(
        method(participation=1.0), BUILDERS[family], train, test, clients, 2, eval_every=2
    )
    run, start = go(), None
    with Streams(0).scope("init"):
        start = BUILDERS[family]().state_dict()
    for k, v in run.state["net"].items():
        assert torch.isfinite(v.double()).all(), k
        if v.is_floating_point() and v.numel() > 8 and "stem.patch_embed" not in k:
            assert not torch.equal(v, start[k]), f"{k} never moved"
    assert same(run.state["net"], go().state["net"])
    assert len(run.log[-1]["accuracy"]) == len(tiers)


def test_darkdistill_moves_only_stages_in_a_vit(pictures):
    "Check 21 on a transformer: token embeddings and heads are untouched by the server."
    train, test = pictures
    clients = make_clients(train.y, 6, 1.0, (1 / 3,) * 3)
    s = Streams(0)
    m = DarkDistill(participation=1.0, kd_steps=2, server_epochs=1, server_batch=8)
    with s.scope("init"):
        state = m.setup(BUILDERS["vit"]())
    updates = [m.local_update(m.send(state, c), train.subset(c.train), c, 0, s) for c in clients]
    tiers = {t: (next(u.weights for u in updates if u.tier == t), 100) for t in (1, 2, 3)}
    after, server, info = m.server_step(state, tiers, updates, 0, s)
    moved = {
        t: {k for k in after[t][0] if not torch.equal(after[t][0][k], tiers[t][0][k])}
        for t in tiers
    }
    assert not moved[1] and moved[2] and moved[3]
    assert all(k.startswith("stages.") for t in moved for k in moved[t])
    assert info["kd_loss"] > 0 and any(k.startswith("gen1.") for k in server)


def test_workers_do_not_change_the_weights(digits):
    "Clients trained in two spawned processes give the same bits as in this one."
    train, test = digits
    clients = make_clients(train.y, 8, 0.5)
    go = lambda workers: simulate(
        DarkDistill(),
        lambda: cnn(train.shape, 10, width=8),
        train,
        test,
        clients,
        2,
        eval_every=2,
        workers=workers,
    )
    one, two = go(1), go(2)
    assert same(one.state["net"], two.state["net"])
    assert same(one.state["server"], two.state["server"])


def test_workers_train_a_timm_vit(digits):
    "Reading a timm network in a new process imports torchvision, which may need the repair of `compat` first."
    train, test = digits
    clients = make_clients(train.y, 4, 0.5)
    net = lambda: vit(
        "vit_tiny_patch16_224",
        exits=(1, 2, 3, 4),
        n_classes=10,
        img_size=8,
        patch_size=4,
        embed_dim=24,
        num_heads=2,
        depth=4,
        in_chans=1,
    )
    one, two = (
        simulate(EEFL(participation=1.0), net, train, test, clients, 1, workers=w) for w in (1, 2)
    )
    assert same(one.state["net"], two.state["net"])


def test_number_of_threads_does_not_change_the_weights(digits):
    train, test = digits
    clients = make_clients(train.y, 8, 0.5)

    def go(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return simulate(EEFL(), lambda: cnn(train.shape, 10), train, test, clients, 1)
        finally:
            torch.set_num_threads(before)

    assert same(go(1).state["net"], go(2).state["net"])


def test_one_tier_one_exit_is_fedavg_for_darkdistill_too(digits):
    "Check 1: without a server step DarkDistill is FedAvg on a network with a single exit."
    train, test = digits
    clients = make_clients(train.y, 4, 1.0, (1.0,))
    go = lambda m: simulate(
        m, lambda: cnn(train.shape, 10, stages=1, width=8), train, test, clients, 3, eval_every=3
    ).state["net"]
    assert same(
        go(EEFL(Joint(), participation=1.0)),
        go(DarkDistill(Joint(), participation=1.0, server_epochs=0)),
    )


@pytest.mark.parametrize("off", [dict(kd_lr=0.0), dict(server_epochs=0), dict(kd_steps=0)])
def test_darkdistill_switched_off_is_eefl(off, digits):
    train, test = digits
    clients = make_clients(train.y, 8, 0.5)
    go = lambda m: simulate(
        m, lambda: cnn(train.shape, 10, width=8), train, test, clients, 3, eval_every=3
    )
    a, b = go(EEFL()), go(DarkDistill(**off))
    assert same(a.state["net"], b.state["net"])
    assert [r["clients"] for r in a.log] == [r["clients"] for r in b.log]


def test_a_tier_may_be_absent(digits):
    "One client a round cannot cover four tiers: blocks nobody trained keep their value, and nothing fails."
    train, test = digits
    clients = make_clients(train.y, 8, 0.5)
    run = simulate(
        DarkDistill(participation=0.1),
        lambda: cnn(train.shape, 10, width=8),
        train,
        test,
        clients,
        3,
    )
    assert all(len(r["clients"]) == 1 for r in run.log)


def test_measuring_difficulty_leaves_batchnorm_alone(pictures):
    "Check 16 on a network with running statistics."
    net = BUILDERS["wrn"]().train()
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    d = measure_difficulty(net, BoostNet(), pictures[0])
    assert same(before, net.state_dict())
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training
    assert len(d) == 400 and float(d.min()) >= 0 and float(d.max()) <= 9.99 + 1e-5


def test_prefixes_of_one_network_average_to_it():
    "Check 3, on a network with integer buffers."
    net = BUILDERS["wrn"]()
    tiers = {m: (net.prefix(m).state_dict(), 10 * m) for m in (1, 2, 3)}
    assert same(block_average(net.state_dict(), tiers), net.state_dict())


def test_a_missing_name_counts_as_unchanged():
    "A tier that does not send a tensor votes for the server's value with its samples; what nobody sends stays the very tensor."
    net = BUILDERS["wrn"]()
    old = net.state_dict()
    key = "stem.weight"
    assert key in old
    after = block_average(old, {1: ({key: old[key] + 1}, 10), 2: ({}, 30)})
    assert torch.allclose(after[key], old[key] + 0.25)
    assert all(after[k] is v for k, v in old.items() if k != key)


@pytest.mark.parametrize("method", [EEFL, DarkDistill])
def test_frozen_parts_are_not_sent_but_their_statistics_are(method, pictures):
    "Frozen stages of a network with batch normalisation: parameters stay, running statistics travel, and DarkDistill has nothing to distil into."
    train, test = pictures

    def build():
        net = BUILDERS["wrn"]()
        net.stem.requires_grad_(False)
        net.stages.requires_grad_(False)
        return net

    clients = make_clients(train.y, 6, 1.0, (1 / 3,) * 3)
    run = simulate(method(participation=1.0), build, train, test, clients, 1)
    with Streams(0).scope("init"):
        start = build()
    fixed = {k for k, p in start.named_parameters() if not p.requires_grad}
    for k, v in start.state_dict().items():
        assert torch.equal(v, run.state["net"][k]) == (k in fixed), k
    own = [start.prefix(c.tier) for c in clients]
    sent = [v for n in own for v in [*(p for p in n.parameters() if p.requires_grad), *n.buffers()]]
    assert run.log[0]["bytes_up"] - (6 * 10 * 10 * 4 if method is DarkDistill else 0) == sum(
        v.numel() * v.element_size() for v in sent
    )


def test_l2w_travels_with_the_network(digits, tmp_path):
    "Its weight net is sent, trained, averaged exit by exit and kept in checkpoints; workers, resuming and a switched-off DarkDistill change nothing."
    train, test = digits
    train = train.subset(torch.arange(160))
    clients, s = make_clients(train.y, 4, 0.5, cover=False), Streams(0)
    new = lambda m=EEFL, **kw: m(L2W(hidden=16, interval=2), participation=1.0, **kw)
    go = lambda rounds, m=None, **kw: simulate(
        m or new(),
        lambda: cnn(train.shape, 10, width=8),
        train,
        test,
        clients,
        rounds,
        eval_every=9,
        **kw,
    )
    run = go(3)
    first = L2W(hidden=16).start(4)
    assert run.state["objective"].keys() == first.keys()
    assert all(not torch.equal(v, first[k]) for k, v in run.state["objective"].items())
    go(1, checkpoint=tmp_path / "c.safetensors")
    for other in (
        go(3, workers=2),
        go(3, checkpoint=tmp_path / "c.safetensors"),
        go(3, new(DarkDistill, kd_lr=0.0)),
    ):
        assert all(same(run.state[k], other.state[k]) for k in ("net", "objective"))
    with s.scope("init"):
        m, net = new(), cnn(train.shape, 10, width=8)
    state = m.setup(net)
    updates = [m.local_update(m.send(state, c), train.subset(c.train), c, 0, s) for c in clients]
    after = m.aggregate(state, updates, 0, s)[0]["objective"]
    for e in range(4):
        own = [u for u in updates if u.tier > e]
        assert len(own) == 4 - e
        mean = sum(u.weights[f"objective.exits.{e}.outer"] * u.samples for u in own) / sum(
            u.samples for u in own
        )
        assert torch.allclose(after[f"exits.{e}.outer"], mean, atol=1e-6)


def test_l2w_without_differences_is_joint_training(digits):
    "With eps = 0 all weights are 1, although the meta steps run."
    train, test = digits
    train = train.subset(torch.arange(300))
    clients = make_clients(train.y, 4, 0.5, cover=False)
    a, b = (
        simulate(
            EEFL(p, participation=1.0),
            lambda: cnn(train.shape, 10, width=8),
            train,
            test,
            clients,
            2,
        ).state["net"]
        for p in (Joint(), L2W(eps=0.0))
    )
    assert all(torch.allclose(v, b[k], atol=1e-5) for k, v in a.items())


@pytest.fixture
def machine_file(tmp_path, monkeypatch):
    "What is remembered about this machine goes into a folder of its own."
    monkeypatch.setenv("DARKDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr("darkdistill_nb.federated.engine.cores", lambda: 2)
    return tmp_path / "machine.json"


def small(digits, rounds=4, **kw):
    train, test = digits
    clients = make_clients(train.y, 4, 10.0)
    build = lambda: cnn(train.shape, 10, width=8)
    return simulate(EEFL(participation=1.0), build, train, test, clients, rounds, **kw)


def test_auto_stays_in_one_process_for_little_work(digits, machine_file, capsys, monkeypatch):
    from darkdistill_nb.federated import engine

    real, asked = engine._seconds_of_a_visit, []
    probe = lambda *args: asked.append(real(*args)) or 1e-3  # a busy machine may be slow today
    monkeypatch.setattr(engine, "_seconds_of_a_visit", probe)
    run = small(digits, workers="auto", progress=True)
    assert run.way.startswith("workers=auto: one process") and run.way in capsys.readouterr().err
    assert same(run.state["net"], small(digits).state["net"])
    assert "visit" in machine_file.read_text() and len(asked) == 1 and asked[0] > 0
    small(digits, rounds=1, workers="auto")
    assert len(asked) == 1  # another number of rounds is the same kind of work


def test_auto_takes_processes_where_they_pay_and_leaves_them_where_not(digits, machine_file):
    "The machine's memory is made up: a visit of an hour, then a start that takes a year."
    from darkdistill_nb.core.parallel import Memory
    from darkdistill_nb.federated.engine import _Choice

    memory = Memory()
    small(digits, rounds=1, workers="auto")
    (kind,) = [k for d in json.loads(machine_file.read_text()).values() for k in d if "eefl" in k]
    memory.write(kind, visit=3600.0)
    two = small(digits, workers="auto")
    assert two.way.startswith("workers=auto: 2 processes")
    assert same(two.state["net"], small(digits).state["net"])
    measured = memory.read(kind)["gain"], memory.read("start")["seconds"]
    assert measured[0] > 1 and measured[1] > 0
    memory.write("start", seconds=3e7)
    assert small(digits, workers="auto").way.startswith("workers=auto: one process")
    choice = _Choice.__new__(_Choice)
    choice.gains, choice.said, choice.memory, choice.kind = [], dict(visit=1.0), memory, "slow"
    assert [choice.still(4, 8.0) for _ in range(3)] == [True, True, False]
    assert memory.read("slow") == dict(gain=0.5)


def test_auto_goes_on_alone_where_processes_cannot_begin(digits, machine_file, monkeypatch):
    "Like a notebook's own method, which no other process can import."

    class Own(EEFL):
        name = "own"

    train, test = digits
    clients = make_clients(train.y, 4, 10.0)
    monkeypatch.setattr("darkdistill_nb.federated.engine.processes_for", lambda *a: 2)
    with pytest.warns(
        UserWarning, match="workers='auto' goes on in one process: workers must be 1"
    ):
        run = simulate(
            Own(participation=1.0),
            lambda: cnn(train.shape, 10, width=8),
            train,
            test,
            clients,
            1,
            workers="auto",
        )
    assert run.way.startswith("workers=auto: one process")


@pytest.mark.parametrize("workers", ["all", 0, 1.5, "2"])
def test_workers_are_a_number_or_auto(workers, digits):
    with pytest.raises(ValueError, match="workers="):
        small(digits, workers=workers)


def test_tensors_cross_to_another_process_without_being_pickled():
    from darkdistill_nb.core.parallel import Room, _dumps

    g = torch.Generator().manual_seed(0)
    sent = dict(
        w=torch.randn(100, 30, generator=g),
        half=torch.randn(7, generator=g).bfloat16(),
        n=torch.tensor(3),
        turned=torch.randn(4, 5, generator=g).t(),
        empty=torch.zeros(0, 3),
        text="a",
    )
    room = Room(20_000)
    try:
        data, sizes = room.put(sent)
        assert len(data) < 2000 and sizes == [12_000, 14, 8]
        other = Room(name=room.name)
        seen, own = other.get(data, sizes, own=False), room.get(data, sizes, own=True)
        assert all(same({k: v}, {k: sent[k]}) for d in (seen, own) for k, v in list(d.items())[:5])
        room.put(dict(w=torch.zeros(100, 30)))
        assert torch.equal(own["w"], sent["w"]) and not seen["w"].any()
        del seen
        other.close()
        data, sizes = room.put(dict(w=torch.ones(100_000)))  # no room: all of it in the message
        assert sizes is None and room.get(data, sizes, own=True)["w"].sum() == 100_000
        assert len(_dumps(sent)) > 12_000
    finally:
        room.close()


def test_memory_does_not_grow_over_500_rounds(digits):
    "Resident memory of the last 300 rounds: no slope that would matter over thousands."
    train, test = digits
    train = train.subset(torch.arange(60))
    clients, seen = make_clients(train.y, 3, 10.0, (1.0,), cover=False), []

    def look(row):
        with open("/proc/self/statm") as f:
            seen.append(int(f.read().split()[1]) * 4096)

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("/proc")
    build = lambda: cnn(train.shape, 10, stages=1, width=4, pool=1)
    method = EEFL(participation=1.0, batch_size=32)
    simulate(method, build, train, test, clients, 500, eval_every=500, on_round=look)
    assert max(seen[200:]) - min(seen[200:]) < 3e6, (seen[200], seen[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [EEFL, DarkDistill])
def test_gpu(method, pictures):
    train, test = pictures
    clients = make_clients(train.y, 8, 1.0)
    run = simulate(
        method(participation=1.0), BUILDERS["cnn"], train, test, clients, 3, device="cuda"
    )
    assert next(iter(run.state["net"].values())).is_cuda and max(run.log[-1]["accuracy"]) > 0.1

"""Clients that lie or fail, federations that do not fit, checkpoints of other runs: what a federated run does when something is wrong."""

import contextlib, json, math, os, signal, subprocess, sys, textwrap, time, warnings
import numpy as np
import pytest, torch
from conftest import LONG, children, process_state, running
from helpers import made, same
from torch import nn
from darkdistill_nb.federated.darkdistill import DarkDistill, alignment_weights, pair_loss
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.datasets import load
from darkdistill_nb.federated.difficulty import DifficultyHistogram, bins_of, sample_difficulty
from darkdistill_nb.exits.networks import ConvStage, EarlyExitNet, Exit, PooledMap, cnn, wrn
from darkdistill_nb.exits.training import BoostNet
from darkdistill_nb.federated.engine import load_state, simulate, train_alone
from darkdistill_nb.federated.method import (
    EEFL,
    Client,
    average,
    block_average,
    make_clients,
    tier_sizes,
)
from darkdistill_nb.federated.generator import (
    Generator,
    GeneratorSettings,
    diversity_loss,
    train_generator,
)
from darkdistill_nb.core.seeds import Streams

pytestmark = pytest.mark.usefixtures("one_thread")
nan, inf = math.nan, math.inf
TRAIN, TEST = load("digits", n_train=160, n_test=40)
CLIENTS = make_clients(TRAIN.y, 8, 0.5)
METHODS = [EEFL, DarkDistill]


def build():
    return cnn(TRAIN.shape, 10, width=4)


def go(method, clients=CLIENTS, rounds=1, train=TRAIN, test=TEST, net=build, **kw):
    return simulate(method, net, train, test, clients, rounds, **kw)


def floats(u, f):
    u.weights = {k: f(v) if v.is_floating_point() else v for k, v in u.weights.items()}


def first(u, f):
    k = next(iter(u.weights))
    u.weights[k] = f(u.weights[k])


def put(**kw):
    def f(u):
        for k, v in kw.items():
            setattr(u, k, v)

    return f


def fail(u):
    raise RuntimeError("battery empty")


# what is done to an update -> words of the reason
FAULTS = {
    "all NaN": (lambda u: floats(u, lambda v: v * nan), "not finite"),
    "one infinity": (
        lambda u: first(u, lambda v: v.index_fill(0, torch.tensor([1]), -inf)),
        "not finite",
    ),
    "huge": (lambda u: floats(u, lambda v: v * 1e30), "sane"),
    "wrong shape": (lambda u: first(u, lambda v: v[..., :1]), "was sent"),
    "broadcast shape": (lambda u: first(u, lambda v: v[:1]), "was sent"),
    "wrong type": (lambda u: first(u, lambda v: v.double()), "was sent"),
    "no tensor": (lambda u: first(u, lambda v: v.tolist()), "was sent"),
    "missing name": (lambda u: u.weights.pop(next(iter(u.weights))), "is missing"),
    "extra name": (lambda u: u.weights.update({"stages.0.evil": torch.ones(3)}), "evil"),
    "blocks of another tier": (
        lambda u: u.weights.update({"stages.9.x": torch.ones(1)}),
        "stages.9.x",
    ),
    "no weights": (put(weights=None), "weights=None"),
    "no samples": (put(samples=0), "samples=0"),
    "negative samples": (put(samples=-5), "samples=-5"),
    "NaN samples": (put(samples=nan), "samples=nan"),
    "more samples than it has": (put(samples=10**9), "samples=1000000000"),
    "wrong tier": (lambda u: put(tier=u.tier % 4 + 1)(u), "tier="),
    "wrong id": (put(client=5), "client=5"),
    "NaN loss": (put(loss=nan), "loss is nan"),
    "text loss": (put(loss="low"), "loss='low'"),
    "extra is no dict": (put(extra=[1]), "extra=[1]"),
    "NaN in extra": (lambda u: u.extra.update(more=torch.tensor([nan])), "extra"),
    "raises": (fail, "RuntimeError: battery empty"),
}
HISTOGRAMS = {
    "no histogram": (put(extra={}), "no histogram"),
    "histogram of another shape": (put(extra={"histogram": torch.ones(3, 3)}), "histogram="),
    "negative histogram": (put(extra={"histogram": -torch.ones(10, 10).int()}), "negative"),
    "histogram of more samples": (
        put(extra={"histogram": 99 * torch.ones(10, 10).int()}),
        "histogram=9900",
    ),
    "fractions": (put(extra={"histogram": torch.rand(10, 10)}), "histogram="),
}


class Faulty:
    "Client `ill` answers with what `kind` makes of its update; None for all clients."

    kind, ill = "raises", 0

    def local_update(self, weights, data, client, rnd, streams):
        u = super().local_update(weights, data, client, rnd, streams)
        if self.ill in (None, client.id):
            {**FAULTS, **HISTOGRAMS}[self.kind][0](u)
        return u


class Without:
    "Client 0 is never drawn."

    def configure(self, rnd, clients, streams):
        return [c for c in super().configure(rnd, clients, streams) if c.id != 0]


class FaultyEEFL(Faulty, EEFL):
    pass


class FaultyDarkDistill(Faulty, DarkDistill):
    pass


class WithoutEEFL(Without, EEFL):
    pass


class WithoutDarkDistill(Without, DarkDistill):
    pass


FAULTY = {EEFL: FaultyEEFL, DarkDistill: FaultyDarkDistill}
WITHOUT = {EEFL: WithoutEEFL, DarkDistill: WithoutDarkDistill}


def faulty(base, kind, ill=0, **kw):
    m = FAULTY[base](participation=1.0, **kw)
    m.kind, m.ill = kind, ill
    return m


@pytest.fixture(scope="module")
def healthy():
    "For each method: a run in which client 0 is never drawn."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {base: go(WITHOUT[base](participation=1.0), rounds=2) for base in METHODS}


# ---------------------------------------------------------------- answers that cannot be used


@pytest.mark.parametrize(
    "base, kind", [(b, k) for b in METHODS for k in FAULTS] + [(DarkDistill, k) for k in HISTOGRAMS]
)
def test_a_bad_answer_is_left_out(base, kind, healthy):
    "The run is that without the client; a warning names client, round and reason; the log keeps it as JSON."
    with pytest.warns(UserWarning) as told:
        run = go(faulty(base, kind), rounds=2)
    for part in ("net", "server", "objective"):
        assert same(run.state[part], healthy[base].state[part]), part
    for n, row in enumerate(run.log, 1):
        assert list(row["left_out"]) == ["0"] and 0 in row["clients"]
        assert {**FAULTS, **HISTOGRAMS}[kind][1] in row["left_out"]["0"]
        assert any(
            f"round {n}: client 0 " in str(w.message) and row["left_out"]["0"] in str(w.message)
            for w in told
        )
        assert row["bytes_up"] < row["bytes_down"] + 8 * 400
    assert json.loads(json.dumps(run.log, allow_nan=False)) == run.log


@pytest.mark.parametrize("answer", [None, {}, "done", 1.5])
def test_an_answer_that_is_no_update(answer, healthy):
    class Odd(EEFL):
        def local_update(self, weights, data, client, rnd, streams):
            return (
                answer
                if client.id == 0
                else super().local_update(weights, data, client, rnd, streams)
            )

    with pytest.warns(UserWarning, match="round 1: client 0 is left out, answer="):
        run = go(Odd(participation=1.0), rounds=2)
    assert same(run.state["net"], healthy[EEFL].state["net"])


def test_integer_buffers_are_looked_at_too():
    "A batch counter of 2**62 would stay in the global network for ever."

    class Old(EEFL):
        def local_update(self, weights, data, client, rnd, streams):
            u = super().local_update(weights, data, client, rnd, streams)
            if client.id == 0:
                u.weights = {
                    k: v if v.is_floating_point() else v + 2**62 for k, v in u.weights.items()
                }
            return u

    clients = make_clients(TRAIN.y, 3, 1.0, (1 / 3,) * 3)
    with pytest.warns(UserWarning, match="num_batches_tracked reaches"):
        run = go(
            Old(participation=1.0), clients, net=lambda: wrn(10, 1, TRAIN.shape, exits=(1, 2, 3))
        )
    assert list(run.log[0]["left_out"]) == ["0"]


def test_training_in_place_does_not_reach_the_server(healthy):
    "A client that writes into what it was given, and then fails, changes nothing."

    class Vandal(EEFL):
        def local_update(self, weights, data, client, rnd, streams):
            u = super().local_update(weights, data, client, rnd, streams)
            if client.id == 0:
                for v in weights.values():
                    v.fill_(nan)
                raise OSError("gone")
            return u

    with pytest.warns(UserWarning, match="OSError: gone"):
        run = go(Vandal(participation=1.0), rounds=2)
    assert same(run.state["net"], healthy[EEFL].state["net"])


@pytest.mark.parametrize("base", METHODS)
@pytest.mark.parametrize("kind", ["no samples", "all NaN", "raises"])
def test_nobody_left_keeps_the_network(base, kind, tmp_path):
    "Also in a checkpoint, which can be continued."
    with Streams(0).scope("init"):
        start = build().state_dict()
    path = tmp_path / "c.safetensors"
    with pytest.warns(UserWarning, match="the network stays as it is"):
        run = go(faulty(base, kind, None), rounds=2, checkpoint=path)
    assert same(run.state["net"], start)
    assert [r["loss"] for r in run.log] == [None, None] and len(run.log[0]["left_out"]) == 8
    with pytest.warns(UserWarning, match="in any of 3 rounds"):
        assert go(faulty(base, kind, None), rounds=3, checkpoint=path).log[:2] == run.log


@pytest.mark.parametrize("base", METHODS)
def test_nobody_drawn_keeps_the_network(base):
    m = base()
    m.configure = lambda rnd, clients, streams: []
    with pytest.warns(UserWarning, match="no client was drawn"):
        run = go(m, rounds=2)
    assert run.log[0]["loss"] is None
    assert run.log[0]["clients"] == []
    assert len(run.log[1]["accuracy"]) == 4


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt, SystemExit, MemoryError, torch.cuda.OutOfMemoryError]
)
def test_what_concerns_the_whole_program_is_not_caught(stop):
    class Stops(EEFL):
        def local_update(self, *args):
            raise stop("enough")

    with pytest.raises(stop):
        go(Stops(participation=1.0))


def test_a_learning_rate_that_is_too_high_is_an_error():
    "If the loss of everybody runs away, no client is to blame."
    with pytest.raises(
        FloatingPointError, match="^the training loss is .*; lower lr=.*round 1, all 8 clients"
    ):
        go(EEFL(lr=1e20, epochs=2, participation=1.0))
    with pytest.raises(FloatingPointError, match="lower lr=.*round 1, all 8 clients"):
        go(faulty(EEFL, "NaN loss", None))
    with pytest.raises(FloatingPointError, match="lower lr="):
        go(EEFL(lr=1e20), [Client(0, 4, torch.arange(64), torch.arange(0))])
    with pytest.warns(
        UserWarning, match="the network stays as it is; if their training runs away, lower lr=1e"
    ):
        go(
            EEFL(lr=1e20, participation=1.0)
        )  # one batch a client: the loss was finite, the weights are not


def test_one_diverged_client_of_a_round_of_one_is_left_out():
    "Its loss alone does not say that the learning rate is too high."
    m = faulty(EEFL, "NaN loss", None)
    m.participation = 0.1
    with pytest.warns(UserWarning, match="left out"):
        assert go(m, rounds=2).log[1]["loss"] is None


def test_faults_can_be_errors():
    with pytest.raises(FloatingPointError, match="round 1: client 0, .* not finite"):
        go(faulty(EEFL, "all NaN"), faults="raise")
    with pytest.raises(ValueError, match="round 1: client 0, samples=0"):
        go(faulty(EEFL, "no samples"), faults="raise")
    with pytest.raises(RuntimeError, match="round 1: client 0, .*battery empty") as e:
        go(faulty(EEFL, "raises"), faults="raise")
    assert str(e.value.__cause__) == "battery empty"
    with pytest.raises(ValueError, match="faults='loud' must be one of warn, raise"):
        go(EEFL(), faults="loud")


def test_a_server_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="server step of round .*lower kd_lr=1e"):
        go(DarkDistill(kd_lr=1e30, participation=1.0), rounds=3)


def test_alone_refuses_weights_that_cannot_be_used():
    with pytest.raises(FloatingPointError, match="not finite"):
        train_alone(faulty(EEFL, "all NaN"), build, TRAIN, TEST, CLIENTS[:1], 1)


def test_looking_at_answers_is_cheap():
    "Less than 5 % of a round's CPU time; the best of several, since other programs run beside this one."
    m, s = EEFL(), Streams(0)
    state = m.setup(cnn(TRAIN.shape, 10))
    c = max(CLIENTS, key=lambda c: c.tier)
    sent, data = m.send(state, c), TRAIN.subset(c.train.repeat(4))
    train, look = [], []
    for r in range(5):
        t = time.process_time()
        u = m.local_update(sent, data, c, r, s)
        train.append(time.process_time() - t)
        u.samples, t = len(c.train), time.process_time()
        m.check_update(u, sent, c)
        look.append(time.process_time() - t)
    assert min(look) < 0.05 * min(train), (look, train)


# ---------------------------------------------------------------- worker processes


def test_workers_leave_out_the_same(healthy):
    with pytest.warns(
        UserWarning, match="round 1: client 0 is left out, it raised RuntimeError: battery empty"
    ):
        run = go(faulty(DarkDistill, "raises"), rounds=2, workers=2)
    assert same(run.state["net"], healthy[DarkDistill].state["net"])
    assert list(run.log[1]["left_out"]) == ["0"]


class Odd(EEFL):
    "Client 0 raises what cannot be read elsewhere, client 1 returns what cannot be sent, client 2 finds no memory in round 2."

    def local_update(self, weights, data, client, rnd, streams):
        u = super().local_update(weights, data, client, rnd, streams)

        class Local(Exception):
            pass

        if client.id == 0:
            raise Local("not importable")
        if client.id == 1:
            u.extra = {"f": lambda: 1}
        if client.id == 2 and rnd == 1:
            raise MemoryError("no memory for client 2")
        return u


def test_workers_with_answers_that_cannot_travel():
    rows = []
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="client 2"):
        go(Odd(participation=1.0), rounds=2, workers=2, on_round=rows.append)
    assert list(rows[0]["left_out"]) == ["0", "1"] and "not importable" in rows[0]["left_out"]["0"]


class Dies(EEFL):
    def local_update(self, weights, data, client, rnd, streams):
        if client.id == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().local_update(weights, data, client, rnd, streams)


class DiesOnce(EEFL):
    "Client 3 takes its process with it, the first time that it is asked."

    def __init__(self, mark):
        super().__init__(participation=1.0)
        self.mark = str(mark)

    def local_update(self, weights, data, client, rnd, streams):
        if client.id == 3:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().local_update(weights, data, client, rnd, streams)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_client_whose_worker_dies_is_run_again_then_left_out(tmp_path):
    "The round that follows has all workers again; what is left is what a client that raises leaves."
    words = "round 1: client 3 is left out, it raised WorkerLost: .* exit code -9"
    with pytest.warns(UserWarning, match=words):
        lost = go(Dies(participation=1.0), rounds=2, workers=2)
    assert [list(r["left_out"]) for r in lost.log] == [["3"], ["3"]]
    again = go(DiesOnce(tmp_path / "died"), rounds=1, workers=2)
    whole = go(EEFL(participation=1.0), rounds=1)
    assert (tmp_path / "died").exists() and again.log[0]["left_out"] == {}
    assert same(again.state["net"], whole.state["net"])


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_worker_that_dies_ends_a_strict_run():
    with pytest.raises(RuntimeError, match="round 1, client 3|round 1: client 3"):
        go(Dies(participation=1.0), workers=2, faults="raise")


def test_a_method_that_cannot_be_sent_says_so():
    class Here(EEFL):
        pass

    with pytest.raises(ValueError, match="workers must be 1 here"):
        go(Here(), workers=2)


SCRIPT = """
    import sys, torch
    from darkdistill_nb.core.datasets import load
    from darkdistill_nb.exits.networks import cnn
    from darkdistill_nb.federated.engine import simulate
    from darkdistill_nb.federated.method import EEFL, make_clients
    def main():
        train, test = load("digits")
        simulate(EEFL(participation=1., epochs=2000), lambda: cnn(train.shape, 10), train, test, make_clients(train.y, 4), 1, workers=2)
    {start}
"""


def seconds_of_cpu(pid):
    s = process_state(pid)
    return (int(s[11]) + int(s[12])) / os.sysconf("SC_CLK_TCK") if s else 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(sign, tmp_path, wait_until):
    "They are in the middle of a training that would take minutes."
    (tmp_path / "s.py").write_text(
        textwrap.dedent(SCRIPT).format(start='if __name__ == "__main__": main()')
    )
    p = subprocess.Popen([sys.executable, tmp_path / "s.py"], stderr=subprocess.DEVNULL)
    workers = []
    try:
        while len(workers := children(p.pid)) < 2 or min(map(seconds_of_cpu, workers)) < 6:
            assert p.poll() is None, "the script ended before its workers could be watched"
            time.sleep(0.1)
        p.send_signal(sign)
        p.wait()

        def all_gone():
            return not any(map(running, workers))

        wait_until(all_gone)
    finally:
        p.kill()
        for w in filter(running, workers):
            os.kill(w, signal.SIGKILL)


RESUMED = """
    import sys
    from darkdistill_nb.core.datasets import load
    from darkdistill_nb.exits.networks import cnn
    from darkdistill_nb.federated.engine import simulate
    from darkdistill_nb.federated.method import EEFL, make_clients
    def main():
        train, test = load("digits", n_train=400, n_test=60)
        told = lambda row: print(row["round"], flush=True)
        simulate(EEFL(participation=1.), lambda: cnn(train.shape, 10, width=8), train, test,
            make_clients(train.y, 4, 10.), 2000, eval_every=2000, workers=3, checkpoint=sys.argv[1], on_round=told)
    if __name__ == "__main__":
        main()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc, SIGINT")
def test_ctrl_c_leaves_a_run_that_can_go_on_and_nobody_behind(tmp_path, wait_until):
    "The signal goes to all processes, as from a terminal: the one that the script began with trains, too."
    (tmp_path / "s.py").write_text(textwrap.dedent(RESUMED))
    words = [sys.executable, tmp_path / "s.py", tmp_path / "c.safetensors"]
    p = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have shut it off
    )
    try:
        rounds = [p.stdout.readline() for _ in range(3)]
        workers = children(p.pid)
        os.killpg(p.pid, signal.SIGINT)
        assert p.wait(LONG) != 0 and rounds == ["1\n", "2\n", "3\n"] and len(workers) >= 2
        wait_until(lambda: not any(map(running, workers)))
    finally:
        p.kill()
        p.stdout.close()
    train, test = load("digits", n_train=400, n_test=60)
    done = len(load_state(tmp_path / "c.safetensors")[1]["log"])
    assert done >= 3
    clients, build = make_clients(train.y, 4, 10.0), lambda: cnn(train.shape, 10, width=8)
    # a checkpoint of more rounds than are asked for is refused, so it goes on for one
    run = simulate(
        EEFL(participation=1.0),
        build,
        train,
        test,
        clients,
        done + 1,
        eval_every=2000,
        checkpoint=tmp_path / "c.safetensors",
    )
    whole = simulate(
        EEFL(participation=1.0), build, train, test, clients, done + 1, eval_every=2000
    )
    assert same(run.state["net"], whole.state["net"])


def test_a_script_without_a_guard_gets_one_sentence(tmp_path):
    (tmp_path / "s.py").write_text(textwrap.dedent(SCRIPT).format(start="main()"))
    r = subprocess.run(
        [sys.executable, tmp_path / "s.py"], capture_output=True, text=True, timeout=LONG
    )
    assert r.returncode == 1
    assert 'if __name__ == "__main__":' in r.stderr.splitlines()[-1]


# ---------------------------------------------------------------- what is refused before the first round


class Never(EEFL):
    def local_update(self, *args):
        raise AssertionError("trained")


def changed(i=0, **kw):
    return [Client(**{**vars(c), **(kw if c.id == i else {})}) for c in CLIENTS]


some, none = torch.arange(5), torch.arange(0)
BAD_CLIENTS = {
    "client id=[0]": CLIENTS + CLIENTS[:1],
    "clients=[]": [],
    "client 0: tier=0": changed(tier=0),
    "client 0: tier=5": changed(tier=5),
    "client 0: tier=1.5": changed(tier=1.5),
    "client 0: train=.-2..-1.": changed(train=-1 - torch.arange(2)),
    "client 0: train=.9999..9999.": changed(train=torch.tensor([9999])),
    "client 0: valid=.-1..3.": changed(train=some + 9, valid=some - 1),
    r"client 0: train=\[\]": changed(train=none, valid=none),
    "client 0: train=.* must be a tensor of indices": changed(train=some.float()),
    "client 0: valid=.3 indices of train.": changed(train=some, valid=some + 2),
    "client 0: train=tensor.* must be a tensor of indices": changed(train=some.view(1, 5)),
}


@pytest.mark.parametrize("text", BAD_CLIENTS)
def test_clients_are_looked_at_before_the_first_round(text):
    match = (
        text.replace("[0]", r"\[0\]").replace("=[]", r"=\[\]")
        if text in ("client id=[0]", "clients=[]")
        else text
    )
    with pytest.raises(ValueError, match=match):
        go(Never(participation=1.0), BAD_CLIENTS[text])
    with pytest.raises(ValueError, match=match):
        train_alone(Never(), build, TRAIN, TEST, BAD_CLIENTS[text], 1)


OTHER = load("shapes", n_train=20, n_test=20)[0]


@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(rounds=0), "rounds=0"),
        (dict(rounds=nan), "rounds=nan"),
        (dict(rounds=1.5), "rounds=1.5"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(eval_every=0), "eval_every=0"),
        (dict(eval_every=1.5), "eval_every=1.5"),
        (dict(workers=-3), "workers=-3"),
        (dict(workers=0), "workers=0"),
        (dict(workers=2.0), "workers=2.0"),
        (dict(device="x"), "device='x'"),
        (dict(progress="no"), "progress='no'"),
        (dict(test=OTHER), "test: shape of an image"),
        (dict(train=None), "train=None"),
        (dict(net=lambda: cnn(TRAIN.shape, 9, width=4)), "largest label=9"),
        (dict(net=lambda: nn.Linear(2, 2)), "build="),
        (dict(net=build()), "build="),
    ],
)
def test_settings_are_looked_at_before_the_first_round(kw, text):
    with pytest.raises(ValueError, match=text):
        go(Never(participation=1.0), **kw)


def test_a_method_must_be_one():
    with pytest.raises(ValueError, match="method='eefl' must be a method"):
        go("eefl")


def test_a_last_batch_of_one_is_refused_where_batch_normalisation_cannot_train():
    def flat():
        block = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
        return EarlyExitNet(nn.Identity(), [block], [Exit(nn.Identity(), 8, 10)], TRAIN.shape, 10)

    with pytest.raises(ValueError, match="17 samples leave"):
        go(Never(participation=1.0), [Client(0, 1, torch.arange(17), none)], net=flat)


def test_numpy_numbers_are_numbers():
    i, f = np.int64, np.float32
    m = DarkDistill(
        lr=f(0.05),
        epochs=i(1),
        batch_size=i(16),
        participation=f(1),
        tau=np.float64(0.1),
        kd_steps=i(2),
        generator=GeneratorSettings(d_h=i(16)),
        rkd=(f(5), i(10)),
    )
    clients = [
        Client(i(c.id), i(c.tier), c.train, c.valid)
        for c in make_clients(TRAIN.y.numpy(), i(4), f(0.5), seed=i(0))
    ]
    run = go(m, clients, i(1), seed=i(0), eval_every=i(1), workers=i(1))
    json.dumps(run.log)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    go(EEFL(), rounds=2, checkpoint=tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def other_images(data):
    return ArrayData(data.x.flip(0), data.y, data.classes)


def moved(net):
    net.stem.weight.data[0] += 0.1
    return net


@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(train=other_images(TRAIN)), "another training data"),
        (dict(train=ArrayData(TRAIN.x, (TRAIN.y + 1) % 10)), "another training data"),
        (dict(train=ArrayData(TRAIN.x, TRAIN.y, mean=(0.5,), std=(0.5,))), "another training data"),
        (dict(test=other_images(TEST)), "another test data"),
        (
            dict(clients=changed(train=CLIENTS[0].train.flip(0))),
            "another clients",
        ),  # the same sum and length
        (dict(clients=changed(valid=CLIENTS[0].valid[:-1])), "another clients"),
        (dict(clients=changed(tier=CLIENTS[0].tier % 4 + 1)), "another clients"),
        (dict(net=lambda: moved(build())), "another network"),
        (dict(seed=1), r"seed=1 \(in the file 0\)"),
        (dict(method=EEFL(lr=0.1)), r"lr=0.1 \(in the file 0.05\)"),
        (dict(method=EEFL(BoostNet(w=0.5))), "another objective"),
        (dict(method=Never()), "another method"),
        (dict(method=DarkDistill()), "another method"),
    ],
)
def test_a_checkpoint_is_of_one_run(checkpoint, kw, text):
    before = checkpoint.read_bytes()
    with pytest.raises(
        ValueError, match=f"written by another training: .*{text}.*delete {checkpoint}"
    ):
        go(**{"method": EEFL(), "rounds": 3, "checkpoint": checkpoint, **kw})
    assert checkpoint.read_bytes() == before


def test_fewer_rounds_than_the_checkpoint_has(checkpoint):
    with pytest.raises(ValueError, match="rounds=1 is less than the 2 rounds in checkpoint="):
        go(EEFL(), rounds=1, checkpoint=checkpoint)


def test_as_many_rounds_as_the_checkpoint_has(tmp_path):
    "The finished run comes back, with the accuracy of its last round even if a longer run was stopped there."
    path, rows = tmp_path / "c.safetensors", []

    def stop(row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(EEFL(), rounds=9, eval_every=9, checkpoint=path, on_round=stop)
    run = go(EEFL(), rounds=2, eval_every=9, checkpoint=path)
    plain = go(EEFL(), rounds=2, eval_every=9)
    assert len(run.log) == 2
    assert same(run.state["net"], plain.state["net"])
    assert run.log[-1]["accuracy"] == plain.log[-1]["accuracy"]


def damage(data, kind):
    head = int.from_bytes(data[:8], "little") + 8
    if kind == "cut":
        return data[:-50]
    if kind == "empty":
        return b""
    if kind == "text":
        return b"hello"
    b = bytearray(data)
    for i in range(head + 40, len(b), 97):
        b[i] ^= 0x15
    return bytes(b)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "bits"])
def test_a_damaged_checkpoint_names_the_file(checkpoint, kind):
    checkpoint.write_bytes(damage(checkpoint.read_bytes(), kind))
    with pytest.raises(
        ValueError, match=f"checkpoint={checkpoint} cannot be read .*delete {checkpoint}"
    ):
        go(EEFL(), rounds=3, checkpoint=checkpoint)


def test_files_of_something_else(checkpoint):
    from darkdistill_nb.federated.engine import load_state, save_state
    from darkdistill_nb.core.records import save_tensors

    state, meta = load_state(checkpoint)
    files = [
        lambda: save_tensors(checkpoint, {"w": torch.ones(2)}),
        lambda: save_state(checkpoint, state, [1, 2]),
        lambda: save_state(checkpoint, state, {**meta, "log": meta["log"][1:]}),
        lambda: save_state(checkpoint, {**state, "net": {}}, meta),
        lambda: save_state(
            checkpoint, {**state, "net": {k: v * nan for k, v in state["net"].items()}}, meta
        ),
        lambda: save_state(checkpoint, state, {**meta, "fingerprint": "0123456789abcdef"}),
    ]
    for write in files:
        write()
        with pytest.raises(ValueError, match=f"{checkpoint}.*delete"):
            go(EEFL(), rounds=3, checkpoint=checkpoint)


# ---------------------------------------------------------------- shared and frozen parts


def one_classifier():
    e = [Exit(PooledMap(4), 64, 10) for _ in range(2)]
    e[1].fc = e[0].fc
    return EarlyExitNet(
        nn.Conv2d(1, 4, 3, padding=1), [ConvStage(4), ConvStage(4)], e, TRAIN.shape, 10
    )


def one_stage():
    stage = ConvStage(4)
    return EarlyExitNet(
        nn.Conv2d(1, 4, 3, padding=1),
        [stage, stage],
        [Exit(PooledMap(4), 64, 10) for _ in range(2)],
        TRAIN.shape,
        10,
    )


@pytest.mark.parametrize(
    "net, a, b",
    [
        (one_classifier, "exits.0.fc.weight", "exits.1.fc.weight"),
        (one_stage, "stages.0.convs.0.weight", "stages.1.convs.0.weight"),
    ],
)
@pytest.mark.parametrize("base", METHODS)
def test_one_tensor_with_two_names_keeps_one_value(base, net, a, b, tmp_path):
    "It is averaged over everybody who has it; resuming and workers change nothing."
    clients = make_clients(TRAIN.y, 4, 1.0, (0.5, 0.5))
    with Streams(0).scope("init"):
        start = net().state_dict()
    run = go(base(participation=1.0), clients, 3, net=net)
    assert torch.equal(run.state["net"][a], run.state["net"][b])
    assert not torch.equal(run.state["net"][a], start[a])
    path = tmp_path / "c.safetensors"
    go(base(participation=1.0), clients, 1, net=net, checkpoint=path)
    assert same(
        go(base(participation=1.0), clients, 3, net=net, checkpoint=path, workers=2).state["net"],
        run.state["net"],
    )
    only_shallow = go(
        base(participation=1.0), [c for c in clients if c.tier == 1], net=net, rounds=1
    ).state["net"]
    assert torch.equal(only_shallow[a], only_shallow[b])
    assert not torch.equal(only_shallow[b], start[b])


@pytest.mark.parametrize("base", METHODS)
def test_frozen_normalisations_keep_their_statistics(base):
    "A stage in evaluation mode without gradients stays as it is for all rounds; a stage that is only without gradients does not."

    def net(mode):
        n = wrn(10, 1, TRAIN.shape, exits=(1, 2, 3))
        n.stages[0].requires_grad_(False).train(mode)
        return n

    clients = make_clients(TRAIN.y, 6, 1.0, (1 / 3,) * 3)
    with Streams(0).scope("init"):
        start = net(False).state_dict()
    for mode in (False, True):
        runs = [
            go(base(participation=1.0), clients, 2, net=lambda: net(mode), workers=w).state["net"]
            for w in (1, 2)
        ]
        assert same(*runs)  # a working network that is used again forgets nothing and keeps nothing
        means = [k for k in start if k.startswith("stages.0.") and k.endswith("running_mean")]
        assert means and all(torch.equal(runs[0][k], start[k]) is not mode for k in means)
        assert any(
            not torch.equal(runs[0][k], start[k])
            for k in start
            if k.startswith("stages.1.") and k.endswith("running_mean")
        )


# ---------------------------------------------------------------- a server step that does nothing


def test_a_run_without_neighbouring_tiers_says_so():
    two = [Client(i, t, CLIENTS[i].train, none) for i, t in enumerate((1, 3))]
    with pytest.warns(
        UserWarning,
        match="did nothing in any of 2 rounds .no two neighbouring tiers took part.: this run is one of EEFL",
    ):
        run = go(DarkDistill(participation=1.0), two, 2)
    assert [r["server_step"] for r in run.log] == [
        "nothing: no two neighbouring tiers took part"
    ] * 2
    assert same(run.state["net"], go(EEFL(participation=1.0), two, 2).state["net"])


def test_a_run_without_anything_to_compare_says_so():
    "One latent cannot leave samples at every exit."
    with pytest.warns(UserWarning, match="no batch of 1 latents left samples at every exit"):
        run = go(DarkDistill(participation=1.0, server_batch=1), rounds=1)
    assert run.log[0]["server_step"].startswith("nothing: no batch") and run.log[0]["kd_loss"] == 0


def test_frozen_students_are_named():
    def net():
        n = build()
        n.stages.requires_grad_(False)
        return n

    with pytest.warns(UserWarning, match="the stages that would learn are frozen"):
        go(DarkDistill(participation=1.0), net=net)


@pytest.mark.parametrize("off", [dict(kd_lr=0), dict(kd_steps=0), dict(server_epochs=0)])
def test_switched_off_on_purpose_is_no_warning(off):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            go(DarkDistill(participation=1.0, **off)).log[0]["server_step"]
            == f"nothing: {next(iter(off))}=0 switches it off"
        )


def test_a_server_step_that_works_names_who_taught():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert go(DarkDistill(participation=1.0)).log[0]["server_step"] == "1 -> 2, 2 -> 3, 3 -> 4"


# ---------------------------------------------------------------- constructors and functions

NUMBERS = ("lr", "decay", "momentum", "weight_decay", "participation")
WHOLE = ("batch_size", "epochs")
DD_NUMBERS = (
    "kd_lr",
    "kd_weight_decay",
    "gen_lr",
    "lam_ce",
    "lam_dif",
    "lam_div",
    "tau",
    "P",
    "bin_width",
)
DD_WHOLE = ("kd_steps", "server_epochs", "gen_steps", "d_eps", "d_h", "server_batch")


@pytest.mark.parametrize(
    "method, name",
    [(EEFL, k) for k in NUMBERS + WHOLE]
    + [(DarkDistill, k) for k in NUMBERS + WHOLE + DD_NUMBERS + DD_WHOLE],
)
def test_numbers_of_methods(method, name):
    bad = [nan, inf, -inf, -1, "x", None, True, 1j, [1]] + [1.5, 2.0] * (name in WHOLE + DD_WHOLE)
    for v in bad:
        with pytest.raises(ValueError, match=f"^{name}="):
            made(method, **{name: v})


@pytest.mark.parametrize(
    "kw",
    [
        dict(lr=-0.1),
        dict(decay=0),
        dict(decay=1.1),
        dict(momentum=1),
        dict(batch_size=0),
        dict(epochs=0),
        dict(participation=0),
        dict(participation=1.1),
        dict(objective="boostnet"),
        dict(ce="x"),
        dict(dif=None),
        dict(norm="instance"),
        dict(weights="far"),
        dict(rkd=5),
        dict(rkd=()),
        dict(rkd=[1]),
        dict(rkd=(1, nan)),
        dict(rkd=(1, -1)),
        dict(tau=0),
        dict(tau=1e-40),
        dict(P=0),
        dict(P=1e308),
        dict(d_eps=0),
        dict(d_h=0),
        dict(server_batch=0),
        dict(norm="batch", server_batch=1),
        dict(bin_width=0),
        dict(bin_width=1e-9),
        dict(bin_width=11),
    ],
)
def test_ranges_of_methods(kw):
    with pytest.raises(ValueError, match="^(" + "|".join(kw) + ")="):
        made(DarkDistill, **kw)


z, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
hist = lambda **kw: DifficultyHistogram.of(**{**dict(d=torch.rand(4), y=labels, n_classes=3), **kw})
G, one = Generator((5,), 3, 4, 8), dict(a=torch.ones(2))
g0 = torch.Generator()
CALLS = {
    "generator: latent_shape": lambda: Generator((), 3),
    "generator: 0 in shape": lambda: Generator((0, 4), 3),
    "generator: n_classes": lambda: Generator((4,), 0),
    "generator: d_eps": lambda: Generator((4,), 3, 1.5),
    "generator: d_h": lambda: Generator((4,), 3, 4, -1),
    "generator: conditional": lambda: Generator((4,), 3, conditional="no"),
    "draw: label": lambda: G.draw(torch.tensor([3]), torch.rand(1), g0),
    "draw: column": lambda: G.draw(labels, torch.rand(4, 1), g0),
    "draw: negative": lambda: G.draw(labels, -torch.rand(4), g0),
    "draw: NaN": lambda: G.draw(labels, torch.rand(4) * nan, g0),
    "draw: lengths": lambda: G.draw(labels, torch.rand(1), g0),
    "train_generator: steps": lambda: train_generator(
        G, build(), build(), BoostNet(), None, 1.5, g0
    ),
    "train_generator: settings": lambda: train_generator(
        G, build(), build(), BoostNet(), None, 1, g0, dict(lam_ce=1)
    ),
    "generator: rate": lambda: GeneratorSettings(gen_lr=nan),
    "generator: ce": lambda: GeneratorSettings(ce="x"),
    "generator: lam": lambda: GeneratorSettings(lam_div=-1),
    "diversity": lambda: diversity_loss(torch.rand(1, 3), torch.rand(4, 5)),
    "difficulty: label": lambda: sample_difficulty(z, labels + 1),
    "difficulty: shape": lambda: sample_difficulty(z, labels[:1]),
    "difficulty: cap": lambda: sample_difficulty(z, labels, cap=nan),
    "difficulty: cap 0": lambda: sample_difficulty(z, labels, cap=0),
    "histogram: label": lambda: hist(n_classes=2),
    "histogram: lengths": lambda: hist(y=labels[:1]),
    "histogram: negative": lambda: hist(d=-torch.rand(4)),
    "histogram: inf": lambda: hist(d=torch.full((4,), inf)),
    "histogram: width": lambda: hist(width=0),
    "histogram: width nan": lambda: hist(width=nan),
    "histogram: bins": lambda: hist(bins=2.5),
    "histogram: column": lambda: hist(d=torch.rand(4, 1)),
    "histogram: counts": lambda: DifficultyHistogram(-torch.ones(3, 10).long()),
    "histogram: fractions": lambda: DifficultyHistogram(torch.rand(3, 10)),
    "histogram: widths": lambda: hist() + hist(width=0.5),
    "sample: n": lambda: hist().sample(0, g0),
    "sample: smoothing": lambda: hist().sample(1, g0, nan),
    "alignment_weights: tau": lambda: alignment_weights(torch.rand(3), torch.rand(4), 0),
    "alignment_weights: empty": lambda: alignment_weights(torch.rand(0), torch.rand(4)),
    "alignment_weights: NaN": lambda: alignment_weights(torch.rand(3), torch.full((4,), nan)),
    "alignment_weights: no ranges": lambda: alignment_weights(torch.rand(3), torch.rand(0)),
    "pair_loss: d": lambda: pair_loss(
        build().prefix(1), build().prefix(2), torch.rand(8, 4, 8, 8), torch.rand(1), BoostNet()
    ),
    "pair_loss: weights": lambda: pair_loss(
        build().prefix(1),
        build().prefix(2),
        torch.rand(8, 4, 8, 8),
        torch.rand(8),
        BoostNet(),
        weights="far",
    ),
    "average: 0": lambda: average([one], [0]),
    "average: negative": lambda: average([one, one], [-5, 6]),
    "average: none": lambda: average([], []),
    "average: lengths": lambda: average([one], [1, 2]),
    "average: names": lambda: average([one, dict(b=torch.ones(2))], [1, 1]),
    "average: shapes": lambda: average([one, dict(a=torch.ones(1))], [1, 1]),
    "average: NaN": lambda: average([one], [nan]),
    "block_average: names": lambda: block_average(
        {"stem.w": torch.ones(1)}, {1: ({"stem.v": torch.ones(1)}, 5)}
    ),
    "block_average: shape": lambda: block_average(
        {"stem.w": torch.ones(2)}, {1: ({"stem.w": torch.ones(1)}, 5), 2: ({}, 3)}
    ),
    "tier_sizes: NaN": lambda: tier_sizes(4, (nan,)),
    "tier_sizes: negative": lambda: tier_sizes(-8, (1,)),
    "tier_sizes: empty": lambda: tier_sizes(4, ()),
    "tier_sizes: None": lambda: tier_sizes(4, None),
    "tier_sizes: text": lambda: tier_sizes(4, "1"),
    "make_clients: valid": lambda: make_clients(TRAIN.y, 4, valid=nan),
    "make_clients: tiers": lambda: make_clients(TRAIN.y, 4, tiers=(nan, 1)),
    "make_clients: gamma": lambda: make_clients(TRAIN.y, 4, gamma=-1),
    "make_clients: cover": lambda: make_clients(TRAIN.y, 4, cover="yes"),
    "make_clients: seed": lambda: make_clients(TRAIN.y, 4, seed=0.5),
    "make_clients: clients": lambda: make_clients(TRAIN.y, 4.0),
    "make_clients: family": lambda: make_clients(TRAIN.y, 4, family="x"),
    "make_clients: min_size": lambda: make_clients(TRAIN.y, 4, min_size=len(TRAIN)),
    "make_clients: min_size, text": lambda: make_clients(TRAIN.y, 4, min_size="x"),
    "make_clients: min_size, given": lambda: make_clients(TRAIN.y, [[0, 1], [2]], min_size=2),
    "train_alone: rounds": lambda: train_alone(EEFL(), build, TRAIN, TEST, CLIENTS, -1),
}


@pytest.mark.parametrize("what", CALLS)
def test_functions_refuse_nonsense(what):
    with pytest.raises(ValueError) as e:
        CALLS[what]()
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


class SomeRaise(EEFL):
    "Clients of odd number fail."

    def local_update(self, weights, data, client, rnd, streams):
        if client.id % 2:
            raise RuntimeError("battery empty")
        return super().local_update(weights, data, client, rnd, streams)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_strict_run_names_the_same_client_with_any_number_of_workers(workers):
    "The first of the draw that fails, whoever is ready first: jobs of deep tiers begin earlier."
    drawn = SomeRaise(participation=1.0).configure(0, CLIENTS, Streams(0))
    first = next(c.id for c in drawn if c.id % 2)
    with pytest.raises(RuntimeError, match=f"round 1: client {first}, it raised"):
        go(SomeRaise(participation=1.0), workers=workers, faults="raise")


def test_a_strict_run_waits_for_those_before():
    method, rnd = EEFL(participation=1.0), 0
    from darkdistill_nb.federated import engine

    method.setup(build())
    error = RuntimeError("battery empty")
    late = [(2, error), (0, error), (1, error)]
    with pytest.raises(RuntimeError, match=f"client {CLIENTS[0].id}, it raised"):
        engine._sort_out(method, 8, CLIENTS[:3], [{}] * 3, late, rnd, "raise")
    with pytest.raises(RuntimeError, match=f"client {CLIENTS[2].id}, it raised"):  # 0 and 1 are lost
        engine._sort_out(method, 8, CLIENTS[:3], [{}] * 3, late[:1], rnd, "raise")


# ---------------------------------------------------------------- the width of difficulty bins


@pytest.mark.parametrize("width", [1.0, 0.25, 0.1, 2.0])
def test_bin_width_goes_through_everything(width):
    "Clients count in bins of this width; what the server draws is in nats and follows the clients' difficulties."
    asked = []

    class Spy(DarkDistill):
        def _fit_generator(self, gen, teacher, batch, g, opt):
            asked.append(batch[1])
            return {}

    m = Spy(participation=1.0, bin_width=width, server_batch=400, kd_steps=1, rkd=(0.0, 0.0))
    run = go(m)
    counts = torch.tensor(list(run.log[0]["difficulty"].values())).sum(0)
    assert len(counts) == bins_of(width) == math.ceil(9.99 / width)
    assert int(counts.sum()) == sum(len(c.train) for c in CLIENTS)
    assert run.log[0]["bin_width"] == width
    d = torch.cat(asked)
    mean = (
        float((counts[:-1] * (torch.arange(len(counts) - 1) + 0.5)).sum() / counts[:-1].sum())
        * width
    )
    assert 0 <= float(d.min())
    assert float(d.max()) <= len(counts) * width
    assert abs(float(d.mean()) - mean) < 0.5


def test_the_default_width_changes_nothing():
    a, b = (go(DarkDistill(participation=1.0, **kw), rounds=2) for kw in ({}, dict(bin_width=1)))
    assert same(a.state["net"], b.state["net"]) and same(a.state["server"], b.state["server"])


# ---------------------------------------------------------------- the progress bar


def test_progress_bar(capsys, monkeypatch):
    "Off where nobody watches, on in a terminal, and as asked."
    shown = lambda **kw: (go(EEFL(), rounds=2, **kw), capsys.readouterr().err)[1]
    assert shown() == "" and "2/2" in shown(progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "2/2" in shown() and shown(progress=False) == ""
    train_alone(EEFL(), build, TRAIN, TEST, CLIENTS[:2], 1)
    assert "2/2" in capsys.readouterr().err


def test_progress_bar_in_a_notebook_that_somebody_watches(monkeypatch):
    "A kernel that may ask questions is live; one that runs a notebook from start to end may not."
    from types import SimpleNamespace
    from darkdistill_nb.federated.engine import _somebody_watches

    for live in (True, False):
        shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=live))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
        assert _somebody_watches() is live


def test_a_bar_that_goes_on_where_the_run_did(tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    go(EEFL(), rounds=2, checkpoint=path)
    go(EEFL(), rounds=3, checkpoint=path, progress=True)
    assert "2/3" in (err := capsys.readouterr().err) and "3/3" in err

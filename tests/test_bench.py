"""Benchmarks: everybody does the same work, what is missing is said, and what is counted is what runs."""

import pytest, torch
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.experiments import bench
from darkdistill_nb.experiments.settings import make_config
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, Client

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["linear", "mlp", "lenet", "vit"])
def test_the_benchmark_asks_everybody_for_the_same_work(name):
    "One batch per client, so the order of images has no say: our weights are those of the lean loop."
    from darkdistill_nb.exits.training import Joint

    n = 2 if name == "vit" else 6
    work, left = bench.Workload(name, clients=3, samples=n, batch=n), [True, True, False]
    lean = bench._play_lean(work, lambda: left.pop(0))
    x, y = work.images()
    data = ArrayData(x.flatten(0, 1), y.flatten(), range(10), mean=[0.0] * 3, std=[1.0] * 3)
    clients = [Client(i, 1, torch.arange(n) + n * i, torch.arange(0)) for i in range(3)]
    settings = dict(decay=1.0, momentum=0.0, weight_decay=0.0, batch_size=n, participation=1.0)
    method = EEFL(Joint(), lr=work.lr, **settings)
    run = simulate(method, lambda: bench._as_exits(work), data, data, clients, 2, eval_every=2)
    ours = torch.cat([v.reshape(-1) for v in run.state["net"].values()])
    assert torch.allclose(ours, lean, atol=1e-6) and not torch.equal(ours[:100] * 0, ours[:100])


def test_a_peer_that_is_not_there_is_named():
    import importlib.util

    if importlib.util.find_spec("pfl"):
        pytest.skip("pfl is installed")
    rows, rate, missing = bench.federated_rows(bench.Workload(clients=1), 1, systems=["pfl"])
    assert (rows, missing) == ([], ["pfl"]) and rate > 0
    with pytest.raises(ValueError, match="python="):
        bench.federated_rows(bench.Workload(clients=1), 1, python="/no/such/python")


def test_a_network_that_fedjax_does_not_have_is_refused():
    pytest.importorskip("jax")
    with pytest.raises(NotImplementedError, match="TokenStem"):
        bench._in_jax(bench.Workload("vit", clients=1).net())([], None)


def test_a_player_that_does_not_end_is_ended_with_all_its_processes(monkeypatch, wait_until):
    "As Flower's simulation, whose processes would stay."
    import os, subprocess, sys
    from conftest import running

    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code += "; print(1, flush=True); time.sleep(600)"
    player = bench._Player.__new__(bench._Player)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    player.process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    player.process.stdout.readline()
    wait = player.process.wait
    monkeypatch.setattr(player.process, "wait", lambda seconds=None: wait(seconds and 0.1))
    pids = bench._tree(player.process.pid)
    assert len(pids) == 2 or not os.path.exists("/proc/self/stat")
    player.close()

    def all_are_gone():
        return not any(map(running, pids))

    wait_until(all_are_gone)


def test_what_a_step_costs_is_compared_over_numbers_of_clients():
    row = lambda n, ms: dict(work="mlp", clients=n, rows=[dict(system="darkdistill_nb", cpu_ms=ms)])
    pfl = dict(work="mlp", clients=9, rows=[dict(system="pfl", cpu_ms=1.0)])
    text = bench._growth([row(10, 2.0), pfl, row(100, 2.5), {**row(5, 1.0), "work": "lenet"}], "mlp")
    assert text.endswith("10: 1.00, 100: 1.25")


def test_a_stall_shows_on_the_clock_and_in_processor_seconds():
    player = bench._Player.__new__(bench._Player)
    player.name, player.memory = "x", 1.0
    player.rounds = [dict(cpu=9.0, wall=9.0)] * 2  # they warm up
    player.rounds += [dict(cpu=1.0, wall=1.0)] * 3 + [dict(cpu=1.1, wall=4.0)]
    row = bench._row(player, bench.Workload(clients=1), 1.0)
    assert (row["slowest"], row["slowest_cpu"]) == (4.0, 1.1)


SMALL = dict(data="digits", clients=4, tiers="2", seeds=2, participation=1.0, rounds=6)
SMALL |= dict(net=dict(width=4, stages=2), n_train=80, n_test=40, methods="eefl,darkdistill")


def test_operations_of_a_run_lie_on_a_line():
    "Everybody takes part, so every round is alike; both seeds have as many images."
    c = make_config({**SMALL, "methods": "eefl", "eval_every": 3, "rounds": 15})
    line = bench.run_gflop(c)
    for kind in ("eefl", "alone"):
        assert line[kind] == pytest.approx(2 * bench._gflop_of(c, kind, 15), rel=0.02)


def test_operations_of_a_round_are_those_of_its_clients_and_of_its_evaluation():
    from torch.utils.flop_counter import FlopCounterMode
    from darkdistill_nb.experiments.runs import Experiment

    c = make_config({**SMALL, "alone": False})
    exp = Experiment({**c, "rounds": 1})
    net = exp.build()
    with FlopCounterMode(display=False) as count:
        net.eval()(exp.test[:][0])
        for client in exp.clients[0]:
            for x, _ in exp.train.subset(client.train).batches(c["batch_size"]):
                sum(f.sum() for f in net.prefix(client.tier).train()(x)).backward()
    by_hand = count.get_total_flops() / 1e9
    one, two = (bench._gflop_of(c, "eefl", rounds) for rounds in (1, 2))
    assert two - one == pytest.approx(by_hand, rel=1e-6)


def test_a_run_beside_the_limit_says_where_its_time_goes(tmp_path, capsys):
    from darkdistill_nb.experiments.runs import run_experiment

    settings = {**SMALL, "rounds": 2, "seeds": 1, "alone": False}
    run, folder = run_experiment(settings, tmp_path / "run", 1, progress=False)
    assert bench.main(["run", str(folder), "--save", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [t.split()[0] for t in said[2:4]] == ["eefl", "darkdistill"]
    assert f"{run.info['cpu_seconds']:.1f} processor seconds" in said[-1]
    assert (tmp_path / "r.json").exists()
    for parts in bench._shares_of_rounds(run).values():
        assert sum(parts) == pytest.approx(1) and min(parts) >= 0


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["run", str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err.splitlines()[-1]


def test_the_players_network_is_taped():
    "As `python -m` the bench is `__main__`, whose modules count as the reader's own: they would not be taped."
    import json, subprocess, sys

    settings = json.dumps(dict(name="linear", clients=2, samples=5, batch=5, lr=0.02))
    code = f"""
import io, runpy, sys
from darkdistill_nb.federated import tape
made = []
real = tape.Step.__init__
def noted(self, net):
    real(self, net)
    made.append(self)
tape.Step.__init__ = noted
sys.argv, sys.stdin = ["bench", "play", "darkdistill_nb", {settings!r}], io.StringIO("go\\n" * 6)
try:
    runpy.run_module("darkdistill_nb.experiments.bench", run_name="__main__")
except SystemExit:
    pass
print([(s.why, s.ready) for s in made], file=sys.__stderr__)
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.stderr.strip().splitlines()[-1] == "[('', True)]", r.stderr


def test_a_small_step_has_sizes_of_its_own():
    text, record = bench.bench_federated(["visit"], [2], 1, 50, 25, systems=["darkdistill_nb"])
    assert "visit: 2 clients, 5 images each, batch 5" in text
    assert record.info["tables"][0]["work"] == "visit"

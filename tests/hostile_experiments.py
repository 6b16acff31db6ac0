"""Small valid calls of what experiments, benchmarks and processes export, for test_hostile.py.

Valid calls that take minutes, or need what a machine may lack, are listed in LAZY with the reason:
there only the hostile ones are made, which are refused before any work."""

import itertools, tempfile
from pathlib import Path
import torch
from darkdistill_nb.core import records
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.experiments import bench
from darkdistill_nb.experiments import distree as distree_experiments
from darkdistill_nb.experiments import runs
from darkdistill_nb.exits import runner
from darkdistill_nb.federated import engine, flower
from darkdistill_nb.federated import method as federated
from hostile_calls import answers, clients, folder, net, once, pictures, plain, rand
from hostile_calls import system, traced


@once
def stored(name):
    return records.load_record(records.asset(f"{name}.json"))


def two_students():
    return [r for r in stored("distree_systems_digits").runs if r["way"] == "2 students"]


COUNTER = itertools.count()


def a_post():
    return flower.LocalPost([flower.Node(lambda words: None)])


def a_work():
    return dict(
        method=federated.EEFL(), build=lambda: net(2), train=pictures(40), clients=clients()
    )


def latent_runs(axis="gamma"):
    return stored(f"latent_{axis}_shapes16")


def a_round():
    method = federated.EEFL(participation=1.0)
    return dict(
        method=method,
        state=method.setup(net(2)),
        train=pictures(40),
        clients=clients(),
        rnd=0,
        streams=Streams(0),
    )


def an_experiment():
    small = dict(data="digits", methods=["eefl"], n_train=80, n_test=40, rounds=1, clients=4)
    return runs.Experiment(dict(small, alone=False, seeds=1))


def run_kind():
    return an_experiment(), "eefl", 0


def cell():
    return distree_experiments.distree_cell(data="digits")


def trained():
    return dict(cell=cell(), parts=[list(range(4))], shape=(1, 8, 8))


@once
def exits_of_runner():
    return runner.ExitRunner(net(), [0.5, 0.5, 0.0])


def no_runs(**kw):
    return dict(data="shapes", folder=folder() / "latent", **kw)


def new_folder():
    return Path(tempfile.mkdtemp(dir=folder())) / "run"


@once
def finished():
    return runs.run_experiment(an_experiment().config, new_folder(), 1, False)[1]


@once
def onnx_files():
    return runner.export_onnx(net(), folder() / "onnx", [0.5, 0.5, 0.0]).parent


@once
def a_run():
    return engine.simulate(
        federated.EEFL(participation=1.0),
        lambda: net(2),
        pictures(40),
        pictures(),
        clients(),
        1,
        progress=False,
    )


def a_measured_run():
    info = dict(times_limit=2.0, cpu_seconds=4.0, gflop=dict(eefl=160.0), rate=80.0)
    info |= dict(shares=dict(eefl=[0.5, 0.3, 0.2]), machine="here")
    return records.Record.begin(dict(run=dict(data="digits", rounds=1, seeds=[0])), **info)


CALLS = {
    # benchmarks
    "torchdistill_job": lambda: dict(student=plain(), teacher=plain(), data=pictures(), batch=4),
    "distill_jobs": lambda: dict(batch=4, steps=1),
    "bench_distill": lambda: dict(rounds=1, batch=4),
    "bench_browser": lambda: dict(rounds=2),
    "stream_job": lambda: dict(
        runner=exits_of_runner(), x=rand(8, 1, 8, 8), b=2, score=bench.Replay(torch.arange(8) % 3)
    ),
    "exit_jobs": lambda: dict(
        net=net(), x=rand(8, 1, 8, 8), exits=torch.arange(8) % 3, batches=(4,), ones=2
    ),
    "exit_rows": lambda: dict(
        times={
            ("float32", name, 4): [[0.1]] for name in ("plain PyTorch", "always last", "runner")
        },
        saving=lambda n: 2.0,
    ),
    "bench_exits": lambda: dict(rounds=1),
    "run_gflop": lambda: dict(config=dict(rounds=1)),
    "bench_run": lambda: dict(config=dict(rounds=1)),
    "run_table": lambda: dict(record=a_measured_run()),
    # runs
    "run_job": lambda: dict(zip(("exp", "kind", "seed"), run_kind()), folder=folder() / "job"),
    "Experiment": lambda: dict(config=an_experiment().config, costs=True),
    "run_jobs": lambda: dict(exp=an_experiment(), folder=folder() / "jobs"),
    "run_experiment": lambda: dict(
        config=an_experiment().config, folder=new_folder(), workers=1, progress=False
    ),
    "resume_experiment": lambda: dict(folder=finished(), workers=1, progress=False),
    "measure_run": lambda: dict(
        run=a_run(), train=pictures(40), test=pictures(), clients=clients(), costs=[1.0, 2.0]
    ),
    "clients_figure": lambda: dict(record=stored("digits_default")),
    # DistrEE
    "new_system": lambda: dict(trained(), n_classes=10),
    "measure_failures": lambda: dict(valid=answers(), test=answers(), requests=20),
    "run_distree": lambda: dict(
        name="systems", data="digits", folder=folder() / "distree", workers=1
    ),
    "way_gain": lambda: dict(
        record=stored("distree_systems_digits"), way="2 students", base="1 student"
    ),
    "over_mixture": lambda: dict(run=two_students()[0], rule="partial logits", budget=0.5),
    "compare_rules": lambda: dict(runs=two_students(), rule="partial logits"),
    "plot_branches": lambda: dict(record=stored("distree_weights_digits")),
    "plot_systems": lambda: dict(record=stored("distree_systems_digits")),
    "plot_sensitivity": lambda: dict(
        records={"digits": (stored("distree_systems_digits"), "2 students")}
    ),
    "plot_failures": lambda: dict(record=stored("distree_failures_digits")),
    "failure_cost": lambda: dict(
        record=stored("distree_failures_digits"), way="plain", condition="1 device dead"
    ),
    "ray_cluster": dict,
    "RaySystem": lambda: dict(system=system()),
    "Seen": dict,
    "Outcomes": lambda: {k: v for k, v in vars(traced()).items()},
    # exits
    "train_trained": lambda: dict(data="cifar10", net="wrn", folder=folder() / "trained"),
    "tier_models": a_round,
    "pays": lambda: dict(data="shapes", folder=folder() / "pays", workers=1),
    "gains": lambda: dict(record=stored("exits_pays_shapes"), way="BoostNet"),
    "plot_pays": lambda: dict(record=stored("exits_pays_shapes")),
    "learning_rates": lambda: dict(folder=folder() / "rates", workers=1),
    "rate_claim": lambda: dict(record=stored("exits_rates_shapes"), way="BoostNet", base="joint"),
    "OnnxRunner": lambda: dict(folder=onnx_files()),
    # federated
    "Run": lambda: dict(method=federated.EEFL(), seed=0, state={}, log=[]),
    "play_round": a_round,
    # Flower
    "believed": lambda: dict(method=federated.EEFL(), engine=None),
    "work_for": lambda: dict(a_work(), seed=0),
    "Node": lambda: dict(work_of=lambda words: None),
    "Place": lambda: dict(address=None, of=2),
    "Waiting": lambda: dict(patience=60.0, least=1),
    "Remote": lambda: dict(method=federated.EEFL(), post=a_post(), nodes=1),
    "FlowerPost": lambda: dict(grid=None),
    "flower_apps": lambda: dict(a_work(), test=pictures(), rounds=1),
    "play_settings": lambda: dict(post=a_post(), settings={}, folder=folder() / "played", nodes=1),
    "write_certificates": lambda: dict(folder=folder() / f"keys{next(COUNTER)}", nodes=1),
    "start_server": lambda: dict(folder=folder(), port=9000),
    "start_node": lambda: dict(folder=folder(), number=0, server="localhost:9000"),
    "Federation": lambda: dict(folder=folder() / f"f{next(COUNTER)}", nodes=1),
    "submit": lambda: dict(folder=folder(), settings={}, out=folder() / "submitted"),
    "compare_engines": lambda: dict(out=folder() / "engines"),
    # latents
    "save_experiment": lambda: dict(
        name="gamma", data="shapes", results=[], folder=folder() / "latent"
    ),
    "tune": no_runs,
    "chosen_hyper": no_runs,
    "sweep_gamma": no_runs,
    "sweep_n": no_runs,
    "sweep_l": no_runs,
    "sweep_transfer": no_runs,
    "compare": no_runs,
    "latent_space": no_runs,
    "differences": lambda: dict(record=latent_runs(), a="LKD", b="KD", gamma=1),
    "plot_sweep": lambda: dict(record=latent_runs(), axis="gamma"),
    "plot_differences": lambda: dict(record=latent_runs(), axis="gamma"),
    "best_value": lambda: dict(record=latent_runs("l"), axis="l"),
    "step_differences": lambda: dict(
        record=latent_runs("n"), method="LKD", axis="n", to=512, base=256
    ),
}

LAZY = dict.fromkeys(
    ("run_distree", "pays", "learning_rates", "train_trained", "tune", "compare", "latent_space"),
    "trains for minutes",
)
LAZY |= dict.fromkeys(("sweep_gamma", "sweep_n", "sweep_l", "sweep_transfer"), "trains for minutes")
LAZY |= dict.fromkeys(
    ("bench_distill", "bench_exits", "exit_jobs", "distill_jobs"),
    "measures times; see test_runner.py",
)
LAZY |= dict.fromkeys(("run_gflop", "bench_run"), "trains; see test_bench.py")
LAZY |= dict.fromkeys(("ray_cluster", "RaySystem"), "starts Ray; see test_scale_out.py")
LAZY |= dict.fromkeys(
    ("flower_apps", "write_certificates", "Federation", "start_server", "start_node"),
    "needs Flower; see tests/flower",
)
LAZY |= dict.fromkeys(("submit", "compare_engines", "play_settings"), "trains; see tests/flower")
LAZY |= dict(
    save_experiment="needs trained teachers",
    bench_browser="drives a browser; see test_browser.py",
    torchdistill_job="None where torchdistill is not installed",
    chosen_hyper="reads what `tune` wrote",
)

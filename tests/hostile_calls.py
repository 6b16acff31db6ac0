"""Small valid calls of the package's functions and classes, for test_hostile.py. An entry is made only when it is used."""

import functools, math, tempfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from torch import nn
from darkdistill_nb.experiments import settings
from darkdistill_nb.app import pages
from darkdistill_nb.core import data, parallel, plots, records
from darkdistill_nb.federated import baselines
from darkdistill_nb.federated import difficulty
from darkdistill_nb.federated import engine
from darkdistill_nb.federated import reefl
from darkdistill_nb.federated import widths
from darkdistill_nb.distill import losses as distillation
from darkdistill_nb.distree import students as distributed
from darkdistill_nb.exits import networks as early_exit
from darkdistill_nb.exits import training as exit_training
from darkdistill_nb.federated import method as federated
from darkdistill_nb.federated import generator
from darkdistill_nb.federated import privacy
from darkdistill_nb.exits import control
from darkdistill_nb.experiments import against, published, results
from darkdistill_nb.experiments import federated as federated_experiments
from darkdistill_nb.experiments import rung
from darkdistill_nb.exits.scores import Confidence, Energy, Score
from darkdistill_nb.distill import latent
from darkdistill_nb.distill import online
from darkdistill_nb.exits import runner
from darkdistill_nb.federated import stacked
from darkdistill_nb.distree.devices import Cluster, Device, Link, fixed_policy
from darkdistill_nb.distree.simulator import simulate_devices

once = functools.cache
KEPT = tempfile.TemporaryDirectory()  # goes when Python ends
E, C, N = 3, 4, 12  # exits, classes, pictures


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rng():
    return torch.Generator().manual_seed(0)


@once
def labels(n=N):
    return torch.arange(n) % C


@once
def pictures(n=N):
    return data.ArrayData(rand(n, 1, 8, 8), labels(n), difficulty=torch.linspace(0, 1, n))


@once
def net(stages=E):
    return early_exit.cnn((1, 8, 8), C, stages=stages, width=4)


def asked():
    "What `fit` is asked to do for a client."
    mine = net(2)
    start = {k: v.clone() for k, v in mine.state_dict().items()}
    loss = lambda raw, y: nn.functional.cross_entropy(raw[-1], y)
    rest = dict(epochs=1, lr=0.1, momentum=0.9, weight_decay=0.0, batch_size=4)
    end = dict(loss=loss, forward=lambda x: mine(x), generator=rng())
    return dict(net=mine, start=start, data=pictures(), **rest, **end)


def radii(r):
    "A disc as an outline."
    return torch.full((64,), r), torch.full((64,), -1.0)


@once
def stage_runs():
    return records.load_record(records.asset("stage_shapes.json"))


@once
def digits_runs():
    return records.load_record(records.asset("digits_default.json"))


def trunk():
    return {k: v for k, v in net().state_dict().items() if not k.startswith("exits.")}


@once
def short_run():
    "One round of four clients, as keywords of `measure_unalignment`."
    clients = federated.make_clients(labels(48), 6, 5.0, (0.5, 0.5), seed=0, valid=0.0)
    method = federated.EEFL(participation=1.0, batch_size=4)
    one = engine.simulate(method, lambda: net(2), pictures(48), pictures(), clients, 1)
    return dict(run=one, train=pictures(48), clients=clients, test=pictures(48))


@once
def privacy_runs():
    how = dict(seeds=2, data=["digits"], workers=1, rounds=1)
    return privacy.run_privacy(folder(), **how)


@once
def small_smooth_net():
    return privacy.smooth_net((1, 4, 4), C, 2)


def logits(e=E, n=N, seed=0):
    return rand(e, n, C, seed=seed)


def scores():
    return rand(E, N).abs().clamp(max=0.99)


def right():
    return rand(E, N, seed=1) > 0


COSTS = [1.0, 2.0, 3.0]


@once
def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, C))


@once
def answers():
    return distributed.make_answers(2, E, 24, C, length=8)


@once
def system():
    net = distributed.student_net
    students = [net("cnn", (1, 8, 8), C, 4, width=4, stages=2) for _ in range(2)]
    return distributed.DistrEE(students, [4, 4], C)


@once
def clients():
    return federated.make_clients(labels(40), 4, 5.0, (0.5, 0.5))


@once
def latent_net():
    return latent.latent_net("student-1", 8, C, (1, 8, 8))


@once
def gen():
    return generator.Generator((4, 4, 4), C, 4, 8)


@once
def page_parts():
    table = pages.Table("a", ["b"], [["1"]])
    rest = dict(figure=plots.figure(), table=table, narrow={})
    return dict(kind="splits", data=dict(stock=[1]), controls=[], **rest)


@once
def a_page():
    return pages.Page(**page_parts())


@once
def folder():
    return Path(KEPT.name)


def weights(n=8):
    w = rand(n, n).abs()
    return w + w.T


def simple_loss(student, teacher, y, *rest):
    return (student["logits"] - teacher["logits"]).square().mean()


def devices():
    return Cluster((Device(),) * 2, (Link(),) * 2)


def stu_tea(**kw):
    return dict(student=rand(N, C), teacher=rand(N, C, seed=1), **kw)


def exits_and_labels():
    return dict(logits=logits(), y=labels())


def objective():
    return exit_training.Joint()


def scored(**kw):
    return dict(scores=scores(), right=right(), costs=COSTS, **kw)


def saved_progress(*without):
    one = net()
    opt = torch.optim.SGD(one.parameters(), lr=0.1)
    kw = dict(path=folder() / "p.safetensors", net=one, opt=opt, generators=[rng()], rows=[])
    return {k: v for k, v in kw.items() if k not in without}


CALLS = {
    "plain_wrn": lambda: dict(depth=10, widen=1, n_classes=C),
    "exit_list": lambda: dict(n=16, first=4),
    "t_interval": lambda: dict(values=[1.0, 2.0, 3.0]),
    "verdict": lambda: dict(interval=(0.15, 0.1, 0.2)),
    "check": lambda: dict(ok=True, name="a", value=1, allowed="one"),
    "number": lambda: dict(value=1.0, name="a"),
    "whole": lambda: dict(value=1, name="a"),
    "as_numbers": lambda: dict(answer=[1.0], shape=(1,)),
    "agree": lambda: dict(answer=[1.0], wanted=[1.0], hint="One."),
    "answer_of": lambda: dict(function=labels),
    "is_grading": dict,
    "Lab": lambda: dict(name="lab01_first_federation"),
    "choice": lambda: dict(value="a", name="a", allowed=["a"]),
    "flag": lambda: dict(value=True, name="a"),
    "finite": lambda: dict(x=rand(3), name="a"),
    "alignment_weights": lambda: dict(d=rand(N).abs(), mu=rand(E).abs()),
    "DarkDistill": dict,
    "hatched": lambda: dict(colour="#000000"),
    "class_look": lambda: dict(c=1),
    "outlines": lambda: dict(steps=64),
    "shapes": lambda: dict(n=4, size=16),
    "outline_overlap": lambda: dict(a=radii(0.8), b=radii(0.9), turns=4, grid=8),
    "random_outlines": lambda: dict(kinds=2),
    "random_shapes": lambda: dict(n=4, size=16, kinds=2),
    "load": lambda: dict(name="digits", n_train=20, n_test=20),
    "mel": lambda: dict(hertz=440.0),
    "hertz": lambda: dict(mels=440.0),
    "mel_filters": lambda: dict(n_mels=4, n_fft=64, rate=1000, low=20.0),
    "log_mel": lambda: dict(
        waves=np.zeros((1, 400)), rate=1000, n_mels=4, frames=4, window=0.1, floor=1e-6
    ),
    "effective_classes": lambda: dict(gamma=0.5, n_classes=C),
    "class_mix": lambda: dict(clients=3, n_classes=C, gamma=0.5),
    "dirichlet_indices": lambda: dict(y=labels(40), clients=3, gamma=5.0),
    "dirichlet_counts": lambda: dict(y=labels(40), clients=3, gamma=5.0),
    "dirichlet_split": lambda: dict(y=labels(40), clients=3, gamma=5.0),
    "client_histogram": lambda: dict(
        y=labels(), parts=[torch.arange(6), torch.arange(6, N)], n_classes=C
    ),
    "dirichlet_draw": lambda: dict(y=labels(40), n=5, gamma=1.0),
    "resample_test": lambda: dict(y=labels(40), p=torch.full((C,), 1 / C), n=10),
    "show_images": lambda: dict(data=pictures(), columns=4),
    "sample_difficulty": lambda: dict(logits=rand(N, C), y=labels()),
    "measure_difficulty": lambda: dict(net=net(), objective=objective(), data=pictures()),
    "bins_of": lambda: dict(width=1.0),
    "DifficultyHistogram": lambda: dict(counts=torch.ones(C, 10, dtype=torch.long)),
    "DifficultyPairs": lambda: dict(d=torch.ones(N), y=labels(), n_classes=C),
    "Assessment": dict,
    "kd_loss": stu_tea,
    "logit_mse": lambda: stu_tea(y=labels()),
    "CropFlip": dict,
    "Views": lambda: dict(data=pictures()),
    "teacher_table": lambda: dict(teacher=plain(), data=pictures()),
    "distill": lambda: dict(
        student=plain(), teacher=plain(), data=pictures(), loss=simple_loss
    ),
    "dkd_loss": lambda: stu_tea(y=labels()),
    "dist_loss": stu_tea,
    "RKD": dict,
    "filter_graph": lambda: dict(activity=rand(N, 8).abs(), top=4),
    "strongest_links": lambda: dict(W=weights(), keep=0.5),
    "modularity": lambda: dict(W=weights(), groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
    "communities": lambda: dict(W=weights()),
    "partition_filters": lambda: dict(W=weights(), importance=rand(8).abs(), n_parts=2),
    "student_net": lambda: dict(
        arch="cnn", input_shape=(1, 8, 8), n_classes=C, length=4, width=4, stages=2
    ),
    "DistrEE": lambda: dict(
        students=list(system().students), sizes=[4, 4], n_classes=C
    ),
    "branch_weights": lambda: dict(n_exits=E),
    "DistrEELoss": lambda: dict(
        system=system(), parts=[list(range(4)), list(range(4, 8))]
    ),
    "system_answers": lambda: dict(system=system(), data=pictures()),
    "make_answers": lambda: dict(n=12, n_classes=C, n_exits=E),
    "Exit": lambda: dict(reduce=nn.Flatten(), width=4, n_classes=C),
    "PooledMap": dict,
    "scale_gradient": lambda: dict(x=rand(3), s=0.5),
    "block_of": lambda: dict(name="stages.0.conv.weight"),
    "EarlyExitNet": lambda: dict(
        stem=net().stem,
        stages=list(net().stages),
        exits=list(net().exits),
        input_shape=(1, 8, 8),
        n_classes=C,
    ),
    "ConvStage": lambda: dict(width=4),
    "cnn": lambda: dict(n_classes=C, stages=2, width=4),
    "WideBlock": lambda: dict(cin=4, cout=4),
    "Project": lambda: dict(reduce=nn.Flatten(), width=4, length=4),
    "wrn": lambda: dict(depth=10, input_shape=(3, 8, 8), n_classes=C),
    "conv_norm": lambda: dict(cin=4, cout=4),
    "ScaleLayer": lambda: dict(scale=0, cin=4, new=2),
    "CoarseHead": lambda: dict(shape=(4, 4, 4), width=4),
    "msdnet": lambda: dict(
        input_shape=(3, 16, 16), n_classes=C, exits=2, first=1, step=1, channels=4, growth=2, head=8
    ),
    "TokenMean": dict,
    "build_net": lambda: dict(arch="cnn", input_shape=(1, 8, 8), n_classes=C, width=4),
    "exit_cell": lambda: dict(data="shapes"),
    "three_parts": lambda: dict(name="digits", n_train=400, n_test=20),
    "Joint": dict,
    "BoostNet": dict,
    "exit_weights": lambda: dict(weights=None, E=E),
    "exit_shares": lambda: dict(E=E),
    "exit_partition": lambda: dict(logits=list(logits())),
    "sample_weights": lambda: dict(u=rand(N, E)),
    "WeightNet": lambda: dict(exits=E, hidden=8),
    "L2W": dict,
    "SelfDistillation": dict,
    "Mutual": dict,
    "objective_by_name": lambda: dict(name="joint"),
    "fit_exits": lambda: dict(net=net(), data=pictures(), objective=objective()),
    "train_exits": lambda: dict(
        build=net, train=pictures(), test=pictures(), objective=objective()
    ),
    "gradient_share": lambda: dict(
        objective=objective(), raw=list(logits()), y=labels(), difficulty=torch.linspace(0, 1, N), bins=2
    ),
    "Hint": lambda: dict(student_width=4, teacher_width=8),
    "lpd_loss": lambda: dict(student=rand(N, 6), teacher=rand(N, 6, seed=1)),
    "CRD": lambda: dict(labels=labels(), student_width=4, teacher_width=8, dim=4),
    "method_loss": lambda: dict(name="kd"),
    "Client": lambda: dict(id=0, tier=0, train=torch.arange(4), valid=torch.arange(4, 6)),
    "tier_sizes": lambda: dict(clients=4, shares=(0.5, 0.5)),
    "make_clients": lambda: dict(y=labels(40), clients=4, gamma=5.0),
    "check_clients": lambda: dict(clients=clients(), images=40, exits=E),
    "Adam": lambda: dict(params=[torch.ones(2)], lr=0.1, betas=(0.5, 0.9), eps=1e-3),
    "SGD": lambda: dict(params=[torch.ones(2)], lr=0.1, momentum=0.9, weight_decay=1e-4),
    "Mean": lambda: {},
    "Added": lambda: {},
    "Updates": lambda: dict(updates=(), keep=True),
    "steady": lambda: dict(part=lambda self: None),
    "Row": lambda: dict(
        paper="ours", claim="one", published="", source="here", ours="", verdict="holds", record=None
    ),
    "darkdistill_rows": dict,
    "latent_rows": dict,
    "distree_rows": dict,
    "own_rows": dict,
    "results_table": lambda: dict(rows=results.own_rows()),
    "tally": lambda: dict(rows=results.own_rows()),
    "plot_tally": lambda: dict(rows=dict(ours=results.own_rows())),
    "EEFL": dict,
    "simulate": lambda: dict(
        method=federated.EEFL(),
        build=lambda: net(2),
        train=pictures(40),
        test=pictures(),
        clients=clients(),
        rounds=1,
        progress=False,
    ),
    "Here": lambda: dict(method=federated.EEFL(), train=pictures(40), streams=None),
    "Availability": dict,
    "train_alone": lambda: dict(
        method=federated.EEFL(),
        build=lambda: net(2),
        train=pictures(40),
        test=pictures(),
        clients=clients(),
        rounds=1,
        progress=False,
    ),
    "FedAvg": dict,
    "FedMD": dict,
    "digest_loss": lambda: dict(kind="mae"),
    "score_bytes": lambda: dict(images=4, width=4),
    "Generator": lambda: dict(latent_shape=(4, 4, 4), n_classes=C, d_eps=4, d_h=8),
    "found_difficulty": lambda: dict(logits=rand(N, C), y=labels()),
    "log_wealth": lambda: dict(x=np.full((5, 2), 0.1), R=0.5, delta=0.1),
    "hb_p_value": lambda: dict(risk=np.array([0.1]), n=50, epsilon=0.3),
    "passes": lambda: dict(L=np.full((50, 3), 0.01), epsilon=0.3),
    "control_risk": lambda: dict(
        scores=scores(), losses=np.random.default_rng(0).random((E, N)), epsilon=0.5
    ),
    "LatencyController": lambda: dict(budget=1.0),
    "ShadowMonitor": lambda: dict(grid=[0.5, 0.1], epsilon=0.3, window=50),
    "BanditController": lambda: dict(arms=[0.1, 0.5], budget=1.0),
    "simulate_queue": lambda: dict(
        controller=control.LatencyController(2.0), gaps=[3.0] * N, scores=scores(), costs=COSTS
    ),
    "Energy": dict,
    "Gate": lambda: dict(exits=E, n_classes=C),
    "exit_outputs": lambda: dict(net=net(), data=pictures()),
    "read_thresholds": lambda: dict(T=[0.5, 0.5, 0.0]),
    "budget_thresholds": lambda: dict(conf=scores(), shares=[0.5, 0.25, 0.25]),
    "budget_curve": lambda: dict(
        valid=logits(), test=logits(seed=1), y=labels(), costs=COSTS, P=[10, 20]
    ),
    "shares_for_budget": lambda: dict(costs=COSTS, budget=2.0),
    "stopping_thresholds": lambda: scored(mu=0.1),
    "thresholds_for_budget": lambda: dict(
        valid_scores=scores(), right=right(), costs=COSTS, budget=2.0
    ),
    "fit_gate": lambda: dict(
        logits=logits(), y=labels(), costs=COSTS, budget=2.0, steps=2, hidden=4
    ),
    "oracle": lambda: dict(right=right(), costs=COSTS),
    "policy_table": lambda: dict(
        valid={"a": scores()},
        test={"a": scores()},
        right_valid=right(),
        right_test=right(),
        costs=COSTS,
        budget=2.0,
    ),
    "policy_curve": lambda: dict(
        valid=scores(),
        test=scores(),
        right_valid=right(),
        right_test=right(),
        costs=COSTS,
        budgets=[1.5, 2.0],
    ),
    "reliability": lambda: dict(conf=scores(), right=right()),
    "ece": lambda: dict(conf=scores(), right=right()),
    "temperature": exits_and_labels,
    "plot_reliability": lambda: dict(confs={"a": scores()}, right=right()),
    "plot_depth": lambda: dict(
        exit=labels() % E, difficulty=torch.linspace(0, 1, N), n_exits=E
    ),
    "image_grid": lambda: dict(
        data=pictures(), exit=labels() % E, scores=scores(), each=2
    ),
    "conv_group": lambda: dict(in_shape=(1, 8, 8), widths=[4], pool=2),
    "LatentNet": lambda: dict(
        groups=[[4], [4]], pools=[2, 2], l=4, n_classes=C, in_shape=(1, 8, 8)
    ),
    "latent_net": lambda: dict(name="student-1", l=8, n_classes=C, in_shape=(1, 8, 8)),
    "lkd_loss": lambda: dict(
        z_s=rand(N, 8), z_t=rand(N, 8, seed=1), logits_s=rand(N, C), y=labels()
    ),
    "latents": lambda: dict(net=latent_net(), data=pictures()),
    "lkd": dict,
    "client_task": lambda: dict(pool=pictures(40), test=pictures(40), n=8, gamma=1.0),
    "small_shapes": lambda: dict(n_train=8, n_test=8),
    "match_transfer": lambda: dict(
        student=latent_net(), teacher=latent_net(), transfer=pictures(), epochs=1
    ),
    "map_latents": lambda: dict(spaces={"a": rand(N, 8)}),
    "latent_cell": lambda: dict(data="shapes", method="KD"),
    "LoRALinear": lambda: dict(base=nn.Linear(4, 4), parts={"q": 0}, rank=2),
    "DML": dict,
    "train_together": lambda: dict(
        nets=[plain(), nn.Sequential(nn.Flatten(), nn.Linear(64, C))],
        data=pictures(),
        loss=online.DML(),
    ),
    "entropy": lambda: dict(logits=rand(N, C)),
    "bidirectional_loss": stu_tea,
    "BDKD": dict,
    "self_distillation": lambda: dict(logits=list(logits()), y=labels()),
    "leave_with_parent": dict,
    "ExitStream": lambda: dict(runner=runner.ExitRunner(net(), [0.5, 0.5, 0.0])),
    "Device": dict,
    "Link": dict,
    "noise": lambda: dict(seed=0, n_devices=2, n_requests=3, n_exits=E),
    "Aggregator": lambda: dict(bias=np.zeros(C), n_students=2),
    "Policy": dict,
    "simulate_devices": lambda: dict(
        answers=answers(),
        policy=fixed_policy(np.ones((2, 24), int)),
        cluster=devices(),
        arrival=np.arange(4) * 1.0,
    ),
    "arrivals": lambda: dict(n=4, rate=1.0),
    "RandomExit": dict,
    "decision_points": lambda: dict(n_exits=E),
    "Together": dict,
    "PartialLogits": dict,
    "Quorum": dict,
    "SharedScore": dict,
    "system_thresholds": lambda: dict(
        policy="partial", valid=answers(), budget=0.6
    ),
    "evaluate_system": lambda: dict(policy="last", answers=answers()),
    "system_curve": lambda: dict(
        policy="partial", valid=answers(), test=answers(), budgets=[0.5, 0.8]
    ),
    "system_table": lambda: dict(
        policies={"a": "partial"}, valid=answers(), test=answers(), budget=0.6
    ),
    "lambda_grid": lambda: dict(policy="partial", answers=answers(), size=5),
    "control_system": lambda: dict(
        policy="partial", answers=answers(), epsilon=0.5, lams=[0.9, 0.5, 0.1]
    ),
    "seed_for": lambda: dict(seed=0),
    "Streams": dict,
    "check_batches": lambda: dict(net=plain(), n=N, batch_size=4),
    "fit": lambda: dict(net=plain(), data=pictures()),
    "predict": lambda: dict(net=plain(), data=pictures()),
    "plus_minus": lambda: dict(values=[1.0, 2.0]),
    "pick_device": lambda: dict(name="cpu"),
    "style": lambda: dict(i=1),
    "figure": dict,
    "spread": lambda: dict(values=[1.0, 2.0]),
    "html_table": lambda: dict(head=["a"], body=[["1"]]),
    "in_short": lambda: dict(value=1.0),
    "strip": lambda: dict(
        cells=np.zeros((N, 8, 8, 3), dtype=np.uint8), exit=np.zeros(N, int), exits=E, m=2
    ),
    "as_cells": lambda: dict(x=rand(N, 1, 8, 8)),
    "DirichletExplorer": lambda: dict(y=labels(40), clients=4),
}


def curves():
    return {"a": dict(cost=[1.0, 2.0], accuracy=[0.5, 0.6])}


@once
def traced():
    policy = fixed_policy(np.ones((2, 24), int))
    return simulate_devices(answers(), policy, devices(), np.arange(4) * 1.0, trace=True)


def answer_plots(**kw):
    return dict(runs={"a": traced()}, **kw)


@once
def seeds():
    rows = [dict(seed=i, accuracy=[0.1, 0.2, 0.3]) for i in (0, 1)]
    return {"Joint": rows, "BoostNet": rows}


@once
def middle():
    with torch.no_grad():
        return net().stages[0](net().stem(pictures().x))


@once
def histogram():
    return difficulty.DifficultyHistogram(torch.ones(C, 10, dtype=torch.long))


def taught():
    views = distillation.Views(pictures(), views=1)
    table = dict(logits=rand(1, N, C), features=rand(1, N, 8).abs())
    return views, table


@once
def tensors():
    path = folder() / "tensors.safetensors"
    records.save_tensors(path, dict(a=torch.ones(2)))
    return path


ROW = ("system", "cpu_ms", "wall_ms", "slowest", "memory", "limit")


def a_visit():
    method, data = federated.EEFL(), pictures()
    client = federated.Client(0, 1, torch.arange(N), torch.arange(0))
    return dict(method=method, state=method.setup(net()), train=data, client=client, times=1)


def students_of_two():
    shapes = dict(partial=np.zeros((2, 2, 3, 4)), scores=np.zeros((2, 2, 3)))
    return dict(**shapes, y=np.arange(3), costs=np.array([[1.0, 2], [1, 2]]))


MORE = {
    "interleave": lambda: dict(jobs={"a": lambda: 0.1}, rounds=1),
    "ratios": lambda: dict(times={"a": [1.0], "b": [2.0]}, base="a"),
    "exit_table": lambda: dict(rows=[], title="a"),
    "each": lambda: dict(job=str, items=[1], workers=1),
    "json_or_text": lambda: dict(text="1"),
    "near": lambda: dict(word="a", choices=["a", "b"]),
    "job_steps": lambda: dict(config=settings.make_config(), kind="run"),
    "pair_loss": lambda: dict(
        teacher=net(), student=net(), x=middle(), d=rand(N).abs(), objective=objective()
    ),
    "distree_cell": lambda: dict(data="shapes"),
    "plot_filters": lambda: dict(
        W=weights(), parts=[[0, 1, 2, 3], [4, 5, 6, 7]], importance=rand(8).abs()
    ),
    "vit": lambda: dict(
        n_classes=C, img_size=32, embed_dim=24, depth=4, num_heads=3, exits=(2, 4)
    ),
    "paired_gain": lambda: dict(results=seeds()),
    "difficulty_experiment": lambda: dict(
        n_train=40, n_test=40, seeds=(0,), width=4, epochs=0
    ),
    "Update": lambda: dict(client=0, tier=1, samples=1, weights={}, loss=0.0),
    "single_exit": lambda: dict(
        body=nn.Flatten(), head=nn.Linear(64, C), input_shape=(1, 8, 8), n_classes=C
    ),
    "Party": lambda: dict(id=0, net=net(), train=pictures(), test=pictures()),
    "generator_losses": lambda: dict(
        x=middle(),
        y=labels(),
        d=rand(N).abs(),
        teacher=net(),
        reference=net(),
        objective=objective(),
    ),
    "plot_policies": lambda: dict(curves=curves()),
    "plot_auroc": lambda: dict(table={"a": [0.5, 0.6, 0.7]}),
    "plot_latents": lambda: dict(maps={"a": rand(N, 2).numpy()}, y=labels()),
    "setup": lambda: dict(data="shapes"),
    "data_name": lambda: dict(data="shapes"),
    "make_loss": lambda: dict(method="CE", hyper={}, z_t=rand(N, 8), y=labels()),
    "at_an_edge": lambda: dict(method="CE", hyper={}),
    "add_lora": lambda: dict(
        net=early_exit.vit(
            n_classes=C, img_size=32, embed_dim=24, depth=2, num_heads=3, exits=(1, 2)
        ),
        rank=2,
    ),
    "only_from_main": dict,
    "Workers": lambda: dict(n=1, start=parallel.constantly),
    "constantly": lambda: dict(answer=print),
    "one_thread": dict,
    "tell": dict,
    "sendable": lambda: dict(what=1),
    "cores": dict,
    "machine": dict,
    "Memory": lambda: dict(path=folder() / "machine.json"),
    "processes_for": lambda: dict(work=10.0, n=2, gain=1.5, start=1.0),
    "fastest": lambda: dict(f=int, times=1),
    "visit_parts": lambda: a_visit(),
    "Workload": lambda: dict(clients=2, samples=2, batch=1),
    "federated_table": lambda: dict(rows=[dict(zip(ROW, ("a", 1.0, 1.0, 1.0, 1.0, 1.0)))], title="a"),
    "WorkerLost": lambda: dict(job=0, pid=1, code=-9, begun=True),
    "as_array": lambda: dict(a=rand(3)),
    "fits_in_memory": lambda: dict(size=10, what="it"),
    "matrix_rate": lambda: dict(n=8),
    "warn_if_slow": lambda: dict(dtype=torch.float32),
    "record": lambda: dict(work=dict, device="cpu"),
    "size_for": lambda: dict(n=3),
    "Launches": lambda: dict(
        runner=runner.ExitRunner(net(), [0.5, 0.5, 0.0], plan="whole"), most=2
    ),
    "Plan": lambda: dict(name="whole", us={}),
    "Visit": lambda: asked(),
    "Noted": lambda: dict(visit=stacked.Visit(**asked())),
    "Stack": lambda: dict(
        visit=stacked.Visit(**asked()), copies=2, batch=3, tensors=[], by_image=True
    ),
    "Trained": lambda: dict(weights={}, losses=[1.0]),
    "fit_together": lambda: dict(visits=[stacked.Visit(**asked())]),
    "Tape": lambda: dict(known=dict(x=rand(2))),
    "Step": lambda: dict(net=net()),
    "Taped": lambda: dict(low=False),
    "Given": lambda: dict(loss=lambda raw, y: raw.sum()),
    "in_bf16": lambda: dict(device="cpu"),
    "Abreast": lambda: dict(net=net(), width=2),
    "split_group": lambda: dict(g=runner.Group([0, 1], rand(2, 3)), size=1),
    "live_policy": lambda: dict(policy="last", n_exits=E),
    "joint_policy": lambda: dict(points=[1]),
    "plot_timeline": lambda: dict(o=traced(), request=0),
    "plot_latency": answer_plots,
    "load_tensors": lambda: dict(path=tensors()),
    "Registry": lambda: dict(what="score", base=Score, msp=Confidence),
    "Keyword": lambda: dict(name="a", default=1, kind=int, help="b"),
    "is_address": lambda: dict(text="a:B"),
    "load_class": lambda: dict(address="pathlib:Path"),
    "help_line": lambda: dict(address="darkdistill_nb.core.registry:Registry"),
    "keywords_of": lambda: dict(cls=Energy),
    "with_axes": lambda: dict(x=torch.ones(2, 3), name="z", axes="(B, K)"),
    "check_logits": lambda: dict(z=torch.ones(2, 3), name="z"),
    "check_labels": lambda: dict(y=torch.tensor([0, 2]), logits=torch.ones(2, 3)),
    "at_least_32": lambda: dict(x=torch.ones(2, 3)),
    "follower": lambda: dict(generator=rng()),
    "drawn_state": lambda: dict(net=net()),
    "save_progress": lambda: saved_progress(),
    "load_progress": lambda: saved_progress("rows"),
    "experiment_parser": lambda: dict(command="try", about="A try."),
    "Settings": dict,
    "grouped": lambda: dict(cls=Energy, options=dict(T=2.0)),
    "laid_open": lambda: dict(options=dict(T=2.0)),
    "GeneratorSettings": dict,
    "option_of": lambda: dict(name="gamma"),
    "todays_names": lambda: dict(config=dict(policy="joint")),
    "job_name": lambda: dict(kind="eefl", seed=0),
    "Table": lambda: dict(caption="a", columns=["b"], rows=[["1"]]),
    "page_script": dict,
    "live_script": dict,
    "bench_explorers": lambda: dict(rounds=2),
    "pack_array": lambda: dict(a=np.eye(2)),
    "Page": lambda: dict(page_parts()),
    "StoredPage": lambda: dict(page=a_page()),
    "page_fragment": lambda: dict(spec={**a_page().spec, "figure": a_page().figure}),
    "save_page": lambda: dict(path=folder() / "page.html", pages=[a_page()]),
    "DistillationModel": lambda: dict(teacher=np.eye(3), student=np.eye(3), y=np.arange(3)),
    "DistillationExplorer": lambda: dict(teacher=np.eye(3), student=np.eye(3), y=np.arange(3)),
    "AlignmentModel": lambda: dict(y=labels(40), clients=4, exits=2),
    "AlignmentExplorer": lambda: dict(y=labels(40), clients=4, exits=2),
    "DistreeModel": lambda: students_of_two(),
    "DistreeExplorer": lambda: students_of_two(),
    "DifficultyModel": lambda: dict(scores=dict(a=np.arange(3)), right=np.ones((2, 3), bool)),
    "DifficultyExplorer": lambda: dict(scores=dict(a=np.arange(3)), right=np.ones((2, 3), bool)),
    "StoredExplorer": lambda: dict(model=SimpleNamespace(at=lambda **state: {})),
    "LatentModel": lambda: dict(sweeps=dict(a=dict(n=[dict(method="CE", seed=0, n=1, uni=0.5)]))),
    "LatentExplorer": lambda: dict(sweeps=dict(a=dict(n=[dict(method="CE", seed=0, n=1, uni=0.5)]))),
    "map_generators": lambda: dict(grid=[[2, 4, True, 1]], epochs=1, images=40, shown=1),
    "GeneratorModel": lambda: dict(generators=dict(a=dict(got=np.ones((2, 2)))), asked=[1.0, 2], classes="xy"),
    "GeneratorExplorer": lambda: dict(generators=dict(a=dict(got=np.ones((2, 2)))), asked=[1.0, 2], classes="xy"),
    "vote_shares": lambda: dict(coverage=[1.0, 0.5]),
    "ModelExplorer": lambda: dict(model=SimpleNamespace(at=lambda **state: {})),
    "Explorer": dict,
    "ExitExplorer": lambda: scored(),
    # no parameter of a plain type; the valid call is tried
    "Replay": lambda: dict(exits=labels() % E),
    "shown": lambda: dict(value=1),
    "scalar": lambda: dict(value=1),
    "same_shape": lambda: dict(a=rand(3), b=rand(3)),
    "every_tenth": lambda: dict(y=torch.arange(400) % C),
    "ArrayData": lambda: dict(x=rand(N, 1, 8, 8), y=labels()),
    "pixel_stats": lambda: dict(x=rand(N, 1, 8, 8)),
    "difficulty_law": lambda: dict(d=0.5),
    "pearson_gap": lambda: dict(a=rand(N, C), b=rand(N, C)),
    "rkd_distance": stu_tea,
    "rkd_angle": stu_tea,
    "Taps": lambda: dict(net=plain()),
    "transfer_loss": stu_tea,
    "exit_losses": lambda: dict(raw=list(logits()), y=labels()),
    "attention_map": lambda: dict(a=rand(N, 2, 4, 4)),
    "at_loss": lambda: dict(student=rand(N, 2, 4, 4), teacher=rand(N, 2, 4, 4)),
    "diversity_loss": lambda: dict(eps=rand(N, 4), x=rand(N, 8)),
    "sample_losses": lambda: dict(logits=logits()),
    "last_of_prefix": lambda: dict(ok=np.array([True, False])),
    "confidence": lambda: dict(logits=logits()),
    "Confidence": dict,
    "Margin": dict,
    "Entropy": dict,
    "Logit": dict,
    "Patience": dict,
    "Saturation": dict,
    "Difference": dict,
    "anytime": exits_and_labels,
    "take_exit": lambda: dict(conf=scores(), T=[0.5, 0.5, 0.0]),
    "evaluate_thresholds": lambda: scored(T=[0.5, 0.5, 0.0]),
    "quantile_thresholds": lambda: dict(scores=scores(), fractions=[0.5, 0.25]),
    "failure_auroc": lambda: dict(scores=scores(), right=right()),
    "aurc": lambda: dict(scores=scores(), right=right()),
    "static_mixture": lambda: dict(costs=COSTS, accuracy=[0.5, 0.6, 0.7], budget=2.0),
    "write_thresholds": lambda: dict(T=[0.5, 0.5, -math.inf]),
    "latent_variance": lambda: dict(z=rand(N, 8)),
    "loop_exits": lambda: dict(net=net(), x=rand(N, 1, 8, 8), thresholds=[0.5, 0.5, 0.0]),
    "ExitRunner": lambda: dict(net=net(), thresholds=[0.5, 0.5, 0.0]),
    "route_is_exact": dict,
    "confidence_of": lambda: dict(z=np.zeros(C)),
    "Cluster": lambda: dict(devices=(Device(),), links=(Link(),)),
    "outcome_table": answer_plots,
    "joint_right": lambda: dict(answers=answers()),
    "LastExit": dict,
    "FeatureDifference": dict,
    "NeighbourSimilarity": dict,
    "ProxyHead": dict,
    "system_auroc": lambda: dict(policy="partial", answers=answers()),
    "accuracy": exits_and_labels,
    "mean_std": lambda: dict(values=[1.0, 2.0]),
    "check_json": lambda: dict(values={"a": 1}),
    "processor": dict,
    "data_digest": lambda: dict(data=pictures()),
    "agreement": lambda: dict(differences=[0.1, 0.2]),
    "text_table": lambda: dict(head=["a"], body=[["1"]]),
    "State": lambda: dict(a=1),
    "SplitModel": lambda: dict(y=labels(40)),
}
CALLS |= MORE


@once
def inclusive():
    method = baselines.InclusiveFL()
    return dict(method=method, state=method.setup(net()), data=pictures())


LAST = {
    "ExclusiveFL": lambda: dict(level=2),
    "InclusiveFL": dict,
    "DepthFL": dict,
    "layer_names": lambda: dict(net=net()),
    "blended": lambda: dict(own=rand(3), larger=[rand(3), rand(3)]),
    "ramp": lambda: dict(rnd=3),
    "peer_divergence": lambda: dict(logits=list(logits())),
    "own_accuracy": inclusive,
    "width_axes": lambda: dict(net=net()),
    "exact_rate": lambda: dict(net=net(), rate=0.5),
    "width_index": lambda: dict(net=net(), rate=0.5),
    "cut": lambda: dict(weights=net().state_dict(), index=widths.width_index(net(), 1.0)),
    "narrow": lambda: dict(net=net(), rate=0.5),
    "cover_average": lambda: dict(old=net().state_dict(), parts=[]),
    "WidthFL": dict,
    "Scaler": lambda: dict(rate=0.5),
    "masked_logits": lambda: dict(logits=rand(N, C), present=torch.arange(C) < 2),
    "measure_statistics": lambda: dict(net=net(), data=pictures()),
    "HeteroFL": dict,
    "ScaleFL": dict,
    "taught_by_last": lambda: dict(logits=list(logits())),
    "Accumulator": lambda: dict(width=8, blocks=3, heads=2, head_dim=4),
    "read_feature": lambda: dict(z=middle(), kind="map"),
    "write_feature": lambda: dict(z=middle(), kind="map", new=rand(len(middle()), middle().shape[1])),
    "RecurrentStage": lambda: dict(
        stage=net().stages[0],
        accumulator=reefl.Accumulator(4, 3, 2, 4),
        shape=(4, 8, 8),
        before=0,
        width=4,
        kind="map",
    ),
    "recurrent_net": lambda: dict(net=net()),
    "taught_by_best": lambda: dict(logits=list(logits()), losses=[3.0, 1.0, 2.0]),
    "ReeFL": dict,
    "Option": lambda: dict(name="a", read=int, default=1, help="b"),
    "to_16_bits": lambda: dict(tensors=dict(a=torch.ones(2))),
    "from_16_bits": lambda: dict(tensors=dict(a=torch.ones(2))),
    "lazy_front": lambda: dict(package="darkdistill_nb.core"),
    "exit_record": lambda: dict(name="exits_pays_shapes"),
    "shapes_stage": dict,
    "Stage": lambda: dict(train=pictures(), test=pictures(), rounds=1, settings={}),
    "receptive_fields": lambda: dict(net=net()),
    "plot_stage": lambda: dict(record=stage_runs()),
    "stage_table": lambda: dict(record=stage_runs()),
    "stage_values": lambda: dict(run=stage_runs().runs[0], control=stage_runs().runs[0]),
    "start_network": dict,
    "stage_record": dict,
    "stage_cell": lambda: dict(method="control", seed=0),
    "defaults_for": lambda: dict(data="digits"),
    "read_start": lambda: dict(start="stage_start"),
    "put_start": lambda: dict(net=net(), weights=trunk()),
    "at_half": lambda: dict(
        valid=logits(), valid_y=labels(), test=logits(), test_y=labels(), costs=[1.0, 2.0, 3.0]
    ),
    "at_budgets": lambda: dict(
        valid=logits(), valid_y=labels(), test=logits(), test_y=labels(), costs=[1.0, 2.0, 3.0], n=3
    ),
    "right_by_difficulty": lambda: dict(logits=logits(), y=labels(), width=1.0),
    "hard_images_figure": lambda: dict(record=digits_runs()),
    "measure_unalignment": short_run,
    "claim_values": lambda: dict(exits=[0.5, 0.6]),
    "Judged": lambda: dict(values=[1.0, 2.0]),
    "Finding": lambda: dict(claim="depth", verdict="holds", headline="a", text="b"),
    "findings": lambda: dict(record=digits_runs()),
    "story_text": lambda: dict(record=digits_runs()),
    "story_figure": lambda: dict(record=digits_runs()),
    "pretrain": lambda: dict(
        folder=Path(KEPT.name) / "stage", n_train=100, n_valid=100, epochs=1, batch_size=64
    ),
    "handled": lambda: dict(net=net(), objective=exit_training.Joint(), data=pictures(), d=rand(N)),
    "unalignment": lambda: dict(
        tier_nets={E: net()}, net=net(), objective=exit_training.Joint(), data=pictures()
    ),
    "latent_record": lambda: dict(experiment="compare", data="shapes"),
    "distree_record": lambda: dict(name="systems", data="shapes"),
    "stored_record": lambda: dict(name="none", command="make it"),
    "train_or_load": lambda: dict(
        name="none", lesson="0_core/records", train=lambda seed: [seed], jobs=[(0,)]
    ),
    "publish": lambda: dict(name="a", folder=folder(), assets=None),
    "ready_folder": lambda: dict(folder=folder()),
    "train_generator": lambda: dict(
        gen=generator.Generator(tuple(middle().shape[1:]), C, 4, 8),
        teacher=net(),
        reference=net(),
        objective=objective(),
        pool=histogram(),
        steps=1,
        generator=rng(),
        batch_size=4,
    ),
    "train_distree": lambda: dict(
        system=system(),
        loss=distributed.DistrEELoss(system(), [list(range(4)), list(range(4, 8))]),
        data=taught()[0],
        table=taught()[1],
        epochs=1,
    ),
    "images": lambda: dict(name="digits"),
    "Claim": lambda: dict(text="a", experiment="compare", parts=dict),
    "RiskControl": lambda: dict(
        method="ltt",
        epsilon=0.1,
        delta=0.1,
        index=0,
        lam=0.5,
        thresholds=[0.5],
        risk=0.1,
        bound=0.1,
        cost=1.0,
    ),
    "figure_html": lambda: dict(fig=plots.figure(), name="a"),
    "plot_requests": answer_plots,
    "Student": lambda: dict(n=0, net=system().students[0], W=rand(C, 4)),
    "Answer": lambda: dict(
        key=0, logits=np.zeros(C), exits=[0], latency=0.1, missing=(), late=()
    ),
    "Record": lambda: dict(config={}),
    "shipped": lambda: dict(what="assets"),
    "asset": lambda: dict(name="digits_default.json"),
    "pixel_unit": lambda: dict(x=rand(2, 1, 8, 8)),
    "average": lambda: dict(weights=[dict(a=torch.ones(2))], n=[1]),
    "nbytes": lambda: dict(tensors=dict(a=torch.ones(2))),
    "Group": lambda: dict(rows=[0], z=rand(1, 3)),
    "merge_groups": lambda: dict(groups=[runner.Group([0], rand(1, 3))]),
    "is_frozen": lambda: dict(module=plain()),
    "shared_names": lambda: dict(net=plain()),
    "environment": dict,
    "key_values": lambda: dict(words=["a=1"]),
    "cell_key": lambda: dict(cell=dict(a=1)),
    "make_config": dict,
    "jobs_of": lambda: dict(config=settings.make_config()),
    "make_parser": dict,
    "why_ended": lambda: dict(codes=[1]),
}
CALLS |= LAST


@once
def own_runs():
    "A record of `run_own` and the folder that its trainings lie in."
    out = folder()
    how = dict(rounds=1, width=4, clients=4, participation=1.0)
    return federated_experiments.run_own("digits", out, (1, 2), 1, **how), out


def own_stored():
    record, out = own_runs()
    return records.load_tensors(next((Path(out) / "logits").glob("*.safetensors")))[0]


def own_short(**kw):
    return dict(name="digits", rounds=1, width=4, clients=4, participation=1.0, **kw)


@once
def fair_record():
    return federated_experiments.run_fair(**CALIBRATED["run_fair"]())


def fair_runs():
    return dict(record=fair_record())


CALIBRATED = {
    "class_shares": lambda: dict(counts=torch.arange(C)),
    "prior_shift": lambda: dict(own=torch.arange(C), everybody=torch.ones(C)),
    "shifted": lambda: dict(objective=objective(), raw=list(logits()), a=torch.zeros(C)),
    "noisy_counts": lambda: dict(counts=torch.ones(C), epsilon=1.0, generator=rng()),
    "PriorCalibration": dict,
    "tau_rule": lambda: dict(error=0.1),
    "coverage": lambda: dict(samples=[1] * E),
    "vote_weights": lambda: dict(votes="equal", c=[1.0] * E),
    "vote": lambda: dict(logits=logits(), weights=torch.eye(E)),
    "vote_sums": lambda: dict(logits=logits(), y=labels()),
    "simplex_fit": lambda: dict(
        G=torch.eye(2), g=torch.ones(2), prior=torch.ones(2) / 2, pull=1.0
    ),
    "stacked_votes": lambda: dict(
        reports=[torch.ones(C, E, E + 1)], counts=[torch.ones(C)], c=torch.ones(E)
    ),
    "ExitVotes": dict,
    "CalibratedEEFL": dict,
    "calibrated": lambda: dict(method=federated.EEFL),
    "could_be_member": lambda: dict(
        counts=torch.ones(C, 3), y=labels(), d=rand(N).abs(), width=1.0
    ),
    "noisy_histogram": lambda: dict(counts=torch.ones(C).long(), epsilon=1.0, generator=rng()),
    "total_epsilon": lambda: dict(epsilon=1.0, messages=2),
    "advantage_bound": lambda: dict(epsilon=1.0),
    "NoisyReports": dict,
    "PrivateDarkDistill": dict,
    "privacy_cell": lambda: dict(data="digits", variant="EEFL"),
    "train_private": lambda: dict(cell=privacy.privacy_cell("digits", "EEFL", rounds=1), folder=None),
    "run_privacy": lambda: dict(folder=folder(), seeds=2, data=["digits"], workers=1, rounds=1),
    "privacy_table": lambda: dict(record=privacy_runs(), data="digits"),
    "privacy_record": dict,
    "label_from_gradient": lambda: dict(bias=torch.tensor([0.5, -0.5])),
    "smooth_net": dict,
    "local_change": lambda: dict(net=small_smooth_net(), x=rand(2, 1, 4, 4), y=labels(2)),
    "invert_change": lambda: dict(
        reply=lambda x: [x], seen=[rand(1, 2)], shape=(1, 2), low=-1.0, high=1.0, iterations=2
    ),
    "matched_error": lambda: dict(found=rand(2, 3), true=rand(2, 3)),
    "DarkDistillPL": dict,
    "teacher_shares": lambda: dict(samples={1: 10, 2: 20}, t=2),
    "exit_ensemble": lambda: dict(
        nets={1: net(2).prefix(1), 2: net(2)},
        samples={1: 10, 2: 20},
        t=1,
        x=rand(N, 4, 8, 8),
        objective=objective(),
    ),
    "difficulty_gap": lambda: dict(d=rand(N), before=rand(N)),
    "taught_exit": lambda: dict(t=1, exits=E),
    "class_bias": lambda: dict(total=torch.ones(C), seen=torch.ones(C)),
    "DifficultyFeedback": dict,
    "FeedbackEEFL": dict,
    "own_cell": own_short,
    "train_own": lambda: dict(
        cell=federated_experiments.own_cell(**own_short()), folder=folder()
    ),
    "decide_own": lambda: dict(stored=own_stored(), votes="equal"),
    "run_own": lambda: own_short(folder=own_runs()[1], seeds=(1, 2), workers=1),
    "train_tau": lambda: dict(
        cell=dict(federated_experiments.own_cell(**own_short()), power=1.0), folder=None
    ),
    "run_tau": lambda: own_short(folder=own_runs()[1], seeds=(1, 2), workers=1),
    "own_gain": lambda: dict(record=own_runs()[0], variant="ours"),
    "own_table": lambda: dict(record=own_runs()[0]),
    "own_record": lambda: dict(name="own_digits"),
    "run_fair": lambda: own_short(folder=own_runs()[1], methods=["eefl"], seeds=(1, 2), workers=1),
    "fair_rows": fair_runs,
    "fair_table": fair_runs,
    "fair_records": lambda: dict(name="digits"),
}
CALLS |= CALIBRATED


QUICK = dict(data="digits", rounds=1, clients=8, participation=1.0, net=dict(width=4), workers=1)


@once
def paper_runs():
    "Records of the paper's experiments on digits, and the folder that their trainings lie in."
    out, how = folder(), dict(QUICK, methods=["eefl", "darkdistill"])
    names = ("main", "budget", "cost", "generator")
    return {n: published.run_paper(n, out, **how) for n in names}, out


def paper_main():
    return paper_runs()[0]["main"]


def lora_record():
    rows = [dict(row="eefl, lora", gamma=1.0, seed=s, exits=[0.5]) for s in (0, 1)]
    return records.Record(dict(gamma=1.0), runs=rows)


def paper_one(method="eefl"):
    return published.paper_cell(paper_main().config, method, 0)


@once
def paper_run():
    train, test, clients, build = published._federation(paper_one())
    method = published._method(paper_one())
    run = published.simulate(method, build, train, test, clients, 1, progress=False)
    return dict(run=run, train=train, test=test, clients=clients)


def by_fifths():
    runs = [dict(row="eefl", gamma=1.0, seed=0, fifths=[[0.9, 0.8, 0.7, 0.6, 0.5]] * E)]
    return records.Record(dict(gamma=1.0), runs=runs)


@once
def against_runs():
    return against.against_stored(**PAPER["against_stored"]())


def some_of(d, *keys):
    return {k: v for k, v in d.items() if k in keys}


PAPER = {
    "scale_settings": dict,
    "paper_cell": lambda: dict(config=paper_main().config, method="eefl", seed=0),
    "Unconditional": dict,
    "pair_mark": lambda: some_of(paper_run(), "train", "clients"),
    "moved": lambda: dict(old={}, tiers={}, after={}),
    "measure_paper": paper_run,
    "train_paper": lambda: dict(cell=paper_one(), folder=folder()),
    "train_generators": lambda: dict(
        cell=dict(paper_one(), grid=[[4, 8, True, 2]]), folder=folder()
    ),
    "run_paper": lambda: dict(QUICK, experiment="main", folder=paper_runs()[1], methods=["eefl"]),
    "paper_values": lambda: dict(record=paper_main(), row="eefl"),
    "paper_gain": lambda: dict(record=paper_main(), row="darkdistill"),
    "paper_table": lambda: dict(record=paper_main()),
    "plot_budget": lambda: dict(record=paper_runs()[0]["budget"]),
    "plot_difficulty": lambda: dict(record=by_fifths()),
    "plot_generator": lambda: dict(record=paper_runs()[0]["generator"]),
    "round_table": lambda: dict(record=paper_runs()[0]["cost"]),
    "paper_record": lambda: dict(experiment="main"),
    "trunk_table": lambda: dict(record=lora_record(), trunk="lora"),
    "fair_values": lambda: dict(record=fair_record(), method="eefl", column="plain"),
    "fair_gain": lambda: dict(record=fair_record(), method="eefl", column="plain"),
    "against_stored": lambda: dict(
        method="eefl", folder=paper_runs()[1], workers=1, stored=paper_main()
    ),
    "against_table": lambda: dict(record=against_runs()),
    "result_record": lambda: dict(name="main"),
    "PaperClaim": lambda: dict(text="x", experiment="main", parts=dict),
    "claims_of_paper": lambda: dict(records={}),
}
CALLS |= PAPER


@once
def a_course():
    "A folder with one student's notebook, and marks of it."
    import nbformat
    from darkdistill_nb.app import grade

    nb = nbformat.v4.new_notebook()
    (folder() / "course/ada").mkdir(parents=True)
    nbformat.write(nb, folder() / "course/ada/lab00.ipynb")
    nbformat.write(nb, folder() / "lab00.ipynb")
    marks = [grade.Mark("ada", "lab00", parts=[grade.Part("f", 0.0, 1.0, "wrong", "No.")])]
    return dict(nb=nb, source=nb, folder=folder() / "course", labs=["00"], marks=marks)


MARKING = {
    "find_labs": lambda: dict(source=a_course()["folder"].parent),
    "find_submissions": lambda: some_of(a_course(), "folder", "labs"),
    "Submission": lambda: dict(student="ada", lab="00"),
    "restored": lambda: some_of(a_course(), "nb", "source"),
    "read_parts": lambda: dict(marked=a_course()["nb"], source=a_course()["nb"], scores={}),
    "Part": lambda: dict(exercise="f", points=0.0, most=1.0, state="wrong"),
    "Mark": lambda: dict(student="ada", lab="lab00"),
    "student_number": lambda: some_of(a_course(), "nb"),
    "advice": lambda: dict(said="No. Wanted [1.0], got [2.0]."),
    "failures_by_message": lambda: some_of(a_course(), "marks"),
    "marks_page": lambda: some_of(a_course(), "marks"),
    "feedback_page": lambda: some_of(a_course(), "marks"),
    "write_marks": lambda: dict(marks=a_course()["marks"], out=folder() / "marks"),
}
CALLS |= MARKING
RUNG = dict(rounds=1, width=4, n_train=120, n_test=40, clients=4, participation=1.0)


@once
def rung_folder():
    return folder()


def rung_short():
    how = dict(levers=["server Adam"], finalists=1, chosen=(0, 1), seeds=(2, 3), rates=(1.0,))
    return dict(RUNG, name="digits", folder=rung_folder(), workers=1, ceilings=True, **how)


@once
def rung_runs():
    return rung.run_rung(**rung_short())


LEVERS = {
    "ServerMomentum": dict,
    "ServerAdam": dict,
    "PublishedMean": dict,
    "RememberedUpdates": dict,
    "SharedMomentum": dict,
    "SharedScales": dict,
    "scale_factors": lambda: dict(scales=dict(a=torch.ones(2))),
    "TrainedVotes": dict,
    "SmoothedExits": dict,
    "exit_priors": lambda: dict(counts=torch.ones(E, C)),
    "ExitPrior": dict,
    "BalancedVisits": dict,
    "AdaptiveEEFL": dict,
    "data_of": lambda: dict(name="cifar10_100"),
    "rung_cell": lambda: dict(RUNG, name="digits"),
    "ceiling_cell": lambda: dict(RUNG, name="digits", ceiling="three times the rounds"),
    "train_lever": lambda: dict(cell=rung.rung_cell("digits", **RUNG)),
    "lever_means": lambda: dict(runs=rung_runs().runs),
    "best_rates": lambda: dict(runs=rung_runs().runs),
    "run_rung": rung_short,
    "rung_values": lambda: dict(record=rung_runs(), lever="server Adam"),
    "rung_gain": lambda: dict(record=rung_runs(), lever="server Adam"),
    "rung_table": lambda: dict(record=rung_runs()),
    "rung_record": lambda: dict(name="digits"),
}
CALLS |= LEVERS

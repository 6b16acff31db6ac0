"""Small valid calls of the package's functions and classes, for test_hostile.py. An entry is made only when it is used."""

import functools, math, tempfile
from pathlib import Path
import numpy as np
import torch
from torch import nn
from darkdistill_nb.app import cli
from darkdistill_nb.core import data
from darkdistill_nb.federated import difficulty
from darkdistill_nb.distill import losses as distillation
from darkdistill_nb.distree import students as distributed
from darkdistill_nb.exits import networks as early_exit
from darkdistill_nb.exits import training as exit_training
from darkdistill_nb.federated import method as federated
from darkdistill_nb.federated import generator
from darkdistill_nb.exits import guarantees
from darkdistill_nb.exits import inference
from darkdistill_nb.distill import latent
from darkdistill_nb.distill import online
from darkdistill_nb.exits import runner
from darkdistill_nb.distree import simulator
from darkdistill_nb.core import training

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
def folder():
    return Path(KEPT.name)


def weights(n=8):
    w = rand(n, n).abs()
    return w + w.T


def simple_loss(student, teacher, y, *rest):
    return (student["logits"] - teacher["logits"]).square().mean()


def devices():
    return simulator.Cluster((simulator.Device(),) * 2, (simulator.Link(),) * 2)


def stu_tea(**kw):
    return dict(student=rand(N, C), teacher=rand(N, C, seed=1), **kw)


def exits_and_labels():
    return dict(logits=logits(), y=labels())


def policy():
    return exit_training.Joint()


def scored(**kw):
    return dict(scores=scores(), right=right(), costs=COSTS, **kw)


CALLS = {
    "bench.plain_wrn": lambda: dict(depth=10, widen=1, n_classes=C),
    "bench.exit_list": lambda: dict(n=16, first=4),
    "cells.t_interval": lambda: dict(values=[1.0, 2.0, 3.0]),
    "cells.verdict": lambda: dict(interval=(0.15, 0.1, 0.2)),
    "checks.check": lambda: dict(ok=True, name="a", value=1, allowed="one"),
    "checks.number": lambda: dict(value=1.0, name="a"),
    "checks.whole": lambda: dict(value=1, name="a"),
    "checks.choice": lambda: dict(value="a", name="a", allowed=["a"]),
    "checks.flag": lambda: dict(value=True, name="a"),
    "checks.finite": lambda: dict(x=rand(3), name="a"),
    "darkdistill.alignment_weights": lambda: dict(d=rand(N).abs(), mu=rand(E).abs()),
    "darkdistill.DarkDistill": dict,
    "data.hatched": lambda: dict(colour="#000000"),
    "data.class_look": lambda: dict(c=1),
    "data.outlines": lambda: dict(steps=64),
    "data.shapes": lambda: dict(n=4, size=16),
    "data.load": lambda: dict(name="digits", n_train=20, n_test=20),
    "data.effective_classes": lambda: dict(gamma=0.5, n_classes=C),
    "data.class_mix": lambda: dict(clients=3, n_classes=C, gamma=0.5),
    "data.dirichlet_split": lambda: dict(y=labels(40), clients=3, gamma=5.0),
    "data.client_histogram": lambda: dict(
        y=labels(), parts=[torch.arange(6), torch.arange(6, N)], n_classes=C
    ),
    "data.dirichlet_draw": lambda: dict(y=labels(40), n=5, gamma=1.0),
    "data.resample_test": lambda: dict(y=labels(40), p=torch.full((C,), 1 / C), n=10),
    "data.show_pictures": lambda: dict(data=pictures(), columns=4),
    "difficulty.difficulty": lambda: dict(logits=rand(N, C), y=labels()),
    "difficulty.measure_difficulty": lambda: dict(net=net(), policy=policy(), data=pictures()),
    "difficulty.bins_of": lambda: dict(width=1.0),
    "difficulty.DifficultyHistogram": lambda: dict(counts=torch.ones(C, 10, dtype=torch.long)),
    "distillation.kd_loss": stu_tea,
    "distillation.logit_mse": lambda: stu_tea(y=labels()),
    "distillation.CropFlip": dict,
    "distillation.Views": lambda: dict(data=pictures()),
    "distillation.teacher_table": lambda: dict(teacher=plain(), data=pictures()),
    "distillation.distill": lambda: dict(
        student=plain(), teacher=plain(), data=pictures(), loss=simple_loss
    ),
    "distillation.dkd_loss": lambda: stu_tea(y=labels()),
    "distillation.dist_loss": stu_tea,
    "distillation.RKD": dict,
    "distributed.filter_graph": lambda: dict(activity=rand(N, 8).abs(), top=4),
    "distributed.strongest_links": lambda: dict(W=weights(), keep=0.5),
    "distributed.modularity": lambda: dict(W=weights(), groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
    "distributed.communities": lambda: dict(W=weights()),
    "distributed.partition_filters": lambda: dict(W=weights(), importance=rand(8).abs(), n_parts=2),
    "distributed.student_net": lambda: dict(
        arch="cnn", input_shape=(1, 8, 8), n_classes=C, length=4, width=4, stages=2
    ),
    "distributed.DistrEE": lambda: dict(
        students=list(system().students), sizes=[4, 4], n_classes=C
    ),
    "distributed.branch_weights": lambda: dict(n_exits=E),
    "distributed.DistrEELoss": lambda: dict(
        system=system(), parts=[list(range(4)), list(range(4, 8))]
    ),
    "distributed.system_answers": lambda: dict(system=system(), data=pictures()),
    "distributed.make_answers": lambda: dict(n=12, n_classes=C, n_exits=E),
    "early_exit.Exit": lambda: dict(reduce=nn.Flatten(), width=4, n_classes=C),
    "early_exit.PooledMap": dict,
    "early_exit.scale_gradient": lambda: dict(x=rand(3), s=0.5),
    "early_exit.block_of": lambda: dict(name="stages.0.conv.weight"),
    "early_exit.EarlyExitNet": lambda: dict(
        stem=net().stem,
        stages=list(net().stages),
        exits=list(net().exits),
        input_shape=(1, 8, 8),
        n_classes=C,
    ),
    "early_exit.ConvStage": lambda: dict(width=4),
    "early_exit.cnn": lambda: dict(n_classes=C, stages=2, width=4),
    "early_exit.WideBlock": lambda: dict(cin=4, cout=4),
    "early_exit.Project": lambda: dict(reduce=nn.Flatten(), width=4, length=4),
    "early_exit.wrn": lambda: dict(depth=10, input_shape=(3, 8, 8), n_classes=C),
    "early_exit.conv_norm": lambda: dict(cin=4, cout=4),
    "early_exit.ScaleLayer": lambda: dict(scale=0, cin=4, new=2),
    "early_exit.CoarseHead": lambda: dict(shape=(4, 4, 4), width=4),
    "early_exit.msdnet": lambda: dict(
        input_shape=(3, 16, 16), n_classes=C, exits=2, first=1, step=1, channels=4, growth=2, head=8
    ),
    "early_exit.TokenMean": dict,
    "early_exit.build_net": lambda: dict(arch="cnn", input_shape=(1, 8, 8), n_classes=C, width=4),
    "exit_experiments.exit_cell": lambda: dict(data="shapes"),
    "exit_experiments.three_parts": lambda: dict(name="digits", n_train=400, n_test=20),
    "exit_training.Joint": dict,
    "exit_training.BoostNet": dict,
    "exit_training.exit_weights": lambda: dict(weights=None, E=E),
    "exit_training.exit_shares": lambda: dict(E=E),
    "exit_training.exit_partition": lambda: dict(logits=list(logits())),
    "exit_training.sample_weights": lambda: dict(u=rand(N, E)),
    "exit_training.WeightNet": lambda: dict(exits=E, hidden=8),
    "exit_training.L2W": dict,
    "exit_training.SelfDistillation": dict,
    "exit_training.Mutual": dict,
    "exit_training.objective_by_name": lambda: dict(name="joint"),
    "exit_training.fit_exits": lambda: dict(net=net(), data=pictures(), policy=policy()),
    "exit_training.train_exits": lambda: dict(
        build=net, train=pictures(), test=pictures(), policy=policy()
    ),
    "exit_training.gradient_share": lambda: dict(
        policy=policy(), raw=list(logits()), y=labels(), difficulty=torch.linspace(0, 1, N), bins=2
    ),
    "features.Hint": lambda: dict(student_width=4, teacher_width=8),
    "features.lpd_loss": lambda: dict(student=rand(N, 6), teacher=rand(N, 6, seed=1)),
    "features.CRD": lambda: dict(labels=labels(), student_width=4, teacher_width=8, dim=4),
    "features.method_loss": lambda: dict(name="kd"),
    "federated.Client": lambda: dict(id=0, tier=0, train=torch.arange(4), valid=torch.arange(4, 6)),
    "federated.tier_sizes": lambda: dict(clients=4, shares=(0.5, 0.5)),
    "federated.make_clients": lambda: dict(y=labels(40), clients=4, gamma=5.0),
    "federated.check_clients": lambda: dict(clients=clients(), images=40, exits=E),
    "federated.EEFL": dict,
    "federated.simulate": lambda: dict(
        method=federated.EEFL(),
        build=lambda: net(2),
        train=pictures(40),
        test=pictures(),
        clients=clients(),
        rounds=1,
        progress=False,
    ),
    "federated.train_alone": lambda: dict(
        method=federated.EEFL(),
        build=lambda: net(2),
        train=pictures(40),
        test=pictures(),
        clients=clients(),
        rounds=1,
        progress=False,
    ),
    "fedmd.FedAvg": dict,
    "fedmd.FedMD": dict,
    "fedmd.digest_loss": lambda: dict(kind="mae"),
    "fedmd.score_bytes": lambda: dict(pictures=4, width=4),
    "generator.Generator": lambda: dict(latent_shape=(4, 4, 4), n_classes=C, d_eps=4, d_h=8),
    "generator.found_difficulty": lambda: dict(logits=rand(N, C), y=labels()),
    "guarantees.log_wealth": lambda: dict(x=np.full((5, 2), 0.1), R=0.5, delta=0.1),
    "guarantees.hb_p_value": lambda: dict(risk=np.array([0.1]), n=50, epsilon=0.3),
    "guarantees.passes": lambda: dict(L=np.full((50, 3), 0.01), epsilon=0.3),
    "guarantees.control_risk": lambda: dict(
        scores=scores(), losses=np.random.default_rng(0).random((E, N)), epsilon=0.5
    ),
    "guarantees.LatencyController": lambda: dict(budget=1.0),
    "guarantees.ShadowMonitor": lambda: dict(grid=[0.5, 0.1], epsilon=0.3, window=50),
    "guarantees.BanditController": lambda: dict(arms=[0.1, 0.5], budget=1.0),
    "guarantees.simulate_queue": lambda: dict(
        controller=guarantees.LatencyController(2.0), gaps=[3.0] * N, scores=scores(), costs=COSTS
    ),
    "inference.Energy": dict,
    "inference.Gate": lambda: dict(exits=E, n_classes=C),
    "inference.exit_outputs": lambda: dict(net=net(), data=pictures()),
    "inference.read_thresholds": lambda: dict(T=[0.5, 0.5, 0.0]),
    "inference.budget_thresholds": lambda: dict(conf=scores(), shares=[0.5, 0.25, 0.25]),
    "inference.budget_curve": lambda: dict(
        valid=logits(), test=logits(seed=1), y=labels(), costs=COSTS, P=[10, 20]
    ),
    "inference.shares_for_budget": lambda: dict(costs=COSTS, budget=2.0),
    "inference.stopping_thresholds": lambda: scored(mu=0.1),
    "inference.thresholds_for_budget": lambda: dict(
        valid_scores=scores(), right=right(), costs=COSTS, budget=2.0
    ),
    "inference.fit_gate": lambda: dict(
        logits=logits(), y=labels(), costs=COSTS, budget=2.0, steps=2, hidden=4
    ),
    "inference.oracle": lambda: dict(right=right(), costs=COSTS),
    "inference.policy_table": lambda: dict(
        valid={"a": scores()},
        test={"a": scores()},
        right_valid=right(),
        right_test=right(),
        costs=COSTS,
        budget=2.0,
    ),
    "inference.policy_curve": lambda: dict(
        valid=scores(),
        test=scores(),
        right_valid=right(),
        right_test=right(),
        costs=COSTS,
        budgets=[1.5, 2.0],
    ),
    "inference.reliability": lambda: dict(conf=scores(), right=right()),
    "inference.ece": lambda: dict(conf=scores(), right=right()),
    "inference.temperature": exits_and_labels,
    "inference.plot_reliability": lambda: dict(confs={"a": scores()}, right=right()),
    "inference.plot_depth": lambda: dict(
        exit=labels() % E, difficulty=torch.linspace(0, 1, N), n_exits=E
    ),
    "inference.picture_grid": lambda: dict(
        data=pictures(), exit=labels() % E, scores=scores(), each=2
    ),
    "latent.conv_group": lambda: dict(in_shape=(1, 8, 8), widths=[4], pool=2),
    "latent.LatentNet": lambda: dict(
        groups=[[4], [4]], pools=[2, 2], l=4, n_classes=C, in_shape=(1, 8, 8)
    ),
    "latent.latent_net": lambda: dict(name="student-1", l=8, n_classes=C, in_shape=(1, 8, 8)),
    "latent.lkd_loss": lambda: dict(
        z_s=rand(N, 8), z_t=rand(N, 8, seed=1), logits_s=rand(N, C), y=labels()
    ),
    "latent.latents": lambda: dict(net=latent_net(), data=pictures()),
    "latent.lkd": dict,
    "latent.client_task": lambda: dict(pool=pictures(40), test=pictures(40), n=8, gamma=1.0),
    "latent.small_shapes": lambda: dict(n_train=8, n_test=8),
    "latent.match_transfer": lambda: dict(
        student=latent_net(), teacher=latent_net(), transfer=pictures(), epochs=1
    ),
    "latent.map_latents": lambda: dict(spaces={"a": rand(N, 8)}),
    "latent_experiments.latent_cell": lambda: dict(data="shapes", method="KD"),
    "lora.LoRALinear": lambda: dict(base=nn.Linear(4, 4), parts={"q": 0}, rank=2),
    "online.DML": dict,
    "online.train_together": lambda: dict(
        nets=[plain(), nn.Sequential(nn.Flatten(), nn.Linear(64, C))],
        data=pictures(),
        loss=online.DML(),
    ),
    "online.entropy": lambda: dict(logits=rand(N, C)),
    "online.bidirectional_loss": stu_tea,
    "online.BDKD": dict,
    "online.self_distillation": lambda: dict(logits=list(logits()), y=labels()),
    "process.leave_with_parent": dict,
    "runner.ExitStream": lambda: dict(runner=runner.ExitRunner(net(), [0.5, 0.5, 0.0])),
    "simulator.Device": dict,
    "simulator.Link": dict,
    "simulator.noise": lambda: dict(seed=0, n_devices=2, n_requests=3, n_exits=E),
    "simulator.Aggregator": lambda: dict(bias=np.zeros(C), n_students=2),
    "simulator.Policy": dict,
    "simulator.simulate_devices": lambda: dict(
        answers=answers(),
        policy=simulator.fixed_policy(np.ones((2, 24), int)),
        cluster=devices(),
        arrival=np.arange(4) * 1.0,
    ),
    "simulator.arrivals": lambda: dict(n=4, rate=1.0),
    "system_policies.RandomExit": dict,
    "system_policies.decision_points": lambda: dict(n_exits=E),
    "system_policies.Together": dict,
    "system_policies.PartialLogits": dict,
    "system_policies.Quorum": dict,
    "system_policies.SharedScore": dict,
    "system_policies.system_thresholds": lambda: dict(
        policy="partial", valid=answers(), budget=0.6
    ),
    "system_policies.evaluate_system": lambda: dict(policy="last", answers=answers()),
    "system_policies.system_curve": lambda: dict(
        policy="partial", valid=answers(), test=answers(), budgets=[0.5, 0.8]
    ),
    "system_policies.system_table": lambda: dict(
        policies={"a": "partial"}, valid=answers(), test=answers(), budget=0.6
    ),
    "system_policies.lambda_grid": lambda: dict(policy="partial", answers=answers(), size=5),
    "system_policies.control_system": lambda: dict(
        policy="partial", answers=answers(), epsilon=0.5, lams=[0.9, 0.5, 0.1]
    ),
    "training.seed_for": lambda: dict(seed=0),
    "training.Streams": dict,
    "training.check_batches": lambda: dict(net=plain(), n=N, batch_size=4),
    "training.fit": lambda: dict(net=plain(), data=pictures()),
    "training.predict": lambda: dict(net=plain(), data=pictures()),
    "training.plus_minus": lambda: dict(values=[1.0, 2.0]),
    "training.pick_device": lambda: dict(name="cpu"),
    "training.style": lambda: dict(i=1),
    "training.figure": dict,
    "report.spread": lambda: dict(values=[1.0, 2.0]),
    "report.html_table": lambda: dict(head=["a"], body=[["1"]]),
    "report.in_short": lambda: dict(value=1.0),
    "widgets.strip": lambda: dict(
        cells=np.zeros((N, 8, 8, 3), dtype=np.uint8), exit=np.zeros(N, int), exits=E, m=2
    ),
    "widgets.as_cells": lambda: dict(x=rand(N, 1, 8, 8)),
    "widgets.DirichletExplorer": lambda: dict(y=labels(40), clients=4),
}


def curves():
    return {"a": dict(cost=[1.0, 2.0], accuracy=[0.5, 0.6])}


@once
def traced():
    policy = simulator.fixed_policy(np.ones((2, 24), int))
    return simulator.simulate_devices(answers(), policy, devices(), np.arange(4) * 1.0, trace=True)


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
    training.save_tensors(path, dict(a=torch.ones(2)))
    return path


MORE = {
    "bench.interleave": lambda: dict(jobs={"a": lambda: 0.1}, rounds=1),
    "bench.ratios": lambda: dict(times={"a": [1.0], "b": [2.0]}, base="a"),
    "bench.exit_table": lambda: dict(rows=[], title="a"),
    "cells.each": lambda: dict(job=str, items=[1], workers=1),
    "cells.json_or_text": lambda: dict(text="1"),
    "cli.near": lambda: dict(word="a", choices=["a", "b"]),
    "cli.job_steps": lambda: dict(config=cli.make_config(), kind="run"),
    "darkdistill.pair_loss": lambda: dict(
        teacher=net(), student=net(), x=middle(), d=rand(N).abs(), policy=policy()
    ),
    "distree_experiments.distree_cell": lambda: dict(data="shapes"),
    "distributed.plot_filters": lambda: dict(
        W=weights(), parts=[[0, 1, 2, 3], [4, 5, 6, 7]], importance=rand(8).abs()
    ),
    "early_exit.vit": lambda: dict(
        n_classes=C, img_size=32, embed_dim=24, depth=4, num_heads=3, exits=(2, 4)
    ),
    "exit_training.paired_gain": lambda: dict(results=seeds()),
    "exit_training.difficulty_experiment": lambda: dict(
        n_train=40, n_test=40, seeds=(0,), width=4, epochs=0
    ),
    "federated.Update": lambda: dict(client=0, tier=1, samples=1, weights={}, loss=0.0),
    "fedmd.single_exit": lambda: dict(
        body=nn.Flatten(), head=nn.Linear(64, C), input_shape=(1, 8, 8), n_classes=C
    ),
    "fedmd.Party": lambda: dict(id=0, net=net(), train=pictures(), test=pictures()),
    "generator.generator_losses": lambda: dict(
        x=middle(),
        y=labels(),
        d=rand(N).abs(),
        teacher=net(),
        reference=net(),
        policy=policy(),
    ),
    "inference.plot_policies": lambda: dict(curves=curves()),
    "inference.plot_auroc": lambda: dict(table={"a": [0.5, 0.6, 0.7]}),
    "latent.plot_latents": lambda: dict(maps={"a": rand(N, 2).numpy()}, y=labels()),
    "latent_experiments.setup": lambda: dict(data="shapes"),
    "latent_experiments.data_name": lambda: dict(data="shapes"),
    "latent_experiments.make_loss": lambda: dict(method="CE", hyper={}, z_t=rand(N, 8), y=labels()),
    "latent_results.at_an_edge": lambda: dict(method="CE", hyper={}),
    "lora.add_lora": lambda: dict(
        net=early_exit.vit(
            n_classes=C, img_size=32, embed_dim=24, depth=2, num_heads=3, exits=(1, 2)
        ),
        rank=2,
    ),
    "process.only_from_main": dict,
    "process.WorkerPool": lambda: dict(workers=1),
    "runner.split_group": lambda: dict(g=runner.Group([0, 1], rand(2, 3)), size=1),
    "scale_out.live_policy": lambda: dict(policy="last", n_exits=E),
    "simulator.joint_policy": lambda: dict(points=[1]),
    "simulator.plot_timeline": lambda: dict(o=traced(), request=0),
    "simulator.plot_latency": answer_plots,
    "training.load_tensors": lambda: dict(path=tensors()),
    "training.by_name": lambda: dict(
        name="msp", table={"msp": inference.Confidence}, what="score", kind=inference.Score
    ),
    "widgets.Table": lambda: dict(caption="a", columns=["b"], rows=[["1"]]),
    "widgets.Control": lambda: dict(label="a", low=0.0, high=1.0, step=0.1, send=print),
    "widgets.Explorer": dict,
    "widgets.ExitExplorer": lambda: scored(),
    # no parameter of a plain type; the valid call is tried
    "bench.Replay": lambda: dict(exits=labels() % E),
    "checks.shown": lambda: dict(value=1),
    "checks.scalar": lambda: dict(value=1),
    "checks.same_shape": lambda: dict(a=rand(3), b=rand(3)),
    "cells.every_tenth": lambda: dict(y=torch.arange(400) % C),
    "data.ArrayData": lambda: dict(x=rand(N, 1, 8, 8), y=labels()),
    "data.pixel_stats": lambda: dict(x=rand(N, 1, 8, 8)),
    "data.difficulty_law": lambda: dict(d=0.5),
    "distillation.pearson_gap": lambda: dict(a=rand(N, C), b=rand(N, C)),
    "distillation.rkd_distance": stu_tea,
    "distillation.rkd_angle": stu_tea,
    "distillation.Taps": lambda: dict(net=plain()),
    "distributed.transfer_loss": stu_tea,
    "exit_training.exit_losses": lambda: dict(raw=list(logits()), y=labels()),
    "features.attention_map": lambda: dict(a=rand(N, 2, 4, 4)),
    "features.at_loss": lambda: dict(student=rand(N, 2, 4, 4), teacher=rand(N, 2, 4, 4)),
    "generator.diversity_loss": lambda: dict(eps=rand(N, 4), x=rand(N, 8)),
    "guarantees.sample_losses": lambda: dict(logits=logits()),
    "guarantees.last_of_prefix": lambda: dict(ok=np.array([True, False])),
    "inference.confidence": lambda: dict(logits=logits()),
    "inference.Confidence": dict,
    "inference.Margin": dict,
    "inference.Entropy": dict,
    "inference.Logit": dict,
    "inference.Patience": dict,
    "inference.Saturation": dict,
    "inference.Difference": dict,
    "inference.anytime": exits_and_labels,
    "inference.take_exit": lambda: dict(conf=scores(), T=[0.5, 0.5, 0.0]),
    "inference.evaluate_thresholds": lambda: scored(T=[0.5, 0.5, 0.0]),
    "inference.quantile_thresholds": lambda: dict(scores=scores(), fractions=[0.5, 0.25]),
    "inference.failure_auroc": lambda: dict(scores=scores(), right=right()),
    "inference.aurc": lambda: dict(scores=scores(), right=right()),
    "inference.static_mixture": lambda: dict(costs=COSTS, accuracy=[0.5, 0.6, 0.7], budget=2.0),
    "inference.write_thresholds": lambda: dict(T=[0.5, 0.5, -math.inf]),
    "latent.latent_variance": lambda: dict(z=rand(N, 8)),
    "runner.loop_exits": lambda: dict(net=net(), x=rand(N, 1, 8, 8), thresholds=[0.5, 0.5, 0.0]),
    "runner.ExitRunner": lambda: dict(net=net(), thresholds=[0.5, 0.5, 0.0]),
    "runner.route_is_exact": dict,
    "simulator.confidence_of": lambda: dict(z=np.zeros(C)),
    "simulator.Cluster": lambda: dict(devices=(simulator.Device(),), links=(simulator.Link(),)),
    "simulator.outcome_table": answer_plots,
    "system_policies.joint_right": lambda: dict(answers=answers()),
    "system_policies.LastExit": dict,
    "system_policies.FeatureDifference": dict,
    "system_policies.NeighbourSimilarity": dict,
    "system_policies.ProxyHead": dict,
    "system_policies.system_auroc": lambda: dict(policy="partial", answers=answers()),
    "training.accuracy": exits_and_labels,
    "training.mean_std": lambda: dict(values=[1.0, 2.0]),
    "training.check_json": lambda: dict(values={"a": 1}),
    "training.processor": dict,
    "training.data_digest": lambda: dict(data=pictures()),
    "report.agreement": lambda: dict(differences=[0.1, 0.2]),
    "report.text_table": lambda: dict(head=["a"], body=[["1"]]),
    "widgets.State": lambda: dict(a=1),
    "widgets.SplitModel": lambda: dict(y=labels(40)),
}
CALLS |= MORE


LAST = {
    "cli.Option": lambda: dict(name="a", read=int, default=1, help="b"),
    "exit_experiments.to_16_bits": lambda: dict(tensors=dict(a=torch.ones(2))),
    "exit_experiments.from_16_bits": lambda: dict(tensors=dict(a=torch.ones(2))),
    "exit_experiments.stored": lambda: dict(name="exits_pays_shapes"),
    "latent_results.stored": lambda: dict(experiment="compare", data="shapes"),
    "distree_experiments.stored": lambda: dict(name="systems", data="shapes"),
    "cells.stored_record": lambda: dict(name="none", command="make it"),
    "cells.publish": lambda: dict(name="a", folder=folder(), assets=None),
    "generator.train_generator": lambda: dict(
        gen=generator.Generator(tuple(middle().shape[1:]), C, 4, 8),
        teacher=net(),
        reference=net(),
        policy=policy(),
        pool=histogram(),
        steps=1,
        generator=rng(),
        batch_size=4,
    ),
    "distributed.train_distree": lambda: dict(
        system=system(),
        loss=distributed.DistrEELoss(system(), [list(range(4)), list(range(4, 8))]),
        data=taught()[0],
        table=taught()[1],
        epochs=1,
    ),
    "latent_experiments.pictures": lambda: dict(name="digits"),
    "latent_results.Claim": lambda: dict(text="a", experiment="compare", parts=dict),
    "guarantees.RiskControl": lambda: dict(
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
    "report.figure_html": lambda: dict(fig=training.figure(), name="a"),
    "scale_out.plot_requests": answer_plots,
    "scale_out.Student": lambda: dict(n=0, net=system().students[0], W=rand(C, 4)),
    "simulator.Answer": lambda: dict(
        key=0, logits=np.zeros(C), exits=[0], latency=0.1, missing=(), late=()
    ),
    "training.Record": lambda: dict(config={}),
    "training.shipped": lambda: dict(what="assets"),
    "training.asset": lambda: dict(name="digits_default.json"),
    "widgets.frames_figure": lambda: dict(fig=training.figure(), steps=[("a", {}, "b")]),
    "data.pixel_unit": lambda: dict(x=rand(2, 1, 8, 8)),
    "federated.average": lambda: dict(weights=[dict(a=torch.ones(2))], n=[1]),
    "federated.nbytes": lambda: dict(tensors=dict(a=torch.ones(2))),
    "runner.Group": lambda: dict(rows=[0], z=rand(1, 3)),
    "runner.merge_groups": lambda: dict(groups=[runner.Group([0], rand(1, 3))]),
    "training.is_frozen": lambda: dict(module=plain()),
    "training.shared_names": lambda: dict(net=plain()),
    "training.environment": dict,
    "cells.key_values": lambda: dict(words=["a=1"]),
    "cells.cell_key": lambda: dict(cell=dict(a=1)),
    "cli.make_config": dict,
    "cli.jobs_of": lambda: dict(config=cli.make_config()),
    "cli.make_parser": dict,
    "process.why_ended": lambda: dict(codes=[1]),
}
CALLS |= LAST

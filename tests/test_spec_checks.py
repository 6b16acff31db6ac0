"""The 25 acceptance checks of federated early exits, with their numbers: where each is tested, and those that are tested here.

Substrate 1-6, objectives 7-11, baselines 12-15, DarkDistill 16-23, inference 24-25."""

import ast, copy, math
from pathlib import Path
import pytest, torch
from helpers import made, same
from scipy.stats import spearmanr
from torch import nn
from darkdistill_nb.core.datasets import load
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.core.training import plus_minus
from darkdistill_nb.distill.losses import RKD, rkd_angle, rkd_distance
from darkdistill_nb.exits import inference as inf, scores as exit_scores
from darkdistill_nb.exits.networks import EarlyExitNet, Exit, cnn, vit, wrn
from darkdistill_nb.exits.training import BoostNet, Joint, exit_partition
from darkdistill_nb.federated.calibration import CalibratedEEFL
from darkdistill_nb.federated.darkdistill import DarkDistill, alignment_weights, pair_loss
from darkdistill_nb.federated.difficulty import (
    CAP,
    DifficultyHistogram,
    measure_difficulty,
    sample_difficulty,
)
from darkdistill_nb.federated.generator import Generator, diversity_loss, train_generator
from darkdistill_nb.federated.engine import simulate
from darkdistill_nb.federated.method import EEFL, block_average, make_clients
from darkdistill_nb.federated.parallel_variant import DarkDistillPL

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKS = """
 1 one tier and one exit is FedAvg
   test_baselines::test_one_tier_and_one_exit_is_fedavg
   test_baselines::test_reefl_with_one_exit_is_fedavg_of_its_network
   test_spec_checks::test_1_one_tier_and_one_exit_is_fedavg_for_darkdistill_too
 2 block average with n = 100, 200, 300, 400; a block without owner
   test_baselines::test_block_average_with_shares_of_samples
 3 prefixes average to themselves; a rate of 0 is EEFL
   test_spec_checks::test_3_prefixes_average_to_the_same_bits
   test_spec_checks::test_3_a_rate_of_0_is_eefl
   test_parallel_variant::test_switched_off_it_is_eefl_to_the_last_bit
 4 numbers of parameters
   test_spec_checks::test_4_numbers_of_parameters
 5 Dirichlet splits of both families
   test_data::test_every_index_exactly_once
   test_data::test_large_gamma_is_nearly_uniform
   test_data::test_small_gamma_is_skewed
   test_data::test_seed_decides_and_global_state_does_not
   test_data::test_min_size_is_kept_or_refused
 6 mean and spread over exits
   test_inference::test_anytime_reports_the_spread_across_exits
   test_spec_checks::test_6_the_spread_is_that_of_a_sample
 7 BoostNet by hand
   test_exit_training::test_boostnet_by_hand
 8 gradient equilibrium
   test_exit_training::test_gradient_equilibrium
 9 weights of L2W
   test_exit_training::test_weights_by_hand
   test_exit_training::test_weights_have_mean_one
   test_exit_training::test_constant_weight_net_is_joint_training
   test_exit_training::test_one_exit_has_weight_one
10 meta-gradient of L2W
   test_exit_training::test_meta_gradient_against_finite_differences
   test_exit_training::test_meta_step_leaves_everything_else_alone
11 exit partition
   test_exit_training::test_exit_partition
   test_spec_checks::test_11_parts_are_disjoint_and_cover
12 InclusiveFL
   test_baselines::test_inclusivefl_momentum_by_hand
   test_baselines::test_inclusivefl_without_momentum_is_private
   test_baselines::test_inclusivefl_shared_layers_are_equal_and_last_ones_are_not
13 DepthFL and FedDyn
   test_baselines::test_depthfl_ramp
   test_baselines::test_depthfl_peers
   test_baselines::test_feddyn_by_hand
14 ScaleFL
   test_baselines::test_the_whole_width_is_the_whole_network
   test_baselines::test_cut_and_put_back
   test_baselines::test_scalefl_loss
15 ReeFL
   test_baselines::test_reefl_has_one_module_and_looks_back_only
   test_baselines::test_reefl_identity_leaves_the_trunk
   test_baselines::test_reefl_teacher
16 difficulty
   test_spec_checks::test_16_difficulty_by_hand
   test_spec_checks::test_16_measuring_changes_nothing
   test_spec_checks::test_16_running_statistics_stay
17 generator
   test_spec_checks::test_17_shapes_and_inputs_of_the_generator
   test_spec_checks::test_17_a_generator_obeys_class_and_difficulty
18 diversity
   test_spec_checks::test_18_diversity
19 relational distillation
   test_spec_checks::test_19_relations
20 weights of exits
   test_spec_checks::test_20_weights_of_exits
   test_mutants_federated::test_alignment_weights_by_hand
21 what distillation may change
   test_spec_checks::test_21_only_stages_of_students_change
   test_spec_checks::test_21_shares_of_the_teachers
22 knowledge flows from shallow to deep
   test_spec_checks::test_22_the_deepest_tier_teaches_nobody
23 the parallel variant
   test_parallel_variant::test_shares_of_check_23
   test_parallel_variant::test_generators_know_no_difficulty
   test_parallel_variant::test_which_exit_learns
   test_parallel_variant::test_difficulty_increases_from_exit_to_exit
   test_parallel_variant::test_switched_off_the_term_is_in_neither_loss
24 thresholds of a budget
   test_inference::test_msdnet_thresholds_by_hand
   test_inference::test_equal_shares_cost_exactly_the_mean
25 when to leave
   test_inference::test_patience_counts_agreement
   test_inference::test_scores_of_one_distribution
   test_spec_checks::test_25_thresholds_at_the_ends
"""


def table():
    "Check -> its tests, as file::function."
    found, number = {}, 0
    for line in CHECKS.strip().splitlines():
        if line.startswith("   "):
            found[number].append(line.strip())
        else:
            number = int(line.split()[0])
            found[number] = []
    return found


@pytest.mark.parametrize("number", range(1, 26))
def test_every_check_has_tests_that_exist(number):
    tests = table()[number]
    assert tests
    for name in tests:
        file, _, function = name.partition("::")
        tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


TRAIN, TEST = load("digits", n_train=320, n_test=60)
SMALL = dict(d_eps=8, d_h=16)


def build(stages=4):
    return cnn(TRAIN.shape, 10, stages=stages, width=8)


def go(method, stages=4, tiers=(0.25,) * 4, rounds=3):
    clients = make_clients(TRAIN.y, 8, 0.5, tiers)
    return simulate(
        method,
        lambda: build(stages),
        TRAIN,
        TEST,
        clients,
        rounds,
        eval_every=rounds,
        progress=False,
    )


# ---------------------------------------------------------------- substrate


OTHERS = {
    "darkdistill, no server epochs": lambda: DarkDistill(
        Joint(), server_epochs=0, participation=1.0
    ),
    "darkdistill": lambda: DarkDistill(Joint(), participation=1.0),  # one tier: nobody to teach
    "darkdistill_pl": lambda: DarkDistillPL(Joint(), server_epochs=0, participation=1.0),
    "calibrated, switched off": lambda: CalibratedEEFL(
        Joint(), calibration=0, votes="none", participation=1.0
    ),
}


@pytest.mark.filterwarnings("ignore:DarkDistill's server step did nothing")
@pytest.mark.parametrize("name", OTHERS)
def test_1_one_tier_and_one_exit_is_fedavg_for_darkdistill_too(name):
    "EEFL is FedAvg there (test_baselines.py), and these are EEFL, to the last bit."
    want = go(EEFL(Joint(), participation=1.0), 1, (1.0,)).state["net"]
    assert same(go(OTHERS[name](), 1, (1.0,)).state["net"], want)


def test_3_prefixes_average_to_the_same_bits():
    net = build().state_dict()
    tiers = {
        m: ({k: v.clone() for k, v in build().prefix(m).state_dict().items()}, 37 * m)
        for m in (1, 2, 3, 4)
    }
    tiers = {m: ({k: net[k] for k in w}, n) for m, (w, n) in tiers.items()}
    assert same(block_average(net, tiers), net)


@pytest.mark.parametrize("kind", [DarkDistill, DarkDistillPL])
def test_3_a_rate_of_0_is_eefl(kind):
    "Weights and clients of every round: the server step has its own random stream."
    a, b = go(EEFL()), go(made(kind, kd_lr=0.0, **SMALL))
    assert same(a.state["net"], b.state["net"])
    assert [r["clients"] for r in a.log] == [r["clients"] for r in b.log]


def test_4_numbers_of_parameters():
    count = lambda m: sum(p.numel() for p in m.parameters())
    deit = vit()
    assert [count(deit.prefix(m)) for m in (1, 2, 3, 4)] == [
        1_539_940,
        2_894_216,
        4_248_492,
        5_602_768,
    ]
    assert count(Generator((197, 192), 100, 100, 1000)) == 38_175_024
    assert count(Generator((197, 192), 100, 64, 128)) == 4_910_784


def test_6_the_spread_is_that_of_a_sample():
    assert plus_minus([55.10, 65.67, 71.26, 70.64]) == "65.67 ± 7.48"


# ---------------------------------------------------------------- DarkDistill


def test_16_difficulty_by_hand():
    "100 classes: a uniform guess 4.6052 (bin 4), a loss of 12 counts as 9.99 (bin 9), a perfect answer 0 (bin 0)."
    logits = torch.zeros(3, 100)
    logits[1, 1] = 12 + math.log(1 + 99 * math.exp(-12))
    logits[2, 2] = 100.0
    y = torch.tensor([0, 0, 2])
    d = sample_difficulty(logits, y)
    assert d.tolist() == pytest.approx([math.log(100), CAP, 0], abs=1e-4)
    assert math.log(100) == pytest.approx(4.6052, abs=1e-4) and CAP == 9.99
    h = DifficultyHistogram.of(d, y, 100)
    assert h.counts.nonzero().tolist() == [[0, 4], [0, 9], [2, 0]] and h.total == 3


def test_16_measuring_changes_nothing():
    "Weights, buffers, modes and random streams; and the training after it is the training without it."
    net, objective = build().train(), BoostNet()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    d = measure_difficulty(net, objective, TRAIN)
    assert len(d) == len(TRAIN) and net.training
    assert same(before, net.state_dict()) and torch.equal(state, torch.get_rng_state())
    clients, s = make_clients(TRAIN.y, 8, 0.5), Streams(0)
    c, updates = clients[0], []
    for m in (EEFL(), DarkDistill()):
        first = m.setup(copy.deepcopy(net))
        updates.append(m.local_update(m.send(first, c), TRAIN.subset(c.train), c, 0, s))
    assert same(updates[0].weights, updates[1].weights)
    assert int(updates[1].extra["histogram"].sum()) == len(c.train)


def test_16_running_statistics_stay():
    "BatchNorm counts no batch while difficulty is measured; one training step later it has counted one."
    net = wrn(10, 1, TRAIN.shape, 10, pool=1).train()
    before = copy.deepcopy(net.state_dict())
    counted = [k for k in before if k.endswith("num_batches_tracked")]
    measure_difficulty(net, BoostNet(), TRAIN.subset(range(64)))
    assert counted and net.training and same(before, net.state_dict())
    net(TRAIN[:8][0])
    assert all(int(net.state_dict()[k]) == 1 for k in counted)


def test_17_shapes_and_inputs_of_the_generator():
    G, plain = Generator((197, 192), 10), Generator((197, 192), 10, conditional=False)
    assert (G.hidden.in_features, plain.hidden.in_features) == (3 * 64, 2 * 64)
    y, eps = torch.tensor([3, 3]), torch.rand(1, 64).expand(2, -1)
    x = G(y, torch.tensor([0.0, 5.0]), eps)
    assert x.shape == (2, 197, 192)
    assert not torch.equal(x[0], x[1])  # the difficulty alone differs
    assert torch.equal(*plain(y, torch.tensor([0.0, 5.0]), eps))


class Everything:
    "Labels and difficulties of the whole range."

    def sample(self, n, generator):
        return torch.randint(6, (n,), generator=generator), CAP * torch.rand(n, generator=generator)


def toy():
    "Two exits on 32 numbers, trained on six clouds of points."
    g = torch.Generator().manual_seed(0)
    centre, y = torch.randn(6, 32, generator=g), torch.arange(600) % 6
    x = centre[y] + 0.7 * torch.randn(600, 32, generator=g)
    stage = lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    with Streams(0).scope("init"):
        exits = [Exit(nn.Identity(), 32, 6) for _ in range(2)]
        net = EarlyExitNet(nn.Identity(), [stage(), stage()], exits, (32,), 6)
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        adam.zero_grad()
        Joint().loss(net(x), y)[0].backward()
        adam.step()
    return net


def test_17_a_generator_obeys_class_and_difficulty():
    "After 200 steps against a frozen teacher and reference: rank correlation above 0.8, easy latents recognised above 0.9."
    reference = toy()
    teacher = copy.deepcopy(reference)
    with Streams(0).scope("generator"):
        G = Generator((32,), 6)
    rng = lambda: torch.Generator().manual_seed(0)
    train_generator(G, teacher, reference, Joint(), Everything(), 200, rng())
    y, d = Everything().sample(1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = G.draw(y, d, torch.Generator().manual_seed(2))
        found = sample_difficulty(reference.from_latents(x)[0], y, cap=100.0)
        right = teacher.from_latents(x)[-1].argmax(1) == y
    assert spearmanr(d, found).statistic > 0.8
    assert right[d < 1].float().mean() > 0.9
    assert same(teacher.state_dict(), reference.state_dict())


def test_18_diversity():
    eps, x = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 0], [2, 4]])
    assert (
        float(diversity_loss(eps, x))
        == pytest.approx(math.exp(-1.5))
        == pytest.approx(0.22313, abs=1e-5)
    )
    assert float(diversity_loss(torch.rand(4, 3), torch.ones(4, 7))) == pytest.approx(1)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        loss = float(
            diversity_loss(torch.rand(5, 3, generator=g), torch.randn(5, 2, 2, generator=g))
        )
        assert 0 < loss <= 1


def test_19_relations():
    t, s = (torch.tensor(v) for v in ([[0.0, 0], [3, 0], [0, 4]], [[0.0, 0], [1, 0], [0, 1]]))
    assert float(rkd_distance(s, t)) == pytest.approx(0.0034812, abs=1e-7)
    assert float(rkd_angle(s, t)) == pytest.approx(0.00074448, abs=1e-8)
    a = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert float(RKD(5, 10)(a, a)) == pytest.approx(0, abs=1e-8)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
    other = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    plain = float(RKD(5, 10)(other, a))
    for moved in (3 * other, other @ turn, other + 7):
        assert float(RKD(5, 10)(moved, a)) == pytest.approx(plain, rel=1e-3)
    assert float(RKD(5, 10)(a[:1], other[:1])) == 0  # one sample has no relations
    net, x = build().eval(), torch.randn(2, 8, 8, 8)
    assert (
        pair_loss(net.prefix(2), net.prefix(3), x, torch.rand(2), Joint()) is None
    )  # skipped, not NaN


def test_20_weights_of_exits():
    w = alignment_weights(torch.tensor([1.0, 2]), torch.tensor([1.0, 3]), tau=1 / 2)  # 1 / |S|
    assert w.tolist() == pytest.approx([0.7311, 0.2689], abs=1e-4)
    far = torch.full((32,), 0.3), torch.tensor([0.0, 1.0])  # mean distances 0.3 and 0.7
    released, ours = (alignment_weights(*far, tau=t).tolist() for t in (1 / 32, 0.1))
    assert released == pytest.approx([0.999997, 2.8e-6], abs=1e-6)
    assert released[1] == pytest.approx(2.8e-6, rel=0.02) and ours == pytest.approx(
        [0.982, 0.018], abs=1e-3
    )
    d, mu = torch.full((5,), 2.0), torch.tensor([0.0, 2, 5, 9])
    w = alignment_weights(d, mu)
    assert int(w.argmax()) == 1 and float(w.sum()) == pytest.approx(1)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(alignment_weights(d, mu[order]), w[order])
    assert alignment_weights(d, torch.full((4,), 3.0)).tolist() == [0.25] * 4


def server_step(weights=None, spy=DarkDistill):
    "(tiers before, tiers after, method) of one server step, the weights of each tier changed by `weights`."
    how = dict(server_epochs=1, kd_steps=2, kd_weight_decay=0.1, participation=1.0)
    m = made(spy, **how, **SMALL)
    with Streams(0).scope("init"):
        state = m.setup(build())
    s, clients = Streams(0), make_clients(TRAIN.y, 8, 0.5)
    updates = [m.local_update(m.send(state, c), TRAIN.subset(c.train), c, 0, s) for c in clients]
    own = {t: next(u.weights for u in updates if u.tier == t) for t in (1, 2, 3, 4)}
    tiers = {t: (weights(t, w) if weights else w, 100 * t) for t, w in own.items()}
    before = copy.deepcopy(tiers)
    after, _, info = m.server_step(state, tiers, updates, 0, s)
    assert spy is not DarkDistill or info["server_step"] == "1 -> 2, 2 -> 3, 3 -> 4"
    return before, after, info


def test_21_only_stages_of_students_change():
    "Embeddings, all exit heads and tier 1 are bit-identical, although weight decay is on; no gradient for a teacher."
    before, after, _ = server_step()
    for t in (1, 2, 3, 4):
        moved = {k for k, v in before[t][0].items() if not torch.equal(v, after[t][0][k])}
        assert all(k.startswith("stages.") for k in moved) and bool(moved) == (t > 1)
    net = build()
    teacher, student, x = net.prefix(2), copy.deepcopy(net), torch.randn(32, 8, 8, 8)
    pair_loss(teacher, student.prefix(3), x, 9 * torch.rand(32), BoostNet()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    touched = {k for k, p in student.named_parameters() if p.grad is not None}
    assert touched == {
        k
        for k, _ in student.named_parameters()
        if k.startswith(("stages.0", "stages.1", "stages.2"))
    }


def test_21_shares_of_the_teachers():
    seen = {}

    class Spy(DarkDistill):
        def _distil(self, pairs, nets, gens, drawn, share, g, opt):
            seen.update(share)
            return 0.0, []

    server_step(spy=Spy)  # 100, 200, 300 and, for the tier that teaches nobody, 400 samples
    assert seen == {1: pytest.approx(1 / 6), 2: pytest.approx(1 / 3), 3: pytest.approx(1 / 2)}


def test_22_the_deepest_tier_teaches_nobody():
    _, after, _ = server_step()
    _, bent, _ = server_step(lambda t, w: {k: v + 0.1 for k, v in w.items()} if t == 4 else w)
    for t in (1, 2, 3):
        assert same(after[t][0], bent[t][0])
    assert not same(after[4][0], bent[4][0])
    _, other, _ = server_step(lambda t, w: {k: v * 1.2 for k, v in w.items()} if t == 1 else w)
    assert not same(after[2][0], other[2][0])  # while the shallowest teaches its neighbour


# ---------------------------------------------------------------- inference


def test_25_thresholds_at_the_ends():
    "0: all leave at exit 1; above 1: all at the last exit, whose accuracy is that of answering always there."
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 200, 10, generator=g), torch.randint(10, (200,), generator=g)
    conf, right = exit_scores.Confidence().score(z), z.argmax(-1) == y
    last = -math.inf
    assert inf.take_exit(conf, [0.0] * 3 + [last]).tolist() == [0] * 200
    assert inf.take_exit(conf, [1.01] * 3 + [last]).tolist() == [3] * 200
    got = inf.evaluate_thresholds(conf, right, [1, 2, 3, 4], [1.01] * 3 + [last])
    assert got["accuracy"] == pytest.approx(exit_scores.anytime(z, y)["exits"][-1]) and got["cost"] == 4


def test_11_parts_are_disjoint_and_cover():
    for E in (2, 3, 4):
        z = [torch.randn(32, 10, generator=torch.Generator().manual_seed(e)) for e in range(E)]
        parts = exit_partition(z, 30)
        assert torch.cat(parts).sort().values.tolist() == list(range(32))
        assert [len(p) for p in parts] == {2: [12, 20], 3: [6, 10, 16], 4: [3, 5, 8, 16]}[E]

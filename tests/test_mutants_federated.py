"""The smallest parts of federated training: values by hand, limits, defaults, branches."""

import copy, math, pickle, sys, time
from types import SimpleNamespace
import numpy as np, pytest, torch
from helpers import copied, default, made, rng, same
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.distill.losses import RKD
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.exits.training import Joint, exit_partition
from darkdistill_nb.federated import darkdistill, engine, generator, method
from darkdistill_nb.federated.baselines import (
    DepthFL,
    ExclusiveFL,
    InclusiveFL,
    blended,
    layer_names,
    peer_divergence,
    ramp,
)
from darkdistill_nb.federated.calibration import (
    DifficultyFeedback,
    ExitVotes,
    PriorCalibration,
    class_shares,
    prior_shift,
    stacked_votes,
    tau_rule,
)
from darkdistill_nb.federated.darkdistill import DarkDistill, alignment_weights, pair_loss
from darkdistill_nb.federated.difficulty import (
    CAP,
    Assessment,
    DifficultyHistogram,
    DifficultyPairs,
    bins_of,
    measure_difficulty,
    sample_difficulty,
)
from darkdistill_nb.federated.generator import (
    Generator,
    GeneratorSettings,
    diversity_loss,
    found_difficulty,
    frozen,
    generator_losses,
    train_generator,
)
from darkdistill_nb.federated.engine import (
    evaluate,
    load_state,
    play_round,
    save_state,
    simulate,
    train_alone,
)
from darkdistill_nb.federated.method import (
    EEFL,
    Client,
    Update,
    average,
    block_average,
    check_clients,
    make_clients,
    nbytes,
    tier_sizes,
    trained_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, K = (1, 4, 4), 3
LOGITS, LABELS = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])


def net(stages=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cnn(SHAPE, K, stages=stages, width=4).eval()


def latents(n, seed=1):
    return torch.randn(n, 4, 4, 4, generator=rng(seed))


def images(n=8):
    return ArrayData(torch.rand(n, *SHAPE, generator=rng()), torch.arange(n) % K)


# ---------------------------------------------------------------- settings


DEFAULTS = {
    sample_difficulty: dict(cap=CAP),
    measure_difficulty: dict(batch_size=512, exits="first"),
    DifficultyHistogram: dict(width=1),
    DifficultyHistogram.of: dict(bins=10, width=1),
    DifficultyHistogram.sample: dict(smoothing=1e-3),
    DifficultyPairs: dict(width=1),
    Assessment: dict(seen_by="received", seen_at="first", upload="histogram"),
    Generator: dict(d_eps=64, d_h=128, conditional=True, norm="layer", unit=CAP),
    found_difficulty: dict(leak=0.05),
    generator_losses: dict(ce="all", dif="l1", leak=0.05, P=30, seen_at="first"),
    train_generator: dict(settings=None, batch_size=32, opt=None, P=30, seen_at="first"),
    GeneratorSettings: dict(
        gen_steps=1,
        gen_lr=3e-3,
        lam_ce=0.1,
        lam_dif=1,
        lam_div=0,
        ce="all",
        dif="l1",
        d_eps=64,
        d_h=128,
        norm="layer",
        leak=0.05,
        unit=CAP,
    ),
    alignment_weights: dict(tau=0.1),
    pair_loss: dict(tau=0.1, weights="distance", generator=None, P=30),
    DarkDistill: dict(
        kd_lr=0.05,
        kd_steps=5,
        kd_weight_decay=1e-3,
        server_epochs=2,
        server_batch=32,
        tau=0.1,
        weights="distance",
        P=30,
        bin_width=1,
        progressive="joint",
        reference="global",
        generator=GeneratorSettings(),
        assessment=Assessment(),
    ),
    EEFL: dict(
        objective=None,
        lr=0.05,
        decay=0.99,
        momentum=0.9,
        weight_decay=1e-4,
        batch_size=16,
        epochs=1,
        participation=0.5,
    ),
    simulate: dict(
        seed=0,
        eval_every=1,
        checkpoint=None,
        device="cpu",
        workers=1,
        progress=None,
        faults="warn",
    ),
    train_alone: dict(seed=0, progress=None),
    class_shares: dict(s=1),
    prior_shift: dict(tau=1, s=1),
    tau_rule: dict(at=0.1, power=4),
    PriorCalibration: dict(
        objective=None, calibration="auto", smoothing=1, epsilon=None, fall=4
    ),
    stacked_votes: dict(pull=12),
    ExitVotes: dict(objective=None, votes="validation"),
    DifficultyFeedback: dict(objective=None, feedback=1, images=200),
    ExclusiveFL: dict(objective=None, level=None),
    InclusiveFL: dict(objective=None, beta=0.2, exits="last"),
    blended: dict(beta=0.2),
    ramp: dict(rounds=300),
    DepthFL: dict(objective=None, alpha=0.1, ramp_rounds=300, kd=1),
    play_round: dict(pool=None, faults="warn"),
}


@pytest.mark.parametrize("f", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_as_documented(f):
    assert {k: default(f, k) for k in DEFAULTS[f]} == DEFAULTS[f]


# ---------------------------------------------------------------- difficulty


def test_a_sample_s_difficulty_is_its_cross_entropy_at_exit_1():
    d = sample_difficulty(LOGITS, LABELS)
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
    assert d.tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("y", [LABELS.float(), LABELS.bool(), LABELS.tolist(), LABELS.numpy()])
def test_labels_are_a_tensor_of_whole_numbers(y):
    with pytest.raises(ValueError, match="y must be a tensor of 2 labels"):
        sample_difficulty(LOGITS, y)
    with pytest.raises(ValueError, match="y must be a tensor of 2 labels"):
        DifficultyHistogram.of(torch.zeros(2), y, 2)


def test_no_samples_have_no_difficulties_and_an_empty_histogram():
    none = torch.zeros(0, dtype=torch.long)
    assert sample_difficulty(torch.zeros(0, K), none).shape == (0,)
    h = DifficultyHistogram.of(torch.zeros(0), none, K)
    assert h.total == 0 and h.density().tolist() == [0.0] * 10


@pytest.mark.parametrize("width, bins", [(0.01, 999), (0.5, 20), (1, 10), (9.99, 1)])
def test_so_many_bins_reach_the_cap(width, bins):
    assert bins_of(width) == bins


@pytest.mark.parametrize("width", [0.0099, 0.0])
def test_bins_are_not_narrower_than_a_hundredth(width):
    with pytest.raises(ValueError, match="width=.* must be a finite number of at least 0.01"):
        bins_of(width)


def test_a_histogram_has_ten_bins_unless_told_otherwise():
    h = DifficultyHistogram.of(torch.tensor([0.5, 9.5, 10.5, 50.0]), torch.tensor([0, 1, 1, 1]), K)
    assert h.counts.shape == (K, 10) and h.width == 1
    assert h.counts[:, 0].tolist() == [1, 0, 0] and h.counts[:, 9].tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    "width, density", [(0.5, [0.5, 1.5]), (2.0, [0.125, 0.375]), (1, [0.25, 0.75])]
)
def test_the_density_is_a_share_per_nat(width, density):
    "Two of eight samples in the first bin: the area under the density is 1."
    h = DifficultyHistogram(torch.tensor([[1, 4], [1, 2]]), width)
    assert h.density().tolist() == density
    assert float(h.density().sum()) * width == 1


def test_difficulties_end_at_the_cap():
    z, y = torch.tensor([[0.0, 50.0], [50.0, 0.0]]), torch.tensor([0, 0])
    assert sample_difficulty(z, y).tolist() == pytest.approx([9.99, 0])
    assert sample_difficulty(z, y, cap=0.5).tolist() == [0.5, 0]
    with pytest.raises(ValueError, match=r"logits must have shape \(B, K\)"):
        sample_difficulty(z[0], y)


@pytest.mark.parametrize("low, high", [(-1, 0), (0, 2)])
def test_labels_lie_within_the_classes(low, high):
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        sample_difficulty(LOGITS, torch.tensor([low, high]))


@pytest.mark.parametrize("batch_size", [1, 3, 512])
def test_a_difficulty_does_not_depend_on_the_batch(batch_size):
    n, data = net(), images()
    d = measure_difficulty(n.train(), Joint(), data, batch_size)
    assert n.training
    whole = sample_difficulty(n.eval()(data[:][0])[0].detach(), data.y)
    assert torch.allclose(d, whole, atol=1e-6)


def test_histograms_add_where_their_bins_are_the_same():
    a = DifficultyHistogram(torch.tensor([[1, 0], [0, 2]]), 0.5)
    assert (a + a).counts.tolist() == [[2, 0], [0, 4]] and (a + a).width == 0.5 and a.total == 3
    with pytest.raises(ValueError, match="width=1.0 must be 0.5"):
        a + DifficultyHistogram(a.counts, 1.0)
    for counts in (a.counts - 1, a.counts.float(), a.counts[0], [[1]]):
        with pytest.raises(ValueError, match="counts"):
            DifficultyHistogram(counts)
    for d in (torch.tensor([-0.1]), torch.tensor([math.nan]), torch.tensor([[0.1]]), [0.1]):
        with pytest.raises(ValueError, match="d=|d must"):
            DifficultyHistogram.of(d, torch.tensor([0]), K)


def test_pairs_are_drawn_in_proportion_to_counts_and_anywhere_in_their_bin():
    h = DifficultyHistogram(torch.tensor([[0, 3], [1, 0], [0, 0]]), 2.0)
    y, d = h.sample(4000, rng(), smoothing=0)
    cell = y * 2 + (d / 2).long()
    share = torch.bincount(cell, minlength=6) / 4000
    assert share.tolist() == pytest.approx([0, 0.75, 0.25, 0, 0, 0], abs=0.03)
    inside = d[y == 0]
    assert 2 <= inside.min() < 2.01 and 3.99 < inside.max() <= 4 and d.dtype is torch.float32
    assert float(inside.mean()) == pytest.approx(3, abs=0.05)


def test_smoothing_reaches_every_bin_of_the_classes_that_were_seen():
    "Counts 3 and 1 with 1 added: 4, 1, 1 and 2 of 8."
    h = DifficultyHistogram(torch.tensor([[3, 0], [0, 1], [0, 0]]))
    y, d = h.sample(8000, rng(), smoothing=1.0)
    share = torch.bincount(y * 2 + d.long(), minlength=6) / 8000
    assert share.tolist() == pytest.approx([0.5, 0.125, 0.125, 0.25, 0, 0], abs=0.02)
    with pytest.raises(ValueError, match="the histogram is empty"):
        DifficultyHistogram(torch.zeros(2, 2, dtype=torch.int)).sample(1, rng())
    one = DifficultyHistogram(torch.tensor([[1]])).sample(1, rng())
    assert one[0].tolist() == [0] and len(one[1]) == 1


# ---------------------------------------------------------------- generator


class Pool:
    "Labels 0, 1, 2, ... with difficulties of 1 nat."

    def sample(self, n, generator):
        return torch.arange(n) % K, torch.ones(n)


def trained(steps=2, **kw):
    "The weights of a generator after a little training."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gen = Generator((4, 4, 4), K, d_eps=3, d_h=5)
    before = copied(gen.state_dict())
    settings = GeneratorSettings(**kw)
    said = train_generator(gen, net(), net(), Joint(), Pool(), steps, rng(), settings, batch_size=4)
    return before, said, gen.state_dict()


def test_a_generator_that_trains_again_normalises_by_its_batch_again():
    "Training leaves it in evaluation mode; the next training must see the statistics of its batches all the same."
    gen = Generator((4, 4, 4), K, d_eps=3, d_h=5, norm="batch")
    moving = lambda: {k: v.clone() for k, v in gen.state_dict().items() if "running" in k}
    seen = [moving()]
    for seed in (0, 1):
        train_generator(gen, net(), net(), Joint(), Pool(), 1, rng(seed), batch_size=4)
        seen.append(moving())
        assert not gen.training
    assert seen[0] and not same(seen[0], seen[1]) and not same(seen[1], seen[2])


def test_a_generator_without_the_difficulty_input_ignores_difficulties():
    gen = Generator((4, 4, 4), K, d_eps=3, d_h=5, conditional=False).eval()
    y = torch.tensor([0, 1, 2])
    x = gen.draw(y, torch.zeros(3), rng())
    assert x.shape == (3, 4, 4, 4) and torch.equal(x, gen.draw(y, torch.full((3,), 9.0), rng()))
    assert gen.hidden.in_features == 6


def test_a_generator_with_the_difficulty_input_uses_it():
    gen = Generator((4, 4, 4), K, d_eps=3, d_h=5).eval()
    y = torch.tensor([0, 1, 2])
    x, other = gen.draw(y, torch.zeros(3), rng()), gen.draw(y, torch.full((3,), 9.0), rng())
    assert not torch.equal(x, other) and gen.hidden.in_features == 9


def test_two_classes_are_enough_for_a_found_difficulty():
    "With K = 2 the cross-entropy is softplus of the other logit minus the label's."
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
    assert found_difficulty(LOGITS, LABELS).tolist() == pytest.approx(by_hand, rel=1e-6)


def test_one_class_has_no_difficulty_to_find():
    with pytest.raises(ValueError, match="K >= 2"):
        found_difficulty(torch.zeros(2, 1), LABELS)


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), ()])
def test_there_are_as_many_difficulties_as_latents(shape):
    "Without the check, broadcasting would compare every latent with every difficulty."
    y, d = torch.zeros(4, dtype=torch.long), torch.ones(shape)
    with pytest.raises(ValueError, match="d=.* must be of shape .4,., as many as latents"):
        generator_losses(latents(4), y, d, net(), net(), Joint())


def test_the_reference_needs_no_more_than_its_first_exit():
    y, d, whole = torch.tensor([0, 1, 2, 0]), torch.ones(4), net(3)
    one, all_ = (
        generator_losses(latents(4), y, d, net(), reference, Joint())
        for reference in (whole.prefix(1), whole)
    )
    assert len(whole.prefix(1)) == 1 and torch.equal(torch.stack(one), torch.stack(all_))


def test_no_steps_leave_a_generator_as_it_was():
    before, said, after = trained(steps=0)
    assert said == {} and same(before, after)


@pytest.mark.parametrize("steps", [-1, 0.5])
def test_steps_are_a_whole_number_from_0(steps):
    with pytest.raises(ValueError, match="steps=.* must be a whole number of at least 0"):
        trained(steps=steps)


def test_the_diversity_loss_is_off_by_default_and_then_not_computed(monkeypatch):
    def never(*args):
        raise AssertionError("the diversity loss was computed")

    monkeypatch.setattr(generator, "diversity_loss", never)
    before, _, after = trained()
    assert not same(before, after) and same(after, trained(lam_div=0.0)[2])
    assert GeneratorSettings().lam_div == default(DarkDistill, "generator").lam_div == 0


def test_the_diversity_loss_changes_what_a_generator_learns():
    assert not same(trained(lam_div=0.0)[2], trained(lam_div=1.0)[2])


@pytest.mark.parametrize("shape", [(), (0, 4), (2.5,)])
def test_latents_have_a_shape_without_a_0(shape):
    assert Generator((1,), K, d_eps=1, d_h=1).out.out_features == 1
    with pytest.raises(ValueError, match="latent_shape="):
        Generator(shape, K)


def test_a_generator_by_hand():
    "Noise, label and difficulty (in units of the cap) side by side, one hidden layer."
    gen = Generator((2, 3), K, d_eps=4, d_h=5)
    y, d, eps = torch.tensor([0, 2]), torch.tensor([9.99, 0.0]), torch.rand(2, 4, generator=rng())
    level = gen.level(torch.tensor([[1.0], [0.0]]))
    x = gen.hidden(torch.cat([eps, gen.label(y), level], 1))
    want = gen.out(gen.norm(x).relu()).view(2, 2, 3)
    assert torch.allclose(gen(y, d, eps), want, atol=1e-6)
    noise = torch.rand(2, 4, generator=rng(5))
    assert torch.allclose(gen.draw(y, d, rng(5)), gen(y, d, noise))
    for bad in (-d, d * math.nan, d[:, None], [1.0, 2.0]):
        with pytest.raises(ValueError, match="d=|d must"):
            gen.draw(y, bad, rng())


def test_diversity_by_hand():
    "Two samples: squared noise distance 4, mean latent distance 3; half of all pairs are of one."
    eps, x = torch.tensor([[0.0, 0], [2, 2]]), torch.tensor([[[0.0, 0]], [[2, 4]]])
    assert float(diversity_loss(eps, x)) == pytest.approx(math.exp(-4 * 3 / 2))
    assert float(diversity_loss(eps, torch.zeros(2, 3))) == 1
    for bad in (eps[0], eps[:1]):
        with pytest.raises(ValueError, match="eps"):
            diversity_loss(bad, x)
    with pytest.raises(ValueError, match="eps"):
        diversity_loss(eps[:0], x[:0])


@pytest.mark.parametrize("leak", [0, 0.05, 0.3])
def test_the_slope_of_a_found_difficulty_does_not_vanish(leak):
    "Of two logits it is sigmoid(u) + leak, with u what the other has more than the label's."
    z = torch.tensor([[3.0, 1.0]], requires_grad=True)
    found_difficulty(z, torch.tensor([0]), leak).sum().backward()
    slope = 1 / (1 + math.exp(2)) + leak
    assert z.grad[0].tolist() == pytest.approx([-slope, slope], rel=1e-5)
    with pytest.raises(ValueError, match="leak=-0.1"):
        found_difficulty(z, torch.tensor([0]), -0.1)


def test_losses_of_a_generator_by_hand():
    "Class loss over all exits of the teacher, or each latent at the exit where it leaves."
    x, y, d = latents(6), torch.arange(6) % K, torch.linspace(0, 5, 6)
    teacher, reference = net(2, seed=3), net(1, seed=4)
    both = lambda **kw: generator_losses(x, y, d, teacher, reference, Joint(), **kw)
    ce = torch.nn.functional.cross_entropy
    logits = teacher.from_latents(x)
    assert float(both()[0].detach()) == pytest.approx(float(sum(ce(z, y) for z in logits).detach()))
    own = torch.stack([ce(z, y, reduction="none") for z in logits])
    where = torch.empty(6, dtype=torch.long)
    for e, idx in enumerate(exit_partition(logits)):
        where[idx] = e
    routed = own[where, torch.arange(6)].mean()
    assert float(both(ce="routed")[0].detach()) == pytest.approx(float(routed.detach()))
    far = d - sample_difficulty(reference.from_latents(x)[0].detach(), y)
    assert float(both()[1].detach()) == pytest.approx(float(far.abs().mean()), rel=1e-4)
    square = float(both(dif="mse")[1].detach())
    assert square == pytest.approx(float(far.pow(2).mean()), rel=1e-4)


def test_frozen_networks_are_as_before_afterwards():
    n = net().train()
    n.stages[0].requires_grad_(False)
    before = [(p.requires_grad, n.training) for p in n.parameters()]
    with pytest.raises(KeyError), frozen(n):
        assert not n.training and not any(p.requires_grad for p in n.parameters())
        raise KeyError
    assert [(p.requires_grad, n.training) for p in n.parameters()] == before


@pytest.mark.parametrize("name", ["lam_ce", "lam_dif", "lam_div", "gen_lr"])
def test_weights_of_a_generator_s_losses_begin_at_0(name):
    assert same(trained(**{"gen_lr": 0.0, name: 0})[2], trained(steps=0)[2])
    with pytest.raises(ValueError, match=f"{name}=-0.1"):
        trained(**{name: -0.1})
    if name != "gen_lr":
        assert not same(trained(**{name: 0.7})[2], trained(**{name: 1.4})[2])


def test_a_generator_is_trained_by_adam_on_its_weighted_losses():
    "One step by hand."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gen = Generator((4, 4, 4), K, d_eps=3, d_h=5)
    opt = torch.optim.Adam(gen.parameters(), 3e-3)
    y, d = Pool().sample(4, None)
    eps = torch.rand(4, 3, generator=rng())
    x = gen(y, d, eps)
    ce, dif = generator_losses(x, y, d, net(), net(), Joint())
    (0.1 * ce + dif).backward()
    opt.step()
    _, said, after = trained(steps=1)
    assert all(torch.allclose(after[k], v, atol=1e-7) for k, v in gen.state_dict().items())
    assert said == pytest.approx(
        dict(ce=float(ce.detach()), dif=float(dif.detach()), scale=float(x.detach().std()))
    )


@pytest.mark.parametrize("norm, least", [("layer", 1), ("batch", 2)])
def test_batch_normalisation_needs_two_latents(norm, least):
    gen = Generator((4, 4, 4), K, d_eps=3, d_h=5, norm=norm)
    args = (gen, net(), net(), Joint(), Pool(), 1, rng())
    assert train_generator(*args, batch_size=least).keys() == {"ce", "dif", "scale"}
    with pytest.raises(ValueError, match="batch_size="):
        train_generator(*args, batch_size=least - 1)
    assert made(DarkDistill, norm=norm, server_batch=least).server_batch == least
    with pytest.raises(ValueError, match="server_batch="):
        made(DarkDistill, norm=norm, server_batch=least - 1)


def test_a_generator_knows_two_normalisations():
    kinds = {norm: type(Generator((4,), K, norm=norm).norm).__name__ for norm in ("layer", "batch")}
    assert kinds == dict(layer="LayerNorm", batch="BatchNorm1d")
    with pytest.raises(ValueError, match="norm='group'"):
        Generator((4,), K, norm="group")


# ---------------------------------------------------------------- darkdistill: weights and loss


def test_alignment_weights_by_hand():
    "Distances (0, 2) and (1, 1) have shares (0, 1) and (1/2, 1/2), whose means are 1/4 and 3/4."
    d, mu = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])
    w = alignment_weights(d, mu, tau=0.5)
    first = 1 / (1 + math.exp(-0.5 / 0.5))
    assert w.tolist() == pytest.approx([first, 1 - first], rel=1e-6)


def test_alignment_weights_do_not_depend_on_the_unit_of_difficulty():
    d, mu = torch.tensor([0.5, 3.0, 7.0]), torch.tensor([1.0, 2.0, 6.0])
    assert torch.allclose(alignment_weights(d, mu), alignment_weights(4 * d, 4 * mu))


def test_alignment_weights_are_uniform_where_all_ranges_agree():
    "One sample may lie on all of them: its distances add to 0."
    w = alignment_weights(torch.tensor([2.0, 5.0]), torch.full((4,), 2.0))
    assert w.tolist() == [0.25] * 4


def test_the_smallest_temperature_is_a_millionth():
    d, mu = torch.tensor([0.0]), torch.tensor([0.0, 1.0])
    assert alignment_weights(d, mu, tau=1e-6).tolist() == [1, 0]
    assert DarkDistill(tau=1e-6).tau == 1e-6
    for refuse in (lambda tau: alignment_weights(d, mu, tau), lambda tau: DarkDistill(tau=tau)):
        with pytest.raises(ValueError, match="tau=9e-07 must be a finite number of at least 1e-06"):
            refuse(9e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["d", "mu"])
def test_alignment_weights_of_what_is_not_finite_are_refused(name, bad):
    values = dict(d=torch.tensor([1.0, 2.0]), mu=torch.tensor([1.0, 2.0]))
    values[name] = torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match=f"{name} must be finite, but 1 of its 2"):
        alignment_weights(**values)


def test_the_smallest_temperature_of_a_pair_is_that_of_its_weights():
    args = (net(1), net(2, seed=1), latents(8), torch.arange(8.0), Joint())
    assert math.isfinite(float(pair_loss(*args, tau=1e-6).detach()))
    with pytest.raises(ValueError, match="tau=9e-07"):
        pair_loss(*args, weights="uniform", tau=9e-7)


def test_two_latents_at_the_teachers_last_exit_are_enough_to_compare():
    "A teacher of one exit keeps both, the student has one at each of its exits."
    loss = pair_loss(net(1), net(2, seed=1), latents(2), torch.tensor([1.0, 3.0]), Joint(), P=20)
    assert loss is not None and float(loss.detach()) >= 0 and loss.requires_grad


def test_one_latent_at_the_teachers_last_exit_has_no_relations():
    "Of two latents a teacher of two exits keeps one for its last."
    d = torch.tensor([1.0, 3.0])
    assert pair_loss(net(2), net(2, seed=1), latents(2), d, Joint(), P=20) is None


def test_an_exit_of_the_student_without_latents_leaves_nothing_to_compare():
    d = torch.tensor([1.0, 3.0])
    assert pair_loss(net(1), net(3, seed=1), latents(2), d, Joint(), P=20) is None


def test_the_relational_loss_of_a_pair_is_5_times_distances_and_10_times_angles():
    rkd = default(pair_loss, "rkd")
    assert (rkd.distance, rkd.angle) == (5, 10) == default(DarkDistill, "rkd")
    teacher, student, x, d = net(1), net(2, seed=1), latents(8), torch.arange(8.0)
    own = [pair_loss(teacher, student, x, d, Joint(), rkd=r) for r in (RKD(1, 0), RKD(0, 1))]
    loss = pair_loss(teacher, student, x, d, Joint())
    assert torch.allclose(loss, 5 * own[0] + 10 * own[1])


def test_uniform_weights_are_those_of_an_infinite_temperature():
    args = (net(1), net(2, seed=1), latents(8), torch.arange(8.0), Joint())
    assert torch.allclose(pair_loss(*args, weights="uniform"), pair_loss(*args, tau=1e9))


def test_random_difficulties_are_the_whole_numbers_from_0_to_9(monkeypatch):
    seen, real = [], darkdistill.alignment_weights

    def look(d, mu, tau):
        seen.extend(d.tolist())
        return real(d, mu, tau)

    monkeypatch.setattr(darkdistill, "alignment_weights", look)
    x = latents(200)
    args = (net(1), net(2, seed=1), x, torch.full((200,), 20.0), Joint())
    pair_loss(*args, rkd=RKD(1, 0), weights="random", generator=rng())
    assert set(seen) == set(range(10))


# ---------------------------------------------------------------- darkdistill: the method


@pytest.mark.parametrize("name, low, high", [("P", 0.001, 1000), ("bin_width", 0.01, 9.99)])
def test_limits_belong_to_what_is_allowed(name, low, high):
    for v in (low, high):
        assert getattr(DarkDistill(**{name: v}), name) == v
    for v in (low * 0.99, high * 1.0005):
        with pytest.raises(ValueError, match=f"{name}=.* must be a finite number"):
            DarkDistill(**{name: v})


def a_round(stages=2, frozen=False, **kw):
    "(method, state, tiers, updates): each tier has one client, which sends back what it got."
    whole = net(stages)
    whole.stages.requires_grad_(not frozen)
    m = made(DarkDistill, Joint(), **{**dict(d_eps=3, d_h=5, server_batch=8), **kw})
    state, tiers, updates = m.setup(whole), {}, []
    counts = torch.zeros(K, bins_of(m.bin_width), dtype=torch.int)
    counts[:, 0] = 2
    for t in range(1, stages + 1):
        w = m.send(state, Client(t - 1, t, torch.arange(6), torch.arange(0)))
        tiers[t] = (copied(w), 6)
        updates.append(Update(t - 1, t, 6, w, 1.0, dict(histogram=counts)))
    return m, state, tiers, updates


def test_generators_are_made_once_and_filled_anew():
    m, *_ = a_round(3)
    first = m.generators({}, Streams(0))
    weights = {t: copied(g.state_dict()) for t, g in first.items()}
    stored = {f"gen{t}.{k}": v + 1 for t, w in weights.items() for k, v in w.items()}
    again = m.generators(stored, Streams(0))
    assert list(first) == [1, 2] and all(again[t] is first[t] for t in first)
    assert all(
        same(again[t].state_dict(), {k: v + 1 for k, v in weights[t].items()}) for t in first
    )
    assert all(same(g.state_dict(), weights[t]) for t, g in m.generators({}, Streams(0)).items())


def test_the_reference_is_the_global_network_of_the_round(monkeypatch):
    m, state, tiers, updates = a_round(server_epochs=1)
    seen, real = [], darkdistill.train_generator

    def look(gen, teacher, reference, *args):
        seen.append(copied(reference.state_dict()))
        return real(gen, teacher, reference, *args)

    monkeypatch.setattr(darkdistill, "train_generator", look)
    for rnd in range(2):
        state["net"] = {k: v + 0.5 for k, v in state["net"].items()}
        m.server_step(state, tiers, updates, rnd, Streams(0))
        assert same(seen[rnd], {k: state["net"][k] for k in seen[rnd]})
    assert len(seen) == 2 and {k.split(".")[0] for k in seen[0]} == {"stem", "stages", "exits"}


@pytest.mark.parametrize("width, smoothing", [(0.5, 0.0005), (1, 0.001), (2.0, 0.002)])
def test_smoothing_is_a_thousandth_per_nat(monkeypatch, width, smoothing):
    "So a seen class gets as much of it in many narrow bins as in a few wide ones."
    m, state, tiers, updates = a_round(server_epochs=1, bin_width=width)
    seen, real = [], DifficultyHistogram.sample

    def look(self, n, g, smoothing):
        seen.append((n, smoothing))
        return real(self, n, g, smoothing)

    monkeypatch.setattr(DifficultyHistogram, "sample", look)
    m.server_step(state, tiers, updates, 0, Streams(0))
    assert seen == [(8, pytest.approx(smoothing))]


def test_a_server_step_that_ends_in_infinity_is_an_error():
    "The very last step overflows: no later one is there to stumble over it."
    m, *args = a_round(server_epochs=1, kd_steps=1, kd_lr=1e38, kd_weight_decay=1e4)
    with pytest.raises(FloatingPointError, match="round 1 left weights that are not finite"):
        m.server_step(*args, 0, Streams(0))


def test_generators_that_end_in_nan_are_an_error(monkeypatch):
    m, *args = a_round(server_epochs=1, kd_steps=1)
    fit = m._fit_generator

    def spoil(gen, *rest):
        said = fit(gen, *rest)
        gen.label.weight.data[0] = math.nan
        return said

    monkeypatch.setattr(m, "_fit_generator", spoil)
    monkeypatch.setattr(m, "_distil", lambda *a: (0.0, []))
    with pytest.raises(FloatingPointError, match="round 1 left weights that are not finite"):
        m.server_step(*args, 0, Streams(0))


def test_a_server_step_that_works_changes_the_student_alone_and_says_so():
    m, state, tiers, updates = a_round()
    new, server, info = m.server_step(state, tiers, updates, 0, Streams(0))
    assert info["server_step"] == "1 -> 2" and same(new[1][0], tiers[1][0])
    assert not same(new[2][0], tiers[2][0]) and {k[:4] for k in server} == {"gen1"}
    assert m.remark([info]) == ""


ZERO = ["kd_lr", "gen_lr", "kd_weight_decay", "lam_ce", "lam_dif", "lam_div"]
COUNTS = ["kd_steps", "gen_steps", "server_epochs"]
GENERATORS = ["gen_lr", "lam_ce", "lam_dif", "lam_div", "gen_steps"]


@pytest.mark.parametrize("name", [*ZERO, *COUNTS])
def test_settings_of_the_server_step_begin_at_0(name):
    m = made(DarkDistill, **{name: 0})
    assert getattr(m.generator if name in GENERATORS else m, name) == 0
    for v in (-1, 0.5) if name in COUNTS else (-1e-9,):
        with pytest.raises(ValueError, match=f"{name}="):
            made(DarkDistill, **{name: v})


def test_no_two_methods_share_their_generators_settings():
    own = GeneratorSettings(gen_steps=2)
    a, b = DarkDistill(generator=own), DarkDistill(generator=own)
    own.gen_steps = a.generator.lam_ce = 7
    assert (b.generator.gen_steps, b.generator.lam_ce) == (2, 0.1)
    with pytest.raises(ValueError, match="^generator=.* must be GeneratorSettings"):
        DarkDistill(generator=dict(gen_steps=2))


@pytest.mark.parametrize("rkd", [(1,), (1, 2, 3), 5, (1, -1), (math.nan, 1)])
def test_the_relational_loss_has_two_weights(rkd):
    assert DarkDistill(rkd=[0, 2]).rkd == (0, 2)
    with pytest.raises(ValueError, match="rkd="):
        DarkDistill(rkd=rkd)


def test_a_server_step_trains_with_its_settings(monkeypatch):
    "SGD of the student's stages alone; Adam of each generator; so many steps of each."
    made, steps, real = [], [], darkdistill.SGD

    class Sgd(real):
        def __init__(self, params, **kw):
            params = list(params)
            made.append((len(params), kw))
            super().__init__(params, **kw)

        def step(self):
            steps.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(darkdistill, "SGD", Sgd)
    m, *args = a_round(kd_lr=0.01, kd_steps=3, server_epochs=2, kd_weight_decay=0.2)
    m.server_step(*args, 0, Streams(0))
    stages = len(list(net(2).stages.parameters()))
    assert made == [(stages, dict(lr=0.01, weight_decay=0.2))] and steps == [0.01] * 6


def test_each_step_of_a_student_follows_its_own_gradient(monkeypatch):
    "A loss with gradient 1 everywhere: three steps of .01 take .03 off every weight of a stage."
    loss = lambda teacher, student, *rest: sum(p.sum() for p in student.stages.parameters())
    monkeypatch.setattr(darkdistill, "pair_loss", loss)
    m, *args = a_round(kd_lr=0.01, kd_steps=3, server_epochs=1, kd_weight_decay=0)
    new = m.server_step(*args, 0, Streams(0))[0][2][0]
    before = args[1][2][0]
    for name, _ in net(2).stages.named_parameters():
        assert torch.allclose(new[f"stages.{name}"], before[f"stages.{name}"] - 0.03, atol=1e-6)


def test_a_server_step_with_nothing_to_compare_says_so(monkeypatch):
    monkeypatch.setattr(darkdistill, "pair_loss", lambda *a: None)
    m, *args = a_round()
    info = m.server_step(*args, 0, Streams(0))[2]
    why = "no batch of 8 latents left samples at every exit of a student"
    assert info["server_step"] == f"nothing: {why}" and info["kd_loss"] == 0


def test_a_server_step_reports_difficulties_and_losses():
    m, state, tiers, updates = a_round(3, bin_width=2.0, server_epochs=1)
    _, server, info = m.server_step(state, tiers, updates, 0, Streams(0))
    assert info["difficulty"] == {str(t): [6, 0, 0, 0, 0] for t in (1, 2, 3)}
    assert info["bin_width"] == 2 and set(info["generator1"]) == {"ce", "dif", "scale"}
    assert info["server_step"] == "1 -> 2, 2 -> 3" and math.isfinite(info["kd_loss"])
    assert {k.split(".")[0] for k in server} == {"gen1", "gen2"}


def test_pairs_count_by_the_samples_of_their_teachers(monkeypatch):
    seen = []
    m, state, tiers, updates = a_round(3, server_epochs=1, kd_steps=1)
    tiers = {t: (w, n) for (t, (w, _)), n in zip(tiers.items(), (2, 6, 99))}
    monkeypatch.setattr(m, "_distil", lambda *a: seen.append(a[4]) or (0.0, []))
    m.server_step(state, tiers, updates, 0, Streams(0))
    assert seen == [{1: 0.25, 2: 0.75}]


@pytest.mark.parametrize(
    "tiers, pairs", [((1, 3), ""), ((2, 3), "2 -> 3"), ((1,), ""), ((1, 2), "1 -> 2")]
)
def test_only_neighbouring_tiers_teach(tiers, pairs):
    m, state, every, updates = a_round(3, server_epochs=1)
    chosen, said = {t: every[t] for t in tiers}, [u for u in updates if u.tier in tiers]
    new, _, info = m.server_step(state, chosen, said, 0, Streams(0))
    want = pairs or "nothing: no two neighbouring tiers took part"
    assert info["server_step"] == want and set(new) == set(tiers)


@pytest.mark.parametrize("name", ["server_epochs", "kd_steps", "kd_lr"])
def test_what_switches_the_server_step_off_is_named(name):
    m, state, tiers, updates = a_round(**{name: 0})
    new, _, info = m.server_step(state, tiers, updates, 0, Streams(0))
    assert info["server_step"] == f"nothing: {name}=0 switches it off"
    assert all(same(new[t][0], tiers[t][0]) for t in tiers)


def test_without_server_epochs_generators_are_neither_made_nor_stored():
    m, state, tiers, updates = a_round(server_epochs=0)
    kept = dict(x=torch.zeros(1))
    new, server, _ = m.server_step({**state, "server": kept}, tiers, updates, 0, Streams(0))
    assert new is tiers and server is kept and not hasattr(m, "_gens")


HISTOGRAMS = {
    "extra has no histogram": lambda h: None,
    "whole numbers of shape": lambda h: h.float(),
    "torch.bool": lambda h: h > 0,
    r"of shape \(3, 10\)": lambda h: h[:, :9],
    "free of negative counts": lambda h: h - 1,
    "of 2 samples": lambda h: h + 1,
}


@pytest.mark.parametrize("words", HISTOGRAMS)
def test_a_histogram_counts_each_sample_once(words):
    m, client = made(DarkDistill, Joint(), d_eps=3, d_h=5), a_client()
    counts = torch.zeros(K, 10, dtype=torch.int)
    counts[0, 3] = 2
    sent, answer = an_answer(m, m.setup(net()), client, extra=dict(histogram=counts))
    assert m.check_update(answer, sent, client) is answer
    bad = HISTOGRAMS[words](counts)
    answer.extra = {} if bad is None else dict(histogram=bad)
    with pytest.raises(ValueError, match=words):
        m.check_update(answer, sent, client)


def test_a_client_reports_the_difficulties_under_the_weights_that_it_received():
    m, client, data = (
        DarkDistill(Joint(), batch_size=4, bin_width=0.5),
        a_client(train=range(8)),
        images(),
    )
    sent = m.send(m.setup(net()), client)
    d = measure_difficulty(m.receive(sent, 1), m.objective, data)
    got = m.local_update(sent, data, client, 0, Streams(0)).extra["histogram"]
    want = DifficultyHistogram.of(d, data.y, K, 20, 0.5).counts
    assert torch.equal(got, want.int()) and got.dtype is torch.int32 and got.sum() == 8


def test_frozen_students_are_the_reason_of_a_step_that_does_nothing():
    m, state, tiers, updates = a_round(frozen=True)
    new, _, info = m.server_step(state, tiers, updates, 0, Streams(0))
    assert info["server_step"] == "nothing: the stages that would learn are frozen"
    assert all(same(new[t][0], tiers[t][0]) for t in tiers)


NOTHING = [dict(server_step=f"nothing: {why}") for why in ("no pairs", "frozen", "frozen")]


@pytest.mark.parametrize("kw", [{}, dict(kd_lr=1), dict(server_epochs=1), dict(kd_steps=1)])
def test_a_run_whose_server_step_never_did_anything_is_remarked_on(kw):
    "With the reason that came most often."
    said = (
        "DarkDistill's server step did nothing in any of 3 rounds (frozen): this run is one of EEFL"
    )
    assert DarkDistill(**kw).remark(NOTHING) == said


@pytest.mark.parametrize("kw", [dict(kd_lr=0), dict(server_epochs=0), dict(kd_steps=0)])
def test_a_server_step_that_was_switched_off_is_not_remarked_on(kw):
    assert DarkDistill(**kw).remark(NOTHING) == ""


@pytest.mark.parametrize("row", [dict(server_step="1 -> 2"), {}])
def test_one_round_that_did_something_is_enough_for_no_remark(row):
    assert DarkDistill().remark([*NOTHING, row]) == ""


# ---------------------------------------------------------------- method


@pytest.mark.parametrize(
    "clients, shares, sizes",
    [
        (10, (0.25,) * 4, [3, 3, 2, 2]),
        (7, (0.5, 0.25, 0.25), [3, 2, 2]),
        (5, (0.7, 0.3), [4, 1]),
        (4, (0.5, 0.5), [2, 2]),
    ],
)
def test_clients_that_rounding_leaves_over_go_to_the_largest_remainders(clients, shares, sizes):
    assert tier_sizes(clients, shares) == sizes


def test_clients_are_dealt_by_default_as_documented():
    want = dict(clients=20, gamma=0.5, tiers=(0.25,) * 4, family="client", valid=0.2, cover=True)
    want |= dict(seed=0, min_size=None)
    assert {name: default(make_clients, name) for name in want} == want
    y = torch.arange(400) % 10
    for c, told in zip(make_clients(y), make_clients(y, 20, 0.5, valid=0.2)):
        assert torch.equal(c.train, told.train) and torch.equal(c.valid, told.valid)
        assert (len(c.train), len(c.valid)) == (16, 4)


def clients_of(tiers):
    return [Client(i, t, torch.arange(2) + 2 * i, torch.arange(0)) for i, t in enumerate(tiers)]


def test_a_round_too_small_for_all_tiers_takes_its_first_draw():
    clients, m = clients_of([1, 2, 3, 4]), EEFL(participation=0.5)
    for rnd in range(10):
        g = Streams(0).generator("sampling", rnd)
        first = sorted(torch.randperm(4, generator=g)[:2].tolist())
        assert [c.id for c in m.configure(rnd, clients, Streams(0))] == first


def test_a_round_large_enough_for_all_tiers_has_them_all():
    clients, m = clients_of([1, 1, 1, 1, 1, 1, 2, 3]), EEFL(participation=0.375)
    for rnd in range(10):
        assert {c.tier for c in m.configure(rnd, clients, Streams(0))} == {1, 2, 3}


def test_a_client_of_a_frozen_network_without_buffers_sends_no_weights():
    m = EEFL(Joint())
    sent = m.send(m.setup(net().requires_grad_(False)), client := clients_of([2])[0])
    update = Update(0, 2, 2, {}, 1.0)
    assert m.expected(sent) == set() and m.check_update(update, sent, client) is update


class Counting(EEFL):
    "Notes with how many threads each client trains."

    def local_update(self, *args):
        self.threads = [*getattr(self, "threads", []), torch.get_num_threads()]
        return super().local_update(*args)


def test_clients_that_train_alone_do_so_in_one_thread():
    data, m = images(), Counting(Joint(), batch_size=2)
    torch.set_num_threads(2)
    try:
        train_alone(m, net, data, data, clients_of([1, 2]), rounds=2)
        assert m.threads == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["lr", "decay", "momentum", "weight_decay", "participation"])
def test_settings_of_a_method_end_where_they_should(name):
    "A value at the end of a range is in it or not; just beyond it none is."
    ends = dict(
        lr=([0, 1e9], [-1e-9]),
        decay=([1e-9, 1], [0, 1.001]),
        momentum=([0, 0.999], [-1e-9, 1]),
        weight_decay=([0, 1e9], [-1e-9]),
        participation=([1e-9, 1], [0, 1.001]),
    )
    for v in ends[name][0]:
        assert getattr(EEFL(**{name: v}), name) == v
    for v in ends[name][1]:
        with pytest.raises(ValueError, match=f"{name}="):
            EEFL(**{name: v})


@pytest.mark.parametrize("clients, share", [(100, 0.29), (50, 0.58), (10, 0.7)])
def test_shares_that_miss_a_whole_number_by_rounding(clients, share):
    "100 * .29 is 28.999999999999996."
    n = round(clients * share)
    assert tier_sizes(clients, (1 - share, share)) == [clients - n, n]
    m = EEFL(participation=share)
    assert len(m.configure(0, clients_of([1] * clients), Streams(0))) == n


def test_shares_add_to_1_within_a_millionth():
    assert tier_sizes(4, (0.5, 0.5 + 9e-7)) == [2, 2]
    for shares in ((0.5, 0.5 + 2e-6), (0.5, 0.4), (1.5, -0.5)):
        with pytest.raises(ValueError, match="tier"):
            tier_sizes(4, shares)
    with pytest.raises(ValueError, match="tier 2 has no client"):
        tier_sizes(3, (0.9, 0.1))


def test_tiers_are_drawn_until_each_sees_all_classes():
    "Each client holds one class, so that most draws leave a tier without one of them."
    y = torch.arange(80) % 2
    deal = lambda cover, seed: make_clients(y, 4, 1e-6, (0.5, 0.5), cover=cover, seed=seed)
    held = lambda who, t: {int(y[i]) for c in who if c.tier == t for i in [*c.train, *c.valid]}
    seen = lambda who: min(len(held(who, t)) for t in (1, 2))
    assert [seen(deal(True, s)) for s in range(12)] == [2] * 12
    first = [[c.tier for c in deal(False, s)] for s in range(12)]
    assert all(sorted(t) == [1, 1, 2, 2] for t in first)
    assert min(seen(deal(False, s)) for s in range(12)) == 1


def test_the_best_draw_stands_where_no_tier_can_see_everything(monkeypatch):
    "Two of three classes at most; a thousand draws and no more."
    hist, drawn = torch.tensor([[9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]]), []
    real = torch.randperm

    def count(*args, **kw):
        drawn.append(args)
        return real(*args, **kw)

    monkeypatch.setattr(torch, "randperm", count)
    tier = method._draw_tiers(hist, [2, 2], rng(), True)
    assert len(drawn) == 1000
    assert min(int((hist[tier == t].sum(0) > 0).sum()) for t in (1, 2)) == 2
    method._draw_tiers(hist, [2, 2], rng(), False)
    assert len(drawn) == 1001


def test_classes_of_a_single_image_count_where_tiers_are_drawn():
    "No tier can see all three classes, but each can see two: the rare ones go to different tiers."
    hist = torch.tensor([[1, 0, 9], [0, 1, 9], [0, 0, 9], [0, 0, 9]])
    for seed in range(8):
        tier = method._draw_tiers(hist, [2, 2], rng(seed), True)
        assert tier[0] != tier[1]


@pytest.mark.parametrize("valid, kept", [(0, 10), (0.25, 8), (0.29, 8), (0.99, 1)])
def test_a_client_keeps_one_image_to_train_on_at_least(valid, kept):
    for c in make_clients(torch.arange(40) % 2, 4, 1.0, (1,), valid=valid):
        assert (len(c.train), len(c.valid)) == (kept, 10 - kept) and c.tier == 1
        assert not set(c.train.tolist()) & set(c.valid.tolist())
    with pytest.raises(ValueError, match="valid=1"):
        make_clients(torch.arange(40) % 2, 4, 1.0, (1,), valid=1)


def a_client(id=0, tier=1, train=(0, 1), valid=(2,)):
    as_indices = lambda v: v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=torch.long)
    return Client(id, tier, as_indices(train), as_indices(valid))


@pytest.mark.parametrize(
    "clients, words",
    [
        ([], "clients"),
        ([a_client(), a_client()], "client id"),
        ([a_client(tier=0)], "client 0: tier"),
        ([a_client(tier=3)], "client 0: tier"),
        ([a_client(train=())], "client 0: train"),
        ([a_client(train=(0, 4))], "indices within the 4 images"),
        ([a_client(valid=(-1,))], "client 0: valid"),
        ([a_client(train=(2,))], "1 indices of train"),
        ([a_client(train=torch.tensor([True, False]))], "client 0: train"),
        ([a_client(train=torch.tensor([[0]]))], "client 0: train"),
        ([a_client(train=torch.tensor([0.0]))], "client 0: train"),
    ],
)
def test_clients_that_cannot_be(clients, words):
    with pytest.raises(ValueError, match=words):
        check_clients(clients, 4, 2)
    check_clients([a_client(5, 2, (0, 3), ()), a_client(-1)], 4, 2)


def test_averages_by_hand():
    "Weighted, in 64 bit; counters take the largest value."
    a = dict(w=torch.tensor([1.0, 5.0]), n=torch.tensor(3))
    b = dict(w=torch.tensor([4.0, 5.0]), n=torch.tensor(7))
    mean = average([a, b], [1, 2])
    assert mean["w"].tolist() == [3, 5] and mean["n"] == 7 and mean["w"].dtype is torch.float32
    assert average([a], [0.5])["w"].tolist() == [1, 5]
    for weights, n, words in [
        ([], [], "weights"),
        ([a, b], [1], "2 numbers, one for each set"),
        ([a, b], [1, 0], "n=0"),
        ([a, dict(w=b["w"])], [1, 1], "the same names"),
        ([a, b | dict(w=torch.zeros(3))], [1, 1], "w=.3,. must be of shape .2,. in all sets"),
    ]:
        with pytest.raises(ValueError, match=words):
            average(weights, n)


def test_blocks_are_averaged_over_the_tiers_that_own_them():
    "A name that is missing has not changed; what nobody sends keeps its value."
    names = ["stem.0.weight", "stages.0.w", "stages.1.w", "exits.2.w"]
    old = {k: torch.tensor(10.0) for k in names}
    tiers = {
        1: ({k: torch.tensor(1.0) for k in names[:2]}, 1),
        2: ({names[0]: torch.tensor(4.0), names[2]: torch.tensor(6.0)}, 2),
    }
    new = block_average(old, tiers)
    assert [new[k].item() for k in names] == [3, (1 + 2 * 10) / 3, 6, 10]
    assert new["exits.2.w"] is old["exits.2.w"]
    with pytest.raises(ValueError, match="tier 1=.*names of the global network"):
        block_average(old, {1: (dict(other=torch.tensor(0.0)), 1)})


def test_bytes_by_hand():
    sent = dict(a=torch.zeros(3, 2), b=torch.zeros(5, dtype=torch.int64), c=torch.zeros(()).half())
    assert nbytes(sent) == 24 + 40 + 2 and nbytes({}) == 0


def test_what_may_have_changed_is_copied():
    n = net()
    n.stages[0].requires_grad_(False)
    state = trained_state(n)
    frozen = {k for k, p in n.named_parameters() if k.startswith("stages.0")}
    assert set(state) == set(n.state_dict()) - frozen and frozen
    before = copied(state)
    with torch.no_grad():
        for v in n.state_dict().values():
            v.add_(1)
    assert same(state, before)


def test_a_client_gets_its_prefix_and_nothing_deeper():
    m = EEFL(Joint())
    state = m.setup(net(3))
    for tier in (1, 2, 3):
        sent = m.send(state, clients_of([tier])[0])
        assert set(sent) == set(net(3).prefix(tier).state_dict())
        assert same(m.receive(sent, tier).state_dict(), sent)


def test_parts_of_a_network_come_in_the_mode_that_they_were_in():
    m, whole = EEFL(Joint()), net(2)
    whole.train()
    whole.stages[0].eval()
    sent = m.send(m.setup(whole), client := clients_of([2])[0])
    for _ in range(2):
        got = m.receive(sent, client.tier)
        assert [got.stages[i].training for i in (0, 1)] == [False, True] and got.training
        got.eval()


def test_local_training_gets_the_settings_of_its_round(monkeypatch):
    "The learning rate falls by the same factor every round."
    seen, real = [], method.fit

    def look(net, data, *args, **kw):
        seen.append(args)
        return real(net, data, *args, **kw)

    monkeypatch.setattr(EEFL, "_train", staticmethod(look))
    m = EEFL(Joint(), lr=0.2, decay=0.5, momentum=0.3, weight_decay=0.01, batch_size=4, epochs=2)
    state, client, data = m.setup(net()), a_client(7, 2, range(8), ()), images()
    for rnd in (0, 3):
        update = m.local_update(m.send(state, client), data, client, rnd, Streams(0))
        assert (update.client, update.tier, update.samples) == (7, 2, 8)
    assert seen == [(2, 0.2, 0.3, 0.01, 4), (2, 0.2 * 0.5**3, 0.3, 0.01, 4)]


def an_answer(m, state, who, **change):
    sent = m.send(state, who)
    got = dict(client=who.id, tier=who.tier, samples=2, weights=copied(sent), loss=1.0)
    return sent, Update(**(got | change))


@pytest.mark.parametrize("old, limit", [(0.5, 1e6), (1.0, 1e6), (20.0, 2e7), (-20.0, 2e7)])
def test_a_weight_may_grow_a_millionfold_but_not_further(old, limit):
    m, client = EEFL(Joint()), a_client()
    state = m.setup(net())
    name = next(k for k in state["net"] if k.endswith("weight"))
    state["net"] = {k: torch.full_like(v, old) for k, v in state["net"].items()}
    for value, ok in ((limit, True), (-limit, True), (1.01 * limit, False)):
        sent, answer = an_answer(m, state, client)
        answer.weights[name].view(-1)[0] = value
        if ok:
            m.check_update(answer, sent, client)
            continue
        with pytest.raises(FloatingPointError, match="is the most that is sane"):
            m.check_update(answer, sent, client)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(client=1), ValueError, "client=1"),
        (dict(tier=2), ValueError, "tier=2"),
        (dict(samples=0), ValueError, "samples=0"),
        (dict(samples=3), ValueError, "samples=3"),
        (dict(loss=math.inf), FloatingPointError, "training loss is inf"),
        (dict(loss=None), ValueError, "loss=None"),
        (dict(extra=[1]), ValueError, "extra"),
        (dict(extra=dict(a=1)), ValueError, "extra"),
        (dict(extra=dict(a=torch.tensor(math.nan))), FloatingPointError, "extra holds values"),
        (dict(weights=[1]), ValueError, "a dict of tensors"),
        (dict(weights={}), ValueError, "complete"),
    ],
)
def test_answers_that_cannot_be_used(change, error, words):
    m, client = EEFL(Joint()), a_client()
    sent, answer = an_answer(m, m.setup(net()), client, **change)
    with pytest.raises(error, match=words):
        m.check_update(answer, sent, client)


def test_answers_of_numpy_become_numbers_of_python():
    m, client = EEFL(Joint()), a_client()
    counts = dict(a=torch.zeros(0), b=torch.tensor([1, 2]), c=torch.ones(2, dtype=torch.bool))
    sent, answer = an_answer(
        m, m.setup(net()), client, samples=np.int64(1), loss=np.float32(0.5), extra=counts
    )
    got = m.check_update(answer, sent, client)
    assert (type(got.samples), type(got.loss), got.samples, got.loss) == (int, float, 1, 0.5)


@pytest.mark.parametrize("spoil", [torch.Tensor.double, lambda v: v[None], lambda v: v.to_sparse()])
def test_weights_come_back_in_the_kind_that_they_were_sent(spoil):
    m, client = EEFL(Joint()), a_client()
    sent, answer = an_answer(m, m.setup(net()), client)
    name = next(k for k, v in sent.items() if v.is_floating_point())
    answer.weights[name] = spoil(answer.weights[name])
    with pytest.raises(ValueError, match=f"{name} is .*, but .* was sent"):
        m.check_update(answer, sent, client)
    answer.weights[name] = sent[name]
    answer.weights["other"] = sent[name]
    with pytest.raises(ValueError, match="named as what was sent"):
        m.check_update(answer, sent, client)


def test_updates_of_a_tier_count_by_their_samples():
    m = EEFL(Joint())
    state, updates = m.setup(net()), []
    for cid, (n, v) in enumerate([(1, 0.0), (3, 4.0)]):
        sent = m.send(state, a_client(cid, 2))
        weights = {k: torch.full_like(w, v) for k, w in sent.items()}
        updates.append(Update(cid, 2, n, weights, 1.0))
    new, info = m.aggregate(state, updates, 0, Streams(0))
    floats = [v for v in new["net"].values() if v.is_floating_point()]
    assert all((v == 3).all() for v in floats) and info == {} and new["server"] == {}


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = dict(net=dict(a=torch.ones(2)), server={"x/y": torch.zeros(1)}, objective={})
    save_state(tmp_path / "s", state, dict(log=[1]))
    got, meta = load_state(tmp_path / "s")
    assert list(got) == ["net", "server", "objective"] and meta == dict(log=[1])
    assert all(same(got[k], state[k]) for k in got)
    save_state(tmp_path / "t", dict(other=dict(a=torch.ones(1))), {})
    with pytest.raises(ValueError, match="'other/a', which is no part of a method's state"):
        load_state(tmp_path / "t")


def test_a_round_counts_bytes_samples_and_losses():
    m, data = EEFL(Joint(), participation=1, batch_size=4), images(12)
    clients = [a_client(3, 1, range(4), ()), a_client(5, 2, range(4, 12), ())]
    state = m.setup(net())
    start = time.perf_counter()
    new, row = play_round(m, state, data, clients, 2, Streams(0))
    took = time.perf_counter() - start
    own = [
        m.local_update(m.send(state, c), data.subset(c.train), c, 2, Streams(0)) for c in clients
    ]
    assert row["round"] == 3 and row["clients"] == [3, 5] and row["left_out"] == {}
    assert row["loss"] == pytest.approx((4 * own[0].loss + 8 * own[1].loss) / 12)
    sent = [nbytes(m.send(state, c)) for c in clients]
    assert row["bytes_down"] == sum(sent) == row["bytes_up"]
    parts = row["seconds_clients"], row["seconds_server"]
    assert min(parts) >= 0 and sum(parts) <= took
    assert not same(new["net"], state["net"])


class Extra(EEFL):
    "Clients upload 40 bytes more."

    def local_update(self, *args):
        update = super().local_update(*args)
        update.extra = dict(more=torch.zeros(10))
        return update


def test_extra_tensors_are_uploaded_too():
    rows = []
    for kind in (EEFL, Extra):
        m = kind(Joint(), batch_size=4, participation=1)
        clients = [a_client(0, 2, range(8), ())]
        rows.append(play_round(m, m.setup(net()), images(), clients, 0, Streams(0))[1])
    assert rows[1]["bytes_up"] == rows[0]["bytes_up"] + 40


def run(m=None, rounds=5, clients=None, **kw):
    clients = clients or [a_client(0, 1, range(4), ()), a_client(1, 2, range(4, 8), ())]
    data = images()
    return simulate(m or EEFL(Joint(), batch_size=2), net, data, data, clients, rounds, **kw)


@pytest.mark.parametrize("every, at", [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_accuracy_is_measured_every_so_often_and_at_the_end(every, at):
    r = run(eval_every=every)
    assert [row["round"] for row in r.log if "accuracy" in row] == at
    assert r.log[-1]["accuracy"] == evaluate(r.method, r.state, images())
    assert all(row["seconds"] >= row["seconds_clients"] for row in r.log)


def test_a_checkpoint_from_the_middle_gets_its_accuracy(tmp_path):
    run(rounds=2, checkpoint=tmp_path / "c", eval_every=2)
    run(rounds=3, checkpoint=tmp_path / "c", eval_every=9)
    longer = run(rounds=4, checkpoint=tmp_path / "c", eval_every=9)
    plain = run(rounds=4)
    assert same(longer.state["net"], plain.state["net"])
    assert [row["round"] for row in longer.log] == [1, 2, 3, 4]
    assert same(longer.net().state_dict(), plain.net().state_dict())
    assert torch.equal(longer.logits(images()), plain.logits(images()))


def test_a_run_tells_each_round_as_it_ends():
    told = []
    r = run(rounds=2, on_round=lambda row: told.append(copy.deepcopy(row)))
    assert [t["round"] for t in told] == [1, 2] and told[0]["accuracy"] == r.log[0]["accuracy"]


@pytest.mark.parametrize("part, rounds, local", [(0.5, 5, 2), (0.5, 1, 1), (1, 3, 3), (0.1, 4, 1)])
def test_a_client_alone_trains_as_often_as_it_would_have_been_drawn(part, rounds, local):
    "On average: rounds times participation, and once at least."
    m = Counting(Joint(), batch_size=2, participation=part)
    alone = train_alone(m, net, images(), images(), [a_client(0, 1, range(4), ())], rounds)
    assert len(m.threads) == local and len(alone) == 1 and 0 <= alone[0] <= 1


class Bad(EEFL):
    "Clients of `bad` fail as they are told."

    bad, error = (), ValueError("broken")

    def local_update(self, weights, data, client, rnd, streams):
        if client.id in self.bad:
            raise self.error
        return super().local_update(weights, data, client, rnd, streams)


def bad(ids, error=None):
    m = Bad(Joint(), batch_size=2, participation=1)
    m.bad, m.error = ids, error or m.error
    return m


def test_a_client_that_raises_is_left_out_and_named():
    with pytest.warns(UserWarning, match="round 1: client 0 is left out, it raised ValueError"):
        r = run(bad([0]), rounds=1)
    assert r.log[0]["left_out"] == {"0": "it raised ValueError: broken"}
    with pytest.raises(RuntimeError, match="round 1: client 0, it raised ValueError: broken"):
        run(bad([0]), rounds=1, faults="raise")


@pytest.mark.parametrize("ids", [[0, 1], [0]])
def test_all_clients_that_diverge_end_a_run_but_one_does_not(ids):
    "Only where everybody diverges, and there are two at least or there is but one client."
    m, nan = bad(ids, FloatingPointError("the loss is nan")), "the loss is nan"
    if len(ids) == 2:
        with pytest.raises(FloatingPointError, match=f"{nan} .round 1, all 2 clients"):
            run(m, rounds=1)
    else:
        with pytest.warns(UserWarning, match="client 0 is left out"):
            assert run(m, rounds=1).log[0]["loss"] is not None
        with pytest.raises(FloatingPointError, match="all 1 clients"):
            run(m, rounds=1, clients=[a_client(0, 2, range(4), ())])


def test_a_round_without_an_update_keeps_the_network():
    with pytest.warns(UserWarning) as seen:
        r = run(bad([0, 1]), rounds=2)
    said = [str(w.message) for w in seen]
    assert "round 1: no client is left, the network stays as it is" in said
    assert any("in any of 2 rounds: the weights are the first ones" in t for t in said)
    assert [row["loss"] for row in r.log] == [None, None] and r.log[0]["bytes_up"] == 0
    assert same(r.state["net"], net().state_dict())


def test_a_progress_bar_tells_the_latest_loss_or_client(capsys):
    r = run(rounds=2, progress=True)
    assert "2/2 [" in (err := capsys.readouterr().err) and f"loss {r.log[1]['loss']:.3f}" in err
    args = (EEFL(Joint(), batch_size=2), net, images(), images(), [a_client(4, 1, range(4), ())])
    alone = train_alone(*args, 1, progress=True)
    assert "1/1 [" in (err := capsys.readouterr().err) and f"client 4: {alone[0]:.3f}" in err
    run(rounds=1, progress=False)
    assert capsys.readouterr().err == ""


def test_two_of_three_clients_that_diverge_do_not_end_a_run():
    m = bad([0, 1], FloatingPointError("the loss is nan"))
    clients = [a_client(i, 2, range(2 * i, 2 * i + 2), ()) for i in range(3)]
    with pytest.warns(UserWarning, match="is left out"):
        row = run(m, rounds=1, clients=clients).log[0]
    assert set(row["left_out"]) == {"0", "1"} and math.isfinite(row["loss"])


def test_a_run_that_was_cut_off_is_measured_where_it_ends(tmp_path):
    "Cut off after two of five rounds without accuracy, then asked for two."

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(rounds=5, eval_every=9, checkpoint=tmp_path / "c", on_round=stop)
    r = run(rounds=2, eval_every=9, checkpoint=tmp_path / "c")
    assert "accuracy" not in r.log[0]
    assert r.log[1]["accuracy"] == evaluate(r.method, r.state, images())


def test_a_policy_is_told_the_round(monkeypatch):
    m, client, told = EEFL(Joint(), batch_size=4), a_client(0, 1, range(8), ()), []
    monkeypatch.setattr(m.objective, "at", told.append)
    sent = m.send(m.setup(net()), client)
    for rnd in (0, 4):
        m.local_update(sent, images(), client, rnd, Streams(0))
    assert told == [0, 4]


def test_accuracy_is_that_of_the_state_given():
    "Whatever the working networks hold from the last client."
    r, y = run(rounds=2), images().y
    with torch.no_grad():
        right = [float((z.argmax(1) == y).float().mean()) for z in r.net()(images()[:][0])]
        other = {k: v.neg() if v.is_floating_point() else v for k, v in r.state["net"].items()}
    assert evaluate(r.method, r.state, images()) == pytest.approx(right)
    turned = copy.deepcopy(r.method.net)
    turned.load_state_dict(other)
    with torch.no_grad():
        z = turned.eval()(images()[:][0])
    want = [float((v.argmax(1) == y).float().mean()) for v in z]
    assert evaluate(r.method, {**r.state, "net": other}, images()) == pytest.approx(want)
    assert want != pytest.approx(right)


def test_a_round_takes_no_longer_than_the_run():
    start = time.perf_counter()
    r = run(rounds=2)
    assert 0 < sum(row["seconds"] for row in r.log) <= time.perf_counter() - start


@pytest.mark.parametrize("kernel, watched", [(True, True), (False, False), (None, False)])
def test_somebody_watches_a_terminal_or_a_notebook_that_can_be_asked(monkeypatch, kernel, watched):
    shell = SimpleNamespace(
        kernel=kernel if kernel is None else SimpleNamespace(_allow_stdin=kernel)
    )
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for terminal in (False, True):
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
        assert engine._somebody_watches() is (terminal or watched)
    monkeypatch.setattr(sys, "stderr", None)
    assert engine._somebody_watches() is watched


class TwoWords(Exception):
    "Can be sent, but not read: its `args` hold one of the two words that it is made of."

    def __init__(self, first, second):
        super().__init__(first)


class Overflow(TwoWords, FloatingPointError):
    pass


@pytest.mark.parametrize(
    "answer, kind, text",
    [
        (TwoWords("one", "two"), RuntimeError, "TwoWords: one"),
        (Overflow("one", "two"), FloatingPointError, "Overflow: one"),
        (ValueError("one"), ValueError, "one"),
        (lambda: 0, RuntimeError, "function: <function"),
    ],
)
def test_an_answer_that_cannot_be_sent_is_told_in_words(answer, kind, text):
    got = pickle.loads(pickle.dumps(engine.sendable(answer)))
    assert type(got) is kind and str(got).startswith(text)


STATE = dict(net=dict(a=torch.ones(2)), server={}, objective=dict(b=torch.zeros(1)))


@pytest.mark.parametrize(
    "part, weights, ok",
    [
        ("net", dict(a=torch.zeros(2)), True),
        ("net", dict(a=torch.zeros(3)), False),
        ("net", dict(a=torch.zeros(2).double()), False),
        ("net", dict(c=torch.zeros(2)), False),
        ("net", dict(a=torch.tensor([0, math.nan])), False),
        ("objective", {}, False),
        ("server", dict(x=torch.zeros(5)), True),
        ("server", dict(x=torch.tensor(math.inf)), False),
    ],
)
def test_a_stored_state_fits_a_fresh_one(part, weights, ok):
    "In names, shapes and types of what is trained; the server may have learned more. All is finite."
    assert engine._fits({**STATE, part: weights}, STATE) is ok


def test_there_are_no_more_processes_than_clients_and_none_without_rounds(monkeypatch, tmp_path):
    "One, this process, where clients are elsewhere or all rounds are done."
    asked, real = [], engine._workers

    def look(workers, *args):
        asked.append(workers)
        return real(1, *args)

    monkeypatch.setattr(engine, "_workers", look)
    for workers in (1, 2, 9):
        run(rounds=1, workers=workers)
    run(rounds=1, workers=2, checkpoint=tmp_path / "c")
    run(rounds=1, workers=2, checkpoint=tmp_path / "c")
    m = EEFL(Joint(), batch_size=2)
    run(m, rounds=1, workers=2, engine=engine.Here(m, images(), Streams(0)))
    assert asked == [1, 2, 2, 2, 1, 1]


# ---------------------------------------------------------------- baselines


def test_without_momentum_a_tier_keeps_what_its_clients_sent_to_the_last_bit():
    m = InclusiveFL(Joint(), beta=0)
    state, updates = m.setup(net(3)), []
    for t in (1, 2, 3):
        sent = m.send(state, a_client(t, t))
        weights = {k: v * 1.1 + 0.3 if v.is_floating_point() else v for k, v in sent.items()}
        updates.append(Update(t, t, 2, weights, 1.0))
    tiers = {u.tier: (u.weights, 2) for u in updates}
    new, server, _ = m.server_step(state, tiers, updates, 0, Streams(0))
    assert all(same(new[t][0], tiers[t][0]) for t in tiers)
    assert {k.split(".")[0] for k in server} == {"tier1", "tier2"}
    assert all(torch.equal(v, tiers[int(k[4])][0][k[6:]]) for k, v in server.items())


def test_every_tier_but_the_last_has_its_own_layers_from_the_start():
    state = InclusiveFL(Joint()).setup(net(3))
    own = lambda t: {
        f"tier{t}.{k}": v
        for k, v in state["net"].items()
        if k.startswith((f"stages.{t - 1}.", f"exits.{t - 1}."))
    }
    assert own(1) and own(2) and same(state["server"], own(1) | own(2))


def test_divergence_of_peers_by_hand():
    "Of two exits, each learns from the other: a mean over the batch, summed over exits."
    a, b = torch.tensor([[0.0, 0], [0, 0], [0, 0]]), torch.tensor([[0.0, 2], [0, 0], [0, 0]])
    p = 1 / (1 + math.exp(-2))
    q = [1 - p, p]
    there = sum(0.5 * math.log(0.5 / v) for v in q)
    back = sum(v * math.log(v / 0.5) for v in q)
    assert float(peer_divergence([a, b])) == pytest.approx((there + back) / 3, rel=1e-5)
    three = float(peer_divergence([a, b, b]))
    assert three == pytest.approx(2 * (there + back) / 3 / 2, rel=1e-5)


def test_exits_that_teach_each_other_have_the_same_classes():
    for logits in ([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2, 3), torch.zeros(1, 3)]):
        with pytest.raises(ValueError, match="logits of exit"):
            peer_divergence(logits)
    with pytest.raises(ValueError, match="logits="):
        peer_divergence([])


@pytest.mark.parametrize("clients, share, n", [(100, 0.29, 29), (10, 0.05, 1), (7, 0.5, 3)])
def test_as_many_take_part_as_with_eefl(clients, share, n):
    "A share of all clients, drawn of those who can hold the network, in the order of their list."
    m = ExclusiveFL(Joint(), participation=share)
    m.setup(net())
    drawn = m.configure(0, clients_of([2] * clients), Streams(0))
    ids = [c.id for c in drawn]
    assert len(ids) == n and ids == sorted(ids)
    g = Streams(0).generator("sampling", 0)
    assert ids == sorted(torch.randperm(clients, generator=g)[:n].tolist())


def test_the_weight_of_distillation_rises_with_the_rounds():
    assert ramp(0, 10) == pytest.approx(math.exp(-5)) and ramp(10, 10) == ramp(99, 10) == 1
    assert ramp(4, 10) == pytest.approx(math.exp(-5 * 0.6**2)) and ramp(0, 0) == 1


@pytest.mark.parametrize("name, low", [("beta", 0), ("alpha", 0), ("kd", 0), ("ramp_rounds", 0)])
def test_settings_of_baselines_begin_at_0(name, low):
    kind = InclusiveFL if name == "beta" else DepthFL
    assert getattr(kind(**{name: low}), name) == low
    with pytest.raises(ValueError, match=f"{name}=-0.1|{name}=-1"):
        kind(**{name: -1 if name == "ramp_rounds" else -0.1})


def test_layers_of_every_stage_by_their_names():
    from torch import nn

    stages = [nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Linear(1, 1)]
    names = layer_names(SimpleNamespace(stages=stages))
    assert names == [["stages.0.0.", "stages.0.1."], ["stages.1."]]


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("kind", [EEFL, PriorCalibration, ExitVotes, DifficultyFeedback])
def test_a_model_is_judged_unless_told_otherwise(kind):
    assert default(kind.survey, "judged") is True


@pytest.mark.parametrize(
    "labels, ok",
    [
        ([-1.0, 0, 3], True),
        ([-1.01, 0, 3], False),
        ([-1.0, 0, 3.01], False),
        ([-2.0, 0, 4], False),
        ([2.5, 2.5, 2.5], True),
    ],
)
def test_noisy_counts_lie_within_the_reach_of_the_noise(labels, ok):
    "With epsilon 30 noise reaches 1: two images give counts from -1 to 3, ends included."
    m, client = PriorCalibration(Joint(), calibration=1, epsilon=30), a_client()
    sent, answer = an_answer(m, m.setup(net()), client, extra=dict(labels=torch.tensor(labels)))
    answer.weights = {k: v for k, v in answer.weights.items() if k in m.expected(sent)}
    if ok:
        assert m.check_update(answer, sent, client) is answer
        return
    with pytest.raises(ValueError, match="2 images, give or take 1"):
        m.check_update(answer, sent, client)


def votes_of(client):
    "Sums and counts that a client with two validation images may send."
    m = ExitVotes(Joint())
    m.setup(net())
    counts = torch.tensor([1, 0, 1])
    return m, dict(sums=torch.zeros(K, client.tier, client.tier + 1), counts=counts)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(counts=torch.tensor([1, 1, 1])), "counts=.* must be 2 images"),
        (dict(counts=torch.tensor([3, -1, 0])), "counts=.* must be 2 images"),
        (dict(counts=torch.tensor([1, 1])), "counts=.* must be 2 images"),
        (dict(counts=None), "counts=None must be 2 images"),
        (dict(sums=torch.zeros(K, 2, 2)), r"sums=.* must be of shape \(3, 2, 3\)"),
        (dict(sums=None), "sums=None must be of shape"),
    ],
)
def test_sums_of_votes_cover_the_validation_images(change, words):
    client = a_client(tier=2, valid=(2, 3))
    m, said = votes_of(client)
    assert m.check_answer("votes", said, client) is said
    said = {k: v for k, v in (said | change).items() if v is not None}
    with pytest.raises(ValueError, match=words):
        m.check_answer("votes", said, client)

"""What reports give away: sensitivities, noise and its account, membership by histograms, images from gradients."""

import itertools, math
import pytest, torch
import torch.nn.functional as F
from federations import CLIENTS, TRAIN, go
from helpers import rng, same
from scipy import stats
from darkdistill_nb.core.seeds import Streams
from darkdistill_nb.exits.networks import cnn
from darkdistill_nb.federated import privacy as page
from darkdistill_nb.federated.calibration import noisy_counts
from darkdistill_nb.federated.darkdistill import DarkDistill
from darkdistill_nb.federated.difficulty import DifficultyHistogram, measure_difficulty
from darkdistill_nb.federated.generator import GeneratorSettings
from darkdistill_nb.federated.method import EEFL
from darkdistill_nb.federated.parallel_variant import DarkDistillPL
from darkdistill_nb.federated.privacy import (
    SENSITIVITY,
    NoisyReports,
    PrivateDarkDistill,
    advantage_bound,
    could_be_member,
    invert_change,
    label_from_gradient,
    local_change,
    matched_error,
    noisy_histogram,
    privacy_cell,
    privacy_record,
    privacy_table,
    run_privacy,
    smooth_net,
    total_epsilon,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = GeneratorSettings(d_eps=8, d_h=16)
TINY = dict(server_epochs=1, kd_steps=1, generator=SMALL, participation=1.0)


# ---------------------------------------------------------------- sensitivity and noise


def histogram(images, width):
    y, d = zip(*images)
    return DifficultyHistogram.of(torch.tensor(d), torch.tensor(y), 3, 4, width).counts


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_sensitivity_by_trying_everything(width):
    "All sets of three images over three labels and three difficulties: one more changes 1, one exchanged at most 2."
    kinds = [(y, d) for y in range(3) for d in (0.2, 1.1, 3.9)]
    added, replaced = set(), set()
    for images in itertools.combinations_with_replacement(kinds, 3):
        h = histogram(images, width)
        for new in kinds:
            added.add(int((histogram([*images, new], width) - h).abs().sum()))
            replaced.add(int((histogram([new, *images[1:]], width) - h).abs().sum()))
    assert added == {SENSITIVITY["add"]} and max(replaced) == SENSITIVITY["replace"]


@pytest.mark.parametrize("change, scale", [("add", 2.0), ("replace", 4.0)])
def test_the_scale_of_the_noise(change, scale, monkeypatch):
    "Laplace with scale sensitivity / epsilon: mean size, variance, and the whole distribution."
    seen = []

    def spy(counts, epsilon, generator):
        seen.append(noisy_counts(counts, epsilon, generator))
        return seen[-1]

    monkeypatch.setattr(page, "noisy_counts", spy)
    noisy_histogram(torch.full((100_000,), 1000), 0.5, rng(), change)
    noise = seen[0].double() - 1000
    assert noise.abs().mean() == pytest.approx(scale, rel=0.02)
    assert stats.kstest(noise[::20].numpy(), stats.laplace(scale=scale).cdf).pvalue > 0.001


def test_the_promise_is_kept():
    "Two histograms that differ by one exchanged image: no set of messages is e^epsilon times as likely (plus chance)."
    epsilon, n = 1.0, 20_000
    a, b = torch.tensor([3, 1, 0]), torch.tensor([2, 1, 1])
    told = lambda h, seed: [
        tuple(noisy_histogram(h, epsilon, rng(seed + i)).tolist()) for i in range(n)
    ]
    count = [{}, {}]
    for c, messages in zip(count, (told(a, 0), told(b, n))):
        for m in messages:
            c[m] = c.get(m, 0) + 1
    for one, other in (count, count[::-1]):
        for m, k in one.items():
            limit = math.exp(epsilon) * (other.get(m, 0) + 4 * math.sqrt(other.get(m, 0) + 1))
            assert k <= limit + 4 * math.sqrt(k), m


@pytest.mark.parametrize(
    "counts", [[[5, 0], [0, 2]], [[0, 0], [0, 0]], [[1, 0], [0, 0]], [[300, 7], [9, 80]]]
)
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 100.0])
def test_a_noisy_histogram_is_a_histogram(counts, epsilon):
    h = torch.tensor(counts)
    for seed in range(20):
        told = noisy_histogram(h, epsilon, rng(seed))
        assert told.shape == h.shape and told.dtype == h.dtype
        assert int(told.min()) >= 0 and int(told.sum()) == int(h.sum())
    assert torch.equal(noisy_histogram(h, 1e9, rng()), h)


def test_epsilons_add_up_and_bound_every_attack():
    assert total_epsilon(0.25, 8) == 2.0 and total_epsilon(1.0, 0) == 0.0
    assert advantage_bound(0) == 0
    for e in (0.1, 1.0, 3.0):
        assert advantage_bound(e) == pytest.approx((math.exp(e) - 1) / (math.exp(e) + 1))


def test_the_best_attack_on_one_count_reaches_no_more_than_the_bound():
    "Randomised response is the worst case of tanh(epsilon / 2); one noisy count stays below it."
    for e in (0.5, 2.0):
        without, with_ = (noisy_counts(torch.full((200_000,), v), e, rng(v)) for v in (0, 1))
        t = torch.linspace(-5, 6, 200)
        gap = max(float((with_ > v).double().mean() - (without > v).double().mean()) for v in t)
        assert gap <= advantage_bound(e) + 0.005
        assert gap == pytest.approx(1 - math.exp(-e / 2), abs=0.01)  # at the middle, by hand


# ---------------------------------------------------------------- membership


def test_members_are_never_ruled_out_and_others_are():
    method, s = EEFL(), Streams(0)
    with s.scope("init"):
        method.setup(cnn(TRAIN.shape, 10, width=4))
    d = measure_difficulty(method.net, method.objective, TRAIN)
    shares = []
    for c in CLIENTS:
        h = DifficultyHistogram.of(d[c.train], TRAIN.y[c.train], 10, 100, 0.1).counts
        possible = could_be_member(h, TRAIN.y, d, 0.1)
        assert possible[c.train].all()
        own = torch.isin(torch.arange(len(TRAIN)), c.train)
        shares.append(float(possible[~own].double().mean()))
        absent = ~torch.isin(TRAIN.y, TRAIN.y[c.train])
        assert not possible[absent].any()
    assert max(shares) < 0.9


def test_the_last_bin_takes_the_hardest():
    h = torch.zeros(1, 10).int()
    h[0, 9] = 1
    assert could_be_member(h, torch.tensor([0, 0]), torch.tensor([9.99, 8.5])).tolist() == [
        True,
        False,
    ]


# ---------------------------------------------------------------- noisy reports of methods


class PrivatePL(NoisyReports, DarkDistillPL):
    pass


@pytest.mark.parametrize(
    "kind, name, times", [(PrivateDarkDistill, "histogram", 3), (PrivatePL, "classes", 1)]
)
def test_a_run_sends_noisy_reports_and_keeps_the_account(kind, name, times):
    "Difficulty histograms are drawn anew and paid for each round; class counts once."
    sent = []

    class Spy(kind):
        def check_update(self, update, sent_, client):
            sent.append((client.id, update.extra[name].clone()))
            return super().check_update(update, sent_, client)

    run = go(Spy(report_epsilon=0.5, **TINY), rounds=3)
    assert not any(r["left_out"] for r in run.log)
    assert [r["epsilon_spent"] for r in run.log] == [0.5 * min(r, times) for r in (1, 2, 3)]
    for c in CLIENTS:
        exact = torch.bincount(TRAIN.y[c.train], minlength=10)
        told = [h for i, h in sent if i == c.id]
        rows = told[0] if name == "classes" else told[0].sum(1)
        assert not torch.equal(rows.long(), exact) and int(told[0].sum()) == len(c.train)
        if name == "classes":
            assert torch.equal(told[0], told[2])
        else:
            assert not torch.equal(told[0], told[1])


def test_without_noise_to_speak_of_it_is_the_method():
    a, b = go(DarkDistill(**TINY)), go(PrivateDarkDistill(report_epsilon=1e9, **TINY))
    assert same(a.state["net"], b.state["net"])
    assert not same(a.state["net"], go(PrivateDarkDistill(report_epsilon=0.1, **TINY)).state["net"])


def test_workers_and_resuming_change_nothing(tmp_path):
    make = lambda: PrivateDarkDistill(report_epsilon=0.5, **TINY)
    whole = go(make(), rounds=3, workers=2)
    file = tmp_path / "c.safetensors"
    go(make(), rounds=1, checkpoint=file)
    resumed = go(make(), rounds=3, checkpoint=file)
    for part in ("net", "server"):
        assert same(whole.state[part], resumed.state[part])
    assert whole.log[-1]["epsilon_spent"] == resumed.log[-1]["epsilon_spent"] == 1.5


def test_a_method_without_histograms_spends_nothing():
    class Plain(NoisyReports, EEFL):
        pass

    run = go(Plain(participation=1.0))
    assert same(run.state["net"], go(EEFL(participation=1.0)).state["net"])
    assert run.log[-1]["epsilon_spent"] == 0


# ---------------------------------------------------------------- gradients


def images(n, start=0):
    x, y = TRAIN[slice(start, start + n)]
    return x, y


def net_of(seed=1):
    with Streams(seed).scope("init"):
        return smooth_net()


@pytest.mark.parametrize("build", [smooth_net, lambda: cnn((1, 8, 8), 10, width=4).prefix(1)])
def test_the_label_of_one_image_is_in_the_gradient(build):
    with Streams(0).scope("init"):
        net = build()
    for i in range(25):
        x, y = images(1, i)
        out = net(x)
        loss = F.cross_entropy(out[0] if isinstance(out, list) else out, y)
        bias = [p for p in net.parameters() if p.shape == (10,)][-1]
        assert label_from_gradient(torch.autograd.grad(loss, bias)[0]) == int(y)


def test_the_gradient_of_several_images_has_no_single_label():
    x, y = images(8)
    with pytest.raises(ValueError, match="of one image: one negative entry"):
        label_from_gradient(local_change(net_of(), x, y)[-1])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_change_is_that_of_sgd(momentum):
    net, (x, y) = net_of(), images(6)
    change = local_change(net, x, y, batch_size=2, lr=0.1, momentum=momentum)
    before = [p.detach().clone() for p in net.parameters()]
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
    for i in (0, 2, 4):
        sgd.zero_grad()
        F.cross_entropy(net(x[i : i + 2]), y[i : i + 2]).backward()
        sgd.step()
    for c, a, p in zip(change, before, net.parameters()):
        assert torch.allclose(c, (a - p) / (0.1 * 3), atol=1e-4)


def test_the_change_can_be_differentiated_by_the_images():
    net, (x, y) = net_of().double(), images(3)
    x = x.double()
    f = lambda q: sum(
        v.pow(2).sum() for v in local_change(net, q, y, batch_size=1, lr=0.1, graph=True)
    )
    q = x.clone().requires_grad_()
    g = torch.autograd.grad(f(q), q)[0]
    step = torch.zeros_like(x)
    step[0, 0, 3, 4] = 1e-5
    numeric = (f(x + step) - f(x - step)) / 2e-5
    assert g[0, 0, 3, 4].item() == pytest.approx(numeric.item(), rel=1e-4)


LOW, HIGH = float(TRAIN[slice(None)][0].min()), float(TRAIN[slice(None)][0].max())


def attacked(n, happens, assumed, iterations=80):
    net, (x, y) = net_of(), images(n, 20)
    seen = local_change(net, x, y, **happens)
    reply = lambda q: local_change(net, q, y, graph=True, **assumed)
    found, loss, _ = invert_change(reply, seen, x.shape, LOW, HIGH, iterations, rng())
    return matched_error(found, x), loss


@pytest.mark.parametrize("i", [0, 5, 11])
def test_one_digit_is_recovered(i):
    net, (x, y) = net_of(), images(1, i)
    seen = local_change(net, x, y)
    label = torch.tensor([label_from_gradient(seen[-1])])
    reply = lambda q: local_change(net, q, label, graph=True)
    found, loss, kept = invert_change(reply, seen, x.shape, LOW, HIGH, 60, rng(), keep=(60,))
    assert matched_error(found, x) < 0.01 and loss < 1e-2
    assert torch.equal(kept[60], found) and matched_error(kept[0], x) > 0.5
    assert LOW <= float(found.min()) and float(found.max()) <= HIGH


def test_a_local_epoch_stops_the_naive_attack_but_not_one_that_simulates_it():
    epoch = dict(batch_size=1, lr=0.05, momentum=0.5)
    naive, informed = attacked(4, epoch, dict(lr=0.05)), attacked(4, epoch, epoch)
    ignorant = float((TRAIN[slice(None)][0] - TRAIN[slice(None)][0].mean(0)).pow(2).mean())
    assert informed[0] < 0.3 * ignorant < ignorant < naive[0]
    assert informed[1] < naive[1]


def test_more_images_make_the_attack_harder():
    assert attacked(1, {}, {})[0] < attacked(16, {}, {})[0]


def test_errors_are_of_the_best_match():
    x, _ = images(5)
    assert matched_error(x[[3, 1, 0, 4, 2]], x) == 0
    assert matched_error(x + 0.5, x) <= 0.25 + 1e-6


# ---------------------------------------------------------------- the experiment


def test_the_experiment_goes_on_and_does_not_depend_on_workers(tmp_path):
    how = dict(seeds=2, data=["digits"], rounds=2)
    run_privacy(tmp_path / "a", workers=1, **how)
    told = []
    again = run_privacy(tmp_path / "a", workers=1, on_cell=lambda *a: told.append(a), **how)
    other = run_privacy(tmp_path / "b", workers=2, **how)
    assert not told and again.runs == other.runs
    assert privacy_table(again, "digits").count("\n") == 1 + len(page.VARIANTS)


@pytest.mark.parametrize("bad", [dict(seeds=1), dict(data=["faces"]), dict(colour=1)])
def test_settings_of_the_experiment_are_checked(bad, tmp_path):
    with pytest.raises(ValueError):
        run_privacy(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


def test_a_cell_names_everything():
    a = privacy_cell("shapes", "calibrated, epsilon 1", 4)
    assert a["options"]["epsilon"] == 1.0 and a["rounds"] == page.SETTINGS["shapes"]["rounds"]
    assert a != privacy_cell("shapes", "calibrated", 4)


def test_the_stored_record_is_complete():
    r = privacy_record()
    assert r is not None and r.config["settings"] == page.SETTINGS and not r.config["changes"]
    assert len(r.runs) == len(r.config["data"]) * len(r.config["seeds"]) * len(page.VARIANTS)
    assert len(r.config["seeds"]) >= 3 and set(r.config["data"]) == set(page.SETTINGS)
    for run in r.runs:
        assert len(run["accuracy"]) == 4 and (run["spent"] or 0) >= 0

"""Answers to lab 9 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right join: gather
def join(partial, bias, depth):
    N, _, S, K = partial.shape
    at = depth[:, None, :, None].expand(N, 1, S, K)
    return partial.gather(1, at)[:, 0].sum(0) + bias


# wrong join: the bias for each student -> it is added once
def join(partial, bias, depth):
    N, _, S, _ = partial.shape
    return sum(partial[n, depth[n], torch.arange(S)] + bias for n in range(N))


# wrong join: the mean -> Add up
def join(partial, bias, depth):
    N, _, S, _ = partial.shape
    return sum(partial[n, depth[n], torch.arange(S)] for n in range(N)) / N + bias


# wrong join: all at the exit of the first student -> Each student has its own exit
def join(partial, bias, depth):
    N, _, S, _ = partial.shape
    return sum(partial[n, depth[0], torch.arange(S)] for n in range(N)) + bias


# wrong join: one exit for all samples -> each sample another one
def join(partial, bias, depth):
    return sum(p[d[0]] for p, d in zip(partial, depth)) + bias


# right difference: by hand
def difference(first, now):
    return first.norm(dim=1) * now.norm(dim=1) / (first * now).sum(1)


# wrong difference: one minus -> Features that stay
def difference(first, now):
    return 1 - F.cosine_similarity(now, first, dim=1)


# wrong difference: the cosine itself -> one over them
def difference(first, now):
    return F.cosine_similarity(now, first, dim=1)


# wrong difference: along the images -> Angles with cosines
def difference(first, now):
    return 1 / F.cosine_similarity(now, first, dim=0).clamp(min=1e-6)


# wrong difference: not normalised -> whatever their length
def difference(first, now):
    return 1 / (now * first).sum(1)


# wrong difference: Euclidean distance -> Features that stay
def difference(first, now):
    return (now - first).norm(dim=1)


# right answer_time: student by student
def answer_time(macs, depth, speed, nbytes, bandwidth, delay):
    each = [
        macs[n][depth[n]] / speed[n] + nbytes / bandwidth[n] + delay[n] for n in range(len(macs))
    ]
    return torch.stack(each).max(0).values


# wrong answer_time: added up over the devices -> at the same time
def answer_time(macs, depth, speed, nbytes, bandwidth, delay):
    computing = macs.gather(1, depth) / speed[:, None]
    return (computing + (nbytes / bandwidth + delay)[:, None]).sum(0)


# wrong answer_time: the mean of the devices -> wait for the slowest
def answer_time(macs, depth, speed, nbytes, bandwidth, delay):
    computing = macs.gather(1, depth) / speed[:, None]
    return (computing + (nbytes / bandwidth + delay)[:, None]).mean(0)


# wrong answer_time: slowest computing plus slowest sending -> *per student*
def answer_time(macs, depth, speed, nbytes, bandwidth, delay):
    computing = macs.gather(1, depth) / speed[:, None]
    return computing.amax(0) + (nbytes / bandwidth + delay).max()


# wrong answer_time: the delay forgotten -> and the delay 0.1
def answer_time(macs, depth, speed, nbytes, bandwidth, delay):
    computing = macs.gather(1, depth) / speed[:, None]
    return (computing + (nbytes / bandwidth)[:, None]).amax(0)


# wrong answer_time: the deepest exit on the fastest device -> its own speed
def answer_time(macs, depth, speed, nbytes, bandwidth, delay):
    computing = macs.gather(1, depth).amax(0) / speed.max()
    return computing + (nbytes / bandwidth + delay).max()


# right all_arrive: a loop
def all_arrive(p, r, N):
    lost = p
    for _ in range(r):
        lost = lost * p
    chance = 1.0
    for _ in range(N):
        chance *= 1 - lost
    return chance


# wrong all_arrive: at least one instead of all -> must *all* arrive
def all_arrive(p, r, N):
    return 1 - (p ** (r + 1)) ** N


# wrong all_arrive: no further tries -> lost only if both tries
def all_arrive(p, r, N):
    return (1 - p) ** N


# wrong all_arrive: r tries in all -> One message, one try
def all_arrive(p, r, N):
    return (1 - p**r) ** N


# wrong all_arrive: probabilities added up -> must *all* arrive
def all_arrive(p, r, N):
    return 1 - N * p ** (r + 1)


# right fill_in: with a weight
def fill_in(partial, arrived, mean, bias):
    w = arrived[..., None].to(partial)
    return (w * partial + (1 - w) * mean[:, None]).sum(0) + bias


# wrong fill_in: zeros -> its own mean, 3
def fill_in(partial, arrived, mean, bias):
    return torch.where(arrived[..., None], partial, torch.zeros(())).sum(0) + bias


# wrong fill_in: the mean of those that came -> its own mean, 3
def fill_in(partial, arrived, mean, bias):
    w = arrived[..., None].to(partial)
    return len(partial) * (w * partial).sum(0) / w.sum(0).clamp(min=1) + bias


# wrong fill_in: the means exchanged for what came -> Everything arrived
def fill_in(partial, arrived, mean, bias):
    return torch.where(arrived[..., None], mean[:, None], partial).sum(0) + bias


# wrong fill_in: the mean of all students -> its own mean, 3
def fill_in(partial, arrived, mean, bias):
    return torch.where(arrived[..., None], partial, mean.mean(0)).sum(0) + bias

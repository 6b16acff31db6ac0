"""Answers to lab 4 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right sureness: by hand, with the largest logit subtracted
def sureness(logits):
    return 1 / (logits - logits.amax(-1, keepdim=True)).exp().sum(-1)


# wrong sureness: the largest logit not subtracted -> exp(1000) is infinite
def sureness(logits):
    e = logits.exp()
    return (e / e.sum(-1, keepdim=True)).max(-1).values


# wrong sureness: softmax over the exits -> Two equal logits
def sureness(logits):
    return logits.softmax(0).max(-1).values


# wrong sureness: the largest logit itself -> Two equal logits
def sureness(logits):
    return logits.max(-1).values


# right exit_of: a loop
def exit_of(conf, T):
    out = [len(T) - 1] * conf.shape[1]
    for n in range(conf.shape[1]):
        for e in range(len(T) - 1):
            if conf[e, n] >= T[e]:
                out[n] = e
                break
    return out


# wrong exit_of: the surest exit -> at the first, not the surest
def exit_of(conf, T):
    return conf.argmax(0)


# wrong exit_of: nobody sure means exit 0 -> the last exit takes it
def exit_of(conf, T):
    return (conf >= T[:, None]).int().argmax(0)


# wrong exit_of: strictly above -> equal to the threshold reaches it
def exit_of(conf, T):
    leave = conf > T[:, None]
    leave[-1] = True
    return leave.int().argmax(0)


# wrong exit_of: exits counted from 1 -> leaves there, at the first
def exit_of(conf, T):
    leave = conf >= T[:, None]
    leave[-1] = True
    return leave.int().argmax(0) + 1


# wrong exit_of: how many thresholds are missed, not the first that is reached -> Six exits
def exit_of(conf, T):
    return (conf < T[:, None])[:-1].sum(0)


# right accuracy_and_cost: exit by exit
def accuracy_and_cost(exit, right, costs):
    N = len(exit)
    hits = sum(right[e][exit == e].sum() for e in range(len(costs)))
    return hits / N, sum((exit == e).sum() * c for e, c in enumerate(costs)) / N


# wrong accuracy_and_cost: the mean of all exits -> judged by the exit that it takes
def accuracy_and_cost(exit, right, costs):
    return right.double().mean(), costs[exit].mean()


# wrong accuracy_and_cost: costs added up again -> add nothing up
def accuracy_and_cost(exit, right, costs):
    return right[exit, torch.arange(len(exit))].double().mean(), costs.cumsum(0)[exit].mean()


# wrong accuracy_and_cost: right at any exit up to its own -> judged by the exit that it takes
def accuracy_and_cost(exit, right, costs):
    ever = right.cummax(0).values[exit, torch.arange(len(exit))]
    return ever.double().mean(), costs[exit].mean()


# right thresholds_of: by topk
def thresholds_of(conf, shares):
    inf, T = float("inf"), []
    left = conf.clone()
    for e, q in enumerate(shares[:-1]):
        n = round(q * conf.shape[1])
        T.append(left[e].topk(n).values[-1] if n else torch.tensor(inf))
        left[:, left[e] >= T[-1]] = -inf
    return [*T, torch.tensor(-inf)]


# wrong thresholds_of: of all samples, also those who left -> only those count who did not leave
def thresholds_of(conf, shares):
    T = []
    for e, q in enumerate(shares[:-1]):
        n = round(q * conf.shape[1])
        v = conf[e].sort(descending=True).values
        T.append(float(v[n - 1]) if n else float("inf"))
    return [*T, float("-inf")]


# wrong thresholds_of: a share of those still there -> only those count who did not leave
def thresholds_of(conf, shares):
    here, T = torch.ones(conf.shape[1], dtype=torch.bool), []
    for e, q in enumerate(shares[:-1]):
        v = conf[e][here].sort(descending=True).values
        n = int(q * len(v))
        T.append(float(v[n - 1]) if n else float("inf"))
        here = here & (conf[e] < T[e])
    return [*T, float("-inf")]


# wrong thresholds_of: the first that stays instead of the last that leaves -> the two surest
def thresholds_of(conf, shares):
    here, T = torch.ones(conf.shape[1], dtype=torch.bool), []
    for e, q in enumerate(shares[:-1]):
        v = conf[e][here].sort(descending=True).values
        T.append(float(v[round(q * conf.shape[1])]))
        here = here & (conf[e] < T[e])
    return [*T, float("-inf")]


# wrong thresholds_of: share 0 lets the most sure one go -> Share 0
def thresholds_of(conf, shares):
    here, T = torch.ones(conf.shape[1], dtype=torch.bool), []
    for e, q in enumerate(shares[:-1]):
        v = conf[e][here].sort(descending=True).values
        T.append(float(v[max(round(q * conf.shape[1]), 1) - 1]))
        here = here & (conf[e] < T[e])
    return [*T, float("-inf")]


# right coin_toss: a grid of probabilities is not needed, a list of pairs is
def coin_toss(costs, accuracy, budget):
    rest = range(len(costs))
    pairs = [(a, b) for a in rest for b in rest if costs[a] <= budget <= costs[b] and a < b]
    weight = lambda a, b: (budget - costs[a]) / (costs[b] - costs[a])
    return max(accuracy[a] + weight(a, b) * (accuracy[b] - accuracy[a]) for a, b in pairs)


# wrong coin_toss: neighbours only -> so try all pairs
def coin_toss(costs, accuracy, budget):
    return np.interp(budget, costs, accuracy)


# wrong coin_toss: first and last only -> the middle exit is best
def coin_toss(costs, accuracy, budget):
    p = (budget - costs[0]) / (costs[-1] - costs[0])
    return (1 - p) * accuracy[0] + p * accuracy[-1]


# wrong coin_toss: the best exit that it can pay -> Half of the samples to each
def coin_toss(costs, accuracy, budget):
    return max(a for c, a in zip(costs, accuracy) if c <= budget)


# wrong coin_toss: the weights exchanged -> A quarter to the dear exit
def coin_toss(costs, accuracy, budget):
    best = 0.0
    for a in range(len(costs)):
        for b in range(a + 1, len(costs)):
            if costs[a] <= budget <= costs[b]:
                p = (budget - costs[a]) / (costs[b] - costs[a])
                best = max(best, p * accuracy[a] + (1 - p) * accuracy[b])
    return best


# right last_safe: by counting the beginning
def last_safe(risks, n, epsilon, delta):
    margin = (-math.log(delta) / (2 * n)) ** 0.5
    ok = np.asarray(risks) + margin <= epsilon
    return np.cumprod(ok).sum() - 1


# wrong last_safe: the last one that passes anywhere -> stop there, although the fourth
def last_safe(risks, n, epsilon, delta):
    margin = math.sqrt(math.log(1 / delta) / (2 * n))
    return max([i for i, r in enumerate(risks) if r + margin <= epsilon], default=-1)


# wrong last_safe: no margin -> the margin is sqrt
def last_safe(risks, n, epsilon, delta):
    last = -1
    for i, risk in enumerate(risks):
        if risk > epsilon:
            break
        last = i
    return last


# wrong last_safe: the first that fails -> 0.01 passes and 0.3 does not
def last_safe(risks, n, epsilon, delta):
    margin = math.sqrt(math.log(1 / delta) / (2 * n))
    for i, risk in enumerate(risks):
        if risk + margin > epsilon:
            return i
    return len(risks)


# wrong last_safe: the root forgotten -> the margin is sqrt
def last_safe(risks, n, epsilon, delta):
    margin, last = math.log(1 / delta) / (2 * n), -1
    for i, risk in enumerate(risks):
        if risk + margin > epsilon:
            break
        last = i
    return last


# wrong exit_of: thresholds run along the samples -> T[:, None]
def exit_of(conf, T):
    leave = conf >= T if conf.shape[-1] == len(T) else conf >= T[:1].expand(1, len(T))
    leave[-1] = True
    return leave.int().argmax(0)


# wrong thresholds_of: shares are cut off, not rounded -> `int` cuts to 57
def thresholds_of(conf, shares):
    E, N = conf.shape
    here, T = torch.ones(N, dtype=torch.bool), []
    for e in range(E - 1):
        n = int(shares[e] * N)
        v = conf[e][here].sort(descending=True).values
        T.append(float(v[n - 1]) if n else float("inf"))
        here = here & (conf[e] < T[e])
    return [*T, float("-inf")]


# wrong coin_toss: also pairs that lie on one side of the budget -> so that p is between 0 and 1
def coin_toss(costs, accuracy, budget):
    best = 0.0
    for a in range(len(costs)):
        for b in range(a + 1, len(costs)):
            p = (budget - costs[a]) / (costs[b] - costs[a])
            best = max(best, (1 - p) * accuracy[a] + p * accuracy[b])
    return best

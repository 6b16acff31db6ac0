"""Answers to lab 1 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right effective: as the formula
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return 1 / (p**2).sum(1)


# right effective: 32-bit floats, a column for a client and back
def effective(counts):
    p = counts.float().T / counts.float().sum(1)
    return 1 / p.square().sum(0)


# right effective: a list of numbers of Python
def effective(counts):
    return [1 / sum((x / sum(row)) ** 2 for x in row) for row in counts.tolist()]


# right effective: a list of tensors
def effective(counts):
    return [1 / ((row / row.sum()) ** 2).sum() for row in counts]


# right effective: a tuple of NumPy's numbers
def effective(counts):
    import numpy as np

    return tuple(np.float32(1 / np.square(row / row.sum()).sum()) for row in counts.numpy())


# right effective: an array, without shares
def effective(counts):
    c = counts.numpy().astype(float)
    return c.sum(1) ** 2 / (c**2).sum(1)


# wrong effective: counts classes that are not empty -> (50, 1, 0, 0)
def effective(counts):
    return (counts > 0).sum(1).float()


# wrong effective: exp of the entropy -> Shares are squared
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return torch.exp(-(p * torch.log(p + 1e-12)).sum(1))


# wrong effective: 1 over the largest share -> Shares are squared
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return 1 / p.max(1).values


# wrong effective: 1 over the root of the sum -> four equally frequent classes make 4
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return 1 / p.norm(dim=1)


# wrong effective: the sum itself -> four equally frequent classes make 4
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return (p**2).sum(1)


# wrong effective: rounded to whole classes -> (50, 1, 0, 0)
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return (1 / (p**2).sum(1)).round()


# wrong effective: counts are not divided -> divided by its own sum
def effective(counts):
    return 1 / (counts**2).sum(1)


# wrong effective: shares over the clients -> divided by its own sum
def effective(counts):
    p = counts / counts.sum(0, keepdim=True)
    return 1 / (p**2).sum(0)


# wrong effective: without keepdim -> keepdim
def effective(counts):
    p = counts / counts.sum(1)
    return 1 / (p**2).sum(1)


# wrong effective: divides by the whole table -> divided by its own sum
def effective(counts):
    p = counts / counts.sum()
    return 1 / (p**2).sum(1)


# wrong effective: overwrites the counts -> was overwritten
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    counts.mul_(counts)
    return 1 / (p**2).sum(1)


# wrong effective: prints -> Got None
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    print(1 / (p**2).sum(1))


# wrong effective: one number for all clients -> One number per client
def effective(counts):
    p = counts / counts.sum(1, keepdim=True)
    return 1 / (p**2).sum()


# right boost: a loop
def boosted(raw, w=0.2):
    out = []
    for f in raw:
        out.append(f + w * out[-1].detach() if out else f)
    return out


# right boost: a tuple, with the previous decision in no_grad
def boosted(raw, w=0.2):
    out = (raw[0],)
    for f in raw[1:]:
        with torch.no_grad():
            before = w * out[-1]
        out += (f + before,)
    return out


# right boost: the sum written out
def boosted(raw, w=0.2):
    fixed = [f.detach() for f in raw]
    return [f + sum(w ** (e - k) * fixed[k] for k in range(e)) for e, f in enumerate(raw)]


# right boost: overwrites a list of its own
def boosted(raw, w=0.2):
    out = list(raw)
    for e in range(1, len(out)):
        out[e] = out[e] + w * out[e - 1].detach()
    return out


# wrong boost: everything without gradients -> no gradient leaves F_
def boosted(raw, w=0.2):
    with torch.no_grad():
        out = [raw[0]]
        for f in raw[1:]:
            out.append(f + w * out[-1])
    return out


# wrong boost: detaches the sum -> no gradient leaves F_2
def boosted(raw, w=0.2):
    out = [raw[0]]
    for f in raw[1:]:
        out.append((f + w * out[-1]).detach())
    return out


# wrong boost: detaches the logits, not the decision -> f_2 does not learn from F_2
def boosted(raw, w=0.2):
    out = [raw[0]]
    for f in raw[1:]:
        out.append(f.detach() + w * out[-1])
    return out


# wrong boost: the first decision thrown away -> the first included
def boosted(raw, w=0.2):
    F, out = raw[0], [None]
    for f in raw[1:]:
        F = f + w * F.detach()
        out.append(F)
    return out


# wrong boost: the first decision left out -> the first included
def boosted(raw, w=0.2):
    F, out = raw[0], []
    for f in raw[1:]:
        F = f + w * F.detach()
        out.append(F)
    return out


# wrong boost: the first exit does not learn -> no gradient leaves F_1
def boosted(raw, w=0.2):
    out = [raw[0].detach()]
    for f in raw[1:]:
        out.append(f + w * out[-1].detach())
    return out


# wrong boost: ignores w -> with the given w
def boosted(raw, w=0.2):
    out = [raw[0]]
    for f in raw[1:]:
        out.append(f + 0.2 * out[-1].detach())
    return out


# wrong boost: a weighted mean instead of a sum -> F_2 = f_2 + 0.2 F_1
def boosted(raw, w=0.2):
    out = [raw[0]]
    for f in raw[1:]:
        out.append((1 - w) * f + w * out[-1].detach())
    return out


# wrong boost: overwrites the list -> was overwritten
def boosted(raw, w=0.2):
    for e in range(1, len(raw)):
        raw[e] = raw[e] + w * raw[e - 1].detach()
    return raw


# wrong boost: overwrites the tensors -> was overwritten
def boosted(raw, w=0.2):
    for e in range(1, len(raw)):
        raw[e].data += w * raw[e - 1].detach()
    return list(raw)


# wrong boost: lengthens the list -> was overwritten
def boosted(raw, w=0.2):
    out = [raw[0]]
    for f in raw[1:]:
        out.append(f + w * out[-1].detach())
    raw.append(out[-1])
    return out


# wrong boost: builds on the raw logits -> F_3 builds on F_2
def boosted(raw, w=0.2):
    return [raw[0]] + [raw[e] + w * raw[e - 1].detach() for e in range(1, len(raw))]


# wrong boost: no detach -> detach the previous decision
def boosted(raw, w=0.2):
    out = [raw[0]]
    for f in raw[1:]:
        out.append(f + w * out[-1])
    return out


# wrong boost: one stacked tensor -> keep the decisions apart
def boosted(raw, w=0.2):
    x = torch.stack(raw)
    for e in range(1, len(x)):
        x[e] = x[e] + w * x[e - 1].detach()
    return x


# wrong boost: numbers without a graph -> no gradient leaves F_1
def boosted(raw, w=0.2):
    out = [raw[0].detach().numpy()]
    for f in raw[1:]:
        out.append(f.detach().numpy() + w * out[-1])
    return out


# wrong boost: the last decision only -> One decision per exit
def boosted(raw, w=0.2):
    F = raw[0]
    for f in raw[1:]:
        F = f + w * F.detach()
    return F


# right shares: a list
def block_shares(n, b):
    own = [x if m >= b else 0 for m, x in enumerate(n, 1)]
    return [x / sum(own) for x in own]


# right shares: a tuple, by 1 over the total
def block_shares(n, b):
    own = [x if m >= b else 0 for m, x in enumerate(n, 1)]
    return tuple(x * (1 / sum(own)) for x in own)


# right shares: a 32-bit tensor
def block_shares(n, b):
    t = torch.tensor(n, dtype=torch.float)
    t[: b - 1] = 0
    return t / t.sum()


# right shares: a list from a tensor
def block_shares(n, b):
    t = torch.tensor(n, dtype=torch.float)
    t[: b - 1] = 0
    return (t / t.sum()).tolist()


# right shares: an array
def block_shares(n, b):
    import numpy as np

    t = np.array(n, float)
    t[: b - 1] = 0
    return t / t.sum()


# right shares: a list of tensors
def block_shares(n, b):
    t = torch.tensor(n)
    return [t[m] / t[b - 1 :].sum() if m >= b - 1 else torch.tensor(0) for m in range(len(n))]


# wrong shares: overwrites n -> was overwritten
def block_shares(n, b):
    for i in range(b - 1):
        n[i] = 0
    return [x / sum(n) for x in n]


# wrong shares: removes the others from n -> was overwritten
def block_shares(n, b):
    total, tiers = sum(n[b - 1 :]), len(n)
    del n[: b - 1]
    return [0.0] * (tiers - len(n)) + [x / total for x in n]


# wrong shares: equal weights -> more samples count for more
def block_shares(n, b):
    k = len(n) - b + 1
    return [0.0 if m < b else 1 / k for m in range(1, len(n) + 1)]


# wrong shares: b counts from 0 -> every tier owns it
def block_shares(n, b):
    own = [x if m > b else 0 for m, x in enumerate(n, 1)]
    return [x / (sum(own) or 1) for x in own]


# wrong shares: the shallow tiers own the block -> every tier owns it
def block_shares(n, b):
    own = [x if m <= b else 0 for m, x in enumerate(n, 1)]
    return [x / sum(own) for x in own]


# wrong shares: the weights do not add to 1 -> only tier 4 owns block 4
def block_shares(n, b):
    return [x / sum(n) if m >= b else 0.0 for m, x in enumerate(n, 1)]


# wrong shares: one tier only -> every tier owns it
def block_shares(n, b):
    return [float(m == b) for m in range(1, len(n) + 1)]


# wrong shares: for four tiers only -> block 1
def block_shares(n, b):
    own = [x if m >= b else 0 for m, x in zip(range(1, 5), n)]
    return [x / sum(own) for x in own]


# wrong shares: without the zeros -> Wanted shape (4,), got (1,)
def block_shares(n, b):
    own = n[b - 1 :]
    return [x / sum(own) for x in own]


# wrong shares: counts instead of weights -> Wanted [0.1, 0.2, 0.3, 0.4]
def block_shares(n, b):
    return [x if m >= b else 0 for m, x in enumerate(n, 1)]


# right cost: the first exit by argmax
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    return float(torch.tensor(macs, dtype=torch.double)[go.int().argmax(0)].mean())


# right cost: a 32-bit tensor
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    return torch.tensor(macs).float()[go.int().argmax(0)].mean()


# right cost: two loops
def mean_cost(conf, T, macs):
    total = 0
    for image in conf.T.tolist():
        exits = [e for e, c in enumerate(image) if c >= T]
        total += macs[exits[0] if exits else -1]
    return total / conf.shape[1]


# right cost: NumPy, from the last exit to the first
def mean_cost(conf, T, macs):
    import numpy as np

    cost = np.full(conf.shape[1], macs[-1], dtype=float)
    for e in reversed(range(len(macs))):
        cost = np.where(conf[e].numpy() >= T, macs[e], cost)
    return cost.mean()


# wrong cost: above instead of at least T -> *equals* T
def mean_cost(conf, T, macs):
    go = conf > T
    go[-1] = True
    return float(torch.tensor(macs, dtype=torch.double)[go.int().argmax(0)].mean())


# wrong cost: the last exit that reaches T -> everybody leaves at exit 1
def mean_cost(conf, T, macs):
    go = (conf >= T).int()
    e = (conf.shape[0] - 1) - go.flip(0).argmax(0)
    return float(torch.tensor(macs, dtype=torch.double)[e].mean())


# wrong cost: who reaches T nowhere leaves first -> nobody reaches it
def mean_cost(conf, T, macs):
    go = (conf >= T).int().argmax(0)
    return float(torch.tensor(macs, dtype=torch.double)[go].mean())


# wrong cost: the most confident exit, T unused -> everybody leaves at exit 1
def mean_cost(conf, T, macs):
    return float(torch.tensor(macs, dtype=torch.double)[conf.argmax(0)].mean())


# wrong cost: exits and images exchanged -> *first* exit
def mean_cost(conf, T, macs):
    go = conf.T >= T
    go[-1] = True
    return float(torch.tensor(macs, dtype=torch.double)[go.int().argmax(0)].mean())


# wrong cost: adds the exits before -> a cost includes the stages before
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    return float(torch.tensor(macs, dtype=torch.double).cumsum(0)[go.int().argmax(0)].mean())


# wrong cost: the mean number of the exit -> costs what exit 1 costs
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    return float((go.int().argmax(0) + 1).double().mean())


# wrong cost: the sum over images -> Wanted [10.0], got [30.0]
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    return float(torch.tensor(macs, dtype=torch.double)[go.int().argmax(0)].sum())


# wrong cost: one number per image -> Wanted shape (), got (3,)
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    return torch.tensor(macs, dtype=torch.double)[go.int().argmax(0)]


# wrong cost: overwrites conf -> was overwritten
def mean_cost(conf, T, macs):
    conf[-1] = 10.0
    return float(torch.tensor(macs, dtype=torch.double)[(conf >= T).int().argmax(0)].mean())


# wrong cost: reverses macs -> was overwritten
def mean_cost(conf, T, macs):
    go = conf >= T
    go[-1] = True
    value = float(torch.tensor(macs, dtype=torch.double)[go.int().argmax(0)].mean())
    macs.reverse()
    return value


# right gamma: two loops
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(sum(r.log[-1]["accuracy"]) / 4)
    return out


# right gamma: tuples of tensors
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    def one(g, s):
        who = make_clients(train.y, 20, g, seed=s)
        r = simulate(EEFL(), build, train, test, who, rounds, s, rounds)
        return torch.tensor(r.log[-1]["accuracy"]).mean()

    return {g: tuple(one(g, s) for s in seeds) for g in gammas}


# wrong gamma: invented numbers -> a dictionary with the keys
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    return {0.1: [0.5, 0.5], 100.0: [0.9, 0.9]}


# wrong gamma: invented numbers for any gamma -> pass gamma, seed and rounds
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    return {g: [g / (g + 1) - 0.01 * s / 9 for s in seeds] for g in gammas}


# wrong gamma: the seed is not used -> the seeds made no difference
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        who = make_clients(train.y, clients=20, gamma=g)
        r = simulate(EEFL(), build, train, test, who, rounds=rounds)
        out[g] = [sum(r.log[-1]["accuracy"]) / 4] * len(seeds)
    return out


# wrong gamma: the seed goes to the simulation only -> to make_clients and simulate
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(sum(r.log[-1]["accuracy"]) / 4)
    return out


# wrong gamma: the seed goes to the clients only -> to make_clients and simulate
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds)
            out[g].append(sum(r.log[-1]["accuracy"]) / 4)
    return out


# wrong gamma: gamma is not used -> pass gamma, seed and rounds
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(sum(r.log[-1]["accuracy"]) / 4)
    return out


# wrong gamma: other rounds than asked for -> 2 rounds: pass gamma, seed and rounds
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=3, seed=s)
            out[g].append(sum(r.log[-1]["accuracy"]) / 4)
    return out


# wrong gamma: the best round instead of the last -> the last round
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(max(sum(row["accuracy"]) / 4 for row in r.log))
    return out


# wrong gamma: the last exit instead of the mean -> the mean over the exits
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(r.log[-1]["accuracy"][-1])
    return out


# wrong gamma: all four accuracies -> the mean over the four exits
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(r.log[-1]["accuracy"])
    return out


# wrong gamma: in percent -> shares between 0 and 1
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = []
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g].append(25 * sum(r.log[-1]["accuracy"]))
    return out


# wrong gamma: the mean over the seeds -> one accuracy per seed
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    out = {}
    for g in gammas:
        out[g] = 0
        for s in seeds:
            who = make_clients(train.y, clients=20, gamma=g, seed=s)
            r = simulate(EEFL(), build, train, test, who, rounds=rounds, seed=s)
            out[g] += sum(r.log[-1]["accuracy"]) / 8
    return out


# wrong gamma: keys are words -> a dictionary with the keys
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    return {"uneven": [0.9, 0.9], "even": [0.95, 0.95]}


# wrong gamma: a list of lists -> a dictionary with the keys
def compare_gammas(gammas=(0.1, 100.0), seeds=(0, 1), rounds=20):
    return [[0.9, 0.9], [0.95, 0.95]]

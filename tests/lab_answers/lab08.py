"""Answers to lab 8 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right leaders: row by row, as tuples and tensors
def leaders(runs):
    rows = {r["row"] for r in runs}
    mean = lambda row: torch.tensor([r["exits"] for r in runs if r["row"] == row]).double().mean()
    return sorted(((row, 100 * mean(row)) for row in rows), key=lambda p: p[1], reverse=True)


# right leaders: by row and seed
def leaders(runs):
    found = {}
    for r in runs:
        found.setdefault(r["row"], {})[r["seed"]] = 100 * sum(r["exits"]) / len(r["exits"])
    return sorted(((k, sum(v.values()) / len(v)) for k, v in found.items()), key=lambda p: -p[1])


# wrong leaders: worst first -> the best row comes first
def leaders(runs):
    rows = {r["row"] for r in runs}
    mean = lambda row: 100 * torch.tensor([r["exits"] for r in runs if r["row"] == row]).mean()
    return sorted(((row, mean(row)) for row in rows), key=lambda p: p[1])


# wrong leaders: the best exit -> Mean over exits, then seeds, in %
def leaders(runs):
    rows = {r["row"] for r in runs}
    best = lambda row: torch.tensor([100 * max(r["exits"]) for r in runs if r["row"] == row]).mean()
    return sorted(((row, best(row)) for row in rows), key=lambda p: -p[1])


# wrong leaders: shares instead of per cent -> Mean over exits, then seeds, in %
def leaders(runs):
    rows = {r["row"] for r in runs}
    mean = lambda row: torch.tensor([r["exits"] for r in runs if r["row"] == row]).mean()
    return sorted(((row, mean(row)) for row in rows), key=lambda p: -p[1])


# wrong leaders: runs instead of rows -> each row once
def leaders(runs):
    mean = lambda r: 100 * sum(r["exits"]) / len(r["exits"])
    return sorted(((r["row"], mean(r)) for r in runs), key=lambda p: -p[1])


# wrong leaders: a dictionary -> a list of pairs
def leaders(runs):
    return {r["row"]: 100 * sum(r["exits"]) / len(r["exits"]) for r in runs}


# right paired: with a table of both
def paired(runs, mine, base):
    found = {(r["row"], r["seed"]): r for r in runs}
    seeds = sorted(s for row, s in found if row == mine and (base, s) in found)
    if any(found[mine, s]["pair"] != found[base, s]["pair"] for s in seeds):
        raise ValueError("no pairs")
    mean = lambda r: sum(r["exits"]) / len(r["exits"])
    return [100 * (mean(found[mine, s]) - mean(found[base, s])) for s in seeds]


# wrong paired: in the order of the runs -> the same seed, seeds in ascending order
def paired(runs, mine, base):
    of = lambda row: [100 * sum(r["exits"]) / len(r["exits"]) for r in runs if r["row"] == row]
    return [a - b for a, b in zip(of(mine), of(base))]


# wrong paired: the mark is not looked at -> raise ValueError where `pair` differs
def paired(runs, mine, base):
    of = lambda row: {
        r["seed"]: 100 * sum(r["exits"]) / len(r["exits"]) for r in runs if r["row"] == row
    }
    a, b = of(mine), of(base)
    return [a[s] - b[s] for s in sorted(a.keys() & b.keys())]


# wrong paired: seeds that are missing break it -> left out
def paired(runs, mine, base):
    of = lambda row: {r["seed"]: r for r in runs if r["row"] == row}
    a, b = of(mine), of(base)
    mean = lambda r: 0 if r is None else 100 * sum(r["exits"]) / len(r["exits"])
    return [mean(a.get(s)) - mean(b.get(s)) for s in sorted(a.keys() | b.keys())]


# wrong paired: shares instead of points -> Seed 0: 90 - 50
def paired(runs, mine, base):
    of = lambda row: {r["seed"]: r for r in runs if r["row"] == row}
    a, b = of(mine), of(base)
    mean = lambda r: sum(r["exits"]) / len(r["exits"])
    return [mean(a[s]) - mean(b[s]) for s in sorted(a.keys() & b.keys())]


# right interval: by scipy
def interval(differences):
    n = len(differences)
    mean = sum(differences) / n
    s = stats.tstd(differences) / n**0.5
    return [mean, *stats.t.interval(0.95, n - 1, loc=mean, scale=s)]


# wrong interval: 1.96 for a few seeds -> t = 4.303 for three seeds
def interval(differences):
    d = torch.tensor(differences)
    half = 1.96 * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half


# wrong interval: the spread of one difference -> divided by the root of 3
def interval(differences):
    d = torch.tensor(differences)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std()
    return d.mean(), d.mean() - half, d.mean() + half


# wrong interval: divided by n in the spread -> s = 1 (n - 1 below)
def interval(differences):
    d = torch.tensor(differences)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(correction=0) / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half


# wrong interval: one-sided -> half 2.484
def interval(differences):
    d = torch.tensor(differences)
    half = stats.t.ppf(0.95, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half


# wrong interval: low, mean, high -> First the mean
def interval(differences):
    d = torch.tensor(differences)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean() - half, d.mean(), d.mean() + half


# right honest_result: with lists collected first
def honest_result(trials):
    found = {}
    for t in trials:
        found.setdefault(t["option"], []).append((t["valid"], t["test"]))
    means = [[sum(column) / len(column) for column in zip(*v)] for v in found.values()]
    return max(means)[1]


# wrong honest_result: the best test accuracy -> Validation prefers option 1
def honest_result(trials):
    mean = lambda o: sum(t["test"] for t in trials if t["option"] == o) / 2
    return max(mean(t["option"]) for t in trials)


# wrong honest_result: the best single seed -> The mean over seeds decides
def honest_result(trials):
    best = max(trials, key=lambda t: t["valid"])["option"]
    own = [t["test"] for t in trials if t["option"] == best]
    return sum(own) / len(own)


# wrong honest_result: reports the validation accuracy -> whose test mean is 0.65
def honest_result(trials):
    best = max(trials, key=lambda t: t["valid"])["option"]
    own = [t["valid"] for t in trials if t["option"] == best]
    return 0.0 + max(own)


# right my_method: exits that vote
def my_method(**settings):
    class Voting(EEFL):
        name = "voting"

        def decide(self, net, data):
            said = super().decide(net, data)
            n = torch.arange(1, len(said) + 1)
            return said.cumsum(0) / n[:, None, None]

    return Voting(**settings)


# right my_method: deep exits count more in the loss
def my_method(**settings):
    class Deep(EEFL):
        name = "deep"

        def local_loss(self, net, weights, data, rnd):
            ce = torch.nn.functional.cross_entropy

            def loss(raw, y):
                decided = self.objective.predict(raw)
                return sum((1 + e / 4) * ce(f, y) for e, f in enumerate(decided))

            return loss

    return Deep(**settings)


# wrong my_method: the class -> not the class
def my_method(**settings):
    class Mine(EEFL):
        name = "mine"

    return Mine


# wrong my_method: EEFL itself -> nothing differs from EEFL
def my_method(**settings):
    return EEFL(**settings)


# wrong my_method: settings of its own -> pass **settings on
def my_method(**settings):
    class Mine(EEFL):
        name = "mine"

    return Mine(lr=0.2)


# wrong my_method: everybody takes part -> other clients are drawn
def my_method(**settings):
    class All(EEFL):
        name = "all"

        def configure(self, rnd, clients, streams):
            return clients

    return All(**settings)


# wrong my_method: looks at test images -> only what a client or the server has
def my_method(**settings):
    class Peek(EEFL):
        name = "peek"

        def decide(self, net, data):
            said = super().decide(net, data)
            return said + stage.test.y.bincount().log()

    return Peek(**settings)


# wrong my_method: a method is misspelt -> nothing differs from EEFL
def my_method(**settings):
    class Mine(EEFL):
        name = "mine"

        def local_losses(self, net, weights, data, rnd):
            return lambda raw, y: 2 * super().local_loss(net, weights, data, rnd)(raw, y)

    return Mine(**settings)

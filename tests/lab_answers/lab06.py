"""Answers to lab 6 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right coverage_of: by a list
def coverage_of(samples):
    return [float(samples[e:].sum() / samples.sum()) for e in range(len(samples))]


# wrong coverage_of: from the wrong end -> everybody trains exit 1
def coverage_of(samples):
    return samples.cumsum(0) / samples.sum()


# wrong coverage_of: the tiers' own shares -> everybody trains exit 1
def coverage_of(samples):
    return samples / samples.sum()


# wrong coverage_of: counts instead of shares -> everybody trains exit 1
def coverage_of(samples):
    return samples.flip(0).cumsum(0).flip(0)


# wrong coverage_of: by the number of tiers -> exits 2 and 3 have the same 30
def coverage_of(samples):
    E = len(samples)
    return [(E - e) / E for e in range(E)]


# right beyond_null: with the difference of the tables first
def beyond_null(own, null):
    left = {m: [a - b for a, b in zip(own[m], null[m])] for m in own}
    last = max(left)
    return [left[e][-1] - left[last][e - 1] for e in left if e < last]


# wrong beyond_null: the naive difference -> nothing is left of it beyond the null
def beyond_null(own, null):
    E = max(own)
    return [own[e][e - 1] - own[E][e - 1] for e in range(1, E)]


# wrong beyond_null: null minus own -> exit 1 is 1 - 0.25
def beyond_null(own, null):
    E = max(own)
    gap = lambda table, e: table[e][e - 1] - table[E][e - 1]
    return [gap(null, e) - gap(own, e) for e in range(1, E)]


# wrong beyond_null: without the deepest tier -> exit 1 is 1 - 0.25
def beyond_null(own, null):
    return [own[e][e - 1] - null[e][e - 1] for e in range(1, max(own))]


# right class_shift: with F.log_softmax of the logarithms
def class_shift(own, everybody):
    own, everybody = own.double(), everybody.double()
    return F.log_softmax((own + 1).log(), 0) - F.log_softmax((everybody + 1).log(), 0)


# wrong class_shift: no smoothing -> a class without images is no -inf
def class_shift(own, everybody):
    return (own / own.sum()).log() - (everybody / everybody.sum()).log()


# wrong class_shift: the other way round -> own minus all
def class_shift(own, everybody):
    share = lambda n: (n + 1) / (n + 1).sum()
    return share(everybody).log() - share(own).log()


# wrong class_shift: counts, not shares -> own minus all
def class_shift(own, everybody):
    return (own + 1).log() - (everybody + 1).log()


# wrong class_shift: smoothed after the division -> shares of the counts plus one
def class_shift(own, everybody):
    return (own / own.sum() + 1).log() - (everybody / everybody.sum() + 1).log()


# right calibrated_loss: by hand
def calibrated_loss(decided, a, y):
    logp = (decided + a).log_softmax(-1)
    return -logp[:, torch.arange(len(y)), y].mean(1).sum()


# wrong calibrated_loss: the mean over exits -> the sum over exits of the plain losses
def calibrated_loss(decided, a, y):
    return sum(F.cross_entropy(f + a, y) for f in decided) / len(decided)


# wrong calibrated_loss: subtracted -> the rare label costs log 10
def calibrated_loss(decided, a, y):
    return sum(F.cross_entropy(f - a, y) for f in decided)


# wrong calibrated_loss: weights of the classes instead of a shift -> the sum over exits of the plain
def calibrated_loss(decided, a, y):
    return sum(F.cross_entropy(f, y, weight=a.exp(), reduction="sum") for f in decided)


# wrong calibrated_loss: piles up along the exits -> the same shift at each exit
def calibrated_loss(decided, a, y):
    return sum(F.cross_entropy(f + e * a, y) for e, f in enumerate(decided, 1))


# right votes: exit by exit
def votes(decided, c):
    out = []
    for e in range(1, len(c) + 1):
        w = c[:e] / c[:e].sum()
        out.append((w[:, None, None] * decided[:e]).sum(0))
    return torch.stack(out)


# wrong votes: not divided -> Weights 1 and 1/2
def votes(decided, c):
    return (c[:, None, None] * decided).cumsum(0)


# wrong votes: divided by the number of exits -> Exit 1 knows of no exit before it
def votes(decided, c):
    n = len(c)
    return (c[:, None, None] * decided).cumsum(0) / n


# wrong votes: all exits vote everywhere -> Exit 1 knows of no exit before it
def votes(decided, c):
    w = c / c.sum()
    return (w[:, None, None] * decided).sum(0).expand_as(decided)


# wrong votes: equal weights -> Weights 1 and 1/2
def votes(decided, c):
    n = torch.arange(1, len(c) + 1)
    return decided.cumsum(0) / n[:, None, None]

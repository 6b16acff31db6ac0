"""Answers to lab 5 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right nats_of: by hand
def nats_of(logits, y):
    log_p = logits.log_softmax(1)
    return [min(-float(log_p[i, c]), 9.99) for i, c in enumerate(y.tolist())]


# wrong nats_of: the mean of the batch -> One number for each sample
def nats_of(logits, y):
    return F.cross_entropy(logits, y).clamp(max=9.99)


# wrong nats_of: the probability of the answer instead of the label -> The *label* counts
def nats_of(logits, y):
    return -logits.softmax(-1).max(-1).values.log()


# wrong nats_of: bits instead of nats -> Two equal logits
def nats_of(logits, y):
    rows = torch.arange(len(y))
    return -logits.softmax(-1)[rows, y].log2().clamp(min=-9.99)


# wrong nats_of: no cap -> At most 9.99
def nats_of(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


# wrong nats_of: 1 - p -> -ln(1/2)
def nats_of(logits, y):
    return 1 - logits.softmax(-1)[torch.arange(len(y)), y]


# right count_cells: a loop
def count_cells(d, y, K, bins, width):
    table = [[0] * bins for _ in range(K)]
    for v, c in zip(d.tolist(), y.tolist()):
        table[c][min(int(v / width), bins - 1)] += 1
    return table


# wrong count_cells: what is beyond the last bin is lost -> 7.5 is beyond, the last bin
def count_cells(d, y, K, bins, width):
    table = torch.zeros(K, bins)
    for v, c in zip(d.tolist(), y.tolist()):
        if int(v / width) < bins:
            table[c, int(v / width)] += 1
    return table


# wrong count_cells: rounded to the nearest edge -> do not round
def count_cells(d, y, K, bins, width):
    j = (d / width).round().long().clamp(max=bins - 1)
    return torch.bincount(y * bins + j, minlength=K * bins).view(K, bins)


# wrong count_cells: bins in rows -> A row for each class
def count_cells(d, y, K, bins, width):
    j = (d / width).long().clamp(max=bins - 1)
    return torch.bincount(j * K + y, minlength=K * bins).view(bins, K)


# wrong count_cells: the width is not used -> Class 2 is empty
def count_cells(d, y, K, bins, width):
    j = d.long().clamp(max=bins - 1)
    return torch.bincount(y * bins + j, minlength=K * bins).view(K, bins)


# wrong count_cells: shares instead of counts -> Class 1
def count_cells(d, y, K, bins, width):
    j = (d / width).long().clamp(max=bins - 1)
    n = torch.bincount(y * bins + j, minlength=K * bins).view(K, bins)
    return n / n.sum(1, keepdim=True).clamp(min=1)


# right rank_agreement: with scipy's ranks
def rank_agreement(a, b):
    from scipy.stats import rankdata

    return torch.corrcoef(torch.stack([torch.from_numpy(rankdata(v)) for v in (a, b)]))[0, 1]


# wrong rank_agreement: the correlation of the values -> whatever the scale
def rank_agreement(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


# wrong rank_agreement: one argsort -> One argsort gives places
def rank_agreement(a, b):
    return torch.corrcoef(torch.stack([a.argsort().double(), b.argsort().double()]))[0, 1]


# wrong rank_agreement: ties in the order of the list -> share the mean
def rank_agreement(a, b):
    rank = lambda v: v.argsort(stable=True).argsort().double()
    return torch.corrcoef(torch.stack([rank(a), rank(b)]))[0, 1]


# wrong rank_agreement: the share of equal ranks -> The opposite order
def rank_agreement(a, b):
    rank = lambda v: v.argsort().argsort()
    return (rank(a) == rank(b)).double().mean()


# right class_share: one minus what is left within the classes
def class_share(d, y):
    inside = sum(((d[y == c] - d[y == c].mean()) ** 2).sum() for c in y.unique())
    return 1 - inside / ((d - d.mean()) ** 2).sum()


# wrong class_share: the share that is left -> the class explains everything
def class_share(d, y):
    inside = sum(((d[y == c] - d[y == c].mean()) ** 2).sum() for c in y.unique())
    return inside / ((d - d.mean()) ** 2).sum()


# wrong class_share: each class counts once -> class by class weighed
def class_share(d, y):
    means = torch.stack([d[y == c].mean() for c in y.unique()])
    return means.var(correction=0) / d.var(correction=0)


# wrong class_share: standard deviations -> a half
def class_share(d, y):
    _, index = y.unique(return_inverse=True)
    means = torch.stack([d[y == c].mean() for c in y.unique()])
    return means[index].std() / d.std()


# wrong class_share: correlation with the number of the class -> a half
def class_share(d, y):
    return torch.corrcoef(torch.stack([d, y.double()]))[0, 1].nan_to_num()


# right mean_by_exit: by counting
def mean_by_exit(d, exit, E):
    return torch.bincount(exit, d, E) / torch.bincount(exit, minlength=E)


# wrong mean_by_exit: divided by all samples -> divide by those who leave *there*
def mean_by_exit(d, exit, E):
    return torch.bincount(exit, d, E) / len(d)


# wrong mean_by_exit: empty exits left out -> One number per exit
def mean_by_exit(d, exit, E):
    return torch.stack([d[exit == e].mean() for e in exit.unique()])


# wrong mean_by_exit: 0 where nobody leaves -> 0 would say that they are easy
def mean_by_exit(d, exit, E):
    return torch.bincount(exit, d, E) / torch.bincount(exit, minlength=E).clamp(min=1)


# wrong mean_by_exit: all that arrive, not those that leave -> divide by those who leave
def mean_by_exit(d, exit, E):
    return torch.stack([d[exit >= e].mean() for e in range(E)])

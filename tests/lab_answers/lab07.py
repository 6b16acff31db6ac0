"""Answers to lab 7 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right table_of: image by image
def table_of(d, y, K, bins):
    out = torch.zeros(K, bins)
    for value, label in zip(d.tolist(), y.tolist()):
        out[label, min(int(value), bins - 1)] += 1
    return out


# wrong table_of: hard images fall out -> each image counts once
def table_of(d, y, K, bins):
    out = torch.zeros(K, bins)
    for value, label in zip(d.tolist(), y.tolist()):
        if value < bins:
            out[label, int(value)] += 1
    return out


# wrong table_of: rounds to the nearest nat -> 0.2 and 0.9 nats are in bin 0
def table_of(d, y, K, bins):
    b = d.round().long().clamp(max=bins - 1)
    return torch.bincount(y * bins + b, minlength=K * bins).view(K, bins)


# wrong table_of: difficulties as rows -> A row for each label
def table_of(d, y, K, bins):
    b = d.long().clamp(max=bins - 1)
    return torch.bincount(b * K + y, minlength=K * bins).view(bins, K)


# wrong table_of: shares -> each image counts once
def table_of(d, y, K, bins):
    b = d.long().clamp(max=bins - 1)
    return torch.bincount(y * bins + b, minlength=K * bins).view(K, bins) / len(y)


# right generator_loss: with log probabilities
def generator_loss(taught, first, y, d, lam):
    loss = lambda f: -f.log_softmax(-1)[torch.arange(len(y)), y]
    return lam * torch.stack([loss(f).mean() for f in taught]).sum() + F.l1_loss(loss(first), d)


# wrong generator_loss: one difficulty for the whole batch -> gaps of both signs must not cancel
def generator_loss(taught, first, y, d, lam):
    gap = (d.mean() - F.cross_entropy(first, y)).abs()
    return lam * sum(F.cross_entropy(f, y) for f in taught) + gap


# wrong generator_loss: squared -> the mean of |d - found|, latent by latent
def generator_loss(taught, first, y, d, lam):
    gap = d - F.cross_entropy(first, y, reduction="none")
    return lam * sum(F.cross_entropy(f, y) for f in taught) + gap.pow(2).mean()


# wrong generator_loss: mean over the exits -> two exits lose log 10 each
def generator_loss(taught, first, y, d, lam):
    found = F.cross_entropy(first, y, reduction="none")
    ce = sum(F.cross_entropy(f, y) for f in taught) / len(taught)
    return lam * ce + (d - found).abs().mean()


# wrong generator_loss: lam on the difficulty -> lam = 0, as hard as asked
def generator_loss(taught, first, y, d, lam):
    found = F.cross_entropy(first, y, reduction="none")
    return sum(F.cross_entropy(f, y) for f in taught) + lam * (d - found).abs().mean()


# right tier_gap: with F.kl_div
def tier_gap(teacher, students):
    p = teacher.softmax(-1)
    return [F.kl_div(f.log_softmax(-1), p, reduction="batchmean") for f in students]


# wrong tier_gap: the other direction -> the teacher weighs, log of t over s
def tier_gap(teacher, students):
    p, q = teacher.log_softmax(-1), students.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1).mean(-1)


# wrong tier_gap: logits instead of log probabilities -> Logits plus a constant are the same answer
def tier_gap(teacher, students):
    return (teacher.softmax(-1) * (teacher - students)).sum(-1).mean(-1)


# wrong tier_gap: mean over the classes too -> the teacher weighs
def tier_gap(teacher, students):
    p, q = teacher.log_softmax(-1), students.log_softmax(-1)
    return (p.exp() * (p - q)).mean((1, 2))


# wrong tier_gap: one number for all exits -> One number for each exit
def tier_gap(teacher, students):
    p, q = teacher.log_softmax(-1), students.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


# right exit_weights: latent by latent
def exit_weights(d, mu, tau):
    rows = [(v - mu).abs() / (v - mu).abs().sum() for v in d]
    w = (-sum(rows) / len(rows) / tau).exp()
    return w / w.sum()


# wrong exit_weights: no minus -> the nearest range gets *most*
def exit_weights(d, mu, tau):
    delta = (d[:, None] - mu[None]).abs()
    delta = delta / delta.sum(1, keepdim=True)
    return (delta.mean(0) / tau).softmax(0)


# wrong exit_weights: distances not normalised -> row by row
def exit_weights(d, mu, tau):
    return (-(d[:, None] - mu[None]).abs().mean(0) / tau).softmax(0)


# wrong exit_weights: mean first, then normalised -> normalise latent by latent
def exit_weights(d, mu, tau):
    delta = (d[:, None] - mu[None]).abs().mean(0)
    return (-delta / delta.sum() / tau).softmax(0)


# wrong exit_weights: a sum over the latents, as in the released code -> row by row
def exit_weights(d, mu, tau):
    delta = (d[:, None] - mu[None]).abs()
    delta = delta / delta.sum(1, keepdim=True)
    return (-delta.sum(0) / tau).softmax(0)


# right step_ratio: as long vectors
def step_ratio(old, clients, server):
    flat = lambda w: torch.cat([w[k].flatten() for k in old])
    return (flat(server) - flat(clients)).norm() / (flat(clients) - flat(old)).norm()


# wrong step_ratio: norms of the tensors added -> one root of one sum
def step_ratio(old, clients, server):
    size = lambda a, b: sum((a[k] - b[k]).norm() for k in a)
    return size(server, clients) / size(clients, old)


# wrong step_ratio: from the old weights -> A server that changes nothing: 0
def step_ratio(old, clients, server):
    size = lambda a, b: sum((a[k] - b[k]).pow(2).sum() for k in a).sqrt()
    return size(server, old) / size(clients, old)


# wrong step_ratio: a ratio for each tensor -> one root of one sum
def step_ratio(old, clients, server):
    far = [
        (server[k] - clients[k]).norm() / (clients[k] - old[k]).norm().clamp(min=1e-9) for k in old
    ]
    return sum(far) / len(far)


# wrong table_of: labels that nobody has are cut off -> (minlength)
def table_of(d, y, K, bins):
    b = d.long().clamp(max=bins - 1)
    return torch.bincount(y * bins + b).view(-1, bins)


# wrong generator_loss: the teacher's own exit 1 judges difficulty -> the loss of *first*, the global exit
def generator_loss(taught, first, y, d, lam):
    found = F.cross_entropy(taught[0], y, reduction="none")
    return lam * sum(F.cross_entropy(f, y) for f in taught) + (d - found).abs().mean()


# wrong generator_loss: the batch's mean difficulty for each latent -> a number for each latent
def generator_loss(taught, first, y, d, lam):
    found = F.cross_entropy(first, y)
    return lam * sum(F.cross_entropy(f, y) for f in taught) + (d - found).abs().mean()


# wrong exit_weights: normalised by columns -> is each *row* divided by its sum
def exit_weights(d, mu, tau):
    delta = (d[:, None] - mu[None]).abs()
    return (-(delta / delta.sum(0)).mean(0) / tau).softmax(0)


# wrong step_ratio: the root forgotten -> squares give 4
def step_ratio(old, clients, server):
    size = lambda a, b: sum((a[k] - b[k]).pow(2).sum() for k in a)
    return size(server, clients) / size(clients, old)

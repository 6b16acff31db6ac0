"""Answers to lab 3 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right mix_accuracy: by counting
def mix_accuracy(right, y, p):
    n = torch.bincount(y, minlength=len(p))
    hits = torch.bincount(y, right.double(), minlength=len(p))
    return (p * hits / n.clamp(min=1)).sum()


# wrong mix_accuracy: the ordinary accuracy -> A client that only meets class 0
def mix_accuracy(right, y, p):
    return right.double().mean()


# wrong mix_accuracy: weighs images, not classes -> the mean of the classes, not of the images
def mix_accuracy(right, y, p):
    w = p[y]
    return (w * right).sum() / w.sum()


# wrong mix_accuracy: NaN for a class without images -> counts as 0, not as NaN
def mix_accuracy(right, y, p):
    return sum(p[c] * right[y == c].double().mean() for c in range(len(p)))


# right latent_loss: PyTorch's function
def latent_loss(z_s, z_t, logits_s, y, alpha, tau):
    z_t = z_t.detach()
    return alpha * F.mse_loss(z_s / tau, z_t / tau) + (1 - alpha) * F.cross_entropy(logits_s, y)


# wrong latent_loss: the sum over the coordinates -> mean over images *and* coordinates
def latent_loss(z_s, z_t, logits_s, y, alpha, tau):
    gap = ((z_s - z_t.detach()) / tau).pow(2).sum(1).mean()
    return (1 - alpha) * F.cross_entropy(logits_s, y) + alpha * gap


# wrong latent_loss: tau after the square -> divides the gap before it is squared
def latent_loss(z_s, z_t, logits_s, y, alpha, tau):
    gap = (z_s - z_t.detach()).pow(2).mean() / tau
    return (1 - alpha) * F.cross_entropy(logits_s, y) + alpha * gap


# wrong latent_loss: alpha on the labels -> alpha = 0: labels alone
def latent_loss(z_s, z_t, logits_s, y, alpha, tau):
    gap = ((z_s - z_t.detach()) / tau).pow(2).mean()
    return alpha * F.cross_entropy(logits_s, y) + (1 - alpha) * gap


# wrong latent_loss: the teacher learns too -> detach its latents
def latent_loss(z_s, z_t, logits_s, y, alpha, tau):
    gap = ((z_s - z_t) / tau).pow(2).mean()
    return (1 - alpha) * F.cross_entropy(logits_s, y) + alpha * gap


# wrong latent_loss: the student is detached too -> no gradient leaves the loss
def latent_loss(z_s, z_t, logits_s, y, alpha, tau):
    gap = ((z_s - z_t) / tau).pow(2).mean().detach()
    return (1 - alpha) * F.cross_entropy(logits_s, y) + alpha * gap


# right explained: by the variances of the coordinates
def explained(z_s, z_t):
    return 1 - (z_s - z_t).pow(2).mean() / z_t.var(0, correction=0).mean()


# wrong explained: one mean over everything -> Always the mean of each coordinate: 0
def explained(z_s, z_t):
    return 1 - (z_s - z_t).pow(2).sum() / (z_t - z_t.mean()).pow(2).sum()


# wrong explained: the student's variance -> Always the mean of each coordinate
def explained(z_s, z_t):
    return 1 - (z_s - z_t).pow(2).sum() / (z_s - z_s.mean(0)).pow(2).sum()


# wrong explained: the mean of one R^2 for each coordinate -> all summed
def explained(z_s, z_t):
    return (1 - (z_s - z_t).pow(2).sum(0) / (z_t - z_t.mean(0)).pow(2).sum(0)).mean()


# wrong explained: the gap's share itself -> are explained completely
def explained(z_s, z_t):
    return (z_s - z_t).pow(2).sum() / (z_t - z_t.mean(0)).pow(2).sum()


# right hidden_part: by the singular vectors
def hidden_part(z, W):
    _, s, V = torch.linalg.svd(W, full_matrices=False)
    rows = V[s > 1e-6 * s[0]]
    return z - (z @ rows.T) @ rows


# wrong hidden_part: the seen part -> the second one is hidden
def hidden_part(z, W):
    return z @ (torch.linalg.pinv(W) @ W)


# wrong hidden_part: rows of W are not of length 1 -> the second one is hidden
def hidden_part(z, W):
    return z - z @ W.T @ W


# wrong hidden_part: rows scaled but not made orthogonal -> No logit may see the hidden part
def hidden_part(z, W):
    rows = W / W.norm(dim=1, keepdim=True)
    return z - z @ rows.T @ rows


# right paired: with seeds collected first
def paired(runs, a, b, gamma, metric):
    mine = [r for r in runs if r["gamma"] == gamma]
    seeds = sorted({r["seed"] for r in mine})
    value = {(r["method"], r["seed"]): r[metric] for r in mine}
    return [value[a, s] - value[b, s] for s in seeds if (a, s) in value and (b, s) in value]


# wrong paired: in the order of the runs -> same seed, this gamma, seeds in ascending order
def paired(runs, a, b, gamma, metric):
    of = lambda m: [r[metric] for r in runs if r["method"] == m and r["gamma"] == gamma]
    return [x - y for x, y in zip(of(a), of(b))]


# wrong paired: sorted values instead of seeds -> same seed, this gamma
def paired(runs, a, b, gamma, metric):
    of = lambda m: sorted(r[metric] for r in runs if r["method"] == m and r["gamma"] == gamma)
    return [x - y for x, y in zip(of(a), of(b))]


# wrong paired: gamma is not looked at -> same seed, this gamma
def paired(runs, a, b, gamma, metric):
    of = lambda m: {r["seed"]: r[metric] for r in runs if r["method"] == m}
    return [of(a)[s] - of(b)[s] for s in sorted(of(a))]


# wrong paired: always the same metric -> The metric asked for, here uni
def paired(runs, a, b, gamma, metric):
    of = lambda m: {
        r["seed"]: r["priv"] for r in runs if r["method"] == m and r["gamma"] == gamma
    }
    return [of(a)[s] - of(b)[s] for s in sorted(of(a))]


# wrong paired: the difference of the means -> same seed, this gamma
def paired(runs, a, b, gamma, metric):
    of = lambda m: [r[metric] for r in runs if r["method"] == m and r["gamma"] == gamma]
    return sum(of(a)) / len(of(a)) - sum(of(b)) / len(of(b))

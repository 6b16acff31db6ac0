"""Answers to lab 2 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right soft: by hand, with the largest logit subtracted
def soft(logits, T):
    e = ((logits - logits.max(1, keepdim=True).values) / T).exp()
    return e / e.sum(1, keepdim=True)


# wrong soft: the largest logit not subtracted -> exp(1000) is infinite
def soft(logits, T):
    e = (logits / T).exp()
    return e / e.sum(1, keepdim=True)


# wrong soft: over the batch -> probabilities of each row add to 1
def soft(logits, T):
    return torch.softmax(logits / T, 0)


# wrong soft: multiplies by T -> T = 3: divide the logits
def soft(logits, T):
    return torch.softmax(logits * T, -1)


# wrong soft: divides probabilities -> T = 3: divide the logits
def soft(logits, T):
    p = torch.softmax(logits, -1) / T
    return p / p.sum(1, keepdim=True)


# wrong soft: logarithms -> probabilities of each row add to 1
def soft(logits, T):
    return torch.log_softmax(logits / T, -1)


# right distillation_loss: PyTorch's function
def distillation_loss(student, teacher, T):
    p = F.softmax(teacher.detach() / T, -1)
    return F.kl_div(F.log_softmax(student / T, -1), p, reduction="batchmean") * T**2


# wrong distillation_loss: the default mean of kl_div -> sum over the classes, mean over the samples
def distillation_loss(student, teacher, T):
    p = F.softmax(teacher.detach() / T, -1)
    return F.kl_div(F.log_softmax(student / T, -1), p, reduction="mean") * T**2


# wrong distillation_loss: without T squared -> multiplied by T squared
def distillation_loss(student, teacher, T):
    p = F.softmax(teacher.detach() / T, -1)
    return F.kl_div(F.log_softmax(student / T, -1), p, reduction="batchmean")


# wrong distillation_loss: the other direction -> the teacher's p weighs
def distillation_loss(student, teacher, T):
    log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher.detach() / T, -1)
    return T * T * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# wrong distillation_loss: cross-entropy instead of the divergence -> has loss 0
def distillation_loss(student, teacher, T):
    p = F.softmax(teacher.detach() / T, -1)
    return -T * T * (p * F.log_softmax(student / T, -1)).sum(-1).mean()


# wrong distillation_loss: the teacher learns too -> detach its logits
def distillation_loss(student, teacher, T):
    log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# wrong distillation_loss: a number -> no gradient leaves the loss
def distillation_loss(student, teacher, T):
    return float(kd_loss(student, teacher, T))


# right kd_gradient: by autograd's result, a list
def kd_gradient(student, teacher, T):
    q, p = (student / T).softmax(-1), (teacher / T).softmax(-1)
    return ((q - p) * T / student.shape[0]).tolist()


# wrong kd_gradient: the other sign -> negative where the teacher wants more
def kd_gradient(student, teacher, T):
    return T * ((teacher / T).softmax(-1) - (student / T).softmax(-1)) / len(student)


# wrong kd_gradient: not divided by the batch -> (q - p) / B
def kd_gradient(student, teacher, T):
    return T * ((student / T).softmax(-1) - (teacher / T).softmax(-1))


# wrong kd_gradient: the inner derivative forgotten -> times 1/T from inside
def kd_gradient(student, teacher, T):
    return T * T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / len(student)


# wrong kd_gradient: the factor T squared forgotten -> T = 5: T squared
def kd_gradient(student, teacher, T):
    return ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / T / len(student)


# right kl: xlogy
def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


# wrong kl: 0 log 0 -> A class with p = 0 adds nothing
def kl(p, q):
    return (p * (p / q).log()).sum()


# wrong kl: weighed by q -> weigh by p
def kl(p, q):
    return (q * (p / q).log()).sum()


# wrong kl: the other direction -> weigh by p
def kl(p, q):
    seen = q > 0
    return (q[seen] * (q[seen] / p[seen]).log()).sum()


# wrong kl: base 2 -> weigh by p, log of p over q
def kl(p, q):
    seen = p > 0
    return (p[seen] * (p[seen] / q[seen]).log2()).sum()


# wrong kl: the mean -> weigh by p
def kl(p, q):
    seen = p > 0
    return (p[seen] * (p[seen] / q[seen]).log()).mean()


# right mixture: with a variable for each term
def mixture(student, teacher, y, alpha, T):
    hard, soft = F.cross_entropy(student, y), kd_loss(student, teacher, T)
    return hard + alpha * (soft - hard)


# wrong mixture: alpha and 1 - alpha exchanged -> alpha = 0: labels only
def mixture(student, teacher, y, alpha, T):
    return (1 - alpha) * kd_loss(student, teacher, T) + alpha * F.cross_entropy(student, y)


# wrong mixture: the cross-entropy softened too -> logits not divided by T
def mixture(student, teacher, y, alpha, T):
    hard = F.cross_entropy(student / T, y)
    return alpha * kd_loss(student, teacher, T) + (1 - alpha) * hard


# wrong mixture: the labels with full weight -> alpha = 1: the teacher only
def mixture(student, teacher, y, alpha, T):
    return alpha * kd_loss(student, teacher, T) + F.cross_entropy(student, y)


# right scramble: by sorting random numbers
def scramble(logits, y, generator):
    rows = []
    for z, c in zip(logits.tolist(), y.tolist()):
        wrong = z[:c] + z[c + 1 :]
        order = torch.rand(len(wrong), generator=generator).argsort().tolist()
        mixed = [wrong[k] for k in order]
        rows.append(mixed[:c] + [z[c]] + mixed[c:])
    return rows


# wrong scramble: the right class moves too -> right class stays where it is
def scramble(logits, y, generator):
    return torch.stack([z[torch.randperm(len(z), generator=generator)] for z in logits])


# wrong scramble: one permutation for all rows -> draw a permutation for each row
def scramble(logits, y, generator):
    out, K = logits.clone(), logits.shape[1]
    order = torch.randperm(K - 1, generator=generator)
    for i, c in enumerate(y.tolist()):
        others = [k for k in range(K) if k != c]
        out[i, others] = logits[i, others][order]
    return out


# wrong scramble: without the generator -> The same generator gives the same permutation
def scramble(logits, y, generator):
    out, K = logits.clone(), logits.shape[1]
    for i, c in enumerate(y.tolist()):
        others = [k for k in range(K) if k != c]
        out[i, others] = logits[i, others][torch.randperm(K - 1)]
    return out


# wrong scramble: overwrites the teacher's answers -> `logits` was overwritten
def scramble(logits, y, generator):
    for i, c in enumerate(y.tolist()):
        others = [k for k in range(logits.shape[1]) if k != c]
        logits[i, others] = logits[i, others][torch.randperm(len(others), generator=generator)]
    return logits


# wrong scramble: nothing moves -> nothing has moved
def scramble(logits, y, generator):
    return logits.clone()


# wrong scramble: new numbers -> Each row keeps its numbers
def scramble(logits, y, generator):
    out = torch.randn(logits.shape, generator=generator)
    rows = torch.arange(len(y))
    out[rows, y] = logits[rows, y]
    return out

"""Answers to lab 0 as students give them; tests/test_labs.py runs the lab's tests on each.

Each starts with `# right EXERCISE: how` or `# wrong EXERCISE: how -> words of the message`."""


# right largest_share: a list, client by client
def largest_share(counts):
    return [max(row) / sum(row) for row in counts.tolist()]


# wrong largest_share: the number instead of the share -> divided by the sum of its own row
def largest_share(counts):
    return counts.max(1).values


# wrong largest_share: of the whole table -> divided by the sum of its own row
def largest_share(counts):
    return counts.max(1).values / counts.sum()


# wrong largest_share: classes instead of clients -> the sum of its own row
def largest_share(counts):
    return counts.max(0).values / counts.sum(0)


# right paired_differences: a tensor
def paired_differences(ours, theirs):
    return torch.tensor(ours) - torch.tensor(theirs)


# wrong paired_differences: their mean -> not their mean
def paired_differences(ours, theirs):
    return sum(ours) / len(ours) - sum(theirs) / len(theirs)


# wrong paired_differences: the other way round -> positive where `ours` is better
def paired_differences(ours, theirs):
    return [b - a for a, b in zip(ours, theirs)]


# right saved_and_spoilt: sums of products
def saved_and_spoilt(first, last):
    n = len(first)
    return [int(((1 - first.int()) * last).sum()) / n, int((first * (1 - last.int())).sum()) / n]


# wrong saved_and_spoilt: the other way round -> Saved: the first exit is wrong
def saved_and_spoilt(first, last):
    return (first & ~last).float().mean(), (~first & last).float().mean()


# wrong saved_and_spoilt: shares of those that change -> 2 of all 5
def saved_and_spoilt(first, last):
    changed = first != last
    return last[changed].float().mean(), first[changed].float().mean()


# wrong saved_and_spoilt: accuracies -> 2 of all 5
def saved_and_spoilt(first, last):
    return last.float().mean(), first.float().mean()


# right policy_cost: a tensor
def policy_cost(shares, costs):
    return torch.tensor(shares).double() @ torch.tensor(costs).double()


# wrong policy_cost: the mean over the exits -> Half for 10, half for 30
def policy_cost(shares, costs):
    return sum(q * c for q, c in zip(shares, costs)) / sum(q > 0 for q in shares)


# wrong policy_cost: every exit adds its own cost -> nothing is added up twice
def policy_cost(shares, costs):
    return sum(q * sum(costs[: e + 1]) for e, q in enumerate(shares))

"""Slow formulas that the library must match, in plain Python: which entries survive, and a layer by hand."""

import math

import torch


def group_indices(k, m=4, grouping="adjacent", widths=None):
    """Lists of the channels that compete, written from the specification."""
    if grouping == "adjacent":
        return [[m * g + i for i in range(m)] for g in range(k // m)]
    groups, start = [], 0
    for width in widths or (k,):
        stride = width // m
        groups += [[start + g + i * stride for i in range(m)] for g in range(stride)]
        start += width
    return groups


def slow_mask(x, n=2, m=4, grouping="adjacent", widths=None):
    """`nm_mask`, one group at a time: NaN before Inf before finite, ties to the lower index."""

    def size(value):
        if math.isnan(value):
            return (2, 0.0)
        return (1, 0.0) if math.isinf(value) else (0, abs(value))

    groups = group_indices(x.shape[-1], m, grouping, widths)
    rows = x.detach().reshape(-1, x.shape[-1]).tolist()
    kept = [[False] * x.shape[-1] for _ in rows]
    for row, mask in zip(rows, kept, strict=True):
        sizes = [size(value) for value in row]
        for group in groups:
            for i in sorted(group, key=sizes.__getitem__, reverse=True)[:n]:  # (equal ones stay in order)
                mask[i] = True
    return torch.tensor(kept, dtype=torch.bool).reshape(x.shape)


def by_hand(x, weight, bias=None, *, mask, norm="none", lowrank_a=None, lowrank_b=None):
    """The compensated layer as the paper writes it, in float64."""
    x, weight = x.detach().double(), weight.detach().double()
    kept = x * mask
    if norm != "none":
        epsilon = 1e-8 if norm == "paper" else 0.0
        total, left = (t.square().sum(-1, keepdim=True) for t in (x, kept))
        kept = kept * torch.where(total > 0, total / (left + epsilon), 0.0).sqrt()  # (0 · s = 0)
    y = kept @ weight.T
    if lowrank_a is not None:
        y = y + x @ lowrank_a.detach().double().T @ lowrank_b.detach().double().T
    return y if bias is None else y + bias.detach().double()

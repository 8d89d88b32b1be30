"""Which features compete: an order of them in which groups of m neighbours drop little energy.

A permutation of the hidden features of an MLP folds into the layers around them, so their order is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Memory of the members of the groups that meet at one time: on a CPU it stays in the cache.
_CPU_BYTES, _GPU_BYTES = 1 << 22, 1 << 26
# An exchange saves at least this share of what its two groups drop: rounding alone makes none.
_LEAST_GAIN = 1e-5
# How many others each group meets: of 1,024 features of a trained FLUX, 32 save nine tenths of what 288 do.
_ROUNDS = 64


def dropped_energy(energies: Tensor, n: int = 2, m: int = 4) -> float:
    """Sum of the m - n smallest entries of each group of m neighbours of `energies` (T, K)."""
    groups = energies.unflatten(-1, (-1, m))
    return float(groups.topk(m - n, dim=-1, largest=False).values.sum(dtype=torch.float64))


def grouping_permutation(energies: Tensor, n: int = 2, m: int = 4, *, seed: int = 0) -> Tensor:
    """An order of K features in which groups of m neighbours, of which n are kept, drop little energy.

    The search starts from the order given, or from the features in falling order dealt to all groups in turn,
    where that drops less. Then groups meet in random pairs, many at a time, and exchange the two members that
    lower most what both drop. What is dropped never rises.

    Parameters
    ----------
    energies : Tensor (T, K), real, 0 or more
        Of each token and feature: what dropping it costs.
    n : int
        Keep n of every m.
    m : int
        How many compete; divides K.
    seed : int
        Of the pairs that meet.

    Returns
    -------
    Tensor (K,), int64, on the device of `energies`
        The groups of `energies[:, order]` drop little.

    Raises
    ------
    ValueError
        If K does not split into groups of m.
    """
    tokens, k = energies.shape
    if k % m:
        raise ValueError(f"{k} features do not split into groups of {m}")
    count, given = k // m, torch.arange(k, device=energies.device)
    if n == m or count < 2 or not tokens:
        return given
    rows = energies.detach().T.float().contiguous()  # one row for each feature
    dealt = rows.sum(1).argsort(descending=True, stable=True).unflatten(0, (m, -1)).T.flatten()
    order = min((given, dealt), key=lambda one: dropped_energy(energies[:, one], n, m))
    groups = order.unflatten(0, (-1, m)).clone()
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, (_GPU_BYTES if rows.is_cuda else _CPU_BYTES) // (4 * m * tokens))
    for _ in range(_ROUNDS):
        shuffled = torch.randperm(count, generator=generator)[: count // 2 * 2].to(rows.device)
        for one, other in zip(*(half.split(at_once) for half in shuffled.chunk(2)), strict=True):
            _exchange(rows, groups, (one, other), m - n)
    return groups.flatten()


def _exchange(rows: Tensor, groups: Tensor, pair: tuple[Tensor, Tensor], drop: int) -> None:
    """Let each group in `pair[0]` exchange a member with its partner in `pair[1]` where both drop less then.

    Of a token let s_1 <= s_2 <= ... be the members of a group that drops d of them. With x in the place of
    the member a, what is dropped changes by min(x, r) - min(a, s_d): r is s_d+1 if a is dropped, else s_d.
    """
    members = [rows[groups[side]] for side in pair]  # (P, m, T) each
    bounds, leaving, dropped = [], [], []
    for entries in members:
        rising = _rising(entries)
        last, next_one = rising[drop - 1][:, None], rising[drop][:, None]
        bounds.append(torch.where(entries <= last, next_one, last))
        leaving.append(torch.minimum(entries, last).sum(-1))
        dropped.append(torch.stack(rising[:drop]).sum((0, -1)))
    buffer = torch.empty_like(members[0])  # fresh memory for each minimum would take most of the time
    coming = [
        torch.stack(
            [torch.minimum(bound[:, None], entries, out=buffer).sum(-1) for bound in own.unbind(1)], dim=1
        )
        for own, entries in zip(bounds, reversed(members), strict=True)
    ]  # (P, m that leave, m that come) each
    change = coming[0] - leaving[0][..., None] + (coming[1] - leaving[1][..., None]).mT
    least, which = change.flatten(1).min(1)
    better = least < -_LEAST_GAIN * (dropped[0] + dropped[1])
    (one, other), which, m = (side[better] for side in pair), which[better], groups.shape[1]
    leaves, comes = which // m, which % m
    groups[one, leaves], groups[other, comes] = groups[other, comes], groups[one, leaves]


def _rising(entries: Tensor) -> list[Tensor]:
    """The m rows of `entries` (P, m, T) in rising order of each token, by odd-even transposition."""
    found = list(entries.unbind(1))
    for step in range(len(found)):
        for i in range(step % 2, len(found) - 1, 2):
            low, high = found[i : i + 2]
            found[i : i + 2] = torch.minimum(low, high), torch.maximum(low, high)
    return found

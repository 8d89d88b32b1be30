"""Which entries survive: N:M selection, the norm scale, and the packed 2:4 format.

Plain PyTorch on any device, in float64, float32, bfloat16 and float16. This file is the truth that every
kernel is tested against. A *group* is the m entries of the last axis that compete with each other; n of
them are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rtlynx.math.scores import BITS, SCORES, score_named

GroupingKind = Literal["adjacent", "strided"]


@dataclass(frozen=True)
class Pattern:
    """N:M pattern of one linear layer's input: keep `n` of every `m` entries, and which entries compete.

    Parameters
    ----------
    n : int
        1 <= n <= m. n = m keeps everything.
    m : int
        How many compete.
    grouping : "adjacent" | "strided"
        Adjacent: entries m·g ... m·g + m - 1 form group g. Strided: entries g, g + P/m, g + 2P/m, ... of a
        part of P entries form group g of that part.
    parts : int | tuple[int, ...]
        Strided groups never cross a part: a count of equal parts, or the widths of the parts in order.
    score : str
        Which entries of a group are kept: those of highest score (`rtlynx.math.scores`).

    Raises
    ------
    ValueError
        If n, m, grouping or parts make no pattern, or there is no such score.
    """

    n: int = 2
    m: int = 4
    grouping: GroupingKind = "adjacent"
    parts: int | tuple[int, ...] = 1
    score: str = "magnitude"

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int)) or not 1 <= self.n <= self.m:
            raise ValueError(f"n:m needs whole numbers with 1 <= n <= m, got {self.n}:{self.m}")
        if self.grouping not in ("adjacent", "strided"):
            raise ValueError(f"grouping is 'adjacent' or 'strided', got {self.grouping!r}")
        score_named(self.score)
        if isinstance(self.parts, Sequence) and not isinstance(self.parts, tuple):
            object.__setattr__(self, "parts", tuple(self.parts))
        widths = (self.parts,) if isinstance(self.parts, int) else self.parts
        if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(f"parts is a count or a list of widths, all at least 1, got {self.parts!r}")

    def widths(self, k: int) -> tuple[int, ...]:
        """Widths of the parts of an axis of `k` entries; ValueError where the pattern does not fit `k`."""
        if self.grouping == "adjacent":
            if k % self.m:
                raise ValueError(f"{k} entries do not split into groups of {self.m}")
            return (k,)
        if isinstance(self.parts, int):
            if k % (self.parts * self.m):
                raise ValueError(
                    f"{k} entries do not split into {self.parts} part(s) of whole groups of {self.m}"
                )
            return (k // self.parts,) * self.parts
        if sum(self.parts) != k:
            raise ValueError(f"parts {self.parts} add up to {sum(self.parts)}, the axis has {k} entries")
        if any(width % self.m for width in self.parts):
            raise ValueError(f"parts {self.parts} are not all divisible by {self.m}")
        return self.parts

    def misfit(self, k: int) -> str | None:
        """Why the pattern does not fit an axis of `k` entries, or None where it does."""
        try:
            self.widths(k)
        except ValueError as error:
            return str(error)
        return None


def _lanes(x: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """`x` (..., K) as m tensors (..., K/m): entry i of every group, for i in 0 ... m - 1."""
    widths = pattern.widths(x.shape[-1])
    if pattern.grouping == "adjacent":
        return x.unflatten(-1, (-1, pattern.m)).unbind(-1)
    by_part = [part.unflatten(-1, (pattern.m, -1)).unbind(-2) for part in x.split(widths, dim=-1)]
    if len(by_part) == 1:
        return by_part[0]
    return tuple(torch.cat(lane, dim=-1) for lane in zip(*by_part, strict=True))


def _join(lanes: Sequence[Tensor], pattern: Pattern) -> Tensor:
    """Inverse of `_lanes`: m tensors (..., K/m) -> (..., K)."""
    if pattern.grouping == "adjacent":
        return torch.stack(tuple(lanes), dim=-1).flatten(-2)
    widths = pattern.widths(lanes[0].shape[-1] * pattern.m)
    by_lane = [lane.split([width // pattern.m for width in widths], dim=-1) for lane in lanes]
    return torch.cat([piece for part in zip(*by_lane, strict=True) for piece in part], dim=-1)


def to_groups(x: Tensor, pattern: Pattern) -> Tensor:
    """`x` (..., K) as (..., K/m, m): the last axis holds one group, in natural order."""
    return torch.stack(_lanes(x, pattern), dim=-1)


def from_groups(groups: Tensor, pattern: Pattern) -> Tensor:
    """Inverse of `to_groups`: (..., K/m, m) -> (..., K)."""
    return _join(groups.unbind(-1), pattern)


def _keep_two_of_four(key: Sequence[Tensor]) -> list[Tensor]:
    """Four keys of a group -> four bools, the two largest. Six comparisons; who beats two others is kept."""
    k0, k1, k2, k3 = key
    b01, b02, b03 = k0 >= k1, k0 >= k2, k0 >= k3  # ties go to the lower index
    b12, b13, b23 = k1 >= k2, k1 >= k3, k2 >= k3
    b10, b20, b30, b21, b31, b32 = ~b01, ~b02, ~b03, ~b12, ~b13, ~b23
    return [
        (a & b) | (c & (a | b))
        for a, b, c in ((b01, b02, b03), (b10, b12, b13), (b20, b21, b23), (b30, b31, b32))
    ]


def pattern_mask(x: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask (..., K) of the entries of `x` (..., K) that `pattern` keeps; see `nm_mask`."""
    if pattern.n == pattern.m:
        pattern.widths(x.shape[-1])
        return torch.ones_like(x, dtype=torch.bool)
    lanes = _lanes(SCORES[pattern.score].key(x.detach()), pattern)
    if (pattern.n, pattern.m) == (2, 4):
        return _join(_keep_two_of_four(lanes), pattern)
    key = torch.stack(lanes, dim=-1)
    order = key.sort(dim=-1, descending=True, stable=True).indices  # stable: ties to the lower index
    kept = torch.zeros_like(key, dtype=torch.bool).scatter_(-1, order[..., : pattern.n], True)
    return from_groups(kept, pattern)


def nm_mask(
    x: Tensor,
    n: int = 2,
    m: int = 4,
    grouping: GroupingKind = "adjacent",
    parts: int | tuple[int, ...] = 1,
) -> Tensor:
    """Mask of the `n` entries of largest magnitude in every group of `m` (RT-Lynx, selection S).

    Parameters
    ----------
    x : Tensor (..., K), float64 | float32 | bfloat16 | float16
    n : int
        How many of every m are kept.
    m : int
        How many compete.
    grouping : "adjacent" | "strided"
        Which of them, as in `Pattern`.
    parts : int | tuple[int, ...]
        As in `Pattern`.

    Returns
    -------
    Tensor (..., K), bool
        Exactly n true entries in every group. Magnitudes are compared as integers: -0.0 equals 0, subnormals
        count, Inf beats every finite entry and NaN beats Inf, so a group with a non-finite entry keeps one.
        Ties go to the lower index.

    Raises
    ------
    ValueError
        If n > m, n < 1, or K does not split into groups.
    TypeError
        If `x` is not of a listed dtype.
    """
    return pattern_mask(x, Pattern(n, m, grouping, parts))


def select(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask`, else +0; differentiable in `x`, and free of NaN from 0 · Inf."""
    if torch.is_grad_enabled() and x.requires_grad:
        return torch.where(mask, x, x.new_zeros(()))
    integer, _ = BITS[x.dtype]
    return (x.view(integer) * mask.to(integer)).view(x.dtype)  # the same bits, on a CPU 5x as fast as where


def norm_scale(x: Tensor, mask: Tensor, *, paper_epsilon: bool = False) -> Tensor:
    """Per-token scale that restores the norm which selection removed (RT-Lynx, norm compensation).

    s = ||x|| / ||x kept||, computed in float32 on the row divided by its largest magnitude, so that it is
    exact from 1e-30 to 1e30.

    Parameters
    ----------
    x : Tensor (..., K)
    mask : Tensor (..., K), bool
    paper_epsilon : bool
        The formula as printed, s = sqrt(sum x² / (sum kept² + 1e-8)): wrong below about 1e-3, 0 for a token
        of zeros, not finite above about 1e19.

    Returns
    -------
    Tensor (..., 1), float32
        1 for a token of zeros and for a token with a non-finite entry (its norm is not defined; the entry
        itself is kept). Differentiable in `x`.
    """
    x32 = x.float()
    if paper_epsilon:
        total = x32.square().sum(-1, keepdim=True)
        return (total / (select(x32, mask).square().sum(-1, keepdim=True) + 1e-8)).sqrt()
    if x32.shape[-1] == 0:
        return x32.new_ones((*x32.shape[:-1], 1))
    largest = x32.detach().abs().amax(-1, keepdim=True)
    usable = (largest > 0) & torch.isfinite(largest)
    one = torch.ones_like(largest)
    squares = (x32 / torch.where(usable, largest, one)).square()
    total = squares.sum(-1, keepdim=True)
    kept = select(squares, mask).sum(-1, keepdim=True)
    # Both operands are replaced before the root, so that no gradient is NaN where s is 1 by definition.
    return (torch.where(usable, total, one) / torch.where(usable, kept, one)).sqrt()


class Packed(NamedTuple):
    """A 2:4-sparse tensor in packed form.

    values : (..., K/2), the kept entries, group by group, in index order.
    metadata : (..., ceil(K/8)) uint8, one nibble `i0 | i1 << 2` with i0 < i1 a group (PTX ISA,
        wgmma.mma_async.sp), the lower nibble first; an odd last nibble is 4, a legal one.
    pattern : Pattern
    """

    values: Tensor
    metadata: Tensor
    pattern: Pattern


def pack(
    x: Tensor,
    grouping: GroupingKind = "adjacent",
    parts: int | tuple[int, ...] = 1,
    score: str = "magnitude",
) -> Packed:
    """Select 2 of 4 and pack: kept values and 2-bit indices, legal for Hopper's sparse tensor cores.

    Parameters
    ----------
    x : Tensor (..., K), float64 | float32 | bfloat16 | float16
    grouping, parts, score
        See `Pattern`.

    Returns
    -------
    Packed
        Two distinct indices in order for every group, also where it has fewer than two non-zeros.

    Raises
    ------
    ValueError
        If K does not split into groups of 4.
    """
    pattern = Pattern(2, 4, grouping, parts, score)
    kept = to_groups(pattern_mask(x, pattern), pattern)
    position = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2]  # (..., K/4, 2)
    # NOTE: values move as integers: torch's own copies of bfloat16 do not keep the payload of a NaN.
    groups = to_groups(x.detach().view(BITS[x.dtype][0]), pattern)
    values = groups.gather(-1, position).flatten(-2).view(x.dtype)
    nibbles = (position[..., 0] | position[..., 1] << 2).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=0x4)
    low, high = nibbles.unflatten(-1, (-1, 2)).unbind(-1)
    return Packed(values, low | high << 4, pattern)


def unpack(packed: Packed) -> Tensor:
    """Inverse of `pack`: the dense (..., K) tensor with zeros where entries were dropped, bit for bit.

    Raises
    ------
    ValueError
        If the metadata holds an index pair that Hopper leaves undefined, or does not fit the values.
    """
    values, metadata, pattern = packed
    groups = values.shape[-1] // 2
    if values.shape[-1] % 2 or metadata.shape != (*values.shape[:-1], (groups + 1) // 2):
        raise ValueError(
            f"metadata of shape {tuple(metadata.shape)} does not describe kept values of shape "
            f"{tuple(values.shape)}"
        )
    nibbles = torch.stack((metadata & 0xF, metadata >> 4), dim=-1).flatten(-2)[..., :groups].long()
    first, second = nibbles & 3, nibbles >> 2
    if bool((first >= second).any()):
        raise ValueError("metadata holds an illegal index pair (the two indices must differ and be in order)")
    bits = values.view(BITS[values.dtype][0])
    dense = bits.new_zeros((*values.shape[:-1], groups, 4))
    dense.scatter_(-1, torch.stack((first, second), dim=-1), bits.unflatten(-1, (-1, 2)))
    return from_groups(dense, pattern).view(values.dtype)

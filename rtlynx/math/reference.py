"""The two operations of a sparse linear layer in plain PyTorch: differentiable, on any device and dtype.

The split is the one the Hopper kernels use: one pass over X yields everything about X (kept entries, norm
scale), one matrix product consumes it together with the low-rank branch and the bias.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rtlynx.math.selection import Pattern, norm_scale, pattern_mask, select

Norm = Literal["none", "scale", "paper"]


class Compressed(NamedTuple):
    """An input after selection.

    kept : (..., K) in the input's dtype, zeros where entries were dropped.
    scale : (..., 1) float32 norm scale s, or None for s = 1.
    """

    kept: Tensor
    scale: Tensor | None

    def rows(self, rows: slice) -> Compressed:
        """The tokens `rows` of the token axis (-2)."""
        return Compressed(self.kept[..., rows, :], None if self.scale is None else self.scale[..., rows, :])


def compress(x: Tensor, pattern: Pattern, norm: Norm) -> Compressed:
    """Select the entries of `x` (..., K) that `pattern` keeps and, unless `norm` is "none", their scale s."""
    mask = pattern_mask(x, pattern)
    if pattern.n == pattern.m:
        norm = "none"  # nothing was removed
    scale = None if norm == "none" else norm_scale(x, mask, paper_epsilon=norm == "paper")
    return Compressed(select(x, mask), scale)


def sparse_linear(
    compressed: Compressed,
    weight: Tensor,
    bias: Tensor | None,
    lowrank: Tensor | None = None,
    lowrank_b: Tensor | None = None,
) -> Tensor:
    """Y = s ⊙ (X~ W'^T) + T B^T + b (RT-Lynx, equation of the compensated layer).

    Parameters
    ----------
    compressed : Compressed
        X~ (..., K) and s (..., 1).
    weight : Tensor (N, K)
    bias : Tensor (N,) or None
    lowrank : Tensor (..., r) or None
        T = X A, from the *dense* input.
    lowrank_b : Tensor (N, r) or None
        B.

    Returns
    -------
    Tensor (..., N) in the dtype of X~; terms are added in float32 where s or T is used.
    """
    kept, scale = compressed
    if scale is None and lowrank is None:
        return linear(kept, weight, bias)
    y = linear(kept, weight)
    out_dtype = y.dtype
    if out_dtype in (torch.bfloat16, torch.float16):
        y = y.float()
    if scale is not None:
        y = y * scale
    if lowrank is not None and lowrank_b is not None:
        y = y + linear(lowrank, lowrank_b)
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


def product_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T (..., N) in float32, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.float(), weight.float())

"""Streaming moments of one layer input, before and after selection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from rtlynx.calibration.processes import distributed
from rtlynx.math.tf32 import products_in_tf32, rounded_to_tf32

# Whose numbers are ones of TF32 (8 bits of exponent, 10 of mantissa), and deviations from a mean nearly so.
_IN_TF32 = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Moments:
    """C = X^T X, F = S^T X and G = S^T S per token, S being what the sparse product sees, in float64.

    Beside them the means of X and of S, for intercepts. Every layer error and every closed form of
    `rtlynx.calibration.solve` follows from these.
    """

    dense: Tensor  # C (K, K)
    cross: Tensor  # F (K, K)
    kept: Tensor  # G (K, K)
    dense_mean: Tensor  # (K,)
    kept_mean: Tensor  # (K,)

    def centred(self) -> Moments:
        """The moments of X and S less their means: what a layer sees whose intercept absorbs the means."""
        means = (torch.zeros_like(mean) for mean in (self.dense_mean, self.kept_mean))
        result = Moments(self.dense.clone(), self.cross.clone(), self.kept.clone(), *means)
        result.add_outer(self.dense_mean, self.kept_mean, -1.0)
        return result

    def add_outer(self, x: Tensor, s: Tensor, weight: float) -> None:
        """Add `weight` times the outer products of `x` (K,) and `s` (K,) to the matrices."""
        _add_outer(self.dense, x, x, weight)
        _add_outer(self.cross, s, x, weight)
        _add_outer(self.kept, s, s, weight)

    def mean_error(
        self,
        original: Tensor,
        weight: Tensor,
        lowrank_a: Tensor | None = None,
        lowrank_b: Tensor | None = None,
    ) -> Tensor:
        """Mean (N,) of S W'^T + X A B^T - X W^T over the tokens seen; W is `original`, W' is `weight`."""
        error = weight.to(self.dense) @ self.kept_mean - original.to(self.dense) @ self.dense_mean
        if lowrank_a is not None and lowrank_b is not None:
            error += lowrank_b.to(self.dense) @ (lowrank_a.to(self.dense) @ self.dense_mean)
        return error


class RunningMoments:
    """Means of X and of each S over the tokens seen so far, and scatter about these: what gives `Moments`.

    Scatter is the sum over tokens of (x - mean)(x - mean)^T. Sums of raw products would lose it in float32
    where a mean outweighs its deviation a hundred times, as in attention outputs and massive activations.

    Parameters
    ----------
    k : int
        Width of the input.
    ways : int
        How many S there are of one X: products in other formats see other things of it.
    device, dtype
        Of the scatter; float32 or better. Means are in float64.
    """

    def __init__(
        self,
        k: int,
        ways: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"moments are summed in float32 or float64, got {dtype}")
        self.count = 0
        like = torch.zeros(0, device=device, dtype=dtype)
        self.dense = like.new_zeros(k, k)  # of X; what is symmetric lacks what `_mirror` fills in
        self.cross = [like.new_zeros(k, k) for _ in range(ways)]  # of S and X
        self.kept = [like.new_zeros(k, k) for _ in range(ways)]  # of S
        self.dense_mean = like.new_zeros(k, dtype=torch.float64)
        self.kept_mean = [torch.zeros_like(self.dense_mean) for _ in range(ways)]

    @staticmethod
    def bytes_for(k: int, ways: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Memory of the scatter for an input of width `k`."""
        return (1 + 2 * ways) * k * k * dtype.itemsize

    def add(self, x: Tensor, *seen: Tensor) -> None:
        """Add tokens: `x` (..., K) dense and of each way `s` (..., K), s ⊙ X~ as the sparse product sees it.

        They are merged as Chan, Golub and LeVeque do: scatter of each part about its own mean, and that of
        the two means. On a card, tokens in 16 bits are multiplied in TF32, several times as fast as float32;
        deviations are rounded to it first, so that all scatters are of the same numbers.

        Raises
        ------
        ValueError
            If a token is not finite; nothing has changed then.
        """
        x, *others = (tokens.detach().reshape(-1, tokens.shape[-1]) for tokens in (x, *seen))
        count = len(x)
        if not count:
            return
        means = [tokens.mean(0, dtype=torch.float64) for tokens in (x, *others)]
        if not bool(torch.isfinite(torch.stack(means)).all()):  # a mean is finite where all its tokens are
            raise ValueError("calibration data holds NaN or Inf")
        in_tf32 = x.is_cuda and x.dtype in _IN_TF32 and self.dense.dtype is torch.float32

        def deviations(tokens: Tensor, mean: Tensor) -> Tensor:
            off = (tokens - mean.to(self.dense)).to(self.dense)
            return rounded_to_tf32(off) if in_tf32 else off

        total, x_off = self.count + count, means[0] - self.dense_mean
        merged = self.count * count / total
        x = deviations(x, means[0])
        with products_in_tf32(in_tf32):
            _add_square(self.dense, x)
            for way, (tokens, mean) in enumerate(zip(others, means[1:], strict=True)):
                s, s_off = deviations(tokens, mean), mean - self.kept_mean[way]
                self.cross[way].addmm_(s.T, x)
                _add_square(self.kept[way], s)
                self._add_outer(way, x_off, s_off, merged)
                self.kept_mean[way] += s_off * (count / total)
        _add_outer(self.dense, x_off, x_off, merged)
        self.dense_mean += x_off * (count / total)
        self.count = total

    def _add_outer(self, way: int, x: Tensor, s: Tensor, weight: float) -> None:
        _add_outer(self.cross[way], s, x, weight)
        _add_outer(self.kept[way], s, s, weight)

    def all_reduce(self) -> None:
        """Merge over the processes of the default group; nothing to do in a single process."""
        if not distributed():
            return
        count = torch.tensor(self.count, device=self.dense.device)
        means = torch.stack((self.dense_mean, *self.kept_mean)) * self.count
        for total in (count, means):
            dist.all_reduce(total)
        x_mean, *s_means = means / count.clamp(min=1)
        x_off = self.dense_mean - x_mean
        _add_outer(self.dense, x_off, x_off, self.count)
        for way, s_mean in enumerate(s_means):
            self._add_outer(way, x_off, self.kept_mean[way] - s_mean, self.count)
        for matrix in (self.dense, *self.cross, *self.kept):
            dist.all_reduce(matrix)
        self.count, self.dense_mean, self.kept_mean = int(count), x_mean, s_means

    def mean(self) -> Moments:
        """The moments per token, of the first way."""
        return balanced([self], "tokens")


# Columns of a symmetric matrix in this many blocks: those left of the diagonal's are mirrored at the end.
_BLOCKS = 4
_WIDE = 4096  # from where that pays


def _blocks(k: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the products that give X^T X (K, K), but for what is left of their blocks."""
    if k < _WIDE:
        return [(slice(0, k), slice(0, k))]
    edges = [i * k // _BLOCKS for i in range(_BLOCKS + 1)]
    return [(slice(start, stop), slice(start, k)) for start, stop in pairwise(edges)]


def _add_square(matrix: Tensor, x: Tensor) -> None:
    for rows, columns in _blocks(x.shape[1]):
        matrix[rows, columns].addmm_(x[:, rows].T, x[:, columns])


def _mirror(matrix: Tensor) -> None:
    """Fill what `_add_square` left out."""
    for rows, columns in _blocks(len(matrix)):
        later = slice(rows.stop, columns.stop)
        matrix[later, rows] = matrix[rows, later].T


def _add_outer(matrix: Tensor, x: Tensor, s: Tensor, weight: float) -> None:
    if weight:
        matrix.addr_(x.to(matrix), s.to(matrix), alpha=weight)


def balanced(kinds: Iterable[RunningMoments], balance: str, way: int = 0) -> Moments:
    """Moments of several kinds of tokens as one.

    "kinds" gives each kind the same weight, "tokens" each token: text tokens are few, and each matters.
    `way` says what of X products see.
    """
    seen = [moments for moments in kinds if moments.count]
    if not seen:
        raise ValueError("no tokens were seen")
    total = sum(moments.count for moments in seen)
    k, device = len(seen[0].dense), seen[0].dense.device
    zeros = partial(torch.zeros, dtype=torch.float64, device=device)
    result = Moments(zeros(k, k), zeros(k, k), zeros(k, k), zeros(k), zeros(k))
    for moments in seen:
        weight = moments.count / total if balance == "tokens" else 1 / len(seen)
        scatters = (moments.dense, moments.cross[way], moments.kept[way])
        for matrix, scatter in zip((result.dense, result.cross, result.kept), scatters, strict=True):
            matrix.add_(scatter, alpha=weight / moments.count)
        x_mean, s_mean = moments.dense_mean, moments.kept_mean[way]
        result.add_outer(x_mean, s_mean, weight)
        result.dense_mean.add_(x_mean, alpha=weight)
        result.kept_mean.add_(s_mean, alpha=weight)
    _mirror(result.dense)
    _mirror(result.kept)
    return result

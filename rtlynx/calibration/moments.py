"""Streaming moments of one layer input, before and after selection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rtlynx.calibration.processes import distributed
from rtlynx.math.tf32 import products_in_tf32

# Whose numbers are ones of TF32 (8 bits of exponent, 10 of mantissa), and deviations from a mean nearly so.
_IN_TF32 = (torch.bfloat16, torch.float16)
_MATRICES = ("dense", "cross", "kept")


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
        _add_outer(result, self.dense_mean, self.kept_mean, -1.0)
        return result

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
    """Means of X and S over the tokens seen so far, and their scatter about these: what gives `Moments`.

    Scatter is the sum over tokens of (x - mean)(x - mean)^T. Sums of raw products would lose it in float32
    where a mean outweighs its deviation a hundred times, as in attention outputs and massive activations.

    Parameters
    ----------
    k : int
        Width of the input.
    device, dtype
        Of the scatter; float32 or better. Means are in float64.
    """

    def __init__(
        self, k: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"moments are summed in float32 or float64, got {dtype}")
        self.count = 0
        self.dense = torch.zeros(k, k, device=device, dtype=dtype)  # of X
        self.cross = torch.zeros(k, k, device=device, dtype=dtype)  # of S and X
        self.kept = torch.zeros(k, k, device=device, dtype=dtype)  # of S
        self.dense_mean = torch.zeros(k, device=device, dtype=torch.float64)
        self.kept_mean = torch.zeros(k, device=device, dtype=torch.float64)

    @staticmethod
    def bytes_for(k: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory of the scatter for an input of width `k`."""
        return 3 * k * k * dtype.itemsize

    def add(self, x: Tensor, s: Tensor) -> None:
        """Add tokens: `x` (..., K) dense and `s` (..., K), s ⊙ X~ as the sparse product sees it.

        They are merged as Chan, Golub and LeVeque do: scatter of each part about its own mean, and that of
        the two means. On a card, tokens in 16 bits are multiplied in TF32, several times as fast as float32;
        deviations are rounded to it first, so that all scatters are of the same numbers.

        Raises
        ------
        ValueError
            If a token is not finite; nothing has changed then.
        """
        x, s = (tokens.detach().reshape(-1, tokens.shape[-1]) for tokens in (x, s))
        count = len(x)
        if not count:
            return
        x_mean, s_mean = (tokens.mean(0, dtype=torch.float64) for tokens in (x, s))
        if not bool(torch.isfinite(x_mean + s_mean).all()):  # a mean is finite where all its tokens are
            raise ValueError("calibration data holds NaN or Inf")
        in_tf32 = x.is_cuda and x.dtype in _IN_TF32 and self.dense.dtype is torch.float32
        x, s = ((t - mean.to(self.dense)).to(self.dense) for t, mean in ((x, x_mean), (s, s_mean)))
        if in_tf32:
            x, s = rounded_to_tf32(x), rounded_to_tf32(s)
        with products_in_tf32(in_tf32):
            self.dense.addmm_(x.T, x)
            self.cross.addmm_(s.T, x)
            self.kept.addmm_(s.T, s)
        total = self.count + count
        x_off, s_off = x_mean - self.dense_mean, s_mean - self.kept_mean
        _add_outer(self, x_off, s_off, self.count * count / total)
        self.dense_mean += x_off * (count / total)
        self.kept_mean += s_off * (count / total)
        self.count = total

    def all_reduce(self) -> None:
        """Merge over the processes of the default group; nothing to do in a single process."""
        if not distributed():
            return
        count = torch.tensor(self.count, device=self.dense.device)
        means = torch.stack((self.dense_mean, self.kept_mean)) * self.count
        for total in (count, means):
            dist.all_reduce(total)
        x_mean, s_mean = means / count.clamp(min=1)
        _add_outer(self, self.dense_mean - x_mean, self.kept_mean - s_mean, self.count)
        for name in _MATRICES:
            dist.all_reduce(getattr(self, name))
        self.count, self.dense_mean, self.kept_mean = int(count), x_mean, s_mean

    def mean(self) -> Moments:
        """The moments per token."""
        return balanced([self], "tokens")


def _add_outer(of: Moments | RunningMoments, x: Tensor, s: Tensor, weight: float) -> None:
    """Add `weight` times the outer products of `x` (K,) and `s` (K,) to the matrices."""
    for matrix, left, right in ((of.dense, x, x), (of.cross, s, x), (of.kept, s, s)):
        matrix.addr_(left.to(matrix), right.to(matrix), alpha=weight)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """`x` float32 rounded to the nearest number of TF32, ties away from zero; NaN and Inf stay."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32), x)


def balanced(kinds: Iterable[RunningMoments], balance: str) -> Moments:
    """Moments of several kinds of tokens as one.

    "kinds" gives each kind the same weight, "tokens" each token: text tokens are few, and each matters.
    """
    seen = [moments for moments in kinds if moments.count]
    if not seen:
        raise ValueError("no tokens were seen")
    total = sum(moments.count for moments in seen)
    names = (*_MATRICES, "dense_mean", "kept_mean")
    result = Moments(*(torch.zeros_like(getattr(seen[0], name), dtype=torch.float64) for name in names))
    for moments in seen:
        weight = moments.count / total if balance == "tokens" else 1 / len(seen)
        for name in _MATRICES:
            getattr(result, name).add_(getattr(moments, name), alpha=weight / moments.count)
        _add_outer(result, moments.dense_mean, moments.kept_mean, weight)
        result.dense_mean.add_(moments.dense_mean, alpha=weight)
        result.kept_mean.add_(moments.kept_mean, alpha=weight)
    return result

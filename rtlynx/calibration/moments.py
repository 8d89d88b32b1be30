"""Streaming moments of one layer input, before and after selection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from rtlynx.calibration.processes import distributed

# Of which every number is one of TF32: 8 bits of exponent, 10 of mantissa.
_IN_TF32 = (torch.bfloat16, torch.float16)
_SUMS = ("dense", "cross", "kept", "dense_sum", "kept_sum")


class Moments:
    """C = X^T X, F = S^T X and G = S^T S over all tokens seen, S being what the sparse product sees.

    Beside them the sums of X and of S, for intercepts. All are sums, so they add up over batches, prompts,
    timesteps and processes. Every layer error and every closed form of `rtlynx.calibration.solve` follows
    from them.

    Parameters
    ----------
    k : int
        Width of the input.
    device, dtype
        Of the sums; float32 or better.
    """

    def __init__(
        self, k: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"moments are summed in float32 or float64, got {dtype}")
        self.count = 0
        self.dense = torch.zeros(k, k, device=device, dtype=dtype)  # C
        self.cross = torch.zeros(k, k, device=device, dtype=dtype)  # F
        self.kept = torch.zeros(k, k, device=device, dtype=dtype)  # G
        self.dense_sum = torch.zeros(k, device=device, dtype=dtype)
        self.kept_sum = torch.zeros(k, device=device, dtype=dtype)

    @staticmethod
    def bytes_for(k: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory of the sums for an input of width `k`."""
        return 3 * k * k * dtype.itemsize

    def add(self, x: Tensor, s: Tensor) -> None:
        """Add tokens: `x` (..., K) dense and `s` (..., K), s ⊙ X~ as the sparse product sees it.

        Means of these tokens are taken away before the products and added after them: tensor cores truncate
        what they add up, and a mean that outweighs its variance would drown it. On a card, tokens in 16 bits
        are multiplied in TF32, several times as fast as float32; they are rounded to it first, so that all
        sums are of the same numbers.

        Raises
        ------
        ValueError
            If a token is not finite; the sums are then unchanged.
        """
        in_tf32 = x.is_cuda and x.dtype in _IN_TF32 and self.dense.dtype is torch.float32
        x = x.detach().reshape(-1, x.shape[-1]).to(self.dense)
        s = s.detach().reshape(-1, s.shape[-1]).to(self.dense)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("calibration data holds NaN or Inf")
        count = len(x)
        if not count:
            return
        (x, x_mean), (s, s_mean) = (_apart(tokens, in_tf32) for tokens in (x, s))
        with _products_in_tf32(in_tf32):
            self.dense.addmm_(x.T, x)
            self.cross.addmm_(s.T, x)
            self.kept.addmm_(s.T, s)
        self.dense.addr_(x_mean, x_mean, alpha=count)
        self.cross.addr_(s_mean, x_mean, alpha=count)
        self.kept.addr_(s_mean, s_mean, alpha=count)
        self.dense_sum += count * x_mean
        self.kept_sum += count * s_mean
        self.count += count

    def all_reduce(self) -> None:
        """Sum over the processes of the default group; nothing to do in a single process."""
        if not distributed():
            return
        count = torch.tensor(self.count, device=self.dense.device)
        for total in (count, *(getattr(self, name) for name in _SUMS)):
            dist.all_reduce(total)
        self.count = int(count)

    def mean(self) -> Moments:
        """The moments per token, in float64."""
        return _weighted([self], [1.0])

    def centred(self) -> Moments:
        """The moments of X and S less their means: what a layer sees whose intercept absorbs the means."""
        count = max(self.count, 1)
        result = Moments(0, device=self.dense.device, dtype=self.dense.dtype)
        result.count = self.count
        result.dense = self.dense - torch.outer(self.dense_sum, self.dense_sum) / count
        result.cross = self.cross - torch.outer(self.kept_sum, self.dense_sum) / count
        result.kept = self.kept - torch.outer(self.kept_sum, self.kept_sum) / count
        result.dense_sum, result.kept_sum = (torch.zeros_like(t) for t in (self.dense_sum, self.kept_sum))
        return result

    def mean_error(
        self,
        original: Tensor,
        weight: Tensor,
        lowrank_a: Tensor | None = None,
        lowrank_b: Tensor | None = None,
    ) -> Tensor:
        """Mean (N,) of S W'^T + X A B^T - X W^T over the tokens seen; arguments as of `layer_error`."""
        residual = self._residual(original, lowrank_a, lowrank_b)
        total = weight.to(self.dense) @ self.kept_sum + residual @ self.dense_sum
        return total / max(self.count, 1)

    def layer_error(
        self,
        original: Tensor,
        weight: Tensor,
        lowrank_a: Tensor | None = None,
        lowrank_b: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> float:
        """||S W'^T + X A B^T + d - X W^T||² / ||X W^T||² over the tokens seen, 0 without any energy.

        Parameters
        ----------
        original : Tensor (N, K), W
        weight : Tensor (N, K), W'
        lowrank_a : Tensor (r, K), A^T
        lowrank_b : Tensor (N, r), B
        shift : Tensor (N,), d: what is added to the bias
        """
        original, weight = original.to(self.dense), weight.to(self.dense)
        residual = self._residual(original, lowrank_a, lowrank_b)
        energy = left = ((original @ self.dense) * original).sum()
        if lowrank_a is not None and lowrank_b is not None:
            left = ((residual @ self.dense) * residual).sum()
        error = ((weight @ self.kept) * weight).sum() + left + 2 * ((weight @ self.cross) * residual).sum()
        if shift is not None:
            shift = shift.to(self.dense)
            missed = self.mean_error(original, weight, lowrank_a, lowrank_b)
            error = error + self.count * (2 * missed + shift) @ shift
        return float(error.clamp(min=0) / energy) if float(energy) > 0 else 0.0

    def _residual(self, original: Tensor, lowrank_a: Tensor | None, lowrank_b: Tensor | None) -> Tensor:
        """What multiplies the dense X in the error: (A B^T - W^T)^T (N, K)."""
        residual = -original.to(self.dense)
        if lowrank_a is not None and lowrank_b is not None:
            residual = residual + lowrank_b.to(self.dense) @ lowrank_a.to(self.dense)
        return residual


def _apart(tokens: Tensor, in_tf32: bool) -> tuple[Tensor, Tensor]:
    """Tokens (M, K) less their mean, and the mean (K,); what rounding them leaves of a mean goes into it."""
    mean = tokens.mean(0)
    rest = tokens - mean
    if in_tf32:
        rest = rounded_to_tf32(rest)
    return rest, mean + rest.mean(0)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """`x` float32 rounded to the nearest number of TF32, ties away from zero; NaN and Inf stay."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32), x)


@contextmanager
def _products_in_tf32(wanted: bool) -> Iterator[None]:
    """Let products of float32 matrices on a card be those of TF32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if wanted:
        settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        if wanted:
            settings.fp32_precision = before


def balanced(kinds: Iterable[Moments], balance: str) -> Moments:
    """Moments of several kinds of tokens as one, per token, in float64.

    "kinds" gives each kind the same weight, "tokens" each token: text tokens are few, and each matters.
    """
    seen = [moments for moments in kinds if moments.count]
    if not seen:
        raise ValueError("no tokens were seen")
    if balance == "tokens":
        total = sum(moments.count for moments in seen)
        weights = [moments.count / total for moments in seen]
    else:
        weights = [1 / len(seen)] * len(seen)
    return _weighted(seen, weights)


def _weighted(kinds: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Sum of the moments per token of each kind times its weight, in float64."""
    result = Moments(0, device=kinds[0].dense.device, dtype=torch.float64)
    result.count = min(1, sum(moments.count for moments in kinds))
    for name in _SUMS:
        parts = (
            getattr(moments, name).double() * (weight / max(moments.count, 1))
            for weight, moments in zip(weights, kinds, strict=True)
        )
        setattr(result, name, sum(parts))
    return result

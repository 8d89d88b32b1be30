"""Closed forms for the low-rank branch and the refitted weight, from second moments alone.

Notation: X the dense input, S what the sparse product sees of it (selected, in an fp8 layer quantised, with
its norm scale where the recipe has one), W the original weight (N, K); C = X^T X, F = S^T X, G = S^T S.

An intercept is refitted by centring: with the means of X and S taken away the closed forms stay as they are,
and the bias then takes up the mean error that is left. The ridge does not act on it.

In an fp8 layer the refitted weight is quantised, and the low-rank branch solved last, against what the
quantised product leaves: so it repairs the quantisation of weight and input too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.moments import Moments
from rtlynx.calibration.weight_pruning import DAMPING, prune, prune_by
from rtlynx.math.fp8 import dequantize, quantize_weight
from rtlynx.nn.solution import Solution

RIDGES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# Of ridges whose held-out errors are this close to the best, the strongest is taken: pictures prefer it.
RIDGE_TOLERANCE = 0.01
# Added to the diagonal in turn, times its mean, where rounding made moments indefinite.
JITTERS = (0.0, *(10.0**power for power in range(-12, -1)))


def solve_refit(moments: Moments, weight: Tensor, lam: float) -> Tensor:
    """W' (N, K) = argmin ||S W'^T - X W^T||² + lam ||W' - W||²."""
    target = weight.to(moments.kept).T  # W^T (K, N)
    gain = _cholesky(moments.kept, lam)
    return (target + torch.cholesky_solve((moments.cross - moments.kept) @ target, gain)).T


def solve_lowrank(
    moments: Moments, weight: Tensor, rank: int, mu: float, sparse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A^T (r, K), B (N, r) = argmin ||S V^T + X A B^T - X W^T||² + mu ||A B^T||²: reduced-rank regression.

    V is `sparse` (N, K), a weight already settled (quantised, say), or W itself.
    """
    target = weight.to(moments.dense).T
    product = target if sparse is None else sparse.to(moments.dense).T
    return _reduced_rank(moments.dense, moments.dense @ target - moments.cross.T @ product, rank, mu)


def solve_joint(
    moments: Moments, weight: Tensor, rank: int, lam: float, mu: float
) -> tuple[Tensor, Tensor, Tensor]:
    """W', A^T, B = argmin ||S W'^T + X L - X W^T||² + lam ||W' - W||² + mu ||L||² over L = A B^T of rank r.

    Eliminating W' leaves the metric Q = C - F^T (G + lam)^-1 F on L and the linear term
    b = [Q - lam F^T (G + lam)^-1] W^T; the best L is the reduced-rank solution for (Q + mu, b).
    """
    target = weight.to(moments.kept).T
    gain = _cholesky(moments.kept, lam)
    explained = torch.cholesky_solve(moments.cross, gain)  # (G + lam)^-1 F
    metric = moments.dense - moments.cross.T @ explained
    metric = (metric + metric.T) / 2
    lowrank_a, lowrank_b = _reduced_rank(metric, (metric - lam * explained.T) @ target, rank, mu)
    right = (moments.cross - moments.kept) @ target - (moments.cross @ lowrank_a.T) @ lowrank_b.T
    return (target + torch.cholesky_solve(right, gain)).T, lowrank_a, lowrank_b


def solve_layer(
    moments: Moments,
    weight: Tensor,
    *,
    rank: int,
    refit: bool,
    ridge: float | str,
    heldout: Moments | None = None,
    quantised: bool = False,
    bias: Tensor | None = None,
) -> Solution:
    """Solve one layer (or several that share an input, outputs concatenated).

    Parameters
    ----------
    moments, heldout : Moments
        Per token, of the fitting and of the held-out prompts.
    weight : Tensor (N, K)
    rank : int
        0 for no low-rank branch.
    refit : bool
    ridge : float or "auto"
        Relative to the mean diagonal of the moments it regularises. Auto: of `RIDGES`, the strongest whose
        error on `heldout` is within `RIDGE_TOLERANCE` of the best; an empty solution where none does better
        than leaving the layer alone.
    quantised : bool
        Whether the layer is fp8: the moments are then of quantised inputs, and the solution holds an e4m3
        weight and its scale, chosen on them. The ridge is chosen before the weight is quantised.
    bias : Tensor (N,) or None
        The layer's own bias (zeros where it has none) where it is refitted with the weight, else None.

    Raises
    ------
    ValueError
        If ridge is "auto" and there are no held-out moments.
    """
    weight = weight.detach().to(moments.kept)
    bias = None if bias is None else bias.detach().to(moments.kept)
    judge = moments if heldout is None else heldout
    seen = moments if bias is None else moments.centred()

    def solved(value: float) -> Solution:
        lam, mu = (value * _mean_diagonal(matrix) for matrix in (moments.kept, moments.dense))
        found = replace(_solve_at(seen, weight, rank, refit, lam, mu), ridge=value)
        return _with_bias(moments, weight, found, bias)

    if ridge != "auto":
        solution = solved(float(ridge))
    elif not rank and not refit:
        solution = Solution()
    elif heldout is None:
        raise ValueError("ridge='auto' is chosen on held-out prompts, and there are none: give more prompts")
    else:
        tried = [solved(value) for value in RIDGES]
        errors = [_error(heldout, weight, one, bias) for one in tried]
        best = min(errors)
        good = [
            one for one, error in zip(tried, errors, strict=True) if error <= best * (1 + RIDGE_TOLERANCE)
        ]
        before = heldout.layer_error(weight, weight)
        solution = good[-1] if best < before else Solution()  # nothing carries over
    if quantised:
        mu = (solution.ridge or 0.0) * _mean_diagonal(moments.dense)
        # A refitted bias takes up the mean error; without one the scales have to see it.
        solution = _quantised(moments if solution.bias is None else seen, weight, solution, mu)
        solution = solution if solution.bias is None else _with_bias(moments, weight, solution, bias)
    return with_errors(judge, weight, solution, bias)


def solve_pruned(
    moments: Moments,
    weight: Tensor,
    *,
    ridge: float | str,
    heldout: Moments | None = None,
    bias: Tensor | None = None,
) -> Solution:
    """Solve one layer that drops weights (or several that share an input, outputs concatenated).

    With P what `solve_refit` finds, ||S W'^T - X W^T||² + lam ||W' - W||² is (W' - P) (G + lam) (W' - P)^T,
    and what does not depend on W'. So W' is the 2:4-sparse weight that `prune` finds from P, and it makes
    good the quantisation of the input too. Then it is quantised, by the scales of least output error.

    Parameters
    ----------
    moments, heldout : Moments
        Per token, of quantised inputs.
    weight : Tensor (N, K)
        K a multiple of 4.
    ridge : float or "auto"
        Relative to the mean diagonal of G. Auto: `DAMPING`.
    bias : Tensor (N,) or None
        As of `solve_layer`.
    """
    weight = weight.detach().to(moments.kept)
    bias = None if bias is None else bias.detach().to(moments.kept)
    value = DAMPING if isinstance(ridge, str) else float(ridge)
    seen = moments if bias is None else moments.centred()
    lam = value * _mean_diagonal(seen.kept)
    target, raised = solve_refit(seen, weight, lam), seen.kept.clone()
    raised.diagonal().add_(lam)
    values, scale = quantize_weight(prune(target, raised), seen.kept)
    found = Solution(values, weight_scale=scale, weight_sparse=True, refitted=True, ridge=value)
    judge = moments if heldout is None else heldout
    return with_errors(judge, weight, _with_bias(moments, weight, found, bias), bias)


def with_errors(moments: Moments, weight: Tensor, solution: Solution, bias: Tensor | None = None) -> Solution:
    """`solution` with its errors on the tokens of `moments`, for the original `weight` (N, K).

    `bias` (N,) is the original one where the solution has another. Without the solution, a layer that drops
    weights keeps the largest of them.
    """
    before = prune_by(weight, weight.abs()) if solution.weight_sparse else weight
    before = before if solution.weight_scale is None else quantize_weight(before).dequantize()
    return replace(
        solution,
        error_before=moments.layer_error(weight, before),
        error=_error(moments, weight, solution, bias),
    )


def _error(moments: Moments, weight: Tensor, solution: Solution, bias: Tensor | None) -> float:
    new = weight if solution.weight is None else solution.weight
    if solution.weight_scale is not None:
        new = dequantize(new, solution.weight_scale)
    shift = None if solution.bias is None or bias is None else solution.bias - bias.to(solution.bias)
    return moments.layer_error(weight, new, solution.lowrank_a, solution.lowrank_b, shift)


def _solve_at(moments: Moments, weight: Tensor, rank: int, refit: bool, lam: float, mu: float) -> Solution:
    if refit and rank:
        return Solution(*solve_joint(moments, weight, rank, lam, mu))
    if refit:
        return Solution(weight=solve_refit(moments, weight, lam))
    if rank:
        return Solution(None, *solve_lowrank(moments, weight, rank, mu))
    return Solution()


def _with_bias(moments: Moments, weight: Tensor, solution: Solution, bias: Tensor | None) -> Solution:
    """`solution` with the bias that leaves no mean error; as it is where there is no original `bias`."""
    if bias is None or solution.weight is None:
        return solution
    new = solution.weight
    if solution.weight_scale is not None:
        new = dequantize(new, solution.weight_scale)
    missed = moments.mean_error(weight, new, solution.lowrank_a, solution.lowrank_b)
    return replace(solution, bias=bias - missed)


def _quantised(moments: Moments, weight: Tensor, solution: Solution, mu: float) -> Solution:
    """`solution` for an fp8 layer: its weight quantised, and its low-rank branch solved again for that."""
    values, scale = quantize_weight(weight if solution.weight is None else solution.weight, moments.kept)
    result = replace(solution, weight=values, weight_scale=scale, refitted=solution.weight is not None)
    if solution.lowrank_a is None:
        return result
    lowrank_a, lowrank_b = solve_lowrank(
        moments, weight, len(solution.lowrank_a), mu, dequantize(values, scale)
    )
    return replace(result, lowrank_a=lowrank_a, lowrank_b=lowrank_b)


def _reduced_rank(metric: Tensor, linear: Tensor, rank: int, mu: float) -> tuple[Tensor, Tensor]:
    """A^T (r, K), B (N, r) minimising tr(L^T (M + mu) L) - 2 tr(L^T b) over L = A B^T of rank r."""
    factor = _cholesky(metric, mu)
    whitened = torch.linalg.solve_triangular(factor, linear, upper=False)  # (K, N)
    k, n = whitened.shape
    rank = min(rank, k, n)
    if n <= k:
        lowrank_b = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:]
        left = whitened @ lowrank_b
    else:
        left = torch.linalg.eigh(whitened @ whitened.T).eigenvectors[:, -rank:]
        lowrank_b = whitened.T @ left
    lowrank_a = torch.linalg.solve_triangular(factor.T, left, upper=True)
    return lowrank_a.T, lowrank_b


def _mean_diagonal(matrix: Tensor) -> float:
    mean = float(matrix.diagonal().mean())
    return mean if mean > 0 else 1.0  # an input of zeros: any positive ridge gives the zero solution


def _cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of matrix + ridge, with just enough jitter where rounding made it indefinite."""
    mean = _mean_diagonal(matrix)
    for jitter in JITTERS:
        raised = matrix.clone()  # at 15,360 inputs an identity matrix beside it would take 1.9 GB more
        raised.diagonal().add_(ridge + jitter * mean)
        factor, info = torch.linalg.cholesky_ex(raised)
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            return factor
    if not bool(matrix.isfinite().all()):
        raise CalibrationError("the calibration moments are not finite")
    short = ridge / mean + JITTERS[-1]
    raise CalibrationError(
        f"the calibration moments are indefinite by more than {short:.2g} of their mean diagonal"
    )

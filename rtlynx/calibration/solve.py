"""Closed forms for the low-rank branch and the refitted weight, from second moments alone.

Notation: X the dense input, S what the sparse product sees of it (selected, in an fp8 layer quantised, with
its norm scale where the recipe has one), W the original weight (N, K); C = X^T X, F = S^T X, G = S^T S.

An intercept is refitted by centring: with the means of X and S taken away the closed forms stay as they are,
and the bias then takes up the mean error that is left. The ridge does not act on it.

In an fp8 layer the refitted weight is quantised, and the low-rank branch solved last, against what the
quantised product leaves: so it repairs the quantisation of weight and input too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.layer_errors import LayerErrors
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
    return _refit_by(_factored(moments.kept, lam)[1], moments, weight)


def _refit_by(factor: Tensor, moments: Moments, weight: Tensor) -> Tensor:
    """`solve_refit` with the Cholesky factor of G + lam."""
    target = weight.to(moments.kept).T  # W^T (K, N)
    return (target + torch.cholesky_solve((moments.cross - moments.kept) @ target, factor)).T


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
    _, gain = _factored(moments.kept, lam)
    explained = torch.cholesky_solve(moments.cross, gain)  # (G + lam)^-1 F
    metric = moments.dense - moments.cross.T @ explained
    metric = (metric + metric.T) / 2
    lowrank_a, lowrank_b = _reduced_rank(metric, (metric - lam * explained.T) @ target, rank, mu)
    right = (moments.cross - moments.kept) @ target - (moments.cross @ lowrank_a.T) @ lowrank_b.T
    return (target + torch.cholesky_solve(right, gain)).T, lowrank_a, lowrank_b


def solve_layers(
    moments: Moments,
    weights: Sequence[Tensor],
    *,
    rank: int,
    refit: bool,
    ridge: float | str,
    heldout: Moments | None = None,
    quantised: bool = False,
    biases: Sequence[Tensor] | None = None,
) -> list[Solution]:
    """Solve layers that share an input as one of concatenated outputs: with one A and one ridge.

    Parameters
    ----------
    moments, heldout : Moments
        Per token, of the fitting and of the held-out prompts.
    weights : sequence of Tensor (N, K)
    rank : int
        0 for no low-rank branch.
    refit : bool
    ridge : float or "auto"
        Relative to the mean diagonal of the moments it regularises. Auto: of `RIDGES`, the strongest whose
        error on `heldout` is within `RIDGE_TOLERANCE` of the best; an empty solution where none does better
        than leaving the layers alone.
    quantised : bool
        Whether the layers are fp8: the moments are then of quantised inputs, and the solution holds an e4m3
        weight and its scale, chosen on them. The ridge is chosen before the weight is quantised.
    biases : sequence of Tensor (N,), optional
        The layers' own (zeros where they have none) where they are refitted with the weights.

    Raises
    ------
    ValueError
        If ridge is "auto" and there are no held-out moments.
    """
    weight = _joined(weights, moments)
    bias = None if biases is None else _joined(biases, moments)
    errors = LayerErrors(moments if heldout is None else heldout, weight)
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
        found = [errors.relative(_errors_of(errors, one, bias)) for one in tried]
        best = min(found)
        good = [one for one, error in zip(tried, found, strict=True) if error <= best * (1 + RIDGE_TOLERANCE)]
        before = errors.relative(errors.of(weight))
        solution = good[-1] if best < before else Solution()  # nothing carries over
    if quantised:
        mu = (solution.ridge or 0.0) * _mean_diagonal(moments.dense)
        # A refitted bias takes up the mean error; without one the scales have to see it.
        solution = _quantised(moments if solution.bias is None else seen, weight, solution, mu)
        solution = solution if solution.bias is None else _with_bias(moments, weight, solution, bias)
    return with_errors(errors, solution, bias, [len(one) for one in weights])


def solve_pruned(
    moments: Moments,
    weights: Sequence[Tensor],
    *,
    ridge: float | str,
    heldout: Moments | None = None,
    biases: Sequence[Tensor] | None = None,
) -> list[Solution]:
    """Solve layers that drop weights and share an input.

    With P what `solve_refit` finds, ||S W'^T - X W^T||² + lam ||W' - W||² is (W' - P) (G + lam) (W' - P)^T,
    and what does not depend on W'. So W' is the 2:4-sparse weight that `prune` finds from P, and it makes
    good the quantisation of the input too. Then it is quantised, by the scales of least output error.

    Parameters
    ----------
    moments, heldout : Moments
        Per token, of quantised inputs.
    weights : sequence of Tensor (N, K)
        K a multiple of 4.
    ridge : float or "auto"
        Relative to the mean diagonal of G. Auto: `DAMPING`.
    biases : sequence of Tensor (N,), optional
        As of `solve_layers`.
    """
    weight = _joined(weights, moments)
    bias = None if biases is None else _joined(biases, moments)
    value = DAMPING if isinstance(ridge, str) else float(ridge)
    seen = moments if bias is None else moments.centred()
    raised, factor = _factored(seen.kept, value * _mean_diagonal(seen.kept))
    target, gram = _refit_by(factor, seen, weight), seen.kept
    del seen, factor  # at 15,360 inputs 1.9 GB a matrix
    values, scale = quantize_weight(prune(target, raised), gram)
    del raised, gram
    found = Solution(values, weight_scale=scale, weight_sparse=True, refitted=True, ridge=value)
    errors = LayerErrors(moments if heldout is None else heldout, weight)
    return with_errors(errors, _with_bias(moments, weight, found, bias), bias, [len(one) for one in weights])


def with_errors(
    errors: LayerErrors, solution: Solution, bias: Tensor | None, sizes: Sequence[int]
) -> list[Solution]:
    """`solution` split into layers of `sizes` outputs, each with its errors.

    `bias` (N,) is the original one where the solution has another. Without the solution, a layer that drops
    weights keeps the largest of them.
    """
    weight = errors.weight
    plain = prune_by(weight, weight.abs()) if solution.weight_sparse else weight
    plain = plain if solution.weight_scale is None else quantize_weight(plain).dequantize()
    before, after = errors.of(plain), _errors_of(errors, solution, bias)
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        own = solution.rows(start, start + size)
        own = replace(own, error_before=errors.relative(before, rows), error=errors.relative(after, rows))
        found.append(own)
        start += size
    return found


def _joined(parts: Sequence[Tensor], moments: Moments) -> Tensor:
    return torch.cat([part.detach().to(moments.kept) for part in parts])


def _errors_of(errors: LayerErrors, solution: Solution, bias: Tensor | None) -> Tensor:
    new = errors.weight if solution.weight is None else solution.weight
    if solution.weight_scale is not None:
        new = dequantize(new, solution.weight_scale)
    shift = None if solution.bias is None or bias is None else solution.bias - bias.to(solution.bias)
    return errors.of(new, solution.lowrank_a, solution.lowrank_b, shift)


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
    _, factor = _factored(metric, mu)
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


def _factored(matrix: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """matrix + ridge, with just enough jitter where rounding made it indefinite, and its Cholesky factor."""
    mean = _mean_diagonal(matrix)
    for jitter in JITTERS:
        raised = matrix.clone()  # at 15,360 inputs an identity matrix beside it would take 1.9 GB more
        raised.diagonal().add_(ridge + jitter * mean)
        factor, info = torch.linalg.cholesky_ex(raised)
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            return raised, factor
    if not bool(matrix.isfinite().all()):
        raise CalibrationError("the calibration moments are not finite")
    short = ridge / mean + JITTERS[-1]
    raise CalibrationError(
        f"the calibration moments are indefinite by more than {short:.2g} of their mean diagonal"
    )

"""2:4-sparse weights of least output error, from second moments: SparseGPT's choice, then least squares.

Notation: W (N, K) is the weight to come near to, H (K, K) the second moments of what it multiplies, damped.
Rows, one for each output, do not depend on each other, so several layers that read one input are solved as
one of concatenated outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rtlynx.math.selection import Pattern, pattern_mask, select

TWO_OF_FOUR = Pattern()
DAMPING = 0.01  # SparseGPT's: added to the diagonal, times its mean
COLUMNS = 128  # whose updates of all later ones are one product
REFIT_ITERATIONS = 24  # on layers of flux-emoji within 6 % of the exact solution


def prune(weight: Tensor, hessian: Tensor) -> Tensor:
    """The 2:4-sparse w (N, K) of little (w - weight) H (w - weight)^T in each row.

    SparseGPT (Frantar and Alistarh, ICML 2023) updates the weights right of each that it removes. That is not
    yet the best for its mask: from there, conjugate gradients approach each row's least-squares solution.

    Parameters
    ----------
    weight : Tensor (N, K)
        K a multiple of 4.
    hessian : Tensor (K, K), positive definite
    """
    start, kept = sparsegpt(weight, hessian)
    return least_squares(weight, start, kept, hessian)


def prune_by(weight: Tensor, score: Tensor) -> Tensor:
    """`weight` (N, K) with the two entries of best `score` (N, K) in each group of four, else 0."""
    return select(weight, pattern_mask(score.float(), TWO_OF_FOUR))


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """`gram` (K, K) with `damping` times its mean diagonal added to it, or the identity where it is zero."""
    raised = gram.clone()
    raised.diagonal().add_(damping * float(gram.diagonal().mean()) or 1.0)
    return raised


def sparsegpt(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Remove columns left to right, each error made good by the columns to its right.

    Parameters
    ----------
    weight : Tensor (N, K)
    hessian : Tensor (K, K), positive definite

    Returns
    -------
    weight, kept : Tensor (N, K)
        With two entries left of each group of four, those of largest w² / [H^-1]_jj; and which they are.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    # Row j of the factor: the inverse after the columns before j have been fixed, up to a scale.
    factor = torch.linalg.cholesky(inverse, upper=True)
    del inverse  # at 15,360 inputs 1.9 GB
    left, kept = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    some = _Columns(len(weight), min(COLUMNS, weight.shape[1]), factor)
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        some.remove(left[:, start:stop], factor[start:stop, start:stop])
        width = stop - start
        left[:, start:stop], kept[:, start:stop] = some.weight[:, :width], some.kept[:, :width]
        left[:, stop:] -= some.errors[:, :width] @ factor[start:stop, stop:]
    return torch.where(kept, left, 0.0), kept


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded: one stream, since cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


class _Columns:
    """A run of neighbouring columns, from which half are removed.

    On a card the thousand launches that one run takes are recorded as a CUDA graph by the second run:
    launched one by one they would take longer than everything else that a layer is solved by.
    """

    def __init__(self, n: int, width: int, like: Tensor) -> None:
        self.weight, self.errors = like.new_zeros(n, width), like.new_zeros(n, width)
        self.kept = torch.zeros(n, width, dtype=torch.bool, device=like.device)
        self._factor = like.new_zeros(width, width)
        self._runs, self._graph = 0, torch.cuda.CUDAGraph() if like.is_cuda else None

    def remove(self, weight: Tensor, factor: Tensor) -> None:
        """Fill `weight`, `kept` and `errors`, from columns (N, k) and their part (k, k) of the factor."""
        width = weight.shape[1]
        self._factor.zero_().diagonal().fill_(1.0)  # the last run may have fewer columns
        self._factor[:width, :width], self.weight[:, :width] = factor, weight
        self.weight[:, width:] = 0.0
        self._runs += 1
        if self._graph is None or self._runs == 1:  # the first one loads the kernels
            return self._remove()
        if self._runs == 2:
            with torch.cuda.graph(self._graph, stream=_side_stream(weight.device)):
                self._remove()
        self._graph.replay()

    def _remove(self) -> None:
        group = TWO_OF_FOUR.m
        for start in range(0, self.weight.shape[1], group):
            some = slice(start, start + group)
            score = self.weight[:, some].abs() / self._factor.diagonal()[some]
            self.kept[:, some] = pattern_mask(score.float(), TWO_OF_FOUR)
            for j in range(start, start + group):
                row = self._factor[j]
                error = torch.where(self.kept[:, j], 0.0, self.weight[:, j] / row[j])
                self.errors[:, j] = error
                self.weight[:, j : start + group] -= error[:, None] * row[j : start + group]
            later = slice(start + group, None)
            self.weight[:, later] -= self.errors[:, some] @ self._factor[some, later]


def least_squares(weight: Tensor, start: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """From `start` towards the least (w - weight) H (w - weight)^T of each row, w zero where not `kept`.

    Conjugate gradients, preconditioned by the diagonal, of all rows at once: a direct solution would take a
    factorisation for each row. The error falls with each iteration.
    """
    scale, found = hessian.diagonal(), start
    residual = torch.where(kept, (weight - found) @ hessian, 0.0)
    direction = residual / scale
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(REFIT_ITERATIONS):
        image = torch.where(kept, direction @ hessian, 0.0)
        step = _over(size, (direction * image).sum(1, keepdim=True))
        found = found + step * direction
        residual = residual - step * image
        before, size = size, (residual.square() / scale).sum(1, keepdim=True)
        direction = residual / scale + _over(size, before) * direction
    return found


def _over(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0: a row that is solved already goes nowhere."""
    return torch.where(y > 0, x / torch.where(y > 0, y, 1.0), 0.0)

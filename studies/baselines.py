"""Weight 2:4 baselines, each a function of the weight and the second moments of the layer's input.

W is (N, K): outputs by inputs. `gram` is X^T X / tokens (K, K), X the dense inputs of calibration. All prune
in groups of 4 adjacent inputs of one output and return the new dense-shaped weight, in the dtype of W.
Formulas and citations are in README.md. Only `refit` and `refit_fp8` update the weights that they keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rtlynx.calibration.weight_pruning import damped, prune, prune_by
from rtlynx.math.fp8 import quantize_weight

RIA_POWER = 0.5
SLIM_RANK = 0.1  # of the width
# Exponents that `bawa_style` chooses among: of the norms of input and output channels, and of X.
BAWA_NORMS = (0.0, 0.5, 1.0)
BAWA_POWERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Pruned:
    """What a baseline makes of a layer.

    weight : (N, K), the product that it computes, low-rank part included.
    rank : of the low-rank part, 0 without one.
    fp8 : whether weights lie on the e4m3 grid, for inputs that do.
    """

    weight: Tensor
    rank: int = 0
    fp8: bool = False


def column_norms(gram: Tensor) -> Tensor:
    """Root mean square of each input channel (K,): ||X_j||_2 up to the square root of the number of tokens.

    That factor is the same for all channels and changes no score's order.
    """
    return gram.diagonal().clamp_min(0).sqrt()


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||X (W - W')^T||² / ||X W^T||², 0 where the layer has no output."""
    whole, off = weight.to(gram), (weight - pruned).to(gram)
    energy = float(((whole @ gram) * whole).sum())
    return float(((off @ gram) * off).sum().clamp_min(0)) / energy if energy > 0 else 0.0


def magnitude(weight: Tensor, gram: Tensor) -> Pruned:
    """|W_ij|. Needs no data; takes `gram` so that all baselines are called alike."""
    del gram
    return Pruned(prune_by(weight, weight.abs()))


def wanda_score(weight: Tensor, gram: Tensor) -> Tensor:
    """|W_ij| · ||X_j||_2 (Sun et al., Wanda, ICLR 2024)."""
    return weight.abs().to(gram) * column_norms(gram)


def wanda(weight: Tensor, gram: Tensor) -> Pruned:
    """`wanda_score` within groups of 4 along the inputs."""
    return Pruned(prune_by(weight, wanda_score(weight, gram)))


def ria_score(weight: Tensor, gram: Tensor, power: float = RIA_POWER) -> Tensor:
    """(|W_ij| / Σ_k |W_ik| + |W_ij| / Σ_k |W_kj|) · ||X_j||_2^a (Zhang et al., RIA, ICLR 2024), a = 0.5.

    The paper's channel permutation, a second step, is left out: it needs the inputs reordered.
    """
    size = weight.abs().to(gram)
    relative = _over(size, size.sum(1, keepdim=True)) + _over(size, size.sum(0, keepdim=True))
    return relative * column_norms(gram).pow(power)


def ria(weight: Tensor, gram: Tensor) -> Pruned:
    """`ria_score` within groups of 4 along the inputs."""
    return Pruned(prune_by(weight, ria_score(weight, gram)))


def bawa_style_score(weight: Tensor, gram: Tensor, inputs: float, outputs: float, power: float) -> Tensor:
    """(|W_ij| / ||W_:j||_2^a + |W_ij| / ||W_i:||_2^b) · ||X_j||_2^c, W scaled to unit mean norms first.

    Our reading of BaWA's description (Liu et al., ICML 2025): weights normalised by the norms of their input
    and output channels, outliers of the activations damped by a power. Not checked against its code.
    """
    size = weight.abs().to(gram)
    by_input, by_output = size.norm(dim=0, keepdim=True), size.norm(dim=1, keepdim=True)
    # Without it the weight's unit of measure would shift the balance between the two terms.
    by_input, by_output = _over(by_input, by_input.mean()), _over(by_output, by_output.mean())
    normed = _over(size, by_input.pow(inputs)) + _over(size, by_output.pow(outputs))
    return normed * column_norms(gram).pow(power)


def bawa_style(weight: Tensor, gram: Tensor) -> Pruned:
    """`bawa_style_score` with the exponents of least output error on the calibration data.

    BaWA finds them by zeroth-order gradients; with second moments at hand a grid of 36 is as cheap.
    """
    candidates = (
        prune_by(weight, bawa_style_score(weight, gram, *exponents))
        for exponents in itertools.product(BAWA_NORMS, BAWA_NORMS, BAWA_POWERS)
    )
    return Pruned(min(candidates, key=lambda pruned: output_error(weight, pruned, gram)))


def slim(weight: Tensor, gram: Tensor, rank: float = SLIM_RANK) -> Pruned:
    """Wanda, and the saliency-weighted low-rank part of what it removed (Mozaffari et al., SLiM, ICML 2025).

    E = W - W_pruned; the rank-r truncated SVD of E diag(x), divided by diag(x) again, is added. SLiM's
    saliency x is the mean |X_j|; here the root mean square, which second moments hold. Its quantisation is
    left out.
    """
    pruned = prune_by(weight, wanda_score(weight, gram))
    r = min(*weight.shape, max(1, round(rank * weight.shape[1])))
    saliency = column_norms(gram)
    positive = saliency[saliency > 0]
    # As in SLiM, shifted where a channel is silent: the map must be invertible.
    saliency = torch.where(saliency > 0, saliency, positive.min() if positive.numel() else 1.0)
    left, values, right = torch.linalg.svd((weight - pruned).to(gram) * saliency, full_matrices=False)
    branch = (left[:, :r] * values[:r]) @ right[:r] / saliency
    return Pruned((pruned.to(gram) + branch).to(weight.dtype), r)


def refit(weight: Tensor, gram: Tensor) -> Pruned:
    """SparseGPT's choice, and least squares of what is kept: `rtlynx.calibration.weight_pruning`."""
    return Pruned(prune(weight.to(gram), damped(gram)).to(weight.dtype))


def refit_fp8(weight: Tensor, gram: Tensor) -> Pruned:
    """`refit` in e4m3 with a scale for each output, by the library's rule of least output error."""
    rounded = quantize_weight(refit(weight, gram).weight, gram).dequantize()
    return Pruned(rounded.to(weight.dtype), fp8=True)


BASELINES: dict[str, Callable[[Tensor, Tensor], Pruned]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria,
    "bawa-style": bawa_style,
    "slim": slim,
    "refit": refit,
    "refit-fp8": refit_fp8,
}
# Given the covariance of X in place of its second moments: a bias makes good the mean error.
WITH_INTERCEPT = frozenset({"refit", "refit-fp8"})


def _over(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0: a channel of zeros has nothing to rank."""
    return torch.where(y > 0, x / torch.where(y > 0, y, 1.0), 0.0)

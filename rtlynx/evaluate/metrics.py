"""Figures of merit of generated pictures: PSNR and SSIM against dense, kernel distance, retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KernelDistance(NamedTuple):
    """A kernel distance between two sets of samples.

    value : unbiased squared distance; can fall below 0 by chance.
    stderr : its standard error, None below three samples of a kind.
    """

    value: float
    stderr: float | None


def psnr(pictures: Tensor, reference: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB, mean over pictures.

    Parameters
    ----------
    pictures, reference : Tensor (n, 3, H, W) in [0, 1]

    Returns
    -------
    float or None
        None where it is infinite: a picture equals its reference.

    Raises
    ------
    ValueError
        If shapes differ or an entry is not finite; the same holds for `ssim`.
    """
    _check_pictures(pictures, reference)
    from torchmetrics.functional.image import peak_signal_noise_ratio

    value = float(peak_signal_noise_ratio(pictures.float(), reference.float(), data_range=1.0, dim=(1, 2, 3)))
    return value if math.isfinite(value) else None


def ssim(pictures: Tensor, reference: Tensor) -> float:
    """Structural similarity (11x11 Gaussian window, data range 1), mean over pictures (n, 3, H, W)."""
    _check_pictures(pictures, reference)
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(pictures.double(), reference.double(), data_range=1.0)
    assert isinstance(value, Tensor)
    return min(1.0, float(value))


def _check_pictures(pictures: Tensor, reference: Tensor) -> None:
    if pictures.shape != reference.shape:
        raise ValueError(f"pictures differ in shape: {tuple(pictures.shape)}, {tuple(reference.shape)}")
    if not (torch.isfinite(pictures).all() and torch.isfinite(reference).all()):
        raise ValueError("a picture holds NaN or Inf")


def kid(features: Tensor, real: Tensor, *, gamma: float | None = None) -> KernelDistance:
    """Unbiased kernel distance between two sets of features (squared MMD, polynomial kernel of degree 3).

    Parameters
    ----------
    features, real : Tensor (n, d) and (m, d)
        n, m >= 2; the two may differ.
    gamma : float, optional
        k(x, y) = (gamma x·y + 1)^3; default 1 / d, as in KID on Inception features. Features of unit length
        want 1: with 1 / d the kernel is all but linear on them.

    Returns
    -------
    KernelDistance
        With the two-sample jackknife standard error: every sample of either set is left out once.

    Raises
    ------
    ValueError
        For fewer than two samples in a set, or different widths.
    """
    if features.ndim != 2 or real.ndim != 2 or features.shape[1] != real.shape[1]:
        raise ValueError(f"features are (n, d) and (m, d), got {tuple(features.shape)}, {tuple(real.shape)}")
    n, m = len(features), len(real)
    if n < 2 or m < 2:
        raise ValueError(f"an unbiased kernel distance needs two samples of each kind, got {n} and {m}")
    scale = 1 / features.shape[1] if gamma is None else gamma
    x, y = features.double(), real.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (scale * a @ b.T + 1).pow(3)

    # Row sums hold all that the estimate and its leave-one-out values need.
    within_x = kernel(x, x).fill_diagonal_(0).sum(1)  # (n,)
    within_y = kernel(y, y).fill_diagonal_(0).sum(1)  # (m,)
    across = kernel(x, y)  # (n, m)
    sum_x, sum_y, sum_across = within_x.sum(), within_y.sum(), across.sum()
    mean_x, mean_y = sum_x / (n * (n - 1)), sum_y / (m * (m - 1))
    value = float(mean_x + mean_y - 2 * sum_across / (n * m))
    if n < 3 or m < 3:
        return KernelDistance(value, None)
    without_x = (sum_x - 2 * within_x) / ((n - 1) * (n - 2)) + mean_y
    without_x -= 2 * (sum_across - across.sum(1)) / ((n - 1) * m)
    without_y = (sum_y - 2 * within_y) / ((m - 1) * (m - 2)) + mean_x
    without_y -= 2 * (sum_across - across.sum(0)) / (n * (m - 1))
    variance = _jackknife_variance(without_x) + _jackknife_variance(without_y)
    return KernelDistance(value, float(variance.sqrt()))


def _jackknife_variance(without: Tensor) -> Tensor:
    """Variance of an estimate from its leave-one-out values (n,)."""
    n = len(without)
    return (n - 1) / n * (without - without.mean()).square().sum()


def retrieval(features: Tensor, prompts: Sequence[str]) -> float:
    """Share of samples (features (n, 128) of unit length) whose nearest real picture is the prompted one."""
    from rtlynx_zoo.features import retrieve

    if len(features) != len(prompts) or not prompts:
        raise ValueError(f"{len(features)} samples for {len(prompts)} prompts")
    found = retrieve(features)
    return sum(name == prompt for name, prompt in zip(found, prompts, strict=True)) / len(prompts)


@torch.no_grad()
def picture_features(pictures: Tensor, *, batch_size: int = 32) -> Tensor:
    """Features (n, 128), unit length, of pictures (n, 3, 64, 64) in [0, 1], by the zoo's feature network."""
    from rtlynx_zoo.features import load_feature_network

    network = load_feature_network()
    return torch.cat([network(part.float().cpu()) for part in pictures.split(batch_size)])

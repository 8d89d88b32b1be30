"""Eight-bit floats (e4m3): how tokens and weights are quantised, to the bit.

NVIDIA's e4m3 has 4 bits of exponent, 3 of mantissa, no Inf and one NaN (0x7F, 0xFF): normal from 2^-6 to 448,
subnormal from 2^-9. Plain PyTorch on any device. This file is the truth that every kernel is tested against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.math.selection import select
from rtlynx.math.tf32 import products_in_tf32

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

# 1/448 rounded to float32: a factor, where a division would cost ten instructions.
_INVERSE_MAX = float.fromhex("0x1.24924ap-9")
# The least scale of a token: float32's smallest normal number, whose inverse is still finite.
TOKEN_SCALE_FLOOR = 2.0**-126
# The least scale of an output channel: B / c of a low-rank factor B must not overflow.
CHANNEL_SCALE_FLOOR = 2.0**-96

# Scales tried for a channel, times amax / 448. An octave upwards covers every way in which the grid of a
# float can lie; below 1 the largest entries are clipped, which soon costs more than rounding does.
MULTIPLIERS = tuple(2.0 ** (i / 12) for i in range(-2, 12))
# Channels of a weight at one time, in float32 and float64.
_CHANNELS = 2048

_NAN_BITS = 0x7F


class Quantized(NamedTuple):
    """Eight-bit values and their scale: values * scale is the tensor.

    values : float8_e4m3fn, in the shape of what was quantised.
    scale : float32, (..., 1) for tokens, (N,) for a weight (N, K).
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """values * scale in float32."""
        return dequantize(self.values, self.scale)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """`values` * `scale` in float32: (..., K) by (..., 1), or (N, K) by (N,)."""
    if scale.ndim < values.ndim:
        scale = scale.unsqueeze(-1)
    return values.float() * scale


def quantize_tokens(x: Tensor, mask: Tensor | None = None) -> Quantized:
    """Quantise each token of `x` by a scale of its own, as dense fp8 products with row-wise scales do.

    In IEEE float32 operations, each rounded to nearest even, subnormals not flushed:

        amax = the largest |x| that is kept
        t = max(amax * 0x1.24924ap-9, 2^-126), or 1 where amax = 0, or NaN where amax is not finite
        inverse = 1 / t
        value = e4m3(min(max(x * inverse, -448), 448)), to nearest even

    (PTX: `mul.rn`, `rcp.rn`, `mul.rn`, `cvt.rn.satfinite.e4m3x2.f32`, all without `.ftz`.)

    Parameters
    ----------
    x : Tensor (..., K), any floating dtype that float32 holds
    mask : Tensor (..., K), bool, or None for everything
        What is kept. The rest is +0 and does not count for the scale.

    Returns
    -------
    values : Tensor (..., K), float8_e4m3fn
        Never NaN where the token is finite. In a token with a NaN or an Inf among what is kept, every kept
        value is NaN (0x7F): all outputs of that token are NaN, and those of no other token.
    scale : Tensor (..., 1), float32
        t. Below amax = 448 * 2^-126 the values no longer reach 448.
    """
    kept = (x.detach() if mask is None else select(x.detach(), mask)).float()
    if kept.shape[-1] == 0:
        return Quantized(kept.to(E4M3), kept.new_ones((*kept.shape[:-1], 1)))
    amax = kept.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(amax)
    scale = _scale(amax, TOKEN_SCALE_FLOOR).masked_fill(~finite, torch.nan)
    bits = _round(kept, scale).view(torch.uint8)
    bits = torch.where(finite, bits, _NAN_BITS)  # one NaN, whatever its sign was
    if mask is not None:
        bits = bits * mask  # in a token of NaN, dropped entries too
    return Quantized(bits.view(E4M3), scale)


def quantize_weight(weight: Tensor, gram: Tensor | None = None) -> Quantized:
    """Quantise each output channel of a weight by a scale of its own.

    c = max(amax * 0x1.24924ap-9, 2^-96), or 1 for a channel of zeros; values as in `quantize_tokens`. With
    `gram` the scale is c times that of `MULTIPLIERS` which minimises the output error of the channel on the
    calibration data, (w - ŵ) G (w - ŵ)^T, and never more than c itself gives.

    Parameters
    ----------
    weight : Tensor (N, K)
    gram : Tensor (K, K), float32 | float64, or None
        G = S^T S, second moments of what the weight multiplies.

    Returns
    -------
    values : Tensor (N, K), float8_e4m3fn
    scale : Tensor (N,), float32

    Raises
    ------
    ValueError
        If the weight is not finite, or `gram` does not fit it.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight is (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if gram is not None and gram.shape != (k, k):
        raise ValueError(
            f"moments of what a weight {tuple(weight.shape)} multiplies are {(k, k)}, got {tuple(gram.shape)}"
        )
    weight = weight.detach()
    values = torch.empty((n, k), dtype=E4M3, device=weight.device)
    scales = torch.ones(n, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return Quantized(values, scales)
    exact = None if gram is None else gram.double()
    quick = exact.float() if exact is not None and exact.is_cuda else exact
    for start in range(0, n, _CHANNELS):  # float32 takes four times the memory of the result
        part = slice(start, start + _CHANNELS)
        rows = weight[part].float()
        amax = rows.abs().amax(-1, keepdim=True)
        if not bool(torch.isfinite(amax).all()):
            channel = start + int((~torch.isfinite(amax)).flatten().nonzero()[0])
            raise ValueError(
                f"the weight of output channel {channel} holds NaN or Inf and cannot be quantised"
            )
        scale = _scale(amax, CHANNEL_SCALE_FLOOR)
        if exact is not None and quick is not None:
            found = _best_scale(rows, scale, quick)
            better = _output_error(rows, found, exact) < _output_error(rows, scale, exact)
            scale = torch.where(better, found, scale)
        values[part], scales[part] = _round(rows, scale), scale.squeeze(-1)
    return Quantized(values, scales)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four neighbouring entries of each row of `weight` (N, K) are not zero."""
    if weight.shape[-1] % 4:
        return False
    size = weight.detach().view(torch.uint8) & 0x7F if weight.dtype is E4M3 else weight.detach()
    return bool(((size != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())


def _best_scale(weight: Tensor, plain: Tensor, gram: Tensor) -> Tensor:
    """Of `plain` (N, 1) times each multiplier, what minimises (w - ŵ) G (w - ŵ)^T for each row.

    G in float32 is for cards: products in TF32 are ten times as fast, and tell scales apart.
    """
    best, least = plain, torch.full_like(plain, torch.inf, dtype=gram.dtype)
    with products_in_tf32(gram.dtype is torch.float32):
        for multiplier in MULTIPLIERS:
            tried = plain * multiplier
            error = _output_error(weight, tried, gram)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def _output_error(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    off = (weight.double() - _round(weight, scale).double() * scale.double()).to(gram)
    return ((off @ gram) * off).sum(-1, keepdim=True)


def _scale(amax: Tensor, floor: float) -> Tensor:
    """amax / 448, at least `floor`, and 1 where amax is 0."""
    return (amax * _INVERSE_MAX).clamp_min(floor).masked_fill(amax == 0, 1.0)


def _round(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 of x / scale, by one inverse a row; saturating, which a plain cast of PyTorch's need not be."""
    return (x * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)

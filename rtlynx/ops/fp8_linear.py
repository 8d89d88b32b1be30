"""The two operations of an fp8 layer in plain PyTorch, and dense fp8 products by PyTorch's own kernel.

As in `reference`: one pass over X yields everything about X, one product consumes it. Selection sees the
unquantised X. The low-rank step is folded into the accumulators of the eight-bit product, so its factors are
divided by the scales and rounded there; the plain PyTorch below rounds at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rtlynx.cuda.sm90.gemm import MAX_LAYERS
from rtlynx.cuda.sm90.weights import STORE_COLUMNS
from rtlynx.math.fp8 import dequantize, quantize_tokens
from rtlynx.math.reference import Norm, product_in_float32
from rtlynx.math.selection import Pattern, norm_scale, pattern_mask
from rtlynx.math.tiles import unpack_weight
from rtlynx.ops.dispatch import quantizer_supports, scaled_mm_supports
from rtlynx.ops.lora import scaled_mm_lora
from rtlynx.ops.prologues import quantize
from rtlynx.ops.weight_sparse import gemm_weight_sparse

# cuBLAS refuses fast accumulation for few rows of many columns (CUBLAS_STATUS_NOT_SUPPORTED): 12.9 always, as
# in pytorch/ao issue 4582, 13.0 with a bias (28 rows of 10,240). Compiled code does not know the number of
# rows; up to this many columns none was refused.
_SURE_COLUMNS = 4096
_REFUSES_WITHOUT_BIAS = (torch.version.cuda or "").startswith("12.9")


class CompressedFp8(NamedTuple):
    """An input after selection and quantisation.

    values : (..., K) float8_e4m3fn, +0 where entries were dropped.
    scale : (..., 1) float32, s t: the norm scale times that of the quantisation, one rounding.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """What the product sees of X, (..., K) float32."""
        return dequantize(self.values, self.scale)


class Fp8Parameters(NamedTuple):
    """What a quantised layer multiplies with.

    weight : (N, K) float8_e4m3fn, in natural column order; None where it is packed.
    scale : (N,) float32, c of each output channel.
    bias : (N,) or None.
    lowrank_a, lowrank_b : (r, K) and (N, r), A^T and B of the low-rank branch, unscaled; or None.
    packed : the weight as `rtlynx::gemm_weight_sparse` reads it, in place of `weight`, or None.
    """

    weight: Tensor | None
    scale: Tensor
    bias: Tensor | None
    lowrank_a: Tensor | None
    lowrank_b: Tensor | None
    packed: Tensor | None = None


class Beside(NamedTuple):
    """What LoRAs add to the output of a layer that keeps all of its input, as `rtlynx::lora` prepares it.

    lowrank : T (M, r) bfloat16
    lowrank_b : B (N, r) bfloat16, or packed where the layer's weight is
    """

    lowrank: Tensor
    lowrank_b: Tensor


def compress_fp8(x: Tensor, pattern: Pattern, norm: Norm) -> CompressedFp8:
    """Select from `x` (..., K) and quantise what is kept; n = m keeps all: dense fp8.

    Raises
    ------
    ValueError
        For the norm scale as printed in the paper: it is 0 for a token of zeros, and T is divided by it.
    """
    if norm == "paper":
        raise ValueError("fp8 layers know the norm scale 'scale', not the paper's printed formula")
    if pattern.n == pattern.m:
        pattern.widths(x.shape[-1])
        # To the same bits. torch.compile makes one pass of quantisation with what is around it.
        if not torch.compiler.is_compiling() and quantizer_supports(x.shape[-1], x):
            return CompressedFp8(*quantize(x))
        return CompressedFp8(*quantize_tokens(x))
    mask = pattern_mask(x, pattern)
    values, scale = quantize_tokens(x, mask)
    return CompressedFp8(values, scale if norm == "none" else norm_scale(x.detach(), mask) * scale)


def fold_lowrank(x: Tensor, lowrank_a: Tensor, scale: Tensor) -> Tensor:
    """T' = (X A) / (s t) (..., r): from the dense X, summed in float32, rounded once.

    bfloat16 for half-precision X (float16 would overflow), else in the dtype of X.
    """
    return (product_in_float32(x, lowrank_a) / scale).to(_folded_dtype(x.dtype))


def fold_lowrank_b(lowrank_b: Tensor, scale: Tensor) -> Tensor:
    """B' = B / c (N, r), in float32 and rounded once, as `fold_lowrank`; can be made offline."""
    return (lowrank_b.float() / scale.unsqueeze(-1)).to(_folded_dtype(lowrank_b.dtype))


def linear_fp8(x: Tensor, compressed: CompressedFp8, of: Fp8Parameters) -> Tensor:
    """Y = (s t) ⊙ (Xq Wq^T + T' B'^T) ⊙ c + b, rows by s t, columns by c.

    In float32: acc = Xq Wq^T + T' B'^T, then (acc * c) * (s t) + b, then rounded to the dtype of `x`.

    Parameters
    ----------
    x : Tensor (..., K)
        The dense input, for the low-rank branch and the dtype.
    compressed : CompressedFp8
        Of `x`.
    of : Fp8Parameters

    Returns
    -------
    Tensor (..., N) in the dtype of `x`.
    """
    weight, channel, bias, lowrank_a, lowrank_b, packed = of
    if weight is None:
        assert packed is not None
        weight = unpack_weight(packed, channel.shape[0], x.shape[-1])
    acc = product_in_float32(compressed.values, weight)
    if lowrank_a is not None and lowrank_b is not None:
        acc = acc + product_in_float32(
            fold_lowrank(x, lowrank_a, compressed.scale), fold_lowrank_b(lowrank_b, channel)
        )
    y = acc * channel * compressed.scale
    return (y if bias is None else y + bias).to(x.dtype)


def dense_linear_fp8(x: Tensor, compressed: CompressedFp8, of: Fp8Parameters) -> Tensor:
    """`linear_fp8` of a `compressed` that keeps everything, by `scaled_product` where that serves."""
    if not scaled_mm_supports(x, of):
        return linear_fp8(x, compressed, of)
    if of.lowrank_a is None or of.lowrank_b is None:
        return scaled_product(compressed, of)
    y = scaled_product(compressed, of._replace(bias=None))
    rest = product_in_float32(linear(x, of.lowrank_a), of.lowrank_b)
    return (y.float() + (rest if of.bias is None else rest + of.bias)).bfloat16()


def scaled_product(compressed: CompressedFp8, of: Fp8Parameters, beside: Beside | None = None) -> Tensor:
    """Xq Wq^T scaled by rows and columns, + b: (..., N) bfloat16, of `of` without low-rank factors.

    By our product where the weight is packed, else by `torch._scaled_mm`. There, of more than `_SURE_COLUMNS`
    inputs the bias is added to the product rounded to bfloat16. What is `beside` is added before the bias in
    our product, and there after a bias that the product takes.
    """
    if of.packed is not None:
        return packed_products(compressed, [of], [beside])[0]
    assert of.weight is not None
    n, k = of.weight.shape
    wide = k > _SURE_COLUMNS
    if wide and of.bias is not None:
        return scaled_product(compressed, of._replace(bias=None), beside) + of.bias
    # Sums as tensor cores hold them, as in our own product; promoting them takes a fifth more time.
    fast = not (wide and _REFUSES_WITHOUT_BIAS)
    if beside is not None:
        return scaled_mm_lora(*compressed, of.weight, of.scale, of.bias, *beside, fast)
    return torch._scaled_mm(
        compressed.values.reshape(-1, k),
        of.weight.T,
        scale_a=compressed.scale.reshape(-1, 1),
        scale_b=of.scale.unsqueeze(0),
        bias=of.bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    ).view(*compressed.values.shape[:-1], n)


def packed_products(
    compressed: CompressedFp8, layers: Sequence[Fp8Parameters], beside: Sequence[Beside | None]
) -> list[Tensor]:
    """`scaled_product` of each of several layers whose weights are packed, in one launch."""
    scales = [of.scale for of in layers]
    y = gemm_weight_sparse(
        *(compressed.values.contiguous(), compressed.scale.contiguous()),
        *([of.packed for of in layers], scales, [of.bias for of in layers]),
        *([one and one.lowrank for one in beside], [one and one.lowrank_b for one in beside]),
    )
    return [y] if len(layers) == 1 else list(y.split([c.shape[0] for c in scales], dim=-1))


def joined(layers: Sequence[Fp8Parameters]) -> list[list[int]]:
    """Which layers, by index, `packed_products` serves together: those whose weights are packed."""
    groups: list[list[int]] = []
    for index, of in enumerate(layers):
        if of.packed is not None:
            last = groups[-1] if groups else []
            full = len(last) == MAX_LAYERS or (last and layers[last[-1]].scale.shape[0] % STORE_COLUMNS)
            if not last or full:
                groups.append([index])
            else:
                last.append(index)
    return groups


def _folded_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype is torch.float16 else dtype

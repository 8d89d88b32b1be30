"""The torch operators `rtlynx::compress`, `rtlynx::gemm` and `rtlynx::linear`.

Inference only, 2:4, bfloat16 in and out; in between bfloat16 or e4m3. On a Hopper card they launch the
kernels of `rtlynx.kernels.sm90`. On a CPU and on other cards they run in plain PyTorch over the same packed
blocks (`rtlynx.kernels.blocks`): slow, and there so that everything above can be tested anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rtlynx.kernels.blocks import (
    FP8,
    LOWRANK_COLUMNS,
    blocks_bytes,
    format_of,
    lowrank_bytes,
    pack_blocks,
    pack_blocks_fp8,
    pack_lowrank,
    unpack_blocks,
    unpack_lowrank,
)
from rtlynx.kernels.operators import operator, refuse_gradients
from rtlynx.kernels.reference import product_in_float32
from rtlynx.kernels.sm90.compress import CompressOptions, launch_compress
from rtlynx.kernels.sm90.gemm import launch_gemm
from rtlynx.kernels.sm90.linear import launch_linear
from rtlynx.kernels.sm90.weights import Weights
from rtlynx.pattern import Pattern, norm_scale, pattern_mask

_BIAS_DTYPES = (torch.bfloat16, torch.float32)


def pattern_parts(pattern: Pattern, k: int) -> list[int]:
    """The `parts` argument of the operators: widths, or nothing where there is one part."""
    if pattern.grouping == "adjacent":
        return []
    widths = pattern.widths(k)
    return list(widths) if len(widths) > 1 else []


# ------------------------------------------------------------------------------------------------ checks


def check_compress(x: Tensor, down: Tensor | None, grouping: str, parts: Sequence[int]) -> None:
    check_dtype(x, down)
    check_selection(x, x.shape[-1] if x.ndim else 0, down, grouping, parts)
    if x.stride(-1) != 1:
        raise ValueError(f"the last stride of x is 1, got strides {x.stride()}: call x.contiguous()")
    refuse_gradients(x, down)


def check_dtype(*tensors: Tensor | None) -> None:
    """Of inputs and low-rank factors."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not torch.bfloat16:
            raise TypeError(f"rtlynx operators take bfloat16 inputs and factors, got {tensor.dtype}")


def check_selection(like: Tensor, k: int, down: Tensor | None, grouping: str, parts: Sequence[int]) -> None:
    """Groups over K = `k` columns of something on the device of `like`, and the low-rank factor."""
    if k % 4 or not k:
        raise ValueError(f"x is (..., K) with K a multiple of 4, got K = {k}")
    if grouping == "strided":
        if parts and (sum(parts) != k or any(width % 4 or width < 4 for width in parts)):
            raise ValueError(f"parts are multiples of 4 that add up to K = {k}, got {list(parts)}")
    elif grouping != "adjacent" or parts:
        raise ValueError(
            f"grouping is 'adjacent' without parts, or 'strided', got {grouping!r}, {list(parts)}"
        )
    if down is not None and (
        down.ndim != 2 or down.shape[1] != k or not down.shape[0] or down.device != like.device
    ):
        raise ValueError(
            f"down is (r, {k}) with r > 0 on {like.device} like x, got {tuple(down.shape)} on {down.device}"
        )


def _check_gemm(
    blocks: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    weight: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    rows: int,
    segments: Sequence[int],
    weight_scale: Tensor | None,
) -> None:
    _check_weights(blocks, weight, up, bias, weight_scale)
    n, k = weight.shape
    held = format_of(weight_scale is not None)
    if blocks.shape != (blocks_bytes(rows, k, held),):
        raise ValueError(
            f"blocks of {rows} rows and {k} columns of {held.dtype} are {blocks_bytes(rows, k, held)} bytes, "
            f"got shape {tuple(blocks.shape)}"
        )
    if scale is None and held is FP8:
        raise ValueError("blocks of float8 values come with a scale, and it is missing")
    if scale is not None and scale.shape[0] not in ((rows,) if held is FP8 else (0, rows)):
        raise ValueError(f"scale is (rows,) = ({rows},) or empty, got {tuple(scale.shape)}")
    if up is None:
        if segments or (lowrank is not None and lowrank.shape[0]):
            raise ValueError(
                "lowrank and segments come with up, the other low-rank factor, and it is missing"
            )
    elif rows and segments:
        columns = 0 if lowrank is None else lowrank.shape[0] // lowrank_bytes(rows, 1) * LOWRANK_COLUMNS
        _check_segments(segments, n, up.shape[1], columns)
    elif rows and (lowrank is None or lowrank.shape != (lowrank_bytes(rows, up.shape[1]),)):
        raise ValueError(
            f"low-rank blocks of {rows} rows and rank {up.shape[1]} are {lowrank_bytes(rows, up.shape[1])} "
            f"bytes, got {'none' if lowrank is None else f'shape {tuple(lowrank.shape)}'}"
        )
    refuse_gradients(blocks, scale)


def _check_weights(
    like: Tensor, weight: Tensor, up: Tensor | None, bias: Tensor | None, weight_scale: Tensor | None
) -> None:
    """Weight, factor, bias and scale of one product, on the device of `like`."""
    held = format_of(weight_scale is not None)
    if weight.dtype is not held.dtype or (up is not None and up.dtype is not torch.bfloat16):
        found = weight.dtype if up is None else f"{weight.dtype} and {up.dtype}"
        raise TypeError(
            "rtlynx operators take weights of bfloat16, or of float8_e4m3fn with weight_scale, and bfloat16 "
            f"factors; got {found} {'without' if weight_scale is None else 'with'} weight_scale"
        )
    if weight.ndim != 2 or weight.device != like.device:
        raise ValueError(
            f"weight is (N, K) on {like.device} like the input, got {tuple(weight.shape)} on {weight.device}"
        )
    n = weight.shape[0]
    if up is not None and (up.ndim != 2 or up.shape[0] != n or up.device != like.device):
        raise ValueError(f"up is ({n}, r) on {like.device}, got {tuple(up.shape)} on {up.device}")
    if weight_scale is not None and (
        weight_scale.dtype is not torch.float32
        or weight_scale.shape != (n,)
        or weight_scale.device != like.device
    ):
        raise ValueError(
            f"weight_scale is float32 ({n},) on {like.device}, got {weight_scale.dtype} "
            f"{tuple(weight_scale.shape)} on {weight_scale.device}"
        )
    if bias is not None:
        if bias.dtype not in _BIAS_DTYPES:
            raise TypeError(f"bias is bfloat16 or float32, got {bias.dtype}")
        if bias.shape != (n,) or bias.device != like.device:
            raise ValueError(f"bias is ({n},) on {like.device}, got {tuple(bias.shape)} on {bias.device}")
    refuse_gradients(weight, up, bias)


def _check_segments(segments: Sequence[int], n: int, rank: int, columns: int) -> None:
    ends, firsts, ranks = segments[0::3], segments[1::3], segments[2::3]
    sound = (
        len(segments) % 3 == 0
        and list(ends) == sorted(set(ends))
        and ends[0] > 0
        and ends[-1] == n
        and all(end % 8 == 0 for end in ends[:-1])
        and all(first >= 0 and first % LOWRANK_COLUMNS == 0 for first in firsts)
        and all(0 < width <= rank for width in ranks)
        and all(first + width <= columns for first, width in zip(firsts, ranks, strict=True))
    )
    if not sound:
        raise ValueError(
            f"segments are triples (n_end, first rank column, rank) with rising ends at multiples of 8 up to "
            f"N = {n}, first columns at multiples of {LOWRANK_COLUMNS} and ranks up to {rank} inside the "
            f"{columns} columns of T, got {list(segments)}"
        )


def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    weight_scale: Tensor | None,
) -> None:
    _check_weights(x, weight, up, bias, weight_scale)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is (N, {x.shape[-1]}) for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if (down is None) is not (up is None):
        raise ValueError("down and up come together: both or neither")
    if down is not None and up is not None and down.shape[0] != up.shape[1]:
        raise ValueError(f"down is (r, K) and up (N, r), got {tuple(down.shape)} and {tuple(up.shape)}")


# ------------------------------------------------------------------------------------- in plain PyTorch


def _pattern(grouping: str, parts: Sequence[int]) -> Pattern:
    return Pattern(2, 4, grouping, tuple(parts) or 1)  # type: ignore[arg-type]  # checked before


def compress_reference(
    x: Tensor, down: Tensor | None, grouping: str, parts: Sequence[int], norm: bool, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    check_compress(x, down, grouping, parts)
    x = x.detach().reshape(-1, x.shape[-1])
    pattern = _pattern(grouping, parts)
    scale = x.new_empty(0, dtype=torch.float32)
    if norm:
        scale = norm_scale(x, pattern_mask(x, pattern)).squeeze(-1)
    if fp8:
        blocks, t = pack_blocks_fp8(x, pattern)
        scale = scale * t if norm else t
    else:
        blocks = pack_blocks(x, pattern)
    lowrank = x.new_empty(0, dtype=torch.uint8)
    if down is not None:
        product = product_in_float32(x, down.detach())
        lowrank = pack_lowrank((product / scale.unsqueeze(-1) if norm or fp8 else product).bfloat16())
    return blocks, scale, lowrank


def _gemm_reference(
    blocks: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    weight: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    rows: int,
    segments: Sequence[int],
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check_gemm(blocks, scale, lowrank, weight, up, bias, rows, segments, weight_scale)
    n, k = weight.shape
    y = product_in_float32(
        unpack_blocks(blocks, rows, k, format_of(weight_scale is not None)), weight.detach()
    )
    if rows and lowrank is not None and up is not None:
        triples = list(segments) or [n, 0, up.shape[1]]
        columns = lowrank.shape[0] // lowrank_bytes(rows, 1) * LOWRANK_COLUMNS
        t = unpack_lowrank(lowrank, rows, columns)
        start = 0
        for end, first, rank in zip(*(iter(triples),) * 3, strict=True):
            y[:, start:end] += product_in_float32(t[:, first : first + rank], up[start:end, :rank].detach())
            start = end
    if weight_scale is not None:
        y = y * weight_scale
    if scale is not None and scale.shape[0]:
        y = y * scale.unsqueeze(-1)
    if bias is not None:
        y = y + bias.detach()
    return y.bfloat16()


def _linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    grouping: str,
    parts: Sequence[int],
    norm: bool,
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check_linear(x, weight, bias, down, up, weight_scale)
    blocks, scale, lowrank = compress_reference(x, down, grouping, parts, norm, weight_scale is not None)
    rows = math.prod(x.shape[:-1])
    y = _gemm_reference(blocks, scale, lowrank, weight, up, bias, rows, [], weight_scale)
    return y.view(*x.shape[:-1], weight.shape[0])


# ------------------------------------------------------------------------------------------ shapes alone


def compress_fake(
    x: Tensor, down: Tensor | None, grouping: str, parts: Sequence[int], norm: bool, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    check_compress(x, down, grouping, parts)
    rows = math.prod(x.shape[:-1])
    return (
        x.new_empty(blocks_bytes(rows, x.shape[-1], format_of(fp8)), dtype=torch.uint8),
        x.new_empty(rows if norm or fp8 else 0, dtype=torch.float32),
        x.new_empty(0 if down is None else lowrank_bytes(rows, down.shape[0]), dtype=torch.uint8),
    )


def _gemm_fake(
    blocks: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    weight: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    rows: int,
    segments: Sequence[int],
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check_gemm(blocks, scale, lowrank, weight, up, bias, rows, segments, weight_scale)
    return weight.new_empty((rows, weight.shape[0]), dtype=torch.bfloat16)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    grouping: str,
    parts: Sequence[int],
    norm: bool,
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check_linear(x, weight, bias, down, up, weight_scale)
    check_compress(x, down, grouping, parts)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# ------------------------------------------------------------------------------------------------ Hopper


def _compress_hopper(
    x: Tensor, down: Tensor | None, grouping: str, parts: Sequence[int], norm: bool, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    check_compress(x, down, grouping, parts)
    return launch_compress(x, down, CompressOptions(grouping, tuple(parts), norm, format_of(fp8)))


def _gemm_hopper(
    blocks: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    weight: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    rows: int,
    segments: Sequence[int],
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check_gemm(blocks, scale, lowrank, weight, up, bias, rows, segments, weight_scale)
    return launch_gemm(blocks, scale, lowrank, Weights(weight, up, bias, weight_scale), rows, segments)


def _linear_hopper(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    grouping: str,
    parts: Sequence[int],
    norm: bool,
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check_linear(x, weight, bias, down, up, weight_scale)
    check_compress(x, down, grouping, parts)
    of = Weights(weight, up, bias, weight_scale)
    y = launch_linear(x, of, down, CompressOptions(grouping, tuple(parts), norm, of.held))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


# --------------------------------------------------------------------------------------------- operators

compress = operator(
    "compress(Tensor x, Tensor? down, str grouping, int[] parts, bool norm, bool fp8=False)"
    " -> (Tensor blocks, Tensor scale, Tensor lowrank)",
    hopper=_compress_hopper,
    reference=compress_reference,
    fake=compress_fake,
)
"""Select 2 of 4 entries of every group of `x`, and what the product needs beside them, in one pass.

Parameters
----------
x : Tensor (..., K) bfloat16
    The last stride is 1, all others are free.
down : Tensor (r, K) bfloat16 or None
    A^T of the low-rank branch, in natural column order.
grouping : "adjacent" | "strided"
parts : list of int
    Widths of the parts of strided groups in order (`pattern_parts`); empty for one part.
norm : bool
    Whether the product is scaled by s.
fp8 : bool
    Quantise what is kept to e4m3, each token by its own scale t (`rtlynx.quantization.quantize_tokens`).

Returns
-------
blocks : Tensor uint8
    Kept entries and indices, see `rtlynx.kernels.blocks`.
scale : Tensor (M,) float32
    s, in fp8 s t, by which rows of the product are multiplied; (0,) in bfloat16 without `norm`. In fp8 NaN
    for a token that is not finite, and t = 1 for a token of zeros.
lowrank : Tensor uint8
    Blocks of (X A) / scale, or (0,) without `down`.
"""

gemm = operator(
    "gemm(Tensor blocks, Tensor? scale, Tensor? lowrank, Tensor weight, Tensor? up, Tensor? bias,"
    " SymInt rows, int[] segments, Tensor? weight_scale=None) -> Tensor",
    hopper=_gemm_hopper,
    reference=_gemm_reference,
    fake=_gemm_fake,
)
"""Y = s ⊙ (X~ W^T + T B^T) ⊙ c + b of what `compress` returned; c = 1 in bfloat16.

Parameters
----------
blocks, scale, lowrank
    As from `compress`; `scale` and `lowrank` may be None instead of empty.
weight : Tensor (N, K) bfloat16, or float8_e4m3fn where `weight_scale` is given
    In compute order (`rtlynx.kernels.blocks.compute_order`).
up : Tensor (N, r) bfloat16 or None
    B; in fp8 B / c, each output channel's divided beforehand.
bias : Tensor (N,) bfloat16 | float32, or None
rows : int
    M.
segments : list of int
    Empty, or triples (n_end, first, rank) where `weight` is several layers with factors of their own:
    outputs from the previous n_end (a multiple of 8) to this one read columns first ... first + rank - 1 of T
    (`first` a multiple of 32) and the first `rank` columns of `up`. Up to the next multiple of 32, T and `up`
    are finite and one of them is zero.
weight_scale : Tensor (N,) float32, or None
    c, the scale of each output channel of a weight in e4m3; `blocks` then are of `compress(..., fp8=True)`.

Returns
-------
Tensor (M, N) bfloat16
"""

linear = operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, str grouping, int[] parts,"
    " bool norm, Tensor? weight_scale=None) -> Tensor",
    hopper=_linear_hopper,
    reference=_linear_reference,
    fake=_linear_fake,
)
"""`compress` and `gemm` in one call: (..., K) -> (..., N), for an input that no other layer reads.

In fp8 where `weight_scale` is given.
"""

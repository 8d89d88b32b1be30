"""The torch operators `rtlynx::compress`, `rtlynx::gemm`, `rtlynx::gemm_joint` and `rtlynx::linear`.

Inference only, 2:4, bfloat16 in and out; in between bfloat16 or e4m3. On a Hopper card they launch the
kernels of `rtlynx.cuda.sm90`. On a CPU and on other cards they run in plain PyTorch over the same packed
tiles (`rtlynx.math.tiles`): slow, and there so that everything above can be tested anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.forms import by_form
from rtlynx.cuda.sm90.compress import CompressOptions, launch_compress
from rtlynx.cuda.sm90.gemm import launch_gemm
from rtlynx.cuda.sm90.linear import launch_linear
from rtlynx.cuda.sm90.weights import Weights
from rtlynx.math.formats import BF16_SPARSE, FORMATS, SPARSE_FORMATS
from rtlynx.math.reference import product_in_float32
from rtlynx.math.scores import score_named
from rtlynx.math.selection import Pattern, norm_scale, pattern_mask
from rtlynx.math.tiles import (
    LOWRANK_COLUMNS,
    lowrank_bytes,
    pack_a,
    pack_a_fp8,
    pack_lowrank,
    packed_a_bytes,
    unpack_a,
    unpack_lowrank,
)
from rtlynx.ops.checks import JOINT_NAMES, check_compress, check_gemm, check_linear, layers_of
from rtlynx.ops.registry import operator

Compressed = tuple[Tensor, Tensor, Tensor]


def pattern_parts(pattern: Pattern, k: int) -> list[int]:
    """The `parts` argument of the operators: widths, or nothing where there is one part."""
    if pattern.grouping == "adjacent":
        return []
    widths = pattern.widths(k)
    return list(widths) if len(widths) > 1 else []


# How `compress` and what is like it end: what a `CompressOptions` holds, and what is returned.
COMPRESS_TAIL = (
    'Tensor? lowrank_a, str grouping, int[] parts, bool norm, str format="bf16-sparse",'
    ' str score="magnitude") -> (Tensor packed_a, Tensor scale, Tensor lowrank)'
)


def options_of(
    grouping: str, parts: Sequence[int], norm: bool, format: str = BF16_SPARSE.name, score: str = "magnitude"
) -> CompressOptions:
    """The arguments of an operator as one value; ValueError for a format or score that there is not."""
    found = FORMATS.get(format)
    if found is None or not found.sparse:
        raise ValueError(f"format is one of {', '.join(one.name for one in SPARSE_FORMATS)}, got {format!r}")
    return CompressOptions(grouping, tuple(parts), norm, found, score_named(score))


# ------------------------------------------------------------------------------------- in plain PyTorch


def compress_reference(x: Tensor, lowrank_a: Tensor | None, options: CompressOptions) -> Compressed:
    x = x.detach().reshape(-1, x.shape[-1])
    grouping, parts, norm = options.grouping, options.parts or 1, options.norm
    pattern = Pattern(2, 4, grouping, parts, options.score.name)  # type: ignore[arg-type]  # checked before
    scale = x.new_empty(0, dtype=torch.float32)
    if norm:
        scale = norm_scale(x, pattern_mask(x, pattern)).squeeze(-1)
    if options.format.quantized:
        packed_a, t = pack_a_fp8(x, pattern)
        scale = scale * t if norm else t
    else:
        packed_a = pack_a(x, pattern)
    lowrank = x.new_empty(0, dtype=torch.uint8)
    if lowrank_a is not None:
        product = product_in_float32(x, lowrank_a.detach())
        lowrank = pack_lowrank((product / scale.unsqueeze(-1) if scale.numel() else product).bfloat16())
    return packed_a, scale, lowrank


def _product_reference(
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    layers: Sequence[Weights],
    first_ranks: Sequence[int],
    rows: int,
) -> Tensor:
    k, format = layers[0].weight.shape[1], layers[0].format
    x = unpack_a(packed_a, rows, k, format)
    t = None
    if rows and lowrank is not None and lowrank.shape[0]:
        t = unpack_lowrank(lowrank, rows, lowrank.shape[0] // lowrank_bytes(rows, 1) * LOWRANK_COLUMNS)
    outputs = []
    for of, first in zip(layers, first_ranks, strict=True):
        y = product_in_float32(x, of.weight.detach())
        if t is not None and of.lowrank_b is not None:
            y += product_in_float32(t[:, first : first + of.lowrank_b.shape[1]], of.lowrank_b.detach())
        if of.column_scale is not None:
            y = y * of.column_scale
        if scale is not None and scale.shape[0]:
            y = y * scale.unsqueeze(-1)
        outputs.append((y if of.bias is None else y + of.bias.detach()).bfloat16())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _linear_reference(x: Tensor, of: Weights, lowrank_a: Tensor | None, options: CompressOptions) -> Tensor:
    compressed = compress_reference(x, lowrank_a, options)
    return _product_reference(*compressed, [of], (0,), math.prod(x.shape[:-1]))


# ------------------------------------------------------------------------------------------ shapes alone


def compress_fake(x: Tensor, lowrank_a: Tensor | None, options: CompressOptions) -> Compressed:
    format, rows = options.format, math.prod(x.shape[:-1])
    return (
        x.new_empty(packed_a_bytes(rows, x.shape[-1], format), dtype=torch.uint8),
        x.new_empty(rows if options.norm or format.quantized else 0, dtype=torch.float32),
        x.new_empty(0 if lowrank_a is None else lowrank_bytes(rows, lowrank_a.shape[0]), dtype=torch.uint8),
    )


def _product_fake(
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    layers: Sequence[Weights],
    first_ranks: Sequence[int],
    rows: int,
) -> Tensor:
    n = sum(of.weight.shape[0] for of in layers)
    return packed_a.new_empty((rows, n), dtype=torch.bfloat16)


def _linear_fake(x: Tensor, of: Weights, lowrank_a: Tensor | None, options: CompressOptions) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), of.weight.shape[0])


# ------------------------------------------------------------------------------------------------ Hopper


def _gemm_hopper(
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    weight: Tensor,
    lowrank_b: Tensor | None,
    bias: Tensor | None,
    rows: int,
    weight_scale: Tensor | None = None,
) -> Tensor:
    layers = [Weights(weight, lowrank_b, bias, weight_scale)]
    check = partial(check_gemm, packed_a, scale, lowrank, layers, (0,), rows)
    return launch_gemm(packed_a, scale, lowrank, layers, rows, (0,), check)


def _gemm_joint_hopper(
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    weights: Sequence[Tensor],
    lowrank_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    first_ranks: Sequence[int],
    rows: int,
) -> Tensor:
    lists = weights, lowrank_bs, biases, weight_scales

    def check() -> None:
        layers = layers_of(*lists, first_ranks)
        check_gemm(packed_a, scale, lowrank, layers, first_ranks, rows, JOINT_NAMES)

    return launch_gemm(
        packed_a, scale, lowrank, zipped(*lists), rows, first_ranks, check, tuple(map(len, lists))
    )


def zipped(weights: Sequence[Tensor], *others: Sequence[Tensor | None]) -> list[Weights]:
    """The layers of lists of weights, factors, biases and scales, of which any but the first may be empty.

    Without the checks of `layers_of`.
    """
    none = [None] * len(weights)
    return [Weights(*of) for of in zip(weights, *(given or none for given in others), strict=False)]


# --------------------------------------------------------------------------------------------- operators


# A card is faster than these checks: there each form of arguments is checked once (`by_form`).


def _compress_options(
    x: Tensor, lowrank_a: Tensor | None, grouping: str, parts: Sequence[int], norm: bool, *how: str
) -> CompressOptions:
    """Those of checked arguments of `compress`."""
    check_compress(x, lowrank_a, grouping, parts)
    return options_of(grouping, parts, norm, *how)


def _compress(
    run: Callable[..., Compressed], options: Callable[..., CompressOptions] = _compress_options
) -> Callable[..., Compressed]:
    """`compress` by an implementation of it."""

    def compress(x: Tensor, lowrank_a: Tensor | None, *how: Any) -> Compressed:
        return run(x, lowrank_a, options(x, lowrank_a, *how))

    return compress


compress = operator(
    f"compress(Tensor x, {COMPRESS_TAIL}",
    hopper=_compress(launch_compress, by_form(_compress_options)),
    reference=_compress(compress_reference),
    fake=_compress(compress_fake),
)
"""Select 2 of 4 entries of every group of `x`, and what the product needs beside them, in one pass.

Parameters
----------
x : Tensor (..., K) bfloat16
    The last stride is 1, all others are free.
lowrank_a : Tensor (r, K) bfloat16 or None
    A^T of the low-rank branch, in natural column order.
grouping : "adjacent" | "strided"
parts : list of int
    Widths of the parts of strided groups in order (`pattern_parts`); empty for one part.
norm : bool
    Whether the product is scaled by s.
format : "bf16-sparse" | "fp8-sparse"
    The latter quantises what is kept to e4m3, each token by its own scale t
    (`rtlynx.math.fp8.quantize_tokens`).
score : str
    Which entries of a group are kept (`rtlynx.math.scores`).

Returns
-------
packed_a : Tensor uint8
    Kept entries and indices, see `rtlynx.math.tiles`.
scale : Tensor (M,) float32
    s, in fp8 s t, by which rows of the product are multiplied; (0,) in bfloat16 without `norm`. In fp8 NaN
    for a token that is not finite, and t = 1 for a token of zeros.
lowrank : Tensor uint8
    Tiles of (X A) / scale, or (0,) without `lowrank_a`.
"""


def _gemm(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`gemm` by an implementation of products."""

    def gemm(
        packed_a: Tensor,
        scale: Tensor | None,
        lowrank: Tensor | None,
        weight: Tensor,
        lowrank_b: Tensor | None,
        bias: Tensor | None,
        rows: int,
        weight_scale: Tensor | None = None,
    ) -> Tensor:
        layers = [Weights(weight, lowrank_b, bias, weight_scale)]
        check_gemm(packed_a, scale, lowrank, layers, (0,), rows)
        return product(packed_a, scale, lowrank, layers, (0,), rows)

    return gemm


def _gemm_joint(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`gemm_joint`, likewise."""

    def gemm_joint(
        packed_a: Tensor,
        scale: Tensor | None,
        lowrank: Tensor | None,
        weights: Sequence[Tensor],
        lowrank_bs: Sequence[Tensor],
        biases: Sequence[Tensor],
        weight_scales: Sequence[Tensor],
        first_ranks: Sequence[int],
        rows: int,
    ) -> Tensor:
        layers = layers_of(weights, lowrank_bs, biases, weight_scales, first_ranks)
        check_gemm(packed_a, scale, lowrank, layers, first_ranks, rows, JOINT_NAMES)
        return product(packed_a, scale, lowrank, layers, first_ranks, rows)

    return gemm_joint


gemm = operator(
    "gemm(Tensor packed_a, Tensor? scale, Tensor? lowrank, Tensor weight, Tensor? lowrank_b, Tensor? bias,"
    " SymInt rows, Tensor? weight_scale=None) -> Tensor",
    hopper=_gemm_hopper,
    reference=_gemm(_product_reference),
    fake=_gemm(_product_fake),
)
"""Y = s ⊙ (X~ W^T + T B^T) ⊙ c + b of what `compress` returned; c = 1 in bfloat16.

Parameters
----------
packed_a, scale, lowrank
    As from `compress`; `scale` and `lowrank` may be None instead of empty.
weight : Tensor (N, K) bfloat16, or float8_e4m3fn where `weight_scale` is given
    In compute order (`rtlynx.math.tiles.compute_order`).
lowrank_b : Tensor (N, r) bfloat16 or None
    B; in fp8 B / c, each output channel's divided beforehand.
bias : Tensor (N,) bfloat16 | float32, or None
rows : int
    M.
weight_scale : Tensor (N,) float32, or None
    c, the scale of each output channel of a weight in e4m3; `packed_a` is then in "fp8-sparse".

Returns
-------
Tensor (M, N) bfloat16
"""

gemm_joint = operator(
    "gemm_joint(Tensor packed_a, Tensor? scale, Tensor? lowrank, Tensor[] weights, Tensor[] lowrank_bs,"
    " Tensor[] biases, Tensor[] weight_scales, int[] first_ranks, SymInt rows) -> Tensor",
    hopper=_gemm_joint_hopper,
    reference=_gemm_joint(_product_reference),
    fake=_gemm_joint(_product_fake),
)
"""`gemm` of up to four layers that read one input, in one launch.

Parameters
----------
packed_a, scale, lowrank
    As of `gemm`.
weights : list of Tensor (N_i, K)
    N_i multiples of 8, all but the last.
lowrank_bs, biases, weight_scales : lists of Tensor
    One of each layer, or empty where no layer has any; see `gemm`.
first_ranks : list of int
    First of a layer's columns of T, multiples of 32: 0 for all that share one A. From a layer's rank on to
    the next multiple of 32, T is finite.
rows : int
    M.

Returns
-------
Tensor (M, sum of N_i) bfloat16
    Outputs beside each other.
"""


def _linear_options(
    x: Tensor,
    of: Weights,
    lowrank_a: Tensor | None,
    grouping: str,
    parts: tuple[int, ...],
    norm: bool,
    score: str,
) -> CompressOptions:
    """Those of arguments of `linear`, checked."""
    check_linear(x, of, lowrank_a, grouping, parts)
    return CompressOptions(grouping, parts, norm, of.format, score_named(score))


def _checked(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation of `linear` that takes options."""
    return lambda x, of, lowrank_a, how: run(x, of, lowrank_a, _linear_options(x, of, lowrank_a, *how))


def _linear_hopper(x: Tensor, of: Weights, lowrank_a: Tensor | None, how: tuple[Any, ...]) -> Tensor:
    return launch_linear(x, of, lowrank_a, how, partial(_linear_options, x, of, lowrank_a, *how))


def _linear(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`linear` by what gives Y (M, N) of X, weights, A^T, and grouping, parts, norm and score."""

    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lowrank_a: Tensor | None,
        lowrank_b: Tensor | None,
        grouping: str,
        parts: Sequence[int],
        norm: bool,
        weight_scale: Tensor | None = None,
        score: str = "magnitude",
    ) -> Tensor:
        of, how = Weights(weight, lowrank_b, bias, weight_scale), (grouping, tuple(parts), norm, score)
        y = run(x, of, lowrank_a, how)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])

    return linear


linear = operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? lowrank_a, Tensor? lowrank_b, str grouping,"
    ' int[] parts, bool norm, Tensor? weight_scale=None, str score="magnitude") -> Tensor',
    hopper=_linear(_linear_hopper),
    reference=_linear(_checked(_linear_reference)),
    fake=_linear(_checked(_linear_fake)),
)
"""`compress` and `gemm` in one call: (..., K) -> (..., N), for an input that no other layer reads.

In fp8 where `weight_scale` is given.
"""

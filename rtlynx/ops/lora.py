"""Torch operators for LoRAs beside fp8 layers that keep all of their input: `lora` and `scaled_mm_lora`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.cuda.forms import by_form
from rtlynx.cuda.sm90.lora import LoraShape, launch_lora, takes
from rtlynx.math.fp8 import E4M3
from rtlynx.math.reference import product_in_float32
from rtlynx.math.tiles import pack_lowrank
from rtlynx.ops.checks import check_size, check_tensor
from rtlynx.ops.registry import operator, refuse_gradients

_E4M3, _FLOAT32 = (E4M3,), (torch.float32,)


def _shape_of(
    values: Tensor,
    scale: Tensor,
    lowrank_as: Sequence[Tensor],
    lowrank_bs: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    counts: Sequence[int],
    scalings: Tensor | None = None,
) -> LoraShape:
    """The shape, once all arguments of the operator were checked."""
    check_tensor("values", values, values, _E4M3)
    check_tensor("scale", scale, values, _FLOAT32)
    k = values.shape[-1] if values.ndim else 0
    if not k:
        raise ValueError(f"values are (..., K) with K > 0, got shape {tuple(values.shape)}")
    rows = values.numel() // k
    check_size("rows of X", rows)
    for name, tensor in (("values", values), ("scale", scale)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is contiguous, got strides {tensor.stride()}: call {name}.contiguous()")
    if scale.numel() != rows:
        raise ValueError(f"scale holds one number for each of {rows} tokens, got {tuple(scale.shape)}")
    if not counts or min(counts) < 1 or sum(counts) != len(lowrank_as):
        raise ValueError(
            f"counts says how many of {len(lowrank_as)} LoRAs each layer has, 1 or more, got {list(counts)}"
        )
    for i, one in enumerate(lowrank_as):
        check_tensor(f"lowrank_as[{i}]", one, values, axes=("r", "K"))
        if one.shape[1] != k or not one.shape[0]:
            raise ValueError(f"lowrank_as[{i}] is (r, {k}) with r > 0, got {tuple(one.shape)}")
    if scalings is not None:
        check_tensor("scalings", scalings, values, _FLOAT32, ("LoRAs",), packed=True)
        if scalings.shape[0] != len(lowrank_as):
            raise ValueError(f"scalings is ({len(lowrank_as)},), one a LoRA, got {tuple(scalings.shape)}")
    refuse_gradients(scale, scalings, *lowrank_as, *lowrank_bs, *weight_scales)
    split = _split([one.shape[0] for one in lowrank_as], counts)
    widths = _widths(values, [one.shape[0] for one in lowrank_as], lowrank_bs, weight_scales, counts)
    return LoraShape(rows, k, tuple(tuple(ranks) for ranks in split), widths, bool(weight_scales))


def _widths(
    like: Tensor,
    ranks: Sequence[int],
    lowrank_bs: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    counts: Sequence[int],
) -> tuple[int, ...]:
    """N of each layer whose B is packed; zeros where none is."""
    if not weight_scales and not lowrank_bs:
        return (0,) * len(counts)
    if len(weight_scales) != len(counts) or len(lowrank_bs) != len(ranks):
        raise ValueError(
            f"lowrank_bs and weight_scales are empty, or one a LoRA ({len(ranks)}) and one a layer "
            f"({len(counts)}), got {len(lowrank_bs)} and {len(weight_scales)}"
        )
    for i, one in enumerate(weight_scales):
        check_tensor(f"weight_scales[{i}]", one, like, _FLOAT32, ("N",))
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    for i, (one, rank, owner) in enumerate(zip(lowrank_bs, ranks, owners, strict=True)):
        check_tensor(f"lowrank_bs[{i}]", one, like, axes=("N", "r"))
        expected = (weight_scales[owner].shape[0], rank)
        if one.shape != expected:
            raise ValueError(f"lowrank_bs[{i}] is {expected}, got {tuple(one.shape)}")
    return tuple(one.shape[0] for one in weight_scales)


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """`values` layer by layer."""
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _lora_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _plain(_shape_of(*arguments), *arguments)


_known_shape = by_form(_shape_of)  # (a card is faster than the checks)


def _lora_hopper(*arguments: Any) -> tuple[Tensor, Tensor]:
    of = _known_shape(*arguments)
    return launch_lora(of, *arguments) if takes(of) else _plain(of, *arguments)


def _lora_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    of, values = _shape_of(*arguments), arguments[0]
    lowrank = values.new_empty((of.rows, of.first_columns[-1]), dtype=torch.bfloat16)
    return lowrank, values.new_empty(sum(of.tile_bytes), dtype=torch.uint8)


def _plain(
    of: LoraShape,
    values: Tensor,
    scale: Tensor,
    lowrank_as: Sequence[Tensor],
    lowrank_bs: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    counts: Sequence[int],
    scalings: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = values.view(-1, of.k)
    products = [product_in_float32(rows, one) for one in lowrank_as]
    if scalings is not None:
        products = [one * scaling for one, scaling in zip(products, scalings, strict=True)]
    if not of.packs:
        products = [one * scale.view(-1, 1) for one in products]
    joined = [torch.cat(layer, dim=1) for layer in _split(products, counts)]
    lowrank = torch.cat([pad(one, (0, -one.shape[1] % 8)) for one in joined], dim=1).bfloat16()
    if not of.packs:
        return lowrank, values.new_empty(0, dtype=torch.uint8)
    tiles = [
        pack_lowrank((torch.cat(layer, dim=1).float() / c.unsqueeze(-1)).bfloat16())
        for layer, c in zip(_split(lowrank_bs, counts), weight_scales, strict=True)
    ]
    return lowrank, torch.cat(tiles)


lora: Any = operator(
    "lora(Tensor values, Tensor scale, Tensor[] lowrank_as, Tensor[] lowrank_bs, Tensor[] weight_scales,"
    " int[] counts, Tensor? scalings=None) -> (Tensor lowrank, Tensor packed_bs)",
    hopper=_lora_hopper,
    reference=_lora_reference,
    fake=_lora_fake,
)
"""What LoRAs add to layers that read one quantised input, prepared for their products in one kernel.

T = Xq A * scaling, in float32 and rounded once: of the values alone where B is packed for products by a
2:4-sparse weight, times each token's scale otherwise. Packed is B / c, rounded once.

Parameters
----------
values : Tensor (..., K) float8_e4m3fn, contiguous
scale : Tensor (..., 1) or (M,) float32, contiguous
    Of each token.
lowrank_as : list of Tensor (r, K) bfloat16
    A^T of each LoRA, layer after layer.
lowrank_bs : list of Tensor (N, r) bfloat16
    B of each, to pack; or none.
weight_scales : list of Tensor (N,) float32
    c of each layer, to pack; or none.
counts : list of int
    How many LoRAs each layer has, at least one.
scalings : Tensor (LoRAs,) float32, or None where all are 1

Returns
-------
lowrank : Tensor (M, columns) bfloat16
    T, layer after layer, each from a multiple of 8 columns on.
packed_bs : Tensor uint8
    Tiles of each layer's B (`rtlynx.math.tiles.pack_lowrank`), one layer after the other; or nothing.

Raises
------
TypeError, ValueError
    For other dtypes, shapes, strides or devices.
RuntimeError
    If a gradient is asked for.
"""


def _scaled_mm(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    lowrank: Tensor,
    lowrank_b: Tensor,
    fast: bool,
) -> Tensor:
    n, k = weight.shape
    y = torch._scaled_mm(
        values.reshape(-1, k),
        weight.T,
        scale_a=scale.reshape(-1, 1),
        scale_b=weight_scale.unsqueeze(0),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return y.addmm_(lowrank, lowrank_b.T).view(*values.shape[:-1], n)


def _scaled_mm_fake(values: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return values.new_empty((*values.shape[:-1], weight.shape[0]), dtype=torch.bfloat16)


# `torch._scaled_mm` by rows and columns, + T B^T added in place, as compiled code would not do it.
scaled_mm_lora: Any = operator(
    "scaled_mm_lora(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " Tensor lowrank, Tensor lowrank_b, bool fast) -> Tensor",
    hopper=_scaled_mm,
    reference=_scaled_mm,
    fake=_scaled_mm_fake,
)

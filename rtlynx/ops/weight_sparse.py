"""The torch operator `rtlynx::gemm_weight_sparse`: an input in e4m3 by weights of which half is zero."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.sm90.weight_sparse import launch_weight_sparse
from rtlynx.cuda.sm90.weights import Weights
from rtlynx.math.formats import FP8_SPARSE
from rtlynx.math.fp8 import E4M3
from rtlynx.math.reference import product_in_float32
from rtlynx.math.tiles import lowrank_bytes, packed_a_bytes, unpack_a, unpack_lowrank
from rtlynx.ops.checks import BFLOAT16, FLOATS, check_lists, check_outputs, check_size, check_tensor
from rtlynx.ops.registry import operator, refuse_gradients
from rtlynx.ops.sparse_linear import zipped

_FLOAT32, _BYTES, _E4M3 = (torch.float32,), (torch.uint8,), (E4M3,)


def _layers(
    packed_weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lowranks: Sequence[Tensor | None],
    packed_bs: Sequence[Tensor | None],
) -> tuple[list[Weights], list[Tensor | None]]:
    """The layers, and T of each."""
    return zipped(packed_weights, packed_bs, biases, weight_scales), list(lowranks) or [None] * len(
        packed_weights
    )


def _check(
    values: Tensor,
    scale: Tensor,
    packed_weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lowranks: Sequence[Tensor | None],
    packed_bs: Sequence[Tensor | None],
) -> None:
    check_tensor("values", values, values, _E4M3)
    check_tensor("scale", scale, values, _FLOAT32)
    k = values.shape[-1] if values.ndim else 0
    if not k or k % 4:
        raise ValueError(f"values are (..., K) with K a multiple of 4, got shape {tuple(values.shape)}")
    for name, tensor in (("values", values), ("scale", scale)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is contiguous, got strides {tensor.stride()}: call {name}.contiguous()")
    rows = values.numel() // k
    if scale.numel() != rows:
        raise ValueError(f"scale holds one number for each of {rows} tokens, got {tuple(scale.shape)}")
    check_lists("weight_scales", weight_scales, biases=biases, lowranks=lowranks, packed_bs=packed_bs)
    if len(packed_weights) != len(weight_scales):
        raise ValueError(f"packed_weights are as many as weight_scales, got {len(packed_weights)}")
    layers, ts = _layers(packed_weights, weight_scales, biases, lowranks, packed_bs)
    for i, (of, t) in enumerate(zip(layers, ts, strict=True)):
        _check_layer(values, i, of, t)
    check_outputs("weight_scales", weight_scales, biases)
    for what, size in (("rows of X", rows), ("inputs", k), ("outputs", sum(map(len, weight_scales)))):
        check_size(what, size)
    refuse_gradients(scale)


def _check_layer(values: Tensor, i: int, of: Weights, lowrank: Tensor | None) -> None:
    """Layer `i`, and its T."""
    packed, packed_b, bias, weight_scale = of
    k = values.shape[-1]
    assert weight_scale is not None
    check_tensor(f"packed_weights[{i}]", packed, values, _BYTES, ("bytes",), packed=True)
    check_tensor(f"weight_scales[{i}]", weight_scale, values, _FLOAT32, ("N",), packed=True)
    n = weight_scale.shape[0]
    expected = packed_a_bytes(n, k, FP8_SPARSE)
    if packed.shape[0] != expected:
        raise ValueError(
            f"packed_weights[{i}] of ({n}, {k}) is {expected} bytes, got {packed.shape[0]}: "
            "make it by rtlynx.math.tiles.pack_weight"
        )
    if bias is not None:
        check_tensor(f"biases[{i}]", bias, values, FLOATS, ("N",), packed=True)
        if bias.shape[0] != n:
            raise ValueError(f"biases[{i}] is ({n},) like weight_scales[{i}], got {tuple(bias.shape)}")
    refuse_gradients(weight_scale, bias, lowrank)
    if lowrank is None or packed_b is None:
        if lowrank is not packed_b:
            raise ValueError(f"lowranks[{i}] and packed_bs[{i}] come together, and one is missing")
        return
    check_tensor(f"lowranks[{i}]", lowrank, values, BFLOAT16, ("rows", "r"))
    check_tensor(f"packed_bs[{i}]", packed_b, values, _BYTES, ("bytes",), packed=True)
    rows, rank = values.numel() // k, lowrank.shape[1]
    if lowrank.shape[0] != rows or not rank:
        raise ValueError(f"lowranks[{i}] is ({rows}, r) with r > 0, got {tuple(lowrank.shape)}")
    expected = lowrank_bytes(n, rank)
    if packed_b.shape[0] != expected:
        raise ValueError(
            f"packed_bs[{i}] of ({n}, {rank}) is {expected} bytes, got {packed_b.shape[0]}: "
            "make it by rtlynx.math.tiles.pack_lowrank"
        )


def _shaped(y: Tensor, values: Tensor) -> Tensor:
    """Y (M, N) as (..., N)."""
    return y if values.ndim == 2 else y.view(*values.shape[:-1], y.shape[1])


def _hopper(values: Tensor, scale: Tensor, *lists: Sequence[Any]) -> Tensor:
    check = partial(_check, values, scale, *lists)  # (a card is faster than the checks)
    y = launch_weight_sparse(values, scale, *_layers(*lists), tuple(map(len, lists)), check)
    return _shaped(y, values)


def _reference(values: Tensor, scale: Tensor, *lists: Sequence[Any]) -> Tensor:
    _check(values, scale, *lists)
    rows, t, outputs = values.view(-1, values.shape[-1]), scale.view(-1, 1), []
    of: Any
    for of, lowrank in zip(*_layers(*lists), strict=True):
        packed, packed_b, bias, c = of
        n = c.shape[0]
        acc = product_in_float32(rows, unpack_a(packed, n, rows.shape[1], FP8_SPARSE))
        if lowrank is not None:
            acc = acc + product_in_float32(lowrank, unpack_lowrank(packed_b, n, lowrank.shape[1]))
        y = acc * c * t
        outputs.append((y if bias is None else y + bias.detach()).bfloat16())
    return _shaped(torch.cat(outputs, dim=1), values)


def _fake(values: Tensor, scale: Tensor, *lists: Sequence[Any]) -> Tensor:
    _check(values, scale, *lists)
    n = sum(c.shape[0] for c in lists[1])
    return values.new_empty((*values.shape[:-1], n), dtype=torch.bfloat16)


gemm_weight_sparse: Any = operator(
    "gemm_weight_sparse(Tensor values, Tensor scale, Tensor[] packed_weights, Tensor[] weight_scales,"
    " Tensor?[] biases, Tensor?[] lowranks, Tensor?[] packed_bs) -> Tensor",
    hopper=_hopper,
    reference=_reference,
    fake=_fake,
)
"""Y = (t ⊗ c) ⊙ (Xq Wq^T + T B'^T) + b, Wq with at most two of every four neighbouring entries not zero.

In float32: (acc * c) * t + b, rounded once. One launch serves up to four layers that read one X.

Parameters
----------
values : Tensor (..., K) float8_e4m3fn, contiguous
    All of X, as from `rtlynx::quantize`; K a multiple of 4.
scale : Tensor (..., 1) or (M,) float32, contiguous
    t of each token; NaN for one that is not finite.
packed_weights : list of Tensor uint8
    Wq (N_i, K) of each layer, as from `rtlynx.math.tiles.pack_weight`; N_i multiples of 8, all but the last.
weight_scales : list of Tensor (N_i,) float32
    c of each output channel.
biases : list of Tensor (N_i,) bfloat16 | float32, or None
    Of one dtype. This list and the next two are empty where no layer has any.
lowranks, packed_bs : lists of Tensor (M, r_i) bfloat16 and Tensor uint8, or None
    T of the values, and B' = B / c (N_i, r_i) as from `rtlynx.math.tiles.pack_lowrank`. `rtlynx::lora` makes
    both.

Returns
-------
Tensor (..., sum of N_i) bfloat16
    Outputs beside each other.

Raises
------
TypeError, ValueError
    For other dtypes, shapes, strides or devices.
RuntimeError
    If a gradient is asked for.
"""

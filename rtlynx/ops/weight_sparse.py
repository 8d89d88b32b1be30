"""The torch operator `rtlynx::gemm_weight_sparse`: an input in e4m3 by a weight of which half is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.forms import by_form
from rtlynx.cuda.sm90.weight_sparse import launch_weight_sparse
from rtlynx.math.formats import FP8_SPARSE
from rtlynx.math.fp8 import E4M3
from rtlynx.math.reference import product_in_float32
from rtlynx.math.tiles import lowrank_bytes, packed_a_bytes, unpack_a, unpack_lowrank
from rtlynx.ops.checks import BFLOAT16, FLOATS, check_size, check_tensor
from rtlynx.ops.registry import operator, refuse_gradients

_Product = Callable[..., Tensor]
_FLOAT32, _BYTES, _E4M3 = (torch.float32,), (torch.uint8,), (E4M3,)


def _check(
    values: Tensor,
    scale: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    lowrank: Tensor | None,
    packed_b: Tensor | None,
) -> None:
    check_tensor("values", values, values, _E4M3)
    check_tensor("scale", scale, values, _FLOAT32)
    check_tensor("packed_weight", packed_weight, values, _BYTES, ("bytes",), packed=True)
    check_tensor("weight_scale", weight_scale, values, _FLOAT32, ("N",), packed=True)
    k = values.shape[-1] if values.ndim else 0
    if not k or k % 4:
        raise ValueError(f"values are (..., K) with K a multiple of 4, got shape {tuple(values.shape)}")
    for name, tensor in (("values", values), ("scale", scale)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is contiguous, got strides {tensor.stride()}: call {name}.contiguous()")
    rows, n = values.numel() // k, weight_scale.shape[0]
    for what, size in (("rows of X", rows), ("inputs", k), ("outputs", n)):
        check_size(what, size)
    if scale.numel() != rows:
        raise ValueError(f"scale holds one number for each of {rows} tokens, got {tuple(scale.shape)}")
    expected = packed_a_bytes(n, k, FP8_SPARSE)
    if packed_weight.shape[0] != expected:
        raise ValueError(
            f"packed_weight of ({n}, {k}) is {expected} bytes, got {packed_weight.shape[0]}: "
            "make it by rtlynx.math.tiles.pack_weight"
        )
    if bias is not None:
        check_tensor("bias", bias, values, FLOATS, ("N",), packed=True)
        if bias.shape[0] != n:
            raise ValueError(f"bias is ({n},) like weight_scale, got {tuple(bias.shape)}")
    refuse_gradients(scale, weight_scale, bias)
    _check_lowrank(values, n, lowrank, packed_b)


def _check_lowrank(values: Tensor, n: int, lowrank: Tensor | None, packed_b: Tensor | None) -> None:
    if lowrank is None or packed_b is None:
        if lowrank is not packed_b:
            raise ValueError("lowrank and packed_b come together, and one is missing")
        return
    check_tensor("lowrank", lowrank, values, BFLOAT16, ("rows", "r"))
    check_tensor("packed_b", packed_b, values, _BYTES, ("bytes",), packed=True)
    rows, rank = values.numel() // values.shape[-1], lowrank.shape[1]
    if lowrank.shape[0] != rows or not rank:
        raise ValueError(f"lowrank is ({rows}, r) with r > 0, got {tuple(lowrank.shape)}")
    expected = lowrank_bytes(n, rank)
    if packed_b.shape[0] != expected:
        raise ValueError(
            f"packed_b of ({n}, {rank}) is {expected} bytes, got {packed_b.shape[0]}: "
            "make it by rtlynx.math.tiles.pack_lowrank"
        )
    refuse_gradients(lowrank)


def _product_reference(
    values: Tensor,
    scale: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    lowrank: Tensor | None,
    packed_b: Tensor | None,
) -> Tensor:
    n = weight_scale.shape[0]
    weight = unpack_a(packed_weight, n, values.shape[1], FP8_SPARSE)
    acc = product_in_float32(values, weight)
    if lowrank is not None and packed_b is not None:
        acc = acc + product_in_float32(lowrank, unpack_lowrank(packed_b, n, lowrank.shape[1]))
    y = acc * weight_scale * scale.unsqueeze(-1)
    return (y if bias is None else y + bias.detach()).bfloat16()


def _product_fake(
    values: Tensor, scale: Tensor, packed_weight: Tensor, weight_scale: Tensor, *_: Tensor | None
) -> Tensor:
    return values.new_empty((values.shape[0], weight_scale.shape[0]), dtype=torch.bfloat16)


def _gemm_weight_sparse(product: _Product, check: Callable[..., None] = _check) -> Callable[..., Tensor]:
    """`gemm_weight_sparse` by an implementation for matrices."""

    def run(
        values: Tensor,
        scale: Tensor,
        packed_weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        lowrank: Tensor | None = None,
        packed_b: Tensor | None = None,
    ) -> Tensor:
        check(values, scale, packed_weight, weight_scale, bias, lowrank, packed_b)
        rows = values.view(-1, values.shape[-1])
        y = product(rows, scale.view(-1), packed_weight, weight_scale, bias, lowrank, packed_b)
        return y if values.ndim == 2 else y.view(*values.shape[:-1], weight_scale.shape[0])

    return run


gemm_weight_sparse: Any = operator(
    "gemm_weight_sparse(Tensor values, Tensor scale, Tensor packed_weight, Tensor weight_scale,"
    " Tensor? bias=None, Tensor? lowrank=None, Tensor? packed_b=None) -> Tensor",
    hopper=_gemm_weight_sparse(launch_weight_sparse, by_form(_check)),  # (a card is faster than the checks)
    reference=_gemm_weight_sparse(_product_reference),
    fake=_gemm_weight_sparse(_product_fake),
)
"""Y = (t ⊗ c) ⊙ (Xq Wq^T + T B'^T) + b, Wq with at most two of every four neighbouring entries not zero.

In float32: (acc * c) * t + b, rounded once.

Parameters
----------
values : Tensor (..., K) float8_e4m3fn, contiguous
    All of X, as from `rtlynx::quantize`; K a multiple of 4.
scale : Tensor (..., 1) or (M,) float32, contiguous
    t of each token; NaN for one that is not finite.
packed_weight : Tensor uint8
    Wq (N, K), as from `rtlynx.math.tiles.pack_weight`.
weight_scale : Tensor (N,) float32
    c of each output channel.
bias : Tensor (N,) bfloat16 | float32, or None
lowrank, packed_b : Tensor (M, r) bfloat16 and Tensor uint8, or None
    T of the values, and B' = B / c (N, r) as from `rtlynx.math.tiles.pack_lowrank`. `rtlynx::lora` makes
    both.

Returns
-------
Tensor (..., N) bfloat16

Raises
------
TypeError, ValueError
    For other dtypes, shapes, strides or devices.
RuntimeError
    If a gradient is asked for.
"""

"""The torch operator `rtlynx::linear_fp8_weights`: few inputs as they are by a weight in e4m3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rtlynx.cuda.forms import by_form
from rtlynx.cuda.sm90.gemv import MAX_COLUMNS, MAX_ROWS, launch_gemv
from rtlynx.math.fp8 import E4M3
from rtlynx.math.reference import product_in_float32
from rtlynx.ops.checks import FLOATS, check_size, check_tensor
from rtlynx.ops.registry import operator, refuse_gradients

_Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
_Check = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


def linear_fp8_weights_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """`linear_fp8_weights` in plain PyTorch, for any floating dtype of `x`; differentiable."""
    y = product_in_float32(functional.silu(x) if silu else x, weight) * weight_scale
    return (y if bias is None else y + bias).to(x.dtype)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, x, FLOATS)
    check_tensor("weight", weight, x, (E4M3,), ("N", "K"))
    check_tensor("weight_scale", weight_scale, x, (torch.float32,), ("N",), packed=True)
    n, k = weight.shape
    if not x.ndim or x.shape[-1] != k or not k:
        raise ValueError(f"x is (..., {k}) like weight ({n}, {k}), with K > 0; got shape {tuple(x.shape)}")
    if k > MAX_COLUMNS:
        raise ValueError(f"inputs of weight are at most {MAX_COLUMNS}, got {k}")
    if x.numel() // k > MAX_ROWS:
        raise ValueError(f"rows of x are at most {MAX_ROWS}, got {x.numel() // k}")
    check_size("outputs of weight", n)
    if weight_scale.shape[0] != n:
        raise ValueError(f"weight_scale is ({n},) like weight, got {tuple(weight_scale.shape)}")
    if bias is not None:
        check_tensor("bias", bias, x, FLOATS, ("N",), packed=True)
        if bias.shape[0] != n:
            raise ValueError(f"bias is ({n},) like weight, got {tuple(bias.shape)}")
    refuse_gradients(x, weight_scale, bias)


def _linear_fp8_weights(product: _Product, check: _Check = _check) -> Callable[..., Tensor]:
    """`linear_fp8_weights` by an implementation for matrices."""

    def run(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, silu: bool = False
    ) -> Tensor:
        check(x, weight, weight_scale, bias)
        y = product(x.reshape(-1, x.shape[-1]), weight, weight_scale, bias, silu)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])

    return run


def _fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    _check(x, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


linear_fp8_weights: Any = operator(
    "linear_fp8_weights(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, bool silu=False)"
    " -> Tensor",
    hopper=_linear_fp8_weights(launch_gemv, by_form(_check)),  # (a card is faster than the checks)
    reference=_linear_fp8_weights(linear_fp8_weights_reference),
    fake=_fake,
)
"""Y = f(X) W^T ⊙ c + b for few rows of X, read once over W: f is SiLU where `silu`, else nothing.

f(X) is rounded to the dtype of `x`, as a module in front would; sums, scale and bias are in float32, and Y is
rounded once. The kernel takes 8 rows (float32: 2) for each pass over W: with more than a few dozen a product
of matrices is faster.

Parameters
----------
x : Tensor (..., K) bfloat16 | float32
weight : Tensor (N, K) float8_e4m3fn
    As from `rtlynx.math.fp8.quantize_weight`; no NaN.
weight_scale : Tensor (N,) float32
    c of each output channel.
bias : Tensor (N,) bfloat16 | float32, or None
silu : bool

Returns
-------
Tensor (..., N) in the dtype of `x`

Raises
------
TypeError, ValueError
    For other dtypes, shapes, strides or devices.
RuntimeError
    If a gradient is asked for.
"""

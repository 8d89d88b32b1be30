"""The original weight W beside a refitted or quantised one, for the rows and steps that run dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rtlynx.math.fp8 import E4M3, quantize_weight
from rtlynx.math.selection import Pattern
from rtlynx.ops import fp8_linear as fp8

if TYPE_CHECKING:
    from rtlynx.nn.sparse_linear import SparseLinear

_ALL = Pattern(1, 1)


def original_of(layer: SparseLinear) -> Tensor:
    """W (N, K); see `SparseLinear.original_weight`."""
    if layer.weight_dense is not None and layer.weight_dense_scale is None:
        return layer.weight_dense
    if not layer.weight_changed:
        return layer.weight
    if layer.weight_dense is not None:
        raise RuntimeError(
            "this layer keeps its original weight in eight bits alone (dense_precision='fp8'): load the "
            "dense model again, or make it sparse with dense_precision='bf16'"
        )
    raise RuntimeError(
        f"this layer was {'refitted' if layer.refitted else 'quantised'} without keeping its original "
        "weight, which dense rows and steps need: make the model sparse with text_rows='dense' or "
        "dense steps to keep both"
    )


def original_bias_of(layer: SparseLinear) -> nn.Parameter | None:
    """b (N,), where `original_of` has W."""
    if layer.bias_dense is None:
        return layer.bias
    return None if layer.intercept == "added" else nn.Parameter(layer.bias_dense, layer.bias.requires_grad)


def keeps_original(layer: SparseLinear) -> bool:
    """Whether `original_of` has W."""
    kept = layer.weight_dense is not None and layer.weight_dense_scale is None
    return kept or not layer.weight_changed


def keep_original(layer: SparseLinear) -> None:
    """Keep W, in e4m3 where `layer.dense_precision` says so; nothing where it is kept already.

    Raises
    ------
    ValueError
        If W is not finite and is to be quantised.
    RuntimeError
        If the weight was changed before and W was not kept.
    """
    if layer.weight_dense is not None:
        return
    original = original_of(layer).detach()
    if layer.dense_precision == "bf16":
        layer.weight_dense = original
    elif original.is_meta:
        layer.weight_dense = original.to(E4M3)
        layer.weight_dense_scale = original.new_empty(layer.out_features, dtype=torch.float32)
    else:
        layer.weight_dense, layer.weight_dense_scale = quantize_weight(original)


def quantized_original(layer: SparseLinear) -> fp8.Fp8Parameters | None:
    """What the original weight multiplies with where it is kept in e4m3; None where it is not."""
    if layer.weight_dense is None or layer.weight_dense_scale is None:
        return None
    bias = layer.bias if layer.bias_dense is None else layer.bias_dense
    return fp8.Fp8Parameters(layer.weight_dense, layer.weight_dense_scale, bias, None, None)


def dense_output(layer: SparseLinear, x: Tensor) -> Tensor:
    """Y (..., N) of `x` (..., K) by the original weight.

    Raises
    ------
    RuntimeError
        If `x` wants a gradient and the weight is kept in e4m3.
    """
    of = quantized_original(layer)
    if of is None:
        return linear(x, original_of(layer), layer.bias if layer.bias_dense is None else layer.bias_dense)
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "original weights in e4m3 (dense_precision='fp8') pass no gradient: call the model under "
            "torch.no_grad(), or make it sparse with dense_precision='bf16'"
        )
    return fp8.dense_linear_fp8(x, fp8.compress_fp8(x, _ALL, "none"), of)

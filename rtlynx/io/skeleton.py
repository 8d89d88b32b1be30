"""Layers of a model that was saved sparse, before their tensors are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtlynx.io.checkpoint import solution_shapes
from rtlynx.io.schema import stored_formats, wrong_numbers
from rtlynx.math.fp8 import E4M3
from rtlynx.nn.solution import Solution
from rtlynx.nn.sparse_linear import SparseLinear


def wrong_tensor(layer: SparseLinear, kind: str, tensor: Tensor) -> str | None:
    """Why `tensor` cannot be the `kind` of `layer`; None where it can."""
    fp8, own = layer.format.quantized, layer.compute_dtype or torch.float32
    base = {"weight": not fp8 and not layer.refitted, "bias": not layer.intercept}
    made = not base.get(kind, False)
    sparse = layer.format.weight_sparse and kind == "weight"  # not the original beside it
    if kind.startswith("weight_dense") and layer.weight_dense_scale is not None:
        kind, fp8 = kind.replace("weight_dense", "weight"), True
    return wrong_numbers(kind, tensor, quantized=fp8, own=own, refitted=made, weight_sparse=sparse)


def empty_solution(entry: dict[str, Any], dtype: torch.dtype) -> Solution:
    """What a stored layer holds, without data."""
    dtypes = {"weight": E4M3 if stored_formats(entry)["quantized"] else dtype, "weight_scale": torch.float32}
    empty: dict[str, Any] = {
        kind: torch.empty(shape, dtype=dtypes.get(kind, dtype), device="meta")
        for kind, shape in solution_shapes(entry).items()
    }
    return Solution(
        **empty, refitted=bool(entry["refitted"]), weight_sparse=stored_formats(entry)["weight_sparse"]
    )

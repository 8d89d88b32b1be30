"""Host side of gemm.cu where the weight is the sparse operand: tiles have channels by tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda import tuning
from rtlynx.cuda.forms import keep, placed_form_of
from rtlynx.cuda.sm90.compress import Addresses, address_of
from rtlynx.cuda.sm90.gemm import Product, new_product, start_gemm
from rtlynx.cuda.sm90.weights import Weights, aligned, readable, stored_columns


def launch_weight_sparse(
    values: Tensor,
    scale: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    lowrank: Tensor | None,
    packed_b: Tensor | None,
) -> Tensor:
    """Y (M, N) of values (M, K) and scale (M,); see `rtlynx.ops.weight_sparse`, which checks."""
    rows, n = values.shape[0], weight_scale.shape[0]
    columns = stored_columns(n)
    out = values.new_empty((rows, columns), dtype=torch.bfloat16)  # (half the time of torch.empty)
    if rows == 0 or n == 0:
        return out[:, :n]
    packed_weight = aligned(packed_weight)
    packed_b = None if packed_b is None else aligned(packed_b)
    product = _product(values, scale, bias, lowrank, n, 0 if packed_b is None else packed_b.shape[0])
    plan, workspace = product.plan, 0
    assert plan is not None
    if plan.workspace_bytes:
        sums = packed_weight.new_empty(plan.workspace_bytes)
        workspace = sums.data_ptr()
    given = Addresses(packed_weight.data_ptr(), weight_scale.data_ptr(), address_of(packed_b))
    start_gemm(product, given, out.data_ptr(), workspace)
    return out if columns == n else out[:, :n].contiguous()


_products: dict[tuple[Any, ...], Product] = {}


def _product(
    values: Tensor, scale: Tensor, bias: Tensor | None, lowrank: Tensor | None, n: int, lowrank_bytes: int
) -> Product:
    """What a launch needs, remembered by the places of these: allocators give activations the same again."""
    places = placed_form_of((values, scale, bias, lowrank))
    form = (n, lowrank_bytes, places, tuning.forced_config())
    product = _products.get(form)
    if product is None:
        # X in the place of a weight, and T in that of its factor: the kernel's columns are tokens.
        of = Weights(readable(values), None if lowrank is None else readable(lowrank), bias, scale)
        product = new_product([of], n, (0,), lowrank_bytes, transposed=True)
        if of.weight is values and of.lowrank_b is lowrank:
            keep(_products, form, product._replace(owners=()))
    return product

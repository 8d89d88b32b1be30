"""A whole linear layer: both kernels over one workspace, with as little host time as it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtlynx.kernels.sm90.compress import (
    Addresses,
    address_of,
    expressible,
    matrix_input,
    plan_compress,
    start_compress,
)
from rtlynx.kernels.sm90.gemm import Weights, plan_gemm, readable_bias, start_gemm, stored_columns

# Alignment inside the workspace; the allocator's own is more.
_ALIGNMENT = 16


def launch_linear(
    x: Tensor,
    of: Weights,
    down: Tensor | None,
    grouping: str,
    parts: Sequence[int],
    norm: bool,
) -> Tensor:
    """Y (rows, N) of `rtlynx::linear`; see `rtlynx.kernels.ops`, which checks and prepares weights."""
    x = expressible(x)
    n = of.weight.shape[0]
    columns = stored_columns(n)
    given = matrix_input(x)
    rows = given.rows
    out = x.new_empty(rows, columns)
    if rows == 0 or n == 0:
        return out[:, :n]
    if down is not None and not down.is_contiguous():
        down = down.contiguous()
    compression = plan_compress(given, down, grouping, parts)
    product = plan_gemm(of.weight, of.up, rows)

    scale_bytes = -(-rows * 4 // _ALIGNMENT) * _ALIGNMENT if norm else 0
    to_lowrank = compression.blocks_bytes
    to_scale = to_lowrank + compression.lowrank_bytes
    to_sums = to_scale + scale_bytes
    workspace = x.new_empty(to_sums + product.workspace_bytes, dtype=torch.uint8)
    start = workspace.data_ptr()
    compressed = Addresses(start, start + to_scale if norm else 0, start + to_lowrank)
    start_compress(compression, given, address_of(down), compressed)
    sums = start + to_sums if product.workspace_bytes else 0
    start_gemm(product, compressed, of._replace(bias=readable_bias(of.bias)), out.data_ptr(), sums)
    return out if columns == n else out[:, :n].contiguous()

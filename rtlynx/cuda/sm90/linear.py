"""A whole linear layer: both kernels over one workspace, with as little host time as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx.cuda.sm90.compress import (
    Addresses,
    CompressOptions,
    address_of,
    plan_compress,
    start_compress,
)
from rtlynx.cuda.sm90.gemm import product_of, start_gemm
from rtlynx.cuda.sm90.prologues import bind_matrix, expressible
from rtlynx.cuda.sm90.weights import Weights, stored_columns

# Alignment inside the workspace; the allocator's own is more.
_ALIGNMENT = 16


def launch_linear(x: Tensor, of: Weights, lowrank_a: Tensor | None, options: CompressOptions) -> Tensor:
    """Y (rows, N) of `rtlynx::linear`; see `rtlynx.ops.sparse_linear`, which checks."""
    x = expressible(x)
    n = of.weight.shape[0]
    columns = stored_columns(n)
    given = bind_matrix(x)
    rows = given.rows
    out = x.new_empty((rows, columns))
    if rows == 0 or n == 0:
        return out[:, :n]
    if lowrank_a is not None and not lowrank_a.is_contiguous():
        lowrank_a = lowrank_a.contiguous()
    compression = plan_compress(given, lowrank_a, options)
    product = product_of([of], rows, (0,), compression.lowrank_bytes)
    assert product.plan is not None

    scale_bytes = -(-compression.scales * 4 // _ALIGNMENT) * _ALIGNMENT
    to_lowrank = compression.packed_a_bytes
    to_scale = to_lowrank + compression.lowrank_bytes
    to_sums = to_scale + scale_bytes
    workspace = x.new_empty(to_sums + product.plan.workspace_bytes, dtype=torch.uint8)
    start = workspace.data_ptr()
    compressed = Addresses(start, start + to_scale if compression.scales else 0, start + to_lowrank)
    start_compress(compression, given, address_of(lowrank_a), compressed)
    sums = start + to_sums if product.plan.workspace_bytes else 0
    start_gemm(product, compressed, out.data_ptr(), sums)
    return out if columns == n else out[:, :n].contiguous()

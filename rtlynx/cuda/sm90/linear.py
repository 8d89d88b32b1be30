"""A whole linear layer: both kernels over one workspace, with as little host time as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import tuning
from rtlynx.cuda.forms import keep, placed_form_of
from rtlynx.cuda.sm90.compress import (
    Addresses,
    CompressOptions,
    CompressPlan,
    address_of,
    plan_compress,
    start_compress,
)
from rtlynx.cuda.sm90.gemm import Product, product_of, start_gemm
from rtlynx.cuda.sm90.prologues import MATRIX, BoundPrologue, bind_matrix, expressible, pack_matrix
from rtlynx.cuda.sm90.weights import Weights, stored_columns

# Alignment inside the workspace; the allocator's own is more.
_ALIGNMENT = 16


class _Call(NamedTuple):
    """What a call needs that depends on the form of X and on the places of weights.

    strides : fields of `MATRIX` for X, but its address
    lowrank_a : address of A^T, or 0
    to_scale, to_lowrank, to_sums, workspace_bytes : parts of the workspace, of which A is the first
    """

    compression: CompressPlan
    product: Product
    given: BoundPrologue
    strides: tuple[int, ...]
    lowrank_a: int
    to_scale: int
    to_lowrank: int
    to_sums: int
    workspace_bytes: int


_calls: dict[tuple[Any, ...], _Call] = {}


def launch_linear(
    x: Tensor,
    of: Weights,
    lowrank_a: Tensor | None,
    how: tuple[Any, ...],
    check: Callable[[], CompressOptions],
) -> Tensor:
    """Y (rows, N) of `rtlynx::linear`; see `rtlynx.ops.sparse_linear`.

    `check` refuses arguments and gives the options that `how` stands for; it is called once for each form of
    them, or always where gradients are recorded.
    """
    x = expressible(x)
    if lowrank_a is not None and not lowrank_a.is_contiguous():
        lowrank_a = lowrank_a.contiguous()
    address = x.data_ptr()
    form = (
        *(x.dtype, x.shape, x.stride(), x.get_device(), address % 16, how),
        *(placed_form_of((*of, lowrank_a)), tuning.forced_config()),
    )
    call = None if torch.is_grad_enabled() else _calls.get(form)
    if call is None:
        options = check()
        n, k = of.weight.shape
        if x.numel() == 0 or n == 0:
            return x.new_empty((x.numel() // k, n))
        call = _plan(x, of, lowrank_a, options)
        if (
            not call.product.owners
        ):  # copies of weights; a product that needs none has no more when asked again
            keep(_calls, form, call)
    given = call.given._replace(parameters=MATRIX.pack(address, *call.strides))
    n = call.product.n
    columns = stored_columns(n)
    out = x.new_empty((given.rows, columns))
    workspace = x.new_empty(call.workspace_bytes, dtype=torch.uint8)
    start = workspace.data_ptr()
    compressed = Addresses(
        start, start + call.to_scale if call.compression.scales else 0, start + call.to_lowrank
    )
    start_compress(call.compression, given, call.lowrank_a, compressed)
    sums = start + call.to_sums if call.workspace_bytes > call.to_sums else 0
    start_gemm(call.product, compressed, out.data_ptr(), sums)
    return out if columns == n else out[:, :n].contiguous()


def _plan(x: Tensor, of: Weights, lowrank_a: Tensor | None, options: CompressOptions) -> _Call:
    given = bind_matrix(x)
    compression = plan_compress(given, lowrank_a, options)
    product = product_of([of], given.rows, (0,), compression.lowrank_bytes)
    assert product.plan is not None
    to_lowrank = compression.packed_a_bytes
    to_scale = to_lowrank + compression.lowrank_bytes
    to_sums = to_scale + -(-compression.scales * 4 // _ALIGNMENT) * _ALIGNMENT
    (_, *strides), _ = pack_matrix(x)
    places = to_scale, to_lowrank, to_sums, to_sums + product.plan.workspace_bytes
    return _Call(compression, product, given, tuple(strides), address_of(lowrank_a), *places)

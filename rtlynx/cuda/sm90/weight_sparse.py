"""Host side of gemm.cu where weights are the sparse operands: tiles have channels by tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda import tuning
from rtlynx.cuda.forms import keep, placed_form_of
from rtlynx.cuda.sm90.gemm import GemmShape, Product, new_product, output_of
from rtlynx.cuda.sm90.weights import Weights, aligned, readable

_products: dict[tuple[Any, ...], Product] = {}


def launch_weight_sparse(
    values: Tensor,
    scale: Tensor,
    layers: Sequence[Weights],
    lowranks: Sequence[Tensor | None],
    lengths: tuple[int, ...],
    check: Callable[[], None],
) -> Tensor:
    """Y (M, sum of N) of values (..., K) and scale; see `rtlynx.ops.weight_sparse`.

    `check` refuses operands, once for each form and place of them and `lengths`: allocators give activations
    the same places again.
    """
    tensors = *lowranks, *itertools.chain(*layers)
    form = placed_form_of((values, scale, *tensors)), lengths, tuning.forced_config()
    product = None if torch.is_grad_enabled() else _products.get(form)
    if product is None:
        check()
        rows = values.view(-1, values.shape[-1])
        # X in the place of a weight, and T in that of its factor: the kernel's columns are tokens.
        x, ts = readable(rows), [None if t is None else readable(t) for t in lowranks]
        dense = [Weights(x, t, of.bias, scale) for t, of in zip(ts, layers, strict=True)]
        own = [_aligned(of) for of in layers]
        widths = tuple(of.column_scale.shape[0] for of in layers if of.column_scale is not None)
        ranks = tuple(0 if t is None else t.shape[1] for t in ts)
        m, k = rows.shape
        shape = GemmShape(m, k, widths, ranks, (0,) * len(own), 0, transposed=True)
        product = new_product(dense, shape, own)
        read = x, *ts, *itertools.chain(*own)
        if all(one is other for one, other in zip(read, (rows, *tensors), strict=True)):
            product = product._replace(owners=())
            keep(_products, form, product)
    return output_of(product, values.numel() // values.shape[-1], values)


def _aligned(of: Weights) -> Weights:
    """A packed weight and its packed B."""
    packed_b = None if of.lowrank_b is None else aligned(of.lowrank_b)
    return of._replace(weight=aligned(of.weight), lowrank_b=packed_b)

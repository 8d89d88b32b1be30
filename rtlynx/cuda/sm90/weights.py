"""What a product multiplies by, in memory as the kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE, Format

STORE_COLUMNS = 8  # Y leaves 16 bytes at a time
_MAX_STRIDE = 2**31 - 1  # of rows, in entries


class Weights(NamedTuple):
    """What a product multiplies by, on its device; `readable_weights` makes it so that kernels can read it.

    weight : (N, K) bf16 or e4m3, in compute order; or a packed 2:4 one
    lowrank_b : (N, r) bf16 or None; packed like the weight
    bias : (N,) bf16 or float32, or None
    column_scale : (N,) float32 of an e4m3 weight, else None
    """

    weight: Tensor
    lowrank_b: Tensor | None
    bias: Tensor | None
    column_scale: Tensor | None = None

    @property
    def format(self) -> Format:
        return BF16_SPARSE if self.column_scale is None else FP8_SPARSE


def stored_columns(n: int) -> int:
    """Columns of Y in memory: rows start at multiples of 16 bytes."""
    return -(-n // STORE_COLUMNS) * STORE_COLUMNS


def aligned(vector: Tensor) -> Tensor:
    """`vector`, or a copy where it begins at no multiple of 16 bytes, as bulk copies need it."""
    return vector.clone() if vector.data_ptr() % 16 else vector


def readable_weights(of: Weights) -> Weights:
    """`of`, with copies where rows start at no multiples of 16 bytes, or vectors end before Y is stored."""
    return Weights(
        _mapped(of.weight),
        None if of.lowrank_b is None else _mapped(of.lowrank_b),
        _readable_vector(of.bias),
        _readable_vector(of.column_scale),
    )


def readable(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy where its rows do not start at multiples of 16 bytes, as bulk copies need them."""
    row, column = matrix.stride()
    if column != 1 or row * matrix.element_size() % 16 or row > _MAX_STRIDE or matrix.data_ptr() % 16:
        return _padded(matrix)
    return matrix


def _mapped(matrix: Tensor) -> Tensor:
    """`readable`, for tensor maps, whose rows do not overlap."""
    return readable(matrix) if matrix.stride(0) >= matrix.shape[1] else _padded(matrix)


def _padded(matrix: Tensor) -> Tensor:
    """A copy whose rows start at multiples of 16 bytes."""
    # (As bytes, which can be padded whatever they hold; clone: padding by nothing is no copy.)
    format = matrix.contiguous().view(torch.uint8)
    copy = pad(format, (0, -format.shape[1] % 16)).clone(memory_format=torch.contiguous_format)
    return copy.view(matrix.dtype)


def _readable_vector(vector: Tensor | None) -> Tensor | None:
    """`vector`, or a copy that can be read in aligned pairs as far as Y is stored."""
    if vector is None:
        return None
    n = vector.shape[0]
    if n % STORE_COLUMNS or not vector.is_contiguous() or vector.data_ptr() % 8:
        return pad(vector, (0, stored_columns(n) - n)).clone()
    return vector

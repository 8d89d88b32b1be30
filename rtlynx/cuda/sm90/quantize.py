"""Host side of quantize.cu: configurations, parameters, launch. What is quantised comes as an `Input`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import jit
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.sm90.compress import (
    ADALN,
    CONCAT_GELU,
    GELU,
    MATRIX,
    RMSNORM,
    SILU_GATE,
    SOURCE_BYTES,
    Input,
    address_of,
)
from rtlynx.math.fp8 import E4M3

MAX_COLUMNS = 16384
_VECTOR, _WARP = 8, 32  # columns that a thread loads at a time; threads
# The kernel's Parameters: its Source, and then.
_ADDRESSES, _SHAPE = struct.Struct("<3Q"), struct.Struct("<2i")


class _Form(NamedTuple):
    """What a block takes at one time, by rows of up to `columns`; the most whose registers do not spill.

    chunks : vectors of each row that a thread holds
    blocks_per_sm : blocks for the longest rows that a multiprocessor is to hold, which bounds the registers
    """

    columns: int
    rows: int
    chunks: int
    blocks_per_sm: int

    def threads(self, columns: int) -> int:
        """Whole warps, for rows of `columns`."""
        return -(-columns // (self.chunks * _VECTOR * _WARP)) * _WARP


_SHORT = _Form(4096, 2, 4, 5)  # two rows, so that a modulation is read once for both
_LONG, _LONG_WITH_MORE = _Form(MAX_COLUMNS, 1, 8, 3), _Form(MAX_COLUMNS, 1, 4, 2)
_FORMS = {
    MATRIX: (_SHORT, _LONG),
    ADALN: (_SHORT, _LONG_WITH_MORE),
    RMSNORM: (_SHORT, _LONG_WITH_MORE),
    GELU: (_SHORT, _LONG),
    SILU_GATE: (_SHORT, _LONG_WITH_MORE),
    CONCAT_GELU: (_SHORT, _LONG),
}


def _defines(source: int, form: _Form) -> Defines:
    return (
        ("PROLOGUE", source),
        ("ROWS", form.rows),
        ("CHUNKS", form.chunks),
        ("MAX_THREADS", form.threads(form.columns)),
        ("MIN_CTAS", form.blocks_per_sm),
        ("PARAMETER_BYTES", SOURCE_BYTES[source] + _ADDRESSES.size + _SHAPE.size),
    )


INSTANTIATIONS = [
    Instantiation("quantize.cu", "quantize", _defines(source, form))
    for source, forms in _FORMS.items()
    for form in forms
]


def _form(source: int, columns: int) -> _Form:
    return next(form for form in _FORMS[source] if columns <= form.columns)


@functools.cache
def _kernel(source: int, columns: int) -> jit.Kernel:
    form = _form(source, columns)
    threads, defines = form.threads(columns), _defines(source, form)
    return jit.load("quantize.cu", "quantize", defines, threads=threads, shared_bytes=0, pdl=True)


def takes(columns: int) -> bool:
    """Whether the kernel takes rows of so many columns: whole vectors, and a row at one time."""
    return columns % _VECTOR == 0 and 0 < columns <= MAX_COLUMNS


def fits(x: Input) -> bool:
    """Whether the kernel can read `x`, 16 bytes at a time."""
    return x.aligned and takes(x.columns)


def launch(x: Input, shape: Sequence[int], dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise `x`, which `fits`, on the current stream; a producer also writes what it quantised to `dense`.

    dense : (rows, columns) bfloat16, to test what a producer makes

    Returns
    -------
    values : Tensor float8_e4m3fn of `shape` (..., K), contiguous
    scale : Tensor (..., 1) float32
    """
    values = torch.empty(shape, dtype=E4M3, device=x.device)
    scale = torch.empty((*shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.rows:
        addresses = _ADDRESSES.pack(values.data_ptr(), scale.data_ptr(), address_of(dense))
        parameters = b"".join((x.structure, addresses, _SHAPE.pack(x.rows, x.columns)))
        grid = -(-x.rows // _form(x.source, x.columns).rows), 1, 1
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        _kernel(x.source, x.columns).launch(grid, stream, parameters)
    return values, scale

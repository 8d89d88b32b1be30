"""Host side of quantize.cu: configurations, parameters, launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rtlynx.cuda import jit
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.layout import Layout
from rtlynx.cuda.sm90.compress import address_of
from rtlynx.cuda.sm90.prologues import IDENTITY, PROLOGUES, BoundPrologue, Prologue
from rtlynx.cuda.sm90.whole_rows import MODULATION_OF_TOKENS, VECTOR, RowsConfig
from rtlynx.math.fp8 import E4M3

MAX_COLUMNS = 16384


@functools.cache
def _parameters(prologue: Prologue) -> Layout:
    """The kernel's `Parameters`."""
    return Layout(
        ("prologue", prologue.layout),
        *((name, "pointer") for name in ("values", "scale", "dense")),
        *((name, "int") for name in ("rows", "columns")),
    )


# What follows the prologue: the same bytes for all of them.
_, _REST = _parameters(IDENTITY).pieces("values")


_SHORT = RowsConfig(4096, 2, 4, 5)  # two rows, so that a modulation is read once for both
_LONG, _LONG_OF_MANY_REGISTERS = RowsConfig(MAX_COLUMNS, 1, 8, 3), RowsConfig(MAX_COLUMNS, 1, 4, 2)


def _configs(prologue: Prologue) -> tuple[RowsConfig, ...]:
    """For short and for long rows."""
    if prologue.named("tokens"):
        return MODULATION_OF_TOKENS
    return _SHORT, _LONG_OF_MANY_REGISTERS if prologue.many_registers else _LONG


def _defines(prologue: Prologue, config: RowsConfig) -> Defines:
    return (
        (prologue.macro, 1),
        *config.defines,
        *_parameters(prologue).defines,
    )


INSTANTIATIONS = [
    Instantiation("quantize.cu", "quantize", _defines(prologue, config))
    for prologue in PROLOGUES.values()
    for config in _configs(prologue)
]


def _config(prologue: Prologue, columns: int) -> RowsConfig:
    return next(config for config in _configs(prologue) if columns <= config.columns)


@functools.cache
def _kernel(prologue: Prologue, columns: int) -> jit.Kernel:
    config = _config(prologue, columns)
    threads, defines = config.threads(columns), _defines(prologue, config)
    return jit.load("quantize.cu", "quantize", defines, threads=threads, shared_bytes=0, pdl=True)


def takes(columns: int) -> bool:
    """Whether the kernel takes rows of so many columns: whole vectors, and a row at one time."""
    return columns % VECTOR == 0 and 0 < columns <= MAX_COLUMNS


def fits(x: BoundPrologue) -> bool:
    """Whether the kernel can read `x`, 16 bytes at a time."""
    return x.aligned and takes(x.columns)


def launch(x: BoundPrologue, shape: Sequence[int], dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise `x`, which `fits`, on the current stream; a prologue also writes its result to `dense`.

    dense : (rows, columns) bfloat16, to test what a prologue makes

    Returns
    -------
    values : Tensor float8_e4m3fn of `shape` (..., K), contiguous
    scale : Tensor (..., 1) float32
    """
    values = torch.empty(shape, dtype=E4M3, device=x.device)
    scale = values.new_empty((*shape[:-1], 1), dtype=torch.float32)
    if x.rows:
        rest = _REST.pack(values.data_ptr(), scale.data_ptr(), address_of(dense), x.rows, x.columns)
        parameters = x.parameters + rest
        grid = -(-x.rows // _config(x.prologue, x.columns).rows), 1, 1
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        _kernel(x.prologue, x.columns).launch(grid, stream, parameters)
    return values, scale

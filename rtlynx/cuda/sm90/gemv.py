"""Host side of gemv.cu: configurations, parameters, launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.cuda import jit
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.layout import Layout
from rtlynx.cuda.sm90.compress import address_of
from rtlynx.cuda.sm90.prologues import IDENTITY
from rtlynx.cuda.sm90.weights import readable

_THREADS, _TILE_N, _CHUNK, _PADDING = 256, 32, 64, 8
_COLUMNS = 8  # of a product
_VECTOR = 16  # bytes of W that a lane reads together
_MAX_SHARED = 200 << 10  # bytes of X at a time
MAX_COLUMNS = 1 << 15  # of which the three columns of a float32 row still fit
MAX_ROWS = 65535  # a grid takes so many passes, of one row at least
_PARTS = {False: 1, True: 3}  # columns that a row takes, by whether it is float32
_DEPTH, _MIN_CTAS = 4, 3  # 78 registers

_PARAMETERS = Layout(
    *((name, "pointer") for name in ("weight", "scale", "bias", "x", "y")),
    *((name, "int64") for name in ("weight_stride", "x_stride")),
    *((name, "int") for name in ("rows", "rows_per_pass", "n", "k", "bias_is_float32", "silu")),
)


def _defines(float32: bool) -> Defines:
    return (
        (IDENTITY.macro, 1),
        ("FLOAT32", int(float32)),
        ("THREADS", _THREADS),
        ("TILE_N", _TILE_N),
        ("CHUNK", _CHUNK),
        ("PADDING", _PADDING),
        ("COLUMNS", _COLUMNS),
        ("PARTS", _PARTS[float32]),
        ("DEPTH", _DEPTH),
        ("MIN_CTAS", _MIN_CTAS),
        *_PARAMETERS.defines,
    )


INSTANTIATIONS = [Instantiation("gemv.cu", "gemv", _defines(float32)) for float32 in (False, True)]


@functools.cache
def _kernel(float32: bool, shared_bytes: int) -> jit.Kernel:
    return jit.load(
        "gemv.cu", "gemv", _defines(float32), threads=_THREADS, shared_bytes=shared_bytes, pdl=True
    )


def launch_gemv(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Y (M, N) of X (M, K), on the current stream; see `rtlynx.ops.fp8_weights`, which checks."""
    rows, n, float32 = x.shape[0], weight.shape[0], x.dtype is torch.float32
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    missing = -x.shape[1] % _VECTOR
    if missing:  # (as bytes, which can be padded whatever they hold)
        x = pad(x, (0, missing))
        weight = pad(weight.view(torch.uint8), (0, missing))
    x, weight = readable(x), readable(weight)
    k = x.shape[1]
    column_bytes = 2 * (-(-k // _CHUNK) * _CHUNK + _PADDING)
    row_bytes = _PARTS[float32] * column_bytes
    rows_per_pass = min(rows, _COLUMNS // _PARTS[float32], _MAX_SHARED // row_bytes)
    parameters = _PARAMETERS.pack(
        *(weight.data_ptr(), weight_scale.data_ptr(), address_of(bias), x.data_ptr(), y.data_ptr()),
        *(weight.stride(0), x.stride(0), rows, rows_per_pass, n, k),
        *(bias is not None and bias.dtype is torch.float32, silu),
    )
    grid = -(-n // _TILE_N), -(-rows // rows_per_pass), 1
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    _kernel(float32, rows_per_pass * row_bytes).launch(grid, stream, parameters)
    return y

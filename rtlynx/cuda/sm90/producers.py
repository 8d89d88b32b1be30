"""Host side of prologues.cuh: the elementwise chains that compress.cu can run before it selects.

Each function takes tensors that `rtlynx.ops.compress_prologues` has checked: bfloat16, last stride 1, rows at
multiples of 16 bytes, groups that are read 16 bytes at a time (`vectors_fit`), and returns an `Input`.
"""

from __future__ import annotations

import struct

from torch import Tensor

from rtlynx.cuda.sm90.compress import (
    ADALN,
    CONCAT_GELU,
    GELU,
    RMSNORM,
    SILU_GATE,
    Input,
    pack_matrix,
)

_pack_modulation = struct.Struct("<QQif").pack
_pack_columns = struct.Struct("<i4x").pack


def adaln(x: Tensor, shift: Tensor, scale: Tensor, epsilon: float) -> Input:
    """layer_norm(x) * (1 + scale) + shift of x (B, T, K); shift, scale (B, K) or (1, K) with one stride."""
    return _modulated(ADALN, x, shift, scale, epsilon)


def rmsnorm(x: Tensor, weight: Tensor, scale: Tensor, epsilon: float) -> Input:
    """rms_norm(x) * weight * scale of x (B, T, K); weight (K,), scale (B, K) or (1, K)."""
    return _modulated(RMSNORM, x, weight, scale, epsilon)


def _modulated(source: int, x: Tensor, first: Tensor, second: Tensor, epsilon: float) -> Input:
    stride = second.stride(0) if second.shape[0] > 1 else 0
    structure, aligned = pack_matrix(x, batches=True)
    modulation = _pack_modulation(first.data_ptr(), second.data_ptr(), stride, epsilon)
    k = x.shape[-1]
    return Input(source, structure + modulation, x.numel() // k, k, x.device, aligned)


def gelu(x: Tensor) -> Input:
    """gelu(x), tanh form."""
    structure, aligned = pack_matrix(x)
    return Input(GELU, structure, x.numel() // x.shape[-1], x.shape[-1], x.device, aligned)


def silu_gate(a: Tensor, b: Tensor) -> Input:
    """silu(a) * b."""
    (first, aligned_a), (second, aligned_b) = pack_matrix(a), pack_matrix(b)
    k = a.shape[-1]
    return Input(SILU_GATE, first + second, a.numel() // k, k, a.device, aligned_a and aligned_b)


def concat_gelu(a: Tensor, b: Tensor) -> Input:
    """cat(a, gelu(b)) along the columns; a has a multiple of 8."""
    (first, aligned_a), (second, aligned_b) = pack_matrix(a), pack_matrix(b)
    columns = a.shape[-1]
    structure = first + second + _pack_columns(columns)
    return Input(
        CONCAT_GELU,
        structure,
        a.numel() // columns,
        columns + b.shape[-1],
        a.device,
        aligned_a and aligned_b,
    )

"""Host side of compress.cu: configurations, parameters, launch."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtlynx.kernels import jit
from rtlynx.kernels.blocks import BLOCK_BYTES, BLOCK_K, BLOCK_ROWS, LOWRANK_BYTES, LOWRANK_COLUMNS
from rtlynx.kernels.jit import Defines, Instantiation

_ADJACENT, _STRIDED, _GATHER = range(3)
_MATRIX = 0
_MAX_PARTS = 8
_RANK_TILES = (0, 4, 8)


@dataclass(frozen=True)
class Shape:
    """How a CTA is cut: rows in groups of 16, warps that split K, CTAs of a cluster that split K further."""

    row_groups: int
    k_warps: int
    cluster: int
    ctas: int  # that fit a multiprocessor

    @property
    def threads(self) -> int:
        return self.row_groups * self.k_warps * 32


_PLAIN = Shape(row_groups=1, k_warps=8, cluster=1, ctas=2)
_WITH_RANK = Shape(row_groups=4, k_warps=2, cluster=4, ctas=2)


def _shape(rank_tiles: int) -> Shape:
    return _WITH_RANK if rank_tiles else _PLAIN


def _defines(source: int, mode: int, rank_tiles: int) -> Defines:
    shape = _shape(rank_tiles)
    return (
        ("SOURCE", source),
        ("MODE", mode),
        ("RANK_TILES", rank_tiles),
        ("ROW_GROUPS", shape.row_groups),
        ("K_WARPS", shape.k_warps),
        ("CLUSTER", shape.cluster),
        ("MIN_CTAS", shape.ctas),
    )


INSTANTIATIONS = [
    Instantiation("compress.cu", "compress", _defines(_MATRIX, mode, rank_tiles))
    for mode in (_ADJACENT, _STRIDED, _GATHER)
    for rank_tiles in _RANK_TILES
]

_kernels: dict[tuple[int, int, int], jit.Kernel] = {}


def _kernel(source: int, mode: int, rank_tiles: int) -> jit.Kernel:
    kernel = _kernels.get((source, mode, rank_tiles))
    if kernel is None:
        threads = _shape(rank_tiles).threads
        kernel = _kernels[source, mode, rank_tiles] = jit.load(
            "compress.cu",
            "compress",
            _defines(source, mode, rank_tiles),
            threads=threads,
            shared_bytes=0,
            pdl=True,
        )
    return kernel


@functools.lru_cache(maxsize=1024)
def _groups(grouping: str, parts: tuple[int, ...], k: int) -> tuple[int, bool, tuple[int, ...]]:
    """Mode where everything is aligned, whether groups are adjacent, and the kernel's table of parts."""
    if grouping == "adjacent":
        return (_ADJACENT if k % 8 == 0 else _GATHER), True, (1, k // 4, *[0] * (2 * _MAX_PARTS - 1))
    widths = parts or (k,)
    if len(widths) > _MAX_PARTS:
        raise ValueError(f"the kernels take at most {_MAX_PARTS} parts, got {len(widths)}")
    aligned = all(width % 32 == 0 for width in widths)
    table: list[int] = []
    begin = 0
    for width in widths:
        table += [(begin + width) // 4, begin]
        begin += width
    return (
        (_STRIDED if aligned else _GATHER),
        False,
        (len(widths), *table, *[0] * (2 * _MAX_PARTS - len(table))),
    )


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """`x` (..., K) as (tensor, rows, batch stride, row stride, rows of a batch), copied only where it must be."""
    k = x.shape[-1]
    rows = x.numel() // k
    if x.dim() == 2:
        return x, rows, 0, x.stride(0), max(rows, 1)
    if x.is_contiguous():
        return x, rows, 0, k, max(rows, 1)
    if x.dim() == 3:
        return x, rows, x.stride(0), x.stride(1), max(x.shape[1], 1)
    return x.contiguous(), rows, 0, k, max(rows, 1)


_pack = struct.Struct("<Qqqi4x4Q6i17i4x").pack


def launch_compress(
    x: Tensor, down: Tensor | None, grouping: str, parts: Sequence[int], norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, s and blocks of T of `rtlynx::compress`; see `rtlynx.kernels.ops`. Arguments are checked there."""
    k = x.shape[-1]
    x, rows, batch_stride, row_stride, rows_per_batch = rows_of(x)
    slabs, k_blocks = -(-rows // BLOCK_ROWS), -(-k // BLOCK_K)
    rank = 0 if down is None else down.shape[0]
    rank_blocks = -(-rank // LOWRANK_COLUMNS)
    device = x.device
    blocks = torch.empty(slabs * k_blocks * BLOCK_BYTES, dtype=torch.uint8, device=device)
    lowrank = torch.empty(slabs * rank_blocks * LOWRANK_BYTES, dtype=torch.uint8, device=device)
    scale = torch.empty(rows if norm else 0, dtype=torch.float32, device=device)
    if rows == 0:
        return blocks, scale, lowrank
    mode, adjacent, table = _groups(grouping, tuple(parts), k)
    address, down_address = x.data_ptr(), 0
    aligned = address | (row_stride | batch_stride) * 2
    if down is not None:
        if not down.is_contiguous():
            down = down.contiguous()
        down_address = down.data_ptr()
        aligned |= down_address
    if aligned % 16:
        mode = _GATHER
    rank_tiles = 0 if rank == 0 else 4 if rank <= 32 else 8
    shape = _shape(rank_tiles)
    parameters = _pack(
        address,
        batch_stride,
        row_stride,
        rows_per_batch,
        down_address,
        blocks.data_ptr(),
        scale.data_ptr() if norm else 0,
        lowrank.data_ptr() if rank else 0,
        rows,
        k,
        k_blocks,
        rank,
        rank_blocks,
        adjacent,
        *table,
    )
    grid = (
        slabs * BLOCK_ROWS // (16 * shape.row_groups) * shape.cluster,
        1 if rank_tiles == 0 else -(-rank // (8 * rank_tiles)),
        1,
    )
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    _kernel(_MATRIX, mode, rank_tiles).launch(grid, stream, parameters)
    return blocks, scale, lowrank

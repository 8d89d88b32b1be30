"""Host side of compress.cu: configurations, parameters, launch."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from rtlynx.kernels import jit
from rtlynx.kernels.blocks import BLOCK_BYTES, BLOCK_K, BLOCK_ROWS, LOWRANK_BYTES, LOWRANK_COLUMNS
from rtlynx.kernels.jit import Defines, Instantiation
from rtlynx.kernels.tuning import SMS

_THREADS = 128
_ADJACENT, _STRIDED, _GATHER = range(3)
_MATRIX = 0
_MAX_PARTS = 8
_RANKS = (0, 32, 64, 128)
# By whether groups are adjacent, and rank: units of K in shared memory, blocks that a multiprocessor holds.
_STAGES_AND_BLOCKS = {
    (True, 0): (5, 5),
    (True, 32): (4, 4),
    (True, 64): (3, 4),
    (True, 128): (3, 3),
    (False, 0): (3, 4),
    (False, 32): (2, 4),
    (False, 64): (2, 3),
    (False, 128): (2, 2),
}
_FITTING = 0.93  # clusters leave some multiprocessors of a card unused
_MAX_CLUSTER = 8


def _stages(mode: int, rank: int) -> int:
    return _STAGES_AND_BLOCKS[mode == _ADJACENT, rank][0]


def _blocks_per_sm(mode: int, rank: int) -> int:
    blocks = _STAGES_AND_BLOCKS[mode == _ADJACENT, rank][1]
    return min(blocks, 2) if mode == _GATHER and rank else blocks


def _defines(source: int, mode: int, rank: int) -> Defines:
    return (
        ("SOURCE", source),
        ("MODE", mode),
        ("RANK", rank),
        ("STAGES", _stages(mode, rank)),
        ("MIN_CTAS", _blocks_per_sm(mode, rank)),
    )


def _shared_bytes(raws: int, mode: int, rank: int) -> int:
    tiles = 2 if mode == _ADJACENT else 4
    stages = _stages(mode, rank) * tiles * 64 * (raws * BLOCK_ROWS + rank)
    return max(stages, BLOCK_ROWS * (rank + 4) * 4 if rank else 0)


INSTANTIATIONS = [
    Instantiation("compress.cu", "compress", _defines(_MATRIX, mode, rank))
    for mode in (_ADJACENT, _STRIDED, _GATHER)
    for rank in _RANKS
]

_kernels: dict[tuple[int, int, int, int], jit.Kernel] = {}


def _kernel(source: int, mode: int, rank: int, cluster: int) -> jit.Kernel:
    key = (source, mode, rank, cluster)
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = jit.load(
            "compress.cu",
            "compress",
            _defines(source, mode, rank),
            threads=_THREADS,
            shared_bytes=_shared_bytes(1, mode, rank),
            pdl=True,
            cluster=cluster,
        )
    return kernel


@functools.lru_cache(maxsize=1024)
def _cluster(slabs: int, mode: int, rank: int, k_blocks: int) -> int:
    """Blocks that share the K of a slab: as many as the card holds at once and as K has work for."""
    room = int(_blocks_per_sm(mode, rank) * SMS * _FITTING)
    units = k_blocks if mode == _ADJACENT else -(-k_blocks // 2)
    return max(1, min(_MAX_CLUSTER, room // slabs, units))


@functools.lru_cache(maxsize=1024)
def _groups(grouping: str, parts: tuple[int, ...], k: int) -> tuple[int, bool, tuple[int, ...]]:
    """Mode where everything is aligned, whether groups are adjacent, and the kernel's table of parts."""
    if grouping == "adjacent":
        return (_ADJACENT if k % 8 == 0 else _GATHER), True, (1, k // 4, *[0] * (2 * _MAX_PARTS - 1))
    widths = parts or (k,)
    if len(widths) > _MAX_PARTS:
        raise ValueError(f"the kernels take at most {_MAX_PARTS} parts, got {len(widths)}")
    # Eight groups that a lane holds lie in one part, at whole 16-byte vectors.
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


_pack = struct.Struct("<Qqqi4x5Q6i17i4x").pack


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
    tile_rank = next((size for size in _RANKS if size >= rank), _RANKS[-1])
    cluster = _cluster(slabs, mode, tile_rank, k_blocks)
    parameters = _pack(
        address,
        batch_stride,
        row_stride,
        rows_per_batch,
        down_address,
        blocks.data_ptr(),
        scale.data_ptr() if norm else 0,
        lowrank.data_ptr() if rank else 0,
        0,
        rows,
        k,
        k_blocks,
        rank,
        rank_blocks,
        adjacent,
        *table,
    )
    grid = (slabs * cluster, -(-rank // tile_rank) if rank else 1, 1)
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    _kernel(_MATRIX, mode, tile_rank, cluster).launch(grid, stream, parameters)
    return blocks, scale, lowrank

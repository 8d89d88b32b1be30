"""Host side of gemm.cu: tensor maps, parameters, launch."""

from __future__ import annotations

import functools
import itertools
import secrets
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.kernels import jit, tuning
from rtlynx.kernels.blocks import BLOCK_ROWS, FP8, LOWRANK_BYTES, LOWRANK_COLUMNS
from rtlynx.kernels.driver import call
from rtlynx.kernels.jit import Defines, Instantiation
from rtlynx.kernels.sm90.compress import Addresses, address_of
from rtlynx.kernels.sm90.weights import STORE_COLUMNS, Weights, readable_weights, stored_columns
from rtlynx.kernels.tuning import Tile

_THREADS = 384
_SLABS = tuning.TILE_ROWS // BLOCK_ROWS
_STAGING_BYTES, _NOTE_BYTES, _CONSUMER_WARPS = 2048, 32, 8
_WEIGHT_ROW_BYTES = 128  # of a stage
_MAX_SEGMENTS = 8
_ROW_TILES_TOGETHER = 16
# The kernel's Parameters in four pieces, of which a plan holds two.
_PIECES = [struct.Struct(layout) for layout in ("<128s128s6Q", "<12i", "<3Q2i", "<32i")]
_pack_operands, _pack_shape, _pack_workspace, _pack_segments = (piece.pack for piece in _PIECES)


def _defines(tile: Tile) -> Defines:
    return (
        ("FP8", int(tile.held is FP8)),
        ("BN", tile.columns),
        ("STAGES", tile.stages),
        ("SKEW", tile.skew),
        ("PARAMETER_BYTES", sum(piece.size for piece in _PIECES)),
    )


def _shared_bytes(tile: Tile) -> int:
    stage = _SLABS * tile.held.block_bytes + tile.columns * _WEIGHT_ROW_BYTES
    affine = tile.columns * 8 if tile.held is FP8 else 0
    return tile.stages * (stage + 16) + _CONSUMER_WARPS * (_STAGING_BYTES + _NOTE_BYTES + affine)


INSTANTIATIONS = [
    Instantiation("gemm.cu", "gemm", _defines(tile)) for tile in (*tuning.CANDIDATES, *tuning.CANDIDATES_FP8)
]

_maps: dict[tuple[int, ...], bytes] = {}
_NO_MAP = bytes(128)


@functools.cache
def _kernel(tile: Tile) -> jit.Kernel:
    return jit.load(
        "gemm.cu",
        "gemm",
        _defines(tile),
        threads=_THREADS,
        shared_bytes=_shared_bytes(tile),
        pdl=True,
    )


def _tensor_map(matrix: Tensor, box_columns: int, box_rows: int) -> bytes:
    """Tensor map of a row-major matrix, read in boxes whose rows are one swizzle span.

    A map holds an address and a shape, no contents, so one made for memory that was freed since is right for
    whatever of that shape lies there now.
    """
    rows, columns = matrix.shape
    key = (matrix.data_ptr(), matrix.element_size(), rows, columns, matrix.stride(0), box_columns, box_rows)
    found = _maps.get(key)
    if found is None:
        if len(_maps) >= 16384:
            _maps.clear()
        found = _maps[key] = _encode(*key)
    return found


def _encode(
    address: int, element: int, rows: int, columns: int, row_stride: int, box_columns: int, box_rows: int
) -> bytes:
    from cuda.bindings import driver as cu

    size, swizzle, data_type = cu.cuuint64_t, cu.CUtensorMapSwizzle, cu.CUtensorMapDataType
    (encoded,) = call(
        cu.cuTensorMapEncodeTiled,
        data_type.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        if element == 2
        else data_type.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [size(columns), size(rows)],
        [size(row_stride * element)],
        [cu.cuuint32_t(box_columns), cu.cuuint32_t(box_rows)],
        [cu.cuuint32_t(1), cu.cuuint32_t(1)],
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B
        if box_columns * element == 128
        else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return struct.pack("<16Q", *(int(word) for word in encoded.opaque))


def launch_gemm(
    blocks: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    of: Weights,
    rows: int,
    segments: Sequence[int],
) -> Tensor:
    """Y (rows, N) of `rtlynx::gemm`; see `rtlynx.kernels.ops`, which checks."""
    n = of.weight.shape[0]
    columns = stored_columns(n)
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=blocks.device)
    if rows == 0 or n == 0:
        return out[:, :n]
    of = readable_weights(of)
    lowrank_bytes = lowrank.shape[0] if lowrank is not None and segments else 0
    plan = plan_gemm(of, rows, segments, lowrank_bytes)
    workspace = 0
    if plan.workspace_bytes:
        sums = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=blocks.device)
        workspace = sums.data_ptr()
    given = Addresses(
        blocks.data_ptr(),
        scale.data_ptr() if scale is not None and scale.shape[0] else 0,
        address_of(lowrank),
    )
    start_gemm(plan, given, of, out.data_ptr(), workspace)
    return out if columns == n else out[:, :n].contiguous()


def plan_gemm(of: Weights, rows: int, segments: Sequence[int] = (), lowrank_bytes: int = 0) -> GemmPlan:
    """How to compute Y of `rows` rows; `lowrank_bytes` are those of all blocks of T, needed with segments.

    Of the shapes of `of`, whose weight and factor may have been padded along their rows.
    """
    n, k = of.weight.shape
    rank = 0 if of.up is None else of.up.shape[1]
    tile = tuning.choose(rows, n, k, of.held)
    multiprocessors = _multiprocessors(of.weight.get_device())
    return _plan(tile, multiprocessors, rows, n, k, rank, tuple(segments), lowrank_bytes)


def start_gemm(plan: GemmPlan, given: Addresses, of: Weights, out: int, workspace: int) -> None:
    """Launch on the current stream. `out` and `workspace` are addresses."""
    weight, up, bias, column_scale = of
    columns = plan.tile.columns
    operands = _pack_operands(
        _tensor_map(weight, plan.tile.held.block_k, columns),
        _NO_MAP if up is None else _tensor_map(up, LOWRANK_COLUMNS, columns),
        given.blocks,
        given.lowrank,
        given.scale,
        address_of(bias),
        address_of(column_scale),
        out,
    )
    is_float = bias is not None and bias.dtype is torch.float32
    split = (workspace, workspace + plan.sum_bytes, _nonce()) if workspace else (0, 0, 0)
    workspaces = _pack_workspace(*split, is_float, plan.segment_count)
    parameters = b"".join((operands, plan.shape, workspaces, plan.segments))
    stream = torch._C._cuda_getCurrentRawStream(weight.get_device())
    _kernel(plan.tile).launch((plan.ctas, 1, 1), stream, parameters)


class GemmPlan(NamedTuple):
    """What a launch needs that depends on shapes alone.

    shape, segments : pieces of the kernel's Parameters
    sum_bytes, workspace_bytes : of sums that CTAs leave of split tiles, and with their marks
    """

    tile: Tile
    ctas: int
    shape: bytes
    segments: bytes
    segment_count: int
    sum_bytes: int
    workspace_bytes: int


@functools.lru_cache(maxsize=4096)
def _plan(
    tile: Tile,
    multiprocessors: int,
    rows: int,
    n: int,
    k: int,
    rank: int,
    segments: tuple[int, ...],
    lowrank_bytes: int,
) -> GemmPlan:
    slabs, k_blocks, rank_blocks = (
        -(-rows // BLOCK_ROWS),
        -(-k // tile.held.block_k),
        -(-rank // LOWRANK_COLUMNS),
    )
    columns = stored_columns(n)
    row_tiles = -(-slabs // _SLABS)
    if segments:
        total_rank_blocks = lowrank_bytes // (slabs * LOWRANK_BYTES)
        table, column_tiles = _segment_table(segments, columns, tile.columns)
    else:
        total_rank_blocks, column_tiles = rank_blocks, -(-n // tile.columns)
        table = (columns, column_tiles, 0, rank_blocks, *_NO_SEGMENTS)
    stages = 0 if segments else k_blocks + rank_blocks
    split = tuning.split(row_tiles * column_tiles, multiprocessors, stages)
    shape = _pack_shape(
        rows,
        columns,
        k_blocks,
        total_rank_blocks,
        slabs,
        row_tiles,
        column_tiles,
        _ROW_TILES_TOGETHER,
        split.whole_tiles,
        split.tiles,
        split.ctas,
        split.stages,
    )
    sum_bytes = split.ctas * _SLABS * BLOCK_ROWS * tile.columns * 4
    return GemmPlan(
        tile=tile,
        ctas=min(multiprocessors, max(split.whole_tiles, split.ctas)),
        shape=shape,
        segments=_pack_segments(*table),
        segment_count=max(1, len(segments) // 3),
        sum_bytes=sum_bytes,
        workspace_bytes=sum_bytes + split.ctas * _CONSUMER_WARPS * 8,
    )


_launches = itertools.count()
_seed = secrets.randbits(64)


def _nonce() -> int:
    """A number that memory does not hold by chance, nor from a launch before."""
    return (_seed + next(_launches) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF | 1


_NO_SEGMENTS = (0,) * (4 * (_MAX_SEGMENTS - 1))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _segment_table(segments: Sequence[int], columns: int, tile_columns: int) -> tuple[tuple[int, ...], int]:
    """Segments as the kernel reads them, and the number of column tiles."""
    if len(segments) > 3 * _MAX_SEGMENTS:
        raise ValueError(f"one product serves at most {_MAX_SEGMENTS} segments, got {len(segments) // 3}")
    table: list[int] = []
    begin = tile_end = 0
    for end, first, rank in zip(segments[0::3], segments[1::3], segments[2::3], strict=True):
        if end % STORE_COLUMNS and end != segments[-3]:
            raise ValueError(f"segments end at multiples of {STORE_COLUMNS}, got {list(segments[0::3])}")
        end = columns if end == segments[-3] else end
        tile_end += -(-(end - begin) // tile_columns)
        table += [end, tile_end, first // LOWRANK_COLUMNS, -(-rank // LOWRANK_COLUMNS)]
        begin = end
    return (*table, *[0] * (4 * _MAX_SEGMENTS - len(table))), tile_end

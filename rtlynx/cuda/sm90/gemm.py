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

from rtlynx.cuda import jit, tuning
from rtlynx.cuda.driver import call, multiprocessors
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.sm90.compress import Addresses, address_of
from rtlynx.cuda.sm90.weights import Weights, aligned, readable_weights, stored_columns
from rtlynx.cuda.tuning import Tile
from rtlynx.math.tiles import BLOCK_ROWS, FP8, LOWRANK_BYTES, LOWRANK_COLUMNS

_THREADS = 384
_SLABS = tuning.TILE_ROWS // BLOCK_ROWS
_STAGING_BYTES, _NOTE_BYTES, _CONSUMER_WARPS = 2048, 32, 8
_WEIGHT_ROW_BYTES = 128  # of a stage
MAX_LAYERS = 4  # of one product
_ROW_TILES_TOGETHER = 16
# The kernel's Parameters in four pieces, of which a plan holds two.
_PIECES = [struct.Struct(f"<{layout}") for layout in ("512s512s12Q", "12i", "3Q2i", "16i16x")]
_pack_operands, _pack_shape, _pack_workspace, _pack_layers = (piece.pack for piece in _PIECES)


def _defines(tile: Tile) -> Defines:
    if tile.columns % tuning.STORED_COLUMNS:
        raise ValueError(f"a tile's columns are a multiple of {tuning.STORED_COLUMNS}, got {tile.columns}")
    return (
        ("FP8", int(tile.held is FP8)),
        ("BLOCK_N", tile.columns),
        ("NUM_STAGES", tile.stages),
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
    layers: Sequence[Weights],
    rows: int,
    first_ranks: Sequence[int] = (0,),
) -> Tensor:
    """Y (rows, N) of `rtlynx::gemm` and `gemm_joint`; see `rtlynx.ops.sparse_linear`, which checks."""
    n = sum(of.weight.shape[0] for of in layers)
    columns = stored_columns(n)
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=blocks.device)
    if rows == 0 or n == 0:
        return out[:, :n]
    layers = [readable_weights(of) for of in layers]
    blocks, lowrank = aligned(blocks), None if lowrank is None else aligned(lowrank)
    lowrank_bytes = lowrank.shape[0] if lowrank is not None and layers[0].up is not None else 0
    plan = plan_gemm(layers, rows, first_ranks, lowrank_bytes)
    workspace = 0
    if plan.workspace_bytes:
        sums = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=blocks.device)
        workspace = sums.data_ptr()
    given = Addresses(
        blocks.data_ptr(),
        scale.data_ptr() if scale is not None and scale.shape[0] else 0,
        address_of(lowrank),
    )
    start_gemm(plan, given, layers, out.data_ptr(), workspace)
    return out if columns == n else out[:, :n].contiguous()


def plan_gemm(
    layers: Sequence[Weights], rows: int, first_ranks: Sequence[int], lowrank_bytes: int
) -> GemmPlan:
    """How to compute Y of `rows` rows; `lowrank_bytes` are those of all blocks of T, 0 without factors.

    Of the shapes of `layers`, whose weights and factors may have been padded along their rows. Columns of T
    from `first_ranks` on are a layer's.
    """
    widths = tuple(of.weight.shape[0] for of in layers)
    ranks = tuple(0 if of.up is None else of.up.shape[1] for of in layers)
    weight, held = layers[0].weight, layers[0].held
    count = multiprocessors(weight.get_device())
    tile = tuning.choose(rows, sum(widths), weight.shape[1], held, count)
    shape = GemmShape(rows, weight.shape[1], widths, ranks, tuple(first_ranks), lowrank_bytes)
    return _plan(tile, count, shape)


def start_gemm(plan: GemmPlan, given: Addresses, layers: Sequence[Weights], out: int, workspace: int) -> None:
    """Launch on the current stream. `out` and `workspace` are addresses."""
    columns, block_k = plan.tile.columns, plan.tile.held.block_k
    none = [0] * (MAX_LAYERS - len(layers))
    operands = _pack_operands(
        b"".join([_tensor_map(of.weight, block_k, columns) for of in layers]),
        b"".join(
            [_NO_MAP if of.up is None else _tensor_map(of.up, LOWRANK_COLUMNS, columns) for of in layers]
        ),
        given.blocks,
        given.lowrank,
        given.scale,
        out,
        *[_address_at(of.bias, first) for of, first in zip(layers, plan.first_columns, strict=True)],
        *none,
        *[_address_at(of.column_scale, first) for of, first in zip(layers, plan.first_columns, strict=True)],
        *none,
    )
    bias = layers[0].bias
    is_float = bias is not None and bias.dtype is torch.float32
    split = (workspace, workspace + plan.sum_bytes, _nonce()) if workspace else (0, 0, 0)
    parameters = b"".join((operands, plan.shape, _pack_workspace(*split, is_float, len(layers)), plan.layers))
    stream = torch._C._cuda_getCurrentRawStream(layers[0].weight.get_device())
    _kernel(plan.tile).launch((plan.ctas, 1, 1), stream, parameters)


def _address_at(vector: Tensor | None, first_column: int) -> int:
    """Where entry 0 of `vector` would lie if its first were entry `first_column`."""
    return 0 if vector is None else vector.data_ptr() - first_column * vector.element_size()


class GemmShape(NamedTuple):
    """Of a product: Y (rows, sum of `widths`) from X (rows, k), and where T and its columns lie.

    widths, ranks, first_ranks : one a layer
    lowrank_bytes : of all blocks of T, 0 without factors
    """

    rows: int
    k: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    first_ranks: tuple[int, ...]
    lowrank_bytes: int


class GemmPlan(NamedTuple):
    """What a launch needs that depends on shapes alone.

    shape, layers : pieces of the kernel's Parameters
    first_columns : of Y, one a layer
    sum_bytes, workspace_bytes : of sums that CTAs leave of split tiles, and with their marks
    """

    tile: Tile
    ctas: int
    shape: bytes
    layers: bytes
    first_columns: tuple[int, ...]
    sum_bytes: int
    workspace_bytes: int


@functools.lru_cache(maxsize=4096)
def _plan(tile: Tile, ctas: int, of: GemmShape) -> GemmPlan:
    slabs, k_blocks = -(-of.rows // BLOCK_ROWS), -(-of.k // tile.held.block_k)
    row_tiles = -(-slabs // _SLABS)
    rank_blocks = [-(-rank // LOWRANK_COLUMNS) for rank in of.ranks]
    table, column_tiles = _layer_table(of, rank_blocks, tile.columns)
    stages = k_blocks + rank_blocks[0] if len(set(rank_blocks)) == 1 else 0
    split = tuning.split(row_tiles * column_tiles, ctas, stages)
    shape = _pack_shape(
        of.rows,
        stored_columns(sum(of.widths)),
        k_blocks,
        of.lowrank_bytes // (slabs * LOWRANK_BYTES),
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
        ctas=min(ctas, max(split.whole_tiles, split.ctas)),
        shape=shape,
        layers=_pack_layers(*table),
        first_columns=tuple(itertools.accumulate(of.widths[:-1], initial=0)),
        sum_bytes=sum_bytes,
        workspace_bytes=sum_bytes + split.ctas * _CONSUMER_WARPS * 8,
    )


_launches = itertools.count()
_seed = secrets.randbits(64)


def _nonce() -> int:
    """A number that memory does not hold by chance, nor from a launch before."""
    return (_seed + next(_launches) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF | 1


def _layer_table(of: GemmShape, rank_blocks: Sequence[int], tile_columns: int) -> tuple[list[int], int]:
    """Layers as the kernel reads them, and the number of column tiles."""
    table: list[int] = []
    end = tile_end = 0
    for width, first, blocks in zip(of.widths, of.first_ranks, rank_blocks, strict=True):
        end += width
        tile_end += -(-width // tile_columns)
        table += [stored_columns(end), tile_end, first // LOWRANK_COLUMNS, blocks]
    return table + [0] * (4 * (MAX_LAYERS - len(rank_blocks))), tile_end

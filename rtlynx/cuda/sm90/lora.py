"""Host side of lora.cu: which CTAs make what, parameters, launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import jit
from rtlynx.cuda.driver import multiprocessors
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.layout import Layout
from rtlynx.cuda.sm90.compress import address_of
from rtlynx.cuda.sm90.weights import aligned, stored_columns
from rtlynx.math.formats import TILE_ROWS
from rtlynx.math.tiles import lowrank_bytes

MAX_PIECES, MAX_LAYERS = 16, 8  # of a launch
K_MULTIPLE = 16
_THREADS, _BLOCK_M, _BLOCK_K, _MAX_CLUSTER = 256, 128, 128, 8
_COLUMNS = (16, 32, 48, 64)  # of T that a CTA computes
_PADDING = 4  # float32 of a row of T in shared memory, so that rows lie in other banks
_PIECE = Layout(
    *((name, "pointer") for name in ("lowrank_a", "lowrank_b")),
    *((name, "int") for name in ("rank", "column")),
)
_LAYER = Layout(
    ("weight_scale", "pointer"),
    ("first_byte", "int64"),
    *((name, "int") for name in ("n", "rank", "column", "tile_end")),
)
_PARAMETERS = Layout(
    *((name, "pointer") for name in ("values", "token_scale", "scalings", "lowrank", "packed_b")),
    *((name, "int") for name in ("rows", "k", "columns", "num_pieces", "num_layers", "lowrank_ctas")),
    ("piece", _PIECE, MAX_PIECES),
    ("layer", _LAYER, MAX_LAYERS),
)


def _defines(columns: int) -> Defines:
    return (
        ("COLUMNS", columns),
        ("THREADS", _THREADS),
        ("BLOCK_M", _BLOCK_M),
        ("BLOCK_K", _BLOCK_K),
        ("PITCH", columns + _PADDING),
        ("MAX_PIECES", MAX_PIECES),
        ("MAX_LAYERS", MAX_LAYERS),
        *_PARAMETERS.defines,
    )


INSTANTIATIONS = [Instantiation("lora.cu", "lora", _defines(columns)) for columns in _COLUMNS]


@functools.cache
def _kernel(columns: int, cluster: int) -> jit.Kernel:
    shared_bytes = _BLOCK_M * (columns + _PADDING) * 4
    return jit.load(
        "lora.cu",
        "lora",
        _defines(columns),
        threads=_THREADS,
        shared_bytes=shared_bytes,
        pdl=True,
        cluster=cluster,
    )


class LoraShape(NamedTuple):
    """Of layers with LoRAs that read one input.

    rows, k : of the input
    ranks : of each layer's LoRAs, one after the other
    widths : N of each layer
    packs : whether each layer's B is packed, or T alone is made
    """

    rows: int
    k: int
    ranks: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    packs: bool

    @property
    def layer_ranks(self) -> list[int]:
        return [sum(ranks) for ranks in self.ranks]

    @property
    def first_columns(self) -> list[int]:
        """First of each layer's columns of T, and how many T has: each layer's rows begin at 16 bytes."""
        firsts = [0]
        for rank in self.layer_ranks:
            firsts.append(firsts[-1] + stored_columns(rank))
        return firsts

    @property
    def tile_bytes(self) -> list[int]:
        """Of each layer's tiles of B."""
        if not self.packs:
            return [0] * len(self.widths)
        return [lowrank_bytes(n, rank) for n, rank in zip(self.widths, self.layer_ranks, strict=True)]


class _Plan(NamedTuple):
    """What a launch needs that depends on shapes alone."""

    columns: int
    cluster: int
    lowrank_ctas: int
    grid: tuple[int, int, int]


@functools.lru_cache(maxsize=1024)
def plan_lora(of: LoraShape, card: int) -> _Plan:
    """How to cut T and the packing for a card with `card` multiprocessors."""
    total = of.first_columns[-1]
    columns = next((size for size in _COLUMNS if size >= total), _COLUMNS[-1])
    column_tiles, m_tiles = -(-total // columns), -(-of.rows // _BLOCK_M)
    cluster = 1
    while (
        cluster < _MAX_CLUSTER
        and m_tiles * column_tiles * cluster < 0.9 * card
        and cluster * 2 * _BLOCK_K <= of.k
    ):
        cluster *= 2
    lowrank_ctas = m_tiles * cluster
    tiles = sum(-(-n // TILE_ROWS) for n in of.widths) if of.packs else 0
    return _Plan(
        columns, cluster, lowrank_ctas, (lowrank_ctas + -(-tiles // cluster) * cluster, column_tiles, 1)
    )


def takes(of: LoraShape) -> bool:
    """Whether one launch serves these layers."""
    pieces = sum(len(ranks) for ranks in of.ranks)
    return of.k % K_MULTIPLE == 0 and pieces <= MAX_PIECES and len(of.ranks) <= MAX_LAYERS


def launch_lora(
    of: LoraShape,
    values: Tensor,
    token_scale: Tensor,
    lowrank_as: Sequence[Tensor],
    lowrank_bs: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    _counts: Sequence[int],
    scalings: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """T (M, columns) and all tiles of B of what `takes`; see `rtlynx.ops.lora`, which checks."""
    lowrank_as = [aligned(one.contiguous()) for one in lowrank_as]
    lowrank_bs = [one.contiguous() for one in lowrank_bs]
    weight_scales = [one.contiguous() for one in weight_scales]
    values = aligned(values)
    firsts, tile_bytes = of.first_columns, of.tile_bytes
    lowrank = values.new_empty((of.rows, firsts[-1]), dtype=torch.bfloat16)
    packed = values.new_empty(sum(tile_bytes), dtype=torch.uint8)
    plan = plan_lora(of, multiprocessors(values.get_device()))
    if plan.grid[0] == 0:
        return lowrank, packed
    pieces: list[int] = []
    layers: list[int] = []
    tile_end = 0
    for i, (ranks, n, first) in enumerate(zip(of.ranks, of.widths, firsts, strict=False)):
        column = first
        for rank in ranks:
            index = len(pieces) // 4
            b = lowrank_bs[index].data_ptr() if of.packs else 0
            pieces += [lowrank_as[index].data_ptr(), b, rank, column]
            column += rank
        tile_end += -(-n // TILE_ROWS) if of.packs else 0
        scale = weight_scales[i].data_ptr() if of.packs else 0
        layers += [scale, sum(tile_bytes[:i]), n, sum(ranks), first, tile_end]
    parameters = _PARAMETERS.pack(
        *(values.data_ptr(), 0 if of.packs else token_scale.data_ptr(), address_of(scalings)),
        *(lowrank.data_ptr(), packed.data_ptr()),
        *(of.rows, of.k, firsts[-1], len(pieces) // 4, len(of.ranks), plan.lowrank_ctas),
        *pieces,
        *[0] * (4 * MAX_PIECES - len(pieces)),
        *layers,
        *[0] * (6 * MAX_LAYERS - len(layers)),
    )
    stream = torch._C._cuda_getCurrentRawStream(values.get_device())
    _kernel(plan.columns, plan.cluster).launch(plan.grid, stream, parameters)
    return lowrank, packed

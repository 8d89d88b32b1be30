"""Host side of compress.cu: configurations, parameters, launch. What is compressed comes as an `Input`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import jit
from rtlynx.cuda.driver import multiprocessors
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.math.tiles import BF16, BLOCK_ROWS, FP8, LOWRANK_BYTES, LOWRANK_COLUMNS, Format

MATRIX, ADALN, RMSNORM, GELU, SILU_GATE, CONCAT_GELU = range(6)
# The kernel's Parameters: its Source, addresses, and what a plan holds.
SOURCE_BYTES = {MATRIX: 32, ADALN: 56, RMSNORM: 56, GELU: 32, SILU_GATE: 64, CONCAT_GELU: 72}
_ADDRESSES, _SHAPE = struct.Struct("<5Q"), struct.Struct("<24i")
_ADJACENT, _STRIDED, _GATHER = range(3)
_SLAB_THREADS, _WARPS_SHARING_K = 128, 8
MAX_PARTS = 8  # of strided groups
MAX_COLUMNS_FP8 = 20480  # whose kept values a cluster has room for, in every configuration
_RANKS = (0, 32, 64, 128)  # columns of T that a block computes
# By format, adjacent groups or not, rank: units of K in shared memory, blocks that a multiprocessor holds.
# Where there are several the plan takes the faster for its shape.
_STAGES_AND_BLOCKS = {
    (BF16, True, 0): ((4, 2),),
    (BF16, True, 32): ((4, 4),),
    (BF16, True, 64): ((3, 3),),
    (BF16, True, 128): ((3, 3),),
    (BF16, False, 0): ((3, 2),),
    (BF16, False, 32): ((2, 4),),
    (BF16, False, 64): ((2, 3),),
    (BF16, False, 128): ((2, 2),),
    (FP8, True, 0): ((4, 3),),
    (FP8, True, 32): ((3, 3),),
    (FP8, True, 64): ((3, 3), (2, 3)),
    (FP8, True, 128): ((2, 2),),
    (FP8, False, 0): ((2, 2),),
    (FP8, False, 32): ((2, 2),),
    (FP8, False, 64): ((2, 2),),
    (FP8, False, 128): ((2, 1),),
}
_FITTING = 0.9  # clusters leave some multiprocessors of a card unused
_MAX_CLUSTER = 8
# In fp8 kept values wait in shared memory: 2 KB for each of a CTA's four warps and blocks of K.
_MAX_CLUSTER_FP8, _WAITING_BYTES = 16, 4 * 2048
_SHARED_PER_BLOCK = 227 * 1024
_STATIC_BYTES = 4096  # at most, of a block's other shared memory


class _Times(NamedTuple):
    """What a round of clusters takes in fp8, in us; fitted to benchmarks/NOTES.md, "Which cluster".

    fixed : its start and end
    busy : a block of K of a CTA, for each CTA that shares the multiprocessor
    alone : at least that, by stages, as what is on its way hides less
    """

    fixed: float
    busy: float
    alone: dict[int, float]


_TIMES_PLAIN = _Times(5.0, 0.8, {2: 1.9, 3: 1.1, 4: 0.95})
_TIMES_LOWRANK = _Times(6.8, 1.3, {2: 1.9, 3: 1.5, 4: 1.3})


class CompressOptions(NamedTuple):
    """How X is compressed: arguments of the operators, and what blocks hold."""

    grouping: str
    parts: tuple[int, ...]
    norm: bool
    held: Format = BF16


class Input(NamedTuple):
    """What to compress: the kernel's Source structure and the shape of what it yields.

    source : one of MATRIX ... CONCAT_GELU
    structure : the Source structure's bytes
    aligned : whether all rows start at multiples of 16 bytes
    """

    source: int
    structure: bytes
    rows: int
    columns: int
    device: torch.device
    aligned: bool


class _Configuration(NamedTuple):
    """An instantiation of compress.cu; `variant` counts what _STAGES_AND_BLOCKS offers."""

    held: Format
    source: int
    mode: int
    rank: int
    variant: int = 0

    @property
    def variants(self) -> list[_Configuration]:
        return [self._replace(variant=variant) for variant in range(len(self._offers))]

    @property
    def stages(self) -> int:
        stages = self._offers[self.variant][0]
        return stages if self.rank else max(2, stages // self._raws)

    @property
    def blocks_per_sm(self) -> int:
        blocks = self._offers[self.variant][1]
        if self.source == MATRIX:
            return min(blocks, 2) if self.rank and self.mode == _GATHER else blocks
        return min(blocks, 3 if self.mode == _ADJACENT and self.rank < 128 else 2)

    @property
    def slab(self) -> bool:
        """Whether a block takes 64 rows and a cluster shares K; else its warps share the K of 16 rows."""
        return self.rank > 0 or self.held is FP8

    @property
    def threads(self) -> int:
        return _SLAB_THREADS if self.slab else _WARPS_SHARING_K * 32

    def shared_bytes(self, waiting_blocks: int = 0) -> int:
        """Shared memory of a block, in which `waiting_blocks` of K wait."""
        row_bytes = (2 if self.mode == _ADJACENT else 4) * 64  # of a unit
        if not self.slab:
            return _WARPS_SHARING_K * self.stages * row_bytes * self._raws * 16
        stages = self.stages * row_bytes * (self._raws * BLOCK_ROWS + self.rank)
        return max(stages, BLOCK_ROWS * (self.rank + 4) * 4) + waiting_blocks * _WAITING_BYTES

    @property
    def _offers(self) -> tuple[tuple[int, int], ...]:
        return _STAGES_AND_BLOCKS[self.held, self.mode == _ADJACENT, self.rank]

    @property
    def _raws(self) -> int:
        return 2 if self.source == SILU_GATE else 1

    @property
    def defines(self) -> Defines:
        return (
            ("FP8", int(self.held is FP8)),
            ("PROLOGUE", self.source),
            ("MODE", self.mode),
            ("RANK", self.rank),
            ("NUM_STAGES", self.stages),
            ("MIN_CTAS", self.blocks_per_sm),
            ("PARAMETER_BYTES", SOURCE_BYTES[self.source] + _ADDRESSES.size + _SHAPE.size),
        )


INSTANTIATIONS = [
    Instantiation("compress.cu", "compress", variant.defines)
    for held in (BF16, FP8)
    for source in SOURCE_BYTES
    for mode in ((_ADJACENT, _STRIDED, _GATHER) if source == MATRIX else (_ADJACENT, _STRIDED))
    for rank in _RANKS
    for variant in _Configuration(held, source, mode, rank).variants
]


@functools.cache
def _kernel(configuration: _Configuration, cluster: int, shared_bytes: int) -> jit.Kernel:
    return jit.load(
        "compress.cu",
        "compress",
        configuration.defines,
        threads=configuration.threads,
        shared_bytes=shared_bytes,
        pdl=True,
        cluster=cluster,
    )


def _cut(
    configuration: _Configuration, slabs: int, k_blocks: int, device: int | None
) -> tuple[_Configuration, int]:
    """The variant, and how many CTAs share the K of a slab.

    As many as the card holds at once and K has work for. Without a low-rank product a CTA takes 16 rows, and
    its warps share their K.
    """
    if configuration.held is FP8:
        return _cut_fp8(configuration, slabs, k_blocks, device)
    if not configuration.slab:
        return configuration, 1
    room = int(configuration.blocks_per_sm * multiprocessors(device) * _FITTING)
    units = k_blocks if configuration.mode == _ADJACENT else -(-k_blocks // 2)
    return configuration, max(1, min(_MAX_CLUSTER, room // slabs, units))


def _cut_fp8(
    configuration: _Configuration, slabs: int, k_blocks: int, device: int | None
) -> tuple[_Configuration, int]:
    """Variant and cluster of least time, modelled, among those whose CTAs have room for what waits.

    Raises
    ------
    ValueError
        If none has: K is too large.
    """
    times = {}
    for variant in configuration.variants:
        for cluster in range(1, min(_MAX_CLUSTER_FP8, k_blocks) + 1):
            own = -(-k_blocks // cluster)
            shared_bytes = variant.shared_bytes(own)
            if shared_bytes > _SHARED_PER_BLOCK - _STATIC_BYTES:
                continue
            together = _most_clusters(variant, cluster, shared_bytes, device)
            if together:
                rounds = _rounds(slabs, cluster, together, multiprocessors(device))
                times[variant, cluster] = _modelled_time(variant, own, rounds)
    if not times:
        raise ValueError(
            f"the fp8 kernels take inputs of up to {MAX_COLUMNS_FP8} features, got {k_blocks * FP8.block_k}"
        )
    return min(times, key=lambda cut: times[cut])


@functools.cache
def _most_clusters(configuration: _Configuration, cluster: int, shared_bytes: int, device: int | None) -> int:
    """How many clusters the current device, `device`, holds at one time."""
    return _kernel(configuration, cluster, shared_bytes).most_clusters()


def _rounds(slabs: int, cluster: int, together: int, on: int) -> list[tuple[int, int]]:
    """How many rounds `slabs` clusters take, `together` at one time on so many multiprocessors, and how many
    CTAs share one of them.
    """
    full, rest = divmod(slabs, together)
    return [(full, -(-together * cluster // on)), (min(rest, 1), -(-rest * cluster // on))]


def _modelled_time(configuration: _Configuration, own_blocks: int, rounds: list[tuple[int, int]]) -> float:
    """Microseconds for `rounds` of CTAs with `own_blocks` of K each."""
    times = _TIMES_LOWRANK if configuration.rank else _TIMES_PLAIN
    alone = times.alone[configuration.stages]
    return sum(
        count * (times.fixed + own_blocks * max(alone, sharing * times.busy)) for count, sharing in rounds
    )


@functools.lru_cache(maxsize=1024)
def _groups(grouping: str, parts: tuple[int, ...], k: int) -> tuple[int, bool, tuple[int, ...]]:
    """Mode where everything is aligned, whether groups are adjacent, and the kernel's table of parts."""
    if grouping == "adjacent":
        return (_ADJACENT if k % 8 == 0 else _GATHER), True, (1, k // 4, *[0] * (2 * MAX_PARTS - 1))
    widths = parts or (k,)
    if len(widths) > MAX_PARTS:
        raise ValueError(f"the kernels take at most {MAX_PARTS} parts, got {len(widths)}")
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
        (len(widths), *table, *[0] * (2 * MAX_PARTS - len(table))),
    )


def vectors_fit(grouping: str, parts: Sequence[int], k: int) -> bool:
    """Whether groups over K = `k` columns can be read 16 bytes at a time, as producers need."""
    return _groups(grouping, tuple(parts), k)[0] != _GATHER


_pack_matrix = struct.Struct("<Qqqi4x").pack
_pack_addresses, _pack_shape = _ADDRESSES.pack, _SHAPE.pack


def pack_matrix(x: Tensor, batches: bool = False) -> tuple[bytes, bool]:
    """Matrix structure of `x` (..., K), whose strides it must be able to express, and whether it is aligned.

    batches : keep the first axis of a (B, T, K) tensor apart even where it need not be.
    """
    address = x.data_ptr()
    if x.dim() == 3 and (batches or not x.is_contiguous()):
        batch, row, together = x.stride(0), x.stride(1), x.shape[1]
    elif x.dim() == 2:
        batch, row, together = 0, x.stride(0), x.shape[0]
    else:
        batch, row, together = 0, x.shape[-1], x.numel() // x.shape[-1]
    return _pack_matrix(address, batch, row, together or 1), (address | (batch | row) * 2) % 16 == 0


def expressible(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy where two strides do not tell where its rows lie."""
    return x if x.dim() <= 3 or x.is_contiguous() else x.contiguous()


def launch_compress(
    x: Tensor, down: Tensor | None, options: CompressOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`rtlynx::compress` of checked arguments: blocks, scale, blocks of T (`rtlynx.ops.sparse_linear`)."""
    x = expressible(x)
    return launch(matrix_input(x), down, options)


def matrix_input(x: Tensor) -> Input:
    """X (..., K) itself. What it holds does not keep memory alive: `x` must outlive the launch."""
    k = x.shape[-1]
    structure, aligned = pack_matrix(x)
    return Input(MATRIX, structure, x.numel() // k, k, x.device, aligned)


def launch(
    x: Input, down: Tensor | None, options: CompressOptions, dense: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compress `x`; a producer also writes what it selected from to `dense` (rows, columns), to be tested."""
    if down is not None and not down.is_contiguous():
        down = down.contiguous()
    plan = plan_compress(x, down, options)
    blocks = torch.empty(plan.blocks_bytes, dtype=torch.uint8, device=x.device)
    lowrank = torch.empty(plan.lowrank_bytes, dtype=torch.uint8, device=x.device)
    scale = torch.empty(plan.scales, dtype=torch.float32, device=x.device)
    start_compress(
        plan,
        x,
        address_of(down),
        Addresses(blocks.data_ptr(), scale.data_ptr() if plan.scales else 0, lowrank.data_ptr()),
        address_of(dense),
    )
    return blocks, scale, lowrank


def address_of(tensor: Tensor | None) -> int:
    """0 without a tensor."""
    return 0 if tensor is None else tensor.data_ptr()


class Addresses(NamedTuple):
    """Where a compressed matrix lies: `scale` is 0 where s = 1, `lowrank` of no meaning without a factor."""

    blocks: int
    scale: int
    lowrank: int


def plan_compress(x: Input, down: Tensor | None, options: CompressOptions) -> CompressPlan:
    """How to compress `x`, with `down` contiguous."""
    rank = 0 if down is None else down.shape[0]
    aligned = x.aligned and address_of(down) % 16 == 0
    return _plan(x.source, x.rows, x.columns, rank, options, aligned, x.device.index)


def start_compress(plan: CompressPlan, x: Input, down: int, to: Addresses, dense: int = 0) -> None:
    """Launch on the current stream; `down` and `dense` are addresses or 0."""
    if x.rows:
        addresses = _pack_addresses(down, to.blocks, to.scale, to.lowrank, dense)
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        kernel = _kernel(plan.configuration, plan.cluster, plan.shared_bytes)
        kernel.launch(plan.grid, stream, b"".join((x.structure, addresses, plan.shape)))


class CompressPlan(NamedTuple):
    """What a launch needs that depends on shapes and alignment alone.

    scales : how many the kernel writes, one a row or none
    """

    configuration: _Configuration
    cluster: int
    shared_bytes: int
    grid: tuple[int, int, int]
    blocks_bytes: int
    lowrank_bytes: int
    scales: int
    shape: bytes


@functools.lru_cache(maxsize=4096)
def _plan(
    source: int,
    rows: int,
    k: int,
    rank: int,
    options: CompressOptions,
    aligned: bool,
    device: int | None,
) -> CompressPlan:
    held = options.held
    slabs, k_blocks, rank_blocks = (
        -(-rows // BLOCK_ROWS),
        -(-k // held.block_k),
        -(-rank // LOWRANK_COLUMNS),
    )
    mode, adjacent, table = _groups(options.grouping, options.parts, k)
    tile_rank = next((size for size in _RANKS if size >= rank), _RANKS[-1])
    wanted = _Configuration(held, source, mode if aligned else _GATHER, tile_rank)
    configuration, cluster = _cut(wanted, max(slabs, 1), k_blocks, device)
    waiting = -(-k_blocks // cluster) if held is FP8 else 0
    return CompressPlan(
        configuration,
        cluster,
        configuration.shared_bytes(waiting),
        (slabs * cluster, -(-rank // tile_rank) if rank else 1, 1)
        if configuration.slab
        else (slabs * 4, 1, 1),
        slabs * k_blocks * held.block_bytes,
        slabs * rank_blocks * LOWRANK_BYTES,
        rows if options.norm or held is FP8 else 0,
        _pack_shape(rows, k, k_blocks, rank, rank_blocks, adjacent, options.norm, *table),
    )

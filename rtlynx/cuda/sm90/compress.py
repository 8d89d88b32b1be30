"""Host side of compress.cu and compress_rows.cu: which of them, configurations, parameters, launch."""

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
from rtlynx.cuda.sm90.prologues import IDENTITY, PROLOGUES, BoundPrologue, Prologue, bind_matrix, expressible
from rtlynx.cuda.sm90.whole_rows import MODULATION_OF_TOKENS, RowsConfig
from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE, SPARSE_FORMATS, TILE_ROWS, Format
from rtlynx.math.scores import MAGNITUDE, Score
from rtlynx.math.tiles import LOWRANK_BYTES, LOWRANK_COLUMNS

_ADJACENT, _STRIDED, _GATHER = "ADJACENT", "STRIDED", "GATHER"  # as compress_parameters.cuh calls them
_M64_THREADS = 128
# CTAs of a cluster, or warps of a CTA, that share the K of the same rows, at most.
_MAX_K_SPLITS = {BF16_SPARSE: 8, FP8_SPARSE: 16}
MAX_PARTS = 8  # of strided groups
MAX_COLUMNS_FP8 = 20480  # whose kept values a cluster has room for, in every configuration
_RANKS = (0, 32, 64, 128)  # columns of T that a CTA computes
# By format, adjacent groups or not, rank: stages in shared memory, CTAs that a multiprocessor holds.
# Where there are several the plan takes the faster for its shape.
_STAGES_AND_CTAS = {
    (BF16_SPARSE, True, 0): ((4, 2),),
    (BF16_SPARSE, True, 32): ((4, 4),),
    (BF16_SPARSE, True, 64): ((3, 3),),
    (BF16_SPARSE, True, 128): ((3, 3),),
    (BF16_SPARSE, False, 0): ((3, 2),),
    (BF16_SPARSE, False, 32): ((2, 4),),
    (BF16_SPARSE, False, 64): ((2, 3),),
    (BF16_SPARSE, False, 128): ((2, 2),),
    (FP8_SPARSE, True, 0): ((4, 3),),
    (FP8_SPARSE, True, 32): ((3, 3),),
    (FP8_SPARSE, True, 64): ((3, 3), (2, 3)),
    (FP8_SPARSE, True, 128): ((2, 2),),
    (FP8_SPARSE, False, 0): ((2, 2),),
    (FP8_SPARSE, False, 32): ((2, 2),),
    (FP8_SPARSE, False, 64): ((2, 2),),
    (FP8_SPARSE, False, 128): ((2, 1),),
}
# How compress_rows.cu takes rows (benchmarks/NOTES.md, "whole rows"); longer ones are left to compress.cu.
_SHORT_MODULATED_ROWS = RowsConfig(4096, 2, 4, 5)  # two, so that a modulation is read once for both
_ROWS, _ROWS_OF_MANY_REGISTERS = RowsConfig(16384, 1, 4, 3), RowsConfig(16384, 1, 4, 2)
_FITTING = 0.9  # clusters leave some multiprocessors of a card unused
# In fp8 kept values wait in shared memory: 2 KB for each of a CTA's four warps and tiles of K.
_DEFERRED_BYTES = 4 * 2048
_SHARED_PER_CTA = 227 * 1024
_STATIC_BYTES = 4096  # at most, of a CTA's other shared memory


class _Times(NamedTuple):
    """What a round of clusters takes in fp8, in us; fitted to benchmarks/NOTES.md, "Which cluster".

    fixed : its start and end
    busy : a tile of K of a CTA, for each CTA that shares the multiprocessor
    alone : at least that, by stages, as what is on its way hides less
    """

    fixed: float
    busy: float
    alone: dict[int, float]


_TIMES_PLAIN = _Times(5.0, 0.8, {2: 1.9, 3: 1.1, 4: 0.95})
_TIMES_LOWRANK = _Times(6.8, 1.3, {2: 1.9, 3: 1.5, 4: 1.3})


class CompressOptions(NamedTuple):
    """How X is compressed: arguments of the operators."""

    grouping: str
    parts: tuple[int, ...]
    norm: bool
    format: Format = BF16_SPARSE
    score: Score = MAGNITUDE


@functools.cache
def _parameters(prologue: Prologue) -> Layout:
    """The kernels' `Parameters`."""
    return Layout(
        ("prologue", prologue.layout),
        *((name, "pointer") for name in ("lowrank_a", "packed_a", "scale", "lowrank", "dense")),
        *((name, "int") for name in ("rows", "columns", "k_blocks", "rank", "rank_blocks")),
        *((name, "int") for name in ("adjacent", "norm", "num_parts")),
        ("part", Layout(("group_end", "int"), ("first_column", "int")), MAX_PARTS),
    )


# What follows the prologue: the same bytes for all of them.
_, _ADDRESSES, _SHAPE = _parameters(IDENTITY).pieces("lowrank_a", "rows")


class _Configuration(NamedTuple):
    """An instantiation of compress.cu; `variant` counts what _STAGES_AND_CTAS offers."""

    format: Format
    prologue: Prologue
    score: Score
    mode: str
    rank: int
    variant: int = 0

    @property
    def entry(self) -> str:
        return "compress"

    @property
    def variants(self) -> list[_Configuration]:
        return [self._replace(variant=variant) for variant in range(len(self._offers))]

    @property
    def stages(self) -> int:
        stages = self._offers[self.variant][0]
        return stages if self.rank else max(2, stages // self.prologue.inputs)

    @property
    def ctas_per_sm(self) -> int:
        ctas = self._offers[self.variant][1]
        if self.prologue is IDENTITY:
            return min(ctas, 2) if self.rank and self.mode == _GATHER else ctas
        return min(ctas, 3 if self.mode == _ADJACENT and self.rank < 128 else 2)

    @property
    def takes_m64(self) -> bool:
        """Whether a CTA takes 64 rows and a cluster shares K; else its warps share the K of 16 rows."""
        return self.rank > 0 or self.format is FP8_SPARSE

    @property
    def threads(self) -> int:
        return _M64_THREADS if self.takes_m64 else _MAX_K_SPLITS[self.format] * 32

    def shared_bytes(self, deferred_tiles: int = 0) -> int:
        """Shared memory of a CTA, in which `deferred_tiles` of K wait to be quantised."""
        row_bytes = (2 if self.mode == _ADJACENT else 4) * 64  # of a unit
        if not self.takes_m64:
            return self.threads // 32 * self.stages * row_bytes * self.prologue.inputs * 16
        stages = self.stages * row_bytes * (self.prologue.inputs * TILE_ROWS + self.rank)
        return max(stages, TILE_ROWS * (self.rank + 4) * 4) + deferred_tiles * _DEFERRED_BYTES

    @property
    def _offers(self) -> tuple[tuple[int, int], ...]:
        return _STAGES_AND_CTAS[self.format, self.mode == _ADJACENT, self.rank]

    @property
    def defines(self) -> Defines:
        return (
            ("FP8", int(self.format is FP8_SPARSE)),
            (self.prologue.macro, 1),
            (self.score.macro, 1),
            ("MODE", self.mode),
            ("RANK", self.rank),
            ("THREADS", self.threads),
            ("MAX_K_SPLITS", _MAX_K_SPLITS[self.format]),
            ("SHARED_BYTES", self.shared_bytes()),
            ("DEFERRED_BYTES", _DEFERRED_BYTES),
            ("MAX_PARTS", MAX_PARTS),
            ("NUM_STAGES", self.stages),
            ("MIN_CTAS", self.ctas_per_sm),
            *_parameters(self.prologue).defines,
        )


class _RowsConfiguration(NamedTuple):
    """An instantiation of compress_rows.cu, by CTAs of `threads`."""

    prologue: Prologue
    score: Score
    mode: str
    config: RowsConfig
    threads: int

    @property
    def entry(self) -> str:
        return "compress_rows"

    @property
    def defines(self) -> Defines:
        return (
            ("FP8", 1),
            (self.prologue.macro, 1),
            (self.score.macro, 1),
            ("MODE", self.mode),
            ("MAX_PARTS", MAX_PARTS),
            *self.config.defines,
            *_parameters(self.prologue).defines,
        )


def _rows_configs(prologue: Prologue) -> tuple[RowsConfig, ...]:
    """From short rows to long ones."""
    if prologue.named("tokens"):
        return MODULATION_OF_TOKENS
    rows = _ROWS_OF_MANY_REGISTERS if prologue.many_registers else _ROWS
    return (_SHORT_MODULATED_ROWS, rows) if prologue.named("batches") else (rows,)


def _whole_rows(wanted: _Configuration, columns: int) -> _RowsConfiguration | None:
    """What compresses rows of `columns`, whole tiles, in place of `wanted`; None where that does."""
    if wanted.format is not FP8_SPARSE or wanted.rank or wanted.mode == _GATHER:
        return None
    for config in _rows_configs(wanted.prologue):
        if columns <= config.columns:
            threads = config.threads(columns)
            return _RowsConfiguration(wanted.prologue, wanted.score, wanted.mode, config, threads)
    return None


INSTANTIATIONS = [
    Instantiation("compress.cu", "compress", variant.defines)
    for format in SPARSE_FORMATS
    for prologue in PROLOGUES.values()
    for mode in ((_ADJACENT, _STRIDED, _GATHER) if prologue is IDENTITY else (_ADJACENT, _STRIDED))
    for rank in _RANKS
    for variant in _Configuration(format, prologue, MAGNITUDE, mode, rank).variants
] + [
    Instantiation(
        "compress_rows.cu", "compress_rows", _RowsConfiguration(prologue, MAGNITUDE, mode, config, 0).defines
    )
    for prologue in PROLOGUES.values()
    for mode in (_ADJACENT, _STRIDED)
    for config in _rows_configs(prologue)
]


@functools.cache
def _kernel(
    configuration: _Configuration | _RowsConfiguration, cluster: int, shared_bytes: int
) -> jit.Kernel:
    return jit.load(
        f"{configuration.entry}.cu",
        configuration.entry,
        configuration.defines,
        threads=configuration.threads,
        shared_bytes=shared_bytes,
        pdl=True,
        cluster=cluster,
    )


def _cut(
    configuration: _Configuration, m64_tiles: int, k_blocks: int, device: int | None
) -> tuple[_Configuration, int]:
    """The variant, and how many CTAs share the K of 64 rows.

    As many as the card holds at once and K has work for. Without a low-rank product a CTA takes 16 rows, and
    its warps share their K.
    """
    if configuration.format is FP8_SPARSE:
        return _cut_fp8(configuration, m64_tiles, k_blocks, device)
    if not configuration.takes_m64:
        return configuration, 1
    room = int(configuration.ctas_per_sm * multiprocessors(device) * _FITTING)
    units = k_blocks if configuration.mode == _ADJACENT else -(-k_blocks // 2)
    return configuration, max(1, min(_MAX_K_SPLITS[BF16_SPARSE], room // m64_tiles, units))


def _cut_fp8(
    configuration: _Configuration, m64_tiles: int, k_blocks: int, device: int | None
) -> tuple[_Configuration, int]:
    """Variant and cluster of least time, modelled, among those whose CTAs have room for what waits.

    Raises
    ------
    ValueError
        If none has: K is too large.
    """
    times = {}
    for variant in configuration.variants:
        for cluster in range(1, min(_MAX_K_SPLITS[FP8_SPARSE], k_blocks) + 1):
            own = -(-k_blocks // cluster)
            shared_bytes = variant.shared_bytes(own)
            if shared_bytes > _SHARED_PER_CTA - _STATIC_BYTES:
                continue
            together = _most_clusters(variant, cluster, shared_bytes, device)
            if together:
                rounds = _rounds(m64_tiles, cluster, together, multiprocessors(device))
                times[variant, cluster] = _modelled_time(variant, own, rounds)
    if not times:
        raise ValueError(
            f"the fp8 kernels take inputs of up to {MAX_COLUMNS_FP8} features, "
            f"got {k_blocks * FP8_SPARSE.tile_k}"
        )
    return min(times, key=lambda cut: times[cut])


@functools.cache
def _most_clusters(configuration: _Configuration, cluster: int, shared_bytes: int, device: int | None) -> int:
    """How many clusters the current device, `device`, holds at one time."""
    return _kernel(configuration, cluster, shared_bytes).most_clusters()


def _rounds(m64_tiles: int, cluster: int, together: int, on: int) -> list[tuple[int, int]]:
    """Rounds that the clusters take, `together` at one time, and CTAs that share a multiprocessor."""
    full, rest = divmod(m64_tiles, together)
    return [(full, -(-together * cluster // on)), (min(rest, 1), -(-rest * cluster // on))]


def _modelled_time(configuration: _Configuration, own_tiles: int, rounds: list[tuple[int, int]]) -> float:
    """Microseconds for `rounds` of CTAs with `own_tiles` of K each."""
    times = _TIMES_LOWRANK if configuration.rank else _TIMES_PLAIN
    alone = times.alone[configuration.stages]
    return sum(
        count * (times.fixed + own_tiles * max(alone, sharing * times.busy)) for count, sharing in rounds
    )


@functools.lru_cache(maxsize=1024)
def _groups(grouping: str, parts: tuple[int, ...], k: int) -> tuple[str, bool, tuple[int, ...]]:
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
    """Whether groups over K = `k` columns can be read 16 bytes at a time, as prologues need."""
    return _groups(grouping, tuple(parts), k)[0] != _GATHER


_pack_addresses, _pack_shape = _ADDRESSES.pack, _SHAPE.pack


def launch_compress(
    x: Tensor, lowrank_a: Tensor | None, options: CompressOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`rtlynx::compress` of checked arguments: packed A, scale, tiles of T (`rtlynx.ops.sparse_linear`)."""
    x = expressible(x)
    return launch(bind_matrix(x), lowrank_a, options)


def launch(
    x: BoundPrologue, lowrank_a: Tensor | None, options: CompressOptions, dense: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compress `x`; a prologue also writes its result to `dense` (rows, columns), for tests."""
    if lowrank_a is not None and not lowrank_a.is_contiguous():
        lowrank_a = lowrank_a.contiguous()
    plan = plan_compress(x, lowrank_a, options)
    packed_a = torch.empty(plan.packed_a_bytes, dtype=torch.uint8, device=x.device)
    lowrank = packed_a.new_empty(plan.lowrank_bytes)  # (half the time of torch.empty)
    scale = packed_a.new_empty(plan.scales, dtype=torch.float32)
    start_compress(
        plan,
        x,
        address_of(lowrank_a),
        Addresses(packed_a.data_ptr(), scale.data_ptr() if plan.scales else 0, lowrank.data_ptr()),
        address_of(dense),
    )
    return packed_a, scale, lowrank


def address_of(tensor: Tensor | None) -> int:
    """0 without a tensor."""
    return 0 if tensor is None else tensor.data_ptr()


class Addresses(NamedTuple):
    """Where a compressed matrix lies: `scale` is 0 where s = 1, `lowrank` of no meaning without a factor."""

    packed_a: int
    scale: int
    lowrank: int


def plan_compress(x: BoundPrologue, lowrank_a: Tensor | None, options: CompressOptions) -> CompressPlan:
    """How to compress `x`, with `lowrank_a` contiguous."""
    if not options.score.kernels:
        raise ValueError(f"the kernels do not select by the score {options.score.name!r}")
    rank = 0 if lowrank_a is None else lowrank_a.shape[0]
    aligned = x.aligned and address_of(lowrank_a) % 16 == 0
    return _plan(x.prologue, x.rows, x.columns, rank, options, aligned, x.device.index)


def start_compress(
    plan: CompressPlan, x: BoundPrologue, lowrank_a: int, to: Addresses, dense: int = 0
) -> None:
    """Launch on the current stream; `lowrank_a` and `dense` are addresses or 0."""
    if x.rows:
        addresses = _pack_addresses(lowrank_a, to.packed_a, to.scale, to.lowrank, dense)
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        kernel = _kernel(plan.configuration, plan.cluster, plan.shared_bytes)
        kernel.launch(plan.grid, stream, b"".join((x.parameters, addresses, plan.shape)))


class CompressPlan(NamedTuple):
    """What a launch needs that depends on shapes and alignment alone.

    scales : how many the kernel writes, one a row or none
    """

    configuration: _Configuration | _RowsConfiguration
    cluster: int
    shared_bytes: int
    grid: tuple[int, int, int]
    packed_a_bytes: int
    lowrank_bytes: int
    scales: int
    shape: bytes


@functools.lru_cache(maxsize=4096)
def _plan(
    prologue: Prologue,
    rows: int,
    k: int,
    rank: int,
    options: CompressOptions,
    aligned: bool,
    device: int | None,
) -> CompressPlan:
    format = options.format
    m64_tiles, k_blocks, rank_blocks = (
        -(-rows // TILE_ROWS),
        -(-k // format.tile_k),
        -(-rank // LOWRANK_COLUMNS),
    )
    mode, adjacent, table = _groups(options.grouping, options.parts, k)
    tile_rank = next((size for size in _RANKS if size >= rank), _RANKS[-1])
    wanted = _Configuration(format, prologue, options.score, mode if aligned else _GATHER, tile_rank)
    configuration: _Configuration | _RowsConfiguration
    whole_rows = _whole_rows(wanted, k_blocks * format.tile_k)
    if whole_rows is not None:
        configuration, cluster, shared_bytes = whole_rows, 1, 0
        grid = m64_tiles * TILE_ROWS // whole_rows.config.rows, 1, 1
    else:
        tiles, cluster = _cut(wanted, max(m64_tiles, 1), k_blocks, device)
        configuration = tiles
        shared_bytes = tiles.shared_bytes(-(-k_blocks // cluster) if format is FP8_SPARSE else 0)
        grid = m64_tiles * (cluster if tiles.takes_m64 else 4), -(-rank // tile_rank) if rank else 1, 1
    return CompressPlan(
        configuration,
        cluster,
        shared_bytes,
        grid,
        m64_tiles * k_blocks * format.tile_bytes,
        m64_tiles * rank_blocks * LOWRANK_BYTES,
        rows if options.norm or format is FP8_SPARSE else 0,
        _pack_shape(rows, k, k_blocks, rank, rank_blocks, adjacent, options.norm, *table),
    )

"""How the GEMM cuts a shape: its tiles, as measured (tiles.json) or modelled, and the last wave."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE, Format

TABLE = Path(__file__).parent / "tiles.json"
BLOCK_M = 256
H100_SMS = 132  # for planning without a card; what runs asks (`rtlynx.cuda.driver.multiprocessors`)
STORE_N = 64  # of a tile leave at a time: what is beyond the last whole 64 would be lost


class GemmConfig(NamedTuple):
    """A GEMM instantiation: 256 x `block_n` of Y a CTA, `stages` of `format.tile_k` columns in shared memory.

    block_n : a multiple of `STORE_N`
    skew : stages by which the second warpgroup runs behind the first.
    format : of X and the weight.
    """

    block_n: int
    stages: int
    skew: int = 2
    format: Format = BF16_SPARSE

    @property
    def name(self) -> str:
        return f"{self.block_n}x{self.stages}s{self.skew}"


CANDIDATES: dict[Format, tuple[GemmConfig, ...]] = {
    BF16_SPARSE: (GemmConfig(192, 5), GemmConfig(128, 6)),
    FP8_SPARSE: (GemmConfig(192, 4, format=FP8_SPARSE), GemmConfig(128, 5, format=FP8_SPARSE)),
}
# Time of a tile relative to its width: narrower ones fetch more for what they multiply.
_OVERHEAD_COLUMNS = 48

# Of a split tile, in stages: the least share, what handing one over costs, and what splitting must save.
_LEAST_SHARE, _EXCHANGE, _LEAST_SAVING = 8, 5, 24

_forced: GemmConfig | None = None


@contextlib.contextmanager
def forced(config: GemmConfig) -> Iterator[None]:
    """Use `config` for every shape of its format, to measure it."""
    global _forced
    before, _forced = _forced, config
    choose.cache_clear()
    try:
        yield
    finally:
        _forced = before
        choose.cache_clear()


def forced_config() -> GemmConfig | None:
    """That of `forced`, inside it."""
    return _forced


@functools.cache
def _table() -> dict[tuple[int, int, int], str]:
    if not TABLE.exists():
        return {}
    return {(row["m"], row["n"], row["k"]): row["tile"] for row in json.loads(TABLE.read_text())["tiles"]}


class Split(NamedTuple):
    """Tiles that are computed whole, and how the rest are cut along k: `tiles` of `stages` among `ctas`."""

    whole_tiles: int
    tiles: int
    ctas: int
    stages: int


@functools.lru_cache(maxsize=4096)
def split(tiles: int, ctas: int, stages: int) -> Split:
    """Cut the tiles of the last, incomplete wave where that saves more than exchanging sums costs.

    Shares are simple fractions of a tile, so that many CTAs walk through the same k at one time and find each
    other's operands in L2.

    stages : of each tile; 0 where they differ, which forbids it.
    """
    rest = tiles % ctas
    whole = Split(tiles, 0, 0, 1)
    if rest == 0:
        return whole
    # Every share of a tile but one is written and read again, at the cost of a few stages.
    most = max(2, math.isqrt(stages // _EXCHANGE))
    sharing = next(
        (n for n in (rest * min(ctas // rest, most), rest * 3 // 2, rest * 4 // 3) if rest < n <= ctas), 0
    )
    if sharing == 0:
        return whole
    share = rest * stages // sharing
    if share < _LEAST_SHARE or stages - share < _LEAST_SAVING:
        return whole
    return Split(tiles - rest, rest, sharing, stages)


def modelled_cost(m: int, n: int, k: int, config: GemmConfig, multiprocessors: int = H100_SMS) -> float:
    """Columns of tiles that the busiest CTA computes, with an allowance for what a tile costs beside."""
    tiles = -(-m // BLOCK_M) * -(-n // config.block_n)
    cut = split(tiles, multiprocessors, -(-k // config.format.tile_k))
    waves = -(-cut.whole_tiles // multiprocessors) + (cut.tiles / cut.ctas if cut.ctas else 0)
    return waves * (config.block_n + _OVERHEAD_COLUMNS)


@functools.lru_cache(maxsize=4096)
def choose(
    m: int, n: int, k: int, format: Format = BF16_SPARSE, multiprocessors: int = H100_SMS
) -> GemmConfig:
    """The tile for Y (m, n) from X (m, k) on a card with so many multiprocessors."""
    if _forced is not None and _forced.format is format:
        return _forced
    measured = _table().get((m, n, k)) if format is BF16_SPARSE else None
    candidates = CANDIDATES[format]
    for config in candidates:
        if config.name == measured:
            return config
    return min(
        candidates, key=lambda config: (modelled_cost(m, n, k, config, multiprocessors), -config.block_n)
    )

"""How the GEMM cuts a shape: the tile, from what was measured (tiles.json) or a model, and the last wave."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rtlynx.math.tiles import BF16, FP8, Format

TABLE = Path(__file__).parent / "tiles.json"
TILE_ROWS = 256
SMS = 132  # of an H100; what runs on a card asks the card (`rtlynx.cuda.driver.multiprocessors`)
STORED_COLUMNS = 64  # of a tile leave at a time: what is beyond the last whole 64 would be lost


class Tile(NamedTuple):
    """A GEMM instantiation: 256 x `columns` of Y a CTA, `stages` of a block's k in shared memory.

    columns : a multiple of `STORED_COLUMNS`
    skew : stages by which the second warpgroup runs behind the first.
    held : what blocks of X, and the weight, hold.
    """

    columns: int
    stages: int
    skew: int = 2
    held: Format = BF16

    @property
    def name(self) -> str:
        return f"{self.columns}x{self.stages}s{self.skew}"


CANDIDATES = (Tile(192, 5), Tile(128, 6))
CANDIDATES_FP8 = (Tile(192, 4, held=FP8), Tile(128, 5, held=FP8))
# Time of a tile relative to its width: narrower ones fetch more for what they multiply.
_OVERHEAD_COLUMNS = 48

# Of a split tile, in stages: the least share, what handing one over costs, and what splitting must save.
_LEAST_SHARE, _EXCHANGE, _LEAST_SAVING = 8, 5, 24

_forced: Tile | None = None


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Use `tile` for every shape of its format, to measure it."""
    global _forced
    before, _forced = _forced, tile
    choose.cache_clear()
    try:
        yield
    finally:
        _forced = before
        choose.cache_clear()


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


def modelled_cost(m: int, n: int, k: int, tile: Tile, multiprocessors: int = SMS) -> float:
    """Columns of tile that the busiest CTA computes, with an allowance for what a tile costs beside."""
    tiles = -(-m // TILE_ROWS) * -(-n // tile.columns)
    cut = split(tiles, multiprocessors, -(-k // tile.held.block_k))
    waves = -(-cut.whole_tiles // multiprocessors) + (cut.tiles / cut.ctas if cut.ctas else 0)
    return waves * (tile.columns + _OVERHEAD_COLUMNS)


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, held: Format = BF16, multiprocessors: int = SMS) -> Tile:
    """The tile for Y (m, n) from X (m, k) on a card with so many multiprocessors."""
    if _forced is not None and _forced.held is held:
        return _forced
    measured = _table().get((m, n, k)) if held is BF16 else None
    candidates = CANDIDATES if held is BF16 else CANDIDATES_FP8
    for tile in candidates:
        if tile.name == measured:
            return tile
    return min(candidates, key=lambda tile: (modelled_cost(m, n, k, tile, multiprocessors), -tile.columns))

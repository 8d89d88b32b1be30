"""Which tile the GEMM uses for a shape: what was measured (tiles.json), else a model of waves."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent / "tiles.json"
TILE_ROWS = 256
SMS = 132


@dataclass(frozen=True)
class Tile:
    """A GEMM instantiation: 256 x `columns` of Y a CTA, `stages` of 64 k in shared memory.

    cluster : CTAs that fetch a share of W each and multicast it.
    skew : stages by which the second warpgroup runs behind the first.
    """

    columns: int
    stages: int
    cluster: int = 1
    skew: int = 2

    @property
    def name(self) -> str:
        return f"{self.columns}x{self.stages}c{self.cluster}s{self.skew}"


CANDIDATES = (Tile(192, 5), Tile(128, 6))
# Time of a tile relative to its width: narrower ones fetch more for what they multiply.
_OVERHEAD_COLUMNS = 24

_forced: Tile | None = None


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Use `tile` for every shape, to measure it."""
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


def modelled_cost(m: int, n: int, tile: Tile) -> float:
    """Columns of tile that the busiest CTA computes, with an allowance for what a tile costs beside."""
    tiles = -(-m // TILE_ROWS) * -(-n // tile.columns)
    return -(-tiles // SMS) * (tile.columns + _OVERHEAD_COLUMNS)


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int) -> Tile:
    """The tile for Y (m, n) from X (m, k)."""
    if _forced is not None:
        return _forced
    measured = _table().get((m, n, k))
    for tile in CANDIDATES:
        if tile.name == measured:
            return tile
    return min(CANDIDATES, key=lambda tile: (modelled_cost(m, n, tile), -tile.columns))

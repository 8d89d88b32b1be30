"""Host side of whole_rows.cuh: how CTAs take whole rows, to quantise or to compress them."""

from __future__ import annotations

from typing import NamedTuple

from rtlynx.cuda.jit import Defines

VECTOR, _WARP = 8, 32  # columns that a thread loads at a time; threads


class RowsConfig(NamedTuple):
    """What a CTA takes at one time, by rows of up to `columns`; the most whose registers do not spill.

    chunks : vectors of each row that a thread holds
    ctas_per_sm : CTAs for the longest rows that a multiprocessor is to hold, which bounds the registers
    """

    columns: int
    rows: int
    chunks: int
    ctas_per_sm: int

    def threads(self, columns: int) -> int:
        """Whole warps, for rows of `columns`."""
        return -(-columns // (self.chunks * VECTOR * _WARP)) * _WARP

    @property
    def defines(self) -> Defines:
        """Macros of whole_rows.cuh, and the bound of the registers."""
        return (
            ("ROWS", self.rows),
            ("CHUNKS", self.chunks),
            ("MAX_THREADS", self.threads(self.columns)),
            ("MIN_CTAS", self.ctas_per_sm),
        )


# Of prologues that read a modulation of each token's own: short rows and long ones. Fewer registers spill.
MODULATION_OF_TOKENS = (RowsConfig(4096, 1, 4, 6), RowsConfig(16384, 1, 4, 1))

"""The formats of a layer: what its product multiplies, and whether half of its inputs or weights are dropped.

A format has one name in recipes, reports, results and docs. What depends on it asks the object here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from rtlynx.math.fp8 import E4M3

FormatName = Literal["bf16-sparse", "fp8-sparse", "fp8-weight-sparse", "fp8-dense", "dense", "fp8-weights"]
# Those that a recipe can give a layer; "fp8-weights" is for modulation alone (`Recipe.modulation`).
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)[:-1]

TILE_ROWS = 64  # of a packed tile: the rows of one warpgroup instruction
TILE_ROW_BYTES = 64  # of a packed tile's values


@dataclass(frozen=True, eq=False)
class Format:
    """How a layer multiplies.

    Attributes
    ----------
    name : FormatName
    dtype : torch.dtype
        Of both operands of the product on the kernels.
    sparse : bool
        Whether n of m inputs are kept; else all are.
    k_multiple : int
        The kernels take layers whose number of inputs is a multiple of this.
    weight_sparse : bool
        Whether at most two of four neighbouring weights of each output are not zero.
    weights_only : bool
        Whether inputs are multiplied as they are, by a quantised weight.
    """

    name: FormatName
    dtype: torch.dtype
    sparse: bool
    k_multiple: int
    weight_sparse: bool = False
    weights_only: bool = False

    @property
    def quantized(self) -> bool:
        """Whether inputs (but for `weights_only`) and weight are e4m3, scaled by token and output channel."""
        return self.dtype is E4M3

    @property
    def precision(self) -> Literal["bf16", "fp8"]:
        """As recipes and checkpoints name the dtype."""
        return "fp8" if self.quantized else "bf16"

    @property
    def tile_k(self) -> int:
        """Columns of X that a packed tile is made of: half of them are kept, 64 bytes a row."""
        return 2 * TILE_ROW_BYTES // self.dtype.itemsize

    @property
    def value_bytes(self) -> int:
        """Of a packed tile's kept values."""
        return TILE_ROWS * TILE_ROW_BYTES

    @property
    def metadata_bytes(self) -> int:
        """Of a packed tile's indices: 4 bits for every fourth column."""
        return TILE_ROWS * self.tile_k // 8

    @property
    def tile_bytes(self) -> int:
        """Of a packed tile."""
        return self.value_bytes + self.metadata_bytes

    def __reduce__(self) -> Any:
        return format_named, (self.name,)  # one object for each, also in copies


DENSE = Format("dense", torch.bfloat16, sparse=False, k_multiple=1)
FP8_DENSE = Format("fp8-dense", E4M3, sparse=False, k_multiple=16)
BF16_SPARSE = Format("bf16-sparse", torch.bfloat16, sparse=True, k_multiple=8)
FP8_SPARSE = Format("fp8-sparse", E4M3, sparse=True, k_multiple=16)
FP8_WEIGHT_SPARSE = Format("fp8-weight-sparse", E4M3, sparse=False, weight_sparse=True, k_multiple=16)
FP8_WEIGHTS = Format("fp8-weights", E4M3, sparse=False, weights_only=True, k_multiple=1)
FORMATS: dict[str, Format] = {
    one.name: one for one in (BF16_SPARSE, FP8_SPARSE, FP8_WEIGHT_SPARSE, FP8_DENSE, DENSE, FP8_WEIGHTS)
}
# What the kernels pack.
SPARSE_FORMATS = (BF16_SPARSE, FP8_SPARSE)


def format_named(name: str) -> Format:
    """The format called `name`; ValueError where there is none."""
    if name not in FORMATS:
        raise ValueError(f"a format is one of {', '.join(FORMATS)}; got {name!r}")
    return FORMATS[name]


def format_of(*, sparse: bool, quantized: bool) -> Format:
    """The one format of these two properties whose weight is dense."""
    return next(
        one
        for one in FORMATS.values()
        if (one.sparse, one.quantized, one.weight_sparse) == (sparse, quantized, False)
    )

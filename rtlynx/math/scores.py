"""Selection rules: of each group the entries of highest score are kept.

A rule has one name in patterns, recipes, checkpoints and the CUDA code. A new one is an entry in `SCORES`
and, to run on the kernels, its comparison in select.cuh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# dtype -> (integer type of the same width, bits of +Inf); magnitudes are compared as integers.
BITS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


@dataclass(frozen=True, eq=False)
class Score:
    """One rule.

    Attributes
    ----------
    name : str
    key : callable
        Tensor (..., K) -> tensor (..., K) that orders like the score; among equals the lower index is kept.
    kernels : bool
        Whether select.cuh has it, under the name `macro`.
    """

    name: str
    key: Callable[[Tensor], Tensor]
    kernels: bool = False

    @property
    def macro(self) -> str:
        """What chooses it in select.cuh."""
        return f"SCORE_{self.name.upper()}"

    def __reduce__(self) -> Any:
        return score_named, (self.name,)  # one object for each, also in copies


def _magnitude(x: Tensor) -> Tensor:
    """Integers that order like |x|, with ±0 equal, Inf above all finite and every NaN equal above Inf."""
    if x.dtype not in BITS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in BITS)
        raise TypeError(f"selection needs one of {known}, got {str(x.dtype).removeprefix('torch.')}")
    integer, infinity = BITS[x.dtype]
    mask = torch.iinfo(integer).max  # all but the sign bit
    return (x.view(integer) & mask).clamp_(max=infinity + 1)


MAGNITUDE = Score("magnitude", _magnitude, kernels=True)
SCORES: dict[str, Score] = {one.name: one for one in (MAGNITUDE,)}


def score_named(name: str) -> Score:
    """The rule called `name`; ValueError where there is none."""
    if name not in SCORES:
        raise ValueError(f"score is one of {', '.join(SCORES)}; got {name!r}")
    return SCORES[name]

"""TF32, in which tensor cores multiply float32: 8 bits of exponent, 10 of mantissa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def products_in_tf32(wanted: bool) -> Iterator[None]:
    """Let products of float32 matrices on a card be those of TF32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if wanted:
        settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        if wanted:
            settings.fp32_precision = before


def rounded_to_tf32(x: Tensor) -> Tensor:
    """`x` float32 rounded to the nearest number of TF32, ties away from zero; NaN and Inf stay."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32), x)

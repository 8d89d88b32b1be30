"""Products of float32 matrices in TF32: 8 bits of exponent, 10 of mantissa, on tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

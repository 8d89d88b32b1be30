"""Torch operators that compress or quantise a prologue's result without storing it.

Two for each entry of `rtlynx.cuda.sm90.prologues.PROLOGUES`, in `COMPRESS` and `QUANTIZE` by its name:

`<name>_compress(<its arguments>, lowrank_a, grouping, parts, norm, format, score)`
    Goes on like `rtlynx::compress` and returns what that does (`rtlynx.ops.sparse_linear`).
`<name>_quantize(<its arguments>)`
    Quantises all of the result to e4m3, as `rtlynx.math.fp8.quantize_tokens` does, to the bit: `values`
    (..., K) float8_e4m3fn, contiguous, and `scale` (..., 1) float32, t of each token, as row-wise scaled
    products (`torch._scaled_mm`) take them. `quantize` alone is that of a tensor.

Arguments are activations (..., K) bfloat16 with free strides; parameters (K,), or (B, K), (B, 1, K) or (K,)
for batches, B also 1 for all, or (B, T, K) for tokens, or tables (R, K) of which each token takes a row by a
`choice` (B, T) int32; parameters are bfloat16 or (slower) float32; and numbers. All raise TypeError for other
dtypes, ValueError if shapes or devices do not fit, RuntimeError if a gradient would be lost.

On a Hopper card one kernel does it all where it can read 16 bytes at a time: widths are multiples of 8,
strided parts of 32, rows lie at multiples of 16 bytes, and, to quantise, K is at most 16,384. Elsewhere the
prologue runs in plain PyTorch first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.forms import by_form
from rtlynx.cuda.sm90 import compress as compress_kernel
from rtlynx.cuda.sm90 import quantize as quantize_kernel
from rtlynx.cuda.sm90.compress import CompressOptions
from rtlynx.cuda.sm90.prologues import IDENTITY, PROLOGUES, Prologue, bind, bind_matrix, expressible, rounded
from rtlynx.cuda.sm90.weights import readable
from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.ops.checks import check_prologue, check_selection, check_size
from rtlynx.ops.registry import operator, refuse_gradients
from rtlynx.ops.sparse_linear import COMPRESS_TAIL, Compressed, compress_fake, compress_reference, options_of

Quantized = tuple[Tensor, Tensor]


def launch_compress(
    prologue: Prologue,
    arguments: Sequence[Any],
    lowrank_a: Tensor | None,
    options: CompressOptions,
    dense: Tensor | None = None,
) -> Compressed | None:
    """One kernel on the current Hopper card, or None where it cannot read the arguments (not checked here).

    This is what the operators run, with the test mode that they lack: `dense` (M, K) bfloat16, contiguous,
    receives what the kernel selects from.
    """
    bound = bind(prologue, arguments)
    if bound is None or not compress_kernel.vectors_fit(options.grouping, options.parts, bound.columns):
        return None
    factor = None if lowrank_a is None else readable(lowrank_a)
    return compress_kernel.launch(bound, factor, options, dense)


def launch_quantize(
    prologue: Prologue, arguments: Sequence[Any], shape: Sequence[int], dense: Tensor | None = None
) -> Quantized | None:
    """As `launch_compress`; `shape` is that of the values."""
    bound = bind(prologue, arguments)
    if bound is None or not quantize_kernel.fits(bound):
        return None
    return quantize_kernel.launch(bound, shape, dense)


# --------------------------------------------------------------------------------------------- compression


def _compress_operator(prologue: Prologue) -> Any:
    count = len(prologue.arguments)

    def checked(*arguments: Any) -> tuple[tuple[int, ...], CompressOptions]:
        """Shape of the result, and how it is compressed."""
        own, (lowrank_a, grouping, parts, *rest) = arguments[:count], arguments[count:]
        shape = check_prologue(prologue, own)
        check_selection(own[0], shape, lowrank_a, grouping, parts)
        refuse_gradients(lowrank_a)
        return shape, options_of(grouping, parts, *rest)

    known = by_form(checked)

    def hopper(*arguments: Any) -> Compressed:
        _, options = known(*arguments)
        own, lowrank_a = arguments[:count], arguments[count]
        return launch_compress(prologue, own, lowrank_a, options) or compress_kernel.launch_compress(
            rounded(prologue, own), lowrank_a, options
        )

    def reference(*arguments: Any) -> Compressed:
        _, options = checked(*arguments)
        return compress_reference(rounded(prologue, arguments[:count]), arguments[count], options)

    def fake(*arguments: Any) -> Compressed:
        shape, options = checked(*arguments)
        return compress_fake(arguments[0].new_empty(shape), arguments[count], options)

    return operator(
        f"{prologue.name}_compress({prologue.schema}, {COMPRESS_TAIL}",
        hopper=hopper,
        reference=reference,
        fake=fake,
    )


# -------------------------------------------------------------------------------------------- quantisation


def _quantize_operator(prologue: Prologue) -> Any:
    def checked(*arguments: Any) -> tuple[int, ...]:
        """Shape of the values."""
        shape = check_prologue(prologue, arguments)
        if not shape or shape[-1] == 0:
            raise ValueError(f"what is quantised is x (..., K) with K > 0, got {tuple(shape)}")
        check_size("rows of x", math.prod(shape[:-1]))
        check_size("columns of x", shape[-1])
        return shape

    known = by_form(checked)

    def hopper(*arguments: Any) -> Quantized:
        shape = known(*arguments)
        found = launch_quantize(prologue, arguments, shape)
        return _quantize_matrix(rounded(prologue, arguments)) if found is None else found

    def reference(*arguments: Any) -> Quantized:
        checked(*arguments)
        return _plain(rounded(prologue, arguments))

    def fake(*arguments: Any) -> Quantized:
        shape, like = checked(*arguments), arguments[0]
        return like.new_empty(shape, dtype=E4M3), like.new_empty((*shape[:-1], 1), dtype=torch.float32)

    name = "quantize" if prologue is IDENTITY else f"{prologue.name}_quantize"
    return operator(
        f"{name}({prologue.schema}) -> (Tensor values, Tensor scale)",
        hopper=hopper,
        reference=reference,
        fake=fake,
    )


def _quantize_matrix(x: Tensor) -> Quantized:
    """On the current Hopper card, however `x` lies."""
    x = expressible(x if x.stride(-1) == 1 else x.contiguous())  # (kept until the launch)
    bound = bind_matrix(x)
    return quantize_kernel.launch(bound, x.shape) if quantize_kernel.fits(bound) else _plain(x.contiguous())


def _plain(x: Tensor) -> Quantized:
    values, scale = quantize_tokens(x)
    return values, scale


COMPRESS = {name: _compress_operator(one) for name, one in PROLOGUES.items() if one is not IDENTITY}
QUANTIZE = {name: _quantize_operator(one) for name, one in PROLOGUES.items()}
quantize = QUANTIZE[IDENTITY.name]

"""Torch operators that quantise all of a tensor, or of what an elementwise chain yields, to e4m3 by tokens.

Each computes its chain (`rtlynx.ops.prologues`), of which nothing is stored in bfloat16, and quantises it as
`rtlynx.math.fp8.quantize_tokens` does, to the bit. The strides of their inputs are free. All return

    values : Tensor (..., K) float8_e4m3fn, contiguous
    scale : Tensor (..., 1) float32, t of each token

as row-wise scaled products (`torch._scaled_mm`) take them. On a Hopper card one kernel does it all where K is
a multiple of 8 up to 16,384 and rows lie at multiples of 16 bytes. Elsewhere it runs in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.sm90 import quantize as quantize_rows
from rtlynx.cuda.sm90.compress import expressible, matrix_input
from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.ops.checks import check_size, check_tensor
from rtlynx.ops.prologues import PRODUCERS, rounded, source_of
from rtlynx.ops.registry import operator, refuse_gradients

Values = tuple[Tensor, Tensor]


def launch(
    name: str, inputs: Sequence[Any], shape: Sequence[int], dense: Tensor | None = None
) -> Values | None:
    """One kernel of the chain `name` on the current Hopper card, or None where it cannot read the inputs.

    This is what the operators run, with the test mode that they lack: `dense` (M, K) bfloat16, contiguous,
    receives what the kernel quantises. `shape` is that of the values. Arguments are not checked.
    """
    found = source_of(name, inputs)
    if found is None:
        return None
    source, _kept = found
    return quantize_rows.launch(source, shape, dense) if quantize_rows.fits(source) else None


def _check_shape(shape: Sequence[int]) -> None:
    if not shape or shape[-1] == 0:
        raise ValueError(f"what is quantised is x (..., K) with K > 0, got {tuple(shape)}")
    check_size("rows of x", math.prod(shape[:-1]))
    check_size("columns of x", shape[-1])


def _plain(x: Tensor) -> Values:
    values, scale = quantize_tokens(x)
    return values, scale


def _fake_values(like: Tensor, shape: Sequence[int]) -> Values:
    return like.new_empty(shape, dtype=E4M3), like.new_empty((*shape[:-1], 1), dtype=torch.float32)


# --------------------------------------------------------------------------------------------- operators


def _check(x: Tensor) -> None:
    check_tensor("x", x, x)
    refuse_gradients(x)
    _check_shape(x.shape)


def _quantize_hopper(x: Tensor) -> Values:
    _check(x)
    x = expressible(x if x.stride(-1) == 1 else x.contiguous())
    source = matrix_input(x)
    return quantize_rows.launch(source, x.shape) if quantize_rows.fits(source) else _plain(x.contiguous())


def _quantize_reference(x: Tensor) -> Values:
    _check(x)
    return _plain(x.contiguous())


def _quantize_fake(x: Tensor) -> Values:
    _check(x)
    return _fake_values(x, x.shape)


quantize = operator(
    "quantize(Tensor x) -> (Tensor values, Tensor scale)",
    hopper=_quantize_hopper,
    reference=_quantize_reference,
    fake=_quantize_fake,
)
"""Quantise each token of x (..., K) bfloat16.

Raises
------
TypeError
    If `x` is not bfloat16.
ValueError
    If it has no columns.
RuntimeError
    If a gradient would be lost.
"""


def _register(name: str) -> Any:
    inputs_schema, shape_of, chain, _ = PRODUCERS[name]

    def checked(inputs: Sequence[Any]) -> tuple[int, ...]:
        """Shape of the values."""
        shape = shape_of(*inputs)
        _check_shape(shape)
        return shape

    def hopper(*inputs: Any) -> Values:
        shape = checked(inputs)
        return launch(name, inputs, shape) or _quantize_hopper(rounded(chain, inputs))

    def reference(*inputs: Any) -> Values:
        checked(inputs)
        return _plain(rounded(chain, inputs))

    def fake(*inputs: Any) -> Values:
        return _fake_values(inputs[0], checked(inputs))

    return operator(
        f"{name}_quantize({inputs_schema}) -> (Tensor values, Tensor scale)",
        hopper=hopper,
        reference=reference,
        fake=fake,
    )


adaln_quantize = _register("adaln")
"""Quantise layer_norm(x) * (1 + scale) + shift; arguments as of `producers.adaln_compress` before `lowrank_a`.

Raises
------
TypeError
    If `x` is not bfloat16, or a parameter neither bfloat16 nor float32.
ValueError
    If shapes or devices do not fit.
RuntimeError
    If a gradient would be lost.
"""

rmsnorm_quantize = _register("rmsnorm")
"""Quantise rms_norm(x) * weight * scale; arguments as of `producers.rmsnorm_compress`, errors as above."""

gelu_quantize = _register("gelu")
"""Quantise gelu(x), in the form with tanh; x (..., K) bfloat16, errors as above."""

silu_gate_quantize = _register("silu_gate")
"""Quantise silu(a) * b; a and b (..., K) bfloat16 of one shape, errors as above."""

concat_gelu_quantize = _register("concat_gelu")
"""Quantise cat([a, gelu(b)], -1); a (..., K1) and b (..., K2) bfloat16, K = K1 + K2, errors as above."""

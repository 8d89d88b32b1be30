"""Torch operators that compress the output of an elementwise chain without storing it.

Each computes its chain (`rtlynx.ops.prologues`) and goes on like `rtlynx::compress`. They all end with its
arguments `lowrank_a`, `grouping`, `parts`, `norm` and `fp8` and return what it does (`rtlynx.ops.sparse_linear`).
The strides of their inputs are free.

On a Hopper card one kernel does it all where it can read 16 bytes at a time: widths are multiples of 8,
strided parts of 32, rows lie at multiples of 16 bytes. Elsewhere the chain runs in plain PyTorch first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rtlynx.cuda.sm90 import compress
from rtlynx.cuda.sm90.compress import CompressOptions
from rtlynx.cuda.sm90.weights import readable
from rtlynx.math.tiles import format_of
from rtlynx.ops.checks import check_selection
from rtlynx.ops.prologues import PRODUCERS, rounded, source_of
from rtlynx.ops.registry import operator, refuse_gradients
from rtlynx.ops.sparse_linear import compress_fake, compress_reference

Compressed = tuple[Tensor, Tensor, Tensor]


def launch(
    name: str,
    inputs: Sequence[Any],
    lowrank_a: Tensor | None,
    options: CompressOptions,
    dense: Tensor | None = None,
) -> Compressed | None:
    """One kernel of the producer `name` on the current Hopper card, or None where it cannot read the inputs.

    This is what the operators run, with the test mode that they lack: `dense` (M, K) bfloat16, contiguous,
    receives what the kernel selects from. Arguments are not checked.
    """
    found = source_of(name, inputs)
    if found is None:
        return None
    source, _kept = found
    if not compress.vectors_fit(options.grouping, options.parts, source.columns):
        return None
    return compress.launch(source, None if lowrank_a is None else readable(lowrank_a), options, dense)


# --------------------------------------------------------------------------------------------- operators


def _register(name: str) -> Any:
    inputs_schema, shape, chain, _ = PRODUCERS[name]
    count = inputs_schema.count(",") + 1

    def checked(arguments: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Shape of the dense tensor, inputs of the chain, and how it is compressed."""
        inputs, tail = arguments[:count], arguments[count:]
        lowrank_a, grouping, parts, *_ = tail
        found = shape(*inputs)
        check_selection(inputs[0], found, lowrank_a, grouping, parts)
        refuse_gradients(lowrank_a)
        return found, inputs, tail

    def hopper(*arguments: Any) -> Compressed:
        _, inputs, (lowrank_a, grouping, parts, norm, *fp8) = checked(arguments)
        options = CompressOptions(grouping, tuple(parts), norm, format_of(any(fp8)))
        return launch(name, inputs, lowrank_a, options) or compress.launch_compress(
            rounded(chain, inputs), lowrank_a, options
        )

    def reference(*arguments: Any) -> Compressed:
        _, inputs, tail = checked(arguments)
        return compress_reference(rounded(chain, inputs), *tail)

    def fake(*arguments: Any) -> Compressed:
        found, inputs, tail = checked(arguments)
        return compress_fake(inputs[0].new_empty(found), *tail)

    return operator(
        f"{name}_compress({inputs_schema}, Tensor? lowrank_a, str grouping, int[] parts, bool norm,"
        " bool fp8=False) -> (Tensor blocks, Tensor s, Tensor lowrank)",
        hopper=hopper,
        reference=reference,
        fake=fake,
    )


adaln_compress = _register("adaln")
"""`compress` of layer_norm(x) * (1 + scale) + shift: adaptive layer norm without weights, then modulation.

Parameters
----------
x : Tensor (B, T, K) or (T, K) bfloat16
shift, scale : Tensor (B, K), (B, 1, K) or (K,), B also 1 for all, bfloat16 or (slower) float32
eps : float
    Added to the variance.
lowrank_a, grouping, parts, norm, fp8
    As of `rtlynx.ops.sparse_linear.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.ops.sparse_linear.compress`, for M = B T rows.

Raises
------
TypeError
    If `x` or `lowrank_a` is not bfloat16, or a parameter neither bfloat16 nor float32.
ValueError
    If shapes or devices do not fit, or K does not split into the groups.
RuntimeError
    If a gradient would be lost.
"""

rmsnorm_compress = _register("rmsnorm")
"""`compress` of rms_norm(x) * weight * scale (Z-Image).

Parameters
----------
x : Tensor (B, T, K) or (T, K) bfloat16
weight : Tensor (K,) bfloat16 or (slower) float32
scale : Tensor (B, K), (B, 1, K) or (K,), B also 1 for all, bfloat16 or (slower) float32
eps : float
    Added to the mean square.
lowrank_a, grouping, parts, norm, fp8
    As of `rtlynx.ops.sparse_linear.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.ops.sparse_linear.compress`, for M = B T rows.

Raises
------
TypeError, ValueError, RuntimeError
    As `adaln_compress`.
"""

gelu_compress = _register("gelu")
"""`compress` of gelu(x), in the form with tanh.

Parameters
----------
x : Tensor (..., K) bfloat16
lowrank_a, grouping, parts, norm, fp8
    As of `rtlynx.ops.sparse_linear.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.ops.sparse_linear.compress`.

Raises
------
TypeError
    If an input or `lowrank_a` is not bfloat16.
ValueError
    If shapes or devices do not fit, or K does not split into the groups.
RuntimeError
    If a gradient would be lost.
"""

silu_gate_compress = _register("silu_gate")
"""`compress` of silu(a) * b.

Parameters
----------
a, b : Tensor (..., K) bfloat16
    Of one shape; halves of one product's output are read where they are.
lowrank_a, grouping, parts, norm, fp8
    As of `rtlynx.ops.sparse_linear.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.ops.sparse_linear.compress`.

Raises
------
TypeError, ValueError, RuntimeError
    As `gelu_compress`.
"""

concat_gelu_compress = _register("concat_gelu")
"""`compress` of cat([a, gelu(b)], -1), gelu in the form with tanh (FLUX, single blocks).

Parameters
----------
a : Tensor (..., K1) bfloat16
b : Tensor (..., K2) bfloat16
    K = K1 + K2.
lowrank_a, grouping, parts, norm, fp8
    As of `rtlynx.ops.sparse_linear.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.ops.sparse_linear.compress`.

Raises
------
TypeError, ValueError, RuntimeError
    As `gelu_compress`.
"""

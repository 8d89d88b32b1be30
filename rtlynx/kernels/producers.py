"""Torch operators that compress the output of an elementwise chain without storing it.

Each computes its chain in float32, rounds it once to bfloat16 and goes on like `rtlynx::compress`. They all
end with its arguments `down`, `grouping`, `parts`, `norm` and `fp8` and return what it does
(`rtlynx.kernels.ops`). The strides of their inputs are free.

On a Hopper card one kernel does it all where it can read 16 bytes at a time: widths are multiples of 8,
strided parts of 32, rows lie at multiples of 16 bytes. Elsewhere the chain runs in plain PyTorch first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from rtlynx.kernels.blocks import format_of
from rtlynx.kernels.checks import check_dtype, check_selection
from rtlynx.kernels.operators import operator, refuse_gradients
from rtlynx.kernels.ops import compress_fake, compress_reference
from rtlynx.kernels.sm90 import compress
from rtlynx.kernels.sm90 import producers as sources
from rtlynx.kernels.sm90.compress import CompressOptions
from rtlynx.kernels.sm90.weights import readable

Compressed = tuple[Tensor, Tensor, Tensor]
_PARAMETER_DTYPES = (torch.bfloat16, torch.float32)


class _Producer(NamedTuple):
    """A chain; each function takes the operator's arguments that come before `down`.

    inputs : of the schema
    shape : of the result, after checks
    chain : the result in float32
    operands : what the kernel reads, some of it perhaps copied, or None where it cannot
    """

    inputs: str
    shape: Callable[..., tuple[int, ...]]
    chain: Callable[..., Tensor]
    operands: Callable[..., tuple[Any, ...] | None]


# ------------------------------------------------------------------------------------------------ checks


def _same_device(first: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != first.device:
            raise ValueError(f"{name} is on {first.device} like the first input, got {other.device}")


def _modulated_shape(x: Tensor, **parameters: Tensor) -> tuple[int, ...]:
    """Of `x` (B, T, K) or (T, K), whose parameters fit it."""
    check_dtype(x)
    refuse_gradients(x, *parameters.values())
    _same_device(x, **parameters)
    if x.ndim not in (2, 3):
        raise ValueError(f"x is (B, T, K) or (T, K), got {tuple(x.shape)}")
    batch, k = (x.shape[0] if x.ndim == 3 else 1), x.shape[-1]
    for name, parameter in parameters.items():
        if parameter.dtype not in _PARAMETER_DTYPES:
            raise TypeError(f"{name} is bfloat16 or float32, got {parameter.dtype}")
        shape = tuple(parameter.shape)
        along_k = bool(shape) and shape[-1] == k
        if name == "weight":
            if not along_k or len(shape) != 1:
                raise ValueError(f"weight is ({k},) for x of shape {tuple(x.shape)}, got {shape}")
            continue
        batches, between = shape[:-1][:1], shape[1:-1]
        if not (along_k and between in ((), (1,)) and all(size in (1, batch) for size in batches)):
            raise ValueError(
                f"{name} is (B, {k}), (B, 1, {k}) or ({k},), B 1 or {batch}, for x of shape "
                f"{tuple(x.shape)}, got {shape}"
            )
    return tuple(x.shape)


def _adaln_shape(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[int, ...]:
    return _modulated_shape(x, shift=shift, scale=scale)


def _rmsnorm_shape(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[int, ...]:
    return _modulated_shape(x, weight=weight, scale=scale)


def _gelu_shape(x: Tensor) -> tuple[int, ...]:
    check_dtype(x)
    refuse_gradients(x)
    return tuple(x.shape)


def _pair(a: Tensor, b: Tensor) -> None:
    check_dtype(a, b)
    refuse_gradients(a, b)
    _same_device(a, b=b)


def _silu_gate_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    _pair(a, b)
    if a.shape != b.shape:
        raise ValueError(f"a and b have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return tuple(a.shape)


def _concat_gelu_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    _pair(a, b)
    shapes = tuple(a.shape), tuple(b.shape)
    if not (a.ndim and b.ndim and a.shape[:-1] == b.shape[:-1] and a.shape[-1] and b.shape[-1]):
        raise ValueError(
            f"a and b are (..., columns) that differ in columns alone, got {shapes[0]} and {shapes[1]}"
        )
    return (*shapes[0][:-1], shapes[0][-1] + shapes[1][-1])


# ------------------------------------------------------------------------------------- in plain PyTorch


def _for_tokens(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter of any of its shapes in float32, to be multiplied with `x`."""
    rows = _rows(parameter).float()
    return rows.unsqueeze(1) if x.ndim == 3 else rows


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = layer_norm(x.float(), x.shape[-1:], eps=eps)
    return normed * (1 + _for_tokens(scale, x)) + _for_tokens(shift, x)


def _rmsnorm(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float() * _for_tokens(scale, x)


def _gelu(x: Tensor) -> Tensor:
    return gelu(x.float(), approximate="tanh")


def _silu_gate(a: Tensor, b: Tensor) -> Tensor:
    return silu(a.float()) * b.float()


def _concat_gelu(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a.float(), _gelu(b)], dim=-1)


def _dense(chain: Callable[..., Tensor], inputs: Sequence[Any]) -> Tensor:
    """What the chain yields, rounded; contiguous, though an input may lie otherwise."""
    plain = [one.detach() if isinstance(one, Tensor) else one for one in inputs]
    return chain(*plain).bfloat16().contiguous()


# --------------------------------------------------------------------------------------- for the kernel


def _rows(parameter: Tensor) -> Tensor:
    """(K,), (B, K) or (B, 1, K) as (B, K)."""
    if parameter.ndim == 1:
        return parameter.unsqueeze(0)
    return parameter.squeeze(1) if parameter.ndim == 3 else parameter


def _streamed(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Inputs whose rows a kernel finds by two strides."""
    for tensor in tensors:
        if tensor.stride(-1) != 1 or (tensor.dim() > 3 and not tensor.is_contiguous()):
            return None
    return tensors


def _adaln_operands(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Any, ...] | None:
    if x.stride(-1) != 1 or shift.dtype is not torch.bfloat16 or scale.dtype is not torch.bfloat16:
        return None
    shift, scale = readable(_rows(shift)), readable(_rows(scale))
    batch = max(shift.shape[0], scale.shape[0])
    if batch > 1 and (shift.shape != scale.shape or shift.stride(0) != scale.stride(0)):
        # One stride serves both.
        shift, scale = (one.expand(batch, -1).contiguous() for one in (shift, scale))
    return x, shift, scale, eps


def _rmsnorm_operands(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Any, ...] | None:
    if x.stride(-1) != 1 or weight.dtype is not torch.bfloat16 or scale.dtype is not torch.bfloat16:
        return None
    return x, readable(_rows(weight)), readable(_rows(scale)), eps


def _concat_gelu_operands(a: Tensor, b: Tensor) -> tuple[Any, ...] | None:
    return _streamed(a, b) if a.shape[-1] % 8 == 0 else None


_PRODUCERS = {
    "adaln": _Producer(
        "Tensor x, Tensor shift, Tensor scale, float eps", _adaln_shape, _adaln, _adaln_operands
    ),
    "rmsnorm": _Producer(
        "Tensor x, Tensor weight, Tensor scale, float eps", _rmsnorm_shape, _rmsnorm, _rmsnorm_operands
    ),
    "gelu": _Producer("Tensor x", _gelu_shape, _gelu, _streamed),
    "silu_gate": _Producer("Tensor a, Tensor b", _silu_gate_shape, _silu_gate, _streamed),
    "concat_gelu": _Producer("Tensor a, Tensor b", _concat_gelu_shape, _concat_gelu, _concat_gelu_operands),
}


def launch(
    name: str,
    inputs: Sequence[Any],
    down: Tensor | None,
    options: CompressOptions,
    dense: Tensor | None = None,
) -> Compressed | None:
    """One kernel of the producer `name` on the current Hopper card, or None where it cannot read the inputs.

    This is what the operators run, with the test mode that they lack: `dense` (M, K) bfloat16, contiguous,
    receives what the kernel selects from. Arguments are not checked.
    """
    producer = _PRODUCERS[name]
    # Kept until the launch: what is copied here is known to the kernel by its address alone.
    operands = producer.operands(*inputs)
    if operands is None:
        return None
    source = getattr(sources, name)(*operands)
    if not source.aligned or source.columns % 8:
        return None
    if not compress.vectors_fit(options.grouping, options.parts, source.columns):
        return None
    return compress.launch(source, None if down is None else readable(down), options, dense)


# --------------------------------------------------------------------------------------------- operators


def _register(name: str) -> Any:
    inputs_schema, shape, chain, _ = _PRODUCERS[name]
    count = inputs_schema.count(",") + 1

    def checked(arguments: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Shape of the dense tensor, inputs of the chain, and how it is compressed."""
        inputs, tail = arguments[:count], arguments[count:]
        down, grouping, parts, *_ = tail
        found = shape(*inputs)
        check_dtype(down)
        refuse_gradients(down)
        check_selection(inputs[0], found[-1] if found else 0, down, grouping, parts)
        return found, inputs, tail

    def hopper(*arguments: Any) -> Compressed:
        _, inputs, (down, grouping, parts, norm, *fp8) = checked(arguments)
        options = CompressOptions(grouping, tuple(parts), norm, format_of(any(fp8)))
        return launch(name, inputs, down, options) or compress.launch_compress(
            _dense(chain, inputs), down, options
        )

    def reference(*arguments: Any) -> Compressed:
        _, inputs, tail = checked(arguments)
        return compress_reference(_dense(chain, inputs), *tail)

    def fake(*arguments: Any) -> Compressed:
        found, inputs, tail = checked(arguments)
        return compress_fake(inputs[0].new_empty(found), *tail)

    return operator(
        f"{name}_compress({inputs_schema}, Tensor? down, str grouping, int[] parts, bool norm,"
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
down, grouping, parts, norm, fp8
    As of `rtlynx.kernels.ops.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.kernels.ops.compress`, for M = B T rows.

Raises
------
TypeError
    If `x` or `down` is not bfloat16, or a parameter neither bfloat16 nor float32.
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
down, grouping, parts, norm, fp8
    As of `rtlynx.kernels.ops.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.kernels.ops.compress`, for M = B T rows.

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
down, grouping, parts, norm, fp8
    As of `rtlynx.kernels.ops.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.kernels.ops.compress`.

Raises
------
TypeError
    If an input or `down` is not bfloat16.
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
down, grouping, parts, norm, fp8
    As of `rtlynx.kernels.ops.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.kernels.ops.compress`.

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
down, grouping, parts, norm, fp8
    As of `rtlynx.kernels.ops.compress`.

Returns
-------
blocks, scale, lowrank
    As of `rtlynx.kernels.ops.compress`.

Raises
------
TypeError, ValueError, RuntimeError
    As `gelu_compress`.
"""

"""What the elementwise chains are that kernels compute on the way: checks, plain PyTorch, kernels' operands.

Each is computed in float32 and rounded once to bfloat16. `rtlynx.ops.compress_prologues` compresses its
result, `rtlynx.ops.quantize_prologues` quantises all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from rtlynx.cuda.sm90 import producers as sources
from rtlynx.cuda.sm90.compress import Input
from rtlynx.cuda.sm90.weights import readable
from rtlynx.ops.checks import FLOATS, check_tensor
from rtlynx.ops.registry import refuse_gradients


class Producer(NamedTuple):
    """A chain; each function takes its inputs, as operators do before anything else.

    inputs : of the schema
    shape : of the result, after checks
    chain : the result in float32
    operands : what kernels read, some of it perhaps copied, or None where they cannot
    """

    inputs: str
    shape: Callable[..., tuple[int, ...]]
    chain: Callable[..., Tensor]
    operands: Callable[..., tuple[Any, ...] | None]


# ------------------------------------------------------------------------------------------------ checks


def _modulated_shape(x: Tensor, **parameters: Tensor) -> tuple[int, ...]:
    """Of `x` (B, T, K) or (T, K), whose parameters fit it."""
    check_tensor("x", x, x)
    refuse_gradients(x, *parameters.values())
    if x.ndim not in (2, 3):
        raise ValueError(f"x is (B, T, K) or (T, K), got {tuple(x.shape)}")
    batch, k = (x.shape[0] if x.ndim == 3 else 1), x.shape[-1]
    for name, parameter in parameters.items():
        check_tensor(name, parameter, x, FLOATS)
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
    check_tensor("x", x, x)
    refuse_gradients(x)
    return tuple(x.shape)


def _pair(a: Tensor, b: Tensor) -> None:
    check_tensor("a", a, a)
    check_tensor("b", b, a)
    refuse_gradients(a, b)


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


def rounded(chain: Callable[..., Tensor], inputs: Sequence[Any]) -> Tensor:
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


PRODUCERS = {
    "adaln": Producer(
        "Tensor x, Tensor shift, Tensor scale, float eps", _adaln_shape, _adaln, _adaln_operands
    ),
    "rmsnorm": Producer(
        "Tensor x, Tensor weight, Tensor scale, float eps", _rmsnorm_shape, _rmsnorm, _rmsnorm_operands
    ),
    "gelu": Producer("Tensor x", _gelu_shape, _gelu, _streamed),
    "silu_gate": Producer("Tensor a, Tensor b", _silu_gate_shape, _silu_gate, _streamed),
    "concat_gelu": Producer("Tensor a, Tensor b", _concat_gelu_shape, _concat_gelu, _concat_gelu_operands),
}


def source_of(name: str, inputs: Sequence[Any]) -> tuple[Input, object] | None:
    """What a kernel reads for the chain `name`, and what must be kept until its launch: copies that it reads.

    None where it cannot read the inputs 16 bytes at a time.
    """
    operands = PRODUCERS[name].operands(*inputs)
    if operands is None:
        return None
    found: Input = getattr(sources, name)(*operands)
    return (found, operands) if found.aligned and found.columns % 8 == 0 else None

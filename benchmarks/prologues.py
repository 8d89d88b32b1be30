"""Our prologues, and the elementwise functions of diffusers that they replace.

A chain ends with the dense tensor that a linear layer reads; the prologue ends with it compressed, s and,
with a low-rank branch, T; the quantiser with all of it in e4m3, and scales.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

Tail = tuple[Tensor | None, str, list[int], bool]  # lowrank_a, grouping, parts, norm: how every one ends


class Prologue(NamedTuple):
    """A chain, the operators that replace it, and random inputs for all.

    inputs(m, k, normal) are tensors; k is the width of the result.
    """

    name: str
    m: int
    k: int
    inputs: Callable[[int, int, Callable[..., Tensor]], tuple[Tensor, ...]]
    chain: Callable[..., Tensor]
    fused: Callable[..., object]
    quantized: Callable[..., tuple[Tensor, Tensor]]


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def rmsnorm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, eps=1e-5) * scale[:, None]


def rms_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def silu_gate(a: Tensor, b: Tensor) -> Tensor:
    return silu(a) * b


def concat_gelu(attention: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attention, gelu(mlp, approximate="tanh")], dim=-1)


def concat_silu_gate(attention: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attention, silu_gate(*mlp.chunk(2, dim=-1))], dim=-1)


MATRIX = Prologue(  # no chain: what is quantised before an attention's output layer
    "matrix",
    4096,
    3072,
    lambda m, k, normal: (normal(1, m, k),),
    lambda x: x,
    lambda x, tail: torch.ops.rtlynx.compress(x, *tail),
    lambda x: torch.ops.rtlynx.quantize(x),
)
PROLOGUES = (
    Prologue(
        "adaln",  # FLUX: before q, k, v and before the MLP
        4096,
        3072,
        lambda m, k, normal: (normal(1, m, k), normal(1, k), normal(1, k)),
        adaln,
        lambda x, shift, scale, tail: torch.ops.rtlynx.adaln_compress(x, shift, scale, 1e-6, *tail),
        lambda x, shift, scale: torch.ops.rtlynx.adaln_quantize(x, shift, scale, 1e-6),
    ),
    Prologue(
        "rms_adaln",  # LTX-2: video before q, k, v and before the MLP
        6144,
        4096,
        lambda m, k, normal: (normal(1, m, k), normal(1, k), normal(1, k)),
        rms_adaln,
        lambda x, shift, scale, tail: torch.ops.rtlynx.rms_adaln_compress(x, shift, scale, 1e-6, *tail),
        lambda x, shift, scale: torch.ops.rtlynx.rms_adaln_quantize(x, shift, scale, 1e-6),
    ),
    Prologue(
        "rmsnorm",  # Z-Image
        4128,
        3840,
        lambda m, k, normal: (normal(1, m, k), normal(k), normal(1, k)),
        rmsnorm,
        lambda x, weight, scale, tail: torch.ops.rtlynx.rmsnorm_compress(x, weight, scale, 1e-5, *tail),
        lambda x, weight, scale: torch.ops.rtlynx.rmsnorm_quantize(x, weight, scale, 1e-5),
    ),
    Prologue(
        "gelu",  # FLUX: between the MLP's layers
        4096,
        12288,
        lambda m, k, normal: (normal(1, m, k),),
        tanh_gelu,
        lambda x, tail: torch.ops.rtlynx.gelu_compress(x, *tail),
        lambda x: torch.ops.rtlynx.gelu_quantize(x),
    ),
    Prologue(
        "silu-gate",  # Z-Image: w1 and w3 as slices of one product's result
        4128,
        10240,
        lambda m, k, normal: normal(1, m, 2 * k).chunk(2, dim=-1),
        silu_gate,
        lambda a, b, tail: torch.ops.rtlynx.silu_gate_compress(a, b, *tail),
        lambda a, b: torch.ops.rtlynx.silu_gate_quantize(a, b),
    ),
    Prologue(
        "concat-gelu",  # FLUX: single blocks
        4608,
        15360,
        lambda m, k, normal: (normal(1, m, k // 5), normal(1, m, k // 5 * 4)),
        concat_gelu,
        lambda attention, mlp, tail: torch.ops.rtlynx.concat_gelu_compress(attention, mlp, *tail),
        lambda attention, mlp: torch.ops.rtlynx.concat_gelu_quantize(attention, mlp),
    ),
    Prologue(
        "concat-silu-gate",  # FLUX.2 klein: single blocks
        4608,
        12288,
        lambda m, k, normal: (normal(1, m, k // 4), normal(1, m, k // 4 * 6)),
        concat_silu_gate,
        lambda attention, mlp, tail: torch.ops.rtlynx.concat_silu_gate_compress(attention, mlp, *tail),
        lambda attention, mlp: torch.ops.rtlynx.concat_silu_gate_quantize(attention, mlp),
    ),
)

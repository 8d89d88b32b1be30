"""Linear layers that read the end of an elementwise chain: one kernel computes the chain and compresses it.

`read` gives the layers either the dense tensor or, where kernels serve them all, a `CompressedInput` that
stands for it: the chain's result is never stored, and all layers together are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx.compressed import CompressedInput
from rtlynx.kernels import ops, producers
from rtlynx.kernels.sm90.gemm import MAX_LAYERS
from rtlynx.linear import SparseLinear


class Chain(NamedTuple):
    """An elementwise chain in both its forms.

    compress : an operator of `rtlynx.kernels.producers`
    inputs : its arguments before `down`, a bfloat16 tensor first
    dense : the chain as the model computes it, (..., K)
    """

    compress: Callable[..., tuple[Tensor, Tensor, Tensor]]
    inputs: tuple[Any, ...]
    dense: Callable[[], Tensor]


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its class's forward."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def read(chain: Chain, *layers: nn.Module) -> Tensor | CompressedInput:
    """What to call `layers`, all that read the end of `chain`, with."""
    found = _sparse(layers)
    x = chain.inputs[0]
    if found is None or torch.is_autocast_enabled(x.device.type) or not all(one.served(x) for one in found):
        return chain.dense()
    first = found[0]
    down, first_ranks = first.shared_input.factor([layer.lowrank_down for layer in found])
    pattern, fp8 = first.pattern, first.precision == "fp8"
    compressed = chain.compress(
        *chain.inputs,
        *(down, pattern.grouping, ops.pattern_parts(pattern, first.in_features), first.norm == "scale", fp8),
    )
    shape = torch.Size((*x.shape[:-1], first.in_features))
    return CompressedInput(shape, x.dtype, x.device, compressed, found, first_ranks)


def _sparse(layers: Sequence[nn.Module]) -> tuple[SparseLinear, ...] | None:
    """The layers, if they are sparse ones of one form that are called for nothing but their output."""
    if len(layers) > MAX_LAYERS:
        return None
    found = []
    for layer in layers:
        # Adapters wrap a layer; hooks want the input that it would get.
        if type(layer) is not SparseLinear or not untouched(layer):
            return None
        if layer.dense_reason is not None or layer.context.dense_step or layer.pattern.n == layer.pattern.m:
            return None
        if layer.text_rows_dense and layer.context.text_rows is not None:
            return None
        found.append(layer)
    first = found[0]
    for layer in found[1:]:
        if (layer.pattern, layer.norm, layer.precision) != (first.pattern, first.norm, first.precision):
            return None
        if (layer.bias is None) is not (first.bias is None) or (layer.rank > 0) is not (first.rank > 0):
            return None
    if any(layer.out_features % 8 for layer in found[:-1]):
        return None
    return tuple(found)


# ------------------------------------------------------------------------------------------------ chains


def adaln(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Chain:
    """norm(x) * (1 + scale) + shift: x (B, T, K), `norm` without parameters, shift and scale (B, K)."""
    return Chain(
        producers.adaln_compress,
        (x, shift, scale, norm.eps),
        lambda: norm(x) * (1 + scale[:, None]) + shift[:, None],
    )


def rmsnorm(norm: nn.Module, x: Tensor, scale: Tensor) -> Chain:
    """norm(x) * scale: x (B, T, K), `norm` an RMS norm with `weight` (K,) and `eps`, scale (B, 1, K)."""
    return Chain(producers.rmsnorm_compress, (x, norm.weight, scale, norm.eps), lambda: norm(x) * scale)


def activated(gelu: Callable[[Tensor], Tensor], x: Tensor) -> Chain:
    """`gelu`(x), in the form with tanh; x (..., K)."""
    return Chain(producers.gelu_compress, (x,), lambda: gelu(x))


def silu_gated(a: Tensor, b: Tensor, dense: Callable[[Tensor, Tensor], Tensor]) -> Chain:
    """silu(a) * b, `dense` of both; a and b (..., K)."""
    return Chain(producers.silu_gate_compress, (a, b), lambda: dense(a, b))


def beside_activated(a: Tensor, gelu: Callable[[Tensor], Tensor], b: Tensor) -> Chain:
    """cat([a, gelu(b)], -1), the form with tanh; a (..., K1), b (..., K2)."""
    return Chain(producers.concat_gelu_compress, (a, b), lambda: torch.cat([a, gelu(b)], dim=-1))

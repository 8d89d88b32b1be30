"""Linear layers that read the end of an elementwise chain: one kernel computes the chain and compresses it.

`read` gives the layers either the dense tensor or, where kernels serve them all, what stands for it: a
`CompressedInput`, for sparse layers, a `QuantizedInput`, for dense fp8 ones, or a `MixedInput` of both. The
chain's result is then never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx.cuda.sm90.gemm import MAX_LAYERS
from rtlynx.nn.prepared import CompressedInput, MixedInput, PreparedInput, QuantizedInput
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.ops import compress_prologues as producers
from rtlynx.ops import quantize_prologues as quantizers
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.dispatch import quantizer_supports, scaled_mm_supports
from rtlynx.ops.fp8_linear import CompressedFp8


class Chain(NamedTuple):
    """An elementwise chain in its three forms.

    compress : an operator of `rtlynx.ops.compress_prologues`
    quantize : an operator of `rtlynx.ops.quantize_prologues`
    inputs : what they read, the arguments of `compress` before `lowrank_a`; a bfloat16 tensor first
    dense : the chain as the model computes it, (..., K)
    """

    compress: Callable[..., tuple[Tensor, Tensor, Tensor]]
    quantize: Callable[..., tuple[Tensor, Tensor]]
    inputs: tuple[Any, ...]
    dense: Callable[[], Tensor]


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its class's forward."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def read(chain: Chain, *layers: nn.Module) -> Tensor | PreparedInput:
    """What to call `layers`, all that read the end of `chain`, with."""
    found = _readers(layers)
    if found is None or torch.is_autocast_enabled(chain.inputs[0].device.type):
        return chain.dense()
    whole = tuple(layer for layer in found if layer.pattern.n == layer.pattern.m)
    dropping = tuple(layer for layer in found if layer.pattern.n < layer.pattern.m)
    if not (_quantizer_supports(chain, whole) and _compression_supported(chain, dropping)):
        return chain.dense()
    if len(whole) == len(found):
        return _quantized(chain, whole)
    if len(dropping) == len(found):
        return _compressed(chain, dropping)
    # Each computes the chain for itself: still less traffic than a stored result that both read.
    parts = _quantized(chain, whole), _compressed(chain, dropping)
    return MixedInput(parts[0].shape, parts[0].dtype, parts[0].device, found, parts)


def _readers(layers: Sequence[nn.Module]) -> tuple[SparseLinear, ...] | None:
    """The layers, if they are sparse ones, or in fp8, that are called for nothing but their output."""
    found = []
    for layer in layers:
        # Adapters wrap a layer; hooks want the input that it would get.
        if type(layer) is not SparseLinear or not untouched(layer):
            return None
        if layer.dense_reason is not None or layer.backend is not None:
            return None
        call = layer.call()
        if call is not None and (call.dense or (layer.text_rows_dense and call.has_text)):
            return None
        found.append(layer)
    return tuple(found)


def _compression_supported(chain: Chain, found: tuple[SparseLinear, ...]) -> bool:
    """Whether kernels serve layers that drop entries, as one product; true of no layers."""
    x = chain.inputs[0]
    return len(found) == 0 or (_of_one_format(found) and all(layer.served(x) for layer in found))


def _compressed(chain: Chain, found: tuple[SparseLinear, ...]) -> CompressedInput:
    """The chain compressed for layers that drop entries."""
    x, first = chain.inputs[0], found[0]
    lowrank_a, first_ranks = first.shared_input.factor([layer.lowrank_a for layer in found])
    pattern, fp8 = first.pattern, first.precision == "fp8"
    compressed = chain.compress(
        *chain.inputs,
        *(
            lowrank_a,
            pattern.grouping,
            ops.pattern_parts(pattern, first.in_features),
            first.norm == "scale",
            fp8,
        ),
    )
    shape = torch.Size((*x.shape[:-1], first.in_features))
    return CompressedInput(shape, x.dtype, x.device, found, compressed, first_ranks)


def _of_one_format(found: Sequence[SparseLinear]) -> bool:
    """Whether one product can serve all the layers."""
    if len(found) > MAX_LAYERS or any(layer.out_features % 8 for layer in found[:-1]):
        return False
    first = found[0]
    for layer in found[1:]:
        if (layer.pattern, layer.norm, layer.precision) != (first.pattern, first.norm, first.precision):
            return False
        if (layer.bias is None) is not (first.bias is None) or (layer.rank > 0) is not (first.rank > 0):
            return False
    return True


def _quantizer_supports(chain: Chain, found: tuple[SparseLinear, ...]) -> bool:
    """Whether kernels serve layers that drop nothing; true of no layers."""
    if len(found) == 0:
        return True
    # Low-rank branches read the dense input.
    if any(layer.precision != "fp8" or layer.rank for layer in found):
        return False
    tensors = [one for one in chain.inputs if isinstance(one, Tensor)]
    if not quantizer_supports(found[0].in_features, *tensors):
        return False
    return all(scaled_mm_supports(tensors[0], layer.fp8_parameters()) for layer in found)


def _quantized(chain: Chain, found: tuple[SparseLinear, ...]) -> QuantizedInput:
    """The chain quantised for layers that drop nothing."""
    x = chain.inputs[0]
    values, scale = chain.quantize(*chain.inputs)
    shape = torch.Size((*x.shape[:-1], found[0].in_features))
    return QuantizedInput(shape, x.dtype, x.device, found, CompressedFp8(values, scale))


# ------------------------------------------------------------------------------------------------ chains


def adaln(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Chain:
    """norm(x) * (1 + scale) + shift: x (B, T, K), `norm` without parameters, shift and scale (B, K)."""
    return Chain(
        producers.adaln_compress,
        quantizers.adaln_quantize,
        (x, shift, scale, norm.eps),
        lambda: norm(x) * (1 + scale[:, None]) + shift[:, None],
    )


def rmsnorm(norm: nn.Module, x: Tensor, scale: Tensor) -> Chain:
    """norm(x) * scale: x (B, T, K), `norm` an RMS norm with `weight` (K,) and `eps`, scale (B, 1, K)."""
    return Chain(
        producers.rmsnorm_compress,
        quantizers.rmsnorm_quantize,
        (x, norm.weight, scale, norm.eps),
        lambda: norm(x) * scale,
    )


def activated(gelu: Callable[[Tensor], Tensor], x: Tensor) -> Chain:
    """`gelu`(x), in the form with tanh; x (..., K)."""
    return Chain(producers.gelu_compress, quantizers.gelu_quantize, (x,), lambda: gelu(x))


def silu_gated(a: Tensor, b: Tensor, dense: Callable[[Tensor, Tensor], Tensor]) -> Chain:
    """silu(a) * b, `dense` of both; a and b (..., K)."""
    return Chain(producers.silu_gate_compress, quantizers.silu_gate_quantize, (a, b), lambda: dense(a, b))


def beside_activated(a: Tensor, gelu: Callable[[Tensor], Tensor], b: Tensor) -> Chain:
    """cat([a, gelu(b)], -1), the form with tanh; a (..., K1), b (..., K2)."""
    return Chain(
        producers.concat_gelu_compress,
        quantizers.concat_gelu_quantize,
        (a, b),
        lambda: torch.cat([a, gelu(b)], dim=-1),
    )

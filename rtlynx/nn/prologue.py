"""Linear layers that read a prologue: one kernel computes it and compresses or quantises the result.

`read` gives the layers either the dense tensor or, where kernels support them all, what stands for it: a
`CompressedInput` for sparse layers, a `QuantizedInput` for fp8 ones that drop nothing, or a `MixedInput`. The
prologue's result is then never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rtlynx.cuda.sm90.gemm import MAX_LAYERS
from rtlynx.cuda.sm90.prologues import IDENTITY
from rtlynx.math.formats import FP8_DENSE, FP8_WEIGHT_SPARSE
from rtlynx.nn.lora import Reader, adapter_classes, beside_quantized, joint_factors, reader_of, untouched
from rtlynx.nn.original import quantized_original
from rtlynx.nn.prepared import CompressedInput, MixedInput, PreparedInput, QuantizedInput
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.dispatch import quantizer_supports, scaled_mm_supports, wants_gradient
from rtlynx.ops.fp8_linear import CompressedFp8, Fp8Parameters
from rtlynx.ops.prologues import QUANTIZE


class PrologueCall(NamedTuple):
    """A prologue with its arguments, as a block's `forward` hands it to the layers that read it.

    name : of `rtlynx.cuda.sm90.prologues.PROLOGUES`
    arguments : of its operators, a bfloat16 tensor first; none where they cannot take what the model has
    dense : computes it as the model does, (..., K)
    """

    name: str
    arguments: tuple[Any, ...]
    dense: Callable[[], Tensor]


def read(prologue: PrologueCall, *layers: nn.Module) -> Tensor | PreparedInput:
    """What to call `layers`, all that read `prologue`, with."""
    found = _readers(layers) if prologue.arguments else None
    if found is None or torch.is_autocast_enabled(prologue.arguments[0].device.type):
        return prologue.dense()
    dense_fp8 = tuple(reader for reader in found if _drops_nothing(reader.layer))
    sparse = tuple(reader for reader in found if not _drops_nothing(reader.layer))
    of = _parameters_if_supported(prologue, dense_fp8)
    if of is None or not _compression_supported(prologue, sparse):
        return prologue.dense()
    # Each computes the prologue for itself: still less traffic than a stored result that both read.
    parts: list[PreparedInput] = [_quantized(prologue, dense_fp8, of)] if dense_fp8 else []
    parts += [_compressed(prologue, sparse)] if sparse else []
    first = parts[0]
    if len(parts) == 1:
        return first
    return MixedInput(first.shape, first.dtype, first.device, _layers(found), tuple(parts))


def fuse_adapters(linear: type[nn.Module]) -> None:
    """Let peft's class of linear layers with LoRAs take prepared inputs, which hold what those add.

    A layer that alone reads a tensor then takes its LoRAs into its own product, too.
    """
    original = linear.forward

    @wraps(original)
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and isinstance(x, Tensor) and _adapted_alone(self):
            rows = x if x.stride(-1) == 1 else x.contiguous()
            x = read(PrologueCall(IDENTITY.name, (rows,), lambda: rows), self)
        if isinstance(x, PreparedInput):
            return x.output_of(self.base_layer)
        return original(self, x, *args, **kwargs)

    linear.forward = forward
    adapter_classes.append(linear)


def _adapted_alone(wrapper: Any) -> bool:
    """Whether LoRAs are active beside a sparse layer that no other shares its input with."""
    layer = wrapper.base_layer
    if type(layer) is not SparseLinear or not layer.shared_input.single:
        return False
    return not wrapper.disable_adapters and any(one in wrapper.lora_A for one in wrapper.active_adapters)


def _readers(layers: Sequence[nn.Module]) -> tuple[Reader, ...] | None:
    """The layers, if they all compress or quantise their input and are called for their output alone."""
    found = []
    for module in layers:
        reader = reader_of(module)
        if reader is None:
            return None
        layer = reader.layer
        assert layer.settings  # compiled code is guarded by what it reads
        if layer.dense_reason is not None or layer.backend is not None:
            return None
        call = layer.call()
        if call is not None and layer.text_rows_dense and call.has_text:
            return None
        if call is not None and call.dense and layer.weight_dense_scale is None:
            return None
        found.append(reader)
    return tuple(found)


def _layers(readers: Sequence[Reader]) -> tuple[SparseLinear, ...]:
    return tuple(reader.layer for reader in readers)


def _compression_supported(prologue: PrologueCall, readers: tuple[Reader, ...]) -> bool:
    """Whether kernels support these sparse layers, as one product; true of no layers."""
    found = _layers(readers)
    if not found:
        return True
    x, *others = (one for one in prologue.arguments if isinstance(one, Tensor))
    if wants_gradient(*others):  # of a modulation or norm that is trained; layers ask of x
        return False
    return _of_one_format(found) and all(layer.supported(x) for layer in found)


def _compressed(prologue: PrologueCall, readers: tuple[Reader, ...]) -> CompressedInput:
    """The prologue, to be compressed for sparse layers."""
    found = _layers(readers)
    x, first = prologue.arguments[0], found[0]
    lowrank_a: Tensor | None
    lowrank_bs: list[Tensor] | None = None
    if any(reader.loras for reader in readers):
        lowrank_a, lowrank_bs, first_ranks = joint_factors(readers)
    else:
        lowrank_a, first_ranks = first.shared_input.factor([layer.lowrank_a for layer in found])
    pattern = first.pattern
    how = (
        *(lowrank_a, pattern.grouping, ops.pattern_parts(pattern, first.in_features)),
        *(first.norm == "scale", first.format.name, pattern.score),
    )
    shape = torch.Size((*x.shape[:-1], first.in_features))
    given = prologue.name, prologue.arguments, how
    return CompressedInput(shape, x.dtype, x.device, found, given, first_ranks, lowrank_bs)


def _of_one_format(found: Sequence[SparseLinear]) -> bool:
    """Whether one product can serve all the layers."""
    if len(found) > MAX_LAYERS or any(layer.out_features % 8 for layer in found[:-1]):
        return False
    first = found[0]
    for layer in found[1:]:
        if (layer.pattern, layer.norm) != (first.pattern, first.norm) or layer.format is not first.format:
            return False
        if (layer.bias is None) is not (first.bias is None) or (layer.rank > 0) is not (first.rank > 0):
            return False
    return True


def _drops_nothing(layer: SparseLinear) -> bool:
    """Whether the layer drops no entry of its input in this call."""
    call = layer.call()
    return not layer.format.sparse or (call is not None and call.dense)


def _parameters_if_supported(
    prologue: PrologueCall, readers: tuple[Reader, ...]
) -> list[Fp8Parameters] | None:
    """What these layers, which drop nothing in this call, multiply with; None where kernels do not serve."""
    parameters = []
    found = _layers(readers)
    for layer in found:
        call = layer.call()
        sparse_weight = layer.format is FP8_WEIGHT_SPARSE and (call is None or not call.dense)
        if sparse_weight or layer.format is FP8_DENSE:
            of: Fp8Parameters | None = layer.fp8_parameters()
        else:
            of = quantized_original(layer)
        if of is None or of.lowrank_a is not None:  # low-rank branches read the dense input
            return None
        parameters.append(of)
    tensors = [one for one in prologue.arguments if isinstance(one, Tensor)]
    if found and not quantizer_supports(found[0].in_features, *tensors):
        return None
    return parameters if all(scaled_mm_supports(tensors[0], of) for of in parameters) else None


def _quantized(
    prologue: PrologueCall, readers: tuple[Reader, ...], parameters: list[Fp8Parameters]
) -> QuantizedInput:
    """The prologue quantised for layers that are in fp8 and drop nothing in this call."""
    x, found = prologue.arguments[0], _layers(readers)
    quantized = CompressedFp8(*QUANTIZE[prologue.name](*prologue.arguments))
    beside = beside_quantized(quantized, readers, parameters)
    shape = torch.Size((*x.shape[:-1], found[0].in_features))
    return QuantizedInput(shape, x.dtype, x.device, found, quantized, parameters, beside)


# --------------------------------------------------------------------------------- as models have them


def adaln(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> PrologueCall:
    """norm(x) * (1 + scale) + shift: x (B, T, K), shift and scale (B, K).

    No operator takes a norm with weights.
    """

    def dense() -> Tensor:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]

    return PrologueCall("adaln", (x, shift, scale, norm.eps) if _is_plain_layernorm(norm) else (), dense)


def adaln_by_token(
    norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, choice: Tensor
) -> PrologueCall:
    """norm(x) * (1 + scale) + shift, of rows of shift and scale (R, K) that `choice` (B, T) int32 names.

    x (B, T, K); no operator takes a norm with weights.
    """

    def dense() -> Tensor:
        return norm(x) * (1 + embedding(choice, scale)) + embedding(choice, shift)

    arguments = (x, shift, scale, choice, norm.eps) if _is_plain_layernorm(norm) else ()
    return PrologueCall("adaln_by_token", arguments, dense)


class Modulation(NamedTuple):
    """A shift, a scale or a gate.

    own : (B, 1, K) of each picture, or (B, T, K) of each token
    common : (K,), which the model adds to that; None where `own` has it
    """

    own: Tensor
    common: Tensor | None = None

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """(B, 1, K) or (B, T, K); `own` is cast to `dtype`, where one is given, before the sum."""
        own = self.own if dtype is None else self.own.to(dtype)
        return own if self.common is None else self.common + own


def _modulated(
    name: str, norm: Any, x: Tensor, shift: Modulation, scale: Modulation, dense: Callable[[], Tensor]
) -> PrologueCall:
    """The prologue `name` of a modulation by picture, `<name>_of_tokens` of one in two parts by token."""
    if shift.common is not None and scale.common is not None and shift.own.shape == x.shape:
        common = shift.common.to(x.dtype), scale.common.to(x.dtype)
        return PrologueCall(f"{name}_of_tokens", (x, shift.own, scale.own, *common, norm.eps), dense)
    of_picture = shift.common is None and scale.common is None and shift.own.shape[1] == 1
    arguments = (x, shift.own.to(x.dtype), scale.own.to(x.dtype), norm.eps) if of_picture else ()
    return PrologueCall(name, arguments, dense)


def adaln_float32(norm: nn.LayerNorm, x: Tensor, shift: Modulation, scale: Modulation) -> PrologueCall:
    """norm(x) * (1 + scale) + shift, which the model computes in float32 and rounds once to the dtype of x.

    x (B, T, K). Kernels read shift and scale, or both parts of each, in bfloat16. No operator takes a norm
    with weights.
    """

    def dense() -> Tensor:
        whole_shift, whole_scale = shift.whole(torch.float32), scale.whole(torch.float32)
        return (norm(x.float()) * (1 + whole_scale) + whole_shift).type_as(x)

    if not _is_plain_layernorm(norm):
        return PrologueCall("adaln", (), dense)
    return _modulated("adaln", norm, x, shift, scale, dense)


def affine_layernorm(norm: nn.LayerNorm, x: Tensor) -> PrologueCall:
    """norm(x), which the model computes in float32 and rounds once: x (B, T, K), `norm` with weight and bias.

    Kernels take the weight for 1 + (weight - 1) and read the latter in bfloat16: a weight between 0 and 2 is
    off by at most 2^-9. Where all lie from 0.1 to 0.3 that moves the result by 0.5 %; e4m3 moves it by 3 %.
    No operator takes a norm without either.
    """

    def dense() -> Tensor:
        return norm(x.float()).type_as(x)

    if not is_of(norm, *_LAYERNORMS) or norm.weight is None or norm.bias is None:
        return PrologueCall("adaln", (), dense)
    shift, scale = norm.bias.to(x.dtype), (norm.weight.float() - 1).to(x.dtype)
    return PrologueCall("adaln", (x, shift, scale, norm.eps), dense)


def rms_adaln(norm: nn.Module, x: Tensor, shift: Modulation, scale: Modulation) -> PrologueCall:
    """norm(x) * (1 + scale) + shift: x (B, T, K), `norm` an RMS norm. No operator takes one with weights."""

    def dense() -> Tensor:
        return norm(x) * (1 + scale.whole()) + shift.whole()

    if not is_of(norm, "RMSNorm") or norm.weight is not None:
        return PrologueCall("rms_adaln", (), dense)
    return _modulated("rms_adaln", norm, x, shift, scale, dense)


def rmsnorm(norm: nn.Module, x: Tensor, scale: Tensor | None = None) -> PrologueCall:
    """norm(x) * scale: x (B, T, K), `norm` an RMS norm, with a weight (K,) or without, scale (B, 1, K).

    No operator takes a norm with a bias, or with a weight in another dtype than that of x or float32.
    """

    def dense() -> Tensor:
        return norm(x) if scale is None else norm(x) * scale

    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not is_of(norm, "RMSNorm") or bias is not None:
        return PrologueCall("rmsnorm", (), dense)
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return PrologueCall("rmsnorm", (), dense)
    ones = x.new_ones(x.shape[-1]) if weight is None or scale is None else None
    factors = ones if weight is None else weight, ones if scale is None else scale
    return PrologueCall("rmsnorm", (x, *factors, norm.eps), dense)


def rmsnorm_by_token(norm: nn.Module, x: Tensor, scale: Tensor, choice: Tensor) -> PrologueCall:
    """norm(x) * scale, of rows of scale (R, K) that `choice` (B, T) int32 names; `norm` as in `rmsnorm`."""
    own = rmsnorm(norm, x, scale)

    def dense() -> Tensor:
        return norm(x) * embedding(choice, scale)

    if not own.arguments:
        return PrologueCall("rmsnorm_by_token", (), dense)
    _, weight, _, eps = own.arguments
    return PrologueCall("rmsnorm_by_token", (x, weight, scale, choice, eps), dense)


_LAYERNORMS = "LayerNorm", "FP32LayerNorm"


def is_of(norm: nn.Module, *classes: str) -> bool:
    """Whether `norm` is of one of these classes, of PyTorch or diffusers, with an eps and without hooks."""
    kind = type(norm)
    known = kind.__name__ in classes and kind.__module__.startswith(("torch.nn.", "diffusers."))
    return known and norm.eps is not None and untouched(norm)


def _is_plain_layernorm(norm: nn.LayerNorm) -> bool:
    """Whether `norm` is a LayerNorm without weight and bias."""
    return is_of(norm, *_LAYERNORMS) and norm.weight is None and norm.bias is None


def activated(gelu: Callable[[Tensor], Tensor], x: Tensor) -> PrologueCall:
    """`gelu`(x), in the form with tanh; x (..., K)."""
    return PrologueCall("gelu", (x,), lambda: gelu(x))


def silu_gated(a: Tensor, b: Tensor, dense: Callable[[Tensor, Tensor], Tensor]) -> PrologueCall:
    """silu(a) * b, `dense` of both; a and b (..., K)."""
    return PrologueCall("silu_gate", (a, b), lambda: dense(a, b))


def concat_activated(a: Tensor, gelu: Callable[[Tensor], Tensor], b: Tensor) -> PrologueCall:
    """cat([a, gelu(b)], -1), the form with tanh; a (..., K1), b (..., K2)."""
    return PrologueCall("concat_gelu", (a, b), lambda: torch.cat([a, gelu(b)], dim=-1))


def concat_silu_gated(a: Tensor, gated: Callable[[Tensor], Tensor], b: Tensor) -> PrologueCall:
    """cat([a, `gated`(b)], -1), of the halves b1 and b2 of b silu(b1) * b2; a (..., K1), b (..., 2 K2)."""
    return PrologueCall("concat_silu_gate", (a, b), lambda: torch.cat([a, gated(b)], dim=-1))

"""Whether fast kernels serve a call, decided before it runs, and a word where they do not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rtlynx.cuda import jit
from rtlynx.cuda.sm90.attention_inputs import HEAD_DIMS
from rtlynx.cuda.sm90.compress import MAX_COLUMNS_FP8, MAX_PARTS
from rtlynx.cuda.sm90.quantize import takes
from rtlynx.math.attention import Stream
from rtlynx.math.formats import BF16_SPARSE, FP8_DENSE, FP8_SPARSE, FP8_WEIGHT_SPARSE
from rtlynx.math.fp8 import E4M3
from rtlynx.math.reference import Norm
from rtlynx.math.scores import SCORES
from rtlynx.math.selection import Pattern

if TYPE_CHECKING:
    from rtlynx.ops.fp8_linear import Fp8Parameters

_cards: dict[int, str | None] = {}
_said: set[str] = set()
_GRADIENTS = "gradients are asked for: call the model under torch.no_grad()"


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of `tensors` would be differentiated."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def kernels_support(
    x: Tensor,
    pattern: Pattern,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
) -> bool:
    """Whether the kernels serve a layer for the input `x` (..., K); on a CUDA device, a no is explained once.

    `lowrank_a` (r, K) and `lowrank_b` (N, r) are the layer's low-rank factors. There is no least number of
    tokens: with one, the kernels take a fifth of the time of the same function in plain PyTorch
    (threshold-h100.json).
    """
    if not x.is_cuda:
        return False
    reason = unsupported_reason(x, pattern, norm, weight, bias, lowrank_a, lowrank_b)
    if reason is None:
        return True
    _say_once(reason)
    return False


def unsupported_reason(
    x: Tensor,
    pattern: Pattern,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
) -> str | None:
    """Why the kernels do not serve a layer for an input `x` (..., K) on a CUDA device; None where they do."""
    if wants_gradient(x, weight, bias, lowrank_a, lowrank_b):
        return _GRADIENTS
    bf16, fp8 = torch.bfloat16, weight.dtype is E4M3
    if not (
        x.dtype is bf16 and (fp8 or weight.dtype is bf16) and (lowrank_a is None or lowrank_a.dtype is bf16)
    ):
        return "the kernels take bfloat16 inputs and factors, and weights of bfloat16 or quantised to fp8"
    if pattern.n != 2 or pattern.m != 4:
        return "the kernels keep 2 of every 4 entries, not other patterns"
    if not SCORES[pattern.score].kernels:
        return f"the kernels do not select by the score {pattern.score!r}"
    if pattern.grouping == "strided" and _count(pattern.parts) > MAX_PARTS:
        return f"the kernels take strided groups in at most {MAX_PARTS} parts"
    if norm == "paper":
        return "the kernels know the norm scale 'scale', not the paper's printed formula"
    k, format = weight.shape[1], FP8_SPARSE if fp8 else BF16_SPARSE
    if k % format.k_multiple:
        return f"the kernels take {format.name} layers whose inputs are a multiple of {format.k_multiple}"
    if fp8 and k > MAX_COLUMNS_FP8:
        return f"the fp8 kernels take layers of at most {MAX_COLUMNS_FP8} inputs"
    if not weight.is_contiguous() or (not torch.compiler.is_compiling() and weight.data_ptr() % 16):
        return "the weight of a layer is not contiguous at a multiple of 16 bytes"
    if bias is not None and bias.dtype is not bf16 and bias.dtype is not torch.float32:
        return "the kernels take bfloat16 or float32 biases"
    return card_unsupported_reason(x.get_device())


def quantizer_supports(k: int, x: Tensor, *others: Tensor) -> bool:
    """Whether one kernel quantises what is made of `x` and `others`, (..., k).

    Where it does not, PyTorch quantises to the same bits in several kernels: nothing to warn of.
    """
    if not x.is_cuda or wants_gradient(x, *others) or x.dtype is not torch.bfloat16:
        return False
    return takes(k) and card_unsupported_reason(x.get_device()) is None


def attention_inputs_support(streams: Sequence[Stream]) -> bool:
    """Whether one kernel norms, rotates and rounds queries and keys; on a CPU, PyTorch in its place.

    Where it does not, PyTorch does it in several: nothing to warn of.
    """
    first = streams[0].query
    for stream in streams:
        if any(one.dtype is not first.dtype for one in (*stream.heads, stream.q_weight, stream.k_weight)):
            return False
        if any(one.dtype is not torch.float32 or one.device != first.device for one in stream.rotary):
            return False
    if not first.is_cuda:
        return True
    if first.dtype is not torch.bfloat16 or first.shape[-1] not in HEAD_DIMS:
        return False
    return card_unsupported_reason(first.get_device()) is None


def qk_norm_rotary_supports(streams: Sequence[Stream]) -> bool:
    """Whether one kernel norms and rotates queries and keys for attention in bfloat16.

    Where it does not, and on a CPU, the norms themselves do it: nothing to warn of.
    """
    if not streams[0].query.is_cuda or not attention_inputs_support(streams):
        return False
    return not any(wants_gradient(*stream.heads, stream.q_weight, stream.k_weight) for stream in streams)


def weight_sparse_supports(weight: Tensor, k: int) -> bool:
    """Whether a kernel multiplies by a weight (N, k) e4m3 of which half is zero, where `weight` lies.

    No matter of the input, and of whether the weight is packed.
    """
    if not weight.is_cuda or k % FP8_WEIGHT_SPARSE.k_multiple:
        return False
    return card_unsupported_reason(weight.get_device()) is None


def scaled_mm_supports(x: Tensor, of: Fp8Parameters) -> bool:
    """Whether `scaled_product` serves an fp8 layer that keeps all of its input `x` (..., K).

    On a CUDA device, a no is explained once.
    """
    if not x.is_cuda or not x.numel():
        return False
    reason = _scaled_mm_unsupported_reason(x, of)
    if reason is None:
        return True
    _say_once(reason)
    return False


def _scaled_mm_unsupported_reason(x: Tensor, of: Fp8Parameters) -> str | None:
    weight = of.weight
    beside = [tensor for tensor in (of.bias, of.lowrank_a, of.lowrank_b) if tensor is not None]
    if wants_gradient(*beside):
        return _GRADIENTS
    if any(tensor.dtype is not torch.bfloat16 for tensor in (x, *beside)):
        return "dense fp8 products take bfloat16 inputs, biases and factors"
    if weight is None:
        return None
    multiple = FP8_DENSE.k_multiple
    if weight.shape[0] % multiple or weight.shape[1] % multiple or not weight.is_contiguous():
        return "dense fp8 products take layers whose numbers of inputs and outputs are multiples of 16"
    if not _has_fp8(x.get_device()):
        return "dense fp8 products need compute capability 8.9 or more"
    return None


@torch.compiler.assume_constant_result
def _has_fp8(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 9)


def _count(parts: int | tuple[int, ...]) -> int:
    return parts if isinstance(parts, int) else len(parts)


@torch.compiler.assume_constant_result
def card_unsupported_reason(index: int) -> str | None:
    """Why the kernels cannot run on CUDA device `index`, or None where they can."""
    if index not in _cards:
        _cards[index] = jit.unsupported_reason(index) or None
    return _cards[index]


@torch.compiler.assume_constant_result
def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"rtlynx runs some layers in plain PyTorch, right but not faster: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )

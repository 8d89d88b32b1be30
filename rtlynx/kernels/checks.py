"""What the torch operators refuse, and in which words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtlynx.kernels.blocks import FP8, LOWRANK_COLUMNS, blocks_bytes, format_of, lowrank_bytes
from rtlynx.kernels.operators import refuse_gradients
from rtlynx.kernels.sm90.gemm import MAX_LAYERS
from rtlynx.kernels.sm90.weights import Weights

_BIAS_DTYPES = (torch.bfloat16, torch.float32)


def check_compress(x: Tensor, down: Tensor | None, grouping: str, parts: Sequence[int]) -> None:
    check_dtype(x, down)
    check_selection(x, x.shape[-1] if x.ndim else 0, down, grouping, parts)
    if x.stride(-1) != 1:
        raise ValueError(f"the last stride of x is 1, got strides {x.stride()}: call x.contiguous()")
    refuse_gradients(x, down)


def check_dtype(*tensors: Tensor | None) -> None:
    """Of inputs and low-rank factors."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not torch.bfloat16:
            raise TypeError(f"rtlynx operators take bfloat16 inputs and factors, got {tensor.dtype}")


def check_selection(like: Tensor, k: int, down: Tensor | None, grouping: str, parts: Sequence[int]) -> None:
    """Groups over K = `k` columns of something on the device of `like`, and the low-rank factor."""
    if k % 4 or not k:
        raise ValueError(f"x is (..., K) with K a multiple of 4, got K = {k}")
    if grouping == "strided":
        if parts and (sum(parts) != k or any(width % 4 or width < 4 for width in parts)):
            raise ValueError(f"parts are multiples of 4 that add up to K = {k}, got {list(parts)}")
    elif grouping != "adjacent" or parts:
        raise ValueError(
            f"grouping is 'adjacent' without parts, or 'strided', got {grouping!r}, {list(parts)}"
        )
    if down is not None and (
        down.ndim != 2 or down.shape[1] != k or not down.shape[0] or down.device != like.device
    ):
        raise ValueError(
            f"down is (r, {k}) with r > 0 on {like.device} like x, got {tuple(down.shape)} on {down.device}"
        )


def layers_of(
    weights: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    first_ranks: Sequence[int],
) -> list[Weights]:
    """What the lists of `gemm_joint` say of each layer."""
    count = len(weights)
    if not 1 <= count <= MAX_LAYERS:
        raise ValueError(f"one product serves 1 to {MAX_LAYERS} layers, got {count}")
    for name, given in (("ups", ups), ("biases", biases), ("weight_scales", weight_scales)):
        if len(given) not in (0, count):
            raise ValueError(f"{name} is empty or has one of each of {count} layers, got {len(given)}")
    if len(first_ranks) != count or any(first < 0 or first % LOWRANK_COLUMNS for first in first_ranks):
        raise ValueError(
            f"first_ranks has one multiple of {LOWRANK_COLUMNS} for each of {count} layers, "
            f"got {list(first_ranks)}"
        )
    if any(weight.shape[0] % 8 for weight in weights[:-1]):
        raise ValueError(
            "layers of one product have outputs in multiples of 8, all but the last, "
            f"got {[weight.shape[0] for weight in weights]}"
        )
    if len({bias.dtype for bias in biases}) > 1:
        raise TypeError("biases of one product are of one dtype")
    return [
        Weights(
            weight,
            ups[i] if ups else None,
            biases[i] if biases else None,
            weight_scales[i] if weight_scales else None,
        )
        for i, weight in enumerate(weights)
    ]


def check_gemm(
    blocks: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    layers: Sequence[Weights],
    first_ranks: Sequence[int],
    rows: int,
) -> None:
    k, held = layers[0].weight.shape[-1], layers[0].held
    for of in layers:
        _check_weights(blocks, of)
        if of.weight.shape[1] != k:
            raise ValueError(f"layers of one product read K = {k} columns, got {tuple(of.weight.shape)}")
    if blocks.shape != (blocks_bytes(rows, k, held),):
        raise ValueError(
            f"blocks of {rows} rows and {k} columns of {held.dtype} are {blocks_bytes(rows, k, held)} bytes, "
            f"got shape {tuple(blocks.shape)}"
        )
    if scale is None and held is FP8:
        raise ValueError("blocks of float8 values come with a scale, and it is missing")
    if scale is not None and scale.shape[0] not in ((rows,) if held is FP8 else (0, rows)):
        raise ValueError(f"scale is (rows,) = ({rows},) or empty, got {tuple(scale.shape)}")
    rank = _rank(layers, first_ranks)
    if rank == 0:
        if lowrank is not None and lowrank.shape[0]:
            raise ValueError("lowrank comes with up, the other low-rank factor, and it is missing")
    elif rows and (lowrank is None or lowrank.shape != (lowrank_bytes(rows, rank),)):
        raise ValueError(
            f"low-rank blocks of {rows} rows and rank {rank} are {lowrank_bytes(rows, rank)} "
            f"bytes, got {'none' if lowrank is None else f'shape {tuple(lowrank.shape)}'}"
        )
    refuse_gradients(blocks, scale)


def _rank(layers: Sequence[Weights], first_ranks: Sequence[int]) -> int:
    """Columns of T that all layers together read from the first to the last."""
    return max(
        0 if of.up is None else first + of.up.shape[1] for of, first in zip(layers, first_ranks, strict=True)
    )


def _check_weights(like: Tensor, of: Weights) -> None:
    """Weight, factor, bias and scale of one layer, on the device of `like`."""
    weight, up, bias, weight_scale = of
    held = format_of(weight_scale is not None)
    if weight.dtype is not held.dtype or (up is not None and up.dtype is not torch.bfloat16):
        found = weight.dtype if up is None else f"{weight.dtype} and {up.dtype}"
        raise TypeError(
            "rtlynx operators take weights of bfloat16, or of float8_e4m3fn with weight_scale, and bfloat16 "
            f"factors; got {found} {'without' if weight_scale is None else 'with'} weight_scale"
        )
    if weight.ndim != 2 or weight.device != like.device:
        raise ValueError(
            f"weight is (N, K) on {like.device} like the input, got {tuple(weight.shape)} on {weight.device}"
        )
    n = weight.shape[0]
    if up is not None and (up.ndim != 2 or up.shape[0] != n or up.device != like.device):
        raise ValueError(f"up is ({n}, r) on {like.device}, got {tuple(up.shape)} on {up.device}")
    if weight_scale is not None and (
        weight_scale.dtype is not torch.float32
        or weight_scale.shape != (n,)
        or weight_scale.device != like.device
    ):
        raise ValueError(
            f"weight_scale is float32 ({n},) on {like.device}, got {weight_scale.dtype} "
            f"{tuple(weight_scale.shape)} on {weight_scale.device}"
        )
    if bias is not None:
        if bias.dtype not in _BIAS_DTYPES:
            raise TypeError(f"bias is bfloat16 or float32, got {bias.dtype}")
        if bias.shape != (n,) or bias.device != like.device:
            raise ValueError(f"bias is ({n},) on {like.device}, got {tuple(bias.shape)} on {bias.device}")
    refuse_gradients(weight, up, bias)


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    weight_scale: Tensor | None,
) -> None:
    _check_weights(x, Weights(weight, up, bias, weight_scale))
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is (N, {x.shape[-1]}) for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if (down is None) is not (up is None):
        raise ValueError("down and up come together: both or neither")
    if down is not None and up is not None and down.shape[0] != up.shape[1]:
        raise ValueError(f"down is (r, K) and up (N, r), got {tuple(down.shape)} and {tuple(up.shape)}")

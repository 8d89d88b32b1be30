"""What the torch operators refuse, and in which words: the same with fake tensors, in PyTorch and on a card.

Kernels are handed addresses, so each tensor passes `check_tensor` first. Alignment is no matter here: what
lies at no multiple of 16 bytes is copied, or read otherwise (`rtlynx.cuda.sm90`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.sm90.gemm import MAX_LAYERS
from rtlynx.cuda.sm90.prologues import Kind, Prologue
from rtlynx.cuda.sm90.weights import STORE_COLUMNS, Weights
from rtlynx.math.tiles import BF16_SPARSE, FP8_SPARSE, LOWRANK_COLUMNS, Format, lowrank_bytes, packed_a_bytes
from rtlynx.ops.registry import refuse_gradients

# Of rows and columns: kernels count them in 32 bits, and the rows that a tile has beyond the last.
MAX_SIZE = 2**31 - 257
BFLOAT16, FLOATS = (torch.bfloat16,), (torch.bfloat16, torch.float32)
_NAMES = (("weight", "lowrank_b", "bias", "weight_scale"),)
JOINT_NAMES = [
    (f"weights[{i}]", f"lowrank_bs[{i}]", f"biases[{i}]", f"weight_scales[{i}]") for i in range(MAX_LAYERS)
]
_FLOAT32, _BYTES = (torch.float32,), (torch.uint8,)


def check_tensor(
    name: str,
    tensor: Tensor,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] = BFLOAT16,
    axes: tuple[str, ...] | None = None,
    *,
    packed: bool = False,
) -> None:
    """What kernels take for granted of the memory that they are handed; the sizes are the caller's matter.

    like : the first input, on whose device `tensor` is
    axes : their names, where the number of axes is fixed
    packed : entries of a vector lie one after the other
    """
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        why = ": rtlynx operators take bfloat16 inputs and factors" if dtypes is BFLOAT16 else ""
        raise TypeError(f"{name} is {allowed}{why}, got {tensor.dtype}")
    if tensor is not like and tensor.device != like.device:
        raise ValueError(f"{name} is on {like.device} like the first input, got {tensor.device}")
    if axes is not None and tensor.ndim != len(axes):
        wanted = ", ".join(axes) + ("," if len(axes) == 1 else "")
        raise ValueError(f"{name} is ({wanted}), got shape {tuple(tensor.shape)}")
    if packed and tensor.stride(0) != 1:
        raise ValueError(f"{name} is contiguous, got strides {tensor.stride()}: call {name}.contiguous()")


def check_size(name: str, size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{name} are 0 to {MAX_SIZE}, got {size}")


# ------------------------------------------------------------------------------------------ compression


def check_compress(x: Tensor, lowrank_a: Tensor | None, grouping: str, parts: Sequence[int]) -> None:
    check_tensor("x", x, x)
    check_selection(x, x.shape, lowrank_a, grouping, parts)
    if x.stride(-1) != 1:
        raise ValueError(f"the last stride of x is 1, got strides {x.stride()}: call x.contiguous()")
    refuse_gradients(x, lowrank_a)


def check_selection(
    like: Tensor, shape: Sequence[int], lowrank_a: Tensor | None, grouping: str, parts: Sequence[int]
) -> None:
    """Groups of what has `shape` (..., K) and is on the device of `like`, and the low-rank factor."""
    k = shape[-1] if shape else 0
    if k % 4 or not k:
        raise ValueError(f"x is (..., K) with K a multiple of 4, got K = {k}")
    check_size("columns of x", k)
    check_size("rows of x", math.prod(shape[:-1]))
    if grouping == "strided":
        if parts and (sum(parts) != k or any(width % 4 or width < 4 for width in parts)):
            raise ValueError(f"parts are multiples of 4 that add up to K = {k}, got {list(parts)}")
    elif grouping != "adjacent" or parts:
        raise ValueError(
            f"grouping is 'adjacent' without parts, or 'strided', got {grouping!r}, {list(parts)}"
        )
    if lowrank_a is not None:
        check_tensor("lowrank_a", lowrank_a, like, BFLOAT16, ("r", "K"))
        if lowrank_a.shape[1] != k or not lowrank_a.shape[0]:
            raise ValueError(f"lowrank_a is (r, {k}) with r > 0, got {tuple(lowrank_a.shape)}")


def check_prologue(prologue: Prologue, arguments: Sequence[Any]) -> tuple[int, ...]:
    """Shape of a prologue's result (..., K)."""
    first: Tensor = arguments[0]
    rows: dict[str, Tensor] = {}
    parameters: list[tuple[str, Kind, Tensor]] = []
    for (name, kind), value in zip(prologue.arguments, arguments, strict=True):
        if kind == "rows":
            check_tensor(name, value, first)
            rows[name] = value
        elif kind != "float":
            check_tensor(name, value, first, (torch.int32,) if kind == "choice" else FLOATS)
            parameters.append((name, kind, value))
    refuse_gradients(*rows.values(), *(value for _, _, value in parameters))
    if parameters:
        _check_parameters(first, parameters)
    return _shape_of_rows(prologue, rows)


def _shape_of_rows(prologue: Prologue, rows: dict[str, Tensor]) -> tuple[int, ...]:
    names, shapes = list(rows), [tuple(one.shape) for one in rows.values()]
    if len(shapes) == 1:
        return shapes[0]
    found = f"got {shapes[0]} and {shapes[1]}"
    if not prologue.concatenates:
        if shapes[0] != shapes[1]:
            raise ValueError(f"{' and '.join(names)} have one shape, {found}")
        return shapes[0]
    if not all(shapes) or shapes[0][:-1] != shapes[1][:-1] or not (shapes[0][-1] and shapes[1][-1]):
        raise ValueError(f"{' and '.join(names)} are (..., columns) that differ in columns alone, {found}")
    if prologue.gated and shapes[1][-1] % 2:
        raise ValueError(f"{names[1]} has two halves of as many columns, {found}")
    return (*shapes[0][:-1], prologue.columns([shapes[0][-1], shapes[1][-1]]))


def _check_parameters(x: Tensor, parameters: Sequence[tuple[str, Kind, Tensor]]) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"x is (B, T, K) or (T, K), got {tuple(x.shape)}")
    batch, k = (x.shape[0] if x.ndim == 3 else 1), x.shape[-1]
    tables = [(name, tuple(one.shape)) for name, kind, one in parameters if kind == "table"]
    for name, shape in tables[1:]:
        if shape != tables[0][1]:
            raise ValueError(f"{tables[0][0]} and {name} have one shape, got {tables[0][1]} and {shape}")
    for name, kind, parameter in parameters:
        shape = tuple(parameter.shape)
        if not _fits(kind, shape, x, batch):
            wanted = _WANTED[kind].format(k=k, batch=batch, tokens=tuple(x.shape[:-1]))
            raise ValueError(f"{name} is {wanted} for x of shape {tuple(x.shape)}, got {shape}")


# Shapes of parameters, in words.
_WANTED: dict[Kind, str] = {
    "batches": "(B, {k}), (B, 1, {k}) or ({k},), B 1 or {batch},",
    "columns": "({k},)",
    "table": "(R, {k}) with R > 0",
    "choice": "{tokens}, one for each token,",
    "tokens": "of x's shape,",
}


def _fits(kind: Kind, shape: tuple[int, ...], x: Tensor, batch: int) -> bool:
    """Whether a parameter of this kind and shape goes with x (..., K)."""
    if kind == "choice":
        return shape == tuple(x.shape[:-1])
    if not shape or shape[-1] != x.shape[-1]:
        return False
    if kind == "columns":
        return len(shape) == 1
    if kind == "tokens":
        return shape == tuple(x.shape)
    if kind == "table":
        return len(shape) == 2 and shape[0] > 0
    return shape[1:-1] in ((), (1,)) and all(size in (1, batch) for size in shape[:-1][:1])


# --------------------------------------------------------------------------------------------- products


def check_lists(name: str, first: Sequence[Tensor], **others: Sequence[Tensor | None]) -> None:
    """What several layers have, `first` all of them, each of the `others` all or none."""
    count = len(first)
    if not 1 <= count <= MAX_LAYERS:
        raise ValueError(f"one product serves 1 to {MAX_LAYERS} layers, got {count} {name}")
    for other, given in others.items():
        if len(given) not in (0, count):
            raise ValueError(f"{other} is empty or has one of each of {count} layers, got {len(given)}")


def check_outputs(name: str, first: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """Whether Y of several layers can lie side by side: `first` of each has as many rows as its outputs."""
    if any(not one.ndim or one.shape[0] % STORE_COLUMNS for one in first[:-1]):
        raise ValueError(
            f"{name}: layers of one product have outputs in multiples of {STORE_COLUMNS}, all but the last, "
            f"got {[one.shape[0] if one.ndim else 'none' for one in first]}"
        )
    dtypes = [bias.dtype for bias in biases if bias is not None]
    if len(set(dtypes)) > 1:
        raise TypeError(f"biases of one product are of one dtype, got {dtypes}")


def layers_of(
    weights: Sequence[Tensor],
    lowrank_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    first_ranks: Sequence[int],
) -> list[Weights]:
    """What the lists of `gemm_joint` say of each layer."""
    check_lists("weights", weights, lowrank_bs=lowrank_bs, biases=biases, weight_scales=weight_scales)
    count = len(weights)
    if len(first_ranks) != count or any(
        not 0 <= first <= MAX_SIZE or first % LOWRANK_COLUMNS for first in first_ranks
    ):
        raise ValueError(
            f"first_ranks has one multiple of {LOWRANK_COLUMNS} for each of {count} layers, "
            f"got {list(first_ranks)}"
        )
    check_outputs("weights", weights, biases)
    return [
        Weights(
            weight,
            lowrank_bs[i] if lowrank_bs else None,
            biases[i] if biases else None,
            weight_scales[i] if weight_scales else None,
        )
        for i, weight in enumerate(weights)
    ]


def check_gemm(
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    layers: Sequence[Weights],
    first_ranks: Sequence[int],
    rows: int,
    names: Sequence[tuple[str, ...]] = _NAMES,
) -> None:
    """`names` are those of the arguments, for each layer."""
    check_size("rows", rows)
    check_tensor("packed_a", packed_a, packed_a, _BYTES, ("bytes",), packed=True)
    for of, called in zip(layers, names, strict=False):
        _check_weights(packed_a, of, called)
    k, format = layers[0].weight.shape[1], layers[0].format
    if len(layers) > 1:
        _check_together([of.weight for of in layers], k)
    _check_packed_a(packed_a, rows, k, format)
    _check_scale(scale, packed_a, rows, format)
    if lowrank is not None:
        check_tensor("lowrank", lowrank, packed_a, _BYTES, ("bytes",), packed=True)
    _check_lowrank(lowrank, rows, _rank(layers, first_ranks))
    refuse_gradients(packed_a, scale)


def _check_together(weights: Sequence[Tensor], k: int) -> None:
    columns = 0
    for weight in weights:
        n, own = weight.shape
        if own != k:
            raise ValueError(f"weights of one product read K = {k} columns, got ({n}, {own})")
        columns += n
    check_size("outputs of weights", columns)


def _check_packed_a(packed_a: Tensor, rows: int, k: int, format: Format) -> None:
    expected = packed_a_bytes(rows, k, format)
    if packed_a.shape[0] != expected:
        raise ValueError(
            f"packed_a of {rows} rows and {k} columns of {format.dtype} are {expected} bytes, "
            f"got shape {tuple(packed_a.shape)}; columns and dtype are those of weight"
        )


def _check_scale(scale: Tensor | None, packed_a: Tensor, rows: int, format: Format) -> None:
    if scale is None:
        if format is FP8_SPARSE:
            raise ValueError("packed_a of float8 values come with a scale, and it is missing")
        return
    check_tensor("scale", scale, packed_a, _FLOAT32, ("rows",), packed=True)
    if scale.shape[0] not in ((rows,) if format is FP8_SPARSE else (0, rows)):
        raise ValueError(f"scale is (rows,) = ({rows},) or empty, got {tuple(scale.shape)}")


def _check_lowrank(lowrank: Tensor | None, rows: int, rank: int) -> None:
    if rank == 0:
        if lowrank is not None and lowrank.shape[0]:
            raise ValueError("lowrank comes with lowrank_b, the other low-rank factor, and it is missing")
        return
    expected = lowrank_bytes(rows, rank)
    if expected != (0 if lowrank is None else lowrank.shape[0]):
        found = "none" if lowrank is None else f"shape {tuple(lowrank.shape)}"
        raise ValueError(
            f"lowrank, low-rank tiles of {rows} rows and rank {rank} are {expected} bytes, got {found}; "
            "the rank is that of lowrank_b"
        )


def _rank(layers: Sequence[Weights], first_ranks: Sequence[int]) -> int:
    """Columns of T that all layers together read from the first to the last."""
    return max(
        0 if of.lowrank_b is None else first + of.lowrank_b.shape[1]
        for of, first in zip(layers, first_ranks, strict=True)
    )


def _check_weights(like: Tensor, of: Weights, called: tuple[str, ...]) -> None:
    """Weight, factor, bias and scale of one layer, on the device of `like`. Their strides are free."""
    weight, lowrank_b, bias, weight_scale = of
    format = BF16_SPARSE if weight_scale is None else FP8_SPARSE
    if weight.dtype is not format.dtype:
        found = weight.dtype if lowrank_b is None else f"{weight.dtype} and {lowrank_b.dtype}"
        raise TypeError(
            f"{called[0]}: rtlynx operators take weights of bfloat16, or of float8_e4m3fn with weight_scale, "
            f"and bfloat16 factors; got {found} {'without' if weight_scale is None else 'with'} weight_scale"
        )
    check_tensor(called[0], weight, like, (format.dtype,), ("N", "K"))
    n, k = weight.shape
    if k % 4 or not k:
        raise ValueError(f"{called[0]} is (N, K) with K a multiple of 4, got ({n}, {k})")
    check_size("outputs of weight", n)
    if lowrank_b is not None:
        check_tensor(called[1], lowrank_b, like, BFLOAT16, ("N", "r"))
        if lowrank_b.shape[0] != n or not lowrank_b.shape[1]:
            raise ValueError(f"{called[1]} is ({n}, r) with r > 0, got {tuple(lowrank_b.shape)}")
    if weight_scale is not None:
        if weight_scale.dtype is not torch.float32 or weight_scale.shape != (n,):
            found = f"{weight_scale.dtype} {tuple(weight_scale.shape)}"
            raise ValueError(f"{called[3]} is float32 ({n},), got {found}")
        check_tensor(called[3], weight_scale, like, _FLOAT32)
    if bias is not None:
        check_tensor(called[2], bias, like, FLOATS, ("N",))
        if bias.shape[0] != n:
            raise ValueError(f"{called[2]} is ({n},), got {tuple(bias.shape)}")
    refuse_gradients(weight, lowrank_b, bias, weight_scale)


# ------------------------------------------------------------------------------------------ whole layers


def check_linear(
    x: Tensor, of: Weights, lowrank_a: Tensor | None, grouping: str, parts: Sequence[int]
) -> None:
    check_compress(x, lowrank_a, grouping, parts)
    _check_weights(x, of, _NAMES[0])
    weight, lowrank_b = of.weight, of.lowrank_b
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is (N, {x.shape[-1]}) for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if (lowrank_a is None) is not (lowrank_b is None):
        raise ValueError("lowrank_a and lowrank_b come together: both or neither")
    if lowrank_a is not None and lowrank_b is not None and lowrank_a.shape[0] != lowrank_b.shape[1]:
        raise ValueError(
            f"lowrank_a is (r, K) and lowrank_b (N, r), got {tuple(lowrank_a.shape)} and "
            f"{tuple(lowrank_b.shape)}"
        )

"""Calls of all operators, and each of their arguments changed in one way: wrong ones and awkward ones."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from prologue_helpers import NAMES, make_inputs, normal
from torch import Tensor

from rtlynx.cuda.sm90.prologues import PROLOGUES
from rtlynx.math.fp8 import E4M3, quantize_weight
from rtlynx.math.tiles import pack_lowrank, pack_weight
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.fp8_weights import linear_fp8_weights
from rtlynx.ops.lora import lora
from rtlynx.ops.prologues import COMPRESS, QUANTIZE, quantize
from rtlynx.ops.weight_sparse import gemm_weight_sparse

K, N, ROWS = 64, 24, 70
DTYPES = (torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float8_e4m3fn)
DTYPES += (torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool, torch.complex64)


class Call(NamedTuple):
    operator: Any
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        return self.operator(**self.arguments)

    def map(self, change) -> "Call":
        """The call with `change` of every tensor."""
        changed = {
            name: [change(one) for one in value]
            if isinstance(value, list) and value and isinstance(value[0], Tensor)
            else change(value)
            if isinstance(value, Tensor)
            else value
            for name, value in self.arguments.items()
        }
        return Call(self.operator, changed)


@functools.cache
def calls(device="cpu") -> dict[str, Call]:
    """One valid call of each operator in each precision, with all that is optional."""
    made = {}
    for fp8 in (False, True):
        of = "-fp8" if fp8 else ""
        x, lowrank_a, lowrank_b = normal(2, 35, K), normal(5, K, seed=3), normal(N, 5, seed=4)
        weight, bias, weight_scale = normal(N, K, seed=1), normal(N, seed=2).float(), None
        if fp8:
            weight, weight_scale = quantize_weight(weight)
        how = {"grouping": "strided", "parts": [32, 32], "norm": True}
        format = "fp8-sparse" if fp8 else "bf16-sparse"
        packed_a, scale, lowrank = ops.compress(x, lowrank_a, **how, format=format)
        compressed = {"packed_a": packed_a, "scale": scale, "lowrank": lowrank}
        made[f"compress{of}"] = Call(ops.compress, {"x": x, "lowrank_a": lowrank_a, **how, "format": format})
        one = {"weight": weight, "lowrank_b": lowrank_b, "bias": bias}
        made[f"gemm{of}"] = Call(ops.gemm, {**compressed, **one, "rows": ROWS, "weight_scale": weight_scale})
        lists = {"weights": [weight] * 2, "lowrank_bs": [lowrank_b] * 2, "biases": [bias] * 2}
        lists |= {"weight_scales": [weight_scale] * 2 if fp8 else [], "first_ranks": [0, 0], "rows": ROWS}
        made[f"gemm_joint{of}"] = Call(ops.gemm_joint, {**compressed, **lists})
        layer = {"x": x, **one, "lowrank_a": lowrank_a, **how, "weight_scale": weight_scale}
        made[f"linear{of}"] = Call(ops.linear, layer)
    values, token_scale = quantize(normal(2, 35, K))
    pruned = quantize_weight(normal(N, K, seed=1).unflatten(1, (-1, 4))[..., [0, 2]].flatten(1))
    placed = torch.zeros(N, K, dtype=torch.uint8)
    placed.view(N, -1, 4)[..., [1, 3]] = pruned.values.view(torch.uint8).view(N, -1, 2)
    packed, last = pack_weight(placed.view(E4M3)), pack_weight(placed[:21].view(E4M3))
    by_weight = {"values": values, "scale": token_scale, "packed_weights": [packed, last]}
    by_weight |= {"weight_scales": [pruned.scale, pruned.scale[:21].clone()]}
    by_weight |= {"biases": [normal(N, seed=2), normal(21, seed=5)]}
    by_weight |= {"lowranks": [normal(ROWS, 5, seed=3), normal(ROWS, 33, seed=6)]}
    by_weight |= {"packed_bs": [pack_lowrank(normal(n, r, seed=4)) for n, r in ((N, 5), (21, 33))]}
    loras = {"lowrank_as": [normal(5, K, seed=3), normal(3, K, seed=4), normal(4, K, seed=5)]}
    loras |= {"lowrank_bs": [normal(N, 5, seed=6), normal(N, 3, seed=7), normal(8, 4, seed=8)]}
    loras |= {"weight_scales": [pruned.scale, pruned.scale[:8].clone()], "counts": [2, 1]}
    loras |= {"scalings": normal(3, seed=9).float()}
    made["lora"] = Call(lora, {"values": values, "scale": token_scale, **loras})
    made["gemm_weight_sparse"] = Call(gemm_weight_sparse, by_weight)
    weight, weight_scale = quantize_weight(normal(N, K, seed=1))
    by_weight = {"x": normal(2, 3, K), "weight": weight, "weight_scale": weight_scale}
    by_weight |= {"bias": normal(N, seed=2), "silu": True}
    made["linear_fp8_weights"] = Call(linear_fp8_weights, by_weight)
    made["quantize"] = Call(quantize, {"x": normal(2, 35, K)})
    for name in NAMES:
        names = [argument for argument, _ in PROLOGUES[name].arguments]
        inputs = dict(zip(names, make_inputs(name, 2, 35), strict=True))
        made[f"{name}_quantize"] = Call(QUANTIZE[name], inputs)
        tail = {"lowrank_a": normal(5, K, seed=3), "grouping": "adjacent", "parts": [], "norm": True}
        made[f"{name}_compress"] = Call(COMPRESS[name], {**inputs, **tail})
    return {name: call.map(lambda one: one.to(device)) for name, call in made.items()}


def changed(call: Call) -> Iterator[tuple[str, str, Call]]:
    """Which argument, how, and the call with it changed."""
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            alone = sum(isinstance(one, (Tensor, list)) for one in call.arguments.values()) == 1
            for how, other in tensors(value):
                if how == "device" and alone:
                    continue  # none is elsewhere
                yield name, how, Call(call.operator, {**call.arguments, name: other})
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            for place in range(len(value)):
                for how, other in tensors(value[place]):
                    several = [*value[:place], other, *value[place + 1 :]]
                    yield name, how, Call(call.operator, {**call.arguments, name: several})
        elif name in ("rows", "first_ranks"):
            for other in (-1, -64, 0, 1, 32, 69, 71, 129, 2**31 - 64, 2**31, 2**40):
                number = other if name == "rows" else [0, other]
                yield name, f"{other}", Call(call.operator, {**call.arguments, name: number})


def tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`t` in other dtypes, shapes and places, and the same values laid out otherwise."""
    for dtype in DTYPES:
        if dtype is not t.dtype:
            yield f"dtype {dtype}", t.to(dtype)
    yield "device", t.to("meta")
    yield "axes: one more in front", t.unsqueeze(0)
    yield "axes: one more behind", t.unsqueeze(-1)
    yield "axes: flat", t.reshape(-1)
    yield "axes: one less", t[0]
    yield "axes: none", t.reshape(-1)[0]
    bits = t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t  # (few operations know float8)
    for axis in range(t.ndim):
        size = t.shape[axis]
        for count in (0, 1, size - 1, size - 4):
            if 0 <= count < size:
                yield f"shape: {count} along {axis}", t.narrow(axis, 0, count)
        yield f"shape: doubled along {axis}", torch.cat([bits, bits], axis).view(t.dtype)
        yield f"layout: stride 0 along {axis}", t.narrow(axis, 0, 1).expand(t.shape)
        yield f"layout: stride 2 along {axis}", bits.repeat_interleave(2, axis).view(t.dtype)[every(axis, 2)]
        yield (
            f"layout: inside along {axis}",
            torch.cat([bits] * 3, axis).view(t.dtype).narrow(axis, size, size),
        )
    if t.ndim > 1:
        yield "shape: transposed", t.mT
        yield "layout: transposed", t.mT.contiguous().mT
    for skipped in (1, 2, 3):
        room = t.new_empty(t.numel() + skipped)
        yield f"layout: {skipped} further on", room[skipped:].view(t.shape).copy_(t)


def every(axis: int, step: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(None, None, step))

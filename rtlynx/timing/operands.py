"""Operands of one linear layer, what we call with them, and what must come out."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import rtlynx.ops.sparse_linear  # noqa: F401  (registers torch.ops.rtlynx)
from rtlynx.cuda.sm90.prologues import IDENTITY
from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE
from rtlynx.math.fp8 import Quantized, quantize_tokens, quantize_weight
from rtlynx.math.selection import nm_mask, select
from rtlynx.math.tiles import pack_weight
from rtlynx.ops.fp8_linear import fold_lowrank_b
from rtlynx.ops.prologues import QUANTIZE
from rtlynx.ops.weight_sparse import gemm_weight_sparse
from rtlynx.timing.shapes import Shape, paper_rank
from rtlynx.timing.sustained import Call

RANK = 64


class Operands(NamedTuple):
    """One layer: x (M, K), weight (N, K), bias (N,), and low-rank factors of the two ranks; all bf16.

    quantized : the weight in e4m3 where the layer is to run in fp8
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    lowrank_a: Tensor
    lowrank_b: Tensor
    paper_lowrank_a: Tensor
    paper_lowrank_b: Tensor
    quantized: Quantized | None = None

    @property
    def held(self) -> Tensor:
        """The weight that our kernels multiply with."""
        return self.weight if self.quantized is None else self.quantized.values

    @property
    def weight_scale(self) -> Tensor | None:
        return None if self.quantized is None else self.quantized.scale

    def folded(self, lowrank_b: Tensor) -> Tensor:
        """A factor as our kernels take it; made once, not in a call."""
        return lowrank_b if self.quantized is None else fold_lowrank_b(lowrank_b, self.quantized.scale)


def random_operands(shape: Shape, generator: torch.Generator, dtype: str = "bf16") -> Operands:
    """Fresh operands whose sparse product, low-rank term and bias are of one order."""

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*size, device=generator.device, generator=generator, dtype=torch.bfloat16)
        return drawn.mul_(scale)

    rank, (_, m, k, n) = paper_rank(shape.k), shape
    weight = normal(n, k, scale=k**-0.5)
    return Operands(
        normal(m, k),
        weight,
        normal(n),
        normal(RANK, k, scale=k**-0.5),
        normal(n, RANK, scale=RANK**-0.5),
        normal(rank, k, scale=k**-0.5),
        normal(n, rank, scale=rank**-0.5),
        quantize_weight(weight) if dtype == "fp8" else None,
    )


def layer_call(of: Operands, lowrank_a: Tensor, lowrank_b: Tensor) -> Callable[[], Tensor]:
    lowrank_b = of.folded(lowrank_b)
    return lambda: torch.ops.rtlynx.linear(
        of.x, of.held, of.bias, lowrank_a, lowrank_b, "adjacent", [], True, of.weight_scale
    )


def product_call(
    of: Operands,
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    lowrank_b: Tensor | None,
    bias: Tensor | None,
) -> Call:
    rows = of.x.shape[0]
    return lambda: torch.ops.rtlynx.gemm(
        packed_a, scale, lowrank, of.held, lowrank_b, bias, rows, of.weight_scale
    )


def compress(of: Operands, lowrank_a: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    format = BF16_SPARSE if of.quantized is None else FP8_SPARSE
    return torch.ops.rtlynx.compress(of.x, lowrank_a, "adjacent", [], True, format.name)


def our_calls(sets: list[Operands]) -> dict[str, Callable[[], list[Call]]]:
    """The calls of each of our variants, made when asked for: compression comes before the product alone."""

    def products() -> list[Call]:
        """The product alone; in fp8 with its scales, without which it is none."""
        inputs = [compress(of, None) for of in sets]
        return [
            product_call(of, packed_a, scale if of.quantized else None, None, None, None)
            for of, (packed_a, scale, _) in zip(sets, inputs, strict=True)
        ]

    def products_with_lowrank() -> list[Call]:
        inputs = [compress(of, of.lowrank_a) for of in sets]
        return [
            product_call(of, *given, of.folded(of.lowrank_b), of.bias)
            for of, given in zip(sets, inputs, strict=True)
        ]

    def products_by_sparse_weights() -> list[Call]:
        """The product alone, of quantised inputs by 2:4 weights, with scales and bias."""
        calls: list[Call] = []
        for of in sets:
            x, weight = quantize_tokens(of.x), quantize_weight(select(of.weight, nm_mask(of.weight)))
            packed = pack_weight(weight.values)
            calls.append(partial(gemm_weight_sparse, *x, [packed], [weight.scale], [of.bias], [], []))
        return calls

    calls: dict[str, Callable[[], list[Call]]] = {
        "ours": lambda: [layer_call(of, of.lowrank_a, of.lowrank_b) for of in sets],
        "ours_gemm": products,
        "ours_gemm_lowrank": products_with_lowrank,
        "ours_compress": lambda: [partial(compress, of, of.lowrank_a) for of in sets],
        "ours_compress_plain": lambda: [partial(compress, of, None) for of in sets],
    }
    if sets[0].quantized is not None:
        calls["ours_weight_sparse_gemm"] = products_by_sparse_weights
        calls["ours_quantize"] = lambda: [partial(QUANTIZE[IDENTITY.name], of.x) for of in sets]
    if sets[0].paper_lowrank_a.shape != sets[0].lowrank_a.shape:
        calls["ours_paper_rank"] = lambda: [
            layer_call(of, of.paper_lowrank_a, of.paper_lowrank_b) for of in sets
        ]
    return calls


class Errors(NamedTuple):
    """Relative errors (Frobenius norm) on evenly spaced rows.

    of_kernels : our layer against float64 on the very operands that it multiplies
    of_quantization : what those operands, quantised, give against what they were; None in bf16
    """

    of_kernels: float
    of_quantization: float | None


def relative_errors(of: Operands, rows: int = 1024) -> Errors:
    picked = torch.linspace(0, of.x.shape[0] - 1, min(rows, of.x.shape[0]), device=of.x.device).long()
    x = of.x[picked]
    mask = nm_mask(x)
    kept = x.double() * mask
    scale = (x.double().square().sum(-1, keepdim=True) / kept.square().sum(-1, keepdim=True)).sqrt()

    def layer(kept: Tensor, weight: Tensor) -> Tensor:
        lowrank = x.double() @ of.lowrank_a.double().T @ of.lowrank_b.double().T
        return scale * (kept @ weight.T) + lowrank + of.bias.double()

    wanted = exact = layer(kept, of.weight.double())
    if of.quantized is not None:
        seen = quantize_tokens(x, mask).dequantize().double()
        wanted = layer(seen, of.quantized.dequantize().double())
    got = layer_call(of, of.lowrank_a, of.lowrank_b)()[picked].double()

    def relative(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm())

    return Errors(relative(got, wanted), None if of.quantized is None else relative(wanted, exact))

"""One call of the kernels as a value: its operands, what must come out in float64, and the comparison."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx import Pattern
from rtlynx.math.fp8 import quantize_tokens, quantize_weight
from rtlynx.math.selection import pattern_mask
from rtlynx.math.tiles import compute_order, pack_a, pack_a_fp8, unpack_lowrank
from rtlynx.ops import sparse_linear as ops

LIMIT = 2.5e-3  # of Y; rounding to bfloat16 alone is 1.7e-3
LIMIT_FP8 = 3e-3  # on the same quantised operands: tensor cores add e4m3 products to fewer bits
LIMIT_OF_FEW, FEW = 2**-7, 256  # a few outputs may all be rounded badly, by 2^-8 in T and once more in Y
DATA = ("normal", "heavy", "ties", "zeros", "tiny", "huge", "rows", "bits")
LAYOUTS = ("plain", "wide", "odd", "batched", "swapped", "four")
BIASES = {"none": None, "bf16": torch.bfloat16, "f32": torch.float32}
_MAGNITUDE = {"tiny": 1e-30, "huge": 1e30}


@dataclass(frozen=True)
class Case:
    """Operands of one layer.

    rank : of the low-rank branch; a tuple for several layers with factors of their own, N split among them.
    parts : widths of strided parts, or empty.
    data : how X is drawn: "heavy" has a few channels 100 times the others, "rows" tokens from 1e-30 to 1e30,
        "bits" any bit pattern, for which selection and scale alone are compared.
    layout : of X in memory: "wide" and "odd" are rows of a wider matrix, the latter at odd addresses.
    fp8 : whether operands of the sparse product are quantised to e4m3.
    """

    rows: int
    k: int
    n: int
    rank: int | tuple[int, ...] = 0
    grouping: str = "adjacent"
    parts: tuple[int, ...] = ()
    norm: bool = True
    bias: str = "none"
    data: str = "normal"
    layout: str = "plain"
    fp8: bool = False
    seed: int = 0

    @property
    def format(self) -> str:
        return "fp8-sparse" if self.fp8 else "bf16-sparse"

    @property
    def pattern(self) -> Pattern:
        return Pattern(2, 4, self.grouping, self.parts or 1)

    @property
    def magnitude(self) -> float:
        return _MAGNITUDE.get(self.data, 1.0)


@dataclass(frozen=True)
class Layer:
    """Parameters of one layer, in natural column order.

    With `weight_scale` c the weight is e4m3 and `lowrank_b` B / c.
    """

    weight: Tensor
    bias: Tensor | None
    lowrank_a: Tensor | None
    lowrank_b: Tensor | None
    weight_scale: Tensor | None = None

    def quantized(self) -> Layer:
        values, scale = quantize_weight(self.weight)
        lowrank_b = None if self.lowrank_b is None else (self.lowrank_b / scale.unsqueeze(-1)).bfloat16()
        return Layer(values, self.bias, self.lowrank_a, lowrank_b, scale)

    def in_float64(self) -> tuple[Tensor, Tensor | None]:
        """W and B, scales multiplied in."""
        scale = 1.0 if self.weight_scale is None else self.weight_scale.double().unsqueeze(-1)
        return (
            self.weight.float().double() * scale,
            None if self.lowrank_b is None else self.lowrank_b.double() * scale,
        )


def _generator(case: Case) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(case.seed)


def make_input(case: Case) -> Tensor:
    """X (..., K) with `rows` tokens in all."""
    values = _values(case, _generator(case))
    rows, k = case.rows, case.k
    if case.layout == "plain":
        return values
    if case.layout in ("wide", "odd"):
        begin = 8 if case.layout == "wide" else 1
        whole = values.new_full((rows, begin + k + (8 if case.layout == "wide" else 2)), math.nan)
        part = whole[:, begin : begin + k]
        part.copy_(values)
        return part
    batch = next(b for b in (3, 2, 1) if rows % b == 0)
    whole = values.new_full((batch, rows // batch + 5, k), math.nan)
    if case.layout == "batched":
        part = whole[:, 5:]
    elif case.layout == "swapped":
        part = values.new_full((rows // batch, batch, k), math.nan).transpose(0, 1)
    else:
        part = whole.new_full((1, rows // batch, batch, k), math.nan).transpose(1, 2)
    part.copy_(values.view(part.shape))
    return part


def _values(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.rows, case.k)
    if case.data == "bits":
        bits = torch.randint(-0x8000, 0x8000, shape, generator=generator, device="cuda")
        return bits.to(torch.int16).view(torch.bfloat16)
    if case.data == "ties":
        return (torch.randint(-2, 3, shape, generator=generator, device="cuda") / 2).bfloat16()
    x = torch.randn(shape, generator=generator, device="cuda") * case.magnitude
    if case.data == "heavy":
        x[:, torch.randperm(case.k, generator=generator, device="cuda")[: max(1, case.k // 200)]] *= 100
    elif case.data == "zeros":
        x *= torch.rand(shape, generator=generator, device="cuda") < 0.2
        x[:: 3 if case.rows > 1 else 2] = 0.0
    elif case.data == "rows":
        exponent = torch.rand(case.rows, 1, generator=generator, device="cuda") * 60 - 30
        x *= 10**exponent
    return x.bfloat16()


def make_layers(case: Case) -> list[Layer]:
    """One layer, or one for each rank; the low-rank branch is a third of the output at most."""
    generator = _generator(case)
    generator.manual_seed(case.seed + 1)

    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()

    ranks = case.rank if isinstance(case.rank, tuple) else (case.rank,)
    sizes = [case.n // len(ranks) // 8 * 8] * (len(ranks) - 1)
    layers = []
    for rank, n in zip(ranks, [*sizes, case.n - sum(sizes)], strict=True):
        dtype = BIASES[case.bias]
        layers.append(
            Layer(
                normal(n, case.k, scale=case.k**-0.5),
                None if dtype is None else normal(n, scale=0.5 * case.magnitude).to(dtype),
                normal(rank, case.k, scale=case.k**-0.5) if rank else None,
                normal(n, rank, scale=0.3 * rank**-0.5) if rank else None,
            )
        )
    return [layer.quantized() for layer in layers] if case.fp8 else layers


# --------------------------------------------------------------------------------------- in float64


@dataclass(frozen=True)
class Expected:
    """Rows with an entry that is not finite are in `broken`; what is said of them elsewhere means nothing."""

    broken: Tensor  # (M,)
    scale: Tensor  # (M,)
    kept: Tensor  # (M, K), zeros where entries were dropped; quantised values times t in fp8


def expect(x: Tensor, pattern: Pattern, fp8: bool = False) -> Expected:
    """Selection and norm scale of X (M, K), by `rtlynx.math.selection` and in float64."""
    mask = pattern_mask(x, pattern)
    wide = x.double()
    kept = torch.where(mask, wide, 0.0)
    broken = ~torch.isfinite(wide).all(-1)
    total, left = wide.square().sum(-1), kept.square().sum(-1)
    scale = torch.where((total > 0) & ~broken, (total / left).sqrt(), 1.0)
    if fp8:
        values, t = quantize_tokens(x, mask)
        kept = values.float().double() * t.double()
    return Expected(broken, scale, kept)


def product(x: Tensor, layer: Layer, expected: Expected, norm: bool) -> tuple[Tensor, Tensor]:
    """Y (M, N) of the layer in float64, the mask applied before anything else, and the size of its rows.

    The size (M, 1) is at least the usual one: where terms happen to cancel, their errors do not.
    """
    kept = expected.kept * expected.scale.unsqueeze(-1) if norm else expected.kept
    weight, lowrank_b = layer.in_float64()
    y, square = _random_product(kept, weight)
    if layer.lowrank_a is not None and lowrank_b is not None:
        low, size = _random_product(x.double() @ layer.lowrank_a.double().T, lowrank_b)
        y, square = y + low, square + size
    if layer.bias is not None:
        y, square = y + layer.bias.double(), square + layer.bias.double().square().sum()
    return y, torch.maximum(square.sqrt(), y.norm(dim=-1, keepdim=True))


def _random_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """X W^T, and what the squared norm of its rows is on average for a random W of the norm of this one."""
    return x @ weight.T, x.square().sum(-1, keepdim=True) * weight.square().mean(-1).sum()


# -------------------------------------------------------------------------------------- comparison


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Everything that `torch.empty` gives out is full of NaN, or of ones in integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(4, device="cuda").isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def arguments(case: Case) -> tuple[str, list[int], bool]:
    """The last three arguments of `compress` and `linear`."""
    return case.grouping, ops.pattern_parts(case.pattern, case.k), case.norm


@torch.no_grad()
def check(case: Case) -> None:
    """Run the operators on `case` and compare all that they return; AssertionError where it is not right."""
    x, layers = make_input(case), make_layers(case)
    flat = x.reshape(-1, case.k)
    expected = expect(flat, case.pattern, case.fp8)
    lowrank_a, first_ranks = joined(layers)
    with poisoned():
        packed_a, scale, lowrank = ops.compress(x, lowrank_a, *arguments(case), case.format)
    check_compressed(case, flat, expected, lowrank_a, (packed_a, scale, lowrank))
    if case.data == "bits":
        return
    ordered = [replace(layer, weight=in_compute_order(layer.weight, case.pattern)) for layer in layers]
    compressed = (packed_a, scale, lowrank)
    with poisoned():
        y = multiply(case, compressed, ordered, first_ranks)
    assert y.shape == (case.rows, case.n)
    begin = 0
    for layer in layers:
        end = begin + layer.weight.shape[0]
        check_output(case, y[:, begin:end], *product(flat, layer, expected, case.norm))
        begin = end
    assert torch.equal(y, multiply(case, compressed, ordered, first_ranks)), (
        "a second product gives other bits"
    )
    if len(layers) == 1:
        (layer,) = ordered
        with poisoned():
            once = ops.linear(
                x, layer.weight, layer.bias, lowrank_a, layer.lowrank_b, *arguments(case), layer.weight_scale
            )
        assert once.shape == (*x.shape[:-1], case.n)
        assert torch.equal(once.reshape(y.shape), y), "linear gives other bits than compress and gemm"


def multiply(
    case: Case, compressed: tuple[Tensor, Tensor, Tensor], layers: list[Layer], first_ranks: list[int]
) -> Tensor:
    """The product with one layer, or with several in one launch."""
    if len(layers) == 1:
        (layer,) = layers
        return ops.gemm(*compressed, layer.weight, layer.lowrank_b, layer.bias, case.rows, layer.weight_scale)
    lowrank_bs, biases, weight_scales = (
        [vector for vector in vectors if vector is not None]
        for vectors in (
            [layer.lowrank_b for layer in layers],
            [layer.bias for layer in layers],
            [layer.weight_scale for layer in layers],
        )
    )
    weights = [layer.weight for layer in layers]
    return ops.gemm_joint(*compressed, weights, lowrank_bs, biases, weight_scales, first_ranks, case.rows)


def in_compute_order(weight: Tensor, pattern: Pattern) -> Tensor:
    """As bytes where it is bytes, which everything can move."""
    movable = torch.uint8 if weight.dtype.itemsize == 1 else weight.dtype
    return compute_order(weight.view(movable), pattern).view(weight.dtype)


def joined(layers: list[Layer]) -> tuple[Tensor | None, list[int]]:
    """A^T of all layers as `compress` takes them, and where the columns of T of each begin."""
    if len(layers) == 1 or layers[0].lowrank_a is None:
        return layers[0].lowrank_a, [0] * len(layers)
    lowrank_as, firsts, first = [], [], 0
    for layer in layers:
        assert layer.lowrank_a is not None
        rank = layer.lowrank_a.shape[0]
        # T ends with the last layer's columns.
        lowrank_as.append(
            layer.lowrank_a if layer is layers[-1] else pad(layer.lowrank_a, (0, 0, 0, -rank % 32))
        )
        firsts.append(first)
        first += rank + -rank % 32
    return torch.cat(lowrank_as), firsts


def check_compressed(
    case: Case,
    x: Tensor,
    expected: Expected,
    lowrank_a: Tensor | None,
    compressed: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Blocks bit for bit, the scale and T against float64."""
    packed_a, scale, lowrank = compressed
    token_scale = torch.ones(case.rows, device=x.device)
    if case.fp8:
        truth, token_scale = pack_a_fp8(x, case.pattern)
    else:
        truth = pack_a(x, case.pattern)
    assert packed_a.shape == truth.shape
    wrong = (packed_a != truth).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes of the tiles differ, the first at {int(wrong[0])}"
    assert scale.shape == (case.rows if case.norm or case.fp8 else 0,)
    if case.norm:
        finite = torch.isfinite(token_scale)
        assert torch.equal(torch.isfinite(scale), finite)
        error = (scale.double() / token_scale.double() / expected.scale - 1).abs()[finite]
        # Tensor cores truncate where they add: each of K / 64 steps may lose 2^-23 of a sum, s half of that.
        limit = 1e-5 + case.k / 64 * 2**-24
        assert not len(error) or float(error.max()) < limit, (
            f"scale of row {int(error.argmax())} is off by {error.max():.1e}"
        )
    elif case.fp8:
        assert torch.equal(scale.nan_to_num(nan=-1.0), token_scale.nan_to_num(nan=-1.0)), "another scale t"
    if lowrank_a is None:
        assert lowrank.shape == (0,)
        return
    rank = lowrank_a.shape[0]
    columns = -(-rank // 32) * 32
    t = unpack_lowrank(lowrank, case.rows, columns)[~expected.broken].double()
    assert not bool(t[:, rank:].any()), "T is not zero beyond the rank"
    if case.data == "bits":
        return  # float32 overflows
    divisor = token_scale.double() * (expected.scale if case.norm else 1.0)
    wide = x.double()[~expected.broken] / divisor[~expected.broken].unsqueeze(-1)
    exact = wide @ lowrank_a.double().T
    # One rounding to bfloat16, and sums in float32 whose terms may cancel.
    size = wide.norm(dim=-1, keepdim=True) * lowrank_a.double().norm(dim=-1)
    excess = (t[:, :rank] - exact).abs() - (2**-8 * exact.abs() + 1e-5 * size + 1e-38)
    assert not excess.numel() or float(excess.max()) <= 0, f"T is off by {float(excess.max()):.1e} too much"


def check_output(case: Case, y: Tensor, exact: Tensor, size: Tensor) -> None:
    """Y (M, N) full, finite and within the limit, row by row where rows differ in size."""
    assert y.dtype == torch.bfloat16
    assert bool(torch.isfinite(y).all()), f"{int((~torch.isfinite(y)).sum())} entries of Y are not finite"
    difference = y.double() - exact
    if case.data == "rows":
        error = float((difference / size.clamp_min(1e-300)).norm()) / math.sqrt(case.rows)
    else:
        error = float(difference.norm() / size.norm().clamp_min(1e-300))
    limit = (LIMIT_FP8 if case.fp8 else LIMIT) if exact.numel() >= FEW else LIMIT_OF_FEW
    assert error <= limit, f"Y is off by {error:.2e}, more than {limit}"

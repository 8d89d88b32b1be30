"""One call of a prologue as a value: its inputs, what must come out, and the comparison.

The dense tensor that the kernel writes in its test mode is compared with the prologue in float64; the blocks,
s and T with that dense tensor, as for `rtlynx::compress`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import FEW, Case, check_compressed, expect, poisoned
from torch import Tensor

from rtlynx import Pattern
from rtlynx.cuda.sm90.compress import CompressOptions
from rtlynx.cuda.sm90.prologues import PROLOGUES, rounded
from rtlynx.math.formats import FORMATS
from rtlynx.ops.checks import check_prologue
from rtlynx.ops.prologues import COMPRESS, launch_compress

NAMES = tuple(name for name in PROLOGUES if name != "identity")
MODULATED = ("adaln", "rms_adaln", "rmsnorm")  # by batch
BY_TOKEN = ("adaln_by_token", "rmsnorm_by_token", "adaln_of_tokens", "rms_adaln_of_tokens")
DATA = ("normal", "heavy", "offset")
LAYOUTS = ("plain", "sliced", "wide", "odd", "swapped")
LIMIT = 2.5e-3  # of a bf16 rounding the expectation is 1.7e-3; few values scatter
MANY = 64  # columns
SMALL = 1e-32  # where a sigmoid leaves the range of float32

Tail = tuple[Tensor | None, str, list[int], bool, str]  # lowrank_a, grouping, parts, norm, format


@dataclass(frozen=True)
class PrologueCase:
    """Inputs (batch, rows / batch, k) of a prologue.

    data : "heavy" has a few channels 100 times the others, "offset" rows far from zero.
    layout : of inputs in memory: "sliced" tokens begin at the sixth, "wide" and "odd" are columns of a wider
        tensor, the latter at odd addresses; halves of one tensor where there are two alike.
    shared : one modulation for all batches.
    fp8 : whether what is kept is quantised to e4m3.
    """

    name: str
    rows: int
    k: int
    batch: int = 1
    rank: int = 0
    grouping: str = "adjacent"
    parts: tuple[int, ...] = ()
    norm: bool = True
    data: str = "normal"
    layout: str = "plain"
    shared: bool = False
    fp8: bool = False
    seed: int = 0


def misaligned(x: Tensor) -> Tensor:
    """The same values in rows as dense, at an odd address."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


# What becomes of the parameters of a modulation, and whether a kernel reads them so.
MODULATIONS: list[tuple[dict[str, Callable[[Tensor], Tensor]], bool]] = [
    ({"second": lambda p: p[:1]}, True),
    ({"second": lambda p: p[0]}, True),
    ({"second": lambda p: p.unsqueeze(1)}, True),
    ({"second": lambda p: p[:1].expand(3, -1)}, True),
    ({"second": misaligned}, True),
    ({"first": misaligned}, True),
    ({"second": lambda p: p.T.contiguous().T}, True),
    ({"second": lambda p: p.float()}, False),
    ({"first": lambda p: p.float()}, False),
]


def make_inputs(case: PrologueCase) -> tuple[Any, ...]:
    generator = torch.Generator("cuda").manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    def tokens(k: int) -> Tensor:
        x = normal(case.batch, case.rows // case.batch, k)
        if case.data == "heavy":
            x[..., torch.randperm(k, generator=generator, device="cuda")[: max(1, k // 200)]] *= 100
        elif case.data == "offset":
            x += 10 * normal(case.batch, case.rows // case.batch, 1)
        return _laid_out(x.bfloat16(), case.layout)

    k = case.k
    modulations = normal(1 if case.shared else case.batch, 3 * k).bfloat16().chunk(3, dim=-1)
    if case.name in ("adaln", "rms_adaln"):
        return tokens(k), modulations[0], modulations[2], 1e-6
    size = case.batch, case.rows // case.batch
    if case.name.endswith("by_token"):
        table = normal(case.batch + 1, 3 * k).bfloat16().chunk(3, dim=-1)
        choice = torch.randint(case.batch + 1, size, generator=generator, device="cuda", dtype=torch.int32)
        first = table[0] if case.name == "adaln_by_token" else normal(k).bfloat16()
        return tokens(k), first, table[2], choice, 1e-6
    if case.name.endswith("of_tokens"):
        own = normal(*size, 3, k).bfloat16().unbind(2)
        return tokens(k), own[0], own[2], *normal(2, k).bfloat16().unbind(0), 1e-6
    if case.name == "rmsnorm":
        return tokens(k), normal(k).bfloat16(), modulations[1], 1e-5
    if case.name == "gelu":
        return (tokens(k),)
    if case.name == "silu_gate":
        return tokens(2 * k).chunk(2, dim=-1)
    first = max(8, k // 40 * 8)  # a fifth, as in FLUX
    second = k - first
    return tokens(first), tokens(2 * second if case.name == "concat_silu_gate" else second)


def along_tokens(one: Any) -> bool:
    """Whether an input has an entry or a row for each token."""
    return isinstance(one, Tensor) and (one.ndim == 3 or not one.is_floating_point())


def randomize_(inputs: Sequence[Any]) -> None:
    """Other numbers in place of those of the inputs; the choices of tokens stay."""
    for one in inputs:
        if isinstance(one, Tensor) and one.is_floating_point():
            one.copy_(torch.randn_like(one))


def with_changes(inputs: Sequence[Any], **change: Callable[[Tensor], Tensor]) -> list[Any]:
    """The inputs; functions for the first three, x, first and second, say what becomes of them."""
    changed = list(inputs)
    for index, key in enumerate(("x", "first", "second")):
        if key in change:
            changed[index] = change[key](changed[index])
    return changed


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "plain":
        return x
    batch, count, k = x.shape
    if layout == "sliced":
        part = x.new_full((batch, count + 5, k), math.nan)[:, 5:]
    elif layout == "swapped":
        part = x.new_full((count, batch, k), math.nan).transpose(0, 1)
    else:
        begin = 8 if layout == "wide" else 1
        part = x.new_full((batch, count, begin + k + 8), math.nan)[..., begin : begin + k]
    return part.copy_(x)


def make_tail(case: PrologueCase) -> Tail:
    lowrank_a = None
    if case.rank:
        generator = torch.Generator("cuda").manual_seed(case.seed + 1)
        lowrank_a = torch.randn(case.rank, case.k, generator=generator, device="cuda") * case.k**-0.5
        lowrank_a = lowrank_a.bfloat16()
    return lowrank_a, case.grouping, list(case.parts), case.norm, "fp8-sparse" if case.fp8 else "bf16-sparse"


# --------------------------------------------------------------------------------------- in float64


def exactly(name: str, *inputs: Any) -> tuple[Tensor, Tensor | None]:
    """The prologue in float64, and the size of terms that may cancel in it, where some may."""
    wide = [one.double() if isinstance(one, Tensor) else one for one in inputs]
    x = wide[0]
    if name.endswith("by_token"):
        _, second, third, choice, eps = inputs
        rows = choice.flatten().long()
        second = second[rows] if second.ndim == 2 else second
        x_by_row = inputs[0].reshape(len(rows), 1, -1)
        y, size = exactly(name.removesuffix("_by_token"), x_by_row, second, third[rows], eps)
        return tuple(None if one is None else one.view(x.shape) for one in (y, size))
    if name.endswith("of_tokens"):
        _, shift, scale, common_shift, common_scale, eps = wide
        mean = x.new_zeros(()) if name.startswith("rms") else x.mean(-1, keepdim=True)
        deviation = ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
        size = (x.abs() + mean.abs()) / deviation * (1 + common_scale.abs() + scale.abs())
        y = (x - mean) / deviation * (1 + common_scale + scale) + common_shift + shift
        return y, size + common_shift.abs() + shift.abs()
    if name in MODULATED:
        _, second, third, eps = wide
        along = (-1, 1, x.shape[-1]) if x.ndim == 3 else (-1, x.shape[-1])
        third = third.reshape(along)
        if name == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * second * third, None
        second = second.reshape(along)
        mean = x.mean(-1, keepdim=True) if name == "adaln" else x.new_zeros(())
        deviation = ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
        size = (x.abs() + mean.abs()) / deviation * (1 + third).abs() + second.abs()
        return (x - mean) / deviation * (1 + third) + second, size
    if name == "silu_gate":
        return x * x.sigmoid() * wide[1], None
    last = wide[-1]
    if name == "concat_silu_gate":
        return torch.cat([x, exactly("silu_gate", *last.chunk(2, dim=-1))[0]], dim=-1), None
    # As a sigmoid, which loses nothing where the usual form subtracts.
    activated = last * (2 * math.sqrt(2 / math.pi) * (last + 0.044715 * last**3)).sigmoid()
    return (activated if name == "gelu" else torch.cat([x, activated], dim=-1)), None


# -------------------------------------------------------------------------------------- comparison


def check(case: PrologueCase, served: bool | None = None) -> None:
    """Run `case` and compare all that it gives; AssertionError where it is not right."""
    compare(case.name, make_inputs(case), make_tail(case), served, case.data)


@torch.no_grad()
def compare(
    name: str, inputs: Sequence[Any], tail: Tail, served: bool | None = None, data: str = "normal"
) -> None:
    """The operator on these inputs.

    served : whether one kernel must do it all, or PyTorch must compute the prologue; None where either may
        be.
    """
    lowrank_a, grouping, parts, norm, format = tail
    options = CompressOptions(grouping, tuple(parts), norm, FORMATS[format])
    fp8 = options.format.quantized
    shape = check_prologue(PROLOGUES[name], inputs)
    rows, k = math.prod(shape[:-1]), shape[-1]
    with poisoned():
        dense = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda")
        fused = launch_compress(PROLOGUES[name], inputs, lowrank_a, options, dense)
        result = COMPRESS[name](*inputs, *tail)
    assert served is None or served is (fused is not None), "served otherwise than expected"
    if fused is not None:
        assert_same_bits(fused, result)
    dense = check_result(name, inputs, None if fused is None else dense)
    pattern = Pattern(2, 4, grouping, tuple(parts) or 1)
    rank = 0 if lowrank_a is None else lowrank_a.shape[0]
    as_matrix = Case(rows, k, 8, rank, grouping, tuple(parts), norm, data=data, fp8=fp8)
    check_compressed(as_matrix, dense, expect(dense, pattern, fp8), lowrank_a, result)


def assert_same_bits(fused: Sequence[Tensor], result: Sequence[Tensor]) -> None:
    """Of the test mode and of the operator."""
    for one, other in zip(fused, result, strict=True):
        same = torch.equal(*(part.view(torch.uint8) for part in (one, other)))  # NaN too
        assert same, "the test mode or a second run gives other bits"


def check_result(name: str, inputs: Sequence[Any], dense: Tensor | None) -> Tensor:
    """Compare the dense tensor (M, K) that a kernel wrote, or the one that PyTorch computes, with float64."""
    exact, size = exactly(name, *inputs)
    exact = exact.flatten(0, -2)
    if dense is None:
        dense = rounded(PROLOGUES[name], inputs).view(exact.shape)
        if "gelu" in name:  # PyTorch's form of it subtracts
            size = exact.abs() + 1
    _check_dense(dense, exact, None if size is None else size.reshape(exact.shape))
    return dense


def _check_dense(dense: Tensor, exact: Tensor, size: Tensor | None) -> None:
    """One rounding to bfloat16, and float32 before it."""
    error = (dense.double() - exact).abs()
    allowed = 1.002 * 2**-8 * exact.abs() + SMALL
    if size is not None:
        allowed += 1e-6 * size
    within = error <= allowed  # (false for NaN)
    if not bool(within.all()):
        row, column = (~within).nonzero()[0].tolist()
        raise AssertionError(
            f"{int((~within).sum())} entries of the dense tensor are wrong, the first at ({row}, {column}): "
            f"{float(dense[row, column])}, should be {float(exact[row, column])}"
        )
    # Roundings do not average out where a few entries make up the norm, or a column, which an RMS norm may
    # make nearly constant.
    squares = exact.square()
    if exact.shape[1] >= MANY and squares.sum().square() >= FEW * squares.square().sum():
        limit = LIMIT * exact.norm() + SMALL * exact.numel() ** 0.5
        limit += 0.0 if size is None else 1e-6 * size.norm()
        assert error.norm() <= limit, f"the dense tensor is off by {float(error.norm() / exact.norm()):.2e}"

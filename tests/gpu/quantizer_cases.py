"""One call of a quantiser as a value: its inputs, what must come out, and the comparison.

A matrix is compared bit for bit with `rtlynx.math.fp8.quantize_tokens`. Of a prologue, the dense tensor that
the kernel writes in its test mode is compared with float64, as when it is compressed, and the rest with that
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cases
import prologue_cases
import torch
from cases import Case, poisoned
from prologue_cases import PrologueCase, assert_same_bits, check_result
from torch import Tensor

from rtlynx.cuda.sm90.prologues import PROLOGUES
from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.ops.checks import check_prologue
from rtlynx.ops.prologues import QUANTIZE, launch_quantize

MATRIX = "identity"
NAMES = (MATRIX, *prologue_cases.NAMES)


@dataclass(frozen=True)
class QuantizerCase:
    """Inputs of a quantiser.

    quantizer : of `NAMES`
    batch, shared : of a prologue, as in `PrologueCase`
    data, layout : as in `Case` for a matrix, else as in `PrologueCase`
    """

    quantizer: str
    rows: int
    k: int
    batch: int = 1
    data: str = "normal"
    layout: str = "plain"
    shared: bool = False
    seed: int = 0


def make_inputs(case: QuantizerCase) -> tuple[Any, ...]:
    if case.quantizer == MATRIX:
        return (
            cases.make_input(Case(case.rows, case.k, 8, data=case.data, layout=case.layout, seed=case.seed)),
        )
    return prologue_cases.make_inputs(
        PrologueCase(
            case.quantizer,
            case.rows,
            case.k,
            case.batch,
            data=case.data,
            layout=case.layout,
            shared=case.shared,
            seed=case.seed,
        )
    )


def operator(name: str) -> Any:
    return QUANTIZE[name]


def check(case: QuantizerCase, served: bool | None = None) -> None:
    """Run `case` and compare all that it gives; AssertionError where it is not right."""
    compare(case.quantizer, make_inputs(case), served)


@torch.no_grad()
def compare(name: str, inputs: Sequence[Any], served: bool | None = None) -> None:
    """The operator on these inputs.

    served : of a prologue, whether one kernel must do it all, or PyTorch must compute it; None where
        either may be.
    """
    if name == MATRIX:
        with poisoned():
            result = QUANTIZE[name](*inputs)
        check_quantized(inputs[0], *result)
        return
    shape = check_prologue(PROLOGUES[name], inputs)
    with poisoned():
        dense = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=torch.bfloat16, device="cuda")
        fused = launch_quantize(PROLOGUES[name], inputs, shape, dense)
        result = operator(name)(*inputs)
    assert served is None or served is (fused is not None), "served otherwise than expected"
    if fused is not None:
        assert_same_bits(fused, result)
    dense = check_result(name, inputs, None if fused is None else dense)
    check_quantized(dense.view(shape), *result)


def check_quantized(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Values and scale of `x` (..., K), bit for bit but for which NaN a scale is."""
    expected = quantize_tokens(x.contiguous())
    assert (values.shape, values.dtype, values.is_contiguous()) == (x.shape, E4M3, True)
    assert (scale.shape, scale.dtype) == (expected.scale.shape, torch.float32)
    assert torch.equal(scale.nan_to_num(nan=-1.0), expected.scale.nan_to_num(nan=-1.0)), "another scale t"
    wrong = (values.view(torch.uint8) != expected.values.view(torch.uint8)).nonzero()
    assert not len(wrong), f"{len(wrong)} values differ, the first at {wrong[0].tolist()}"

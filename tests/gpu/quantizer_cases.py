"""One call of a quantiser as a value: its inputs, what must come out, and the comparison.

A matrix is compared bit for bit with `rtlynx.math.fp8.quantize_tokens`. Of a chain, the dense tensor that
the kernel writes in its test mode is compared with float64, as for producers, and the rest with that tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cases
import producer_cases
import torch
from cases import Case, poisoned
from producer_cases import ProducerCase, assert_same_bits, check_chain
from torch import Tensor

from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.ops import prologues as chains
from rtlynx.ops import quantize_prologues as quantizers

MATRIX = "matrix"
NAMES = (MATRIX, *producer_cases.NAMES)


@dataclass(frozen=True)
class QuantizerCase:
    """Inputs of a quantiser.

    quantizer : of `NAMES`
    batch, shared : of a chain, as in `ProducerCase`
    data, layout : as in `Case` for a matrix, else as in `ProducerCase`
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
    return producer_cases.make_inputs(
        ProducerCase(
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
    return quantizers.quantize if name == MATRIX else getattr(quantizers, f"{name}_quantize")


def check(case: QuantizerCase, served: bool | None = None) -> None:
    """Run `case` and compare all that it gives; AssertionError where it is not right."""
    compare(case.quantizer, make_inputs(case), served)


@torch.no_grad()
def compare(name: str, inputs: Sequence[Any], served: bool | None = None) -> None:
    """The operator on these inputs.

    served : of a chain, whether one kernel must do it all, or PyTorch must compute the chain; None where
        either may be.
    """
    if name == MATRIX:
        with poisoned():
            result = quantizers.quantize(*inputs)
        check_quantized(inputs[0], *result)
        return
    shape = chains.PRODUCERS[name].shape(*inputs)
    with poisoned():
        dense = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=torch.bfloat16, device="cuda")
        fused = quantizers.launch(name, inputs, shape, dense)
        result = operator(name)(*inputs)
    assert served is None or served is (fused is not None), "served otherwise than expected"
    if fused is not None:
        assert_same_bits(fused, result)
    dense = check_chain(name, inputs, None if fused is None else dense)
    check_quantized(dense.view(shape), *result)


def check_quantized(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Values and scale of `x` (..., K), bit for bit but for which NaN a scale is."""
    expected = quantize_tokens(x.contiguous())
    assert (values.shape, values.dtype, values.is_contiguous()) == (x.shape, E4M3, True)
    assert (scale.shape, scale.dtype) == (expected.scale.shape, torch.float32)
    assert torch.equal(scale.nan_to_num(nan=-1.0), expected.scale.nan_to_num(nan=-1.0)), "another scale t"
    wrong = (values.view(torch.uint8) != expected.values.view(torch.uint8)).nonzero()
    assert not len(wrong), f"{len(wrong)} values differ, the first at {wrong[0].tolist()}"

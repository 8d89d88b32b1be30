"""One call of `rtlynx::linear_fp8_weights` as a value, and the comparison with float64."""

from dataclasses import dataclass

import torch
from cases import BIASES, FEW, poisoned
from torch import Tensor

from rtlynx.math.fp8 import Quantized, quantize_weight
from rtlynx.ops.fp8_weights import linear_fp8_weights

# Rounding to bfloat16 alone is 1.7e-3; one output may be rounded by 2^-9.
LIMITS = {torch.bfloat16: 2.5e-3, torch.float32: 5e-6}


@dataclass(frozen=True)
class Fp8WeightsCase:
    """Operands: X (rows, k) in float32 or bfloat16, a weight (n, k) in e4m3."""

    rows: int
    k: int
    n: int
    float32: bool = False
    bias: str = "bf16"
    silu: bool = False
    seed: int = 0


def make(case: Fp8WeightsCase) -> tuple[Tensor, Quantized, Tensor | None]:
    """X, weight and bias, on the card."""
    generator = torch.Generator("cuda").manual_seed(case.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    weight = quantize_weight(normal(case.n, case.k) * normal(case.n, 1).exp())
    # Between 1/50 and 8: SiLU has something to round.
    x = normal(case.rows, case.k) * normal(case.rows, 1).exp()
    dtype = BIASES[case.bias]
    return (
        x.to(torch.float32 if case.float32 else torch.bfloat16),
        weight,
        None if dtype is None else normal(case.n).to(dtype),
    )


def exact(x: Tensor, weight: Quantized, bias: Tensor | None, silu: bool) -> Tensor:
    """In float64; f(X) rounded to the dtype of X, as modules in front of a layer round it."""
    wide = x.double()
    if silu:
        wide = (wide / (1 + (-wide).exp())).to(x.dtype).double()
    y = wide @ (weight.values.double() * weight.scale.double().unsqueeze(-1)).T
    return y if bias is None else y + bias.double()


def error(y: Tensor, expected: Tensor) -> float:
    """Largest of all rows, relative."""
    return float(((y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def check(case: Fp8WeightsCase) -> None:
    """Run the operator on `case` and compare; AssertionError where it is not right."""
    x, weight, bias = make(case)
    with poisoned():
        y = linear_fp8_weights(x, *weight, bias, case.silu)
    assert y.shape == (case.rows, case.n)
    assert y.dtype is x.dtype
    # A SiLU that rounds to the other neighbour of bfloat16 here and there adds to the error.
    limit = LIMITS[x.dtype] * (1 if case.n > FEW else 4) * (2 if case.silu else 1)
    found = error(y, exact(x, weight, bias, case.silu))
    assert found < limit, f"relative error {found:.2e} of {case}"

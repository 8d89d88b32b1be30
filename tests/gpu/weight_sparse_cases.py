"""One call of `rtlynx::gemm_weight_sparse` as a value, and the comparison with float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from cases import BIASES, FEW, LIMIT_FP8, LIMIT_OF_FEW, poisoned
from torch import Tensor

from rtlynx.math.fp8 import Quantized, quantize_tokens, quantize_weight
from rtlynx.math.tiles import pack_lowrank, pack_weight
from rtlynx.ops.weight_sparse import gemm_weight_sparse

SPLIT_K = 6144  # from here on tiles may be cut along k (`rtlynx.cuda.tuning.split`)


@dataclass(frozen=True)
class WeightSparseCase:
    """Operands: X (rows, k), a weight (n, k) of which at most two of every four entries are not zero."""

    rows: int
    k: int
    n: int
    bias: str = "bf16"
    seed: int = 0
    rank: int = 0  # of what is added in the same sums


def two_of_four(n: int, k: int, generator: torch.Generator) -> Tensor:
    """A weight with 0 to 2 nonzero entries in each group, anywhere."""
    device = generator.device
    weight = torch.randn(n, k, generator=generator, device=device) * k**-0.5
    places = torch.rand(n, k // 4, 4, generator=generator, device=device).argsort(-1)
    counts = torch.randint(0, 8, (n, k // 4, 1), generator=generator, device=device).clamp_max(2)
    return torch.where((places < counts).flatten(1), weight, 0.0)


def make(case: WeightSparseCase) -> tuple[Quantized, Quantized, Tensor | None]:
    """Quantised X and weight, and the bias, on the card."""
    generator = torch.Generator("cuda").manual_seed(case.seed)
    weight = quantize_weight(two_of_four(case.n, case.k, generator))
    x = quantize_tokens(torch.randn(case.rows, case.k, generator=generator, device="cuda").bfloat16())
    dtype = BIASES[case.bias]
    bias = None if dtype is None else torch.randn(case.n, generator=generator, device="cuda").to(dtype)
    return x, weight, bias


def product(x: Quantized, weight: Quantized, bias: Tensor | None) -> Tensor:
    """Y in float64 of the quantised operands."""
    y = (x.values.double() * x.scale.double()) @ (weight.values.double() * weight.scale.double()[:, None]).T
    return y if bias is None else y + bias.double()


def lowrank_of(case: WeightSparseCase, weight_scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """T (rows, rank), in the middle of a matrix of NaN, and B' (n, rank)."""
    if not case.rank:
        return None
    generator = torch.Generator("cuda").manual_seed(case.seed + 1)
    t = torch.randn(case.rows, case.rank, generator=generator, device="cuda") * 100
    whole = t.new_full((case.rows, 16 + -(-case.rank // 8) * 8), torch.nan).bfloat16()
    lowrank = whole[:, 8 : 8 + case.rank]
    lowrank.copy_(t)
    b = torch.randn(case.n, case.rank, generator=generator, device="cuda") * 0.1
    return lowrank, (b / weight_scale.unsqueeze(-1)).bfloat16()


def lists_of(
    weight: Quantized, bias: Tensor | None, lowrank: tuple[Tensor, Tensor] | None = None
) -> tuple[list[Tensor | None], ...]:
    """Arguments of the operator, of one layer."""
    t, b = lowrank or (None, None)
    return [pack_weight(weight.values)], [weight.scale], [bias], [t], [None if b is None else pack_lowrank(b)]


def exact(
    x: Quantized, weight: Quantized, bias: Tensor | None, lowrank: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Y in float64."""
    y = product(x, weight, bias)
    if lowrank is None:
        return y
    return y + lowrank[0].double() @ lowrank[1].double().T * weight.scale * x.scale


def compare(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    assert y.dtype is torch.bfloat16
    assert not bool(y.isnan().any()), "an output was not written"
    if y.numel():
        limit = LIMIT_FP8 if y.numel() > FEW else LIMIT_OF_FEW
        error = float((y.double() - expected).norm() / expected.norm())
        assert error < limit, f"relative error {error:.2e}"


def check(case: WeightSparseCase) -> None:
    """Run the operator on `case` and compare; AssertionError where it is not right."""
    x, weight, bias = make(case)
    lowrank = lowrank_of(case, weight.scale)
    lists = lists_of(weight, bias, lowrank)
    with poisoned():
        y = gemm_weight_sparse(*x, *lists)
    compare(y, exact(x, weight, bias, lowrank))
    again = gemm_weight_sparse(*x, *lists)
    assert torch.equal(y, again), "a second product gives other bits"


def check_together(cases: Sequence[WeightSparseCase]) -> None:
    """Run layers that read the X of the first case in one launch; against float64, and alone, bit for bit.

    Alone a long product may be cut along k otherwise; then it sums in another order, and float64 alone tells.
    """
    made = [make(replace(case, seed=case.seed + i)) for i, case in enumerate(cases)]
    x = made[0][0]
    lowranks = [lowrank_of(case, weight.scale) for case, (_, weight, _) in zip(cases, made, strict=True)]
    alone = [lists_of(*of, t) for (_, *of), t in zip(made, lowranks, strict=True)]
    together = [[one for (one,) in lists] for lists in zip(*alone, strict=True)]
    with poisoned():
        y = gemm_weight_sparse(*x, *together)
    assert torch.equal(gemm_weight_sparse(*x, *together), y), "a second product gives other bits"
    for part, (_, weight, bias), lowrank, lists in zip(
        y.split([case.n for case in cases], dim=-1), made, lowranks, alone, strict=True
    ):
        compare(part, exact(x, weight, bias, lowrank))
        if x.values.shape[1] < SPLIT_K:
            with poisoned():
                one = gemm_weight_sparse(*x, *lists)
            assert torch.equal(part, one), "together a layer has other bits than alone"

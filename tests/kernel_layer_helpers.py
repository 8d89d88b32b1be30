"""Small layers for tests of `SparseLinear` on the operators, and their formula."""

import torch
from formula_helpers import by_hand, slow_mask
from torch import nn

from rtlynx import Pattern, SparseLinear

K, N, RANK = 64, 24, 5
PATTERNS = {
    "adjacent": (Pattern(), None),
    "strided": (Pattern(grouping="strided"), (K,)),
    "parts": (Pattern(grouping="strided", parts=(24, 40)), (24, 40)),
}
LIMIT = 4e-3  # one rounding to bfloat16, and another of T


def normal(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def sparse(name="adjacent", norm="scale", rank=RANK, seed=0, bias=True, n=N):
    torch.manual_seed(seed)
    layer = SparseLinear.from_linear(
        nn.Linear(K, n, bias=bias).bfloat16(), pattern=PATTERNS[name][0], norm=norm
    )
    if rank:
        layer.set_lowrank(
            normal(rank, K, seed=seed + 10, scale=K**-0.5), normal(n, rank, seed=seed, scale=0.2)
        )
    return layer


def formula(layer, x, name="adjacent"):
    pattern, widths = PATTERNS[name]
    parameters = {key: value for key, value in layer._parameters.items() if value is not None}
    return by_hand(
        x,
        parameters["weight"],
        parameters.get("bias"),
        mask=slow_mask(x, 2, 4, pattern.grouping, widths),
        norm=layer.norm,
        lowrank_a=parameters.get("lowrank_a"),
        lowrank_b=parameters.get("lowrank_b"),
    )

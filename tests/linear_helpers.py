"""What the tests of `SparseLinear` share: a small layer, tokens, factors, an independent mask."""

import pytest
import torch
from formula_helpers import slow_mask
from torch import nn

from rtlynx import Pattern
from rtlynx.nn.call import calling

K, N, RANK = 32, 24, 5
PATTERNS = {
    "adjacent": (Pattern(), None),
    "strided": (Pattern(grouping="strided"), (K,)),
    "parts": (Pattern(grouping="strided", parts=(8, 24)), (8, 24)),
    "4:8": (Pattern(4, 8), None),
}


def linear(bias=True, k=K, n=N, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, **kwargs)


def tokens(*shape, seed=1):
    return torch.randn(*(shape or (6, K)), generator=torch.Generator().manual_seed(seed))


def factors(seed=2):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, K, generator=gen) / 8, torch.randn(N, RANK, generator=gen)


def mask_for(x, name):
    pattern, widths = PATTERNS[name]
    return slow_mask(x, pattern.n, pattern.m, pattern.grouping, widths)


def assert_original_is_missed(layer, how):
    """Who needs the original weight of a layer, `how` (refitted, quantised), is told that it was not kept."""
    for ask in (layer.to_linear, layer.original_weight):
        with pytest.raises(RuntimeError, match=f"{how} without keeping its original weight"):
            ask()
    layer.dense_steps = True
    match = f"{how} without keeping its original weight.*dense steps"
    with calling(dense=True), pytest.raises(RuntimeError, match=match):
        layer(tokens())

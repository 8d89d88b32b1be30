"""Z-Image with reference pictures: their tokens take another modulation than those that are drawn."""

import copy

import pytest
import torch
from fusion_helpers import RECIPES
from helpers import in_dtype, relative_error, tiny_z_image

from rtlynx import Recipe, sparsify

BATCH, TOKENS, WIDTH = 2, 40, 192


def call_of_block(dtype):
    gen = torch.Generator().manual_seed(3)
    angles = torch.randn(BATCH, TOKENS, 24, generator=gen)
    given = {
        "x": torch.randn(BATCH, TOKENS, WIDTH, generator=gen),
        "adaln_noisy": torch.randn(BATCH, WIDTH, generator=gen),
        "adaln_clean": torch.randn(BATCH, WIDTH, generator=gen),
    }
    return {
        **in_dtype(given, dtype),
        "noise_mask": torch.randint(2, (BATCH, TOKENS), generator=gen),
        "attn_mask": None,
        "freqs_cis": torch.polar(torch.ones_like(angles), angles),
    }


def of_diffusers(block, call):
    return type(block).forward(block, **call)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fused_block_that_drops_nothing_is_the_dense_block_bit_for_bit(dtype):
    model, call = tiny_z_image().to(dtype), call_of_block(dtype)
    expected = of_diffusers(model.layers[0], call)
    sparsify(model, Recipe.immediate(n=4, m=4))
    assert "forward" in vars(model.layers[0])
    assert torch.equal(model.layers[0](**call), expected)
    changed = {**call, "noise_mask": 1 - call["noise_mask"]}
    assert not torch.equal(model.layers[0](**changed), expected)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_it_is_as_near_to_float32(recipe, calls):
    model, call = tiny_z_image().bfloat16(), call_of_block(torch.bfloat16)
    block = sparsify(model, RECIPES[recipe]).layers[0]
    exact = of_diffusers(copy.deepcopy(block).float(), call_of_block(torch.float32))
    expected = of_diffusers(block, call)
    calls.clear()
    y = block(**call)
    kinds = {name.rpartition("_")[2] for name in calls if name.startswith("rmsnorm_by_token")}
    assert kinds == {"mixed": {"compress", "quantize"}, "whole": {"quantize"}}.get(recipe, {"compress"})
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**call), y)

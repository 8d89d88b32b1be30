"""`rtlynx.compile` on a card: CUDA graphs of blocks by default, the same numbers as without, size by size."""

import pytest
import torch

pytest.importorskip("diffusers")

from fusion_helpers import RECIPES
from helpers import flux_call, in_dtype, output, relative_error, tiny_flux

import rtlynx

pytestmark = pytest.mark.gpu


def call(seed, tokens):
    """A call with a prompt of `tokens`."""
    text = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed))
    made = {**flux_call(seed), "encoder_hidden_states": text, "txt_ids": torch.zeros(tokens, 3)}
    return in_dtype(made, torch.bfloat16, "cuda")


def test_blocks_become_cuda_graphs_that_give_the_same():
    model = rtlynx.sparsify(tiny_flux(num_layers=1, num_single_layers=2).bfloat16().cuda(), RECIPES["fp8"])
    calls = [call(seed, tokens) for seed, tokens in enumerate((8, 8, 8, 24, 24, 24, 8))]
    outputs = {}
    for graphs in (False, None, True):
        torch._dynamo.reset()
        rtlynx.compile(model, cuda_graphs=graphs)
        outputs[graphs] = [output(model, one) for one in calls]  # kept while the next runs, as guidance does
    for plain, *others in zip(*outputs.values(), strict=True):
        assert bool(plain.isfinite().all())
        assert all(relative_error(y, plain) < 1e-2 for y in others)

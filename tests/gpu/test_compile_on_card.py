"""`rtlynx.compile` on a card: CUDA graphs of blocks by default, the same numbers, other sizes."""

import pytest
import torch

pytest.importorskip("diffusers")

from fusion_helpers import RECIPES
from helpers import flux_call, in_dtype, output, relative_error, tiny_flux

import rtlynx
from rtlynx.models.compilation import _without_graphs_reason

pytestmark = pytest.mark.gpu


def calls(*sizes):
    """Calls of these numbers of text tokens."""
    made = []
    for seed, tokens in enumerate(sizes):
        call = flux_call(seed)
        text = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed))
        made.append({**call, "encoder_hidden_states": text, "txt_ids": torch.zeros(tokens, 3)})
    return [in_dtype(call, torch.bfloat16, "cuda") for call in made]


def test_blocks_become_cuda_graphs_that_give_the_same():
    torch._dynamo.reset()
    model = rtlynx.sparsify(tiny_flux(num_layers=1, num_single_layers=2).bfloat16().cuda(), RECIPES["fp8"])
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    assert _without_graphs_reason(model, blocks, "inductor") is None
    given = calls(8, 8, 8, 24, 24, 24, 8)
    rtlynx.compile(model)
    found = [output(model, call) for call in given]  # kept while the next runs, as guidance does
    with torch.compiler.set_stance("force_eager"):
        expected = [output(model, call) for call in given]
    for y, one in zip(found, expected, strict=True):
        assert bool(torch.isfinite(y).all())
        assert relative_error(y, one) < 0.1  # (rounded at other places before selection; a fault is above 1)

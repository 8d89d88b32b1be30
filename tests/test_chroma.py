"""Chroma: FLUX.1's blocks with modulation from outside, and a mask of text tokens."""

import pytest
import torch
from fusion_helpers import unfused
from helpers import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    chroma_call,
    in_dtype,
    output,
    relative_error,
    tiny_chroma,
    watched,
)
from torch import nn

from rtlynx import Recipe, sparsify

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
CLOSE = 2e-2  # of the same products of inputs that were rounded to bfloat16 once less


def model_and_call(dtype=torch.bfloat16):
    return tiny_chroma().to(dtype), in_dtype(chroma_call(), dtype)


def masked(call, present=5):
    """As the pipeline calls it: padding is not attended to."""
    mask = torch.arange(TEXT_TOKENS + IMAGE_TOKENS)[None]
    return {**call, "attention_mask": (mask < present) | (mask >= TEXT_TOKENS)}


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_each_input_is_prepared_once_and_multiplied_once(calls):
    model, call = model_and_call()
    output(sparsify(model), call)
    chains = {"adaln_compress": 3, "gelu_compress": 1, "concat_gelu_compress": 1}
    assert calls == {**chains, "gemm_joint": 5, "linear": 1}
    calls.clear()
    model, call = model_and_call()
    output(sparsify(model, Recipe.dense_fp8()), call)
    assert calls == {"adaln_quantize": 5, "gelu_quantize": 2, "concat_gelu_quantize": 1}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("change", [lambda call: call, masked])
def test_a_fused_model_that_drops_nothing_is_the_dense_model_bit_for_bit(dtype, change):
    model, call = model_and_call(dtype)
    call = change(call)
    expected = output(model, call)
    sparsify(model, Recipe.immediate(n=4, m=4, text_stream="sparse"))
    assert all("forward" in vars(model.get_submodule(block)) for block in (DOUBLE, SINGLE))
    assert torch.equal(output(model, call), expected)
    assert torch.equal(output(unfused(model), call), expected)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_hidden_text_tokens_stay_hidden():
    model, call = model_and_call()
    sparsify(model)
    without, call = output(model, call), masked(call)
    y = output(model, call)
    assert relative_error(y, output(unfused(model), call)) < CLOSE
    assert relative_error(y, without) > 1e-3
    call["encoder_hidden_states"][:, 5:] = 3.0
    assert torch.equal(y, output(model, call))


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_text_rows_run_in_the_original_weight():
    model, call = model_and_call()
    sparsify(model, Recipe.immediate(text_rows="dense"))
    name = f"{SINGLE}.proj_mlp"
    with watched(model, [name]) as seen:
        output(model, call)
    ((x, y),) = seen[name]
    layer = model.get_submodule(name)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(y[:, :TEXT_TOKENS], dense[:, :TEXT_TOKENS])
    assert relative_error(y[:, TEXT_TOKENS:], dense[:, TEXT_TOKENS:]) > 0.05

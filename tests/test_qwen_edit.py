"""Qwen-Image-Edit 2511: tokens of reference pictures are modulated as at timestep zero."""

import copy

import pytest
import torch
from fusion_helpers import RECIPES, unfused
from helpers import in_dtype, output, qwen_edit_call, relative_error, tiny_qwen_edit

from rtlynx import Recipe, sparsify

CLOSE = 2e-2  # of the same products of inputs that were rounded to bfloat16 once less


def model_and_call(dtype=torch.bfloat16):
    return tiny_qwen_edit().to(dtype), in_dtype(qwen_edit_call(), dtype)


def batched(call):
    """Two pictures whose references have other sizes, and the same number of tokens."""
    names = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask")
    both = {name: torch.cat([call[name], call[name].flip(1)]) for name in names}
    both["timestep"] = torch.tensor([0.9, 0.2], dtype=call["timestep"].dtype)
    return {**both, "img_shapes": [[(1, 8, 8), (1, 4, 4)], [(1, 4, 4), (1, 8, 8)]]}


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_each_input_is_prepared_once_by_token(calls):
    model, call = model_and_call()
    output(sparsify(model), call)
    assert calls == {"adaln_by_token_compress": 2, "gelu_compress": 1, "gemm_joint": 3, "linear": 1}
    calls.clear()
    model, call = model_and_call()
    output(sparsify(model, Recipe.dense_fp8()), call)
    # Text has one modulation.
    assert calls == {"adaln_by_token_quantize": 2, "adaln_quantize": 2, "gelu_quantize": 2}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("change", [lambda call: call, batched])
def test_a_fused_model_that_drops_nothing_is_the_dense_model_bit_for_bit(dtype, change):
    model, call = model_and_call(dtype)
    call = change(call)
    expected = output(model, call)
    sparsify(model, Recipe.immediate(n=4, m=4, text_stream="sparse"))
    assert "forward" in vars(model.transformer_blocks[0])
    assert torch.equal(output(model, call), expected)
    assert torch.equal(output(unfused(model), call), expected)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("change", [lambda call: call, batched])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_it_is_as_near_to_the_model_in_float32(recipe, change):
    model, call = model_and_call()
    sparsify(model, RECIPES[recipe])
    call = change(call)
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32))
    expected = output(unfused(model), call)
    assert relative_error(output(model, call), exact) < 1.4 * relative_error(expected, exact)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_a_picture_of_a_batch_is_drawn_as_alone():
    model, call = model_and_call()
    sparsify(model)
    both = batched(call)
    alone = {name: one[:1] for name, one in both.items()}
    assert relative_error(output(model, both)[:1], output(model, alone)) < CLOSE


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_without_references_all_tokens_have_the_timestep():
    model, call = model_and_call()
    sparsify(model)
    drawn = {**call, "hidden_states": call["hidden_states"][:, :64], "img_shapes": [[(1, 8, 8)]]}
    assert relative_error(output(model, drawn), output(unfused(model), drawn)) < CLOSE


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_it_compiles_as_one_graph_a_block():
    model, call = model_and_call()
    expected = output(sparsify(model, Recipe.dense_fp8()), call)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(output(model, call), expected)


def test_gradients_reach_the_modulation():
    model, call = model_and_call(torch.float32)
    dense = copy.deepcopy(model)
    sparsify(model, Recipe.immediate(n=4, m=4))
    for one in (model, dense):
        one(**call, return_dict=False)[0].square().sum().backward()
    ours, theirs = (one.transformer_blocks[0].img_mod[1].weight.grad for one in (model, dense))
    assert relative_error(ours, theirs) < 1e-5

"""Blocks whose layers read prologues: the same model, in fewer passes. Kernels run as their reference."""

import copy
import gc
import importlib
import pickle
import weakref
from functools import wraps

import pytest
import torch
import torch._dynamo.testing
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from fusion_helpers import RECIPES as SHARED
from fusion_helpers import give_factors, unfused
from helpers import MODELS, flux_call, in_dtype, output, relative_error, tiny_flux
from torch import nn

from rtlynx import Recipe, densify, schedule, sparsify
from rtlynx.math.attention import rotated
from rtlynx.models import recompile_limit
from rtlynx.models.fusion import unfuse_blocks
from rtlynx.nn.prologue import adaln, read

RECIPES = {
    **SHARED,
    "adjacent": Recipe.immediate(grouping="adjacent"),
    "text": Recipe.immediate(text_stream="sparse"),
}


def model_and_call(name):
    make, call = MODELS[name]
    return make().bfloat16(), in_dtype(call(), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_without_kernels_a_fused_model_is_the_model_bit_for_bit(name, recipe):
    model, call = model_and_call(name)
    sparsify(model, RECIPES[recipe])
    y = output(model, call)
    unfuse_blocks(model)
    assert torch.equal(y, output(model, call))


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize(
    ("name", "recipe", "rank"),  # every pair of two of these, not all three
    [
        (name, recipe, (0, 4)[(i + j) % 2])
        for i, name in enumerate(MODELS)
        for j, recipe in enumerate(RECIPES)
    ],
)
def test_fused_it_is_as_near_to_the_model_in_float32(name, recipe, rank, calls):
    """Roundings to bfloat16 move entries over the edge of selection, chains that round oftener move more."""
    model, call = model_and_call(name)
    sparsify(model, RECIPES[recipe])
    if rank:
        give_factors(model, rank)
    y = output(model, call)
    # (A low-rank branch beside a layer that drops nothing reads the dense input.)
    read = "_quantize" if recipe == "whole" else "_compress"
    assert any(name.endswith(read) for name in calls) is (recipe != "whole" or rank == 0)
    unfuse_blocks(model)
    expected = output(model, call)
    exact = output(model.float(), in_dtype(call, torch.float32))
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)
    assert relative_error(y, expected) < 2 * relative_error(expected, exact)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_each_input_is_compressed_once_and_multiplied_once(calls):
    model, call = model_and_call("flux")
    output(sparsify(model), call)
    # double block: q, k, v; MLP up. single block: q, k, v and MLP up.
    assert calls["adaln_compress"] == 3
    assert calls["gelu_compress"] == 1
    assert calls["concat_gelu_compress"] == 1
    assert calls["gemm_joint"] == 5
    assert calls["linear"] == 1  # attention out
    assert calls["compress"] == calls["gemm"] == 0
    calls.clear()
    model, call = model_and_call("z-image")
    output(sparsify(model), call)
    blocks = 2  # one refiner of the image, one layer; the caption's stays dense
    assert calls["rmsnorm_compress"] == 2 * blocks
    assert calls["silu_gate_compress"] == blocks


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_each_input_of_dense_fp8_layers_is_quantised_once(calls):
    model, call = model_and_call("flux")
    output(sparsify(model, RECIPES["whole"]), call)
    # double block, image and text: q, k, v; MLP up. single block: q, k, v and MLP up.
    assert calls == {"adaln_quantize": 5, "gelu_quantize": 2, "concat_gelu_quantize": 1}
    calls.clear()
    model, call = model_and_call("z-image")
    output(sparsify(model, RECIPES["whole"]), call)
    # Two refiners and a layer; the caption's refiner has no modulation to fuse.
    assert calls == {"rmsnorm_quantize": 4, "silu_gate_quantize": 2}


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize(
    ("formats", "quantised", "compressed"),
    [
        # q, k and v of the image, and with the MLP in the single block; text's and the MLPs are of one
        # format.
        ({"*.attn.to_k": "fp8-sparse", "*": "fp8-dense"}, 5, 2),
        ({"*.attn.to_k": "dense", "*": "fp8-dense"}, 3, 0),  # what stays dense wants the dense chain
        ({"*.attn.to_[qv]": "bf16-sparse", "*.attn.to_k": "fp8-dense", "*": "dense"}, 1, 1),
    ],
)
def test_layers_of_several_forms_read_the_chain_in_each(formats, quantised, compressed, calls):
    model, call = model_and_call("flux")
    sparsify(model, Recipe.immediate(formats=formats))
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    assert (calls["adaln_quantize"], calls["adaln_compress"]) == (quantised, compressed)
    assert relative_error(y, expected) < 5e-2


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_text_rows_in_the_original_weight_read_the_dense_chain(calls):
    model, call = model_and_call("flux")
    sparsify(model, Recipe.immediate(formats={"*": "fp8-dense"}, text_rows="dense"))
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    # The double block's alone: it has no text rows, but a text stream.
    assert calls == {"adaln_quantize": 4, "gelu_quantize": 2}
    assert relative_error(y, expected) < 5e-2


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_dense_steps_in_fp8_read_the_chain_quantised(calls):
    model, call = model_and_call("flux")
    sparsify(model, Recipe.immediate(precision="fp8", dense_last_steps=1, dense_precision="fp8"))
    quantised = {}
    for timestep in (1.0, 0.5):
        call = in_dtype(flux_call(timestep=timestep), torch.bfloat16)
        with schedule([1.0, 0.5]):
            expected = output(unfused(model), call)
            calls.clear()
            assert relative_error(output(model, call), expected) < 5e-2
        quantised[timestep] = {name: n for name, n in calls.items() if name.endswith("_quantize")}
    # Text is dense fp8 in every step; in the last all of it is, each input quantised once.
    assert quantised[1.0] == {"adaln_quantize": 2, "gelu_quantize": 1}
    assert quantised[0.5] == {"adaln_quantize": 5, "gelu_quantize": 2, "concat_gelu_quantize": 1}


@torch.no_grad()
@pytest.mark.parametrize("dense", [{}, {"dense_last_steps": 1, "dense_precision": "fp8"}])
def test_layers_that_keep_everything_in_bf16_read_the_dense_chain(dense):
    model, call = model_and_call("flux")
    sparsify(model, Recipe.immediate(n=4, m=4, **dense))
    with schedule([1.0, 0.5]):
        assert relative_error(output(model, call), output(unfused(model), call)) < 5e-2


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_dense_steps_in_bf16_read_the_dense_chain(calls):
    model, call = model_and_call("flux")
    sparsify(model, Recipe.immediate(precision="fp8", dense_last_steps=1))
    call = in_dtype(flux_call(timestep=1.0), torch.bfloat16)
    with schedule([1.0]):
        y = output(model, call)
    assert not any(name.endswith(("_compress", "_quantize")) for name in calls)
    assert torch.equal(y, output(model_and_call("flux")[0], call))


@pytest.mark.usefixtures("_served")
def test_a_modulation_that_is_trained_gets_its_gradient(calls):
    model, call = model_and_call("flux")
    sparsify(model, RECIPES["bf16"]).requires_grad_(False)
    modulation = model.transformer_blocks[0].norm1.linear.weight.requires_grad_()
    model(**call, return_dict=False)[0].float().square().sum().backward()
    assert modulation.grad.abs().max() > 0
    assert calls["adaln_compress"] == 0  # what follows it needs a gradient, too


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_autocast_reads_the_dense_chain(calls):
    model, call = model_and_call("flux")
    sparsify(model, RECIPES["whole"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output(model, call)
    assert not any(name.endswith("_quantize") for name in calls)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_layers_with_factors_of_their_own_are_one_product_too(calls):
    model, call = model_and_call("flux")
    sparsify(model)
    give_factors(model, 5, shared=False)
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    assert calls["gemm_joint"] == 5
    assert relative_error(y, expected) < 2e-2


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_a_factor_that_is_replaced_is_shared_no_more():
    model, call = model_and_call("flux")
    sparsify(model)
    give_factors(model, 4)
    output(model, call)
    key = model.transformer_blocks[0].attn.to_k
    key.set_lowrank(torch.randn(4, 128), torch.randn(128, 4))
    assert relative_error(output(model, call), output(unfused(model), call)) < 2e-2


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_whoever_hooks_a_layer_sees_its_input():
    model, call = model_and_call("flux")
    sparsify(model)
    expected = output(unfused(model), call)
    seen = []
    layer = model.single_transformer_blocks[0].attn.to_q
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = output(model, call)
    handle.remove()
    assert isinstance(seen[0], torch.Tensor)
    assert seen[0].shape == (1, 72, 128)
    assert relative_error(y, expected) < 2e-2


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("flux2", "whole"),  # (FLUX itself below, in one graph of both kinds of blocks)
        ("wan", "adjacent"),
        ("qwen", "mixed"),
        ("sd3", "mixed"),
        ("z-image", "adjacent"),
    ],
)
def test_it_compiles_as_one_graph_a_block(name, recipe):
    model, call = model_and_call(name)
    sparsify(model, RECIPES[recipe])
    if recipe == "adjacent":
        give_factors(model, 4)
    expected = output(model, call)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert torch.equal(output(model, call), expected)
    frames = counter.frame_count
    assert frames
    assert torch.equal(output(model, call), expected)
    assert counter.frame_count == frames


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@torch._dynamo.config.patch(recompile_limit=2)
def test_blocks_of_many_forms_compile_once_for_each():
    """A budget chooses for each layer; Dynamo allows one code object eight compilations, here two."""
    formats = {
        f"single_transformer_blocks.{block}.{layer}": "fp8-dense"
        for block in (1, 3)
        for layer in ("attn.to_q", "attn.to_k")
    }
    model = tiny_flux(num_layers=0, num_single_layers=4).bfloat16()
    sparsify(model, Recipe.immediate(precision="fp8", formats=formats))
    call = in_dtype(flux_call(), torch.bfloat16)
    expected = output(model, call)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert torch.equal(output(model, call), expected)
    # The first block's format twice, as its inputs are no parts of one tensor yet.
    assert counter.frame_count == 2 + 1


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_a_function_around_the_model_compiles_as_one_graph():
    model, call = model_and_call("flux")
    sparsify(model, RECIPES["mixed"])
    expected = output(model, call)
    compiled = torch.compile(
        lambda call: model(**call, return_dict=False)[0], backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(call), expected)


def test_each_call_is_a_step_for_the_cuda_graphs_of_its_blocks(monkeypatch):
    """Without that what one block gives is taken for overwritten when the next is called."""
    importlib.import_module("torch._inductor.compile_fx")
    steps = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    model, call = model_and_call("flux")
    output(model, call)
    assert not steps
    sparsify(model)
    for _ in range(2):
        output(copy.deepcopy(model), call)
    assert len(steps) == 2
    densify(model)
    output(model, call)
    assert len(steps) == 2


@torch.no_grad()
def test_a_process_that_made_nothing_sparse_reads_a_pickle():
    model, call = model_and_call("qwen")
    expected = output(sparsify(model), call)
    pickled = pickle.dumps(model)
    recompile_limit.with_own_code.cache_clear()
    assert torch.equal(output(pickle.loads(pickled), call), expected)


@pytest.mark.parametrize("undone", [False, True])
def test_a_model_is_freed_with_the_last_reference_to_it(undone):
    model = sparsify(model_and_call("flux")[0])
    if undone:
        densify(model)
    parameter = weakref.ref(model.transformer_blocks[0].attn.to_q.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert parameter() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_blocks(copied):
    model, call = model_and_call("flux")
    sparsify(model)
    expected = output(model, call)
    twin = copied(model)
    assert torch.equal(output(twin, call), expected)
    twin.transformer_blocks[0].norm1.linear.bias += 1
    assert not torch.equal(output(twin, call), expected)
    assert torch.equal(output(model, call), expected)


def test_dense_again_it_has_the_forwards_of_its_classes():
    model = tiny_flux()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    sparsify(model)
    assert "forward" in vars(model.transformer_blocks[0])
    densify(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(kept) for name, kept in before.items()
    }


def test_a_block_that_something_else_has_taken_over_is_left_alone():
    model = tiny_flux()
    block = model.single_transformer_blocks[0]
    other = nn.Identity().forward
    block.forward = other
    sparsify(model)
    assert block.forward == other
    densify(model)
    assert block.forward == other


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("recipe", ["bf16", "whole"])
def test_an_input_is_for_the_layers_that_it_was_prepared_for(recipe):
    model, _ = model_and_call("flux")
    sparsify(model, RECIPES[recipe])
    attn, norm = model.transformer_blocks[0].attn, model.transformer_blocks[0].norm1.norm
    chain = adaln(norm, torch.randn(1, 64, 128).bfloat16(), *torch.randn(2, 1, 128).bfloat16())
    x = read(chain, attn.to_q, attn.to_k)
    assert (x.shape, x.dtype, x.device.type) == ((1, 64, 128), torch.bfloat16, "cpu")
    assert attn.to_k(x).shape == (1, 64, 128)
    with pytest.raises(TypeError, match="prepared for other layers"):
        attn.to_v(x)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_a_processor_that_we_do_not_know_gets_tensors():
    model, call = model_and_call("flux")
    sparsify(model)
    expected = output(unfused(model), call)
    seen = []

    class Watching(FluxAttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states * 2)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(Watching())
    y = output(model, call)
    assert [tuple(one.shape) for one in seen] == [(1, 64, 128), (1, 72, 128)]
    assert relative_error(y, expected) < 5e-2


@pytest.mark.parametrize("batched", [False, True])
def test_rotation_is_multiplication_of_complex_numbers(batched):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.bfloat16)
    angles = torch.randn((2, 5, 4) if batched else (5, 4))
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    exact = torch.view_as_real(turned).flatten(-2)
    rotary = torch.view_as_real(torch.polar(torch.ones_like(angles), angles))
    torch.testing.assert_close(rotated(x, (rotary,)).double(), exact, atol=1e-6, rtol=1e-5)
    if not batched:  # cosine and sine apart, each twice
        apart = tuple(one.repeat_interleave(2, -1) for one in rotary.unbind(-1))
        torch.testing.assert_close(rotated(x, apart).double(), exact, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "known", "attention"),
    [
        ("qwen", QwenDoubleStreamAttnProcessor2_0, "transformer_blocks.0.attn"),
        ("z-image", ZSingleStreamAttnProcessor, "layers.0.attention"),
    ],
)
def test_a_replaced_processor_of_attention_is_called(name, known, attention):
    model, call = model_and_call(name)
    expected = output(sparsify(model), call)
    seen = []

    class Watching(known):
        @wraps(known.__call__)  # diffusers passes on what the signature names
        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states * 2)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    model.get_submodule(attention).set_processor(Watching())
    assert relative_error(output(model, call), expected) < 1e-2
    assert len(seen) == 1


@torch.no_grad()
def test_hidden_text_tokens_stay_hidden_in_qwen_image():
    model, call = model_and_call("qwen")
    call["encoder_hidden_states_mask"][:, 5:] = False
    sparsify(model)
    y = output(model, call)
    assert torch.equal(y, output(unfused(model), call))
    call["encoder_hidden_states"][:, 5:] = 3.0
    assert torch.equal(y, output(model, call))

"""FLUX.2: what it has beside other models: gated MLPs, modulation from outside, a cache of references."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Transformer2DModel, MagCacheConfig
from diffusers.models.transformers import transformer_flux2 as diffusers_flux2
from fusion_helpers import RECIPES, drop_weights, unfused
from helpers import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    flux2_call,
    flux2_ids,
    in_dtype,
    output,
    relative_error,
    tiny_flux2,
    watched,
)
from peft import LoraConfig
from torch import nn

from rtlynx import Recipe, schedule, sparsify
from rtlynx.models import make_plan, sparse_layers

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
REFERENCES = 16  # tokens of a picture to edit, in front of those that are drawn
CLOSE = 2e-2  # of the same products of inputs that were rounded to bfloat16 once less


def model_and_call(dtype=torch.bfloat16, **changes):
    return tiny_flux2(**changes).to(dtype), in_dtype(flux2_call(), dtype)


# ------------------------------------------------------------------------------------------ fused blocks


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_each_input_is_prepared_once_and_multiplied_once(calls):
    model, call = model_and_call()
    output(sparsify(model), call)
    # double block: q, k, v; MLP up and down. single block: the layer that makes everything, and the one that
    # reads attention and MLP.
    prologues = {"adaln_compress": 3, "silu_gate_compress": 1, "concat_silu_gate_compress": 1}
    assert calls == {**prologues, "gemm_joint": 5, "linear": 1}
    calls.clear()
    model, call = model_and_call()
    output(sparsify(model, Recipe.dense_fp8()), call)
    # Text, too.
    assert calls == {"adaln_quantize": 5, "silu_gate_quantize": 2, "concat_silu_gate_quantize": 1}


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("recipe", ["activations", "whole", "weights"])
def test_a_single_blocks_output_layer_reads_attention_and_mlp_fused(recipe, calls):
    model, call = model_and_call()
    name = f"{SINGLE}.attn.to_out"
    if recipe == "weights":
        drop_weights(model)
        assert model.get_submodule(name).format.name == "fp8-weight-sparse"
    else:
        sparsify(model, RECIPES["fp8" if recipe == "activations" else recipe])
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32))
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    kind = "compress" if recipe == "activations" else "quantize"
    assert calls[f"concat_silu_gate_{kind}"] == 1
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(output(model, call), y)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_a_mask_for_attention_leaves_a_single_block_to_its_processor(calls):
    model = sparsify(tiny_flux2().bfloat16())
    block, tokens = model.single_transformer_blocks[0], TEXT_TOKENS + IMAGE_TOKENS
    x, modulation = torch.randn(2, 1, tokens, 3 * 128).bfloat16()
    x = x[..., :128]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    y = block(x, None, modulation[:, 0], joint_attention_kwargs={"attention_mask": mask})
    expected = type(block).forward(block, x, None, modulation[:, 0], None, {"attention_mask": mask})
    assert "concat_silu_gate_compress" not in calls
    assert relative_error(y, expected) < CLOSE
    assert relative_error(block(x, None, modulation[:, 0]), expected) > CLOSE


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fused_model_that_drops_nothing_is_the_dense_model_bit_for_bit(dtype):
    model, call = model_and_call(dtype)
    expected = output(model, call)
    sparsify(model, Recipe.immediate(n=4, m=4, text_stream="sparse"))
    assert len(sparse_layers(model)) == 14
    assert all("forward" in vars(model.get_submodule(block)) for block in (DOUBLE, SINGLE))
    assert torch.equal(output(model, call), expected)
    assert torch.equal(output(unfused(model), call), expected)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_klein_has_no_guidance_and_a_batch_has_a_modulation_for_each():
    model = sparsify(tiny_flux2(guidance_embeds=False).bfloat16())
    call = in_dtype(flux2_call(batch=2), torch.bfloat16)
    call["timestep"] = torch.tensor([0.9, 0.2], dtype=torch.bfloat16)
    y = output(model, call)
    assert relative_error(y, output(unfused(model), call)) < CLOSE
    alone = {name: one[1:] if len(one) == 2 else one for name, one in call.items()}
    assert relative_error(y[1:], output(model, alone)) < CLOSE


@torch.no_grad()
def test_a_single_block_that_is_given_text_apart_gives_it_apart():
    model = sparsify(tiny_flux2())
    image, text, modulation = torch.randn(1, 64, 128), torch.randn(1, 8, 128), torch.randn(1, 3 * 128)
    both = model.single_transformer_blocks[0](torch.cat([text, image], dim=1), None, modulation)
    apart = model.single_transformer_blocks[0](image, text, modulation, split_hidden_states=True)
    assert torch.equal(torch.cat(apart, dim=1), both)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_text_rows_run_in_the_original_weight():
    model, call = model_and_call()
    sparsify(model, Recipe.immediate(text_rows="dense"))
    name = f"{SINGLE}.attn.to_qkv_mlp_proj"
    with watched(model, [name]) as seen:
        output(model, call)
    ((x, y),) = seen[name]
    dense = nn.functional.linear(x, model.get_submodule(name).weight)
    assert torch.equal(y[:, :TEXT_TOKENS], dense[:, :TEXT_TOKENS])
    assert relative_error(y[:, TEXT_TOKENS:], dense[:, TEXT_TOKENS:]) > 0.1


# ------------------------------------------------------------------------- what the fused path leaves alone


def with_cache_of_references(model):
    """As Flux2KleinKVPipeline prepares its transformer."""
    for block in model.transformer_blocks:
        block.attn.set_processor(diffusers_flux2.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(diffusers_flux2.Flux2KVParallelSelfAttnProcessor())
    return model


def with_references(call):
    """The arguments of the first step: reference tokens in front, whose keys and values are to be kept."""
    tokens = torch.randn(1, REFERENCES, 16, generator=torch.Generator().manual_seed(8))
    ids = flux2_ids(1, 1, 1, REFERENCES, 1) + torch.tensor([10, 0, 0, 0])
    return {
        **call,
        "hidden_states": torch.cat([tokens.to(call["hidden_states"].dtype), call["hidden_states"]], dim=1),
        "img_ids": torch.cat([ids, call["img_ids"]], dim=1),
        "kv_cache_mode": "extract",
        "num_ref_tokens": REFERENCES,
    }


def two_steps(model, call):
    """Outputs of the step that fills the cache and of one that reads it."""
    with schedule([0.5]):
        first, cache = model(**with_references(call), return_dict=False)
        second = model(**call, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[0]
    return first, second


@torch.no_grad()
def test_a_cache_of_references_is_that_of_the_model_bit_for_bit():
    model, call = model_and_call(guidance_embeds=False)
    with_cache_of_references(model)
    dense = two_steps(model, call)
    assert dense[0].shape == dense[1].shape == (1, IMAGE_TOKENS, 16)
    sparsify(model)
    for fused, plain, exact in zip(
        two_steps(model, call), two_steps(unfused(model), call), dense, strict=True
    ):
        assert torch.equal(fused, plain)
        assert 1e-3 < relative_error(fused, exact) < 1
    assert relative_error(dense[1], output(model, call)) > 1e-3  # (the references count)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_steps_that_read_the_cache_of_references_are_fused_and_the_one_that_fills_it_is_not(calls):
    model, call = model_and_call(guidance_embeds=False)
    sparsify(with_cache_of_references(model))
    expected = two_steps(unfused(model), call)
    calls.clear()
    with schedule([0.5]):
        first, cache = model(**with_references(call), return_dict=False)
        assert not any(name.endswith("_compress") for name in calls)  # modulation differs from token to token
        second = model(**call, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[0]
    assert (calls["adaln_compress"], calls["silu_gate_compress"]) == (3, 1)
    assert "concat_silu_gate_compress" not in calls  # (its processor makes that tensor)
    assert torch.equal(first, expected[0])
    assert relative_error(second, expected[1]) < CLOSE


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize(
    ("block", "known"), [(DOUBLE, "Flux2AttnProcessor"), (SINGLE, "Flux2ParallelSelfAttnProcessor")]
)
def test_a_replaced_processor_gets_tensors(block, known):
    model, call = model_and_call()
    sparsify(model)
    expected = output(unfused(model), call)
    seen = []

    class Watching(getattr(diffusers_flux2, known)):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states * 2)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    model.get_submodule(block).attn.set_processor(Watching())
    assert relative_error(output(model, call), expected) < CLOSE
    assert len(seen) == 1


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("name", [f"{DOUBLE}.ff", f"{DOUBLE}.ff.linear_out", f"{SINGLE}.attn"])
def test_whoever_hooks_a_part_sees_tensors(name):
    model, call = model_and_call()
    sparsify(model)
    expected = output(unfused(model), call)
    seen = []
    model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args, kwargs: seen.extend((*args, *kwargs.values())), with_kwargs=True
    )
    assert relative_error(output(model, call), expected) < CLOSE
    assert isinstance(seen[0], torch.Tensor)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_loras_stay_in_fused_blocks(calls):
    model, call = model_and_call()
    without = output(sparsify(model), call)
    torch.manual_seed(0)
    targets = ["to_k", "linear_out", "to_qkv_mlp_proj"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False))
    model.bfloat16()
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    assert (calls["adaln_compress"], calls["silu_gate_compress"]) == (3, 1)
    assert relative_error(y, expected) < CLOSE
    assert relative_error(y, without) > 0.1


@torch.no_grad()
def test_caches_skip_blocks_that_are_fused():
    """(First-block caching of diffusers 0.42 fails on the dense FLUX.2 too.)"""
    model = sparsify(tiny_flux2(num_layers=2, num_single_layers=2))
    expected = output(model, flux2_call(timestep=1.0))
    model.enable_cache(MagCacheConfig(threshold=0.5, num_inference_steps=4, mag_ratios=torch.ones(4)))
    last = "single_transformer_blocks.1.attn.to_out"
    with watched(model, [last]) as seen, model.cache_context("cond"):
        steps = [output(model, flux2_call(timestep=1 - step / 4)) for step in range(4)]
    assert torch.equal(steps[0], expected)
    assert 1 <= len(seen[last]) < 4
    assert all(bool(one.isfinite().all()) for one in steps)


# -------------------------------------------------------------------------------------------- full sizes


WIDE_RECIPES = [
    (Recipe.immediate(precision="fp8"), "fp8-dense"),
    (Recipe.recommended(drop="activations"), "fp8-dense"),
    (Recipe.recommended(), "fp8-weight-sparse"),
]


@pytest.mark.parametrize(("recipe", "instead"), WIDE_RECIPES)
def test_what_is_too_wide_for_sparse_inputs_in_fp8_is_something_else(recipe, instead):
    """Single blocks of dev read attention of 6,144 and an MLP of 18,432."""
    with torch.device("meta"):
        dev = Flux2Transformer2DModel(num_layers=1, num_single_layers=1)
    out, down = f"{SINGLE}.attn.to_out", f"{DOUBLE}.ff.linear_out"
    plan = make_plan(dev, recipe)
    assert (plan.layer(out).in_features, plan.layer(down).in_features) == (24576, 18432)
    assert (plan.layer(out).format.name, plan.layer(down).format.name) == (instead, "fp8-sparse")
    assert out not in {one.name for one in plan.alternatives() if one.format.name == "fp8-sparse"}
    forced = replace(recipe, formats={out: "fp8-sparse"})
    assert make_plan(dev, forced).layer(out).format.name == "fp8-sparse"


# --------------------------------------------------------------------------------------- changes of basis


def test_single_blocks_and_gated_mlps_keep_their_bases_and_say_why():
    recipe = Recipe.immediate(rotate_values=True, permute_hidden=True, text_stream="sparse")
    plan = make_plan(tiny_flux2(), recipe)
    assert [one.name for one in plan.rotated] == [f"{DOUBLE}.attn"]
    name = f"{SINGLE}.attn.to_qkv_mlp_proj"
    assert plan.unrotated == {f"{SINGLE}.attn": f"{name} makes more than its values"}
    assert not plan.permuted
    downs = (f"{DOUBLE}.ff.linear_out", f"{DOUBLE}.ff_context.linear_out", f"{SINGLE}.attn.to_out")
    assert plan.unpermuted == {
        down: f"what its up projection makes are not the 384 features that {down} reads" for down in downs
    }
    patterns = {layer.name: layer.pattern for layer in plan.layers}
    assert patterns[downs[2]].grouping == "strided"
    assert patterns[downs[2]].widths(128 + 384) == (128, 384)  # attention | MLP
    assert patterns[f"{DOUBLE}.attn.to_out.0"].grouping == "adjacent"

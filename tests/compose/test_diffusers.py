"""What people ask of a diffusers transformer besides: of a sparse one it gets the same."""

import copy

import pytest
import rtlynx_zoo as zoo
import torch
from compose_helpers import formulas, sparse_flux, with_formulas
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from helpers import (
    IMAGE_TOKENS,
    flux_call,
    output,
    relative_error,
    tiny_flux,
    tiny_qwen,
    tiny_z_image,
    watched,
    z_image_call,
)
from pipeline_helpers import TinyPipeline

from rtlynx import Recipe, densify, sparsify
from rtlynx.models import sparse_layers

CLOSE = 3e-4  # the last bit of an input decides between entries that are nearly a tie
WIDTH = 128
KINDS = ["immediate", "strided", "refit"]


def seeded(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_like_formulas(model, call):
    assert relative_error(output(model, call), output(with_formulas(model), call)) < CLOSE


# -------------------------------------------------------------------------------------- fused projections


@pytest.mark.parametrize("copied", [False, True])
def test_fusing_projections_is_refused(copied):
    model = sparsify(tiny_flux())
    if copied:
        model = copy.deepcopy(model)
    before, layers = output(model, flux_call()), list(sparse_layers(model))
    with pytest.raises(RuntimeError, match=r"not fused.*Leave the call out"):
        model.fuse_qkv_projections()
    assert torch.equal(output(model, flux_call()), before)
    assert list(sparse_layers(model)) == layers
    assert not any(name.endswith("qkv") for name, _ in model.named_modules())


def test_fusing_projections_is_refused_where_some_are_dense_and_through_a_pipeline():
    pipeline = zoo.load("flux-emoji")
    sparsify(pipeline, Recipe.immediate(skip=("transformer_blocks.*.attn.*",)))
    with pytest.raises(RuntimeError, match="not fused"):
        pipeline.transformer.fuse_qkv_projections()
    assert not any(name.endswith("qkv") for name, _ in pipeline.transformer.named_modules())


def test_fusing_projections_of_one_attention_is_refused():
    for attention in (
        sparsify(tiny_z_image()).layers[0].attention,  # diffusers has no method for all of them here,
        sparsify(tiny_qwen()).transformer_blocks[0].attn,  # and one that does nothing here
    ):
        with pytest.raises(RuntimeError, match="not fused"):
            attention.fuse_projections()


def test_fused_projections_before_sparsity_are_refused_until_unfused():
    model = tiny_flux()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fused query, key and value.*unfuse_qkv_projections\(\)"):
        sparsify(model)
    model.unfuse_qkv_projections()
    check_like_formulas(sparsify(model), flux_call())


def test_after_densify_projections_are_fused_again():
    model = densify(sparsify(tiny_flux()))
    expected = output(tiny_flux(), flux_call())
    model.fuse_qkv_projections()
    assert relative_error(output(model, flux_call()), expected) < 1e-6
    assert "to_qkv" in dict(model.transformer_blocks[0].attn.named_children())


# ------------------------------------------------------------------------------------------- model calls


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(backend):
    model = sparse_flux("refit")
    expected = output(with_formulas(model), flux_call())
    with attention_backend("native"):  # which puts back what the next line sets for the whole process
        model.set_attention_backend(backend)
        assert relative_error(output(model, flux_call()), expected) < CLOSE
    model.reset_attention_backend()
    assert relative_error(output(model, flux_call()), expected) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeat", [False, True])
def test_controlnet_residuals(kind, repeat):
    model = sparse_flux(kind, num_layers=2, num_single_layers=2)
    call = flux_call() | {
        "controlnet_block_samples": [seeded(1, IMAGE_TOKENS, WIDTH)],
        "controlnet_single_block_samples": [seeded(1, IMAGE_TOKENS, WIDTH, seed=8)],
        "controlnet_blocks_repeat": repeat,
    }
    check_like_formulas(model, call)
    assert relative_error(output(model, call), output(model, flux_call())) > 1e-2


def test_ip_adapter_processors():
    model = sparse_flux("refit")
    torch.manual_seed(0)
    processors = {
        name: FluxIPAdapterAttnProcessor(WIDTH, 64)
        if name.startswith("transformer_blocks")
        else type(processor)()
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    without = output(sparse_flux("refit"), flux_call())

    def call():  # diffusers changes the dictionary
        return flux_call() | {"joint_attention_kwargs": {"ip_hidden_states": [seeded(1, 4, 64)]}}

    drawn, expected = output(model, call()), output(with_formulas(model), call())
    assert relative_error(drawn, expected) < CLOSE
    assert relative_error(drawn, without) > 1e-2


@pytest.mark.parametrize("recipe", [{}, {"text_rows": "dense"}, {"precision": "fp8"}])
@pytest.mark.parametrize(
    ("build", "call"), [(tiny_flux, flux_call), (tiny_z_image, z_image_call)], ids=["flux", "z-image"]
)
def test_guidance_as_a_batch_is_guidance_as_two_calls(build, call, recipe):
    model = sparsify(build(), Recipe.immediate(**recipe))
    one, other = call(seed=1), call(seed=2)

    def join(key):
        if isinstance(one[key], list):
            return one[key] + other[key]
        return one[key] if key.endswith("ids") else torch.cat([one[key], other[key]])

    both = output(model, {key: join(key) for key in one})
    apart = torch.cat([output(model, one), output(model, other)])
    assert relative_error(both.reshape(apart.shape), apart) < CLOSE


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_few_steps(steps, dense_steps):
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=dense_steps))

    def draw(one, dense):
        generator = [torch.Generator().manual_seed(0)]
        if dense:  # with a picture drawn before
            TinyPipeline(one)(["a dog"], generator, num_inference_steps=steps)
        generator = [torch.Generator().manual_seed(1)]
        return TinyPipeline(one)(["a cat"], generator, num_inference_steps=steps)

    drawn, plain = draw(model, dense_steps), draw(tiny_flux(), False)
    if dense_steps == 0:
        twin = with_formulas(model)
        assert relative_error(drawn, draw(twin, False)) < CLOSE
    assert torch.equal(drawn, plain) == (steps <= dense_steps)


def test_layers_in_a_pipeline_of_few_steps_with_guidance():
    # Layer by layer: in a trained model one entry that is nearly a tie changes the picture visibly.
    pipeline = sparsify(zoo.load("flux-emoji"))
    pipeline.set_progress_bar_config(disable=True)
    plain = formulas(pipeline.transformer)
    names = [name for name in plain if ".0." in name]
    with watched(pipeline.transformer, names) as seen:
        pipeline("red apple", num_inference_steps=2, output_type="latent")
    for name, calls in seen.items():
        assert len(calls) == 4
        for x, y in calls:
            assert relative_error(y, plain[name](x)) < 2e-6, name

"""LoRA adapters of peft on sparse models, loaded by diffusers."""

import copy

import pytest
import torch
from compose_helpers import REFIT, adapter, formulas, refit, sparse_flux
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from helpers import (
    MODELS,
    TEXT_TOKENS,
    flux_call,
    output,
    relative_error,
    tiny_flux,
    watched,
)

from rtlynx import Recipe, densify, sparsify
from rtlynx.models import sparse_layers
from rtlynx.nn.call import calling

CLOSE = 2e-6
KINDS = ("immediate", "strided", "refit")
ADJACENT_REFIT = Recipe(rank=4, ridge=0.1, grouping="adjacent")
KEEPS_ORIGINAL = {"text_rows": "dense"}, {"dense_steps": 1}


def load(model, seed=0, rank=4, name="style", **kwargs):
    """Load a LoRA for all sparse layers; returns its deltas."""
    names = [one.removesuffix(".base_layer") for one in sparse_layers(model)]
    state, deltas = adapter(model, names, seed, rank)
    model.load_lora_adapter(state, adapter_name=name, **kwargs)
    return deltas


def check_layers(model, deltas, expected, call=None):
    """Every layer with an adapter gives `expected(name, x)`."""
    with watched(model, deltas) as seen:
        output(model, call or flux_call())
    for name, calls in seen.items():
        assert calls
        for x, y in calls:
            assert relative_error(y, expected(name, x)) < CLOSE, name


@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_layer_the_delta_reads_the_dense_input(kind):
    model = sparse_flux(kind)
    plain = formulas(model)
    deltas = load(model)
    check_layers(model, deltas, lambda name, x: plain[name](x) + x @ deltas[name].T)


@pytest.mark.parametrize("recipe", [*KEEPS_ORIGINAL, {"precision": "fp8"}])
def test_beside_layers_of_other_recipes(recipe):
    model = sparsify(tiny_flux(), Recipe.immediate(**recipe))
    twin = copy.deepcopy(model)
    deltas = load(model)

    def expected(name, x):
        with torch.no_grad(), calling(dense=dense, text_rows=(0, TEXT_TOKENS)):
            return twin.get_submodule(name)(x) + x @ deltas[name].T

    for timestep in (1.0, 0.5):
        dense = "dense_steps" in recipe and timestep == 1.0
        check_layers(model, deltas, expected, flux_call(timestep=timestep))


@pytest.mark.parametrize(("build", "call"), [MODELS[name] for name in ("flux2", "qwen", "z-image")])
def test_beside_the_layers_of_other_architectures(build, call):
    model = sparsify(build())
    plain = formulas(model)
    deltas = load(model)
    check_layers(model, deltas, lambda name, x: plain[name](x) + x @ deltas[name].T, call())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("refitted", [False, True])
def test_fused_the_delta_reads_the_selected_input(refitted, safe):
    model = refit(ADJACENT_REFIT) if refitted else sparse_flux("adjacent")
    plain = formulas(model)
    deltas = load(model)
    beside = output(model, flux_call())
    model.fuse_lora(lora_scale=0.5, safe_fusing=safe)
    check_layers(model, deltas, lambda name, x: plain[name](x, delta=0.5 * deltas[name]))
    assert relative_error(output(model, flux_call()), beside) > 1e-3
    model.unfuse_lora()
    plain_again = formulas(model)
    for name, formula in plain.items():
        torch.testing.assert_close(plain_again[name].weight, formula.weight)


def test_fused_and_unloaded_it_stays_in_the_weights():
    model = sparse_flux("adjacent")
    load(model)
    model.fuse_lora()
    fused = output(model, flux_call())
    model.unload_lora()
    assert torch.equal(output(model, flux_call()), fused)
    assert len(sparse_layers(model)) == 11


def flux_pipeline(model):
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)


@pytest.mark.parametrize("recipe", [{"precision": "fp8"}, {"grouping": "strided"}, *KEEPS_ORIGINAL])
@pytest.mark.parametrize("copied", [False, True])
def test_fusing_into_what_cannot_take_it_is_refused(recipe, copied):
    model = refit(Recipe(rank=4, ridge=0.1, **recipe))
    if copied:
        model = copy.deepcopy(model)
    load(model)
    before = output(model, flux_call())
    with pytest.raises(RuntimeError, match=r"adapters are not merged into this model.*Leave out fuse_lora"):
        model.fuse_lora()
    with pytest.raises(RuntimeError, match="adapters are not merged into this model"):
        flux_pipeline(model).fuse_lora(components=["transformer"])
    assert torch.equal(output(model, flux_call()), before)


@pytest.mark.parametrize("recipe", KEEPS_ORIGINAL)
def test_a_merge_by_peft_itself_beside_kept_originals_is_noticed(recipe):
    model = refit(Recipe(rank=4, ridge=0.1, grouping="adjacent", **recipe))
    deltas = load(model)
    before = output(model, flux_call())
    for name in deltas:
        model.get_submodule(name).merge()
    with pytest.raises(RuntimeError, match=r"merged into the weights.*but not into the original weights"):
        output(model, flux_call())
    for name in deltas:
        model.get_submodule(name).unmerge()
    assert relative_error(output(model, flux_call()), before) < 1e-5


def test_after_densify_adapters_are_fused_again():
    model = densify(sparsify(tiny_flux(), Recipe.immediate(dense_steps=1, precision="fp8")))
    load_on = ["transformer_blocks.0.attn.to_q"]
    model.load_lora_adapter(adapter(model, load_on)[0])
    beside = output(model, flux_call())
    model.fuse_lora()
    assert relative_error(output(model, flux_call()), beside) < CLOSE


def test_through_a_pipeline():
    model = sparse_flux("refit")
    earlier = output(model, flux_call())
    pipeline = flux_pipeline(model)
    state, _ = adapter(model, sparse_layers(model))
    pipeline.load_lora_weights(state, adapter_name="style")
    beside = output(model, flux_call())
    direct = sparse_flux("refit")
    load(direct)
    assert torch.equal(output(direct, flux_call()), beside)
    assert not torch.equal(beside, earlier)
    pipeline.unload_lora_weights()
    assert torch.equal(output(model, flux_call()), earlier)


def test_several_adapters_add_up_and_leave():
    model = sparse_flux("refit")
    earlier = output(model, flux_call())
    plain = formulas(model)
    first, second = load(model, seed=1, name="first"), load(model, seed=2, rank=2, name="second")
    model.set_adapters(["first", "second"], [0.5, -2.0])
    both = {name: 0.5 * first[name] - 2.0 * second[name] for name in first}
    check_layers(model, both, lambda name, x: plain[name](x) + x @ both[name].T)
    model.delete_adapters("first")
    model.set_adapters("second")
    check_layers(model, second, lambda name, x: plain[name](x) + x @ second[name].T)
    model.disable_lora()
    assert torch.equal(output(model, flux_call()), earlier)
    model.unload_lora()
    assert torch.equal(output(model, flux_call()), earlier)


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("kind", ["immediate", "fp8"])
def test_hotswapped(kind, rank):
    model = sparse_flux(kind)
    earlier = output(model, flux_call())
    if rank != 4:
        model.enable_lora_hotswap(target_rank=4)
    load(model, seed=1)
    load(model, seed=2, rank=rank, hotswap=True)
    fresh = sparse_flux(kind)
    load(fresh, seed=2, rank=rank)
    assert relative_error(output(model, flux_call()), output(fresh, flux_call())) < CLOSE
    model.unload_lora()
    assert torch.equal(output(model, flux_call()), earlier)


def test_saved_adapters_fit_the_dense_model(tmp_path):
    model = sparsify(tiny_flux())
    load(model)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    dense, loaded = tiny_flux(), tiny_flux()
    names = list(sparse_layers(sparsify(tiny_flux())))
    dense.load_lora_adapter(adapter(dense, names)[0])
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert relative_error(output(loaded, flux_call()), output(dense, flux_call())) < CLOSE


def test_recipe_of_these_tests_refits():
    assert all(layer.refitted and layer.rank for layer in sparse_layers(refit(REFIT)).values())

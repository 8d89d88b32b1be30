"""A model is made sparse, and dense again, whole or not at all; copies and dtypes of sparse models."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    flux_call,
    output,
    relative_error,
    tiny_flux,
)
from layer_name_helpers import FLUX_SINGLE, MODELS
from peft import LoraConfig
from torch import nn

from rtlynx import Recipe, densify, schedule, sparsify
from rtlynx.models import sparse_layers, state_of

each_model = pytest.mark.parametrize("name", MODELS)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    assert state_of(model) is None
    assert not sparse_layers(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# ------------------------------------------------------------------------------------------- bad input


def test_skip_that_matches_nothing_is_refused():
    model = tiny_flux()
    before = weights(model)
    with pytest.raises(ValueError, match=r"'\*\.to_quu' matches no layer"):
        sparsify(model, Recipe.immediate(skip=("*.to_quu",)))
    assert_untouched(model, before)


def test_sparse_twice_is_refused():
    model = sparsify(tiny_flux())
    expected = output(model, flux_call())
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(model, Recipe.immediate(n=1))
    assert torch.equal(output(model, flux_call()), expected)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper(), Recipe.immediate(rank=4)])
def test_a_recipe_that_needs_calibration_is_refused(recipe):
    model = tiny_flux()
    before = weights(model)
    with pytest.raises(ValueError, match="calibrate"):
        sparsify(model, recipe)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Identity()]
)
def test_a_model_without_linears_is_refused(model):
    with pytest.raises(ValueError, match="no linear layers"):
        sparsify(model)


def test_a_lone_linear_is_refused_and_not_half_changed():
    model = nn.Linear(16, 8)
    with pytest.raises(ValueError, match="SparseLinear"):
        sparsify(model)
    assert not list(model.children())
    assert state_of(model) is None


@pytest.mark.parametrize("thing", [None, "flux", SimpleNamespace(unet=nn.Linear(4, 4))])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(TypeError, match="expected a torch module or a diffusers pipeline"):
        sparsify(thing)


@pytest.mark.parametrize("how", ["cpu_offload", "one layer"])
def test_a_model_with_an_offload_hook_is_refused_and_unchanged(how):
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    model = tiny_flux()
    before = weights(model)
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        add_hook_to_module(model.get_submodule(FLUX_SINGLE[3]), AlignDevicesHook())
    with pytest.raises(TypeError, match=r"proj_mlp|transformer_blocks\.0\.attn\.to_q") as refused:
        sparsify(model)
    assert "then enable offloading" in str(refused.value)
    assert not sparse_layers(model)
    remove_hook_from_submodules(model)
    assert_untouched(model, before)


def test_offloading_after_sparsifying_works():
    from accelerate import cpu_offload

    model = sparsify(tiny_flux(), Recipe.immediate(text_rows="dense"))
    expected = output(model, flux_call())
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model, flux_call()), expected)


def test_adapters_must_come_after():
    model = tiny_flux()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters attached"):
        sparsify(model, Recipe.immediate())
    assert not sparse_layers(model)


# -------------------------------------------------------------------------------------------- densify


@each_model
def test_densify_restores_exactly(name):
    build, call, image, _ = MODELS[name]
    model = build()
    parameters = dict(model.named_parameters())
    before, expected = weights(model), output(model, call())
    sparsify(model, Recipe.immediate(dense_steps=1, text_rows="dense"))
    assert not torch.equal(output(model, call(timestep=0.9)), 0 * expected)
    assert densify(model) is model
    assert_untouched(model, before)
    assert all(type(model.get_submodule(n)) is nn.Linear for n in image)
    assert all(parameter is parameters[n] for n, parameter in model.named_parameters())
    assert not model._forward_pre_hooks
    assert torch.equal(output(model, call()), expected)
    sparsify(model)  # and again
    assert set(sparse_layers(model)) == set(image)


def test_densify_of_a_dense_model_changes_nothing():
    model = tiny_flux()
    before = weights(model)
    densify(model)
    assert_untouched(model, before)


def test_densify_with_a_lost_original_changes_nothing():
    model = sparsify(tiny_flux())
    model.get_submodule(FLUX_SINGLE[4]).set_refit(torch.zeros(128, 640))
    expected = output(model, flux_call())
    with pytest.raises(RuntimeError, match="refitted without keeping"):
        densify(model)
    assert len(sparse_layers(model)) == 11
    assert torch.equal(output(model, flux_call()), expected)


def test_a_pipeline_stands_for_its_transformer():
    pipeline = SimpleNamespace(transformer=tiny_flux())
    assert sparsify(pipeline) is pipeline
    assert len(sparse_layers(pipeline.transformer)) == 11
    assert densify(pipeline) is pipeline
    assert not sparse_layers(pipeline.transformer)


# ------------------------------------------------------------------------------------- copies and dtypes


def test_copies_are_independent():
    recipe = Recipe.immediate(dense_steps=1, text_rows="dense")
    model = sparsify(tiny_flux(), recipe)
    dense = output(tiny_flux(), flux_call())
    twin = copy.deepcopy(model)
    assert torch.equal(output(model, flux_call(timestep=1.0)), output(tiny_flux(), flux_call(timestep=1.0)))
    assert not torch.equal(output(model, flux_call()), dense)
    assert torch.equal(output(twin, flux_call(timestep=0.4)), output(model, flux_call(timestep=0.4)))

    # Text rows: the other copy is called with another text length in between.
    longer = flux_call(timestep=0.3)
    longer["encoder_hidden_states"] = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3))
    longer["txt_ids"] = torch.zeros(24, 3)
    expected = output(model, flux_call(timestep=0.3))
    output(twin, longer)
    assert torch.equal(output(model, flux_call(timestep=0.3)), expected)

    densify(twin)
    assert not twin._forward_pre_hooks
    assert model._forward_pre_hooks
    assert torch.equal(output(twin, flux_call()), dense)
    assert torch.equal(output(model, flux_call(timestep=0.3)), expected)


def test_copies_do_not_share_weights_or_memories():
    model = sparsify(tiny_flux())
    twin = copy.deepcopy(model)
    expected = output(model, flux_call())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(output(model, flux_call()), expected)
    ours = {id(layer.shared_input) for layer in sparse_layers(model).values()}
    theirs = {id(layer.shared_input) for layer in sparse_layers(twin).values()}
    assert not ours & theirs
    assert len(ours) == len(theirs)  # still one a block


def test_half_precision_model_runs():
    model = sparsify(tiny_flux()).to(torch.bfloat16)
    call = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in flux_call().items()}
    expected = output(sparsify(tiny_flux()), flux_call())
    y = output(model, call)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.1


def test_two_models_of_one_class_do_not_interfere():
    first = sparsify(tiny_flux(0), Recipe.immediate(dense_steps=1))
    second = sparsify(tiny_flux(1), Recipe.immediate(dense_steps=1))
    for timestep in (0.9, 0.5):
        for model, seed in ((first, 0), (second, 1)):
            with schedule([0.9, 0.5]):
                y, dense = (output(m, flux_call(timestep=timestep)) for m in (model, tiny_flux(seed)))
            assert torch.equal(y, dense) == (timestep == 0.9)


def test_training_gradients_reach_every_weight():
    model = sparsify(tiny_flux(), Recipe.immediate(text_stream="sparse"))
    model(**flux_call(), return_dict=False)[0].square().mean().backward()
    # (The last text output and feed-forward feed nothing but the single block here, which reads them.)
    for name, layer in sparse_layers(model).items():
        assert layer.weight.grad is not None, name
        assert bool(layer.weight.grad.any()), name


@pytest.mark.parametrize(
    ("changes", "keep"), [({}, set()), ({"text_rows": "dense"}, set(FLUX_SINGLE)), ({"dense_steps": 1}, None)]
)
def test_original_weights_are_kept_where_something_runs_dense(changes, keep):
    layers = sparse_layers(sparsify(tiny_flux(), Recipe.immediate(precision="fp8", **changes)))
    kept = {name for name, layer in layers.items() if layer.weight_dense is not None}
    assert kept == (set(layers) if keep is None else keep)


def test_text_rows_of_a_model_that_is_not_known_are_refused():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])})
    before = weights(model)
    with pytest.raises(ValueError, match="where the text rows of ModuleDict are is not known"):
        sparsify(model, Recipe.immediate(text_rows="dense"))
    assert_untouched(model, before)

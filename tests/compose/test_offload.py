"""Offloading and layerwise casting. There is no accelerator here: both devices of a transfer are the CPU."""

from functools import partial

import accelerate
import pytest
import rtlynx_zoo as zoo
import torch
from compose_helpers import adapter, refit, sparse_flux
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import flux_call, output, relative_error, tiny_flux
from rtlynx_zoo.pipeline import EmojiPipeline

from rtlynx import Recipe, calibrate, densify, sparsify
from rtlynx.models import sparse_layers

GROUPS = {
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaves": {"offload_type": "leaf_level"},
}
OTHER_BASES = Recipe(rank=None, ridge=0.1, rotate_values=True, permute_hidden=True)
KINDS = {
    "immediate": lambda: sparse_flux("immediate"),
    "refit": lambda: refit(Recipe(rank=4, ridge=0.1, text_rows="dense", dense_steps=1)),
    "fp8": lambda: refit(Recipe(rank=4, ridge=0.1, text_rows="dense", precision="fp8")),
}


def offload(model, groups, **kwargs):
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_device=device, **GROUPS[groups], **kwargs)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_group_offloading_changes_nothing(kind, groups):
    model = KINDS[kind]()
    calls = [flux_call(timestep=timestep) for timestep in (1.0, 0.5)]
    before = [output(model, call) for call in calls]
    offload(model, groups)
    for call, expected in zip(calls, before, strict=True):
        assert torch.equal(output(model, call), expected)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_scales_and_originals_go_where_the_layer_goes(kind, groups, tmp_path):
    model = KINDS[kind]()
    before = output(model, flux_call())
    offload(model, groups, offload_to_disk_path=str(tmp_path))
    own = [
        tensor
        for layer in sparse_layers(model).values()
        for tensor in (*layer.parameters(), *layer.buffers())
    ]
    assert len(own) >= 11 * (2 if kind == "immediate" else 4)
    for tensor in own:  # on disk: what is here counts for nothing
        tensor.data.view(torch.uint8).fill_(255)
    # Weights come back at other addresses, whose alignment decides how PyTorch sums on the CPU.
    assert relative_error(output(model, flux_call()), before) < 1e-5


@pytest.mark.parametrize("build", [sparse_flux, partial(refit, OTHER_BASES)])
@pytest.mark.parametrize("groups", GROUPS)
def test_an_adapter_loaded_under_group_offloading(groups, build):
    model, plain = build(), build()
    state, _ = adapter(plain, sparse_layers(plain))
    plain.load_lora_adapter(state)
    offload(model, groups)
    output(model, flux_call())
    model.load_lora_adapter(state)
    assert torch.equal(output(model, flux_call()), output(plain, flux_call()))


@pytest.mark.parametrize("groups", GROUPS)
def test_group_offloading_before_sparsity_is_refused(groups):
    model = tiny_flux()
    before = output(model, flux_call())
    offload(model, groups)
    with pytest.raises(ValueError, match="has group offloading enabled: make it sparse first"):
        sparsify(model)
    with pytest.raises(ValueError, match="has group offloading enabled: make it sparse first"):
        calibrate(model, calls=[flux_call()], progress=False)
    assert torch.equal(output(model, flux_call()), before)


# ------------------------------------------------------------------------------------ offloaded pipelines


def emoji():
    scheduler = FlowMatchEulerDiscreteScheduler()
    return EmojiPipeline(zoo.load("flux-emoji").transformer, scheduler)


def draw(pipeline):
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline("red apple", generator=generator, **settings).images


def test_whole_models_offloaded():
    recipe = Recipe.immediate(text_rows="dense", dense_steps=1)
    pipeline = sparsify(emoji(), recipe)
    before = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(draw(pipeline), before)


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_offloading(kind):
    # What enable_sequential_cpu_offload calls; from CPU to CPU it fails on pipelines that are dense, too.
    model = KINDS[kind]()
    before = output(model, flux_call())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        for layer in sparse_layers(model).values():
            assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
        assert torch.equal(output(model, flux_call()), before)


def test_an_adapter_beside_other_bases_under_sequential_offloading():
    model = refit(OTHER_BASES)
    model.load_lora_adapter(adapter(model, sparse_layers(model))[0])
    before = output(model, flux_call())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(output(model, flux_call()), before)


def test_whole_models_may_be_offloaded_before():
    expected = draw(sparsify(emoji()))
    pipeline = emoji()
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(sparsify(pipeline)), expected)


def test_sequential_offloading_before_is_refused():
    pipeline = emoji()
    pipeline.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(TypeError, match=r"forward has been replaced.*sparsify the model first"):
        sparsify(pipeline)
    assert not sparse_layers(pipeline.transformer)


# --------------------------------------------------------------------------------------- layerwise casting


def cast(model, storage=torch.float8_e4m3fn):
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)


def rounded(model, storage):
    """Round what layerwise casting rounds: parameters and buffers of layers that it does not skip."""
    for name, module in model.named_modules():
        skipped = any(part in name for part in ("pos_embed", "norm")) or name == "proj_out"
        if isinstance(module, torch.nn.Linear) and not skipped:
            for key, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if tensor.dtype == torch.float32 and key != "weight_scale":
                    tensor.data = tensor.data.to(storage).float()
    return model


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting_rounds_what_is_stored(kind, storage):
    model = KINDS[kind]()
    expected = output(rounded(KINDS[kind](), storage), flux_call())
    cast(model, storage)
    for _ in range(2):
        assert torch.equal(output(model, flux_call()), expected)
    layer = model.get_submodule("single_transformer_blocks.0.proj_mlp")
    stored = torch.float8_e4m3fn if kind == "fp8" else storage
    assert layer.weight.dtype == stored
    if kind == "fp8":
        assert layer.weight_scale.dtype == torch.float32
    if kind != "immediate":
        assert {layer.lowrank_a.dtype, layer.weight_dense.dtype} == {storage}


def test_layerwise_casting_before_is_refused():
    model = tiny_flux()
    cast(model)
    with pytest.raises(TypeError, match="forward has been replaced"):
        sparsify(model)
    assert not sparse_layers(model)


def test_a_model_with_hooks_on_its_layers_is_not_made_dense():
    """Their forwards would go on calling the sparse layers."""
    model = sparsify(tiny_flux())
    expected = output(model, flux_call())
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    before = output(model, flux_call())
    with pytest.raises(RuntimeError, match="remove offloading and layerwise casting first"):
        densify(model)
    assert torch.equal(output(model, flux_call()), before)
    assert relative_error(before, expected) < 1e-1

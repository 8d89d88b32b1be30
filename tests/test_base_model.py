"""A checkpoint belongs to one base model, all of it; what was changed since is not lost without a word."""

import copy
import time
from dataclasses import replace

import pytest
import torch
from checkpoint_helpers import RECIPES, make
from diffusers import FluxTransformer2DModel
from helpers import flux_call, output, tiny_flux, tiny_qwen
from peft import LoraConfig
from torch import nn

from rtlynx import CalibrationOptions, CheckpointError, Recipe, calibrate, densify, load, save, sparsify
from rtlynx.models.fingerprint import model_fingerprint, record, same

TO_Q, TEXT = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj"
EVERY = list(tiny_flux().state_dict())


@pytest.fixture(scope="module")
def refitted():
    return make(RECIPES["refit"])


@pytest.fixture
def folder(refitted, tmp_path):
    save(refitted, tmp_path / "lynx")
    return tmp_path / "lynx"


def nudged(model, name):
    """`model` with one entry of one tensor changed by a few steps of bfloat16."""
    entry = model.state_dict()[name].view(-1)[-3:-2]
    entry += entry.abs().clamp_min(1e-3) / 16
    return model


@pytest.mark.parametrize("name", EVERY)
def test_any_tensor_of_the_base_model_tells(folder, name):
    with pytest.raises(CheckpointError, match=f"made for other weights: {name} differs"):
        load(nudged(tiny_flux(), name), folder)


def test_any_change_that_the_file_does_not_hold_is_not_saved(tmp_path):
    for name in EVERY[::3]:
        model = sparsify(tiny_flux(), Recipe.immediate(skip=["*.proj_mlp"]))
        layer, _, kind = name.rpartition(".")
        with pytest.raises(ValueError, match=rf"the {kind} of {layer} has changed .*save_pretrained"):
            save(nudged(model, name), tmp_path / "lynx")
    assert not list(tmp_path.iterdir())


def fuse(model, targets):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.fuse_lora()
    model.unload_lora()
    return model


def test_a_fused_adapter_is_saved_whole_or_refused(tmp_path):
    refitted = make(replace(RECIPES["refit"], grouping="adjacent"))
    names = [name for name, one in refitted.named_modules() if isinstance(one, nn.Linear)]
    sparse = [name for name in names if getattr(refitted.get_submodule(name), "refitted", False)]
    model = fuse(copy.deepcopy(refitted), sparse)
    save(model, tmp_path / "refitted")  # all that it changed is in the file
    again = load(tiny_flux(), tmp_path / "refitted")
    assert torch.equal(output(again, flux_call(9)), output(model, flux_call(9)))
    model = fuse(copy.deepcopy(refitted), names)
    with pytest.raises(ValueError, match=r"and \d+ more tensors have changed"):
        save(model, tmp_path / "lynx")
    model.save_pretrained(tmp_path / "whole")
    whole = FluxTransformer2DModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(output(whole, flux_call(9)), output(model, flux_call(9)))
    with pytest.raises(ValueError, match="changed since"):  # and it still knows
        save(whole, tmp_path / "lynx")


def test_an_adapter_beside_a_dense_layer_is_refused(tmp_path):
    model = sparsify(tiny_flux())
    model.add_adapter(LoraConfig(r=2, target_modules=["add_q_proj"]))
    for what in (lambda: save(model, tmp_path / "lynx"), lambda: model.save_pretrained(tmp_path / "model")):
        with pytest.raises(ValueError, match=rf"{TEXT}\..* detach adapters before saving"):
            what()


def test_what_came_in_later_is_refused(tmp_path):
    model = sparsify(tiny_flux())
    model.register_buffer("more", torch.ones(3))
    with pytest.raises(ValueError, match="the more of the model has changed"):
        save(model, tmp_path / "lynx")
    model = sparsify(tiny_flux())
    model.register_buffer("cache", torch.ones(3), persistent=False)
    save(model, tmp_path / "lynx")


def test_a_kept_original_counts_for_the_refitted_weight(tmp_path):
    model = make(RECIPES["refit, dense steps and rows"])
    with torch.no_grad():
        model.get_submodule(TO_Q).weight_dense[0].neg_()
    with pytest.raises(ValueError, match=f"the weight of {TO_Q} has changed"):
        save(model, tmp_path / "lynx")


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_are_the_same_base(tmp_path, first, then):
    save(sparsify(tiny_flux().to(first)), tmp_path / "lynx")
    load(tiny_flux().to(then), tmp_path / "lynx")
    save(sparsify(tiny_flux().to(first)).to(then), tmp_path / "cast")
    scaled = tiny_flux()
    with torch.no_grad():
        scaled.get_submodule(TEXT).weight.mul_(1.05)
    for other in (tiny_flux(seed=1), scaled):
        with pytest.raises(CheckpointError, match="made for other weights"):
            load(other.to(then), tmp_path / "lynx")


def test_offloaded_weights_are_not_saved(tmp_path):
    from accelerate import cpu_offload

    model = sparsify(tiny_flux())
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="remove the offloading"):
        save(model, tmp_path / "lynx")


@pytest.mark.parametrize("shape", [(1024, 1536), (512, 2048), (2048, 512), (256, 64, 3, 3), (80_000, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faint_adapter_and_a_negated_row_or_column_tell(shape, dtype):
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=gen).mul_(0.02).to(dtype)
    rows = weight.flatten(1)
    delta = torch.randn(shape[0], 4, generator=gen) @ torch.randn(4, rows.shape[1], generator=gen)
    faint = (rows.float() + delta * (2e-5 * rows.float().norm() / delta.norm())).to(dtype).view(shape)
    before = record(weight)
    assert same(before, record(weight.clone()))
    assert not same(before, record(faint))
    for at in range(0, shape[0], shape[0] // 8):
        changed = rows.clone()
        changed[at].neg_()
        assert not same(before, record(changed.view(shape))), at
    for at in range(0, rows.shape[1], max(1, rows.shape[1] // 8)):
        changed = rows.clone()
        changed[:, at].neg_()
        assert not same(before, record(changed.view(shape))), at


def test_records_of_a_large_model_take_little_time():
    model = nn.Sequential(*(nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(24)))  # 200 MB
    start = time.monotonic()
    model_fingerprint(model)
    assert time.monotonic() - start < 2  # (0.03 s on an idle machine)


def test_a_calibration_folder_belongs_to_the_whole_model(tmp_path):
    calls, recipe = [flux_call(0), flux_call(1)], Recipe(rank=None, ridge=0.1)
    options = CalibrationOptions(folder=tmp_path, heldout=0.0)
    calibrate(tiny_flux(), calls=calls, recipe=recipe, options=options, progress=False)
    changed = nudged(tiny_flux(), "x_embedder.weight")
    with pytest.raises(CheckpointError, match="with other model: choose"):
        calibrate(changed, calls=calls, recipe=recipe, options=options, progress=False)


def test_another_class_is_refused_before_its_weights(folder):
    with pytest.raises(CheckpointError, match="made for FluxTransformer2DModel"):
        load(tiny_qwen(), folder)


# -------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("through_file", [True, False])
def test_a_state_dict_goes_into_what_it_came_from(tmp_path, strict, through_file):
    refit, plain = make(Recipe(rank=None, ridge=0.1)), sparsify(tiny_flux())
    states = {one: one.state_dict() for one in (refit, plain)}
    if through_file:
        for number, (one, state) in enumerate(states.items()):
            torch.save(state, tmp_path / str(number))
            states[one] = torch.load(tmp_path / str(number), weights_only=True)
    for source, target, said in (
        (refit, plain, "is a refitted one"),
        (plain, refit, "is not a refitted one"),
    ):
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(RuntimeError, match=said):
            target.load_state_dict(states[source], strict=strict)
        layer = target.get_submodule(TO_Q)
        assert torch.equal(layer.weight, before[f"{TO_Q}.weight"])
        target.load_state_dict(states[target], strict=strict)
    plain.load_state_dict(tiny_flux().state_dict(), strict=strict)  # a dense one, which says nothing


def test_factors_are_not_dropped_where_keys_may_be():
    model, other = sparsify(tiny_flux()), make(RECIPES["refit and low-rank"])
    with pytest.raises(RuntimeError, match="comes with a lowrank_a, and the layer has none"):
        model.load_state_dict(dict(other.state_dict()), strict=False)  # without metadata
    dense = tiny_flux().state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in densify(model).state_dict().items())

"""`Recipe.rotate_values`: found in calibration, kept in files, and undone or refused elsewhere."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration_helpers import ALL_FIT, RIDGE, assert_same, calls, run, solution
from checkpoint_helpers import RECIPES, make
from diffusers import FluxTransformer2DModel
from helpers import flux_call, output, qwen_call, relative_error, tiny_flux, tiny_qwen, watched
from mutations import signed
from process_helpers import in_two_processes
from safetensors.torch import load_file, save_file

import rtlynx.calibration.reparameterize
from rtlynx import CalibrationOptions, CheckpointError, Recipe, densify, load, save
from rtlynx.cli.inspection import describe
from rtlynx.evaluate.layers import layer_errors
from rtlynx.models import sparse_layers, state_of
from rtlynx.models.sparsify import comparable

ROTATED = Recipe(rank=None, ridge=RIDGE, rotate_values=True)
IMMEDIATE = Recipe.immediate(rotate_values=True)
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
TEXT = (f"{DOUBLE}.add_v_proj", f"{DOUBLE}.to_add_out")


def matrices(model):
    return state_of(model).reparameterization.bases


def test_error_behind_attention_is_lower_than_with_neighbours():
    adjacent = Recipe(rank=None, ridge=RIDGE, grouping="adjacent")
    errors = [
        run(recipe=one, data=calls(8))[1].solutions
        for one in (adjacent, replace(adjacent, rotate_values=True))
    ]
    for name in (f"{DOUBLE}.to_out.0", "single_transformer_blocks.0.proj_out"):
        without, rotated = (one[name].error for one in errors)
        assert rotated < without, name


def flux_of_mean(mean):
    """With values in its first block that lie around `mean`."""
    model = tiny_flux()
    with torch.no_grad():
        for name in ("to_v", "add_v_proj"):
            model.get_submodule(f"{DOUBLE}.{name}").bias.add_(mean)
    return model


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_the_rotation_is_that_of_balanced_centred_outputs(mean):
    data, dense = calls(3), flux_of_mean(mean)
    model, report = run(flux_of_mean(mean), recipe=ROTATED, options=ALL_FIT, data=data)
    assert not report.unrotated
    with watched(dense, [f"{DOUBLE}.to_out.0", f"{DOUBLE}.to_add_out"]) as seen:
        for call in data:
            output(dense, call)
    kinds = [torch.cat([x.flatten(0, -2) for x, _ in one]).double().detach() for one in seen.values()]
    mean = sum(one.mean(0) for one in kinds) / 2
    squares = sum((one - mean).mT @ (one - mean) / (2 * len(one)) for one in kinds)
    readers = torch.cat([dense.get_submodule(name).weight.detach().double() for name in seen])
    for head, matrix in enumerate(matrices(model)[DOUBLE].double()):
        own = slice(32 * head, 32 * head + 32)
        energies = matrix.T @ squares[own, own] @ matrix
        assert relative_error(torch.diag(energies.diagonal()), energies) < 1e-5
        metric = torch.linalg.inv(matrix) @ readers[:, own].T @ readers[:, own] @ torch.linalg.inv(matrix).T
        assert relative_error(metric, torch.eye(32)) < 0.05
        quarters = energies.diagonal().reshape(8, 4).T.flatten()
        assert bool((quarters.diff() <= 1e-6 * quarters[0]).all())


def test_layers_are_compared_with_those_of_the_rotated_dense_model():
    data, dense = calls(8), tiny_flux()
    model, report = run(recipe=ROTATED, data=data)
    twin = comparable(dense, model)
    assert relative_error(output(twin, data[7]), output(dense, data[7])) < 1e-5
    found = layer_errors(twin, {"it": sparse_layers(model)}, data[7:])["it"]
    name = f"{DOUBLE}.to_out.0"  # of eight calls the last is held out
    y, bias = output_of(dense, name, data[7]), dense.get_submodule(name).bias
    expected = report.solutions[name].error * float((y - bias.detach()).square().sum() / y.square().sum())
    assert found[name] == pytest.approx(expected, rel=1e-3)
    assert comparable(dense, make(Recipe.immediate())) is dense


def output_of(model, name, call):
    with watched(model, [name]) as seen:
        output(model, call)
    return seen[name][0][1].detach()


@pytest.mark.parametrize("recipe", ["rotated values, dense steps and rows"])
def test_dense_steps_and_rows_run_on_rotated_originals(recipe):
    model, dense = make(RECIPES[recipe]), tiny_flux()
    first = flux_call(timestep=1.0)
    assert relative_error(output(model, first), output(dense, first)) < 1e-5
    assert (
        relative_error(output(model, flux_call(timestep=0.5)), output(dense, flux_call(timestep=0.5))) > 1e-3
    )


@pytest.mark.parametrize("recipe", ["rotated values, immediate", "rotated values, dense steps and rows"])
def test_densify_gives_the_original_weights_back(recipe):
    model = make(RECIPES[recipe])
    assert state_of(model).reparameterization.originals
    before, after = tiny_flux().state_dict(), densify(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("rtlynx_reparameterized" in vars(module) for module in model.modules())


@pytest.mark.parametrize("recipe", ["rotated values, immediate", "rotated values, dense steps and rows"])
def test_memory_of_kept_originals_is_as_announced(recipe):
    before, after = describe(tiny_flux(), RECIPES[recipe]), describe(make(RECIPES[recipe]))
    assert before["extra_bytes"] == after["extra_bytes"]
    assert after["extra_bytes"] >= sum(
        one.nbytes for one in state_of(make(RECIPES[recipe])).reparameterization.originals.values()
    )


def test_densify_without_the_originals_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="without keeping its original"):
        densify(run(recipe=ROTATED, data=calls(3))[0])
    make(IMMEDIATE).save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    before = output(loaded, flux_call())
    with pytest.raises(RuntimeError, match=r"were rotated .* without keeping the original"):
        densify(loaded)
    assert torch.equal(output(loaded, flux_call()), before)


def test_densify_after_training_is_refused():
    model = make(IMMEDIATE)
    with torch.no_grad():
        model.get_submodule(TEXT[0]).weight.add_(1)
    with pytest.raises(RuntimeError, match=r"add_v_proj.weight has changed since .* were rotated"):
        densify(model)


# ----------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("build", "call"), [(tiny_flux, flux_call), (tiny_qwen, qwen_call)])
def test_layers_that_stay_dense_are_rotated_after_a_load(tmp_path, build, call):
    model = make(ROTATED, build, call)
    save(model, tmp_path)
    loaded = load(build(), tmp_path)
    assert torch.equal(output(loaded, call(7)), output(model, call(7)))
    for name in TEXT:
        assert not torch.equal(loaded.get_submodule(name).weight, build().get_submodule(name).weight)
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)
    base = json.loads((tmp_path / "rtlynx.json").read_text())["base_tensors"]
    save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "rtlynx.json").read_text())["base_tensors"] == base


def test_a_checkpoint_goes_onto_the_unrotated_base_alone(tmp_path):
    model = make(ROTATED)
    save(model, tmp_path)
    other = tiny_flux()
    for name in TEXT:
        other.get_submodule(name).weight = model.get_submodule(name).weight
    with pytest.raises(CheckpointError, match="differs from its base model"):
        load(other, tmp_path)


def test_a_changed_rotated_layer_is_noticed_by_save(tmp_path):
    model = make(ROTATED)
    with torch.no_grad():
        model.get_submodule(TEXT[0]).weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"the weight of .*add_v_proj has changed since"):
        save(model, tmp_path)


def test_what_diffusers_loaded_is_saved_by_diffusers_alone(tmp_path):
    make(ROTATED).save_pretrained(tmp_path / "one")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="use save_pretrained"):
        save(loaded, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def change(folder, edit_index=None, edit_tensors=None):
    index, tensors = (
        json.loads((folder / "rtlynx.json").read_text()),
        load_file(folder / "rtlynx.safetensors"),
    )
    if edit_tensors is not None:
        edit_tensors(tensors)
        save_file(tensors, folder / "rtlynx.safetensors")
        digest = rtlynx.io.checkpoint.sha256_of(folder / "rtlynx.safetensors")
        index["tensors_sha256"] = digest
    if edit_index is not None:
        edit_index(index)
    (folder / "rtlynx.json").write_text(json.dumps(signed(index)))


KEY = f"{DOUBLE}.value_rotation"


@pytest.mark.parametrize(
    ("edit_index", "edit_tensors", "match"),
    [
        (lambda index: index["rotations"].update({DOUBLE: [4, 64]}), None, "another architecture"),
        (lambda index: index["rotations"].update({"proj_out": [4, 32]}), None, "another architecture"),
        (lambda index: index["rotations"].update({DOUBLE: [4, 1 << 40]}), None, "its heads and their width"),
        (lambda index: index["rotations"].pop(DOUBLE), None, "which rtlynx.json does not know"),
        (None, lambda tensors: tensors.pop(KEY), "lacks the tensor"),
        (None, lambda tensors: tensors[KEY].zero_(), "has no inverse"),
        (None, lambda tensors: tensors[KEY].fill_(math.nan), "of finite torch.float32 numbers"),
        (None, lambda tensors: tensors.update({KEY: tensors[KEY].half()}), "of finite torch.float32 numbers"),
        (None, lambda tensors: tensors.update({KEY: tensors[KEY][:2].clone()}), r"should be \(4, 32, 32\)"),
    ],
)
def test_damaged_rotations_are_refused(tmp_path, edit_index, edit_tensors, match):
    save(make(ROTATED), tmp_path)
    change(tmp_path, edit_index, edit_tensors)
    model = tiny_flux()
    with pytest.raises(CheckpointError, match=match):
        load(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_flux().parameters(), strict=True))


def test_a_processor_of_your_own_is_refused_by_load(tmp_path):
    save(make(ROTATED), tmp_path)
    model = tiny_flux()
    attn = model.transformer_blocks[0].attn
    attn.set_processor(type("Own", (type(attn.processor),), {})())
    with pytest.raises(
        CheckpointError, match=r"rotates values of transformer_blocks.0.attn, which cannot be"
    ):
        load(model, tmp_path)


def test_a_processor_that_is_set_later_is_refused_at_the_next_call():
    model = make(ROTATED)
    attn = model.transformer_blocks[0].attn
    usual = attn.processor
    attn.set_processor(type("Own", (type(usual),), {})())
    with pytest.raises(RuntimeError, match=r"attn are rotated .* its Own may add others"):
        output(model, flux_call())
    attn.set_processor(usual)
    assert torch.equal(output(model, flux_call()), output(make(ROTATED), flux_call()))


# ----------------------------------------------------------------------------- folders and processes


def test_a_resumed_calibration_takes_the_rotation_that_it_found(tmp_path, monkeypatch):
    options = CalibrationOptions(folder=tmp_path)
    first, _ = run(recipe=ROTATED, options=options)
    for path in tmp_path.glob("solution-*proj_out*"):
        path.unlink()

    def never(*_):
        raise AssertionError("the rotation was found before")

    monkeypatch.setattr(rtlynx.calibration.reparameterize, "_replay", never)
    again, _ = run(recipe=ROTATED, options=options)
    assert_same(solution(again), solution(first))
    assert all(torch.equal(matrices(again)[name], one) for name, one in matrices(first).items())


def test_an_interrupted_calibration_leaves_the_model_as_it_was(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    model = tiny_flux()
    monkeypatch.setattr(rtlynx.calibration.run, "solve_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, ROTATED)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_flux().parameters(), strict=True))
    assert not any("rtlynx_reparameterized" in vars(module) for module in model.modules())


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = CalibrationOptions(folder=Path(folder) / "work")
    model, _ = run(recipe=ROTATED, data=calls(6), options=options)
    save_file({**solution(model), **matrices(model)}, Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_find_one_rotation(tmp_path):
    in_two_processes(_one_of_two, str(tmp_path))
    ours, theirs = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert_same(ours, theirs)
    whole, _ = run(recipe=ROTATED, data=calls(6))
    for name, matrix in matrices(whole).items():  # (the signs of channels are free)
        assert relative_error(ours[name].double().abs(), matrix.abs()) < 1e-2, name


def test_sequential_calibration_rotates_first():
    model, report = run(recipe=ROTATED, options=replace(ALL_FIT, sequential=True), data=calls(3))
    assert not report.unrotated
    assert set(matrices(model)) == {DOUBLE, SINGLE}
    assert relative_error(output(model, flux_call()), output(tiny_flux(), flux_call())) < 0.5

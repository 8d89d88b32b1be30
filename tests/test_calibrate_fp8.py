"""Calibration of fp8 layers: on what the quantised product sees; what it reports is what the layer does."""

import pytest
import torch
from calibration_helpers import ALL_FIT, JOINT, RIDGE, SINGLE, assert_same, calls, layer_errors, run, solution
from formula_helpers import slow_mask
from helpers import output, tiny_flux, watched

from rtlynx import CalibrationOptions, Recipe, calibrate, sparsify
from rtlynx.math.fp8 import quantize_tokens, quantize_weight
from rtlynx.models import sparse_layers

FP8 = Recipe(rank=4, ridge=RIDGE, precision="fp8")
FP8_REFIT = Recipe(rank=None, ridge=RIDGE, precision="fp8")
FP8_PAPER = Recipe.paper(rank=4, ridge=RIDGE, precision="fp8", balance="tokens")


@pytest.mark.parametrize("recipe", [FP8, FP8_REFIT, FP8_PAPER, Recipe(precision="fp8")])
def test_error_on_unseen_calls_is_lower_than_without(recipe):
    reference, unseen = tiny_flux(), calls(3, first=100)
    plain = Recipe.immediate(norm=recipe.layer_norm, grouping=recipe.grouping, precision="fp8")
    model, report = run(recipe=recipe)
    before = layer_errors(sparsify(tiny_flux(), plain), reference, unseen)
    after = layer_errors(model, reference, unseen)
    assert set(after) == set(before) == set(report.solutions)
    assert {layer.precision for layer in sparse_layers(model).values()} == {"fp8"}
    for name in after:
        assert after[name] < before[name], name
    assert sum(after.values()) < (0.8 if recipe.refit else 0.97) * sum(before.values())


def test_reported_errors_are_those_of_the_held_out_calls():
    model, report = run(recipe=FP8)  # of eight calls the last is held out
    immediate = sparsify(tiny_flux(), Recipe.immediate(norm="none", precision="fp8"))
    before = layer_errors(immediate, tiny_flux(), [calls()[7]])
    after = layer_errors(model, tiny_flux(), [calls()[7]])
    for name, found in report.solutions.items():
        if not name.startswith(SINGLE):  # where text and image are balanced
            assert found.error_before == pytest.approx(before[name], rel=1e-3)
            assert found.error == pytest.approx(after[name], rel=1e-3)


def test_the_refit_is_least_squares_on_quantised_tokens():
    """From the definition, on stacked tokens; then quantised with scales chosen on the same tokens."""
    reference, data = tiny_flux(), calls(4)
    model, _ = run(recipe=FP8_REFIT, options=ALL_FIT, data=data)
    name = "transformer_blocks.0.attn.to_out.0"
    with watched(reference, [name]) as seen:
        for call in data:
            output(reference, call)
    layer, w = model.get_submodule(name), reference.get_submodule(name).weight.detach().double()
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in seen[name]])
    mask = slow_mask(x, grouping=layer.pattern.grouping, widths=layer.pattern.widths(x.shape[-1]))
    s = quantize_tokens(x, mask).dequantize().double() / len(x) ** 0.5
    x = x.double() / len(x) ** 0.5
    lam = RIDGE * s.square().sum(0).mean()
    eye = torch.eye(len(w), dtype=torch.float64) * lam.sqrt()
    refit = torch.linalg.lstsq(torch.cat((s, eye)), torch.cat((x @ w.T, eye @ w.T))).solution.T
    expected = quantize_weight(refit, s.T @ s)
    # Moments are summed in float32: a few entries round otherwise, and two scales may be equally good.
    alike = torch.isclose(layer.weight_scale, expected.scale, rtol=1e-3, atol=0)
    same = layer.weight.view(torch.uint8) == expected.values.view(torch.uint8)
    assert float(alike.double().mean()) > 0.97
    assert float(same[alike].double().mean()) > 0.995
    assert layer.refitted


def test_readers_of_one_tensor_in_different_forms_are_solved_apart():
    formats = {"*.attn.to_q": "bf16-sparse", "*.attn.to_k": "fp8-dense", "*.proj_mlp": "dense"}
    mixed, report = run(recipe=Recipe(rank=4, ridge=RIDGE, precision="fp8", formats=formats), data=calls(4))
    layers = sparse_layers(mixed)
    q, k, v = (layers[f"{SINGLE}.attn.to_{name}"] for name in "qkv")
    assert (q.precision, q.rank, q.refitted) == ("bf16", 4, True)
    assert (k.precision, k.rank, k.refitted, k.pattern.n == k.pattern.m) == ("fp8", 0, False, True)
    assert (v.precision, v.rank, v.refitted) == ("fp8", 4, True)
    assert report.dense[f"{SINGLE}.proj_mlp"] == "dense by 'formats'"
    # each as if the others were not there
    alone = sparse_layers(
        run(
            recipe=Recipe(rank=4, ridge=RIDGE, formats={f"{SINGLE}.attn.to_q": "bf16-sparse", "*": "dense"}),
            data=calls(4),
        )[0]
    )
    assert torch.equal(q.weight, alone[f"{SINGLE}.attn.to_q"].weight)
    searched = report.solutions[f"{SINGLE}.attn.to_k"]
    assert searched.error <= searched.error_before
    assert searched.error < 0.01 < report.solutions[f"{SINGLE}.attn.to_v"].error


def test_interrupted_and_resumed(tmp_path):
    options = CalibrationOptions(folder=tmp_path)
    first, report = run(recipe=FP8, options=options, data=calls(4))
    again, resumed = run(recipe=FP8, options=options, data=calls(4))
    ours, theirs = ({k: t.float() for k, t in solution(model).items()} for model in (first, again))
    assert_same(ours, theirs)
    for name, one in report.solutions.items():
        other = resumed.solutions[name]
        assert (one.error, one.ridge, one.refitted) == (other.error, other.ridge, other.refitted)


def test_sequential_mode_sees_the_quantised_blocks_before():
    reference, data = tiny_flux(), calls(4)
    model, _ = run(recipe=FP8_REFIT, options=CalibrationOptions(heldout=0.0, sequential=True), data=data)
    one_shot, _ = run(recipe=FP8_REFIT, options=ALL_FIT, data=data)
    ours, theirs = solution(model), solution(one_shot)
    first, last = "transformer_blocks.0.attn.to_q", f"{SINGLE}.attn.to_q"
    assert torch.equal(ours[f"{first}.weight_scale"], theirs[f"{first}.weight_scale"])
    assert not torch.equal(ours[f"{last}.weight_scale"], theirs[f"{last}.weight_scale"])
    assert output(model, data[0]).shape == output(reference, data[0]).shape
    assert all(layer.weight_dense is None for layer in sparse_layers(model).values())


def test_dense_rows_and_steps_keep_the_original_weight():
    recipe = Recipe(rank=4, ridge=RIDGE, precision="fp8", text_rows="dense", dense_steps=1)
    model, _ = run(recipe=recipe, data=calls(4))
    reference = tiny_flux()
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight_dense, reference.get_submodule(name).weight)
    first = calls(1)[0]
    torch.testing.assert_close(output(model, first), output(reference, first))


def test_a_quantised_model_is_calibrated_only_where_it_can_be_undone():
    model = sparsify(tiny_flux(), Recipe.immediate(precision="fp8"))
    with pytest.raises(RuntimeError, match="quantised without keeping its original weight"):
        calibrate(model, calls=calls(2), recipe=JOINT, progress=False)
    assert len(sparse_layers(model)) == 17

"""Calibration of layers that drop weights, and what becomes of them afterwards."""

import json

import pytest
import torch
from calibration_helpers import SINGLE, calls, layer_errors, run
from helpers import output, tiny_flux

import rtlynx
from rtlynx import Budget, CalibrationOptions, CheckpointError, Recipe
from rtlynx.calibration.prices import ModelPrices
from rtlynx.cli.inspection import describe
from rtlynx.io.checkpoint import signed
from rtlynx.math.fp8 import dequantize, is_two_of_four, quantize_tokens
from rtlynx.models import sparse_layers
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import extra_bytes

WEIGHTS = Recipe(rank=None, precision="fp8", drop="weights", intercept=True)
TO_OUT = "transformer_blocks.0.attn.to_out.0"
ADDED = "transformer_blocks.0.attn.to_add_out"  # of the text stream


def bits(layer):
    return layer.weight.view(torch.uint8)


def formats(model):
    return {name: layer.format.name for name, layer in sparse_layers(model).items()}


@pytest.fixture(scope="module")
def calibrated():
    return run(recipe=WEIGHTS)


def test_every_layer_of_pictures_drops_weights_and_keeps_inputs(calibrated):
    model, report = calibrated
    layers = sparse_layers(model)
    assert set(formats(model).values()) == {"fp8-weight-sparse", "fp8-dense"}
    assert layers[ADDED].format.name == "fp8-dense"
    for name, layer in layers.items():
        if layer.format.weight_sparse:
            assert is_two_of_four(layer.weight), name
            assert (layer.pattern.n, layer.pattern.m, layer.rank) == (1, 1, 0)
            assert layer.refitted
            assert report.solutions[name].error < report.solutions[name].error_before


def test_errors_are_those_of_the_held_out_call_and_below_those_of_dropped_activations():
    recipe = Recipe(rank=None, precision="fp8", drop="weights")
    model, report = run(recipe=recipe)
    after = layer_errors(model, tiny_flux(), [calls()[7]])
    for name, error in after.items():
        if not name.startswith(SINGLE):  # where text and image are balanced
            assert report.solutions[name].error == pytest.approx(error, rel=2e-3, abs=1e-5)
    unseen = calls(3, first=100)
    activations, _ = run(recipe=Recipe(rank=None, precision="fp8"))
    ours, theirs = (layer_errors(one, tiny_flux(), unseen) for one in (model, activations))
    assert sum(ours.values()) < sum(theirs.values())


def test_a_layer_computes_the_scaled_product_of_what_it_holds(calibrated):
    layer = calibrated[0].get_submodule(TO_OUT)
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    s = quantize_tokens(x).dequantize().double()
    expected = s @ dequantize(layer.weight, layer.weight_scale).double().T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_zeros_stay_zeros(calibrated, tmp_path):
    model, _ = calibrated
    rtlynx.save(model, tmp_path / "checkpoint")
    again = rtlynx.load(tiny_flux(), tmp_path / "checkpoint")
    assert formats(again) == formats(model)
    for name, layer in sparse_layers(again).items():
        assert torch.equal(bits(layer), bits(model.get_submodule(name)))
    call = calls(1, first=50)[0]
    torch.testing.assert_close(output(again, call), output(model, call), rtol=0, atol=0)
    assert extra_bytes(again) == extra_bytes(model)
    assert describe(model)["sparse_layers"] == sum(
        one == "fp8-weight-sparse" for one in formats(model).values()
    )


def test_a_weight_that_is_not_sparse_is_neither_saved_nor_loaded(calibrated, tmp_path):
    model = rtlynx.load(tiny_flux(), _saved(calibrated[0], tmp_path / "first"))
    layer = model.get_submodule(TO_OUT)
    state = layer.state_dict()
    full = torch.ones(layer.weight.shape).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="more than two nonzero entries among four neighbours"):
        layer.load_state_dict({**state, "weight": full})
    layer.load_state_dict(state)
    layer.weight = torch.nn.Parameter(full, requires_grad=False)
    with pytest.raises(ValueError, match="in a layer that drops weights"):
        rtlynx.save(model, tmp_path / "second")


def _saved(model, folder):
    rtlynx.save(model, folder)
    return folder


def test_an_index_that_contradicts_itself_is_damaged(calibrated, tmp_path):
    path = _saved(calibrated[0], tmp_path / "checkpoint") / "rtlynx.json"
    index = json.loads(path.read_text())
    del index["sha256"]
    index["layers"][TO_OUT]["refitted"] = index["layers"][TO_OUT]["intercept"] = False
    path.write_text(json.dumps(signed(index)))
    with pytest.raises(CheckpointError, match="a layer that drops weights is refitted"):
        rtlynx.load(tiny_flux(), tmp_path / "checkpoint")


def test_dense_steps_keep_the_original_weight_beside_and_it_becomes_dense_again():
    recipe = Recipe(rank=None, precision="fp8", drop="weights", intercept=True, dense_steps=1)
    model, _ = run(recipe=recipe, data=calls(4))
    reference, call = tiny_flux(), calls(1)[0]
    assert model.get_submodule(TO_OUT).format.weight_sparse
    torch.testing.assert_close(output(model, call), output(reference, call))
    rtlynx.densify(model)
    torch.testing.assert_close(output(model, call), output(reference, call), rtol=0, atol=0)


def test_readers_of_one_input_take_their_own_formats():
    chosen = {"*.attn.to_q": "fp8-weight-sparse", "*.attn.to_k": "fp8-dense"}
    model, report = run(recipe=Recipe(rank=None, precision="fp8", formats=chosen), data=calls(4))
    found = formats(model)
    q, k, v = (found[f"{SINGLE}.attn.to_{one}"] for one in "qkv")
    assert (q, k, v) == ("fp8-weight-sparse", "fp8-dense", "fp8-sparse")
    assert report.solutions[f"{SINGLE}.attn.to_q"].weight_sparse
    assert not report.solutions[f"{SINGLE}.attn.to_v"].weight_sparse


@pytest.mark.parametrize("drop", ["weights", "auto"])
def test_the_budget_chooses_among_what_may_be_dropped(drop, tmp_path):
    recipe = Recipe(rank=None, precision="auto", drop=drop, intercept=True, budget=Budget(speedup_share=0.9))
    options = CalibrationOptions(folder=tmp_path)
    model, report = run(recipe=recipe, options=options, data=calls(8))
    tried = {cost.format for cost in report.costs}
    assert tried == {"fp8-dense", "fp8-weight-sparse"} | ({"fp8-sparse"} if drop == "auto" else set())
    assert set(formats(model).values()) <= tried
    assert "fp8-weight-sparse" in formats(model).values()
    again, resumed = run(recipe=recipe, options=options, data=calls(8))
    assert formats(again) == formats(model)
    for name, layer in sparse_layers(again).items():
        assert torch.equal(bits(layer), bits(model.get_submodule(name)))
    assert {one.error for one in resumed.costs} == {one.error for one in report.costs}


def test_values_are_rotated_for_layers_that_drop_weights():
    recipe = Recipe(rank=None, precision="fp8", drop="weights", rotate_values=True, dense_steps=1)
    model, report = run(recipe=recipe, data=calls(4))
    assert model.get_submodule(TO_OUT).format.weight_sparse
    assert "transformer_blocks.0.attn" not in report.unrotated
    reference, call = tiny_flux(), calls(1)[0]
    torch.testing.assert_close(output(model, call), output(reference, call), rtol=1e-3, atol=1e-4)


def test_the_price_is_one_quantisation_and_the_sparse_product():
    """Of an input whose readers are dense fp8 or drop weights: it is quantised once for both."""
    names = [f"transformer_blocks.0.attn.to_{one}" for one in "qkv"]

    def us(*formats):
        plan = make_plan(tiny_flux(), WEIGHTS)
        layers = [plan.layer(name).in_format(one) for name, one in zip(names, formats, strict=True)]
        return ModelPrices(plan, dict.fromkeys(names, 4096)).us(layers)

    dense, weights = us(*["fp8-dense"] * 3), us(*["fp8-weight-sparse"] * 3)
    assert weights < dense
    assert us("fp8-weight-sparse", "fp8-dense", "fp8-dense") == pytest.approx((2 * dense + weights) / 3)

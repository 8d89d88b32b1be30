"""`Recipe.intercept`: the bias is refitted with the weight, kept with it, and never mistaken for another."""

from dataclasses import replace

import pytest
import torch
from calibration_helpers import ALL_FIT, RIDGE, calls, layer_errors, run
from checkpoint_helpers import make
from helpers import flux_call, output, relative_error, tiny_flux, tiny_z_image, watched, z_image_call

from rtlynx import CalibrationOptions, Recipe, densify, load, save, schedule
from rtlynx.cli.inspection import describe
from rtlynx.models import sparse_layers

WITH = Recipe(rank=None, ridge=RIDGE, intercept=True)
WITHOUT = Recipe(rank=None, ridge=RIDGE)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("rank", [None, 4])
def test_no_mean_error_is_left_on_the_tokens_that_were_seen(rank, precision):
    recipe = Recipe(rank=rank, ridge=RIDGE, intercept=True, precision=precision, balance="tokens")
    data, reference = calls(3), tiny_flux()
    model, _ = run(recipe=recipe, options=ALL_FIT, data=data)
    layers = {name: one for name, one in sparse_layers(model).items() if one.refitted}
    with watched(reference, layers) as seen:
        for call in data:
            output(reference, call)
    for name, layer in layers.items():
        missed = torch.cat([(layer(x) - y).detach().flatten(0, -2) for x, y in seen[name]])
        assert missed.mean(0).norm() < 1e-4 * missed.norm(dim=1).mean(), name


def test_layers_without_a_bias_get_one_and_others_another():
    model = make(Recipe(rank=None, ridge=RIDGE, intercept=True), tiny_z_image, z_image_call)
    dense = tiny_z_image()
    for name, layer in sparse_layers(model).items():
        assert layer.intercept
        assert dense.get_submodule(name).bias is None
        assert bool(layer.bias.any())
    call = z_image_call(5)
    plain = make(WITHOUT, tiny_z_image, z_image_call)
    ours, theirs = (relative_error(output(one, call), output(dense, call)) for one in (model, plain))
    assert ours != theirs


def test_layer_errors_are_lower_than_without():
    # With a weak ridge: a strong one leaves more to be fitted by the mean, with an intercept or without.
    data, reference = calls(3), tiny_flux()
    recipes = [replace(recipe, balance="tokens", ridge=1e-3) for recipe in (WITH, WITHOUT)]
    ours, theirs = (
        layer_errors(run(recipe=one, options=ALL_FIT, data=data)[0], reference, data) for one in recipes
    )
    assert all(ours[name] < theirs[name] for name in theirs if theirs[name] > 1e-5)


def test_sequential_calibration_gives_the_dense_bias_back_in_between():
    data = calls(4)
    sequential = CalibrationOptions(heldout=0.0, sequential=True)
    model, _ = run(recipe=WITH, options=sequential, data=data)
    first = "transformer_blocks.0.attn.to_q"
    again, _ = run(recipe=WITH, options=ALL_FIT, data=data)
    # The first block has no sparse block before it.
    for kind in ("weight", "bias"):
        assert torch.equal(*(getattr(one.get_submodule(first), kind) for one in (model, again)))
    later = "single_transformer_blocks.0.attn.to_q"
    assert not torch.equal(model.get_submodule(later).bias, again.get_submodule(later).bias)


def test_nothing_brings_the_original_bias_back():
    model, _ = run(recipe=WITH, data=calls(2))
    with pytest.raises(RuntimeError, match="refitted without keeping"):
        densify(model)


def test_a_state_dict_with_a_bias_is_refused_by_a_layer_without_one():
    model = make(WITH, tiny_z_image, z_image_call)
    other = make(WITHOUT, tiny_z_image, z_image_call)
    with pytest.raises(RuntimeError, match="comes with a bias, and the layer has none"):
        other.load_state_dict(model.state_dict(), strict=False)


KEPT = replace(WITH, dense_steps=1)


@pytest.mark.parametrize(
    ("build", "call"), [(tiny_flux, flux_call), (tiny_z_image, z_image_call)], ids=["biases", "no biases"]
)
def test_dense_steps_have_the_original_bias(build, call):
    model, dense = make(KEPT, build, call), build()
    first = 0.0 if build is tiny_z_image else 1.0
    with schedule([first, 0.5]):
        assert relative_error(output(model, call(timestep=first)), output(dense, call(timestep=first))) < 1e-6
        assert relative_error(output(model, call(timestep=0.5)), output(dense, call(timestep=0.5))) > 1e-3
    assert describe(dense, KEPT)["extra_bytes"] == describe(model)["extra_bytes"]
    after, before = densify(model).state_dict(), dense.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("build", "call"), [(tiny_flux, flux_call), (lambda: tiny_z_image(dim=128), z_image_call)]
)
def test_kept_biases_survive_files(tmp_path, build, call):
    model = make(KEPT, build, call)
    save(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for other in (load(build(), tmp_path / "one"), type(model).from_pretrained(tmp_path / "two")):
        found, expected = other.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        after, before = densify(other).state_dict(), build().state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_dense_last_steps_are_those_of_a_model_without_an_intercept(precision):
    ours = Recipe(rank=None, ridge=RIDGE, intercept=True, dense_last_steps=1, dense_precision=precision)
    models = [make(one) for one in (ours, replace(ours, intercept=False))]
    with schedule([1.0, 0.5]):
        first, last = ([output(one, flux_call(timestep=t)) for one in models] for t in (1.0, 0.5))
    assert torch.equal(*last)
    assert not torch.equal(*first)

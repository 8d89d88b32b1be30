"""The shipped solutions: what they say they are, and one block of them solved again from scratch."""

import copy
from dataclasses import replace

import pytest
import rtlynx_zoo as zoo
import torch
from helpers import relative_error
from rtlynx_zoo.prompts import ASSETS, calibration_prompts, evaluation_prompts

import rtlynx
from rtlynx.evaluate.layers import layer_errors
from rtlynx.evaluate.sampling import sample_and_record
from rtlynx.evaluate.variants import CALIBRATED
from rtlynx.io.checkpoint import read_index
from rtlynx.models import sparse_layers
from rtlynx.models.sparsify import comparable

BRANCHED = ("paper", "refit")  # a low-rank branch in every layer of the image
BLOCK = "transformer_blocks.1."
OTHERS = ("transformer_blocks.[02].*", "single_transformer_blocks.*")


@pytest.fixture(scope="module")
def dense():
    return zoo.load()


@pytest.fixture(scope="module")
def unseen(dense):
    """Calls of the dense model for prompts that nothing was calibrated on."""
    return sample_and_record(dense, evaluation_prompts(2), steps=4, batch_size=2)[1]


@pytest.fixture(scope="module")
def recorded(dense):
    """A few of the calls that the shipped solutions were calibrated on, or would have been."""
    return sample_and_record(dense, calibration_prompts(16), steps=3, recorded=2, batch_size=4)[1]


def variant(dense, make):
    model = copy.deepcopy(dense.transformer)
    make(model)
    return {name: layer for name, layer in sparse_layers(model).items() if name.startswith(BLOCK)}


@pytest.mark.parametrize("name", CALIBRATED)
def test_they_hold_the_demo_s_recipes(name):
    found = rtlynx.Recipe.from_dict(read_index(ASSETS / "solutions" / name)["recipe"])
    recipe = CALIBRATED[name]
    if recipe.chooses_dense_steps:
        assert found.budget.speedup_share > recipe.budget.speedup_share  # of the steps that stay sparse
        assert found.dense_sigmas
        recipe = replace(recipe, dense_sigmas=found.dense_sigmas, budget=found.budget)
    assert found == recipe


@pytest.mark.parametrize("name", BRANCHED)
def test_each_layer_has_its_branch(name):
    index = read_index(ASSETS / "solutions" / name)
    assert len(index["layers"]) == 48
    assert all(layer["refitted"] == (name == "refit") for layer in index["layers"].values())
    ranks = {layer["in_features"]: layer["rank"] for layer in index["layers"].values()}
    assert ranks == {256: 5, 1024: 20, 1280: 26}  # 2 % of the inputs, at least 4


def test_the_recommended_one_has_layers_in_eight_bits_with_and_without_selection(dense):
    model = copy.deepcopy(dense.transformer)
    rtlynx.load(model, ASSETS / "solutions" / "recommended")
    layers = sparse_layers(model)
    assert {layer.precision for layer in layers.values()} == {"fp8"}
    assert {layer.rank for layer in layers.values()} == {0}
    sparse = {
        name
        for name, layer in layers.items()
        if layer.pattern.n < layer.pattern.m or layer.format.weight_sparse
    }
    assert 0 < len(sparse) < len(layers)
    assert not any("context" in name or "add_" in name for name in sparse)  # the text stream drops nothing
    assert {name for name, layer in layers.items() if layer.refitted} == sparse
    rotated = comparable(dense.transformer, model)
    for name in layers.keys() - sparse:
        original, layer = rotated.get_submodule(name).weight, layers[name]
        quantised = layer.weight.float() * layer.weight_scale.unsqueeze(1)
        assert relative_error(quantised, original) < 0.05, name  # e4m3 has three bits after the first


def errors_of(dense, layers, calls):
    """Mean error of the layers of each of `layers`."""
    found = layer_errors(dense.transformer, layers, calls)
    return {kind: sum(errors.values()) / len(errors) for kind, errors in found.items()}


def uncompensated_and_shipped(dense, name):
    recipe = CALIBRATED[name]
    plain = rtlynx.Recipe.immediate(norm=recipe.layer_norm, grouping=recipe.grouping, skip=OTHERS)
    return {
        "uncompensated": variant(dense, lambda model: rtlynx.sparsify(model, plain)),
        "shipped": variant(dense, lambda model: rtlynx.load(model, ASSETS / "solutions" / name)),
    }


@pytest.mark.parametrize("name", BRANCHED)
def test_they_are_better_than_no_compensation(dense, unseen, name):
    errors = errors_of(dense, uncompensated_and_shipped(dense, name), unseen)
    assert errors["shipped"] < 0.95 * errors["uncompensated"]


def test_a_block_solved_again_from_few_prompts_comes_close(dense, unseen, recorded):
    recipe = rtlynx.Recipe.from_dict({**CALIBRATED["refit"].to_dict(), "skip": OTHERS})
    layers = uncompensated_and_shipped(dense, "refit")
    layers["again"] = variant(
        dense, lambda model: rtlynx.calibrate(model, recipe=recipe, calls=recorded, progress=False)
    )
    errors = errors_of(dense, layers, unseen)
    assert errors["again"] < 0.95 * errors["uncompensated"]
    # Hundreds of prompts do better than two dozen, but not by much: it is the same solution.
    assert errors["shipped"] < 1.02 * errors["again"]
    assert errors["again"] < 1.5 * errors["shipped"]
    for layer, shipped in layers["shipped"].items():
        original = dense.transformer.get_submodule(layer).weight.detach()
        moved = (shipped.weight.detach() - original).flatten()
        again = (layers["again"][layer].weight.detach() - original).flatten()
        assert float(torch.cosine_similarity(moved, again, dim=0)) > 0.5, layer

"""Forms of a layer: what a recipe asks for is what the model gets, at once and without calibration."""

import json

import pytest
import torch
from helpers import flux_call, output, relative_error, tiny_flux

from rtlynx import Budget, Recipe, SparseLinear, densify, sparsify
from rtlynx.cli.inspection import describe
from rtlynx.math.fp8 import quantize_weight
from rtlynx.models import sparse_layers
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import extra_bytes

DOUBLE = "transformer_blocks.0."
FP8 = Recipe.immediate(precision="fp8")
MIXED = {"*.attn.to_q": "fp8-sparse", "*.attn.to_k": "fp8-dense", "*.attn.to_v": "dense"}


def formats(recipe, model=None):
    return {layer.name: layer.format.name for layer in make_plan(model or tiny_flux(), recipe).layers}


def test_precision_is_that_of_the_sparse_layers():
    before, after = formats(Recipe.immediate()), formats(FP8)
    assert set(before.values()) == {"bf16-sparse", "dense"}
    eight_bits = {"bf16-sparse": "fp8-sparse", "dense": "fp8-dense"}
    assert after == {name: eight_bits[format] for name, format in before.items()}


def test_the_text_stream_keeps_its_dtype_where_a_form_or_the_budget_says_so():
    text = f"{DOUBLE}ff_context.net.2"
    assert formats(FP8)[text] == "fp8-dense"
    assert formats(Recipe.immediate(precision="fp8", formats={text: "dense"}))[text] == "dense"
    assert formats(Recipe.immediate(precision="fp8", skip=(text,)))[text] == "dense"
    assert formats(Recipe.immediate(precision="fp8", text_stream="sparse"))[text] == "fp8-sparse"
    auto = Recipe(precision="auto", budget=Budget(error=0.1))
    assert [
        layer.format.name for layer in make_plan(tiny_flux(), auto).alternatives() if layer.name == text
    ] == [
        "fp8-dense"  # or dense, as the budget has it
    ]


def test_forms_fix_layers_by_hand():
    plain, mixed = formats(Recipe.immediate()), formats(Recipe.immediate(formats=MIXED))
    expected = {"to_q": "fp8-sparse", "to_k": "fp8-dense", "to_v": "dense"}
    for name, format in mixed.items():
        role = name.rpartition(".")[2]
        assert format == (expected[role] if ".attn." in name and role in expected else plain[name]), name
    assert list(mixed.values()).count("fp8-dense") == 2


def test_a_form_by_hand_counts_more_than_the_text_stream_and_less_than_skip():
    name = f"{DOUBLE}ff_context.net.2"
    assert formats(Recipe.immediate())[name] == "dense"
    assert formats(Recipe.immediate(formats={name: "fp8-dense"}))[name] == "fp8-dense"
    assert formats(Recipe.immediate(formats={name: "fp8-dense"}, skip=(name,)))[name] == "dense"


def test_a_form_for_no_layer_is_refused():
    model = tiny_flux()
    with pytest.raises(ValueError, match=r"formats pattern '\*\.to_z' matches no layer"):
        sparsify(model, Recipe.immediate(formats={"*.to_z": "dense"}))
    assert not sparse_layers(model)


@pytest.mark.parametrize("norm", ["none", "scale"])
def test_immediate_fp8_quantises_by_plain_scales(norm):
    model = sparsify(tiny_flux(), Recipe.immediate(precision="fp8", norm=norm))
    layers = sparse_layers(model)
    assert len(layers) == 17
    for name, layer in layers.items():
        expected = norm if layer.pattern.n < layer.pattern.m else "none"
        assert (layer.precision, layer.norm, layer.refitted, layer.rank) == ("fp8", expected, False, 0)
        expected = quantize_weight(tiny_flux().get_submodule(name).weight)
        assert torch.equal(layer.weight.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(layer.weight_scale, expected.scale)


def test_dense_fp8_is_closer_to_the_model_than_sparse_fp8():
    reference, call = tiny_flux(), flux_call(3)
    errors = {
        name: relative_error(output(sparsify(tiny_flux(), recipe), call), output(reference, call))
        for name, recipe in {
            "dense": Recipe.immediate(formats={"*": "fp8-dense"}),
            "sparse": FP8,
            "bf16": Recipe.immediate(),
        }.items()
    }
    assert 1e-4 < errors["dense"] < 0.5 * errors["sparse"]
    assert 0.9 < errors["sparse"] / errors["bf16"] < 1.3  # eight bits cost little beside 2:4


def test_a_model_cast_afterwards_draws_the_same():
    call = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in flux_call(3).items()}
    before = sparsify(tiny_flux().to(torch.bfloat16), FP8)
    after = sparsify(tiny_flux(), FP8).to(torch.bfloat16)
    # the weights were quantised from bfloat16 in one and from float32 in the other
    assert relative_error(output(after, call), output(before, call)) < 0.03


def test_fp8_is_undone_where_the_original_weights_are_kept():
    model = sparsify(tiny_flux(), FP8)
    with pytest.raises(RuntimeError, match="quantised without keeping its original weight"):
        densify(model)
    assert len(sparse_layers(model)) == 17
    kept = densify(sparsify(tiny_flux(), Recipe.immediate(precision="fp8", dense_steps=1)))
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), tiny_flux().parameters(), strict=True))


def test_dense_steps_and_text_rows_are_exact():
    recipe = Recipe.immediate(precision="fp8", dense_steps=1, text_rows="dense")
    model, call = sparsify(tiny_flux(), recipe), flux_call(3, timestep=1.0)
    torch.testing.assert_close(output(model, call), output(tiny_flux(), call))


def test_a_weight_that_cannot_be_quantised_leaves_the_model_as_it_was():
    model = tiny_flux()
    name = "single_transformer_blocks.0.proj_out"
    with torch.no_grad():
        model.get_submodule(name).weight[5, 3] = float("inf")
    with pytest.raises(ValueError, match=rf"{name}: the weight of output channel 5 holds NaN or Inf"):
        sparsify(model, FP8)
    assert not sparse_layers(model)
    assert model.get_submodule(name).weight.dtype == torch.float32


@pytest.mark.parametrize(
    "recipe",
    [
        FP8,
        Recipe.immediate(formats=MIXED),
        Recipe.immediate(precision="fp8", dense_steps=1),
        Recipe.immediate(formats=MIXED, dense_last_steps=1, dense_precision="fp8"),
    ],
    ids=["fp8", "mixed", "kept", "kept in fp8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_as_announced(recipe, dtype):
    announced = describe(tiny_flux().to(dtype), recipe)
    assert json.loads(json.dumps(announced)) == announced
    model = sparsify(tiny_flux().to(dtype), recipe)

    def size(model):
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    added = size(model) - size(tiny_flux().to(dtype))
    assert extra_bytes(model) == announced["extra_bytes"] == added


def test_inspect_tells_the_form_before_and_after():
    recipe = Recipe.immediate(formats=MIXED)
    before, after = describe(tiny_flux(), recipe), describe(sparsify(tiny_flux(), recipe))
    assert before["layers"] == after["layers"]
    assert {layer["name"]: layer["format"] for layer in before["layers"]} == formats(recipe)
    layer = sparsify(tiny_flux(), recipe).get_submodule(f"{DOUBLE}attn.to_k")
    assert isinstance(layer, SparseLinear)
    assert "fp8, 1:1" in repr(layer)

"""Trainable layers and paired calls, the parts of distillation, against work by hand."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from formula_helpers import slow_mask
from guidance_helpers import FLUX, doubled, two_passes
from helpers import IMAGE_TOKENS, flux_call, relative_error, tiny_flux, tiny_z_image, z_image_call
from pipeline_helpers import TinyPipeline
from torch import nn

from rtlynx import CalibrationError, Distillation, Recipe, SparseLinear
from rtlynx.calibration.pairs import Pictures, Row, check_apart, null_first, outputs, states_of, turned
from rtlynx.calibration.trainable import BYTES_TRAINED, Mode, TrainableLinear, trained_bytes
from rtlynx.math.fp8 import quantize_tokens, quantize_weight
from rtlynx.models.pipelines import guidance_scale
from rtlynx.models.plan import architecture_of, make_plan
from rtlynx.nn.solution import Solution

CPU = torch.device("cpu")
NAME = "single_transformer_blocks.0.proj_mlp"
RECIPES = {
    "fp8": Recipe(rank=None, precision="fp8"),
    "refit": Recipe(rank=None),
    "branch": Recipe(rank=4),
    "norm": Recipe(rank=4, refit=False),
    "fp8 norm": Recipe(rank=4, refit=False, precision="fp8"),
    "strided": Recipe(rank=None, grouping="strided"),
    "fp8 weights": Recipe(rank=None, precision="fp8", drop="weights"),
}


def trainable(recipe, *, rank=None, mode=None):
    """The trainable layer, its plan, and 40 tokens."""
    model = tiny_flux()
    plan = next(layer for layer in make_plan(model, recipe).sparse if layer.name == NAME)
    dense = model.get_submodule(NAME).requires_grad_(False)
    torch.manual_seed(3)
    weight = dense.weight + 0.01 * torch.randn_like(dense.weight)
    if plan.weight_sparse:
        weight = weight * slow_mask(weight)
    parts = {"bias": dense.bias + 0.1}
    if plan.quantized:
        parts |= {"weight": quantize_weight(weight)[0], "weight_scale": quantize_weight(weight)[1]}
    elif recipe.refit:
        parts["weight"] = weight
    if plan.rank:
        factors = torch.randn(4, dense.in_features), torch.randn(dense.out_features, 4)
        parts |= dict(zip(("lowrank_a", "lowrank_b"), factors, strict=True))
    layer = TrainableLinear(dense, plan, recipe, Solution(**parts), mode or Mode(), rank=rank)
    return layer, plan, torch.randn(2, 20, dense.in_features)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_computes_what_the_layer_with_its_solution_does(recipe):
    layer, plan, x = trainable(RECIPES[recipe])
    with torch.no_grad():
        layer.master.mul_(1.1)
        layer.master_bias.add_(0.3)
        found = layer(x)
    sparse = SparseLinear.from_linear(tiny_flux().get_submodule(NAME), pattern=plan.pattern, norm=plan.norm)
    layer.distilled().install(sparse, keep_dense=False)
    with torch.no_grad():
        assert relative_error(found, sparse(x)) < 1e-5
        assert relative_error(found, nn.Linear.forward(layer, x)) > 0.01
    assert sparse.refitted
    assert sparse.weight.dtype is (torch.float8_e4m3fn if "fp8" in recipe else torch.float32)


def test_stored_values_are_those_of_the_quantised_master():
    layer, _, _ = trainable(RECIPES["fp8"])
    with torch.no_grad():
        layer.master.mul_(torch.linspace(0.5, 2, len(layer.master)).unsqueeze(-1))
    values, scale = quantize_weight(layer.master)
    solution = layer.distilled()
    assert torch.equal(solution.weight.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(solution.weight_scale, scale)
    assert torch.equal(solution.bias, layer.master_bias)


@pytest.mark.parametrize("recipe", ["fp8", "refit", "strided"])
def test_gradients_are_those_of_the_product_with_mask_and_rounding_fixed(recipe):
    layer, plan, x = trainable(RECIPES[recipe])
    upstream = torch.randn(2, 20, layer.out_features)
    x.requires_grad_()
    layer(x).backward(upstream)

    mask = slow_mask(x, grouping=plan.pattern.grouping, widths=plan.pattern.widths(x.shape[-1]))
    seen, weight = (x.detach() * mask).double(), layer.master.detach().double()
    if plan.quantized:
        seen = quantize_tokens(seen.float()).dequantize().double()
        weight = quantize_weight(weight.float()).dequantize().double()
    flat = upstream.double().flatten(0, 1)
    assert relative_error(layer.master.grad, flat.T @ seen.flatten(0, 1)) < 1e-5
    assert relative_error(layer.master_bias.grad, flat.sum(0)) < 1e-5
    assert relative_error(x.grad, (upstream.double() @ weight) * mask) < 1e-5
    assert layer.weight.grad is None


def test_of_dropped_weights_only_the_kept_ones_are_trained():
    layer, plan, x = trainable(RECIPES["fp8 weights"])
    kept = layer.distilled().weight.float() != 0
    assert 0.45 < float(kept.float().mean()) <= 0.5
    upstream = torch.randn(2, 20, layer.out_features)
    layer(x).backward(upstream)
    seen = quantize_tokens(x).dequantize().double().flatten(0, 1)
    assert relative_error(layer.master.grad, (upstream.double().flatten(0, 1).T @ seen) * kept) < 1e-5
    with torch.no_grad():
        layer.master.add_(0.05)
    assert torch.equal(layer.distilled().weight.float() != 0, kept)
    assert trained_bytes([plan], Distillation()) == (BYTES_TRAINED + 2) * layer.master.numel()
    corrected, _, _ = trainable(RECIPES["fp8 weights"], rank=2)
    with torch.no_grad():
        corrected.up.normal_()
    assert torch.equal(corrected.distilled().weight.float() != 0, kept)


def test_gradient_is_the_slope_where_nothing_is_rounded():
    layer, _, x = trainable(RECIPES["norm"])
    upstream = torch.randn(2, 20, layer.out_features)
    layer(x).backward(upstream)
    direction, step = torch.randn_like(layer.master), 1e-2
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            layer.master.add_(direction, alpha=sign * step)
            ends.append(float((layer(x) * upstream).double().sum()))
            layer.master.add_(direction, alpha=-sign * step)
    slope = float((layer.master.grad * direction).double().sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)


def test_a_correction_of_low_rank_starts_at_the_solution_and_is_merged():
    layer, plan, x = trainable(RECIPES["refit"], rank=2)
    whole, _, _ = trainable(RECIPES["refit"])
    with torch.no_grad():
        assert torch.equal(layer(x), whole(x))
        layer.up.normal_()
    change = layer.distilled().weight - layer.solution.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    trained = sum(one.numel() for one in (layer.up, layer.down))
    numbers = whole.master.numel()
    again, kept = Distillation(rank=2, gradient_checkpointing=True), Distillation(rank=2)
    assert trained_bytes([plan], again) == BYTES_TRAINED * trained
    assert trained_bytes([plan], kept) == BYTES_TRAINED * trained + 2 * numbers  # as multiplied, in bf16
    assert trained_bytes([plan], Distillation()) == (BYTES_TRAINED + 2) * numbers


def test_a_layer_that_drops_nothing_is_not_trained_but_hands_gradients_on():
    recipe = Recipe(rank=None, formats={NAME: "fp8-dense"})
    layer, plan, x = trainable(recipe)
    assert plan.keeps_all
    assert not any(one.requires_grad for one in layer.parameters())
    layer(x.requires_grad_()).sum().backward()
    weight = quantize_weight(layer.solution.weight.float() * layer.solution.weight_scale[:, None])
    assert relative_error(x.grad, weight.dequantize().sum(0).expand_as(x)) < 1e-5
    assert layer.distilled() is layer.solution
    assert trained_bytes([plan], Distillation()) == 0


def test_as_the_teacher_it_is_the_dense_layer():
    mode = Mode(dense=True)
    layer, _, x = trainable(RECIPES["fp8"], mode=mode)
    assert torch.equal(layer(x), tiny_flux().get_submodule(NAME)(x))


# ----------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("in_one_call", [False, True])
@pytest.mark.parametrize("null_comes_first", [False, True])
def test_guidance_passes_are_paired_and_the_null_one_is_found(in_one_call, null_comes_first):
    calls = []
    for seed in (0, 1):
        pair = two_passes(seed, timestep=1 - seed / 4)
        pair = pair[::-1] if null_comes_first else pair
        calls += [doubled(*pair)] if in_one_call else pair
    states = states_of(calls, FLUX)
    assert null_first(states, FLUX) is null_comes_first
    states = turned(states) if null_comes_first else states
    assert len(states) == 4
    for number, state in enumerate(states):
        expected, i = flux_call(number // 2, 2), number % 2
        assert torch.equal(state.conditional.argument("hidden_states"), expected["hidden_states"][i])
        assert torch.equal(state.null.argument("hidden_states"), expected["hidden_states"][i])
        texts = [row.argument("encoder_hidden_states") for row in (state.conditional, state.null)]
        assert torch.equal(texts[0], expected["encoder_hidden_states"][i])
        assert not texts[1].any()


def test_calls_at_other_states_or_timesteps_are_no_pair():
    first, other = flux_call(0, 2), flux_call(1, 2)
    later = {**first, "timestep": torch.full((2,), 0.25)}
    for calls in ([first, other], [first, later], [first]):
        states = states_of(calls, FLUX)
        assert len(states) == 2 * len(calls)
        assert all(state.null is None for state in states)


def test_pictures_of_several_calls_run_in_one_and_in_order():
    model, calls = tiny_flux(), [flux_call(0, 3, 1.0), flux_call(1, 2, 0.5)]
    calls.append({**flux_call(2, 8, 0.25), "img_ids": torch.ones(IMAGE_TOKENS, 3)})  # of another kind
    rows = [Row(Pictures(calls[i]), j) for i, j in ((0, 2), (2, 7), (1, 0), (0, 0))]
    made = []
    model.register_forward_pre_hook(lambda _m, _a, kw: made.append(len(kw["timestep"])), with_kwargs=True)
    with torch.no_grad():
        found = outputs(model, rows, CPU)
        for row, y in zip(rows, found, strict=True):
            whole = model(**row.pictures.call, return_dict=False)[0]
            assert relative_error(y, whole[row.index]) < 1e-5
    assert made[:2] == [3, 1]


def test_lists_of_pictures_are_taken_apart():
    model, calls = tiny_z_image(), [z_image_call(i, timestep=i / 4, batch=2) for i in range(2)]
    states = states_of(calls, architecture_of(model))
    assert len(states) == 4
    check_apart(model, states, CPU)
    with torch.no_grad():
        found = outputs(model, [states[3].conditional, states[0].conditional], CPU)
        assert relative_error(found[0], model(**calls[1], return_dict=False)[0][1]) < 1e-5


def test_calls_that_cannot_be_taken_apart_are_refused():
    class Mixing(type(tiny_flux())):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states + hidden_states.mean(0), **kwargs)

    class Whole(type(tiny_flux())):
        def forward(self, hidden_states, **kwargs):
            if len(hidden_states) != 3:
                raise ValueError("three pictures, please")
            return super().forward(hidden_states, **kwargs)

    for kind, said in ((Mixing, "an output .*% away"), (Whole, "three pictures, please")):
        model = tiny_flux()
        model.__class__ = kind
        states = states_of([flux_call(0, 3)], FLUX)
        with pytest.raises(CalibrationError, match=rf"{said}.*batch_size=1"):
            check_apart(model, states, CPU)


# -------------------------------------------------------------------------------------------- guidance


class ZImagePipeline:
    def __call__(self, prompt, guidance_scale=5.0): ...


class TrueCfg:
    def __call__(self, prompt, true_cfg_scale=4.0, guidance_scale=None): ...


class Silent:
    def __call__(self, prompt): ...


def test_the_scale_is_that_of_the_pipelines_own_formula():
    assert guidance_scale(TinyPipeline(None), {}) == 1.0
    assert guidance_scale(TinyPipeline(None), {"guidance_scale": 3}) == 3.0
    assert guidance_scale(TrueCfg(), {"guidance_scale": 2.0}) == 4.0
    assert guidance_scale(ZImagePipeline(), {}) == 6.0  # conditional + 5 (conditional - null)
    with pytest.raises(ValueError, match="Silent does not say"):
        guidance_scale(Silent(), {})


def test_pipelines_that_guide_beyond_the_conditional_prediction_are_known():
    formula = re.compile(r"= (\w*(?:pos|pred)\w*) \+ \S*guidance_scale \* \(\1 -")
    folder, seen = Path(diffusers.__file__).parent / "pipelines", 0
    for name in dir(diffusers):
        pipeline = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if pipeline is None or "transformer" not in inspect.signature(pipeline.__init__).parameters:
            continue
        source = Path(inspect.getsourcefile(pipeline))
        assert folder in source.parents
        beyond = formula.search(source.read_text()) is not None
        scale = guidance_scale(type(name, (), {"__call__": TinyPipeline.__call__})(), {"guidance_scale": 3.0})
        assert scale == (4.0 if beyond else 3.0), name
        seen += beyond
    assert seen >= 10

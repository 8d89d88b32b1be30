"""Variants can be made and are what they say; moments, caching and errors against work by hand."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from caching import FirstBlockCache
from helpers import tiny_flux, tiny_qwen, tiny_z_image, watched
from make_variant import build, by_budget, input_moments, planned_ms
from measure import Study
from model_errors import model_errors
from picture_figures import Judges
from rtlynx_zoo.prompts import FASHION_CLASSES
from study_helpers import SMALL, STEPS, tiny_study, tiny_study_model
from study_model import StudyModel, load_study_model, noise_seed, study_of
from variants import BY_HAND, VARIANTS, chosen
from zoo_helpers import fashion_pipeline, seeds

from rtlynx import Recipe
from rtlynx.calibration.budget import InputCost, inputs_of
from rtlynx.calibration.options import CalibrationReport
from rtlynx.evaluate.sampling import sample_and_record, sample_pictures
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import state_of

BY_NAME = {variant.name: variant for variant in VARIANTS}
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def model():
    return tiny_study_model()


@pytest.fixture(scope="module")
def dense(model):
    """What the dense model draws."""
    return draw(model.pipeline)


def of_few(variant):
    """The variant, which trains on few pictures at once where it trains the whole model."""
    return (
        variant
        if variant.distill is None
        else replace(variant, distill=replace(variant.distill, batch_size=2))
    )


def draw(pipeline, count=2):
    return sample_pictures(pipeline, ["red heart", "hot dog"][:count], batch_size=2, pipeline_kwargs=SETTINGS)


def make_names(model):
    """Layers that a recipe makes sparse by default."""
    return [layer.name for layer in make_plan(model.pipeline.transformer, Recipe.immediate()).sparse]


# ------------------------------------------------------------------------------------------------ the list


def test_names_are_unique_and_groups_have_their_sizes():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    main = [variant for variant in VARIANTS if variant.group == "main"]
    assert all((variant.pictures, variant.seeds) == (1000, (0, 1, 2)) for variant in main)
    assert all((v.pictures, v.seeds) == (256, (0,)) for v in VARIANTS if v.group == "sweep")
    assert all(variant.sweep for variant in VARIANTS if variant.group == "sweep")


def test_variants_are_chosen_by_glob_and_group():
    assert [variant.name for variant in chosen("dense*,paper", "main")] == [
        "dense",
        "dense:other-seed",
        "paper",
    ]
    assert {variant.sweep for variant in chosen("ridge:*")} == {"ridge"}
    with pytest.raises(ValueError, match="no-such"):
        chosen("dense,no-such")


def test_calibration_and_measured_prompts_are_disjoint():
    study = load_study_model("zoo:flux-emoji", device="cpu", dtype=torch.float32)
    assert len(study.evaluation) == 857
    assert len(set(study.evaluation) | set(study.calibration)) == 857 + 1024
    assert study.prompts(1000)[857:] == list(study.evaluation[:143])
    with pytest.raises(ValueError, match="both"):
        StudyModel("x", study.pipeline, ("a", "b"), ("b", "c"))
    assert noise_seed(0) + 10_000 < noise_seed(0, other=True) < noise_seed(1) - 10_000


def test_classes_are_calibrated_and_measured_on_from_noise_of_their_own():
    transformer = tiny_flux(
        in_channels=16, joint_attention_dim=384, pooled_projection_dim=384, attention_head_dim=32
    )
    study = study_of("x", fashion_pipeline(transformer))
    assert study.prompts(12) == [*FASHION_CLASSES, *FASHION_CLASSES[:2]]
    assert set(study.calibration) == set(FASHION_CLASSES)
    assert len(study.calibration) == 1024 <= study.first_noise < noise_seed(0, other=True) - 10_000
    with pytest.raises(ValueError, match="both"):
        StudyModel("x", study.pipeline, ("Dress",) * 9, ("Dress",), first_noise=8)
    drawn = Study(study, Judges(None, None, "none"), SMALL).dense(2, STEPS, seed=1)
    noise = noise_seed(1) + study.first_noise
    alone = study.pipeline(
        "Trouser", generator=seeds(noise + 1), num_inference_steps=STEPS, output_type="pt", guidance_scale=1.5
    ).images
    torch.testing.assert_close(drawn[1:], alone, atol=1e-4, rtol=0)
    built = build(replace(BY_NAME["recommended"], prompts=2), study, SMALL)
    assert built.modelled_ms(study.architecture, STEPS) > 0


def test_what_is_left_dense_by_hand_is_in_the_models():
    for transformer in (tiny_study_model().pipeline.transformer, tiny_z_image()):
        for glob in BY_HAND[type(transformer).__name__]:
            make_plan(transformer, Recipe.paper(skip=(glob,)))
    assert BY_NAME["paper:by-hand"].missing_for(type(tiny_qwen()).__name__)
    assert BY_NAME["cache:dense-0.1"].missing_for("ZImageTransformer2DModel")


# ------------------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("name", [
    "weight-2:4:magnitude", "weight-2:4:slim", "weight-2:4:refit", "activation-2:4", "paper:trained",
    "paper:by-budget", "all-of-ours", "pattern:norm-8:16", "fp8:dense",
    "fp8-budget:0.01", "order:sequential", "cache:ours-0.2", "distilled:free",
])  # fmt: skip
def test_a_variant_draws_differs_from_dense_and_is_priced(model, dense, name):
    before = copy.deepcopy(model.pipeline.transformer.state_dict())
    built = build(of_few(BY_NAME[name]), model, SMALL)
    pictures = draw(built.pipeline)
    assert torch.isfinite(pictures).all()
    if not name.startswith("cache"):
        assert not torch.equal(pictures, dense)
    after = model.pipeline.transformer.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    names = [layer.name for layer in make_plan(model.pipeline.transformer, Recipe.immediate()).layers]
    assert list(built.plan) == names
    assert built.modelled_ms(model.architecture, STEPS) is None if "8:16" in name else True
    changed = {name for name, layer in built.plan.items() if layer.form != "dense"}
    assert changed == set(built.layers)


@pytest.mark.parametrize("name", ["dense", "dense-fp8"])
def test_attention_in_eight_bits_draws_other_pictures_and_has_no_modelled_time(model, name):
    variant = BY_NAME[f"attention:{name}"]
    without = build(replace(variant, attention=""), model, SMALL)
    built = build(variant, model, SMALL)
    assert set(built.layers) == set(without.layers)
    pictures, as_before = draw(built.pipeline), draw(without.pipeline)
    assert torch.isfinite(pictures).all()
    assert not torch.equal(pictures, as_before)
    assert built.modelled_ms(model.architecture, STEPS) is None


def test_attention_in_eight_bits_leaves_the_last_four_steps_alone(model, monkeypatch):
    computed, real = [], torch.ops.rtlynx.attention_fp8.default
    monkeypatch.setattr(
        "rtlynx.ops.attention.attention_fp8", lambda *given: computed.append(1) or real(*given)
    )
    counts = {}
    for name in ("dense-fp8", "dense-fp8-last-4-bf16"):
        pipeline = build(BY_NAME[f"attention:{name}"], model, SMALL).pipeline
        computed.clear()
        sample_pictures(pipeline, ["red heart"], batch_size=1, pipeline_kwargs={"num_inference_steps": 28})
        counts[name] = len(computed)
    assert counts["dense-fp8-last-4-bf16"] == counts["dense-fp8"] * 24 // 28 > 0


def test_the_recommended_recipe_has_attention_in_eight_bits_in_all_steps_or_where_it_runs_sparse():
    rows = [BY_NAME[f"attention:{name}"] for name in ("recommended", "recommended-all-steps")]
    assert [(one.recipe, one.attention) for one in rows] == [(Recipe.recommended(), "fp8")] * 2
    assert [one.bf16_sigmas for one in rows] == ["dense", ()]


def test_what_rounding_does_is_told_by_the_dense_model_in_float32(model):
    whole, half = model.pipeline, model.copy_of_pipeline().to(torch.bfloat16)
    built = build(BY_NAME["dense:float32"], StudyModel("half", half, ("a",), ("b",)), SMALL)
    assert built.pipeline.transformer.dtype is torch.float32
    assert half.transformer.dtype is torch.bfloat16
    drawn, rounded = draw(built.pipeline), draw(half)
    assert not torch.equal(drawn, rounded)
    errors = [(some - draw(whole)).square().mean() for some in (drawn, rounded)]
    assert errors[0] < errors[1] + 1e-3


def test_modelled_time_orders_the_recipes(model):
    names = ("activation-2:4", "activation-2:4+norm", "fp8:norm", "fp8:dense", "dense")
    ms = {name: build(BY_NAME[name], model, SMALL).modelled_ms(model.architecture, 28) for name in names}
    assert ms["fp8:norm"] < ms["fp8:dense"] < ms["activation-2:4"] == ms["activation-2:4+norm"] < ms["dense"]


def test_a_rank_of_the_width_is_the_same_for_every_layer_and_cheaper_than_a_share(model):
    by_width, by_share = (build(BY_NAME[f"rank:ours-{one}2%"], model, SMALL) for one in ("width-", ""))
    inputs = {
        layer.name: layer.in_features for layer in make_plan(model.pipeline.transformer, Recipe()).sparse
    }
    width = min(inputs.values())
    assert max(inputs.values()) > width
    ranks = {name: by_width.plan[name].rank * k for name, k in inputs.items()}
    assert set(ranks.values()) == {max(1, round(0.02 * width))}
    assert by_width.recipe["rank"] == max(1, round(0.02 * width))
    ms = [built.modelled_ms(model.architecture, STEPS) for built in (by_width, by_share)]
    assert ms[0] < ms[1]


def test_by_hand_and_by_budget_take_equal_time(model):
    hand, budget = (build(BY_NAME[f"layers:norm-by-{how}"], model, SMALL) for how in ("hand", "budget"))
    ms = [built.modelled_ms(model.architecture, STEPS) for built in (hand, budget)]
    assert set(hand.layers) == set(make_names(model)) - {"single_transformer_blocks.0.proj_out"}
    assert ms[1] <= ms[0]
    # Each layer that it took was needed: without the last one the time is out of reach.
    assert len(budget.layers) <= len(hand.layers) + 1
    assert hand.calibration_seconds is None
    assert budget.calibration_seconds > 0


def test_the_budget_rule_takes_the_harmless_first_and_nothing_that_saves_nothing(model, monkeypatch):
    variant = BY_NAME["layers:norm-by-budget"]
    readers = {
        key: tuple(layer.name for layer in layers)
        for key, layers in inputs_of(make_plan(model.pipeline.transformer, Recipe.immediate()).sparse).items()
    }
    names = [name for layers in readers.values() for name in layers]
    alone = {key: planned_ms(model, variant.recipe, only=layers) for key, layers in readers.items()}
    dense = planned_ms(model, variant.recipe, only=())
    # Invented errors: what saves most per error is the last in the model's order.
    costs = tuple(
        InputCost(key, layers, "bf16-sparse", (dense - alone[key]) * 2.0**-i, 1.0)
        for i, (key, layers) in enumerate(readers.items())
    )
    monkeypatch.setattr("rtlynx.calibrate", lambda *_, **__: CalibrationReport({}, {}, costs))
    worth = [layers for key, layers in readers.items() if alone[key] < dense]
    for count in (1, 2, 3):
        wanted = {name for layers in worth[-count:] for name in layers}
        target = planned_ms(model, variant.recipe, only=wanted)
        recipe = by_budget(variant, variant.recipe, model, SMALL, target)
        assert set(names) - set(recipe.skip) == wanted
    impossible = by_budget(variant, variant.recipe, model, SMALL, 0.0)
    assert set(names) - set(impossible.skip) == {name for layers in worth for name in layers}


def test_pruned_layers_are_pruned_and_text_stays(model):
    built = build(BY_NAME["weight-2:4:wanda"], model, SMALL)
    for name, layer in built.layers.items():
        assert (layer.weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all(), name
    assert not any("add_" in name or "ff_context" in name for name in built.layers)
    assert built.calibration_seconds > 0


def test_a_refit_leaves_no_mean_error_and_has_e4m3_inputs_in_fp8(model):
    """On the calibration data itself, layer by layer, in float32."""
    settings = {**SETTINGS, "num_inference_steps": SMALL.steps}
    built = build(BY_NAME["weight-2:4:refit-fp8"], model, SMALL)
    with watched(model.pipeline.transformer, list(built.layers)) as seen:
        sample_pictures(
            model.pipeline, model.calibration[: SMALL.prompts], batch_size=4, pipeline_kwargs=settings
        )
    assert list(built.layers) == make_names(model)
    for name, linear in built.layers.items():
        x, y = (torch.cat([pair[i].flatten(0, -2) for pair in seen[name]]) for i in (0, 1))
        product = F.linear(x, linear.weight, linear.bias)
        assert (product - y).mean(0).abs().max() < 1e-3 * y.std(), name
        rounded = F.linear(quantize_tokens(x).dequantize(), linear.weight, linear.bias)
        torch.testing.assert_close(linear(x), rounded)
    assert {layer.form for layer in built.plan.values()} == {"dense", "weight-2:4-fp8"}


def test_moments_of_inputs_by_hand(model):
    layers = make_plan(model.pipeline.transformer, Recipe.immediate()).sparse
    settings = {**SETTINGS, "num_inference_steps": 2}
    found = input_moments(model.pipeline, layers, ["red heart"], batch_size=1, pipeline_kwargs=settings)
    layer = next(layer for layer in layers if layer.name.endswith("proj_out"))
    with watched(model.pipeline.transformer, [layer.name]) as seen:
        sample_pictures(model.pipeline, ["red heart"], pipeline_kwargs=settings)
    x = torch.cat([one.flatten(0, 1) for one, _ in seen[layer.name]]).double()
    of = found[layer.candidate.reads]
    assert torch.allclose(of.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert torch.allclose(of.mean, x.mean(0), rtol=1e-4, atol=1e-6)
    assert torch.allclose(of.covariance, torch.cov(x.T, correction=0), rtol=1e-3, atol=1e-5)
    assert len(found) == len({layer.candidate.reads for layer in layers})


# ----------------------------------------------------------------------------------------- caching, errors


def test_caching_at_no_threshold_changes_nothing_and_at_any_skips():
    pictures = {}
    for threshold in (None, 0.0, 1e9):
        pipeline = tiny_study_model(num_single_layers=2).pipeline
        cache = None if threshold is None else FirstBlockCache(pipeline.transformer, threshold)
        pictures[threshold] = [draw(pipeline), draw(pipeline)]
        if threshold == 0.0:
            assert cache.computed == 1.0
        if threshold == 1e9:  # the first step of each picture, both guidance passes
            assert cache.computed == pytest.approx(1 / STEPS)
            assert cache.calls == 2 * 2 * STEPS
    first, second = pictures[None]
    assert torch.equal(first, pictures[0.0][0])
    assert torch.equal(second, pictures[0.0][1])
    assert torch.equal(pictures[1e9][0], pictures[1e9][1])  # nothing is left of the picture before
    assert not torch.equal(first, pictures[1e9][0])


def test_errors_inside_a_model_by_hand(model):
    study = tiny_study()
    calls = study.calls(STEPS)
    assert len(calls) == 2 * STEPS
    dense = study.model.pipeline.transformer
    none = model_errors(dense, copy.deepcopy(dense), {}, calls)
    assert none["output_error"] == none["layer_error"] == 0
    built = build(BY_NAME["activation-2:4"], study.model, SMALL)
    sparse = built.pipeline.transformer
    found = model_errors(dense, sparse, built.layers, calls)
    assert found["noise"] == pytest.approx([1, 2 / 3, 1 / 3])
    expected = []
    with torch.no_grad():
        for step in range(STEPS):
            off = total = 0.0
            for call in calls[2 * step : 2 * step + 2]:
                y, z = (m(**{**call, "return_dict": False})[0] for m in (dense, sparse))
                off, total = off + float((y - z).square().sum()), total + float(y.square().sum())
            expected.append(off / total)
    assert found["output_error_by_step"] == pytest.approx(expected, rel=1e-5)
    weighted = (expected[0] * 3 + expected[1] * 2 + expected[2]) / 6
    assert found["output_error_weighted"] == pytest.approx(weighted, rel=1e-5)
    assert found["layer_error"] == pytest.approx(sum(found["layers"].values()) / len(found["layers"]))
    assert min(found["layer_error_by_step"]) > 0


def test_dense_steps_show_in_the_output_error_of_their_steps():
    study = tiny_study()
    built = build(replace(BY_NAME["dense-steps:1"], prompts=2), study.model, SMALL)
    assert state_of(built.pipeline.transformer).plan.recipe.dense_steps == 1
    draw(built.pipeline)
    dense = study.model.pipeline.transformer
    found = model_errors(dense, built.pipeline.transformer, built.layers, study.calls(STEPS))
    assert found["output_error_by_step"][0] < 1e-9 < found["output_error_by_step"][1]


def test_recorded_calls_are_the_pipelines_own(model):
    _, calls = sample_and_record(
        model.pipeline, ["red heart"], steps=2, recorded=2, pipeline_kwargs={"guidance_scale": 1.0}
    )
    assert len(calls) == 2

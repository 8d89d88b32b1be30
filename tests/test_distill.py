"""Distillation of a calibrated model, through `rtlynx.calibrate`."""

from dataclasses import replace

import pytest
import torch
from calibration_helpers import PROMPTS, assert_same, calls, solution
from helpers import TEXT_TOKENS, output, tiny_flux, tiny_z_image
from pipeline_helpers import TinyPipeline
from zoo_helpers import randomize

import rtlynx.calibration.distill
from rtlynx import (
    CalibrationError,
    CalibrationOptions,
    Distillation,
    Recipe,
    calibrate,
    load,
    save,
)
from rtlynx.models import sparse_layers, state_of

GUIDANCE = 3.0
RIDGE = 3.0  # strong, since moments of a few states would be fitted too closely
RECIPE = Recipe(rank=None, ridge=RIDGE, precision="fp8")
QUICK = Distillation(steps=4, batch_size=4, on_policy_prompts=2, refresh_every=2, learning_rate=1e-3)
LONGER = replace(QUICK, steps=8, batch_size=6, learning_rate=5e-4)
OPTIONS = CalibrationOptions(
    steps_per_prompt=2, pipeline_kwargs={"guidance_scale": GUIDANCE, "num_inference_steps": 2}
)


def dense_pipeline(**changes):
    return TinyPipeline(randomize(tiny_flux()), **changes)


def distilled(recipe=RECIPE, distill=QUICK, pipeline=None, options=OPTIONS):
    pipeline = pipeline or dense_pipeline()
    report = calibrate(pipeline, PROMPTS[:4], recipe, options, distill=distill, progress=False)
    return pipeline, report


@pytest.fixture(scope="module")
def solved():
    """The closed form alone."""
    return distilled(distill=None)[0].transformer


@pytest.fixture(scope="module")
def trained():
    return distilled()


def guided_error(model):
    """||guided velocity - dense one||² over the latter, at states that no calibration drew."""
    dense, error, energy = dense_pipeline().transformer, 0.0, 0.0
    for call in calls(4, first=100):
        null = {**call, "encoder_hidden_states": torch.zeros(1, 8, 64)}
        null["pooled_projections"] = torch.zeros(1, 32)
        y, wanted = (
            output(one, null) + GUIDANCE * (output(one, call) - output(one, null)) for one in (model, dense)
        )
        error, energy = error + float((y - wanted).square().sum()), energy + float(wanted.square().sum())
    return error / energy


def test_guided_velocity_comes_nearer_than_by_the_closed_form(solved, trained):
    pipeline, report = trained
    found = report.distillation
    assert (found.steps, found.guidance) == (4, GUIDANCE)
    assert found.loss_after < 0.95 * found.loss_before
    assert guided_error(pipeline.transformer) < 0.95 * guided_error(solved)


def test_the_loss_is_that_of_the_formula_on_held_out_calls(trained):
    pipeline, report = trained
    dense, recorded = dense_pipeline(), []
    dense.transformer.register_forward_pre_hook(
        lambda _model, _args, kwargs: recorded.append(dict(kwargs)), with_kwargs=True
    )
    noise = [torch.Generator().manual_seed(3)]  # of four prompts the last is held out
    dense(PROMPTS[3:4], noise, **OPTIONS.pipeline_kwargs)
    assert len(recorded) == 4  # two steps of two passes
    off = []
    for call in recorded:
        call.pop("return_dict")
        off.append(output(pipeline.transformer, call) - output(dense_pipeline().transformer, call))
    losses = [
        0.1 * (c.square() + n.square()) + 0.2 * (GUIDANCE * c - (GUIDANCE - 1) * n).square()
        for c, n in (off[:2], off[2:])
    ]
    expected = float(torch.stack(losses).mean())
    # Of the batch and of each call alone, whose rounding may put a value on another side of an e4m3 step.
    assert report.distillation.loss_after == pytest.approx(expected, rel=5e-3)


def test_weights_and_biases_of_layers_that_drop_activations_change_and_nothing_else(solved, trained):
    model, report = trained[0].transformer, trained[1]
    before, after = dict(solved.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after)
    changed = {name for name, one in before.items() if not torch.equal(one.float(), after[name].float())}
    dropping = {
        name: layer for name, layer in sparse_layers(model).items() if layer.pattern.n < layer.pattern.m
    }
    assert len(dropping) < len(sparse_layers(model))
    assert changed == {f"{name}.{kind}" for name in dropping for kind in ("weight", "bias")}
    assert report.distillation.layers == len(dropping)
    assert {layer.intercept for layer in dropping.values()} == {"refitted"}


class ZImageOfTests:
    """Both guidance passes in one call, as in diffusers' pipelines of that name, and their guidance."""

    def __init__(self):
        self.transformer = randomize(tiny_z_image())

    @torch.no_grad()
    def __call__(self, prompt, generator, num_inference_steps=2, guidance_scale=2.0, output_type="pil"):
        texts = [torch.full((TEXT_TOKENS, 64), len(one) / 10) for one in prompt]
        x = torch.stack([torch.randn(4, 1, 8, 8, generator=one) for one in generator])
        for step in range(num_inference_steps):
            t = torch.full((2 * len(x),), step / num_inference_steps)
            both = [*texts, *(torch.zeros_like(one) for one in texts)]
            y = torch.stack(self.transformer(x=[*x, *x], t=t, cap_feats=both, return_dict=False)[0])
            conditional, null = y.chunk(2)
            x = x + (conditional + guidance_scale * (conditional - null)) / num_inference_steps


def test_z_image_whose_layers_have_no_bias_gets_one_by_the_recipe():
    pipeline, prompts = ZImageOfTests(), ["fox" * i for i in range(1, 5)]
    recipe = replace(RECIPE, intercept=True)
    settings = CalibrationOptions(steps_per_prompt=2)
    report = calibrate(pipeline, prompts, recipe, settings, distill=LONGER, progress=False)
    assert report.distillation.guidance == 3.0  # conditional + 2 (conditional - null)
    assert report.distillation.loss_after < report.distillation.loss_before
    assert "added" in {layer.intercept for layer in sparse_layers(pipeline.transformer).values()}


def test_a_step_of_one_call_has_no_guidance():
    one_call = replace(OPTIONS, pipeline_kwargs={"num_inference_steps": 2})
    _, report = distilled(distill=LONGER, options=one_call)
    assert report.distillation.guidance is None
    assert report.distillation.loss_after < report.distillation.loss_before


# ----------------------------------------------------------------------------------------- same result


def test_saved_and_loaded_it_computes_the_same(trained, tmp_path):
    model = trained[0].transformer
    save(model, tmp_path)
    again = load(dense_pipeline().transformer, tmp_path)
    call = calls(1)[0]
    assert torch.equal(output(again, call), output(model, call))
    assert_same(solution(again), solution(model))


def test_interrupted_it_leaves_the_model_and_goes_on_to_the_same(trained, tmp_path):
    options = replace(OPTIONS, folder=tmp_path)
    # Calls of the pipeline: prompts to fit, prompts held out, and the sparse model's at steps 0 and 2.
    stopped = dense_pipeline(interrupt_at=4)
    with pytest.raises(KeyboardInterrupt):
        distilled(pipeline=stopped, options=options)
    assert_dense(stopped.transformer)
    assert len(stopped.batches) == 4
    assert all(path.suffix in (".json", ".safetensors") for path in tmp_path.iterdir())

    resumed, report = distilled(options=options)
    assert resumed.batches == stopped.batches[3:]  # from step 2 on
    assert_same(solution(resumed.transformer), solution(trained[0].transformer))
    assert report.distillation == trained[1].distillation

    finished, again = distilled(options=options)
    assert finished.batches == []
    assert_same(solution(finished.transformer), solution(resumed.transformer))
    assert again.distillation == report.distillation
    # The recording and the solutions serve any distillation, and none.
    plain, _ = distilled(distill=None, options=options)
    assert plain.batches == []
    other, report = distilled(distill=replace(QUICK, steps=1), options=options)
    assert report.distillation.steps == 1
    assert len(other.batches) == 1  # the sparse model's own


def assert_dense(model):
    assert state_of(model) is None
    wanted, found = dense_pipeline().transformer, model
    assert_same(dict(found.named_parameters()), dict(wanted.named_parameters()))
    assert [type(one) for one in found.modules()] == [type(one) for one in wanted.modules()]
    assert all(one.requires_grad for one in found.parameters())
    assert not any("forward" in vars(one) or one._forward_pre_hooks for one in found.modules())


def test_what_saves_memory_changes_no_result():
    # Text rows dense, so that blocks that are computed again have to know where the text is.
    recipe = Recipe(rank=4, ridge=RIDGE, text_rows="dense")
    weights, losses = [], []
    for changes in ({}, {"gradient_checkpointing": True, "micro_batch_size": 3}):
        pipeline, report = distilled(recipe, replace(QUICK, rank=8, on_policy_share=0.0, **changes))
        weights.append(solution(pipeline.transformer))
        losses.append(report.distillation.loss_after)
        assert report.distillation.loss_after < report.distillation.loss_before
    assert_same(*weights, rtol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(
    "steps", [{"dense_steps": 1, "dense_last_steps": 1}, {"dense_sigmas": ((0.9, 1), (0, 0.3))}]
)
def test_steps_that_run_dense_are_not_trained_on_and_keep_their_originals(steps, monkeypatch):
    recipe = Recipe(rank=None, ridge=RIDGE, text_rows="dense", **steps)
    seen, original = set(), rtlynx.calibration.distill.outputs

    def watched(model, rows, device):
        seen.update(float(row.argument("timestep")) for row in rows)
        return original(model, rows, device)

    monkeypatch.setattr(rtlynx.calibration.distill, "outputs", watched)
    options = replace(OPTIONS, steps_per_prompt=4, pipeline_kwargs={"num_inference_steps": 4})
    model = distilled(recipe, QUICK, options=options)[0].transformer
    assert seen == {0.75, 0.5}
    dense = dense_pipeline().transformer
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.original_weight(), dense.get_submodule(name).weight), name
        assert torch.equal(layer.bias_dense, dense.get_submodule(name).bias), name
        assert not torch.equal(layer.weight, layer.weight_dense), name
    rtlynx.densify(model)
    assert_same(dict(model.named_parameters()), dict(dense.named_parameters()))


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("settings", [
    {"steps": 0}, {"steps": 1.5}, {"batch_size": True}, {"micro_batch_size": 0}, {"learning_rate": 0.0},
    {"learning_rate": float("inf")}, {"guidance": -1}, {"guidance": "3"}, {"on_policy_share": 1.1},
    {"on_policy_prompts": 0}, {"refresh_every": 0}, {"rank": 0}, {"rank": 0.5}, {"gradient_checkpointing": 1},
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Distillation(**settings)


def test_a_quarter_of_the_steps_lies_between_refreshes():
    assert Distillation().refresh_steps == 125
    assert Distillation(steps=3).refresh_steps == 1
    assert Distillation(refresh_every=7).refresh_steps == 7


def test_what_cannot_be_distilled_is_refused_and_the_model_left(monkeypatch):
    pipeline = dense_pipeline()
    with pytest.raises(ValueError, match="a pipeline and prompts, not calls"):
        calibrate(pipeline.transformer, calls=calls(), recipe=RECIPE, distill=QUICK)
    with pytest.raises(CalibrationError, match="nothing to distil"):
        distilled(Recipe(n=4, m=4, rank=None, ridge=RIDGE), pipeline=pipeline)
    with monkeypatch.context() as patch:
        patch.setattr(rtlynx.calibration.distill, "world", lambda: 2)
        with pytest.raises(CalibrationError, match="one process"):
            distilled(pipeline=pipeline)
    with monkeypatch.context() as patch:
        patch.setattr(rtlynx.calibration.distill, "free_bytes", lambda _device: 1e6)
        with pytest.raises(CalibrationError, match=r"takes \S+ GB beside .* 0.001 GB are free .*rank=32"):
            distilled(pipeline=pipeline)
    assert pipeline.batches == []
    assert_dense(pipeline.transformer)


def test_training_that_diverges_or_has_nothing_to_train_on_is_refused_and_the_model_left():
    pipeline = dense_pipeline()
    with pytest.raises(CalibrationError, match=r"lower learning_rate than 1e\+30"):
        distilled(distill=replace(QUICK, learning_rate=1e30), pipeline=pipeline)
    with pytest.raises(CalibrationError, match="all steps of a picture run dense"):
        distilled(replace(RECIPE, dense_steps=2), pipeline=pipeline)
    assert_dense(pipeline.transformer)

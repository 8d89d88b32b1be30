"""The pipelines of diffusers, in small and with random weights: each calibrates, or says why it does not."""

import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from all_pipelines import PIPELINES
from pipeline_cases import STEPS, built_case

from rtlynx import Budget, CalibrationError, CalibrationOptions, Recipe, calibrate, load, save
from rtlynx.models import sparse_layers, transformers_of

REFIT = Recipe(rank=None, ridge=0.1)


def built(name, monkeypatch):
    case = PIPELINES[name]
    return case, built_case(name, case, monkeypatch)


def draw(pipeline, case):
    """As calibration does."""
    settings = {"output_type": case.output_type, "num_inference_steps": STEPS, **case.settings}
    with torch.no_grad():
        return pipeline(**settings, **case.inputs(), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_calibrates_on_its_own_inputs_or_says_why_not(name, monkeypatch, recorded):
    case, pipeline = built(name, monkeypatch)
    settings = {"num_inference_steps": STEPS, **case.settings}
    options = CalibrationOptions(steps_per_prompt=1, pipeline_kwargs=settings)
    prompts = [case.inputs() for _ in range(3)]
    if case.refusal is not None:
        with pytest.raises(CalibrationError, match=case.refusal):
            calibrate(pipeline, prompts, REFIT, options, progress=False)
        assert not sparse_layers(pipeline.transformer)
        return
    calls = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    draw(pipeline, case)
    handle.remove()
    assert len(calls) == STEPS * case.calls
    report = calibrate(pipeline, prompts, REFIT, options, progress=False)
    of_each = [2 * case.calls, case.calls]  # of one step of each prompt
    assert [len(batch) for batch in recorded] == of_each * len(transformers_of(pipeline))
    assert set(sparse_layers(pipeline.transformer)) == set(report.solutions)
    assert report.solutions
    assert all(one.error < 1 for one in report.solutions.values())
    draw(pipeline, case)


# Timesteps per token or frame, that rise, under other names, or of loops of another shape.
ODD_LOOPS = [
    "AnyFlowPipeline", "Cosmos2VideoToWorldPipeline", "DiTPipeline", "Flux2KleinKVPipeline",
    "HiDreamImagePipeline", "LTXImageToVideoPipeline", "Lumina2Pipeline",
    "SkyReelsV2DiffusionForcingPipeline", "SanaSprintPipeline",
    "WanAnimatePipeline", "LTX2ImageToVideoPipeline", "Ideogram4Pipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_LOOPS)
def test_a_last_step_that_runs_dense_is_told_apart(name, monkeypatch, recorded):
    case, pipeline = built(name, monkeypatch)
    settings = {"num_inference_steps": STEPS, **case.settings}
    options = CalibrationOptions(steps_per_prompt=STEPS, pipeline_kwargs=settings)
    prompts = [case.inputs() for _ in range(2)]
    calibrate(pipeline, prompts, replace(REFIT, dense_last_steps=1), options, progress=False)
    of_each = [(STEPS - 1) * case.calls] * 2
    assert [len(batch) for batch in recorded] == of_each * len(transformers_of(pipeline))
    draw(pipeline, case)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinKVPipeline"])
def test_flux2_draws_the_same_from_a_checkpoint_with_a_budget_and_dense_text_rows(
    name, monkeypatch, tmp_path
):
    def drawn(pipeline):
        torch.manual_seed(0)
        return draw(pipeline, case).images

    case, pipeline = built(name, monkeypatch)
    dense = drawn(pipeline)
    options = CalibrationOptions(pipeline_kwargs={"num_inference_steps": STEPS, **case.settings})
    recipe = Recipe(
        rank=None, ridge=0.1, precision="auto", budget=Budget(speedup_share=0.8), text_rows="dense"
    )
    report = calibrate(pipeline, [case.inputs() for _ in range(2)], recipe, options, progress=False)
    assert report.choice.speedup_share >= 0.8 * (1 - 1e-9)
    assert len(report.costs) == 4 + 2 * 6  # inputs of text layers in dense fp8 alone, others sparse too
    sparse = drawn(pipeline)
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, dense)
    save(pipeline, tmp_path / "lynx")
    _, other = built(name, monkeypatch)
    assert torch.equal(drawn(load(other, tmp_path / "lynx")), sparse)


def test_the_guide_says_how_many_calibrate():
    guide = Path(__file__).parents[2] / "docs/guides/calibrate.md"
    (said,) = re.findall(r"(\d+) pipelines of diffusers", guide.read_text(encoding="utf-8"))
    assert int(said) == sum(case.refusal is None for case in PIPELINES.values())


def encode(prompt, negative_prompt=None, *_args, **_kwargs):
    """In place of a text encoder: embeddings (B, 8, 32) of prompts and negative ones, by their letters."""

    def of(texts):
        made = [torch.Generator().manual_seed(zlib.crc32((text or "").encode())) for text in texts]
        return torch.stack([torch.randn(8, 32, generator=one) for one in made])

    texts = prompt if isinstance(prompt, list) else [prompt]
    return of(texts), of([""] * len(texts))


@pytest.mark.parametrize(("name", "batches"), [("WanPipeline", [2, 1]), ("WanVACEPipeline", [1, 1, 1])])
def test_prompts_go_in_lists_where_the_pipeline_takes_them(name, batches, monkeypatch, recorded):
    case, pipeline = built(name, monkeypatch)
    pipeline.encode_prompt = encode
    drawn = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _model, _args, kwargs: drawn.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    settings = {"num_inference_steps": STEPS, **case.settings}
    options = CalibrationOptions(steps_per_prompt=STEPS, pipeline_kwargs=settings)
    report = calibrate(pipeline, ["a cat", "a dog", "a fox"], REFIT, options, progress=False)
    assert drawn[: STEPS * 2 * len(batches)] == [size for size in batches for _ in range(STEPS * 2)]
    assert sum(len(call["hidden_states"]) for batch in recorded for call in batch) == 3 * STEPS * 2
    assert report.solutions

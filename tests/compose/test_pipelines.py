"""The pipelines of diffusers, in small and with random weights: each calibrates, or says why it does not."""

import sys

import pytest
import torch
from flux_pipelines import FLUX_PIPELINES
from image_pipelines import IMAGE_PIPELINES
from pipeline_cases import STEPS
from video_pipelines import VIDEO_PIPELINES

from rtlynx import CalibrationError, CalibrationOptions, Recipe, calibrate
from rtlynx.models import sparse_layers

PIPELINES = {**FLUX_PIPELINES, **IMAGE_PIPELINES, **VIDEO_PIPELINES}
REFIT = Recipe(rank=None, ridge=0.1)


def built(name, monkeypatch):
    case = PIPELINES[name]
    pipeline = case.build(name)
    for function, stand_in in case.functions.items():
        monkeypatch.setattr(sys.modules[type(pipeline).__module__], function, stand_in)
    pipeline.set_progress_bar_config(disable=True)
    return case, pipeline


def draw(pipeline, case):
    """As calibration does."""
    settings = {"output_type": "latent", "num_inference_steps": STEPS, **case.settings}
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
    assert [len(batch) for batch in recorded] == [2 * case.calls, case.calls]  # of one step of each prompt
    assert set(sparse_layers(pipeline.transformer)) == set(report.solutions)
    assert report.solutions
    assert all(one.error < 1 for one in report.solutions.values())
    draw(pipeline, case)

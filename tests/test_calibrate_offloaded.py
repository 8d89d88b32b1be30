"""Calibration of pipelines that offload their models: whole ones wait on the CPU, others are refused."""

import accelerate
import pytest
import torch
from calibration_helpers import PROMPTS, RIDGE, assert_same
from helpers import relative_error, tiny_flux
from pipeline_helpers import TinyPipeline
from zoo_helpers import emoji_pipeline, randomize

from rtlynx import Budget, CalibrationOptions, Recipe, calibrate
from rtlynx.calibration.replay import device_of
from rtlynx.models import sparse_layers

REFIT = Recipe(rank=None, ridge=RIDGE)
OPTIONS = CalibrationOptions(heldout=0.5, steps_per_prompt=2, pipeline_kwargs={"num_inference_steps": 4})
CARD = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")],
)
# With all that replays calls, and draws between replays.
EVERYTHING = Recipe(
    rank=None, ridge=RIDGE, precision="auto", budget=Budget(speedup_share=0.8), rotate_values=True,
    permute_hidden=True, dense_sigmas="auto", dense_precision="fp8", text_rows="dense",
)  # fmt: skip


@pytest.mark.parametrize("how", ["sequential", "block_level", "leaf_level"])
def test_offloading_that_takes_weights_away_is_refused_before_anything_is_drawn(how):
    model, cpu = tiny_flux(), torch.device("cpu")
    if how == "sequential":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=how, **blocks)
    pipeline = TinyPipeline(model)
    with pytest.raises(ValueError, match="then enable offloading"):
        calibrate(pipeline, ["a cat"], REFIT, progress=False)
    assert not pipeline.batches


def test_a_model_that_is_offloaded_as_a_whole_is_calibrated():
    models = [tiny_flux(), tiny_flux()]
    accelerate.cpu_offload_with_hook(models[0], "cpu")
    for model in models:
        calibrate(TinyPipeline(model), ["a cat"], REFIT, CalibrationOptions(heldout=0.0), progress=False)
    assert_same(*(model.state_dict() for model in models))


def test_calls_are_replayed_where_an_offloaded_model_runs():
    model = tiny_flux()
    accelerate.cpu_offload_with_hook(model, torch.device("meta"))  # stands for a card
    assert device_of(model) == torch.device("meta") != next(model.parameters()).device
    accelerate.hooks.remove_hook_from_module(model)
    assert device_of(model) == torch.device("cpu")


class Offloading(TinyPipeline):
    """Its transformer comes to the card when it runs, and stays until the hooks are freed."""

    def __init__(self, fails=False):
        super().__init__(tiny_flux())
        self.on_card, self.fails = False, fails
        self.transformer.register_forward_pre_hook(self._bring)

    def _bring(self, _module, _args):
        self.on_card = True
        if self.fails and not self._draws:
            raise RuntimeError("no replay")

    def maybe_free_model_hooks(self):
        self.on_card = False

    def __call__(self, *args, output_type="pil", **kwargs):
        assert not self.on_card  # where a text encoder would have to fit beside it
        self._draws = True
        drawn = super().__call__(*args, **kwargs)
        self._draws = False
        self.maybe_free_model_hooks()
        return drawn


def test_the_model_leaves_the_card_before_the_pipeline_draws_and_in_the_end():
    pipeline = Offloading()
    report = calibrate(pipeline, PROMPTS[:4], EVERYTHING, OPTIONS, progress=False)
    assert len(report.choice.candidates) > 1  # drawn after replays
    assert not pipeline.on_card


def test_the_model_leaves_the_card_after_an_error():
    pipeline = Offloading(fails=True)
    with pytest.raises(ValueError, match="no replay"):
        calibrate(pipeline, PROMPTS[:4], REFIT, OPTIONS, progress=False)
    assert not pipeline.on_card


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_a_pipeline_with_model_cpu_offload_ends_as_one_without(device):
    def made(offloaded):
        model = tiny_flux(in_channels=48, joint_attention_dim=384, pooled_projection_dim=384)
        pipeline = emoji_pipeline(randomize(model).to(torch.bfloat16))
        if offloaded:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        calibrate(pipeline, ["red apple", "dog"], EVERYTHING, OPTIONS, progress=False)
        return pipeline

    def drawn(pipeline):
        noise = torch.Generator().manual_seed(0)
        return pipeline("cat", generator=noise, num_inference_steps=4, output_type="latent").images.cpu()

    offloaded, plain = made(True), made(False)
    model = offloaded.transformer
    assert sparse_layers(model).keys() == sparse_layers(plain.transformer).keys() != set()
    for _ in range(2):
        assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert relative_error(drawn(offloaded), drawn(plain)) < 0.05

"""What people put on top of models known by name, sparse in fp8: pipelines, ControlNets, IP-Adapters.

Kernels run as their reference, so that blocks are fused on the CPU, too.
"""

from dataclasses import replace

import pytest
import torch
from controlnet_pipelines import CONTROLNET_PIPELINES
from diffusers import FluxPipeline, FluxPriorReduxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from flux_pipelines import flux, flux_case
from fusion_helpers import count_calls, serve
from helpers import relative_error
from on_top_cases import (
    CASES,
    CONTROLNETS,
    IP_PIPELINES,
    draw,
    made,
    picture_tokens,
    with_adapter,
)
from pipeline_cases import STEPS, picture, with_inputs
from video_pipelines import siglip, siglip_processor

from rtlynx import CalibrationOptions, Recipe, calibrate, load, save, sparsify
from rtlynx.models import architecture_of
from rtlynx.models.fusion import unfuse_blocks

FP8 = Recipe.immediate(precision="fp8")


@pytest.fixture
def calls(monkeypatch):
    serve(monkeypatch)
    return count_calls(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_model_draws_fused_what_it_draws_layer_by_layer(name, monkeypatch, calls):
    case = CASES[name][1]
    pipeline = sparsify(made(name, monkeypatch), FP8)
    calls.clear()
    fused = draw(pipeline, case)
    known = bool(architecture_of(pipeline.transformer).fused)
    assert known is any(count and one.endswith("_compress") for one, count in calls.items())
    if name in CONTROLNETS:
        assert not torch.equal(draw(pipeline, case, controlnet_conditioning_scale=0.0), fused)
    unfuse_blocks(pipeline.transformer)
    plain = draw(pipeline, case)
    exact = draw(pipeline.to(torch.float32), case)  # the same selection, without bfloat16's rounding
    assert relative_error(fused, exact) < 1.3 * relative_error(plain, exact)
    if not name.endswith(
        ("Img2ImgPipeline", "InpaintPipeline", "InpaintingPipeline")
    ):  # (they call it alike)
        pipeline = made(name, monkeypatch)
        dense = draw(pipeline, case)
        whole = draw(sparsify(pipeline, Recipe.dense_fp8()), case)
        assert 0 < relative_error(whole, dense) < min(0.05, relative_error(fused, dense))


@pytest.mark.parametrize(
    "name", ["FluxControlNetPipeline", "QwenImageControlNetPipeline", "StableDiffusion3ControlNetPipeline"]
)
def test_a_controlnet_can_be_sparse_itself(name, monkeypatch, calls):
    case, recipe = CASES[name][1], Recipe.immediate(precision="fp8", dense_steps=1)
    dense = draw(made(name, monkeypatch), case)
    pipeline = sparsify(made(name, monkeypatch), recipe)
    alone = draw(pipeline, case)
    sparsify(pipeline.controlnet, recipe)
    both = draw(pipeline, case)
    assert not torch.equal(both, alone)
    assert relative_error(both, dense) < 0.1


def test_every_controlnet_pipeline_of_these_models_is_among_them():
    assert set(CONTROLNET_PIPELINES) < CONTROLNETS


# ------------------------------------------------------- a ControlNet that calls blocks of the model itself


Z_CONTROL = "ZImageControlNetPipeline"


@pytest.mark.parametrize("settings", [{}, {"precision": "fp8", "dense_precision": "fp8"}])
def test_blocks_that_a_controlnet_shares_run_dense_there_where_some_steps_are(settings, monkeypatch, calls):
    """Z-Image's ControlNet calls the model's refiners before the model, and nothing tells it the step."""
    case = CASES[Z_CONTROL][1]
    dense = draw(made(Z_CONTROL, monkeypatch), case)
    pipeline = sparsify(made(Z_CONTROL, monkeypatch), Recipe.immediate(dense_steps=STEPS, **settings))
    assert relative_error(draw(pipeline, case), dense) < (0.05 if settings else 1e-6)
    pipeline = sparsify(made(Z_CONTROL, monkeypatch), Recipe.immediate(dense_steps=1, **settings))
    assert relative_error(draw(pipeline, case), dense) > 1e-3
    block = pipeline.transformer.noise_refiner[0]
    x = torch.randn(1, 32, 48).bfloat16()
    with pytest.raises(RuntimeError, match="no call is under way"):
        block.attention.to_q(x)  # with gradients: one step that is run again, say
    with torch.no_grad(), pytest.raises(RuntimeError, match="no call is under way"):
        pipeline.transformer.layers[0].attention.to_q(x)
    with pytest.raises(ValueError, match="holds blocks of the model that it controls"):
        sparsify(pipeline.controlnet)


def test_a_model_is_calibrated_under_the_controlnet_that_shares_its_blocks(monkeypatch, tmp_path):
    case = CASES[Z_CONTROL][1]

    def built():
        return made(Z_CONTROL, monkeypatch).to(torch.float32)

    pipeline = built()
    options = CalibrationOptions(pipeline_kwargs={"num_inference_steps": STEPS, **case.settings})
    recipe = Recipe(rank=None, ridge=0.1, dense_last_steps=1)
    assert calibrate(pipeline, [case.inputs() for _ in range(2)], recipe, options, progress=False).solutions
    save(pipeline, tmp_path / "lynx")
    drawn = draw(pipeline, case)
    assert not torch.equal(drawn, draw(built(), case))
    assert torch.equal(draw(load(built(), tmp_path / "lynx"), case), drawn)


# -------------------------------------------------------------------------------------------- IP-Adapter


@pytest.mark.parametrize("name", IP_PIPELINES)
def test_an_ip_adapter_before_or_after_sparsity_draws_the_same_fused(name, monkeypatch, calls):
    plain = CASES[name][1]
    case = replace(plain, inputs=with_inputs(plain.inputs, picture_tokens))
    pipeline = sparsify(made(name, monkeypatch), FP8)
    without = draw(pipeline, plain)
    with_adapter(pipeline)
    calls.clear()
    fused = draw(pipeline, case)
    assert calls["adaln_compress"]
    assert relative_error(fused, without) > 1e-2
    assert torch.equal(draw(sparsify(with_adapter(made(name, monkeypatch)), FP8), case), fused)
    pipeline.set_ip_adapter_scale(0.0)
    assert relative_error(draw(pipeline, case), without) < 1e-2
    pipeline.set_ip_adapter_scale(1.0)
    unfuse_blocks(pipeline.transformer)
    layer_by_layer = draw(pipeline, case)
    exact = draw(pipeline.to(torch.float32), case)
    assert relative_error(fused, exact) < 1.3 * relative_error(layer_by_layer, exact)
    pipeline = sparsify(with_adapter(made(name, monkeypatch)), FP8)
    pipeline.unload_ip_adapter()
    assert torch.equal(draw(pipeline, plain), without)


def test_a_model_is_calibrated_with_its_ip_adapter_and_saved_without_it(monkeypatch, tmp_path):
    plain = CASES["FluxPipeline"][1]
    case = replace(plain, inputs=with_inputs(plain.inputs, picture_tokens))

    def built():
        return made("FluxPipeline", monkeypatch).to(torch.float32)

    pipeline = with_adapter(built())
    options = CalibrationOptions(pipeline_kwargs={"num_inference_steps": STEPS, **case.settings})
    recipe = Recipe(rank=None, ridge=0.1, precision="fp8")
    calibrate(pipeline, [case.inputs() for _ in range(2)], recipe, options, progress=False)
    save(pipeline, tmp_path / "lynx")
    drawn = draw(pipeline, case)
    other = load(built(), tmp_path / "lynx")
    assert not torch.equal(draw(other, plain), drawn)
    assert torch.equal(draw(with_adapter(other), case), drawn)
    save(other, tmp_path / "again")
    assert torch.equal(draw(load(with_adapter(built()), tmp_path / "again"), case), drawn)
    pipeline.transformer.save_pretrained(tmp_path / "whole")
    alone = FluxTransformer2DModel.from_pretrained(tmp_path / "whole")
    pipeline.unload_ip_adapter()
    loaded = FluxPipeline.from_pipe(pipeline, transformer=alone)
    torch.testing.assert_close(draw(loaded, plain), draw(pipeline, plain))


# ------------------------------------------------------------------------------------------------- Redux


@pytest.mark.parametrize("rows", ["sparse", "dense"])
def test_redux_hands_its_picture_over_as_text(rows, monkeypatch, calls):
    prior = FluxPriorReduxPipeline(siglip().eval(), siglip_processor(), ReduxImageEncoder(32, 4096).eval())
    torch.manual_seed(0)
    of_picture = dict(prior(picture()))
    assert of_picture["prompt_embeds"].shape == (1, 512 + 4, 4096)
    transformer = flux(joint_attention_dim=4096, pooled_projection_dim=768)
    case = replace(flux_case(transformer), inputs=lambda: of_picture)
    dense = draw(made("FluxPipeline", monkeypatch, case), case)
    pipeline = sparsify(
        made("FluxPipeline", monkeypatch, case), Recipe.immediate(precision="fp8", text_rows=rows)
    )
    fused = draw(pipeline, case)
    unfuse_blocks(pipeline.transformer)
    plain = draw(pipeline, case)
    exact = draw(pipeline.to(torch.float32), case)
    assert 1e-3 < relative_error(exact, dense) < 0.2
    assert relative_error(fused, exact) < 1.6 * relative_error(plain, exact)  # (of 64 numbers)

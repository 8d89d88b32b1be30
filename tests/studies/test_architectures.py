"""The zoo's three architectures: what each is asked, how its answer is read, and where its weights are."""

from pathlib import Path

import diffusers
import pytest
import rtlynx_zoo as zoo
import torch
import torch.nn.functional as F
from rtlynx_zoo import text
from rtlynx_zoo.patches import patchify, unpatchify
from rtlynx_zoo.prompts import FASHION_CLASSES
from rtlynx_zoo.velocity import from_latents, to_latents, velocity_of
from training.architectures import ARCHITECTURES
from training.train import flow_matching_loss
from zoo_helpers import (
    TINY,
    FluxOracle,
    QwenImageOracle,
    ZImageOracle,
    emoji_pipeline,
    fashion_pipeline,
    randomize,
    seeds,
)

import rtlynx
from rtlynx.evaluate.sampling import compare
from rtlynx.models.pipelines import load_model
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import sparse_layers
from rtlynx.recipe import Recipe

ORACLES = {"flux": FluxOracle, "qwen-image": QwenImageOracle, "z-image": ZImageOracle}
NAMES = tuple(ORACLES)


def tiny_model(name):
    architecture = ARCHITECTURES[name]
    return randomize(getattr(diffusers, architecture.class_name)(**{**architecture.config, **TINY[name]}))


def oracle(name, pictures):
    model = ORACLES[name](**{**ARCHITECTURES[name].config, **TINY[name]})
    model.tokens = patchify(pictures)
    model.latents = F.pixel_unshuffle(pictures, 2).unsqueeze(2)
    return model


@pytest.fixture
def pictures():
    """(2, 3, 64, 64) in [-1, 1]; no two pixels alike, so that no permutation goes unseen."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_patches_and_latents_are_the_picture_rearranged(pictures):
    assert torch.equal(unpatchify(patchify(pictures)), pictures)
    latents = to_latents(patchify(pictures))
    assert latents.shape == (2, 12, 32, 32)
    assert torch.equal(latents, F.pixel_unshuffle(pictures, 2))
    assert torch.equal(from_latents(latents), patchify(pictures))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_true_velocity_draws_the_picture(name, steps, pictures):
    pipe = emoji_pipeline(oracle(name, pictures))
    drawn = pipe(
        ["fox", "rocket"],
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=seeds(0, 1),
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn, pictures / 2 + 0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_true_velocity_has_no_loss(name, pictures):
    """Training wants what the pipeline integrates."""
    model = oracle(name, pictures)
    embeds, pooled = torch.zeros(2, 16, 384), torch.zeros(2, 384)
    torch.manual_seed(0)
    assert flow_matching_loss(velocity_of(model), model, patchify(pictures), embeds, pooled) < 1e-9


def diffusers_samples(name, model, noise, embeds, pooled, steps):
    """Patches (B, 256, 48) drawn by diffusers' own pipeline for the architecture, from patches of noise."""
    missing = dict(vae=None, text_encoder=None, tokenizer=None)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    # Their pictures are 8 pixels to a latent one.
    settings = dict(
        height=256, width=256, sigmas=torch.linspace(1, 1 / steps, steps).tolist(), num_inference_steps=steps
    )
    settings |= dict(output_type="latent", return_dict=False)
    if name == "flux":
        pipe = diffusers.FluxPipeline(
            scheduler, transformer=model, text_encoder_2=None, tokenizer_2=None, **missing
        )
        return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=noise, **settings)[0]
    if name == "qwen-image":
        pipe = diffusers.QwenImagePipeline(scheduler, transformer=model, **missing)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        return pipe(prompt_embeds=embeds, prompt_embeds_mask=mask, latents=noise, **settings)[0]
    pipe = diffusers.ZImagePipeline(scheduler, transformer=model, **missing)
    latents = pipe(prompt_embeds=list(embeds), latents=to_latents(noise), guidance_scale=0.0, **settings)[0]
    return from_latents(latents)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_diffusers_own_pipeline(name):
    model, steps = tiny_model(name), 3
    pipe = emoji_pipeline(model)
    embeds, pooled = pipe.encode_prompt(["fox", "rocket"])
    noise = patchify(torch.stack([torch.randn(3, 64, 64, generator=g) for g in seeds(0, 1)]))
    ours = pipe(
        ["fox", "rocket"],
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=seeds(0, 1),
        output_type="latent",
    ).images
    theirs = diffusers_samples(name, model, noise, embeds, pooled, steps)
    assert (ours - noise).norm() > 0.1 * noise.norm()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_prompts_and_guidance_work_alike(name):
    pipe = emoji_pipeline(tiny_model(name))
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    together = pipe(["fox", "rocket"], generator=seeds(3, 4), **settings).images
    alone = pipe("rocket", generator=seeds(4), **settings).images
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=0)
    unguided = pipe("rocket", generator=seeds(4), guidance_scale=1.0, **settings).images
    assert (unguided - alone).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_sparsify_calibrate_and_compare(name):
    dense, sparse = emoji_pipeline(tiny_model(name)), emoji_pipeline(tiny_model(name))
    options = rtlynx.CalibrationOptions(
        batch_size=2, steps_per_prompt=1, pipeline_kwargs={"num_inference_steps": 2}
    )
    prompts = zoo.prompts.calibration_prompts(8)
    rtlynx.calibrate(sparse, prompts, Recipe(rank=4), options, progress=False)
    assert sparse_layers(sparse.transformer)
    figures = compare(dense, sparse, ["fox"], steps=2, progress=False)
    assert 0 < figures["layer_error"] < 0.5
    assert figures["psnr"] > 10


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_can_be_sparse(name):
    """At full size: 10 to 16 million parameters, 32 MB in bfloat16, inputs that divide by 16."""
    model = ARCHITECTURES[name].build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 10e6 < parameters < 16e6
    plan = make_plan(model, Recipe(text_stream="sparse"))
    assert len(plan.sparse) == len(plan.layers)
    assert all(layer.in_features % 16 == 0 for layer in plan.sparse)


def test_clothing_takes_a_quarter_of_the_tokens_and_20_mb():
    model = ARCHITECTURES["flux-fashion"].build()
    assert sum(parameter.numel() for parameter in model.parameters()) * 2 <= 20e6  # bfloat16
    plan = make_plan(model, Recipe(text_stream="sparse"))
    assert len(plan.sparse) == len(plan.layers)


def test_clothing_is_drawn_as_grey_pictures_with_three_equal_channels():
    known = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model = FluxOracle(**{**ARCHITECTURES["flux-fashion"].config, **TINY["flux-fashion"]})
    model.tokens = patchify(known)
    pipe = fashion_pipeline(model)
    settings = {"num_inference_steps": 3, "generator": seeds(0, 1)}
    drawn = pipe(["Coat", "Bag"], output_type="pt", **settings).images
    torch.testing.assert_close(drawn, (known / 2 + 0.5).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)
    assert pipe(["Coat", "Bag"], **settings).images[0].size == (32, 32)
    with pytest.raises(ValueError, match="draws 32x32 pictures only; got height=64"):
        pipe("Coat", height=64)


def test_the_classes_have_text_without_the_encoder():
    embeds, pooled = text.encode(list(FASHION_CLASSES))
    lengths = (embeds.abs().sum(2) > 0).sum(1)
    assert lengths.min() >= 3  # start, word, end
    for row, length in enumerate(lengths):
        torch.testing.assert_close(pooled[row], embeds[row, :length].mean(0))
    assert len({tuple(one.tolist()) for one in pooled}) == len(FASHION_CLASSES)
    assert torch.equal(text.encode(["dRESS"])[0][0], embeds[FASHION_CLASSES.index("Dress")])


def test_names_know_where_their_files_are():
    assert zoo.names() == ("flux-emoji", "qwen-emoji", "z-image-emoji", "flux-fashion")
    package = Path(zoo.__file__).parent
    assert zoo.folder("flux-emoji").parent == package / "assets"
    for name in zoo.names()[1:]:
        assert package not in zoo.folder(name).parents  # the wheel holds the package, nothing else
        assert zoo.folder(name).parts[-3:] == ("studies", "models", name)


@pytest.mark.parametrize("name", zoo.names()[1:])
def test_missing_weights_are_one_clear_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "_REPOSITORY_MODELS", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"studies/models/{name} of the rtlynx repository") as caught:
        load_model(f"zoo:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen-emoji", "z-image-emoji"])
def test_weights_of_the_repository_draw_what_was_asked_for(name):
    if not zoo.folder(name).exists():
        pytest.skip(f"{name} is not in this installation")
    pipe = zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    names = zoo.prompts.demo_prompts(3)
    samples = pipe(names, num_inference_steps=8, generator=seeds(0, 1, 2), output_type="pt").images
    found = zoo.features.retrieve(zoo.features.load_feature_network()(samples))
    assert sum(a == b for a, b in zip(found, names, strict=True)) >= 2
    weights = zoo.folder(name) / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 32e6


def test_other_transformers_are_refused():
    model = diffusers.SD3Transformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    with pytest.raises(ValueError, match="SD3Transformer2DModel cannot draw emoji"):
        emoji_pipeline(model)("fox")

"""The pipelines of diffusers around FLUX: name -> `Case`."""

from pipeline_cases import (
    FLOW,
    SIZE,
    STRENGTH,
    Case,
    image,
    kl,
    masked,
    numbers,
    ones,
    picture,
    two_texts,
    with_inputs,
)

# ------------------------------------------------------------------------------------------- FLUX, Chroma


def flux(in_channels=4, out_channels=None, **changes):
    return "FluxTransformer2DModel", {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        **changes,
    }


def flux_text():
    return {"prompt_embeds": numbers(1, 8, 32), "pooled_prompt_embeds": numbers(1, 32)}


def flux_case(transformer, latent_channels=1, inputs=dict, settings=None, models=None, **more):
    parts = {"scheduler": FLOW, "vae": kl(latent_channels), "transformer": transformer}
    return Case(
        {**parts, **(models or {})},
        lambda: {**flux_text(), **inputs()},
        {**SIZE, **(settings or {})},
        **more,
    )


CONTROLNET = (
    "FluxControlNetModel",
    {key: value for key, value in flux(16)[1].items() if key != "out_channels"},
)


def control():
    return {"control_image": picture()}


KONTEXT = {"max_area": 1024, "_auto_resize": False}
FLUX = {
    "FluxPipeline": flux_case(flux()),
    "FluxImg2ImgPipeline": flux_case(flux(), inputs=image, settings=STRENGTH),
    "FluxInpaintPipeline": flux_case(flux(8), 2, masked, STRENGTH),
    "FluxKontextPipeline": flux_case(
        flux(), inputs=image, settings={"max_area": 1024, "_auto_resize": False}
    ),
    "FluxKontextInpaintPipeline": flux_case(flux(), inputs=masked, settings={**KONTEXT, **STRENGTH}),
    "FluxFillPipeline": flux_case(flux(20, 8), 2, masked),
    "FluxControlPipeline": flux_case(flux(8, 4), inputs=control),
    "FluxControlImg2ImgPipeline": flux_case(
        flux(8, 4), inputs=lambda: {**image(), **control()}, settings=STRENGTH
    ),
    "FluxControlInpaintPipeline": flux_case(
        flux(8, 4), inputs=lambda: {**masked(), **control()}, settings=STRENGTH
    ),
    "FluxControlNetPipeline": flux_case(flux(16), 4, control, models={"controlnet": CONTROLNET}),
    "FluxControlNetImg2ImgPipeline": flux_case(
        flux(16), 4, lambda: {**image(), **control()}, STRENGTH, {"controlnet": CONTROLNET}
    ),
    "FluxControlNetInpaintPipeline": flux_case(
        flux(16), 4, lambda: {**masked(), **control()}, STRENGTH, {"controlnet": CONTROLNET}
    ),
}


FLUX2_VAE = (
    "AutoencoderKLFlux2",
    {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (4,),
        "latent_channels": 1,
        "norm_num_groups": 1,
        "sample_size": 32,
    },
)


def flux2(**changes):
    return "Flux2Transformer2DModel", {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "timestep_guidance_channels": 256,
        "axes_dims_rope": (4, 4, 4, 4),
        **changes,
    }


def flux2_case(inputs, settings=None, calls=1, **changes):
    parts = {"scheduler": FLOW, "vae": FLUX2_VAE, "transformer": flux2(**changes)}
    return Case(parts, inputs, {**SIZE, **(settings or {})}, calls=calls)


def flux2_text():
    return {"prompt_embeds": numbers(1, 8, 16)}


def klein_text():
    return {**flux2_text(), "negative_prompt_embeds": numbers(1, 8, 16)}


KLEIN = {"guidance_embeds": False}
FLUX2 = {
    "Flux2Pipeline": flux2_case(flux2_text),
    "Flux2KleinPipeline": flux2_case(lambda: {**klein_text(), "image": picture(64)}, calls=2, **KLEIN),
    "Flux2KleinKVPipeline": flux2_case(lambda: {**flux2_text(), "image": picture(64)}, **KLEIN),
    "Flux2KleinInpaintPipeline": flux2_case(lambda: {**klein_text(), **masked()}, STRENGTH, calls=2, **KLEIN),
}

CHROMA = (
    "ChromaTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
        "approximator_num_channels": 16,
    },
)


def chroma_case(inputs=dict, settings=None, **more):
    texts = two_texts((1, 8, 32), lambda *shape: ones(*shape).bool())
    parts = {"scheduler": FLOW, "vae": kl(1), "transformer": CHROMA}
    return Case(parts, with_inputs(texts, inputs), {**SIZE, **(settings or {})}, calls=2, **more)


CHROMAS = {
    "ChromaPipeline": chroma_case(),
    "ChromaImg2ImgPipeline": chroma_case(image, STRENGTH),
    # diffusers 0.42 asks the model for a setting that it does not have
    "ChromaInpaintPipeline": chroma_case(
        masked, STRENGTH, refusal="ChromaInpaintPipeline does not draw the prompt .*'guidance_embeds'"
    ),
}

FLUX_PIPELINES = {**FLUX, **FLUX2, **CHROMAS}

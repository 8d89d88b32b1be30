"""The pipelines of diffusers that draw with a ControlNet beside the model, FLUX apart: name -> `Case`."""

from dataclasses import replace

from image_pipelines import QWEN, SD3, Z_IMAGE, qwen_case, sd3_case, z_case
from pipeline_cases import masked, picture


def control():
    return {"control_image": picture()}


def control_masked():
    return {"control_image": picture(), "control_mask": picture(mode="L")}


def beside(case, controlnet, config, **changes):
    """`case` with a ControlNet."""
    return replace(case, models={**case.models, "controlnet": (controlnet, config)}, **changes)


QWEN_CONTROLNET = {key: value for key, value in QWEN[1].items() if key != "patch_size"}
SD3_CONTROLNET = {key: value for key, value in SD3[1].items() if key not in ("out_channels", "num_layers")}
Z_CONTROLNET = {
    "control_layers_places": [0],
    "control_refiner_layers_places": [0],
    "control_in_dim": 16,
    "add_control_noise_refiner": "control_noise_refiner",
    **{key: Z_IMAGE[1][key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
}

CONTROLNET_PIPELINES = {
    "QwenImageControlNetPipeline": beside(qwen_case(control), "QwenImageControlNetModel", QWEN_CONTROLNET),
    "QwenImageControlNetInpaintPipeline": beside(
        qwen_case(control_masked),
        "QwenImageControlNetModel",
        {**QWEN_CONTROLNET, "extra_condition_channels": 4},
    ),
    "StableDiffusion3ControlNetPipeline": beside(
        sd3_case(control), "SD3ControlNetModel", {**SD3_CONTROLNET, "num_layers": 1}
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": beside(
        sd3_case(control_masked),
        "SD3ControlNetModel",
        {**SD3_CONTROLNET, "num_layers": 1, "extra_conditioning_channels": 1},
    ),
    "ZImageControlNetPipeline": beside(z_case(control), "ZImageControlNetModel", Z_CONTROLNET),
    "ZImageControlNetInpaintPipeline": beside(
        z_case(lambda: {**masked(), **control()}),
        "ZImageControlNetModel",
        {**Z_CONTROLNET, "control_in_dim": 33},
    ),
}

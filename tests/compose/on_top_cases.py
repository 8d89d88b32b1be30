"""What people put on top of the models known by name: their pipelines, ControlNets, IP-Adapters, in small."""

from dataclasses import replace

import torch
from all_pipelines import PIPELINES
from helpers import in_dtype
from image_pipelines import QWEN
from pipeline_cases import STEPS, built_case, picture, with_inputs
from video_pipelines import SEES, small_image, wan, wan_case

NAMED = (
    "Flux", "Chroma", "QwenImage", "ZImage", "StableDiffusion3",
    "WanPipeline", "WanImage", "WanVideo", "LTX", "HunyuanVideo15",
)  # fmt: skip
EDIT = PIPELINES["QwenImageEditPlusPipeline"]
# name -> pipeline and case
CASES = {
    name: (name, case)
    for name, case in PIPELINES.items()
    if name.startswith(NAMED) and case.refusal is None  # (what diffusers itself does not draw)
} | {
    "FLUX.2 of a picture": (
        "Flux2Pipeline",
        replace(
            PIPELINES["Flux2Pipeline"],
            inputs=with_inputs(PIPELINES["Flux2Pipeline"].inputs, lambda: {"image": picture(64)}),
        ),
    ),
    "Qwen-Image-Edit 2511": (
        "QwenImageEditPlusPipeline",
        replace(EDIT, models={**EDIT.models, "transformer": (QWEN[0], {**QWEN[1], "zero_cond_t": True})}),
    ),
    "Wan 2.1 of a picture": (
        "WanImageToVideoPipeline",
        wan_case(wan(in_channels=36, image_dim=32, added_kv_proj_dim=32), small_image, models=SEES),
    ),
    "Wan 2.2 5B of a picture": (
        "WanImageToVideoPipeline",
        wan_case(wan(), small_image, arguments={"expand_timesteps": True}),
    ),
}
CONTROLNETS = {name for name in CASES if "ControlNet" in name}


def made(name, monkeypatch, case=None, device="cpu"):
    """The pipeline in bfloat16. ControlNets begin with zeros, and would change nothing."""
    kind, known = CASES.get(name, (name, None))
    pipeline = built_case(kind, case or known, monkeypatch)
    gen = torch.Generator().manual_seed(1)
    for parameter in pipeline.controlnet.parameters() if hasattr(pipeline, "controlnet") else ():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=gen)
    return pipeline.to(device, torch.bfloat16)


def draw(pipeline, case, **more):
    """What it draws, of the same inputs each time, in its own dtype."""
    torch.manual_seed(5)
    given = in_dtype(case.inputs(), torch.bfloat16, pipeline.device)
    settings = {"output_type": case.output_type, "num_inference_steps": STEPS, **case.settings}
    with torch.no_grad():
        drawn = pipeline(
            **{**settings, **in_dtype(given, pipeline.transformer.dtype, pipeline.device), **more},
            generator=torch.Generator().manual_seed(7),
            return_dict=False,
        )[0]
    return drawn if isinstance(drawn, torch.Tensor) else torch.stack(list(drawn))


# -------------------------------------------------------------------------------------------- IP-Adapter

IP_WIDTH, IP_TOKENS = 12, 4


def adapter(inner=32, text=32):
    """An IP-Adapter of FLUX with random weights, as `load_ip_adapter` takes it."""
    gen = torch.Generator().manual_seed(3)

    def tensors(shapes):
        return {name: 0.5 * torch.randn(shape, generator=gen) for name, shape in shapes.items()}

    projection = {"proj.weight": (IP_TOKENS * text, IP_WIDTH), "proj.bias": (IP_TOKENS * text,)}
    layers = {f"0.to_{x}_ip.{kind}": (inner, text)[: 2 - (kind == "bias")] for x in "kv" for kind in KINDS}
    return {
        "image_proj": tensors({**projection, "norm.weight": (text,), "norm.bias": (text,)}),
        "ip_adapter": tensors(layers),
    }


KINDS = ("weight", "bias")
IP_PIPELINES = ["FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxControlNetPipeline"]


def picture_tokens():
    names = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    return {name: [torch.randn(1, 1, IP_WIDTH)] for name in names}


def with_adapter(pipeline):
    pipeline.load_ip_adapter(adapter(), weight_name="", image_encoder_pretrained_model_name_or_path=None)
    return pipeline

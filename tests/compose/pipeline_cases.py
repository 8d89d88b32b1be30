"""Pipelines of diffusers in small: which parts they are made of, and what one prompt gives them."""

import inspect
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image

STEPS = 2


def numbers(*shape):
    """Inputs (of text encoders, mostly) that no encoder has to make; they differ from call to call."""
    return torch.randn(*shape)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.long)


def picture(size=32, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = torch.randint(256, (size, size, channels), dtype=torch.uint8).squeeze(-1)
    return Image.fromarray(pixels.numpy())


def frames(count=5, size=32):
    return [picture(size) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """How a pipeline is built and called.

    models : name of a component -> class, or its name in diffusers, and its configuration. Other components
        are None.
    inputs : makes the arguments of one prompt.
    settings : arguments of every call.
    arguments : of the pipeline's constructor, beside components.
    attributes : of the pipeline, set when it is built.
    functions : of the pipeline's module, replaced: they say that pictures are of a million pixels.
    output_type : that it can draw; calibration is not told.
    calls : of the transformer in one step.
    refusal : what calibration says where it does not work, as a regular expression.
    """

    models: dict[str, tuple[str, dict[str, Any]]]
    inputs: Callable[[], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, Any] = field(default_factory=dict)
    output_type: str = "latent"
    calls: int = 1
    refusal: str | None = None

    def build(self, name):
        """The pipeline `name` of diffusers, with random weights."""
        torch.manual_seed(0)
        kind = getattr(diffusers, name)
        parts = dict.fromkeys(
            key
            for key, one in inspect.signature(kind.__init__).parameters.items()
            if key != "self" and one.default is one.empty
        )
        for key, (model, config) in self.models.items():
            made = (operator.attrgetter(model)(diffusers) if isinstance(model, str) else model)(**config)
            parts[key] = made.eval() if isinstance(made, torch.nn.Module) else made
        pipeline = kind(**{**parts, **self.arguments})
        for key, value in self.attributes.items():
            setattr(pipeline, key, value)
        return pipeline


def built_case(name, case, monkeypatch):
    """The pipeline `name` of `case`, silent, with the functions of its module that stand in."""
    pipeline = case.build(name)
    for function, stand_in in case.functions.items():
        monkeypatch.setattr(sys.modules[type(pipeline).__module__], function, stand_in)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FLOW = ("FlowMatchEulerDiscreteScheduler", {})
SHIFTED = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})


def kl(latent_channels, **changes):
    return "AutoencoderKL", {
        "block_out_channels": (4,),
        "latent_channels": latent_channels,
        "norm_num_groups": 1,
        "sample_size": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.06,
        "scaling_factor": 1.5,
        **changes,
    }


SIZE = {"height": 32, "width": 32}
STRENGTH = {"strength": 1.0}


def image():
    return {"image": picture()}


def masked():
    return {"image": picture(), "mask_image": picture(mode="L")}


def two_texts(shape, mask=None, name="prompt_embeds", mask_name="prompt_attention_mask"):
    """Embeddings of the prompt and the negative one, with masks."""

    def made():
        found = {name: numbers(*shape), f"negative_{name}": numbers(*shape)}
        if mask is not None:
            found |= {mask_name: mask(shape[0], shape[1]), f"negative_{mask_name}": mask(shape[0], shape[1])}
        return found

    return made


def with_inputs(*makers):
    return lambda: {key: value for make in makers for key, value in make().items()}

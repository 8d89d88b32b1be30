"""How large pictures and videos are that models usually draw, and through which noise levels they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from diffusers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler


class Size(NamedTuple):
    """Of a picture or video.

    side : pixels of its height, and of its width unless `width` says another.
    batch : pictures or videos.
    text_tokens : of each prompt.
    frames : of a video, 1 + a multiple of `token`'s; 1 for a picture.
    token : frames, and pixels of height and width, that one token stands for; the first frame stands alone.
    """

    side: int = 1024
    batch: int = 1
    text_tokens: int = 512
    width: int | None = None
    frames: int = 1
    token: tuple[int, int, int] = (4, 16, 16)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width: each is of 8 by 8 pixels of 4 frames, or of the first frame alone."""
        return 1 + (self.frames - 1) // 4, self.side // 8, (self.width or self.side) // 8

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width in tokens."""
        frames, height, width = self.token
        return 1 + (self.frames - 1) // frames, self.side // height, (self.width or self.side) // width

    @property
    def image_tokens(self) -> int:
        return math.prod(self.grid)

    def described(self) -> dict[str, int]:
        """As results files have it."""
        found = {"resolution": self.side, "batch": self.batch, "text_tokens": self.text_tokens}
        if self.frames > 1 or self.width is not None:
            found |= {"width": self.width or self.side, "frames": self.frames}
        return found


class Sampling(NamedTuple):
    """How a model's pipeline usually samples.

    steps : of a picture
    scheduler : what scheduler/scheduler_config.json of the published weights gives, where it is not the
        default of the scheduler's class
    kind : that class
    by_scheduler : whether the pipeline leaves it to the scheduler which noise levels its steps have
    shift : of image tokens and steps, the scheduler's mu, where the pipeline does not take it from
        `scheduler` by a line
    """

    steps: int
    scheduler: Mapping[str, Any]
    kind: type = FlowMatchEulerDiscreteScheduler
    by_scheduler: bool = False
    shift: Callable[[int, int], float] | None = None

    def sigmas(self, size: Size) -> list[float]:
        """Noise level of each step from 1 down, as the pipelines of diffusers 0.42 set their schedulers."""
        scheduler: Any = self.kind(**self.scheduler)
        if self.by_scheduler:
            scheduler.set_timesteps(self.steps)
            return scheduler.sigmas[:-1].tolist()
        of, tokens = scheduler.config, size.image_tokens
        if self.shift is not None:
            mu = self.shift(tokens, self.steps)
        else:
            slope = (of.max_shift - of.base_shift) / (of.max_image_seq_len - of.base_image_seq_len)
            mu = of.base_shift + slope * (tokens - of.base_image_seq_len)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / self.steps, self.steps), mu=mu)
        return scheduler.sigmas[:-1].tolist()


def _flux2_shift(tokens: int, steps: int) -> float:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(tokens, steps)


# Number of steps: the default of FluxPipeline, ChromaPipeline, Flux2Pipeline, QwenImagePipeline,
# QwenImageEditPlusPipeline, StableDiffusion3Pipeline, WanPipeline, HunyuanVideo15Pipeline and LTX2Pipeline,
# and what the model cards of FLUX.2-klein-4B and Z-Image-Turbo call their pipelines with.
FLUX_SAMPLING = Sampling(28, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15})
CHROMA_SAMPLING = FLUX_SAMPLING._replace(steps=35)  # ChromaPipeline falls back on FLUX.1's shift
FLUX2_KLEIN_SAMPLING = Sampling(4, {"use_dynamic_shifting": True}, shift=_flux2_shift)
FLUX2_DEV_SAMPLING = FLUX2_KLEIN_SAMPLING._replace(steps=50)
QWEN_IMAGE_SAMPLING = Sampling(
    50,
    {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
)
SD3_SAMPLING = Sampling(28, {"shift": 3.0}, by_scheduler=True)
Z_IMAGE_SAMPLING = Sampling(9, {"shift": 3.0})
# The shift is the one that the example of diffusers' WanPipeline has for 480p.
WAN_SAMPLING = Sampling(
    50,
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    UniPCMultistepScheduler,
    by_scheduler=True,
)
HUNYUAN_SAMPLING = Sampling(50, {"shift": 5.0})  # of the published 480p weights
LTX2_SAMPLING = Sampling(
    30,
    {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
)

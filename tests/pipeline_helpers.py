"""A pipeline around a tiny FLUX that needs no text encoder."""

import zlib

import torch
from helpers import IMAGE_TOKENS, TEXT_TOKENS

from rtlynx import schedule


class TinyPipeline:
    """Stands in for a diffusers pipeline: text by a hash, Euler steps from t = 1, optional guidance pass."""

    def __init__(self, transformer, interrupt_at=None):
        self.transformer = transformer
        self.batches = []  # prompts of each call
        self.interrupt_at = interrupt_at  # number of the call that a user interrupts half-way
        self._progress_bar_config = {"leave": False}

    def set_progress_bar_config(self, **settings):
        self._progress_bar_config = settings

    @torch.no_grad()
    def __call__(self, prompt, generator, num_inference_steps=4, guidance_scale=1.0, output_type="pil"):
        self.batches.append(list(prompt))
        own = [torch.Generator().manual_seed(zlib.crc32(one.encode())) for one in prompt]
        text = torch.stack([torch.randn(TEXT_TOKENS, 64, generator=one) for one in own])
        pooled = torch.stack([torch.randn(32, generator=one) for one in own])
        x = torch.stack([torch.randn(IMAGE_TOKENS, 16, generator=one) for one in generator])
        timesteps = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        with schedule(timesteps):
            return self._denoise(x, text, pooled, timesteps, guidance_scale)

    def _denoise(self, x, text, pooled, timesteps, guidance_scale):
        for step, timestep in enumerate(timesteps):
            if step == 1 and self.interrupt_at == len(self.batches):
                raise KeyboardInterrupt
            velocity = 0.0
            for weight in (1.0,) if guidance_scale == 1.0 else (guidance_scale, 1.0 - guidance_scale):
                velocity = (
                    velocity
                    + weight
                    * self.transformer(
                        hidden_states=x,
                        encoder_hidden_states=text * (weight > 0),
                        pooled_projections=pooled * (weight > 0),
                        timestep=torch.full((len(x),), timestep),
                        img_ids=torch.zeros(IMAGE_TOKENS, 3),
                        txt_ids=torch.zeros(TEXT_TOKENS, 3),
                        return_dict=False,
                    )[0]
                )
            x = x - velocity / len(timesteps)
        return x

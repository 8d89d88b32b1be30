"""Text to a small picture with a transformer that works on pixels, of any architecture in the zoo."""

from typing import Any, ClassVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rtlynx_zoo import text
from rtlynx_zoo.patches import PATCH, SIZE, patchify, unpatchify
from rtlynx_zoo.velocity import velocity_of


class EmojiPipeline(DiffusionPipeline):
    """Draws emoji from their names: flow matching in pixel space, Euler steps, classifier-free guidance.

    `transformer` is a FLUX, Qwen-Image or Z-Image model of diffusers: `rtlynx_zoo.velocity` knows what each
    is given and what it returns. Prompts, noise, steps and guidance are the same for all.

    size, channels : of the pictures that the model draws.
    """

    size: ClassVar[int] = SIZE
    channels: ClassVar[int] = 3
    transformer: ModelMixin
    scheduler: FlowMatchEulerDiscreteScheduler
    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]

    def __init__(self, transformer: ModelMixin, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (prompt_embeds (B, 16, 384), pooled_prompt_embeds (B, 384)) in the transformer's dtype.

        Raises ValueError for an empty list, for anything but strings, and for a prompt that is not an emoji's
        name when the text encoder is not installed.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt must be a string or a list of strings; got {prompt!r}")
        if not prompts:
            raise ValueError("prompt is an empty list; give at least one prompt")
        embeds, pooled = text.encode(list(prompts))
        device, dtype = self._execution_device, self.transformer.dtype
        return embeds.to(device, dtype), pooled.to(device, dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 24,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture for each prompt.

        Parameters
        ----------
        prompt:
            One prompt or a list; or pass `prompt_embeds` (B, 16, 384) and `pooled_prompt_embeds` (B, 384).
            Only FLUX reads the latter.
        height, width:
            `size`, the default: the model knows no other.
        num_inference_steps:
            Euler steps. Each costs two transformer passes, or one where `guidance_scale` is 1.
        guidance_scale:
            How far to lean from the null prompt's prediction towards the prompt's; 1 is no guidance.
        generator:
            One for each picture: a seed then gives the same picture alone and in any batch. A single one
            draws the noise of all pictures in turn.
        output_type:
            "pil": PIL images. "pt": a tensor (B, 3, size, size) float32 in [0, 1], grey pictures with three
            equal channels. "latent": patches (B, (size / 4)^2, 16 channels) float32.
        return_dict:
            `ImagePipelineOutput(images=...)`, or the tuple `(images,)`.

        Raises ValueError for input that does not fit this description.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt, or prompt_embeds with pooled_prompt_embeds")
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ValueError("prompt_embeds and pooled_prompt_embeds come together; one of them is missing")
        if any(side not in (None, self.size) for side in (height, width)):
            raise ValueError(
                f"this model draws {self.size}x{self.size} pictures only; got height={height}, width={width}"
            )
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be a positive integer; got {num_inference_steps!r}")
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'pt' or 'latent'; got {output_type!r}")
        device, dtype = self._execution_device, self.transformer.dtype
        if prompt is not None:
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt)
        assert prompt_embeds is not None  # by the checks above
        assert pooled_prompt_embeds is not None
        batch = len(prompt_embeds)
        shape = (batch, text.TEXT_TOKENS, text.TEXT_WIDTH)
        if prompt_embeds.shape != shape or pooled_prompt_embeds.shape != (shape[0], shape[2]):
            raise ValueError(
                "prompt_embeds must be (B, 16, 384) and pooled_prompt_embeds (B, 384); "
                f"got {tuple(prompt_embeds.shape)} and {tuple(pooled_prompt_embeds.shape)}"
            )
        prompt_embeds = prompt_embeds.to(device, dtype)
        pooled_prompt_embeds = pooled_prompt_embeds.to(device, dtype)
        null_embeds, null_pooled = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"{len(generator)} generators for {batch} pictures; give one for each, or a single one"
            )

        # The state stays float32 whatever the transformer computes in: 24 rounded additions would show.
        sample = patchify(_noise(batch, (self.channels, self.size, self.size), generator)).to(device)
        sigmas = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)

        velocity = velocity_of(self.transformer)

        def predict(sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
            return velocity(self.transformer, sample.to(dtype), sigma, embeds, pooled).float()

        with self.progress_bar(total=num_inference_steps) as progress:
            timesteps = self.scheduler.timesteps
            for t in timesteps:
                sigma = (t / 1000).expand(batch)
                prediction = predict(sigma, prompt_embeds, pooled_prompt_embeds)
                if guidance_scale != 1:
                    null = predict(sigma, null_embeds, null_pooled)
                    prediction = null + guidance_scale * (prediction - null)
                sample = self.scheduler.step(prediction, t, sample, return_dict=False)[0]  # type: ignore[arg-type]
                progress.update()

        images: Any = sample
        if output_type != "latent":
            images = (unpatchify(sample) / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        if output_type == "pil":
            images = self.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy())
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class FashionPipeline(EmojiPipeline):
    """Draws clothing from the names of its classes, as `EmojiPipeline` draws emoji: grey pictures of 32x32.

    Prompts are `rtlynx_zoo.prompts.FASHION_CLASSES`. Fashion-MNIST's pictures of 28x28 have two black
    pixels around them here.
    """

    size = 32
    channels = 1


def patch_channels(pipeline: type[EmojiPipeline]) -> int:
    """Channels of a patch: what the transformer of `pipeline` reads of each image token."""
    return pipeline.channels * PATCH**2


def _noise(
    batch: int, shape: tuple[int, int, int], generator: torch.Generator | list[torch.Generator] | None
) -> Tensor:
    """(B, *shape) float32 on the CPU, drawn picture by picture so that a batch's size changes nothing."""
    generators = generator if isinstance(generator, list) else [generator] * batch
    return torch.stack(
        [torch.randn(*shape, generator=g, device=g.device if g else "cpu").cpu() for g in generators]
    )

"""The models that are trained alike: how large each is, how it starts, how it sees a whole batch."""

import fnmatch
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from rtlynx_zoo.patches import GRID, PATCH
from rtlynx_zoo.pipeline import EmojiPipeline, FashionPipeline, patch_channels
from rtlynx_zoo.text import TEXT_TOKENS, TEXT_WIDTH
from rtlynx_zoo.velocity import (
    Z_IMAGE_PATCH,
    Velocity,
    flux_velocity,
    from_latents,
    qwen_image_velocity,
    to_latents,
)
from torch import Tensor, nn

Z_IMAGE_MULTIPLE = 32  # Z-Image fills captions up to a multiple of this (SEQ_MULTI_OF in diffusers)


@dataclass(frozen=True)
class Architecture:
    """One model class of diffusers at the size of the zoo.

    class_name, config : the class and its arguments.
    zeroed : names, with wildcards, of the linear layers that start at zero: modulation and output.
    velocity : what `rtlynx_zoo.velocity` gives for the class, or the same function made quick for batches.
    pipeline : what draws with it, and says how large its pictures are.
    """

    class_name: str
    config: dict[str, Any]
    zeroed: tuple[str, ...]
    velocity: Velocity
    pipeline: type[EmojiPipeline] = EmojiPipeline

    def of_width(self, width: int) -> "Architecture":
        """The same model at another width: heads of the same size, more or fewer of them.

        Raises
        ------
        ValueError
            If the class is not given its width in heads, or `width` is no multiple of a head.
        """
        head = self.config.get("attention_head_dim")
        if head is None:
            raise ValueError(f"the width of a {self.class_name} is not given in heads: leave out --width")
        if width < head or width % head:
            raise ValueError(f"--width is a multiple of {head}, the size of a head; got {width}")
        return replace(self, config={**self.config, "num_attention_heads": width // head})

    def build(self) -> Any:
        """The model with the class's own random weights, float32."""
        return getattr(diffusers, self.class_name)(**self.config)

    def initialize(self, model: nn.Module) -> None:
        """Modulated blocks start as the identity (modulation at zero) and the output at zero, as in DiT."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.zeroed):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def z_image_batch_velocity(
    model: Any, state: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor
) -> Tensor:
    """`z_image_velocity` without a loop over pictures: (B, 256, 48), (B,), (B, 16, 384) -> (B, 256, 48).

    ZImageTransformer2DModel.forward takes lists and lays out positions, padding and masks picture by picture,
    some forty small operations each, which at 256 pictures outlast the step itself. Where all pictures and
    all captions are alike in size, its layers can be run on plain batches.
    """
    patch = f"{Z_IMAGE_PATCH}-1"
    image_freqs, text_freqs = _z_image_rotations(model, state.device)
    modulation = model.t_embedder((1 - sigma) * model.t_scale).to(state.dtype)

    latents = to_latents(state).unflatten(2, (GRID, Z_IMAGE_PATCH)).unflatten(4, (GRID, Z_IMAGE_PATCH))
    patches = latents.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, 256, 2 * 2 * 12)
    # The model's own forward comes to the same type here, by mixing in its padding token: under autocast,
    # too, the residual stream is float32.
    image = model.all_x_embedder[patch](patches).to(model.x_pad_token.dtype)  # (B, 256, D)
    for block in model.noise_refiner:
        image = block(image, None, image_freqs, modulation)

    text = model.cap_embedder(embeds).to(model.cap_pad_token.dtype)  # (B, 16, D)
    padding = model.cap_pad_token.expand(len(text), -TEXT_TOKENS % Z_IMAGE_MULTIPLE, -1)
    text = torch.cat([text, padding], dim=1)  # (B, 32, D)
    for block in model.context_refiner:
        text = block(text, None, text_freqs)

    both, both_freqs = torch.cat([image, text], dim=1), torch.cat([image_freqs, text_freqs], dim=1)
    for block in model.layers:
        both = block(both, None, both_freqs, modulation)
    patches = model.all_final_layer[patch](both, c=modulation)[:, : GRID * GRID]  # (B, 256, 2 * 2 * 12)
    latents = patches.unflatten(2, (Z_IMAGE_PATCH, Z_IMAGE_PATCH, -1)).unflatten(1, (GRID, GRID))
    return -from_latents(latents.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


def _z_image_rotations(model: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Complex rotary factors of picture (1, 256, d / 2) and caption (1, 32, d / 2).

    The caption stands at (1..32, 0, 0), the picture at (33, row, column).
    """
    length = TEXT_TOKENS + -TEXT_TOKENS % Z_IMAGE_MULTIPLE
    grid = model.create_coordinate_grid
    text = grid((length, 1, 1), (1, 0, 0), device).flatten(0, 2)
    image = grid((1, GRID, GRID), (length + 1, 0, 0), device).flatten(0, 2)
    return model.rope_embedder(image)[None], model.rope_embedder(text)[None]


_FLUX = Architecture(
    class_name="FluxTransformer2DModel",
    config=dict(
        in_channels=3 * PATCH**2,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    ),
    zeroed=("*.norm*", "norm_out.*", "proj_out"),
    velocity=flux_velocity,
)

ARCHITECTURES = {
    "flux": _FLUX,
    # 9.2 million parameters: 18 MB in bfloat16. A picture is 64 tokens, a quarter of the emoji models', so
    # that widths up to 1,024 are trained in minutes.
    "flux-fashion": replace(
        _FLUX,
        config={
            **_FLUX.config,
            "in_channels": patch_channels(FashionPipeline),
            "num_layers": 2,
            "num_single_layers": 4,
        },
        pipeline=FashionPipeline,
    ),
    "qwen-image": Architecture(
        class_name="QwenImageTransformer2DModel",
        config=dict(
            patch_size=2,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2 // 4,
            num_layers=6,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 24, 24),
        ),
        zeroed=("*.img_mod.*", "*.txt_mod.*", "norm_out.*", "proj_out"),
        velocity=qwen_image_velocity,
    ),
    # At width 288 the gated MLP has 768 hidden features: int(8 D / 3) divides by 16 only where D is one of
    # 6, 12, ..., and D itself only where it is one of 48, 96, ...
    "z-image": Architecture(
        class_name="ZImageTransformer2DModel",
        config=dict(
            in_channels=3 * (PATCH // Z_IMAGE_PATCH) ** 2,
            dim=288,
            n_layers=8,
            n_refiner_layers=1,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[16, 16, 16],
            axes_lens=[64, GRID, GRID],
        ),
        zeroed=("*.adaLN_modulation.*", "all_final_layer.*"),
        velocity=z_image_batch_velocity,
    ),
}

"""How each architecture is asked for the velocity of the flow: its arguments, its time, its sign.

The flow leads from a picture x at noise level sigma = 0 to noise e at sigma = 1 in a straight line,
z = x + sigma (e - x). The velocity is dz / d sigma = e - x: what FLUX and Qwen-Image predict, and what
diffusers' FlowMatchEulerDiscreteScheduler takes.

Here the state z is always patches, (B, 256, 48) of emoji, the text always 16 token states (B, 16, 384) and
their mean (B, 384), whatever the model wants to see. FLUX takes square pictures of any size. All pictures are
of one size and all captions of one length, so no model needs a mask.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx_zoo.patches import GRID, grid_of, patchify, unpatchify
from rtlynx_zoo.text import TEXT_TOKENS

# (model, state (B, 256, 48), sigma (B,), prompt_embeds (B, 16, 384), pooled (B, 384)) -> (B, 256, 48)
Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]

Z_IMAGE_PATCH = 2  # the only patch of Z-Image: it sees a picture as 12 channels of 32x32


def position_ids(device: torch.device | str = "cpu", grid: int = GRID) -> tuple[Tensor, Tensor]:
    """(img_ids (grid², 3), txt_ids (16, 3)) float32: an image token's (0, row, column); zeros for text."""
    image = torch.zeros(grid, grid, 3, device=device)
    image[..., 1] = torch.arange(grid, device=device)[:, None]
    image[..., 2] = torch.arange(grid, device=device)[None, :]
    return image.flatten(0, 1), torch.zeros(TEXT_TOKENS, 3, device=device)


def flux_velocity(model: nn.Module, state: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """FluxTransformer2DModel: the timestep is sigma."""
    img_ids, txt_ids = position_ids(state.device, grid_of(state))
    return model(
        hidden_states=state,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma.to(state.dtype),
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )[0]


def qwen_image_velocity(
    model: nn.Module, state: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor
) -> Tensor:
    """QwenImageTransformer2DModel: as FLUX, but no pooled text, and positions from the picture's shape."""
    return model(
        hidden_states=state,
        encoder_hidden_states=embeds,
        timestep=sigma.to(state.dtype),
        img_shapes=[[(1, GRID, GRID)]] * len(state),
        return_dict=False,
    )[0]


def z_image_velocity(
    model: nn.Module, state: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor
) -> Tensor:
    """ZImageTransformer2DModel: time rises from noise to picture, and it predicts x - e: the sign turns.

    Lists of latents (12, 1, 32, 32) and captions (16, 384), one a picture; captions are filled up to 32
    tokens by the model's own padding token. Time stays in float32, as in diffusers' ZImagePipeline.
    """
    predictions = model(
        x=list(to_latents(state).unsqueeze(2).unbind(0)),
        t=1 - sigma.float(),
        cap_feats=list(embeds.unbind(0)),
        return_dict=False,
    )[0]
    return -from_latents(torch.stack(predictions).squeeze(2))


def to_latents(state: Tensor) -> Tensor:
    """Patches (B, 256, 48) -> Z-Image's latents (B, 12, 32, 32)."""
    return F.pixel_unshuffle(unpatchify(state), Z_IMAGE_PATCH)


def from_latents(latents: Tensor) -> Tensor:
    """Z-Image's latents (B, 12, 32, 32) -> patches (B, 256, 48)."""
    return patchify(F.pixel_shuffle(latents, Z_IMAGE_PATCH))


VELOCITIES: dict[str, Velocity] = {
    "FluxTransformer2DModel": flux_velocity,
    "QwenImageTransformer2DModel": qwen_image_velocity,
    "ZImageTransformer2DModel": z_image_velocity,
}


def velocity_of(model: nn.Module) -> Velocity:
    """The function for `model`, by its class or a base class. Raises ValueError for any other model."""
    for base in type(model).__mro__:
        if base.__name__ in VELOCITIES:
            return VELOCITIES[base.__name__]
    raise ValueError(f"a {type(model).__name__} cannot draw emoji; only {', '.join(VELOCITIES)} can")

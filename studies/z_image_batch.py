"""Z-Image on hundreds of small pictures of one size, without diffusers' work in Python for each of them.

diffusers pads, numbers and joins the tokens of one picture at a time, some fifty launches each, which at the
study's batches takes many times what the transformer does. Pictures of one size and captions of one length
need it once.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor


def batch_equal_pictures(model: Any) -> None:
    """Let a ZImageTransformer2DModel prepare equal pictures together; the numbers stay what they are.

    Lists of unequal pictures or captions go diffusers' way.
    """
    model.patchify_and_embed = MethodType(_patchify_and_embed, model)
    model._build_unified_sequence = MethodType(_build_unified_sequence, model)


def _patchify_and_embed(
    self: Any, images: list[Tensor], captions: list[Tensor], patch: int, frames: int
) -> tuple[list[Any], ...]:
    """diffusers' for the first picture, of which all others have the positions and the padding."""
    whole = type(self).patchify_and_embed
    if len({image.shape for image in images}) > 1 or len({caption.shape for caption in captions}) > 1:
        return whole(self, images, captions, patch, frames)
    _, _, *same = whole(self, images[:1], captions[:1], patch, frames)

    def tokens(image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        (x,), (text,), *_ = whole(self, [image], [caption], patch, frames)
        return x, text

    x, text = torch.vmap(tokens)(torch.stack(images), torch.stack(captions))
    return list(x), list(text), *(one * len(images) for one in same)


def _build_unified_sequence(
    self: Any,
    x: Tensor,
    x_freqs: Tensor,
    x_lengths: list[int],
    x_noise: Any,
    text: Tensor,
    text_freqs: Tensor,
    text_lengths: list[int],
    *rest: Any,
) -> tuple[Any, ...]:
    """diffusers', where pictures have one size and captions one length; without Z-Image-Omni's parts."""
    *_, omni, _device = rest
    if omni or len({*x_lengths}) > 1 or len({*text_lengths}) > 1:
        whole = type(self)._build_unified_sequence
        return whole(self, x, x_freqs, x_lengths, x_noise, text, text_freqs, text_lengths, *rest)
    return torch.cat([x, text], dim=1), torch.cat([x_freqs, text_freqs], dim=1), None, None

"""HunyuanVideo 1.5 draws without asking the card, so that a CUDA graph can hold a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE_TOKENS, GLYPH_TOKENS, WORD_TOKENS = 729, 256, 1000  # HunyuanVideo15Pipeline pads to these


def tokens_of_text(
    model: Any,
    timestep: Tensor,
    words: Tensor,
    words_mask: Tensor,
    glyphs: Tensor,
    glyphs_mask: Tensor,
    image: Tensor,
) -> tuple[Tensor, Tensor]:
    """The text stream of a video of a prompt alone, and its mask: valid tokens come before padding."""
    words = model.context_embedder(words, timestep, words_mask)
    glyphs = model.context_embedder_2(glyphs)
    image = model.image_embedder(image) * 0.0
    streams = [
        stream + model.cond_type_embed(stream.new_full(stream.shape[:2], kind, dtype=torch.long))
        for kind, stream in ((2, image), (1, glyphs), (0, words))
    ]
    words_mask, glyphs_mask = words_mask.bool(), glyphs_mask.bool()
    streams[1:] = [
        torch.where(mask[..., None], stream, torch.zeros_like(stream))
        for mask, stream in zip((glyphs_mask, words_mask), streams[1:], strict=True)
    ]
    tokens = torch.cat(streams, dim=1)
    mask = torch.cat([glyphs_mask.new_zeros(image.shape[:2]), glyphs_mask, words_mask], dim=1)
    order = torch.argsort(~mask, dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), mask.gather(1, order)


def forward(
    model: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    encoder_hidden_states_2: Tensor,
    encoder_attention_mask_2: Tensor,
    image_embeds: Tensor,
    return_dict: bool = True,
) -> tuple[Tensor]:
    """HunyuanVideo15Transformer3DModel.forward of zero `image_embeds`, for `return_dict=False`.

    The class's asks the card whether there is a picture, and how many tokens are valid.
    """
    if return_dict:
        raise ValueError("this forward gives a tuple alone: pass return_dict=False")
    batch, _, *grid = hidden_states.shape
    rotations = model.rope(hidden_states)
    temb = model.time_embed(timestep)
    video = model.x_embedder(hidden_states)
    text, mask = tokens_of_text(
        *(model, timestep, encoder_hidden_states, encoder_attention_mask),
        *(encoder_hidden_states_2, encoder_attention_mask_2, image_embeds),
    )
    for block in model.transformer_blocks:
        video, text = block(video, text, temb, mask, rotations)
    video = model.proj_out(model.norm_out(video, temb))  # tokens of one latent each
    return (video.view(batch, *grid, -1).permute(0, 4, 1, 2, 3),)

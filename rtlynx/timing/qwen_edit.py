"""Qwen-Image-Edit 2511 draws without a copy from the host, so that a CUDA graph can hold a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def forward(
    model: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_shapes: Sequence[Sequence[tuple[int, int, int]]],
    return_dict: bool = True,
) -> tuple[Tensor]:
    """QwenImageTransformer2DModel.forward with `zero_cond_t`, for `return_dict=False`.

    The class's makes a list of which tokens are drawn, and copies it to the card. Pictures of a batch are of
    one size here.
    """
    if return_dict:
        raise ValueError("this forward gives a tuple alone: pass return_dict=False")
    image = model.img_in(hidden_states)
    text = model.txt_in(model.txt_norm(encoder_hidden_states))
    timestep = timestep.to(image.dtype)
    temb = model.time_text_embed(torch.cat([timestep, timestep * 0]), image, None)
    edited = torch.arange(image.shape[1], device=image.device) >= math.prod(img_shapes[0][0])
    index = edited.int().repeat(len(image), 1)
    rotations = model.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
    for block in model.transformer_blocks:
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None,
            temb=temb,
            image_rotary_emb=rotations,
            joint_attention_kwargs=None,
            modulate_index=index,
        )
    return (model.proj_out(model.norm_out(image, temb.chunk(2)[0])),)

"""Qwen-Image: double blocks only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtlynx.models.architecture import Architecture, LayerRule
from rtlynx.models.fusion import feed_forward, read_by_attention
from rtlynx.reading import adaln

BLOCK = "transformer_blocks.*"


def block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[Tensor, Tensor]:
    """QwenImageTransformerBlock.forward; modulation by token (Qwen-Image-Edit 2511) stays diffusers' own."""
    if modulate_index is not None or block.zero_cond_t:
        return type(block).forward(
            block,
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
            modulate_index,
        )
    attn = block.attn
    shift, scale, gate, *mlp = block.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, text_gate, *text_mlp = block.txt_mod(temb).chunk(6, dim=-1)
    image, text = attn(
        hidden_states=read_by_attention(
            attn, adaln(block.img_norm1, hidden_states, shift, scale), attn.to_q, attn.to_k, attn.to_v
        ),
        encoder_hidden_states=read_by_attention(
            attn,
            adaln(block.txt_norm1, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = hidden_states + gate.unsqueeze(1) * image
    encoder_hidden_states = encoder_hidden_states + text_gate.unsqueeze(1) * text
    shift, scale, gate = mlp
    image = feed_forward(block.img_mlp, adaln(block.img_norm2, hidden_states, shift, scale))
    hidden_states = hidden_states + gate.unsqueeze(1) * image
    shift, scale, gate = text_mlp
    text = feed_forward(block.txt_mlp, adaln(block.txt_norm2, encoder_hidden_states, shift, scale))
    encoder_hidden_states = encoder_hidden_states + gate.unsqueeze(1) * text
    if hidden_states.dtype is torch.float16:
        encoder_hidden_states, hidden_states = (
            x.clip(-65504, 65504) for x in (encoder_hidden_states, hidden_states)
        )
    return encoder_hidden_states, hidden_states


QWEN_IMAGE = Architecture(
    class_name="QwenImageTransformer2DModel",
    rules=(
        *(LayerRule(f"{BLOCK}.attn.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.img_mlp.net.0.proj", "mlp-up"),
        LayerRule(f"{BLOCK}.img_mlp.net.2", "mlp-down"),
        *(LayerRule(f"{BLOCK}.attn.add_{x}_proj", "attention-in", "text", "text_attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn.to_add_out", "attention-out", "text"),
        LayerRule(f"{BLOCK}.txt_mlp.net.0.proj", "mlp-up", "text"),
        LayerRule(f"{BLOCK}.txt_mlp.net.2", "mlp-down", "text"),
    ),
    fused={"QwenImageTransformerBlock": block},
)

"""Qwen-Image, and its models for editing: double blocks only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule
from rtlynx.models.fusion import (
    GatedMlp,
    attend,
    finite_half,
    follows,
    heads,
    modulated,
    read_by_attention,
    real_pairs,
    rows_of_modulation,
)
from rtlynx.nn.lora import untouched
from rtlynx.nn.modulation import modulation
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.prologue import adaln

BLOCK = "transformer_blocks.*"


def attention(
    attn: Any,
    hidden_states: Tensor | PreparedInput,
    encoder_hidden_states: Tensor | PreparedInput,
    encoder_hidden_states_mask: Tensor | None,
    image_rotary_emb: Any,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """QwenDoubleStreamAttnProcessor2_0.__call__, where that is what `attn` does."""
    if others or not follows(attn, "QwenDoubleStreamAttnProcessor2_0"):
        return attn(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **others,
        )
    return attention_of(
        attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, image_rotary_emb
    )


def attention_of(
    attn: Any,
    hidden_states: Tensor | PreparedInput,
    encoder_hidden_states: Tensor | PreparedInput,
    encoder_hidden_states_mask: Tensor | None,
    image_rotary_emb: Any,
) -> tuple[Tensor, Tensor]:
    """What QwenDoubleStreamAttnProcessor2_0 computes; rotation in real numbers."""
    mask, text_tokens = None, encoder_hidden_states.shape[1]
    if encoder_hidden_states_mask is not None:
        whole = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        mask = torch.cat([encoder_hidden_states_mask, whole], dim=1)[:, None, None, :]
    image_rotary, text_rotary = (real_pairs(one) for one in image_rotary_emb or (None, None))
    layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text = heads(attn, encoder_hidden_states, layers, (attn.norm_added_q, attn.norm_added_k), text_rotary)
    layers = (attn.to_q, attn.to_k, attn.to_v)
    image = heads(attn, hidden_states, layers, (attn.norm_q, attn.norm_k), image_rotary)
    y = attend(attn, [text, image], mask)
    image_part, text_part = y[:, text_tokens:], y[:, :text_tokens]
    for layer in attn.to_out:
        image_part = layer(image_part)
    return image_part, attn.to_add_out(text_part)


def block(
    block: Any,
    _original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """QwenImageTransformerBlock.forward.

    Where Qwen-Image-Edit 2511 gives tokens of reference pictures the timestep zero (`zero_cond_t`), temb has
    rows for the timestep of each picture, then for zero, and `modulate_index` (B, T) is 1 for such tokens.
    """
    attn = block.attn
    shift, scale, gate, *mlp = _modulation(block.img_mod, temb).chunk(6, dim=-1)
    text_temb = temb.chunk(2)[0] if block.zero_cond_t else temb
    text_shift, text_scale, text_gate, *text_mlp = _modulation(block.txt_mod, text_temb).chunk(6, dim=-1)
    choice = None if modulate_index is None else rows_of_modulation(modulate_index, len(temb) // 2)
    image, text = attention(
        attn,
        read_by_attention(
            attn,
            modulated(block.img_norm1, hidden_states, shift, scale, choice),
            *(attn.to_q, attn.to_k, attn.to_v),
        ),
        read_by_attention(
            attn,
            adaln(block.txt_norm1, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        encoder_hidden_states_mask,
        image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    go_on = GatedMlp(block.img_norm2, block.img_mlp, gate, mlp, choice=choice)
    hidden_states = go_on(hidden_states, image)
    go_on = GatedMlp(block.txt_norm2, block.txt_mlp, text_gate, text_mlp)
    return finite_half(go_on(encoder_hidden_states, text)), finite_half(hidden_states)


def _modulation(layers: Any, temb: Tensor) -> Tensor:
    """`layers`(temb), of SiLU and a linear layer."""
    silu, linear = layers
    return modulation(silu, linear, temb) if untouched(layers) else layers(temb)


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
    attentions=(
        AttentionRule(BLOCK, "attn", ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
    ),
    mlps=(
        MlpRule(BLOCK, ("img_mlp", "img_mlp.net.0"), ("img_mlp.net.0.proj",), "img_mlp.net.2"),
        MlpRule(BLOCK, ("txt_mlp", "txt_mlp.net.0"), ("txt_mlp.net.0.proj",), "txt_mlp.net.2"),
    ),
    modulation=(f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1"),
    fused={"QwenImageTransformerBlock": block},
)

"""Qwen-Image: double blocks only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rtlynx.models.architecture import Architecture, LayerRule
from rtlynx.models.fusion import GatedMlp, finite_half, read_by_attention
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
    hidden_states = GatedMlp(block.img_norm2, block.img_mlp, gate, mlp)(hidden_states, image)
    go_on = GatedMlp(block.txt_norm2, block.txt_mlp, text_gate, text_mlp)
    return finite_half(go_on(encoder_hidden_states, text)), finite_half(hidden_states)


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

"""Chroma: the blocks of FLUX.1, whose modulation is made outside them, for all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from rtlynx.models.flux import FLUX
from rtlynx.models.fusion import GatedMlp, finite_half, read_by_attention
from rtlynx.nn.prologue import adaln, concat_activated, read


def pairs_of_tokens(mask: Tensor | None) -> Tensor | None:
    """(B, 1, T, T): which tokens attend to which, of the tokens (B, T) that are there."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


def double_block(
    block: Any,
    _original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """ChromaTransformerBlock.forward; temb (B, 12, D), of the image and then of the text."""
    attn = block.attn
    shift, scale, gate, *mlp = temb[:, :6].unbind(1)
    text_shift, text_scale, text_gate, *text_mlp = temb[:, 6:].unbind(1)
    outputs = attn(
        hidden_states=read_by_attention(
            attn, adaln(block.norm1.norm, hidden_states, shift, scale), attn.to_q, attn.to_k, attn.to_v
        ),
        encoder_hidden_states=read_by_attention(
            attn,
            adaln(block.norm1_context.norm, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        image_rotary_emb=image_rotary_emb,
        attention_mask=pairs_of_tokens(attention_mask),
        **(joint_attention_kwargs or {}),
    )
    image, text, *adapter = outputs
    hidden_states = GatedMlp(block.norm2, block.ff, gate, mlp)(hidden_states, image)
    for one in adapter:
        hidden_states = hidden_states + one
    go_on = GatedMlp(block.norm2_context, block.ff_context, text_gate, text_mlp)
    return finite_half(go_on(encoder_hidden_states, text)), hidden_states


def single_block(
    block: Any,
    _original: Callable[..., Tensor],
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """ChromaSingleTransformerBlock.forward, over text and image tokens; temb (B, 3, D)."""
    attn = block.attn
    shift, scale, gate = temb.unbind(1)
    prologue = adaln(block.norm.norm, hidden_states, shift, scale)
    x = read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    mlp = block.proj_mlp(x)
    attention = attn(
        hidden_states=x,
        image_rotary_emb=image_rotary_emb,
        attention_mask=pairs_of_tokens(attention_mask),
        **(joint_attention_kwargs or {}),
    )
    out = block.proj_out(read(concat_activated(attention, block.act_mlp, mlp), block.proj_out))
    return finite_half(hidden_states + gate.unsqueeze(1) * out)


# Its layers are those of FLUX.1, by the same names.
CHROMA = replace(
    FLUX,
    class_name="ChromaTransformer2DModel",
    fused={"ChromaTransformerBlock": double_block, "ChromaSingleTransformerBlock": single_block},
)

"""Wan 2.1 and 2.2: blocks of self-attention, cross-attention to the prompt, and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule
from rtlynx.models.fusion import feed_forward, read_by_attention
from rtlynx.nn.prologue import Modulation, adaln_float32, affine_layernorm

BLOCK = "blocks.*"


def modulation(table: Tensor, temb: Tensor) -> tuple[Modulation, ...]:
    """Shift, scale and gate of self-attention, then of the MLP, which the model adds up in float32.

    table (1, 6, K). temb (B, 6, K), or (B, T, 6, K) where each token has a timestep of its own, as in Wan 2.2
    5B.
    """
    if temb.ndim == 4:
        return tuple(map(Modulation, temb.unbind(2), table[0].unbind(0)))
    return tuple(map(Modulation, (table + temb.float()).chunk(6, dim=1)))


def block(
    block: Any,
    _original: Callable[..., Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Tensor:
    """WanTransformerBlock.forward."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(block.scale_shift_table, temb)
    x, attn, cross = hidden_states, block.attn1, block.attn2
    prologue = adaln_float32(block.norm1, x, shift, scale)
    out = attn(read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v), None, None, rotary_emb)
    x = (x.float() + out * gate.whole(torch.float32)).type_as(x)
    norm: Any = block.norm2
    normed = (
        x
        if isinstance(norm, nn.Identity)
        else read_by_attention(cross, affine_layernorm(norm, x), cross.to_q)
    )
    x = x + cross(normed, encoder_hidden_states, None, None)
    out = feed_forward(block.ffn, adaln_float32(block.norm3, x, mlp_shift, mlp_scale))
    return (x.float() + out.float() * mlp_gate.whole(torch.float32)).type_as(x)


WAN = Architecture(
    class_name="WanTransformer3DModel",
    rules=(
        *(LayerRule(f"{BLOCK}.attn1.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn1.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.attn2.to_q", "attention-in"),
        # The prompt, and beside it, in some image-to-video models, a picture.
        *(LayerRule(f"{BLOCK}.attn2.to_{x}", "attention-in", "text", "prompt") for x in "kv"),
        *(LayerRule(f"{BLOCK}.attn2.add_{x}_proj", "attention-in", "text", "picture") for x in "kv"),
        LayerRule(f"{BLOCK}.attn2.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.ffn.net.0.proj", "mlp-up"),
        LayerRule(f"{BLOCK}.ffn.net.2", "mlp-down"),
    ),
    attentions=(
        AttentionRule(BLOCK, "attn1", ("attn1.to_v",), ("attn1.to_out.0",)),
        # What it reads of prompt and picture is added up, in the same basis.
        AttentionRule(BLOCK, "attn2", ("attn2.to_v", "attn2.add_v_proj"), ("attn2.to_out.0",)),
    ),
    mlps=(MlpRule(BLOCK, ("ffn", "ffn.net.0"), ("ffn.net.0.proj",), "ffn.net.2"),),
    fused={"WanTransformerBlock": block},
)

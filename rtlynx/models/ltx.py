"""LTX-Video 0.9: blocks of self-attention, cross-attention to the prompt, and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule
from rtlynx.models.fusion import feed_forward, read_by_attention
from rtlynx.nn.prologue import Modulation, rms_adaln

BLOCK = "transformer_blocks.*"


def modulation_of(table: Tensor, temb: Tensor) -> tuple[Modulation, ...]:
    """Rows of table (N, K), to each of which the model adds its part of temb (B, T, N K).

    T is 1, or the number of tokens where each has a timestep of its own, as beside a given picture.
    """
    table, own = table.to(temb.device), temb.unflatten(2, table.shape)
    if own.shape[1] == 1:
        return tuple(map(Modulation, (table[None, None] + own).unbind(dim=2)))
    return tuple(map(Modulation, own.unbind(dim=2), table.unbind(0)))


def block(
    block: Any,
    _original: Callable[..., Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """LTXVideoTransformerBlock.forward."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation_of(block.scale_shift_table, temb)
    x, attn = hidden_states, block.attn1
    prologue = rms_adaln(block.norm1, x, shift, scale)
    inputs = read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v)
    x = x + attn(inputs, image_rotary_emb=image_rotary_emb) * gate.whole()
    x = x + block.attn2(x, encoder_hidden_states, encoder_attention_mask)
    out = feed_forward(block.ff, rms_adaln(block.norm2, x, mlp_shift, mlp_scale))
    return x + out * mlp_gate.whole()


LTX = Architecture(
    class_name="LTXVideoTransformer3DModel",
    rules=(
        *(LayerRule(f"{BLOCK}.attn1.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn1.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.attn2.to_q", "attention-in"),
        *(LayerRule(f"{BLOCK}.attn2.to_{x}", "attention-in", "text", "prompt") for x in "kv"),
        LayerRule(f"{BLOCK}.attn2.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.ff.net.0.proj", "mlp-up"),
        LayerRule(f"{BLOCK}.ff.net.2", "mlp-down"),
    ),
    attentions=tuple(
        AttentionRule(BLOCK, attn, (f"{attn}.to_v",), (f"{attn}.to_out.0",)) for attn in ("attn1", "attn2")
    ),
    mlps=(MlpRule(BLOCK, ("ff", "ff.net.0"), ("ff.net.0.proj",), "ff.net.2"),),
    fused={"LTXVideoTransformerBlock": block},
)

"""HunyuanVideo 1.5: double blocks only; prompts, glyphs and a given picture are its text stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule
from rtlynx.models.fusion import GatedMlp, read_by_attention
from rtlynx.nn.prologue import adaln

BLOCK = "transformer_blocks.*"


def block(
    block: Any,
    _original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    *_args: Any,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """HunyuanVideo15TransformerBlock.forward."""
    attn, norm, norm_text = block.attn, block.norm1, block.norm1_context
    shift, scale, gate, *mlp = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    text_shift, text_scale, text_gate, *text_mlp = norm_text.linear(norm_text.silu(temb)).chunk(6, dim=1)
    video, text = attn(
        hidden_states=read_by_attention(
            attn, adaln(norm.norm, hidden_states, shift, scale), attn.to_q, attn.to_k, attn.to_v
        ),
        encoder_hidden_states=read_by_attention(
            attn,
            adaln(norm_text.norm, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    go_on = GatedMlp(block.norm2, block.ff, gate, mlp)
    go_on_text = GatedMlp(block.norm2_context, block.ff_context, text_gate, text_mlp)
    return go_on(hidden_states, video), go_on_text(encoder_hidden_states, text)


HUNYUAN_VIDEO15 = Architecture(
    class_name="HunyuanVideo15Transformer3DModel",
    rules=(
        *(LayerRule(f"{BLOCK}.attn.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.ff.net.0.proj", "mlp-up"),
        LayerRule(f"{BLOCK}.ff.net.2", "mlp-down"),
        *(LayerRule(f"{BLOCK}.attn.add_{x}_proj", "attention-in", "text", "text_attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn.to_add_out", "attention-out", "text"),
        LayerRule(f"{BLOCK}.ff_context.net.0.proj", "mlp-up", "text"),
        LayerRule(f"{BLOCK}.ff_context.net.2", "mlp-down", "text"),
    ),
    attentions=(
        AttentionRule(BLOCK, "attn", ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
    ),
    mlps=tuple(
        MlpRule(BLOCK, (ff, f"{ff}.net.0"), (f"{ff}.net.0.proj",), f"{ff}.net.2")
        for ff in ("ff", "ff_context")
    ),
    fused={"HunyuanVideo15TransformerBlock": block},
)

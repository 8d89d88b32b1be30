"""Stable Diffusion 3 and 3.5: double blocks; some of 3.5 medium have a second attention over the image."""

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
    original: Callable[..., tuple[Tensor | None, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """JointTransformerBlock.forward; MLPs in chunks (`enable_forward_chunking`) stay diffusers' own."""
    if block._chunk_size is not None:
        return original(block, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    attn, norm, norm_text, others = block.attn, block.norm1, block.norm1_context, joint_attention_kwargs or {}
    # Of attention, of the MLP and, in some blocks, of the second attention.
    shift, scale, gate, *mlp = norm.linear(norm.silu(temb)).chunk(9 if block.use_dual_attention else 6, dim=1)
    mlp, second = mlp[:3], mlp[3:]
    if block.context_pre_only:  # the last block, after which nothing reads the text
        text_scale, text_shift = norm_text.linear(norm_text.silu(temb).to(hidden_states.dtype)).chunk(
            2, dim=1
        )
    else:
        modulation = norm_text.linear(norm_text.silu(temb)).chunk(6, dim=1)
        text_shift, text_scale, text_gate, *text_mlp = modulation
    image, text = attn(
        hidden_states=read_by_attention(
            attn, adaln(norm.norm, hidden_states, shift, scale), attn.to_q, attn.to_k, attn.to_v
        ),
        encoder_hidden_states=read_by_attention(
            attn,
            adaln(norm_text.norm, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        **others,
    )
    if second:
        attn, (shift, scale, second_gate) = block.attn2, second
        prologue = adaln(norm.norm, hidden_states, shift, scale)
        hidden_states = hidden_states + gate.unsqueeze(1) * image
        image = attn(
            hidden_states=read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v), **others
        )
        gate = second_gate
    hidden_states = GatedMlp(block.norm2, block.ff, gate, mlp)(hidden_states, image)
    if block.context_pre_only:
        return None, hidden_states
    go_on = GatedMlp(block.norm2_context, block.ff_context, text_gate, text_mlp)
    return go_on(encoder_hidden_states, text), hidden_states


SD3 = Architecture(
    class_name="SD3Transformer2DModel",
    rules=(
        *(LayerRule(f"{BLOCK}.attn.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn.to_out.0", "attention-out"),
        *(LayerRule(f"{BLOCK}.attn2.to_{x}", "attention-in", "image", "attention2") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn2.to_out.0", "attention-out"),
        LayerRule(f"{BLOCK}.ff.net.0.proj", "mlp-up"),
        LayerRule(f"{BLOCK}.ff.net.2", "mlp-down"),
        *(LayerRule(f"{BLOCK}.attn.add_{x}_proj", "attention-in", "text", "text_attention") for x in "qkv"),
        LayerRule(f"{BLOCK}.attn.to_add_out", "attention-out", "text"),
        LayerRule(f"{BLOCK}.ff_context.net.0.proj", "mlp-up", "text"),
        LayerRule(f"{BLOCK}.ff_context.net.2", "mlp-down", "text"),
    ),
    attentions=(
        AttentionRule(BLOCK, "attn", ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
        AttentionRule(BLOCK, "attn2", ("attn2.to_v",), ("attn2.to_out.0",)),
    ),
    mlps=(
        MlpRule(BLOCK, ("ff", "ff.net.0"), ("ff.net.0.proj",), "ff.net.2"),
        MlpRule(BLOCK, ("ff_context", "ff_context.net.0"), ("ff_context.net.0.proj",), "ff_context.net.2"),
    ),
    fused={"JointTransformerBlock": block},
)

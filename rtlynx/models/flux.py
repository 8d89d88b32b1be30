"""FLUX.1: double blocks with an image and a text stream, then single blocks over both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule, TextRows
from rtlynx.models.fusion import GatedMlp, finite_half, read_by_attention
from rtlynx.nn.modulation import modulation
from rtlynx.nn.prologue import adaln, concat_activated, read

DOUBLE = "transformer_blocks.*"
SINGLE = "single_transformer_blocks.*"


def text_rows(call: dict[str, Any]) -> TextRows:
    """Text comes first in single blocks."""
    text = call.get("encoder_hidden_states")
    return None if text is None else (0, text.shape[1])


def double_block(
    block: Any,
    _original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxTransformerBlock.forward."""
    attn = block.attn
    norm, norm_text = block.norm1, block.norm1_context
    shift, scale, gate, *mlp = modulation(norm.silu, norm.linear, temb).chunk(6, dim=1)
    text_modulation = modulation(norm_text.silu, norm_text.linear, temb)
    text_shift, text_scale, text_gate, *text_mlp = text_modulation.chunk(6, dim=1)
    outputs = attn(
        hidden_states=read_by_attention(
            attn, adaln(norm.norm, hidden_states, shift, scale), attn.to_q, attn.to_k, attn.to_v
        ),
        encoder_hidden_states=read_by_attention(
            attn,
            adaln(norm_text.norm, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image, text, *adapter = outputs
    hidden_states = GatedMlp(block.norm2, block.ff, gate, mlp)(hidden_states, image)
    if adapter:
        hidden_states = hidden_states + adapter[0]
    go_on = GatedMlp(block.norm2_context, block.ff_context, text_gate, text_mlp)
    return finite_half(go_on(encoder_hidden_states, text)), hidden_states


def single_block(
    block: Any,
    _original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FluxSingleTransformerBlock.forward."""
    attn, norm, text_tokens = block.attn, block.norm, encoder_hidden_states.shape[1]
    both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation(norm.silu, norm.linear, temb).chunk(3, dim=1)
    prologue = adaln(norm.norm, both, shift, scale)
    x = read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    mlp = block.proj_mlp(x)
    attention = attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    out = block.proj_out(read(concat_activated(attention, block.act_mlp, mlp), block.proj_out))
    both = finite_half(both + gate.unsqueeze(1) * out)
    return both[:, :text_tokens], both[:, text_tokens:]


FLUX = Architecture(
    class_name="FluxTransformer2DModel",
    text_rows=text_rows,
    rules=(
        *(LayerRule(f"{DOUBLE}.attn.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{DOUBLE}.attn.to_out.0", "attention-out"),
        LayerRule(f"{DOUBLE}.ff.net.0.proj", "mlp-up"),
        LayerRule(f"{DOUBLE}.ff.net.2", "mlp-down"),
        *(LayerRule(f"{DOUBLE}.attn.add_{x}_proj", "attention-in", "text", "text_attention") for x in "qkv"),
        LayerRule(f"{DOUBLE}.attn.to_add_out", "attention-out", "text"),
        LayerRule(f"{DOUBLE}.ff_context.net.0.proj", "mlp-up", "text"),
        LayerRule(f"{DOUBLE}.ff_context.net.2", "mlp-down", "text"),
        *(LayerRule(f"{SINGLE}.attn.to_{x}", "attention-in", "joint", "input") for x in "qkv"),
        LayerRule(f"{SINGLE}.proj_mlp", "mlp-up", "joint", "input"),
        LayerRule(f"{SINGLE}.proj_out", "single-out", "joint", attention_part=True),
    ),
    attentions=(
        AttentionRule(DOUBLE, "attn", ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
        AttentionRule(SINGLE, "attn", ("attn.to_v",), ("proj_out",)),
    ),
    mlps=(
        MlpRule(DOUBLE, ("ff", "ff.net.0"), ("ff.net.0.proj",), "ff.net.2"),
        MlpRule(DOUBLE, ("ff_context", "ff_context.net.0"), ("ff_context.net.0.proj",), "ff_context.net.2"),
        MlpRule(SINGLE, ("act_mlp",), ("proj_mlp",), "proj_out"),
    ),
    modulation=(f"{DOUBLE}.norm1.linear", f"{DOUBLE}.norm1_context.linear", f"{SINGLE}.norm.linear"),
    fused={"FluxTransformerBlock": double_block, "FluxSingleTransformerBlock": single_block},
)

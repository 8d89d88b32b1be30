"""FLUX.2 (dev and klein): double blocks, then single blocks in which one layer makes q, k, v and the MLP.

Modulation is made outside the blocks, for all of one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule
from rtlynx.models.flux import DOUBLE, SINGLE, text_rows
from rtlynx.models.fusion import GatedMlp, Heads, attend, finite_half, follows, read_by_attention
from rtlynx.nn.lora import untouched
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.prologue import PrologueCall, adaln, concat_silu_gated, read, silu_gated


def feed_forward(ff: Any, prologue: PrologueCall) -> Tensor:
    """Flux2FeedForward, whose first half of hidden features gates the second, of what `prologue` yields."""
    if not untouched(ff):
        return ff(prologue.dense())
    hidden = ff.linear_in(read(prologue, ff.linear_in))
    gate, up = hidden.chunk(2, dim=-1)
    return ff.linear_out(read(silu_gated(gate, up, lambda *_: ff.act_fn(hidden)), ff.linear_out))


def _by_token(modulation: Tensor) -> bool:
    """Whether tokens differ in it: those of reference pictures while klein fills its cache of them."""
    return modulation.ndim == 3 and modulation.shape[1] > 1


def double_block(
    block: Any,
    original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Flux2TransformerBlock.forward; modulation by token stays diffusers' own."""
    if _by_token(temb_mod_img) or _by_token(temb_mod_txt):
        return original(
            block,
            hidden_states,
            encoder_hidden_states,
            temb_mod_img,
            temb_mod_txt,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    attn = block.attn
    shift, scale, gate, *mlp = temb_mod_img.flatten(1).chunk(6, dim=1)
    text_shift, text_scale, text_gate, *text_mlp = temb_mod_txt.flatten(1).chunk(6, dim=1)
    image, text = attn(
        hidden_states=read_by_attention(
            attn, adaln(block.norm1, hidden_states, shift, scale), attn.to_q, attn.to_k, attn.to_v
        ),
        encoder_hidden_states=read_by_attention(
            attn,
            adaln(block.norm1_context, encoder_hidden_states, text_shift, text_scale),
            *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = GatedMlp(block.norm2, block.ff, gate, mlp, feed_forward)(hidden_states, image)
    go_on = GatedMlp(block.norm2_context, block.ff_context, text_gate, text_mlp, feed_forward)
    return finite_half(go_on(encoder_hidden_states, text)), hidden_states


def mixed(
    attn: Any, hidden_states: Tensor | PreparedInput, attention_mask: Tensor | None, image_rotary_emb: Any
) -> tuple[Tensor, Tensor]:
    """What Flux2ParallelSelfAttnProcessor makes for `to_out`: attention's output, and what the MLP gates."""
    joint = attn.to_qkv_mlp_proj(hidden_states)
    qkv, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
    own = joint.shape[-1] * qkv // (qkv + mlp)  # of this process, where the layer is split among several
    query, key, value = (one.unflatten(-1, (-1, attn.head_dim)) for one in joint[..., :own].chunk(3, dim=-1))
    stream = Heads(query, key, value, (attn.norm_q, attn.norm_k), tuple(image_rotary_emb or ()))
    return attend(attn, [stream], attention_mask), joint[..., own:]


def attention_of(
    attn: Any, hidden_states: Tensor, attention_mask: Tensor | None, image_rotary_emb: Any
) -> Tensor:
    """What Flux2ParallelSelfAttnProcessor computes."""
    y, hidden = mixed(attn, hidden_states, attention_mask, image_rotary_emb)
    return attn.to_out(torch.cat([y, attn.mlp_act_fn(hidden)], dim=-1))


def attention(
    attn: Any,
    hidden_states: Tensor | PreparedInput,
    image_rotary_emb: Any,
    **others: Any,
) -> Tensor:
    """`attn` of its arguments. Its `to_out` reads a prologue.

    A mask, and a processor that keeps what it makes of reference pictures, leave it to that processor.
    """
    if others or not follows(attn, "Flux2ParallelSelfAttnProcessor"):
        return attn(hidden_states=hidden_states, image_rotary_emb=image_rotary_emb, **others)
    y, hidden = mixed(attn, hidden_states, None, image_rotary_emb)
    return attn.to_out(read(concat_silu_gated(y, attn.mlp_act_fn, hidden), attn.to_out))


def single_block(
    block: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """Flux2SingleTransformerBlock.forward as the model calls it: text and image tokens in one tensor."""
    if _by_token(temb_mod) or encoder_hidden_states is not None or split_hidden_states:
        return original(
            block,
            hidden_states,
            encoder_hidden_states,
            temb_mod,
            image_rotary_emb,
            joint_attention_kwargs,
            split_hidden_states,
            text_seq_len,
        )
    attn = block.attn
    shift, scale, gate = temb_mod.flatten(1).chunk(3, dim=1)
    prologue = adaln(block.norm, hidden_states, shift, scale)
    out = attention(
        attn,
        read_by_attention(attn, prologue, attn.to_qkv_mlp_proj),
        image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    return finite_half(hidden_states + gate.unsqueeze(1) * out)


FLUX2 = Architecture(
    class_name="Flux2Transformer2DModel",
    text_rows=text_rows,
    rules=(
        *(LayerRule(f"{DOUBLE}.attn.to_{x}", "attention-in", "image", "attention") for x in "qkv"),
        LayerRule(f"{DOUBLE}.attn.to_out.0", "attention-out"),
        LayerRule(f"{DOUBLE}.ff.linear_in", "mlp-up"),
        LayerRule(f"{DOUBLE}.ff.linear_out", "mlp-down"),
        *(LayerRule(f"{DOUBLE}.attn.add_{x}_proj", "attention-in", "text", "text_attention") for x in "qkv"),
        LayerRule(f"{DOUBLE}.attn.to_add_out", "attention-out", "text"),
        LayerRule(f"{DOUBLE}.ff_context.linear_in", "mlp-up", "text"),
        LayerRule(f"{DOUBLE}.ff_context.linear_out", "mlp-down", "text"),
        LayerRule(f"{SINGLE}.attn.to_qkv_mlp_proj", "attention-in", "joint"),
        LayerRule(f"{SINGLE}.attn.to_out", "single-out", "joint", attention_part=True),
    ),
    attentions=(
        AttentionRule(DOUBLE, "attn", ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
        AttentionRule(SINGLE, "attn", ("attn.to_qkv_mlp_proj",), ("attn.to_out",)),
    ),
    mlps=(
        *(
            MlpRule(DOUBLE, (ff, f"{ff}.act_fn"), (f"{ff}.linear_in",), f"{ff}.linear_out")
            for ff in ("ff", "ff_context")
        ),
        MlpRule(SINGLE, ("attn", "attn.mlp_act_fn"), ("attn.to_qkv_mlp_proj",), "attn.to_out"),
    ),
    modulation=("double_stream_modulation_*.linear", "single_stream_modulation.linear"),
    fused={"Flux2TransformerBlock": double_block, "Flux2SingleTransformerBlock": single_block},
)

"""Z-Image: refiners for image and caption, then layers over [image | caption]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule, Stream, TextRows
from rtlynx.models.fusion import attend, follows, heads, read_by_attention, real_pairs, rows_of_modulation
from rtlynx.nn.lora import untouched
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.prologue import PrologueCall, read, rmsnorm, rmsnorm_by_token, silu_gated

# Z-Image pads the tokens of each picture and caption to a multiple of this (SEQ_MULTI_OF in diffusers).
TOKEN_MULTIPLE = 32


def text_rows(call: dict[str, Any]) -> TextRows:
    """The caption comes after the image; both are padded."""
    latents = call.get("x")
    if not latents:
        return None
    if any(not hasattr(latent, "shape") for latent in latents):
        raise ValueError("dense text rows are not supported with reference pictures in Z-Image")
    patch, frames = call.get("patch_size", 2), call.get("f_patch_size", 1)
    lengths = {
        (latent.shape[1] // frames) * (latent.shape[2] // patch) * (latent.shape[3] // patch)
        for latent in latents
    }
    if len(lengths) > 1:
        raise ValueError("dense text rows need pictures of one size in a batch of Z-Image")
    length = lengths.pop()
    return length + -length % TOKEN_MULTIPLE, None


def attention(
    attn: Any, x: Tensor | PreparedInput, attention_mask: Tensor | None, freqs_cis: Tensor | None
) -> Tensor:
    """ZSingleStreamAttnProcessor.__call__, where that is what `attn` does."""
    if not follows(attn, "ZSingleStreamAttnProcessor"):
        return attn(x, attention_mask=attention_mask, freqs_cis=freqs_cis)
    return attention_of(attn, x, attention_mask, freqs_cis)


def attention_of(
    attn: Any, x: Tensor | PreparedInput, attention_mask: Tensor | None, freqs_cis: Tensor | None
) -> Tensor:
    """What ZSingleStreamAttnProcessor computes; rotation in real numbers."""
    layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    stream = heads(attn, x, layers, norms, real_pairs(freqs_cis))
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :]
    y = attend(attn, [stream], attention_mask)
    for layer in attn.to_out:
        y = layer(y)
    return y


def block(
    block: Any,
    original: Callable[..., Tensor],
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """ZImageTransformerBlock.forward; without modulation it stays diffusers' own.

    Beside reference pictures (Omni) `noise_mask` (B, T) is 1 for tokens that are drawn, which take the
    modulation of `adaln_noisy`, others that of `adaln_clean`.
    """
    if not block.modulation:
        return original(block, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    attn, ff = block.attention, block.feed_forward
    choice = None
    if noise_mask is None:
        modulation = block.adaLN_modulation(adaln_input).unsqueeze(1)
    else:
        modulation = torch.cat([block.adaLN_modulation(one) for one in (adaln_clean, adaln_noisy)])
        choice = rows_of_modulation(noise_mask == 1, len(modulation) // 2)
    scale, gate, mlp_scale, mlp_gate = modulation.chunk(4, dim=-1)
    prologue = _scaled(block.attention_norm1, x, 1.0 + scale, choice)
    hidden = read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v)
    out = attention(attn, hidden, attn_mask, freqs_cis)
    x = x + _of_tokens(gate.tanh(), choice) * block.attention_norm2(out)
    prologue = _scaled(block.ffn_norm1, x, 1.0 + mlp_scale, choice)
    if untouched(ff):
        hidden = read(prologue, ff.w1, ff.w3)
        out = ff.w2(read(silu_gated(ff.w1(hidden), ff.w3(hidden), ff._forward_silu_gating), ff.w2))
    else:
        out = ff(prologue.dense())
    return x + _of_tokens(mlp_gate.tanh(), choice) * block.ffn_norm2(out)


def _scaled(norm: Any, x: Tensor, scale: Tensor, choice: Tensor | None) -> PrologueCall:
    return rmsnorm(norm, x, scale) if choice is None else rmsnorm_by_token(norm, x, scale, choice)


def _of_tokens(gate: Tensor, choice: Tensor | None) -> Tensor:
    return gate if choice is None else embedding(choice, gate)


def _block(blocks: str, stream: Stream) -> tuple[LayerRule, ...]:
    return (
        *(LayerRule(f"{blocks}.attention.to_{x}", "attention-in", stream, "attention") for x in "qkv"),
        LayerRule(f"{blocks}.attention.to_out.0", "attention-out", stream),
        *(LayerRule(f"{blocks}.feed_forward.{x}", "mlp-up", stream, "feed_forward") for x in ("w1", "w3")),
        LayerRule(f"{blocks}.feed_forward.w2", "mlp-down", stream),
    )


Z_IMAGE = Architecture(
    class_name="ZImageTransformer2DModel",
    descending=False,
    timestep_argument="t",
    text_rows=text_rows,
    rules=(
        *_block("noise_refiner.*", "image"),
        *_block("context_refiner.*", "text"),
        *_block("layers.*", "joint"),
    ),
    attentions=tuple(
        AttentionRule(blocks, "attention", ("attention.to_v",), ("attention.to_out.0",))
        for blocks in ("noise_refiner.*", "context_refiner.*", "layers.*")
    ),
    mlps=tuple(
        MlpRule(blocks, ("feed_forward",), ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")
        for blocks in ("noise_refiner.*", "context_refiner.*", "layers.*")
    ),
    modulation=("noise_refiner.*.adaLN_modulation.0", "layers.*.adaLN_modulation.0"),
    fused={"ZImageTransformerBlock": block},
    lent=("noise_refiner.*", "context_refiner.*"),
)

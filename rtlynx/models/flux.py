"""FLUX.1: double blocks with an image and a text stream, then single blocks over both."""

from __future__ import annotations

from typing import Any

from rtlynx.models.architecture import Architecture, LayerRule, TextRows

DOUBLE = "transformer_blocks.*"
SINGLE = "single_transformer_blocks.*"


def text_rows(call: dict[str, Any]) -> TextRows:
    """Text comes first in single blocks."""
    text = call.get("encoder_hidden_states")
    return None if text is None else (0, text.shape[1])


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
)

"""Qwen-Image: double blocks only."""

from __future__ import annotations

from rtlynx.models.architecture import Architecture, LayerRule

BLOCK = "transformer_blocks.*"

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
)

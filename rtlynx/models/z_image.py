"""Z-Image: refiners for image and caption, then layers over [image | caption]."""

from __future__ import annotations

from typing import Any

from rtlynx.models.architecture import Architecture, LayerRule, Stream, TextRows

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
)

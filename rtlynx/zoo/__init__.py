"""Small models trained for this library, in the box, so that everything can be tried and measured offline.

pipe = rtlynx.zoo.load()
pipe("hot dog").images[0].save("hot-dog.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rtlynx.zoo.pipeline import EmojiPipeline

_NAMES = ("flux-emoji",)


def names() -> tuple[str, ...]:
    """The models that `load` knows."""
    return _NAMES


def load(
    name: str = "flux-emoji", *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> EmojiPipeline:
    """A trained model as a ready diffusers pipeline. Reads installed files only, never the network.

    Parameters
    ----------
    name:
        One of `names()`.
    device, dtype:
        Where the transformer goes, and in which floating-point type (default float32; stored as bfloat16).

    Raises ValueError for an unknown name.
    """
    if name not in _NAMES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_NAMES)}")
    # diffusers takes seconds to import: only those who load a model pay for it.
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from rtlynx.zoo.pipeline import EmojiPipeline
    from rtlynx.zoo.prompts import ASSETS

    transformer = FluxTransformer2DModel.from_pretrained(
        ASSETS / "transformer", dtype=dtype or torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "scheduler", local_files_only=True)
    return EmojiPipeline(transformer.eval(), scheduler).to(device)

"""Small models trained for this library, so that everything can be tried and measured offline.

pipe = rtlynx_zoo.load()
pipe("hot dog").images[0].save("hot-dog.png")

flux-emoji is in the wheel. qwen-emoji and z-image-emoji, of other architectures, are trained on the same
pictures with the same recipe. flux-fashion draws clothing by class, after Fashion-MNIST: these are too many
pictures to learn by heart. The weights of these three are in the repository only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from rtlynx_zoo.pipeline import EmojiPipeline

_FASHION = "flux-fashion"
# Name -> its transformer's class in diffusers.
_CLASSES = {
    "flux-emoji": "FluxTransformer2DModel",
    "qwen-emoji": "QwenImageTransformer2DModel",
    "z-image-emoji": "ZImageTransformer2DModel",
    _FASHION: "FluxTransformer2DModel",
}
_BOXED = ("flux-emoji",)
_PACKAGE = Path(__file__).parent
_REPOSITORY_MODELS = _PACKAGE.parents[1] / "studies" / "models"


def names() -> tuple[str, ...]:
    """The models that `load` knows. All but the first need a checkout of the repository."""
    return tuple(_CLASSES)


def draws_emoji(name: str) -> bool:
    """Whether a model draws emoji, as all do but flux-fashion, which draws clothing."""
    return name != _FASHION


def pipeline_class(name: str) -> type[EmojiPipeline]:
    """The class of what `load` gives."""
    from rtlynx_zoo.pipeline import EmojiPipeline, FashionPipeline

    return EmojiPipeline if draws_emoji(name) else FashionPipeline


def folder(name: str) -> Path:
    """Where the files of a model are: a diffusers pipeline folder, beside it its `solutions` if it has any.

    Raises ValueError for an unknown name. The folder may be missing: `load` says so.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_CLASSES)}")
    return (_PACKAGE / "assets" if name in _BOXED else _REPOSITORY_MODELS) / name


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

    Raises ValueError for an unknown name, FileNotFoundError for a model whose weights are not here.
    """
    files = folder(name)
    if not (files / "transformer" / "config.json").is_file():
        raise FileNotFoundError(
            f"the weights of zoo:{name} are not here: they are in studies/models/{name} of the rtlynx "
            "repository, not in the wheel; install from a checkout (pip install -e ./zoo). "
            f"Looked in {files}"
        )
    # diffusers takes seconds to import: only those who load a model pay for it.
    import diffusers
    import torch

    transformer = getattr(diffusers, _CLASSES[name]).from_pretrained(
        files / "transformer", dtype=dtype or torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        files / "scheduler", local_files_only=True
    )
    return pipeline_class(name)(transformer.eval(), scheduler).to(device)


def dense_pictures(
    name: str, prompts: Sequence[str], seed: int, steps: int, guidance: float
) -> torch.Tensor | None:
    """What the dense model draws of `prompts`, picture i from noise of seed + i, where that ships with it.

    Returns (n, 3, H, W), float32, or None for other prompts or settings. Raises ValueError for an unknown
    name.
    """
    from rtlynx_zoo import dense

    return dense.read(folder(name), prompts, {"seed": seed, "steps": steps, "guidance": guidance})

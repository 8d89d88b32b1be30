"""Pictures of the dense model that ship with it, so that a comparison need not draw them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "dense-pictures.safetensors"


def read(folder: Path, prompts: Sequence[str], settings: dict[str, Any]) -> Tensor | None:
    """The pictures (n, 3, H, W), float32, of the first n prompts under `settings`.

    None where none ship, the file is damaged, or the model beside it is another.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            metadata, pictures = file.metadata(), file.get_tensor("pictures")
    except SafetensorError:
        return None
    made = json.loads(metadata["settings"])
    drawn = made.pop("prompts")
    if made != settings or list(prompts) != drawn[: len(prompts)]:
        return None
    if metadata["pictures"] != _digest(pictures) or metadata["weights"] != _weights(folder):
        return None
    return pictures[: len(prompts)].float()


def write(folder: Path, pictures: Tensor, prompts: Sequence[str], settings: dict[str, Any]) -> None:
    """`pictures` (n, 3, H, W) of `prompts` for `read`; in float16, which is finer than what is compared."""
    rounded = pictures.to(torch.float16).contiguous()
    metadata = {
        "settings": json.dumps({**settings, "prompts": list(prompts)}),
        "pictures": _digest(rounded),
        "weights": _weights(folder),
    }
    save_file({"pictures": rounded}, folder / FILE, metadata)


def _digest(pictures: Tensor) -> str:
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()


def _weights(folder: Path) -> str:
    """Digest of the model's weights."""
    with open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

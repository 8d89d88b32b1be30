"""Pictures of the dense model that ship with it, so that a comparison need not draw them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "dense-pictures.safetensors"


def read(folder: Path, prompts: Sequence[str], settings: dict[str, Any]) -> Tensor | None:
    """The pictures (n, 3, H, W), float32, of the first n prompts under `settings`; None where none ship."""
    if not (folder / FILE).is_file():
        return None
    with safe_open(folder / FILE, "pt") as file:
        made = json.loads(file.metadata()["settings"])
        drawn = made.pop("prompts")
        if made != settings or list(prompts) != drawn[: len(prompts)]:
            return None
        return file.get_tensor("pictures")[: len(prompts)].float()


def write(folder: Path, pictures: Tensor, prompts: Sequence[str], settings: dict[str, Any]) -> None:
    """`pictures` (n, 3, H, W) of `prompts` for `read`; in float16, which is finer than what is compared."""
    made = json.dumps({**settings, "prompts": list(prompts)})
    save_file({"pictures": pictures.to(torch.float16).contiguous()}, folder / FILE, {"settings": made})

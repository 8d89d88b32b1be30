"""From what a user types (`zoo:flux-emoji`, a local diffusers folder) to a pipeline or a transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ZOO_PREFIX = "zoo:"


def load_model(source: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A pipeline from the zoo or a local diffusers folder, or the bare transformer of a model folder.

    Parameters
    ----------
    source : "zoo:NAME", or a folder with `model_index.json` (pipeline) or `config.json` (transformer).
    device : torch device.
    dtype : of the weights; default float32 on the CPU, bfloat16 elsewhere.

    Raises
    ------
    ValueError, FileNotFoundError
        In one line, if there is no such model, or it is damaged.
    """
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    if source.startswith(ZOO_PREFIX):
        from rtlynx import zoo

        return zoo.load(source.removeprefix(ZOO_PREFIX), device=device, dtype=dtype)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no such model folder: {source} (a local diffusers folder, or zoo:flux-emoji)"
        )
    import diffusers

    if (folder / "model_index.json").is_file():
        loader: Any = diffusers.DiffusionPipeline
    elif (folder / "config.json").is_file():
        class_name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
        loader = getattr(diffusers, class_name, None)
        if loader is None:
            raise ValueError(f"{folder}/config.json names {class_name!r}, which diffusers does not have")
    else:
        raise FileNotFoundError(
            f"{source} has no model_index.json and no config.json: not a diffusers folder"
        )
    try:
        return loader.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
    except (OSError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{source} could not be loaded: {str(error).splitlines()[0]}") from error

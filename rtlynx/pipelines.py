"""Diffusers pipelines: from what a user types to a loaded one, and how one is driven here."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        return loader.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    except (OSError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{source} could not be loaded: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar; ours counts pictures."""
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**shown, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)


def sampling_steps(pipeline: Any, settings: Mapping[str, Any]) -> int:
    """`num_inference_steps` of `settings`, else the pipeline's own default.

    Raises
    ------
    ValueError
        If neither says how many.
    """
    if "num_inference_steps" in settings:
        return int(settings["num_inference_steps"])
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise ValueError("give the number of sampling steps: pipeline_kwargs={'num_inference_steps': ...}")
    return parameter.default

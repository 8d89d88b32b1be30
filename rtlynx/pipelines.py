"""Diffusers pipelines: from what a user types to a loaded one, and how one is driven here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtlynx.files import CheckpointError, read_json

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
    device = usable_device(device)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    if source.startswith(ZOO_PREFIX):
        from rtlynx import zoo

        return zoo.load(source.removeprefix(ZOO_PREFIX), device=device, dtype=dtype)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no such model folder: {source} (a local diffusers folder, or zoo:flux-emoji)"
        )
    loader = _loader(folder)
    try:
        with _no_loading_bar():
            return loader.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    except Exception as error:  # of all kinds: diffusers checks little of what it reads
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"{source} could not be loaded ({type(error).__name__}): {reason}") from error


def _loader(folder: Path) -> Any:
    """The diffusers class that loads the model or pipeline in `folder`."""
    import diffusers

    path = folder / "model_index.json"
    if path.is_file():
        index = read_json(path)
        if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str | list):
            raise CheckpointError(f"{path} is not a JSON object that names a pipeline as _class_name")
        return diffusers.DiffusionPipeline  # which finds that class, also one that is not diffusers' own
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json and no config.json: not a diffusers folder"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} names no class of diffusers (_class_name is {name!r})")
    loader = getattr(diffusers, name, None)
    if loader is None:
        raise CheckpointError(f"{path} names {name!r}, which diffusers does not have")
    if not (
        isinstance(loader, type) and issubclass(loader, nn.Module) and hasattr(loader, "from_pretrained")
    ):
        raise CheckpointError(f"{path} names {name!r}, which is not a model of diffusers")
    return loader


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Hide diffusers' bar over a pipeline's components, under which an error is hard to see."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def usable_device(device: str) -> str:
    """`device`, if this machine has it.

    Raises
    ------
    ValueError
        In one line, if it does not, or `device` names none.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, ValueError, TypeError):
        raise ValueError(f"no device is called {device!r}: give cpu, cuda, or cuda:1 and so on") from None
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            reason = "sees no GPU" if torch.backends.cuda.is_built() else "is built for the CPU alone"
            raise ValueError(f"device {device}: this PyTorch ({torch.__version__}) {reason}; use cpu")
        if (parsed.index or 0) >= count:
            last = f" to cuda:{count - 1}" if count > 1 else ""
            raise ValueError(f"device {device}: there is only cuda:0{last}")
    elif parsed.type == "meta":
        raise ValueError("device meta holds no numbers: give cpu or cuda")
    elif parsed.type != "cpu":
        try:
            torch.empty(1, device=parsed)
        except Exception as error:  # each backend has errors of its own
            reason = " ".join(str(error).split())
            raise ValueError(f"device {device} cannot be used ({type(error).__name__}): {reason}") from None
    return device


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

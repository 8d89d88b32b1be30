"""Diffusers pipelines: from what a user types to a loaded one, and how one is driven here."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from rtlynx.recipe import refuse_unknown

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
    """Hide the pipeline's own progress bar, where it has one; ours counts pictures."""
    configure = getattr(pipeline, "set_progress_bar_config", None)
    if configure is None:
        yield
        return
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    configure(**{**shown, "disable": True})
    try:
        yield
    finally:
        configure(**shown)


def check_call(pipeline: Any, settings: Mapping[str, Any]) -> None:
    """Refuse, before any work, settings with which `draw` could not call `pipeline`.

    Raises
    ------
    TypeError
        If it is no pipeline.
    ValueError
        If it takes no prompts, does not know one of the settings, or needs one more.
    """
    name = type(pipeline).__name__
    if not callable(pipeline):
        raise TypeError(f"a {name} cannot draw prompts: give a pipeline")
    named, anything = _parameters(pipeline)
    given = {"prompt", "generator", "output_type", *settings}
    missing = [key for key, one in named.items() if one.default is one.empty and key not in given]
    if "prompt" not in named and (missing or not anything):
        raise ValueError(
            f"{name} takes no prompt (but {', '.join(named)}), so it cannot draw prompts: "
            "record calls of its transformer yourself, and calibrate on them by calls=..."
        )
    for own, why in (("prompt", "prompts are given apart"), ("generator", "noise comes from `seed`")):
        if own in settings:
            raise ValueError(f"pipeline_kwargs cannot hold {own!r}: {why}")
    if not anything:
        refuse_unknown("pipeline_kwargs", settings, set(named))
    if missing:
        raise ValueError(f"{name} needs {missing[0]!r}: give it in pipeline_kwargs")


def draw(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any]) -> Any:
    """Call `pipeline`, picture i from noise of `seeds[i]`; `output_type` is left out where it takes none.

    A pipeline that takes no generator draws from torch's own, which starts from the first seed.
    """
    named, anything = _parameters(pipeline)
    given = {
        key: value for key, value in settings.items() if anything or key != "output_type" or key in named
    }
    with ExitStack() as stack:
        stack.enter_context(quiet(pipeline))
        if anything or "generator" in named:
            given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        else:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seeds[0])
        return pipeline(prompt=list(prompts), **given)


def _parameters(pipeline: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a pipeline call takes by name, and whether it takes any other name too."""
    parameters = inspect.signature(pipeline).parameters.values()
    named = {one.name: one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters)

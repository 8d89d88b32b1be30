"""Diffusers pipelines: from what a user types to a loaded one, and how one is driven here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtlynx.models.prompts import Prompt, arguments_of, check_prompts, joined, opened
from rtlynx.recipe import refuse_unknown
from rtlynx.storage.files import CheckpointError, read_json

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
        try:
            import rtlynx_zoo as zoo
        except ModuleNotFoundError:
            raise ValueError(
                f"{source} is a model of the package rtlynx-zoo, which is not installed: "
                "pip install ./zoo in a checkout of rtlynx"
            ) from None
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


def offload_again(pipeline: Any) -> None:
    """Put models on the CPU that calls outside of the pipeline brought to a card, where it offloads them."""
    free = getattr(pipeline, "maybe_free_model_hooks", None)
    if free is not None:
        free()


@contextmanager
def offloaded_after_errors(pipeline: Any) -> Iterator[None]:
    """`offload_again` after an error, when the models are what they were before."""
    try:
        yield
    except BaseException:
        offload_again(pipeline)
        raise


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


def check_call(pipeline: Any, settings: Mapping[str, Any], prompts: Iterable[Prompt] = ("",)) -> None:
    """Refuse, before any work, settings and prompts with which `draw` could not call `pipeline`.

    Raises
    ------
    TypeError
        If it is no pipeline.
    ValueError
        If it takes no prompts, does not know one of the arguments, or needs one more.
    FileNotFoundError
        If a picture is not there.
    """
    name = type(pipeline).__name__
    if not callable(pipeline):
        raise TypeError(f"a {name} cannot draw prompts: give a pipeline")
    prompts = list(prompts)
    check_prompts(prompts)
    named, anything = _parameters(pipeline)
    required = {key for key, one in named.items() if one.default is one.empty}
    apart = {key for prompt in prompts for key in arguments_of(prompt)}
    missing = sorted(
        key
        for prompt in prompts
        for key in required - {"generator", "output_type", *settings, *arguments_of(prompt)}
    )
    if "prompt" in apart and "prompt" not in named and (missing or not anything):
        raise ValueError(
            f"{name} takes no prompt (but {', '.join(named)}), so it cannot draw prompts: give dicts of its "
            "own arguments instead, or record calls of its transformer yourself, and calibrate on them by "
            "calls=..."
        )
    for own, why in (("prompt", "prompts are given apart"), ("generator", "noise comes from `seed`")):
        if own in settings:
            raise ValueError(f"pipeline_kwargs cannot hold {own!r}: {why}")
    if "generator" in apart:
        raise ValueError("a prompt cannot hold 'generator': noise comes from `seed`")
    if not anything:
        refuse_unknown("pipeline_kwargs", settings, set(named))
        refuse_unknown("prompt", dict.fromkeys(sorted(apart)), set(named))
    if missing:
        raise ValueError(
            f"{name} needs {missing[0]!r}: give it in pipeline_kwargs, or with each prompt (a dict of the "
            "pipeline's arguments)"
        )


def draw(pipeline: Any, prompts: Sequence[Prompt], seeds: Sequence[int], settings: Mapping[str, Any]) -> Any:
    """Call `pipeline` on lists of what `prompts` hold, picture i from noise of `seeds[i]`.

    `output_type` is left out where it takes none. A pipeline that takes no generator draws from torch's own,
    which starts from the first seed.
    """
    return _call(pipeline, joined(prompts), seeds, settings, list)


def draw_alone(pipeline: Any, prompt: Prompt, seed: int, settings: Mapping[str, Any]) -> Any:
    """`draw` of one prompt, which the pipeline gets as it is and not in lists."""
    given = {name: opened(value) for name, value in arguments_of(prompt).items()}
    return _call(pipeline, given, [seed], settings, next)


def _call(
    pipeline: Any,
    arguments: Mapping[str, Any],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    generators: Callable[[Iterator[torch.Generator]], Any],
) -> Any:
    named, anything = _parameters(pipeline)
    given = {
        key: value for key, value in settings.items() if anything or key != "output_type" or key in named
    }
    with ExitStack() as stack:
        stack.enter_context(quiet(pipeline))
        if anything or "generator" in named:
            given["generator"] = generators(torch.Generator().manual_seed(seed) for seed in seeds)
        else:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seeds[0])
        return pipeline(**{**given, **arguments})


def tensor_of(pipeline: Any, drawn: Any) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1], or latents as they are, that `draw` gave: float32, on the CPU.

    Raises
    ------
    TypeError
        If they are neither tensors nor arrays nor PIL's pictures.
    """
    if isinstance(drawn, tuple):
        found = drawn[0]
    else:
        found = getattr(drawn, "images", getattr(drawn, "frames", drawn))
    if isinstance(found, Tensor):
        return found.float().cpu()
    try:  # a pipeline without `output_type`: PIL's pictures, or (n, H, W, 3) in [0, 1]
        arrays = np.stack([np.asarray(picture) for picture in found])
        whole = arrays.astype(np.float32) / (255 if arrays.dtype == np.uint8 else 1)
        return torch.from_numpy(whole).permute(0, 3, 1, 2).contiguous()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{type(pipeline).__name__} draws no pictures, but a {type(drawn).__name__}"
        ) from None


def guidance_scale(pipeline: Any, settings: Mapping[str, Any]) -> float:
    """g of null + g (conditional - null), as `pipeline` called with `settings` guides.

    Raises
    ------
    ValueError
        If it takes neither `true_cfg_scale` nor `guidance_scale`, or they say no number.
    """
    named, _ = _parameters(pipeline)
    for name in ("true_cfg_scale", "guidance_scale"):  # beside the first, the second is an input of the model
        if name in settings or name in named:
            value = settings[name] if name in settings else named[name].default
            if isinstance(value, int | float) and not isinstance(value, bool):
                beyond = type(pipeline).__name__.startswith(_GUIDE_BEYOND_CONDITIONAL)
                return value + 1.0 if beyond else float(value)
    raise ValueError(f"{type(pipeline).__name__} does not say by which scale it guides")


# How the names of pipelines begin that guide by conditional + w (conditional - null): g is w + 1.
_GUIDE_BEYOND_CONDITIONAL = ("ZImage", "CosmosTextToWorld", "CosmosVideoToWorld", "Cosmos2", "Krea2")


def _parameters(pipeline: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a pipeline call takes by name, and whether it takes any other name too."""
    parameters = inspect.signature(pipeline).parameters.values()
    named = {one.name: one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters)

"""Calls of the denoiser: recorded while a pipeline samples, kept in memory or on disk, replayed at will."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.files import CheckpointError, read_tensors, write_tensors
from rtlynx.models.architecture import Architecture

Call = dict[str, Any]
GOLDEN = 0.6180339887498949


def chosen_steps(batch: int, steps: int, wanted: int) -> set[int]:
    """`wanted` of `steps` sampling steps to record for a batch, evenly spread, shifted by the batch."""
    wanted = min(steps, wanted)
    shift = (batch * GOLDEN) % 1.0
    return {int((i + shift) * steps / wanted) for i in range(wanted)}


def record_calls(
    model: nn.Module, architecture: Architecture, sample: Callable[[], Any], keep: set[int]
) -> list[Call]:
    """Run `sample` and return the calls of `model` whose step is in `keep`, by argument name, on the CPU."""
    calls: list[Call] = []
    tracker = StepTracker(architecture.descending)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = architecture.call_arguments(model, args, kwargs)
        timestep = call.get(architecture.timestep_argument)
        step = 0 if timestep is None else tracker.update(timestep)
        if step in keep:
            calls.append(_move(call, "cpu"))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        sample()
    finally:
        handle.remove()
    return calls


class StepTracker:
    """Tells sampling steps apart by the model's own `timestep` argument.

    A new value is a new step, the same value another guidance pass of the same step, a value against the
    schedule's direction the first step of a new picture (also after an aborted run).

    Parameters
    ----------
    descending : bool
        True where the timestep falls while sampling (FLUX, Qwen-Image), False where it rises (Z-Image).
    """

    def __init__(self, descending: bool = True) -> None:
        self.descending = descending
        self.step = -1
        self._last: float | None = None

    def update(self, timestep: Tensor | float) -> int:
        """Index (from 0) of the step that a forward pass at `timestep` belongs to.

        A batch at different timesteps (training) is no sampling step: returns -1 and changes nothing.
        """
        if isinstance(timestep, Tensor):
            flat = timestep.detach().flatten()
            if flat.numel() == 0 or bool((flat != flat[0]).any()):
                return -1
            value = float(flat[0])
        else:
            value = float(timestep)
        if self._last is None:
            self.step = 0
        elif value != self._last:
            forward = value < self._last if self.descending else value > self._last
            self.step = self.step + 1 if forward else 0
        self._last = value
        return self.step


class CallStore:
    """Recorded calls by batch number, in memory, or in a folder where an interrupted run finds them again."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[int, list[Call]] = {}

    def has(self, batch: int) -> bool:
        return batch in self._memory or (self.folder is not None and self._path(batch).is_file())

    def put(self, batch: int, calls: list[Call]) -> None:
        if self.folder is None:
            self._memory[batch] = calls
            return
        tensors: dict[str, Tensor] = {}
        structure = [_encode(call, tensors) for call in calls]
        write_tensors(self._path(batch), tensors, {"calls": json.dumps(structure)})

    def get(self, batch: int) -> list[Call]:
        if self.folder is None:
            return self._memory[batch]
        path = self._path(batch)
        tensors, metadata = read_tensors(path)
        try:
            return [_decode(call, tensors) for call in json.loads(metadata["calls"])]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} is damaged: delete it and run again") from None

    def replay(self, batches: Sequence[int], device: torch.device) -> Iterator[Call]:
        """The calls of `batches`, one at a time, with tensors on `device`."""
        for batch in batches:
            for call in self.get(batch):
                yield _move(call, device)

    def _path(self, batch: int) -> Path:
        assert self.folder is not None
        return self.folder / f"calls-{batch:05d}.safetensors"


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device) for item in value)
    return value


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, list):
        return {"list": [_encode(item, tensors) for item in value]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(
        f"a {type(value).__name__} in the model's arguments cannot be written to disk: "
        "calibrate without a folder"
    )


def _decode(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, item),) = value.items()
    if kind == "tensor":
        return tensors[item]
    if kind == "dict":
        return {key: _decode(one, tensors) for key, one in item.items()}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_decode(one, tensors) for one in item)
    if kind == "value":
        return item
    raise KeyError(kind)

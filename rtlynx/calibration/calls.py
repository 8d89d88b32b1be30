"""Calls of the denoiser: recorded while a pipeline samples, kept in memory or on disk, replayed at will."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rtlynx.calibration.folder import WorkFolder
from rtlynx.calibration.steps import counted_steps
from rtlynx.models.architecture import TIMESTEPS, Architecture
from rtlynx.models.attention_backend import dense_steps_told_by
from rtlynx.models.hooks import is_dense_call
from rtlynx.nn.call import CallState, Step, enter_call, leave_call, step_of
from rtlynx.recipe import Recipe

Call = dict[str, Any]
_T = TypeVar("_T")
GOLDEN = 0.6180339887498949


class RecordedCall(Call):
    """A call, and the sampling step that it is of; None where that is not known."""

    step: Step | None = None

    @classmethod
    def of(cls, call: Call, step: Step | None) -> RecordedCall:
        recorded = cls(call)
        recorded.step = step
        return recorded


def recorded_step(call: Call) -> Step | None:
    """The sampling step that a call is of, where it was recorded with it."""
    return call.step if isinstance(call, RecordedCall) else None


def chosen_steps(batch: int, steps: int, wanted: int) -> set[int]:
    """`wanted` of `steps` sampling steps to record for a batch, evenly spread, shifted by the batch."""
    wanted = min(steps, wanted)
    shift = (batch * GOLDEN) % 1.0
    return {int((i + shift) * steps / wanted) for i in range(wanted)}


class CalibrationError(ValueError):
    """Calibration data that cannot be used."""


@dataclass
class _Seen:
    """One call while a pipeline runs.

    steps : how many steps the pipeline's schedulers had taken before it.
    timestep : comparable; None where it has none.
    dense : whether the recipe runs its step dense; the call is then not kept.
    """

    call: Call
    steps: int
    timestep: Any
    dense: bool


def calls_by_step(
    model: nn.Module,
    architecture: Architecture,
    sample: Callable[[], Any],
    recipe: Recipe | None = None,
    pipeline: Any = None,
    *,
    may_be_idle: bool = False,
) -> list[list[Call]]:
    """Run `sample`, one pipeline call, and return all calls of `model` for each sampling step, on the CPU.

    The calls between two steps of the pipeline's scheduler are the guidance passes of one step. Where no
    scheduler takes steps, a call at another timestep than the one before it begins a step. How many steps run
    is known only at the end, so the calls of all of them are kept until then. Steps that `recipe` runs dense
    are left out, and attention in eight bits leaves them alone; without a recipe it goes by steps of its own.
    A model that `may_be_idle` may make no calls.

    Raises
    ------
    CalibrationError
        If the model was not called, or in dense steps alone; if it is not known which call is of which step.
    """
    seen: list[_Seen] = []
    owner = object()  # of the state of a call, which an interrupt may leave behind
    with counted_steps(pipeline) as steps:

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = architecture.call_arguments(model, args, kwargs)
            dense = recipe is not None and _runs_dense(architecture, recipe, model, call)
            kept = RecordedCall.of({} if dense else moved(call, "cpu"), _step_of(architecture, call))
            seen.append(_Seen(kept, steps.count, timestep_of(call, architecture), dense))
            if recipe is not None:
                enter_call(CallState(dense=dense), owner, "attention")

        def leave(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
            leave_call(owner, "attention")

        handles = [
            model.register_forward_pre_hook(hook, with_kwargs=True),
            model.register_forward_hook(leave, always_call=True),
        ]
        try:
            with nullcontext() if recipe is None else dense_steps_told_by(model, "attention"):
                sample()
        finally:
            leave_call(owner, "attention")
            for handle in handles:
                handle.remove()
        scheduled = steps.count > 0
    if not seen and may_be_idle:
        return []
    if not seen:
        raise CalibrationError(
            f"the pipeline ran, but made 0 calls of its transformer ({type(model).__name__}): it draws with "
            "another model, or calls `forward` itself. Give the pipeline that calls this one, or calls=..."
        )
    found = [[one.call for one in step if not one.dense] for step in _split_steps(model, seen, scheduled)]
    found = [step for step in found if step]
    if not found:
        raise CalibrationError(
            f"all steps of a picture run dense ({recipe.describe_dense_steps() if recipe else ''}), so there "
            "is nothing to calibrate: leave some sparse"
        )
    return found


def _split_steps(model: nn.Module, seen: list[_Seen], scheduled: bool) -> list[list[_Seen]]:
    if not scheduled and len(seen) > 1 and any(one.timestep is None for one in seen):
        raise CalibrationError(
            f"which calls of {type(model).__name__} belong to one sampling step is not known: the pipeline's "
            "scheduler takes no steps, and the calls have no timestep. Record calls yourself, and calibrate "
            "on them by calls=..."
        )
    return _runs(seen, lambda one: one.steps if scheduled else one.timestep)


def _runs(items: Iterable[_T], key: Callable[[_T], Any]) -> list[list[_T]]:
    """Consecutive items of one key together; each whose key is None alone."""
    found: list[list[_T]] = []
    last: Any = None
    for item in items:
        now = key(item)
        if not found or now is None or now != last:
            found.append([])
        last = now
        found[-1].append(item)
    return found


def _runs_dense(architecture: Architecture, recipe: Recipe, model: nn.Module, call: Call) -> bool:
    """Whether the step that `call` is of runs dense, as it will when the sparse model draws."""
    if not recipe.has_dense_steps or recipe.chooses_dense_steps:
        return False
    try:
        return is_dense_call(architecture, recipe, model, call)
    except (RuntimeError, ValueError) as error:
        raise CalibrationError(str(error)) from None


def _step_of(architecture: Architecture, call: Call) -> Step | None:
    try:
        return step_of(architecture.timestep(call))
    except (ValueError, TypeError):  # at several timesteps, at none, or at one that no schedule holds
        return None


def by_step(calls: Sequence[Call], architecture: Architecture) -> list[list[Call]]:
    """Consecutive calls at one timestep together; each call without one alone."""
    return _runs(calls, lambda call: timestep_of(call, architecture))


def timestep_of(call: Call, architecture: Architecture) -> Any:
    """The timestep of `call`, comparable; None where it has none."""
    timestep = architecture.timestep(call)
    return None if timestep is None else _values(timestep)


def _values(timestep: Any) -> Any:
    """The values of a timestep, comparable: one, or one for each token or picture, whatever the batch."""
    if isinstance(timestep, Tensor):
        rows = timestep.detach().double().cpu()
        rows = rows.reshape(1) if rows.dim() == 0 else rows
        distinct = rows.unique_consecutive(dim=0) if rows.numel() else rows
        return tuple(distinct.shape[1:]), tuple(distinct.flatten().tolist())
    if isinstance(timestep, list | tuple):
        return tuple(_values(one) for one in timestep)
    return timestep


class CallStore:
    """Recorded calls by batch number, in memory, or in a folder where an interrupted run finds them again."""

    def __init__(self, folder: WorkFolder | None = None) -> None:
        self.folder = folder
        self._memory: dict[int, list[Call]] = {}
        self._counts: dict[int, int] = {}

    def has(self, batch: int) -> bool:
        return batch in self._memory or (self.folder is not None and self.folder.has(_file(batch)))

    def count(self, batch: int) -> int:
        """How many calls a batch has."""
        if batch not in self._counts:
            self.get(batch)
        return self._counts[batch]

    def put(self, batch: int, calls: list[Call]) -> None:
        self._counts[batch] = len(calls)
        if self.folder is None:
            self._memory[batch] = calls
            return
        tensors: dict[str, Tensor] = {}
        structure = [
            {"call": _encode(call, tensors), "step": step and [step.index, step.count, step.sigma]}
            for call, step in ((one, recorded_step(one)) for one in calls)
        ]
        self.folder.write(_file(batch), tensors, structure)

    def get(self, batch: int) -> list[Call]:
        if self.folder is None:
            return self._memory[batch]
        tensors, structure = self.folder.read(_file(batch))
        self._counts[batch] = len(structure)
        return [
            RecordedCall.of(_decode(one["call"], tensors), one["step"] and Step(*one["step"]))
            for one in structure
        ]

    def replay(self, batches: Sequence[int], device: torch.device) -> Iterator[Call]:
        """The calls of `batches`, one at a time, with tensors on `device`."""
        for batch in batches:
            for call in self.get(batch):
                yield moved(call, device)


def pictures_in(call: Call) -> int:
    """How many pictures a call is of: as many as its first argument with rows has, latents in diffusers.

    Timesteps do not count: models of other code may take one first, for the whole batch.
    """
    for name, value in call.items():
        has_rows = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        if has_rows and name not in TIMESTEPS:
            return max(1, len(value))
    return 1


def _file(batch: int) -> str:
    return f"calls-{batch:05d}.safetensors"


def moved(value: Any, device: torch.device | str) -> Any:
    """A copy of nested arguments of a call, with tensors on `device`.

    Objects that hold values, such as caches, are copied as they are at this call: later ones change them.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, nn.Module | Enum) or callable(value) or not hasattr(value, "__dict__"):
        return value
    twin = copy.copy(value)
    vars(twin).update({name: moved(item, device) for name, item in vars(value).items()})
    return twin


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

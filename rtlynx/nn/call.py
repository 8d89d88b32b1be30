"""What belongs to one call of a sparse model: which sampling step it is, and where its text rows lie.

Nothing of it is kept on the model. The model's hooks set the state before its forward and take it back after,
for the running thread alone, so threads, pipelines and requests can share one model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TextRows = tuple[int, int | None] | None
RowRanges = tuple[tuple[int, int], ...]  # half-open ranges of tokens
# The dtypes in which models take timesteps round them by up to this.
_ROUNDING = 2.0**-7
_ALL_THAT_FOLLOW = 1 << 31  # more tokens than any call has


class CallState:
    """What the layers of a sparse model have to know of the call that they run in.

    Parameters
    ----------
    dense : bool
        Whether every sparse layer runs densely, with its original weight.
    text_rows : (start, stop) or None
        Half-open range of the text tokens on the token axis (-2) of joint blocks; `stop` None for all that
        follow. None where the call has no text.
    """

    def __init__(self, *, dense: bool = False, text_rows: TextRows = None) -> None:
        self.dense = dense
        self.owner: object = None
        self.outer: CallState | None = None
        self._bounds: Tensor | None = None
        if text_rows is not None:
            start, stop = text_rows
            length = _ALL_THAT_FOLLOW if stop is None else max(0, stop - start)
            # Sizes of a tensor without entries: torch.compile makes one graph for all of them, but one graph
            # for each value of an integer.
            self._bounds = torch.empty((start, length, 0), device="cpu")

    def split(self, rows: int) -> tuple[tuple[int, int], RowRanges] | None:
        """The text's range of `rows` tokens and the ranges of the others; None where there is no text."""
        if self._bounds is None:
            return None
        start, length, _ = self._bounds.shape
        stop = min(start + length, rows)
        if start >= stop:
            return None
        return (start, stop), tuple((a, b) for a, b in ((0, start), (stop, rows)) if a < b)

    @property
    def has_text(self) -> bool:
        return self._bounds is not None


# Whose state it is: of the layers of a sparse model, or of attention in eight bits with steps of its own.
Whose = Literal["layers", "attention"]
# The states of the call that runs in each thread, as attributes. Not `ContextVar`s, which torch.compile
# cannot read; nor a class of our own, of which torch 2.11 reads the class's attributes.
_thread = threading.local()


_LENT = CallState(dense=True)


def current_call(whose: Whose = "layers", *, lent: bool = False) -> CallState:
    """The state of the call that runs in this thread.

    Parameters
    ----------
    whose : "layers" | "attention"
    lent : bool
        Of a layer that another model, such as a ControlNet, calls beside its own: where it draws, without
        gradients, and no call is under way, the layer runs dense, since it is not told which step it is.

    Raises
    ------
    RuntimeError
        If none does: the layer was called by itself, or again in a backward pass.
    """
    call: CallState | None = getattr(_thread, whose, None)
    if call is None and lent and not torch.is_grad_enabled():
        return _LENT
    if call is None:
        raise RuntimeError(
            "this layer runs some rows or steps dense, as the model's call says, and no call is under way: "
            "call the model, not its layers or its forward(). Gradient checkpointing calls layers again in "
            "the backward pass: use a recipe of text_rows='sparse' without dense steps with it"
        )
    return call


def enter_call(call: CallState, owner: object, whose: Whose = "layers") -> None:
    """Make `call` the one that runs in this thread, until `leave_call` of the same owner."""
    outer: CallState | None = getattr(_thread, whose, None)
    while outer is not None and outer.owner is owner:  # left behind by Ctrl-C
        outer = outer.outer
    call.owner, call.outer = owner, outer
    setattr(_thread, whose, call)


def leave_call(owner: object, whose: Whose = "layers") -> None:
    """Back to the call around that of `owner`, if that has one under way."""
    call = getattr(_thread, whose, None)
    if call is not None and call.owner is owner:
        setattr(_thread, whose, call.outer)


@contextmanager
def calling(*, dense: bool = False, text_rows: TextRows = None) -> Iterator[None]:
    """Call layers by themselves as in a model's call of this state (see `CallState`)."""
    owner = object()
    enter_call(CallState(dense=dense, text_rows=text_rows), owner)
    try:
        yield
    finally:
        leave_call(owner)


# ------------------------------------------------------------------------------------------- which step


@dataclass(frozen=True)
class Step:
    """One of the steps of a picture.

    index, count : which it is, from 0, and how many there are.
    sigma : its noise level, from 1 (noise) to 0 (picture), or None where that is not known.
    """

    index: int
    count: int
    sigma: float | None


@dataclass(frozen=True)
class _Steps:
    """The steps of a picture in order: timesteps, and the noise level of each where they are known."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None

    def at(self, timestep: float) -> Step:
        """The step at `timestep`; schedulers of higher order visit one more than once."""
        starts = [i for i, t in enumerate(self.timesteps) if not i or t != self.timesteps[i - 1]]
        steps = [self.timesteps[i] for i in starts]
        index = min(range(len(steps)), key=lambda step: abs(steps[step] - timestep))
        if not abs(steps[index] - timestep) <= _ROUNDING * max(map(abs, steps)):
            raise ValueError(
                f"the model is called at timestep {timestep:g}, which is not in the schedule of "
                f"{len(steps)} steps from {steps[0]:g} to {steps[-1]:g}: give rtlynx.schedule what the model "
                "takes"
            )
        return Step(index, len(steps), None if self.sigmas is None else self.sigmas[starts[index]])


_schedule: ContextVar[_Steps | None] = ContextVar("rtlynx_schedule", default=None)


@contextmanager
def schedule(
    timesteps: Iterable[float] | Tensor, sigmas: Iterable[float] | Tensor | None = None
) -> Iterator[None]:
    """Say which timesteps the model calls inside go through, for recipes with dense steps.

    Diffusers pipelines need no such word: their own loop tells. Sampling loops of your own do. The schedule
    holds for the running thread or task, so requests may take turns on one model.

    Parameters
    ----------
    timesteps : sequence of float
        As the model's timestep argument takes them, from the first step of the picture to the last.
    sigmas : sequence of float, optional
        Noise level of each, from 1 (noise) to 0 (picture), for recipes with `dense_sigmas`. Default: the
        timesteps, where there are several that fall and lie between 0 and 1.

    Raises
    ------
    ValueError
        If there are no timesteps, or not as many sigmas, or a sigma is not between 0 and 1.

    Examples
    --------
    >>> with rtlynx.schedule(sigmas):  # doctest: +SKIP
    ...     for sigma in sigmas:
    ...         latents = step(transformer(latents, timestep=sigma, ...))
    """
    values = tuple(_values(timesteps))
    if not values:
        raise ValueError("a schedule has at least one timestep, got none")
    falling = all(0 <= value <= 1 for value in values) and values[0] > values[-1]
    levels = (values if falling else None) if sigmas is None else tuple(_values(sigmas))
    if levels is not None and len(levels) != len(values):
        raise ValueError(f"there is one sigma for each timestep: got {len(levels)} for {len(values)}")
    if levels is not None and not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"sigmas lie between 0 and 1, got {min(levels):g} to {max(levels):g}")
    token = _schedule.set(_Steps(values, levels))
    try:
        yield
    finally:
        _schedule.reset(token)


def current_schedule() -> tuple[float, ...] | None:
    """The timesteps that `schedule` says here."""
    steps = _schedule.get()
    return None if steps is None else steps.timesteps


def step_of(timestep: Any) -> Step | None:
    """The sampling step of a call at `timestep`; None where no schedule is known.

    Raises
    ------
    ValueError
        If the schedule holds no such timestep, or the call is at several.
    """
    given = _schedule.get()
    if given is not None:
        return given.at(single_timestep(timestep))
    loop = _denoising_loop()
    return None if loop is None else loop[1].at(loop[0])


def _denoising_loop() -> tuple[float, _Steps] | None:
    """(current timestep, all steps) of the diffusers pipeline that runs in this thread.

    Read off the pipeline's frame, since diffusers hands neither the schedule nor the step to the model, and
    its scheduler may serve several pictures at a time. Nearly all pipelines go through `timesteps` by `t`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        names = {*code.co_varnames, *code.co_cellvars}  # (a comprehension makes a cell of what it reads)
        if "t" in names and ("timesteps" in names or "block_state" in names):
            found = frame.f_locals
            pipeline = found.get("self")
            timesteps = found.get("timesteps", getattr(found.get("block_state"), "timesteps", None))
            if "t" in found and timesteps is not None and _is_of_diffusers(pipeline):
                scheduler = getattr(pipeline, "scheduler", None)
                values = _values(timesteps)
                if len(set(values)) == 1:  # DiTPipeline calls the current one so
                    values = _values(getattr(scheduler, "timesteps", values))
                most = _timesteps_of_flow(scheduler)
                sigmas = tuple(value / most for value in values) if most else None
                return single_timestep(found["t"]), _Steps(tuple(values), sigmas)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _timesteps_of_flow(scheduler: Any) -> float | None:
    """Timestep of sigma 1 in flow matching, which trains on timesteps in proportion to sigma; else None."""
    config = getattr(scheduler, "config", None) or {}
    flow = "FlowMatch" in type(scheduler).__name__ or getattr(config, "use_flow_sigmas", False)
    return getattr(config, "num_train_timesteps", None) if flow else None


def _is_of_diffusers(pipeline: Any) -> bool:
    return any(base.__module__.partition(".")[0] == "diffusers" for base in type(pipeline).__mro__)


def _values(timesteps: Iterable[float] | Tensor) -> list[float]:
    if isinstance(timesteps, Tensor):
        return timesteps.detach().flatten().tolist()
    return [float(one) for one in timesteps]


def single_timestep(timestep: Any) -> float:
    """The timestep of a call, of one number or a tensor; ValueError where it is at several."""
    values = _values(timestep if isinstance(timestep, Tensor) else [timestep])
    if len(set(values)) != 1:
        raise ValueError(
            f"dense steps need calls at one timestep, and this one is at {len(set(values))}: "
            "use a recipe without dense_steps, dense_last_steps and dense_sigmas, and no bf16_sigmas"
        )
    return values[0]

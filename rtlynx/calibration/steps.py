"""How far sampling is: the steps that a pipeline's schedulers have taken."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StepCount:
    """How many steps the schedulers of a pipeline have taken."""

    def __init__(self) -> None:
        self.count = 0


class _CountedStep:
    """`scheduler.step`, counted. Pipelines copy their schedulers: what a copy does is counted too."""

    def __init__(self, scheduler: Any, steps: StepCount) -> None:
        self.scheduler, self.steps = scheduler, steps
        # Pipelines look at its signature.
        functools.update_wrapper(self, type(scheduler).step.__get__(scheduler))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.steps.count += 1
        return type(self.scheduler).step(self.scheduler, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CountedStep:
        return _CountedStep(memo[id(self.scheduler)], self.steps)


@contextmanager
def counted_steps(pipeline: Any) -> Iterator[StepCount]:
    """Count the steps that the schedulers of `pipeline` take; those of a pipeline without any stay 0."""
    steps = StepCount()
    schedulers = [
        one
        for one in getattr(pipeline, "__dict__", {}).values()
        if callable(getattr(type(one), "step", None)) and hasattr(one, "set_timesteps")
    ]
    before = [vars(one).get("step") for one in schedulers]
    try:
        for one in schedulers:
            one.step = _CountedStep(one, steps)
        yield steps
    finally:
        for one, own in zip(schedulers, before, strict=True):
            del one.step
            if own is not None:
                one.step = own

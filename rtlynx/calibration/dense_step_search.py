"""How many of a picture's last steps run in dense fp8 (`Recipe.dense_sigmas` "auto"): a choice by pictures.

A step in dense fp8 takes more time than a sparse one, so the more there are, the more inputs the other steps
have to make sparse for the same time. Which of both costs less differs from model to model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.apply import temporarily_sparse
from rtlynx.calibration.budget import Choice, DenseStepsCandidate, InputCost, format_steps, inputs_of
from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.prices import ModelPrices
from rtlynx.calibration.processes import broadcast, rank, sum_over_processes, world
from rtlynx.calibration.progress import ProgressBar
from rtlynx.calibration.recording import Recording
from rtlynx.calibration.replay import device_of
from rtlynx.calibration.solutions import SolutionStore
from rtlynx.math.formats import FP8_DENSE, FormatName
from rtlynx.models.architecture import Architecture
from rtlynx.models.attention_backend import dense_steps_told_by
from rtlynx.models.hooks import entering_calls
from rtlynx.models.pipelines import tensor_of
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.nn.call import calling, step_of
from rtlynx.nn.solution import Solution
from rtlynx.recipe import Budget

# Numbers of last steps that are compared, up to half of a picture's. Few: all prompts are drawn for each.
LAST_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)
# How many prompts each candidate draws; few order the candidates, since all start from the same noise.
JUDGED_PROMPTS = 16


class IncomparableSteps(CalibrationError):
    """A pipeline does not tell what the choice of dense steps needs."""


# How many steps a picture has -> number of each -> its noise level.
_Schedules = dict[int, dict[int, float]]


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of a picture's steps, in order."""

    sigmas: tuple[float, ...]

    def below(self, last: int) -> tuple[tuple[float, float], ...]:
        """Ranges of noise levels that hold the `last` steps and no others.

        The bound lies between two steps, so that it divides other numbers of steps much alike.
        """
        if not last:
            return ()
        low = 0.0 if self.sigmas[-1] > 1e-5 else -1.0  # a range is open at its low end
        return ((low, (self.sigmas[-last - 1] + self.sigmas[-last]) / 2),)


class PictureTime:
    """What a picture's steps save, by price: some of them sparse, the last ones in dense fp8.

    Times are against steps in which all layers whose format is up for choice stay as they were.

    Parameters
    ----------
    plan : Plan
    costs : what each input saves in a sparse step, in each format.
    prices : ModelPrices
    """

    def __init__(self, plan: Plan, costs: Sequence[InputCost], prices: ModelPrices) -> None:
        self._prices, self._readers = prices, inputs_of(plan.layers)
        self._free = {name for cost in costs for name in cost.layers}
        self._order = format_steps(costs)
        # Of one step, where the budget takes all formats that it can: its speedup share is of this.
        self.possible = sum(step.saving for step in self._order)

    def sparse_share(self, last: int, steps: int, share: float) -> float | None:
        """The least share of the possible saving that the sparse steps must reach, where `last` are dense.

        So that a picture of so many `steps` saves `share` of what it would if each step saved all that is
        possible. None where that is out of reach.
        """
        if not last:
            return share
        formats: dict[str, FormatName] = {}
        saved_dense = {name: self._saved_in_dense_step(name, formats) for name in self._readers}
        in_dense_step, saved = sum(saved_dense.values()), 0.0
        for step in self._order:
            saved += step.saving
            formats.update(dict.fromkeys(step.end.layers, step.end.format))
            name = step.end.name
            in_dense_step -= saved_dense[name]
            saved_dense[name] = self._saved_in_dense_step(name, formats)
            in_dense_step += saved_dense[name]
            whole = (steps - last) * saved + last * in_dense_step
            if whole >= share * steps * self.possible * (1 - 1e-9):
                return min(1.0, saved / self.possible)
        return None

    def _saved_in_dense_step(self, name: str, formats: Mapping[str, FormatName]) -> float:
        """Microseconds that the readers of one input save in a step that runs dense."""
        readers = self._readers[name]
        before = [layer.dense("") if layer.name in self._free else layer for layer in readers]
        after = [
            layer.in_format(formats.get(layer.name, "dense")) if layer.name in self._free else layer
            for layer in readers
        ]
        return self._prices.us(before) - self._prices.us(map(in_dense_step, after))


def in_dense_step(layer: LayerPlan) -> LayerPlan:
    """What a layer is in a step in dense fp8: its original weight in e4m3, but as it was where it is dense.

    Layers that read one input quantise it once, as their fused blocks do.
    """
    return layer if layer.dense_reason is not None else layer.in_format(FP8_DENSE.name)


def picture_time(plan: Plan, prices: ModelPrices, last: int, steps: int) -> float:
    """Modelled time of the layers of a picture whose `last` steps run dense, over that in dense bfloat16."""

    def us(layer_of: Callable[[LayerPlan], LayerPlan]) -> float:
        return sum(prices.us(map(layer_of, readers)) for readers in inputs_of(plan.layers).values())

    taken = (steps - last) * us(lambda layer: layer) + last * us(in_dense_step)
    return taken / (steps * us(lambda layer: layer.dense("")))


class DenseStepSearch:
    """Draws held-out prompts with the dense model, and later with each candidate.

    Parameters
    ----------
    recording : Recording
        Of a pipeline whose model is dense.
    show : bool
        Show progress bars.

    Raises
    ------
    IncomparableSteps
        If the noise levels of the pipeline's steps are not known or do not fall, or it draws nothing that
        can be compared.
    CalibrationError
        If a prompt is not drawn. Both in all processes at once.
    """

    def __init__(self, recording: Recording, *, show: bool) -> None:
        self.recording, self.show = recording, show
        self.model: nn.Module = recording.model
        self.device = device_of(self.model)
        known = recording.prompts_of["heldout"] or recording.prompts_of["fit"]
        judged = list(known.items())[:: max(1, len(known) // JUDGED_PROMPTS)][:JUDGED_PROMPTS]
        self.count = len(judged)
        self.prompts = judged[rank() :: world()]  # each process draws its part
        steps: _Schedules = {}
        refusal: CalibrationError | None = None
        try:
            with (
                self._progress("drawing dense pictures", 1) as advance,
                _watched(recording, steps),
                dense_steps_told_by(self.model, "layers"),
                calling(dense=True),  # attention is what it is in dense steps
            ):
                self.reference = self._draw(advance)
        except CalibrationError as error:  # for the other processes, which wait, to say too
            refusal = error
        steps, of_first = broadcast((steps, refusal))
        for one in (of_first, refusal):
            if one is not None:
                raise one
        self.levels = _levels(steps)

    def choose(
        self,
        plan: Plan,
        costs: Sequence[InputCost],
        prices: ModelPrices,
        decide: Callable[[Budget], Choice],
        solutions: SolutionStore,
    ) -> tuple[Plan, Choice]:
        """The plan and choice of the candidate whose pictures are nearest to the dense model's.

        Parameters
        ----------
        plan : Plan
            Before the budget has chosen.
        costs : what each input costs and saves alone, in each format.
        prices : ModelPrices
            By which `costs` say what is saved.
        decide : what the budget makes of a limit for the sparse steps.
        solutions : of every layer in every format.

        Returns
        -------
        Plan, Choice
            The plan's recipe says which steps run dense, and the speedup share of the sparse ones.
        """
        assert plan.recipe.budget is not None
        share = plan.recipe.budget.speedup_share
        assert share is not None
        time, steps = PictureTime(plan, costs, prices), len(self.levels.sigmas)
        shares = {last: time.sparse_share(last, steps, share) for last in LAST_STEPS if 2 * last <= steps}
        affordable = {last: one for last, one in shares.items() if one is not None}
        found: list[tuple[Plan, Choice, DenseStepsCandidate]] = []
        with self._progress("comparing dense steps", len(affordable)) as advance:
            for last, one in affordable.items():
                ranges, budget = self.levels.below(last), Budget(speedup_share=one)
                choice = decide(budget)
                changed = plan.in_formats(choice.formats).leave_dense(choice.dense)
                changed = replace(changed, recipe=replace(plan.recipe, dense_sigmas=ranges, budget=budget))
                error = self._error(changed, solutions.of(changed.sparse), advance)
                taken = picture_time(changed, prices, last, steps)
                found.append((changed, choice, DenseStepsCandidate(last, steps, ranges, one, error, taken)))
        every = tuple(candidate for _, _, candidate in found)
        found = [(one, replace(choice, candidates=every), candidate) for one, choice, candidate in found]
        return next((one, choice) for one, choice, candidate in found if candidate is choice.best_candidate)

    def _error(self, plan: Plan, solutions: Mapping[str, Solution], advance: Callable[[int], None]) -> float:
        """Mean squared error of what is drawn as `plan` says; infinite where that is not finite."""
        with (
            temporarily_sparse(self.model, plan.sparse, solutions, plan.recipe),
            entering_calls(self.model, plan),
        ):
            drawn = self._draw(advance)
        squared = sum(
            float((one.double() - wanted.double()).square().sum())
            for one, wanted in zip(drawn, self.reference, strict=True)
        )
        squared, entries = sum_over_processes([squared, sum(one.numel() for one in drawn)], self.device)
        return squared / entries if math.isfinite(squared) else math.inf

    @torch.no_grad()
    def _draw(self, advance: Callable[[int], None]) -> list[Tensor]:
        """What the pipeline gives for each batch of this process's prompts."""
        options, found = self.recording.options, []
        for start in range(0, len(self.prompts), options.batch_size):
            numbers, prompts = zip(*self.prompts[start : start + options.batch_size], strict=True)
            seeds = [options.seed + number for number in numbers]
            try:
                found += [
                    tensor_of(self.recording.pipeline, drawn) for drawn in self.recording.draw(prompts, seeds)
                ]
            except TypeError as error:
                raise IncomparableSteps(f"it compares pictures, and {error}") from None
            advance(len(prompts))
        return found

    @contextmanager
    def _progress(self, what: str, times: int) -> Iterator[Callable[[int], None]]:
        with ProgressBar(what, times * len(self.prompts), show=self.show) as advance:
            yield advance


@contextmanager
def _watched(recording: Recording, steps: _Schedules) -> Iterator[None]:
    """Meanwhile, put what is known of each step of a picture into `steps`."""
    architecture: Architecture = recording.plan.architecture

    def see(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = architecture.timestep(architecture.call_arguments(model, args, kwargs))
        step = step_of(timestep)
        if step is None or step.sigma is None:
            raise IncomparableSteps(
                f"it goes by noise levels, and the pipeline that calls this {type(model).__name__} does not "
                "tell them: put its sampling loop into `with rtlynx.schedule(timesteps, sigmas):`, or choose "
                "the steps yourself (dense_last_steps)"
            )
        steps.setdefault(step.count, {}).setdefault(step.index, step.sigma)

    handle = recording.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _levels(steps: _Schedules) -> NoiseLevels:
    """Of the first picture; others may have another number of steps."""
    first = next(iter(steps.values()))
    sigmas = tuple(first[index] for index in sorted(first))
    if any(after >= before for before, after in pairwise(sigmas)):
        shown = ", ".join(f"{sigma:.3g}" for sigma in sigmas)
        raise IncomparableSteps(
            f"it divides the steps of a picture at one noise level, and theirs do not fall ({shown}): choose "
            "ranges yourself"
        )
    return NoiseLevels(sigmas)

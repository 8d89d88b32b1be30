"""Which format the readers of each input get, by rule: error added to the output against time saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rtlynx.math.formats import FormatName
from rtlynx.models.plan import LayerPlan
from rtlynx.recipe import Budget


@dataclass(frozen=True)
class InputCost:
    """What one input costs and saves: all layers that read it, in one format.

    name : key of the input, `Candidate.reads`.
    layers : names of its readers, without those whose format is not up for choice.
    error : relative squared error that they alone, together, add to the model's output.
    saving : microseconds that they save in one forward pass (`rtlynx.calibration.prices`); negative where
        they lose.
    """

    name: str
    layers: tuple[str, ...]
    format: FormatName
    error: float
    saving: float


def inputs_of(layers: Iterable[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """Key of an input -> the layers that read it, in model order."""
    found: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        found.setdefault(layer.candidate.reads, []).append(layer)
    return found


@dataclass(frozen=True)
class DenseStepsCandidate:
    """So many of a picture's last steps in dense fp8, and what that costs in the time of the budget.

    last_steps, steps : how many run dense, and how many a picture has.
    dense_sigmas : the same as ranges of noise levels, as `Recipe` takes them.
    speedup_share : share of the possible saving that the other steps must then reach, for `Budget`.
    error : mean squared error of what the pipeline drew (latents where it gives them) against the dense
        model, of held-out prompts where there are any.
    time : modelled time of a picture's layers, as a share of that in dense bfloat16.
    """

    last_steps: int
    steps: int
    dense_sigmas: tuple[tuple[float, float], ...]
    speedup_share: float
    error: float
    time: float


@dataclass(frozen=True)
class Choice:
    """What the budget decided.

    sparse : names of the layers that do not stay dense, best first.
    dense : name of a layer -> reason.
    error : relative squared error of the model's output with exactly these layers changed, measured.
    speedup_share : share of the possible saving that they reach.
    formats : format of each layer in `sparse`; one for all that are up for choice and read one input.
    candidates : what was compared where `Recipe.dense_sigmas` is "auto", by growing number of dense steps.
    """

    sparse: tuple[str, ...]
    dense: dict[str, str]
    error: float
    speedup_share: float
    formats: dict[str, FormatName]
    candidates: tuple[DenseStepsCandidate, ...] = ()

    @property
    def best_candidate(self) -> DenseStepsCandidate | None:
        """The candidate of least error, which was taken (of equal ones that of fewest dense steps)."""
        return min(self.candidates, key=lambda one: one.error, default=None)

    def compared(self) -> list[dict[str, Any]]:
        """The candidates as JSON takes them, and which was chosen."""
        return [{**asdict(one), "chosen": one is self.best_candidate} for one in self.candidates]


@dataclass(frozen=True)
class FormatStep:
    """From one format of an input (None: dense) to the next on its convex hull."""

    start: InputCost | None
    end: InputCost

    @property
    def error(self) -> float:
        return self.end.error - (self.start.error if self.start else 0.0)

    @property
    def saving(self) -> float:
        return self.end.saving - (self.start.saving if self.start else 0.0)


def choose(
    costs: Sequence[InputCost],
    budget: Budget,
    measure: Callable[[Mapping[str, FormatName]], float],
    fixed: Mapping[str, FormatName] | None = None,
) -> Choice:
    """Pick formats by saving per error until the budget is spent, then check on the model's real output.

    Greedy over steps: each input starts dense and climbs the convex hull of its formats (error over saving),
    whose steps save less and less per error, so that they come in order.

    Parameters
    ----------
    costs : what each input costs and saves alone, in each format that its readers may take.
    budget : Budget
    measure : relative squared error of the model's output with layers in these formats together (name of a
        layer -> format).
    fixed : formats of layers that are not up for choice. Their error counts, their saving does not.

    Returns
    -------
    Choice
        Under an error limit the measured error of all layers together is within it, as far as `fixed` leaves
        room: while it is not, the worst step is taken back.
    """
    fixed = dict(fixed or {})
    steps = format_steps(costs)
    possible = sum(step.saving for step in steps)
    dense = {cost.name: "saves nothing" for cost in costs}
    stopped: set[str] = set()
    chosen: list[FormatStep] = []
    error = measure(fixed) if fixed and budget.error is not None else 0.0
    saving = 0.0
    for step in steps:
        name = step.end.name
        if name in stopped:
            continue  # a step further up the hull of an input that did not get this far
        if budget.error is not None and error + step.error > budget.error:
            dense[name] = f"budget: the layers of its input add {step.error:.2e} to the output's error"
            stopped.add(name)
            continue
        if budget.speedup_share is not None and saving >= budget.speedup_share * possible * (1 - 1e-9):
            dense[name] = "budget: enough saved without it"
            stopped.add(name)
            continue
        chosen.append(step)
        error += step.error
        saving += step.saving

    def formats() -> dict[str, FormatName]:
        return {layer: step.end.format for step in chosen for layer in step.end.layers}

    together = measure({**fixed, **formats()}) if chosen or fixed else 0.0
    while budget.error is not None and chosen and together > budget.error:
        worst = chosen.pop()
        dense[worst.end.name] = "budget: errors together exceed it"
        together = measure({**fixed, **formats()}) if chosen or fixed else 0.0
    reached = sum(step.saving for step in chosen) / possible if possible else 0.0
    found = formats()
    reasons = {layer: dense[cost.name] for cost in costs for layer in cost.layers if layer not in found}
    return Choice(tuple(found), reasons, together, reached, found)


def format_steps(costs: Sequence[InputCost]) -> list[FormatStep]:
    """All steps of all inputs, in the order in which a budget takes them. Together they save all there is."""
    by_name: dict[str, list[InputCost]] = {}
    for cost in costs:
        by_name.setdefault(cost.name, []).append(cost)
    priced: list[tuple[float, FormatStep]] = []
    for options in by_name.values():
        price = 0.0
        for step in _hull(options):
            price = max(price, step.error / step.saving)  # keeps an input's steps in order despite rounding
            priced.append((price, step))
    return [step for _, step in sorted(priced, key=lambda pair: pair[0])]


def _hull(options: Sequence[InputCost]) -> list[FormatStep]:
    """Steps from dense along the lower convex hull of (saving, error), as far as saving grows."""
    path: list[InputCost] = []
    for option in sorted(options, key=lambda cost: (cost.saving, -cost.error)):
        if option.saving <= 0:
            continue
        while path:
            start = path[-2] if len(path) > 1 else None
            before, after = FormatStep(start, path[-1]), FormatStep(path[-1], option)
            if after.saving > 0 and before.error * after.saving <= after.error * before.saving:
                break
            path.pop()  # above the line from the point before it to `option`
        path.append(option)
    starts = [None, *path]
    return [FormatStep(starts[i], end) for i, end in enumerate(path)]

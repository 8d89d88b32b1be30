"""Which format each layer gets, by rule: error added to the model's output against time saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rtlynx.math.formats import FP8_DENSE, FormatName
from rtlynx.models.plan import LayerPlan
from rtlynx.recipe import Budget

# Time of the product relative to the dense bfloat16 one, measured on an H100: geometric means over the layers
# of benchmarks/results/linear-bf16-h100.json and linear-fp8-h100.json. Sparse ones are 2:4.
PRODUCT_TIME: dict[FormatName, float] = {
    "dense": 1.0,
    "bf16-sparse": 0.665,
    "fp8-dense": 0.552,
    "fp8-sparse": 0.379,
}


def flops_saved(layer: LayerPlan, tokens: int, readers: int = 1) -> float:
    """Dense bfloat16 FLOPs whose time a layer saves in one forward pass; negative where it loses.

    A model: a 2:4 product takes its `PRODUCT_TIME`, other n:m, for which there is no kernel, in proportion.
    The low-rank branch is extra, in bfloat16; its down-projection is shared by the `readers` layers that read
    one tensor with one A. Selecting and quantising are counted as free.
    """
    k, n, pattern = layer.in_features, layer.out_features, layer.pattern
    time = PRODUCT_TIME[layer.format.name] * (1.0 if layer.format is FP8_DENSE else 2 * pattern.n / pattern.m)
    return 2 * tokens * k * n * (1 - time) - 2 * tokens * layer.rank * (n + k / readers)


@dataclass(frozen=True)
class LayerCost:
    """One layer in one format in the balance.

    error : relative squared error that it alone adds to the model's output.
    saving : dense bfloat16 FLOPs whose time it saves in one forward pass.
    """

    name: str
    error: float
    saving: float
    format: FormatName = "bf16-sparse"


@dataclass(frozen=True)
class Choice:
    """What the budget decided.

    sparse : names that do not stay dense, best first.
    dense : name -> reason.
    error : relative squared error of the model's output with exactly these layers changed, measured.
    speedup_share : share of the possible saving that they reach.
    formats : format of each layer in `sparse`.
    """

    sparse: tuple[str, ...]
    dense: dict[str, str]
    error: float
    speedup_share: float
    formats: dict[str, FormatName]


@dataclass(frozen=True)
class _Step:
    """From one format of a layer (None: dense) to the next on its convex hull."""

    start: LayerCost | None
    end: LayerCost

    @property
    def error(self) -> float:
        return self.end.error - (self.start.error if self.start else 0.0)

    @property
    def saving(self) -> float:
        return self.end.saving - (self.start.saving if self.start else 0.0)


def choose(
    costs: Sequence[LayerCost],
    budget: Budget,
    measure: Callable[[Mapping[str, FormatName]], float],
    fixed: Mapping[str, FormatName] | None = None,
) -> Choice:
    """Pick formats by saving per error until the budget is spent, then check on the model's real output.

    Greedy over steps: each layer starts dense and climbs the convex hull of its formats (error over saving),
    whose steps save less and less per error, so that they come in order.

    Parameters
    ----------
    costs : what each layer costs and saves alone, in each format that it may take.
    budget : Budget
    measure : relative squared error of the model's output with layers in these formats together (name ->
        format).
    fixed : formats that are not up for choice. Their error counts, their saving does not.

    Returns
    -------
    Choice
        Under an error limit the measured error of all layers together is within it, as far as `fixed` leaves
        room: while it is not, the worst step is taken back.
    """
    fixed = dict(fixed or {})
    by_name: dict[str, list[LayerCost]] = {}
    for cost in costs:
        by_name.setdefault(cost.name, []).append(cost)
    priced: list[tuple[float, _Step]] = []
    for options in by_name.values():
        price = 0.0
        for step in _hull(options):
            price = max(price, step.error / step.saving)  # rounding must not turn the steps of a layer round
            priced.append((price, step))
    steps = [step for _, step in sorted(priced, key=lambda pair: pair[0])]
    possible = sum(step.saving for step in steps)
    dense = {name: "saves nothing" for name in by_name}
    stopped: set[str] = set()
    chosen: list[_Step] = []
    error = measure(fixed) if fixed and budget.error is not None else 0.0
    saving = 0.0
    for step in steps:
        name = step.end.name
        if name in stopped:
            continue  # a step further up the hull of a layer that did not get this far
        if budget.error is not None and error + step.error > budget.error:
            dense[name] = f"budget: adds {step.error:.2e} to the output's error"
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
        return {step.end.name: step.end.format for step in chosen}

    together = measure({**fixed, **formats()}) if chosen or fixed else 0.0
    while budget.error is not None and chosen and together > budget.error:
        worst = chosen.pop()
        dense[worst.end.name] = "budget: errors together exceed it"
        together = measure({**fixed, **formats()}) if chosen or fixed else 0.0
    reached = sum(step.saving for step in chosen) / possible if possible else 0.0
    found = formats()
    left = {name: reason for name, reason in dense.items() if name not in found}
    return Choice(tuple(found), left, together, reached, found)


def _hull(options: Sequence[LayerCost]) -> list[_Step]:
    """Steps from dense along the lower convex hull of (saving, error), as far as saving grows."""
    path: list[LayerCost] = []
    for option in sorted(options, key=lambda cost: (cost.saving, -cost.error)):
        if option.saving <= 0:
            continue
        while path:
            start = path[-2] if len(path) > 1 else None
            before, after = _Step(start, path[-1]), _Step(path[-1], option)
            if after.saving > 0 and before.error * after.saving <= after.error * before.saving:
                break
            path.pop()  # above the line from the point before it to `option`
        path.append(option)
    starts = [None, *path]
    return [_Step(starts[i], end) for i, end in enumerate(path)]

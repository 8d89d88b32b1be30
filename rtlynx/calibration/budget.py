"""Which layers stay dense, by rule: error added to the model's output against FLOPs saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtlynx.models.plan import LayerPlan
from rtlynx.recipe import Budget


def flops_saved(layer: LayerPlan, tokens: int, readers: int = 1) -> float:
    """Dense-rate FLOPs that a sparse layer saves in one forward pass; negative where it loses.

    A model, not a measurement: the sparse product runs n of every m multiplications, the low-rank branch is
    extra; its down-projection is shared by the `readers` layers that read one tensor with one A. Selecting
    is counted as free.
    """
    k, n, pattern = layer.in_features, layer.out_features, layer.pattern
    saved = 2 * tokens * k * n * (1 - pattern.n / pattern.m)
    return saved - 2 * tokens * layer.rank * (n + k / readers)


@dataclass(frozen=True)
class LayerCost:
    """One layer in the balance.

    error : relative squared error that it alone adds to the model's output.
    saving : FLOPs that it saves in one forward pass.
    """

    name: str
    error: float
    saving: float


@dataclass(frozen=True)
class Choice:
    """What the budget decided.

    sparse : names that turn sparse, best first.
    dense : name -> reason.
    error : relative squared error of the model's output with exactly these layers sparse, measured.
    saving : share of the possible saving that they reach.
    """

    sparse: tuple[str, ...]
    dense: dict[str, str]
    error: float
    saving: float


def choose(costs: Sequence[LayerCost], budget: Budget, measure: Callable[[Sequence[str]], float]) -> Choice:
    """Pick layers by saving per error until the budget is spent, then check on the model's real output.

    Parameters
    ----------
    costs : what each layer costs and saves alone.
    budget : Budget
    measure : relative squared error of the model's output with the named layers sparse together.

    Returns
    -------
    Choice
        Under an error limit the measured error of all chosen layers together is within it: while it is not,
        the worst chosen layer is left dense.
    """
    possible = sum(max(cost.saving, 0.0) for cost in costs)
    dense = {cost.name: "saves nothing" for cost in costs if cost.saving <= 0}
    ranked = sorted((cost for cost in costs if cost.saving > 0), key=lambda c: c.error / c.saving)
    chosen: list[LayerCost] = []
    error = saving = 0.0
    for cost in ranked:
        if budget.error is not None and error + cost.error > budget.error:
            dense[cost.name] = f"budget: adds {cost.error:.2e} to the output's error"
            continue
        if budget.saving is not None and saving >= budget.saving * possible * (1 - 1e-9):
            dense[cost.name] = "budget: enough saved without it"
            continue
        chosen.append(cost)
        error += cost.error
        saving += cost.saving
    together = measure([cost.name for cost in chosen]) if chosen else 0.0
    while budget.error is not None and chosen and together > budget.error:
        worst = chosen.pop()
        dense[worst.name] = "budget: errors together exceed it"
        together = measure([cost.name for cost in chosen]) if chosen else 0.0
    reached = sum(cost.saving for cost in chosen) / possible if possible else 0.0
    return Choice(tuple(cost.name for cost in chosen), dense, together, reached)

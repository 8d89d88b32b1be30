"""Put calibrated solutions into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from rtlynx.calibration.solve import Solution
from rtlynx.math.fp8 import Quantized
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.sparsify import apply_plan
from rtlynx.nn.sparse_linear import SparseLinear


def apply_solutions(
    model: nn.Module,
    plan: Plan,
    solutions: Mapping[str, Solution],
    tensors: dict[str, str] | None = None,
) -> None:
    """Make `model` sparse by `plan`, each layer with its solution; see `apply_plan`, also for `tensors`."""

    def prepare(name: str, layer: SparseLinear) -> None:
        install(layer, solutions[name], keep_dense=layer.depends_on_call)

    apply_plan(model, plan, prepare, tensors=tensors)


def install(layer: SparseLinear, solution: Solution, *, keep_dense: bool) -> None:
    """Give one sparse layer its refitted or quantised weight and its low-rank factors."""
    if solution.lowrank_a is not None and solution.lowrank_b is not None:
        layer.set_lowrank(solution.lowrank_a, solution.lowrank_b)
    if solution.weight is None:
        return
    if solution.scale is None:
        layer.set_refit(solution.weight, keep_dense=keep_dense)
    else:
        quantised = Quantized(solution.weight, solution.scale)
        layer.set_quantized(quantised, keep_dense=keep_dense, refitted=solution.refitted)


def solved_layer(model: nn.Module, layer: LayerPlan, solution: Solution, *, keep_dense: bool) -> SparseLinear:
    """The sparse layer, with its solution, that takes the place of a dense one of `model`."""
    dense: Any = model.get_submodule(layer.name)
    sparse = SparseLinear.from_linear(dense, pattern=layer.pattern, norm=layer.norm)
    install(sparse, solution, keep_dense=keep_dense)
    return sparse


@contextmanager
def temporarily_sparse(
    model: nn.Module, layers: list[LayerPlan], solutions: Mapping[str, Solution]
) -> Iterator[None]:
    """Run a dense `model` with some layers sparse, one original weight in memory at most beside each."""
    originals: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in layers}
    try:
        for layer in layers:
            sparse = solved_layer(model, layer, solutions[layer.name], keep_dense=False)
            model.set_submodule(layer.name, sparse)
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)

"""Put calibrated solutions into a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.reparameterize import Reparameterization
from rtlynx.models.sparsify import apply_plan, state_of
from rtlynx.nn.solution import Solution
from rtlynx.nn.sparse_linear import SparseLinear


def apply_solutions(
    model: nn.Module,
    plan: Plan,
    solutions: Mapping[str, Solution],
    tensors: dict[str, str] | None = None,
    done: Reparameterization | None = None,
) -> None:
    """Make `model` sparse by `plan`, each layer with its solution; see `apply_plan`, also for the others."""

    def prepare(name: str, layer: SparseLinear) -> None:
        solutions[name].install(layer, keep_dense=layer.depends_on_call)

    apply_plan(model, plan, prepare, tensors=tensors, done=done)
    state = state_of(model)
    assert state is not None
    state.errors = {name: one.error for name, one in solutions.items() if math.isfinite(one.error)}


def solved_layer(model: nn.Module, layer: LayerPlan, solution: Solution) -> SparseLinear:
    """The sparse layer, with its solution, that takes the place of a dense one of `model`."""
    dense: Any = model.get_submodule(layer.name)
    sparse = SparseLinear.from_linear(dense, pattern=layer.pattern, norm=layer.norm)
    solution.install(sparse, keep_dense=False)
    return sparse


@contextmanager
def temporarily_sparse(
    model: nn.Module, layers: list[LayerPlan], solutions: Mapping[str, Solution]
) -> Iterator[None]:
    """Run a dense `model` with some layers sparse, one original weight in memory at most beside each."""
    originals: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in layers}
    try:
        for layer in layers:
            sparse = solved_layer(model, layer, solutions[layer.name])
            model.set_submodule(layer.name, sparse)
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)

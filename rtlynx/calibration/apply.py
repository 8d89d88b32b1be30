"""Put calibrated solutions into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.reparameterize import Reparameterization
from rtlynx.models.sparsify import apply_plan, set_what_runs_dense, state_of
from rtlynx.nn.original import keep_original
from rtlynx.nn.solution import Solution
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.recipe import Recipe


def apply_solutions(
    model: nn.Module,
    plan: Plan,
    solutions: Mapping[str, Solution],
    tensors: dict[str, str] | None = None,
    done: Reparameterization | None = None,
) -> None:
    """Make `model` sparse by `plan`, each layer with its solution; see `apply_plan`, also for the others."""

    def prepare(name: str, layer: SparseLinear) -> None:
        if name in solutions:  # (calibration solves for no modulation, which then gets plain scales)
            solutions[name].install(layer, keep_dense=layer.depends_on_call)

    apply_plan(model, plan, prepare, tensors=tensors, done=done)
    state = state_of(model)
    assert state is not None
    state.errors = {name: one.error for name, one in solutions.items() if math.isfinite(one.error)}


def solved_layer(
    model: nn.Module, layer: LayerPlan, solution: Solution, recipe: Recipe | None = None
) -> SparseLinear:
    """The sparse layer, with its solution, that takes the place of a dense one of `model`.

    `recipe` says which rows and steps run dense; without one, none do.
    """
    dense: Any = model.get_submodule(layer.name)
    sparse = SparseLinear.from_linear(dense, pattern=layer.pattern, norm=layer.norm)
    if recipe is not None:
        set_what_runs_dense(sparse, layer, recipe)
    solution.install(sparse, keep_dense=sparse.depends_on_call)
    if sparse.depends_on_call and sparse.dense_precision == "fp8":
        keep_original(sparse)  # in e4m3 also where the weight is the original one
    return sparse


@contextmanager
def temporarily_sparse(
    model: nn.Module,
    layers: Iterable[LayerPlan],
    solutions: Mapping[str, Solution],
    recipe: Recipe | None = None,
) -> Iterator[None]:
    """Run a dense `model` with some layers sparse, one original weight in memory at most beside each.

    For rows and steps that run dense give a `recipe`, whose calls the model's hooks are to enter.
    """
    layers = list(layers)
    originals: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in layers}
    try:
        for layer in layers:
            sparse = solved_layer(model, layer, solutions[layer.name], recipe)
            model.set_submodule(layer.name, sparse)
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)

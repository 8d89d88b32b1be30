"""Overviews for `rtlynx inspect`."""

from __future__ import annotations

from typing import Any

from torch import nn

from rtlynx.math.formats import FP8_DENSE
from rtlynx.models.plan import LayerPlan, Plan, make_plan
from rtlynx.models.sparsify import extra_bytes, state_of, target_model
from rtlynx.recipe import Recipe


def describe(model_or_pipeline: Any, recipe: Recipe | None = None) -> dict[str, Any]:
    """What a recipe would do to a model, or what was done to a sparse one, in plain JSON values.

    Returns
    -------
    dict with `model`, `architecture`, `recipe`, `layers` (each candidate: name, shape, role, stream, rule
    that decided, pattern, rank, format, error, dense_reason), `modulation` (layers of weights in eight bits,
    likewise), `other_layers` (linear that is none of these -> why), `sparse_layers` (how many drop
    activations or weights), `sparse_share` (their share of the weights of all linears), `extra_bytes`
    (memory beyond the dense model's, negative where quantised weights save more) and `undecided` (whether a
    budget is still to decide).
    """
    model = target_model(model_or_pipeline)
    state = state_of(model)
    plan = make_plan(model, recipe or Recipe.recommended()) if state is None else state.plan
    errors = {} if state is None else state.errors
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    modulation = {layer.name for layer in plan.modulation}
    halved = [layer for layer in plan.sparse if layer.format is not FP8_DENSE]
    sparse = sum(layer.in_features * layer.out_features for layer in halved)
    bytes_each = next((parameter.element_size() for parameter in model.parameters()), 0)
    planned = sum(_planned_extra(layer, plan.recipe, bytes_each) for layer in plan.replaced)
    planned += _planned_originals(model, plan, bytes_each) + _planned_biases(model, plan, bytes_each)
    return {
        "model": type(model).__name__,
        "architecture": plan.architecture.class_name if plan.architecture.rules else "generic",
        "recipe": plan.recipe.to_dict(),
        "layers": [_describe_layer(layer, errors.get(layer.name)) for layer in plan.layers],
        "modulation": [_describe_layer(layer, None) for layer in plan.modulation],
        "other_layers": {
            name: reason
            for name, reason in plan.architecture.decisions(model).items()
            if isinstance(reason, str) and name not in modulation
        },
        "sparse_layers": len(halved),
        "sparse_share": sparse / weights if weights else 0.0,
        "extra_bytes": planned if state is None else extra_bytes(model),
        "undecided": state is None and plan.recipe.budget is not None,
    }


def _describe_layer(layer: LayerPlan, error: float | None) -> dict[str, Any]:
    pattern = layer.pattern
    return {
        "name": layer.name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "role": layer.candidate.role,
        "stream": layer.candidate.stream,
        "rule": layer.candidate.rule,
        "reads": layer.candidate.reads,
        "pattern": f"{pattern.n}:{pattern.m} {pattern.grouping}",
        "norm": layer.norm,
        "rank": layer.rank,
        "format": layer.format.name,
        "error": error,
        "dense_reason": layer.dense_reason,
    }


def _planned_originals(model: nn.Module, plan: Plan, bytes_each: int) -> int:
    """Bytes of reparameterized layers as they were: kept where all others keep their original weight too."""
    changed = plan.recipe.refit or any(layer.quantized for layer in plan.sparse)
    whole = plan.recipe.dense_precision == "bf16"
    if changed and not (whole and all(layer.has_dense_calls(plan.recipe) for layer in plan.sparse)):
        return 0
    names = {name for one in plan.reparameterized for name in one.parameters}
    return bytes_each * sum(one.numel() for name, one in model.named_parameters() if name in names)


def _planned_biases(model: nn.Module, plan: Plan, bytes_each: int) -> int:
    """Bytes of refitted biases where there was none, and of the original ones that are kept."""
    if not plan.recipe.intercept:
        return 0
    refitted = [layer for layer in plan.sparse if layer.refits(plan.recipe)]
    added = {layer.name for layer in refitted if model.get_submodule(layer.name).bias is None}
    copies = {layer.name: layer.has_dense_calls(plan.recipe) + (layer.name in added) for layer in refitted}
    return bytes_each * sum(layer.out_features * copies[layer.name] for layer in refitted)


def _planned_extra(layer: LayerPlan, recipe: Recipe, bytes_each: int) -> int:
    """Bytes that the layer will hold beyond its weight: factors, scales, W beside a W' or eight-bit one."""
    weight = layer.in_features * layer.out_features
    extra = layer.rank * (layer.in_features + layer.out_features) * bytes_each
    in_eight_bits = recipe.dense_precision == "fp8"
    if layer.has_dense_calls(recipe) and (recipe.refit or layer.quantized or in_eight_bits):
        extra += weight + 4 * layer.out_features if in_eight_bits else weight * bytes_each
    if layer.quantized:
        extra += 4 * layer.out_features - weight * (bytes_each - 1)
    return extra

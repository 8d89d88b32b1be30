"""The variants that `rtlynx demo` compares: one dense model, made sparse or quantised in nine ways."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtlynx.calibration import CalibrationOptions, calibrate
from rtlynx.io.checkpoint import load
from rtlynx.math.formats import FormatName
from rtlynx.math.selection import Pattern, pattern_mask, select
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import sparse_layers, sparsify, target_model
from rtlynx.recipe import Recipe

NAMES = (
    "dense",
    "weight-2:4",
    "activation-2:4",
    "activation-2:4+norm",
    "activation-2:4+norm+lowrank",
    "activation-2:4+refit+lowrank",
    "fp8",
    "fp8+activation-2:4+refit+lowrank",
    "recommended",
    "activation-2:4+norm:all-layers",
)

# One rank for the paper's recipe and ours, so that they differ in the method alone.
RANK = 0.02
# Folder under the model's `solutions` -> recipe of what is calibrated.
CALIBRATED = {
    "paper": Recipe.paper(rank=RANK),
    "refit": Recipe(rank=RANK),
    "recommended": Recipe.recommended(),
}
_FP8 = "fp8+activation-2:4+refit+lowrank"

# FLUX's text stream keeps its dtype in fp8 rows too, so that rows differ in one thing.
_TEXT_IN_BF16: dict[str, FormatName] = {
    "*.add_?_proj": "dense",
    "*.to_add_out": "dense",
    "*.ff_context.*": "dense",
}
_IMMEDIATE = {
    "activation-2:4": Recipe.immediate(grouping="adjacent", norm="none"),
    "activation-2:4+norm": Recipe.immediate(grouping="adjacent"),
    "fp8": Recipe.immediate(
        n=1, m=1, grouping="adjacent", norm="none", precision="fp8", formats=_TEXT_IN_BF16
    ),
    "activation-2:4+norm:all-layers": Recipe.immediate(grouping="adjacent", text_stream="sparse"),
}
_SOLUTIONS = {
    "activation-2:4+norm+lowrank": "paper",
    "activation-2:4+refit+lowrank": "refit",
    _FP8: "refit",
    "recommended": "recommended",
}

# Live calibration is for trying it out: fewer prompts than the shipped solutions were made from.
LIVE_PROMPTS = 64
LIVE_STEPS = 12


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    pipeline : draws with this variant's transformer, a copy of the dense one.
    layers : name -> layer of the layers that differ from dense.
    calibration_seconds : time of its live calibration, or None.
    """

    name: str
    pipeline: Any
    layers: dict[str, nn.Linear]
    calibration_seconds: float | None = None


def build_variant(
    name: str,
    dense_pipeline: Any,
    *,
    solutions: Path | None,
    calibration_prompts: Sequence[str] = (),
    progress: bool = True,
) -> Variant:
    """Build one of `NAMES` on a fresh copy of the dense pipeline's transformer.

    Parameters
    ----------
    solutions : Path or None
        Folder with the calibrated checkpoints of `CALIBRATED`; None calibrates live. The fp8 variant
        quantises the weights of `refit` by plain scales.
    calibration_prompts : sequence of str
        What live calibration draws.

    Raises
    ------
    ValueError
        For an unknown name.
    CheckpointError
        If a calibrated checkpoint is missing or damaged.
    """
    if name not in NAMES:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(NAMES)}")
    model = copy.deepcopy(target_model(dense_pipeline))
    pipeline = type(dense_pipeline)(**{**dense_pipeline.components, "transformer": model})
    if name == "dense":
        return Variant(name, pipeline, {})
    if name == "weight-2:4":
        return Variant(name, pipeline, prune_weights(model))
    seconds = None
    if name in _IMMEDIATE:
        sparsify(pipeline, _IMMEDIATE[name])
    elif solutions is not None:
        load(pipeline, solutions / _SOLUTIONS[name])
        if name == _FP8:  # the refitted weights of the row above; only live calibration sees the eight bits
            for layer in sparse_layers(model).values():
                layer.quantize()
    else:
        start = time.perf_counter()
        settings = {"num_inference_steps": LIVE_STEPS}
        options = CalibrationOptions(steps_per_prompt=2, pipeline_kwargs=settings)
        recipe = CALIBRATED[_SOLUTIONS[name]]
        if name == _FP8:
            recipe = replace(recipe, precision="fp8", formats=_TEXT_IN_BF16)
        calibrate(pipeline, calibration_prompts, recipe, options, progress=progress)
        seconds = time.perf_counter() - start
    return Variant(name, pipeline, dict(sparse_layers(model)), seconds)


@torch.no_grad()
def prune_weights(model: nn.Module, pattern: Pattern | None = None) -> dict[str, nn.Linear]:
    """Magnitude pruning, in place: 2:4 along the inputs of every layer that `Recipe` would make sparse.

    Activations stay dense. Returns name -> layer of the pruned layers.
    """
    pattern = pattern or Pattern()
    pruned = {}
    for layer in make_plan(model, Recipe.immediate(grouping="adjacent")).sparse:
        linear = model.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(select(linear.weight, pattern_mask(linear.weight, pattern)))
        pruned[layer.name] = linear
    return pruned

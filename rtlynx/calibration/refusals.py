"""What `calibrate` refuses before any work."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from rtlynx.calibration.calls import CalibrationError, Call
from rtlynx.calibration.options import CalibrationOptions, Distillation
from rtlynx.models.attention import has_own_steps
from rtlynx.models.guards import refuse_meta
from rtlynx.models.plan import Plan
from rtlynx.models.sparsify import state_of
from rtlynx.nn.tensor_parallel import refuse_parallel
from rtlynx.recipe import Recipe


def refuse_sequential(recipe: Recipe, options: CalibrationOptions) -> None:
    """ValueError where the recipe leaves formats open that sequential calibration has to know."""
    if recipe.precision == "auto" and options.sequential:
        raise ValueError(
            "sequential calibration shows each block what the blocks before it give, and precision 'auto' "
            "chooses their formats at the end: calibrate one-shot, or with precision fp8 or bf16"
        )


def resolve_dense_sigmas(
    recipe: Recipe, options: CalibrationOptions, transformers: int, calls: Iterable[Call] | None
) -> Recipe:
    """The recipe; it leaves dense steps to calibration only where that can compare pictures."""
    if calls is not None:
        return without_auto_sigmas(recipe, "it compares pictures: give a pipeline and prompts, not calls")
    if options.sequential:
        return without_auto_sigmas(
            recipe,
            "sequential calibration shows each block what the sparse blocks before it give, and which steps "
            "are sparse is chosen at the end: calibrate one-shot",
        )
    if transformers > 1:
        return without_auto_sigmas(recipe, f"it is for one transformer, and this pipeline has {transformers}")
    return recipe


def without_auto_sigmas(recipe: Recipe, reason: str) -> Recipe:
    """The recipe, in which no step runs dense where calibration was to choose; a warning says why."""
    if not recipe.chooses_dense_steps:
        return recipe
    warnings.warn(
        f"no step runs dense, since dense_sigmas 'auto' cannot choose here: {reason}. To avoid this "
        "warning give dense_sigmas=()",
        RuntimeWarning,
        stacklevel=5,  # of who called `calibrate`, past its decorator
    )
    return replace(recipe, dense_sigmas=())


def refuse_for_several(
    pipeline: Any, models: Mapping[str, nn.Module], calls: Any, distill: Distillation | None
) -> None:
    """ValueError for what is about one transformer, where the pipeline draws with several."""
    for what, given in (
        ("calls are of one transformer", calls is not None),
        ("distillation trains one transformer", distill is not None),
    ):
        if given:
            name = type(pipeline).__name__
            raise ValueError(f"{what}, and {name} draws with several ({', '.join(models)})")


def refuse_unfit(model: nn.Module) -> None:
    """ValueError for a model that is sharded, on "meta", calibrated already, or with steps of attention."""
    refuse_parallel(
        model,
        "calibrate before enable_parallelism, one whole model a process, and load the checkpoint after it",
        context=True,
    )
    refuse_meta(model)
    before = state_of(model)
    if before is not None and before.plan.recipe.needs_calibration:
        raise ValueError("the model has been calibrated already: call rtlynx.densify first")
    if has_own_steps(model):
        raise ValueError(
            "attention in eight bits has steps of its own (bf16_sigmas), which recorded calls do not tell: "
            "call rtlynx.fp8_attention(model, enabled=False), calibrate, and fp8_attention again"
        )


def refuse_all_dense(plan: Plan) -> None:
    """CalibrationError where there is no layer to solve."""
    if not plan.sparse:
        reasons = Counter(layer.dense_reason for layer in plan.layers)
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise CalibrationError(f"no layer is left to calibrate: {found}")

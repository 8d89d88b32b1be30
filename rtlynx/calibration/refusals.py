"""What `calibrate` refuses before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rtlynx.calibration.calls import CalibrationError, Call
from rtlynx.calibration.options import CalibrationOptions, Distillation
from rtlynx.models.guards import refuse_meta
from rtlynx.models.plan import Plan
from rtlynx.models.sparsify import state_of
from rtlynx.nn.tensor_parallel import refuse_parallel
from rtlynx.recipe import Recipe


def refuse_choices(recipe: Recipe, options: CalibrationOptions, calls: Iterable[Call] | None) -> None:
    """ValueError where the recipe leaves a choice to calibration that these settings do not allow."""
    if recipe.precision == "auto" and options.sequential:
        raise ValueError(
            "sequential calibration shows each block what the blocks before it give, and precision 'auto' "
            "chooses their formats at the end: calibrate one-shot, or with precision fp8 or bf16"
        )
    if recipe.chooses_dense_steps and options.sequential:
        raise ValueError(
            "sequential calibration shows each block what the sparse blocks before it give, and dense_sigmas "
            "'auto' chooses at the end in which steps they are sparse: calibrate one-shot, or give ranges"
        )
    if recipe.chooses_dense_steps and calls is not None:
        raise ValueError(
            "dense_sigmas 'auto' chooses by pictures: give a pipeline and prompts, not calls, or give ranges"
        )


def refuse_for_several(
    pipeline: Any, models: Mapping[str, nn.Module], recipe: Recipe, calls: Any, distill: Distillation | None
) -> None:
    """ValueError for what is about one transformer, where the pipeline draws with several."""
    for what, given in (
        ("calls are of one transformer", calls is not None),
        ("distillation trains one transformer", distill is not None),
        ("dense_sigmas 'auto' chooses steps of one transformer", recipe.chooses_dense_steps),
    ):
        if given:
            name = type(pipeline).__name__
            raise ValueError(f"{what}, and {name} draws with several ({', '.join(models)})")


def refuse_unfit(model: nn.Module) -> None:
    """ValueError for a model that is sharded, on "meta" or calibrated already."""
    refuse_parallel(
        model,
        "calibrate before enable_parallelism, one whole model a process, and load the checkpoint after it",
        context=True,
    )
    refuse_meta(model)
    before = state_of(model)
    if before is not None and before.plan.recipe.needs_calibration:
        raise ValueError("the model has been calibrated already: call rtlynx.densify first")


def refuse_all_dense(plan: Plan) -> None:
    """CalibrationError where there is no layer to solve."""
    if not plan.sparse:
        reasons = Counter(layer.dense_reason for layer in plan.layers)
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise CalibrationError(f"no layer is left to calibrate: {found}")

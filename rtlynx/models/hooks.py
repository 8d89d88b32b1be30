"""What happens before each call of a sparse model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from rtlynx.context import SparseContext, StepTracker
from rtlynx.models.guards import refuse_adapters, refuse_merged
from rtlynx.models.plan import Plan
from rtlynx.parallel import local_text_rows


def register_hooks(model: nn.Module, plan: Plan, context: SparseContext) -> list[Any]:
    """Forward pre-hooks that `model` needs; their handles."""
    handles = [model.register_forward_pre_hook(begin_step)]
    hook = ContextHook(plan, context)
    if hook.needed:
        handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def begin_step(model: nn.Module, _args: tuple[Any, ...]) -> None:
    """Tell torch.compile's CUDA graphs that a step begins.

    With mode "reduce-overhead" on blocks they otherwise take each block's call for one, and what a block
    gave for overwritten when the next reads it.
    """
    refuse_adapters(model)
    if not torch.compiler.is_compiling() and "torch._inductor.compile_fx" in sys.modules:
        torch.compiler.cudagraph_mark_step_begin()


class ContextHook:
    """Keeps the context of a sparse model's layers right for every call."""

    def __init__(self, plan: Plan, context: SparseContext) -> None:
        self.plan = plan
        self.context = context
        self.steps = StepTracker(plan.architecture.descending)

    @property
    def needed(self) -> bool:
        """Whether any option of the recipe depends on the call."""
        return self.plan.recipe.dense_steps > 0 or self.plan.recipe.text_rows == "dense"

    # Outside of what torch.compile makes of the model: steps are told apart by the value of a tensor.
    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        architecture, recipe = self.plan.architecture, self.plan.recipe
        call = architecture.call_arguments(model, args, kwargs)
        if recipe.text_rows == "dense" and architecture.text_rows is not None:
            rows = local_text_rows(model, architecture.text_rows(call))
            self.context.text_rows = None if rows is None else list(rows)
        if recipe.dense_steps:
            timestep = call.get(architecture.timestep_argument)
            if timestep is None:
                raise ValueError(
                    f"dense_steps needs the model's {architecture.timestep_argument!r} argument, which this "
                    f"call of {type(model).__name__} lacks"
                )
            self.context.dense_step = 0 <= self.steps.update(timestep) < recipe.dense_steps
        if recipe.keeps_dense_weight and getattr(model, "peft_config", None):
            refuse_merged(model)

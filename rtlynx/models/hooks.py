"""What happens before each call of a sparse model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from rtlynx.models.architecture import Architecture
from rtlynx.models.attention_backend import dense_steps_told_by
from rtlynx.models.fusion import processor_known
from rtlynx.models.guards import prepare_adapters, refuse_merged
from rtlynx.models.plan import Plan, architecture_of
from rtlynx.nn.call import CallState, current_schedule, enter_call, leave_call, step_of
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.nn.tensor_parallel import local_text_rows
from rtlynx.recipe import Recipe


def register_hooks(model: nn.Module, plan: Plan) -> tuple[list[Any], EnterCall | None]:
    """Forward hooks that `model` needs: their handles, and what sets the state of its calls."""
    handles = [model.register_forward_pre_hook(begin_step)]
    memories = (
        (layer.candidate.block, cast(SparseLinear, model.get_submodule(layer.name)).shared_input)
        for layer in plan.sparse
    )
    for block, shared in dict.fromkeys(memories):
        if shared.traced and not shared.single:
            handles.append(model.get_submodule(block).register_forward_hook(shared.forget_traced))
    if plan.rotated:
        names = tuple(attention.name for attention in plan.rotated)
        handles.append(model.register_forward_pre_hook(partial(refuse_processors, names)))
    if not plan.recipe.depends_on_call:
        return handles, None
    enter = EnterCall(plan)
    return [*handles, *_register(model, enter)], enter


def register_attention_steps(model: nn.Module, ranges: Sequence[tuple[float, float]]) -> list[Any]:
    """Hooks by which attention in eight bits knows steps at noise levels in `ranges`: their handles."""
    return _register(model, EnterAttention(ranges))


def _register(model: nn.Module, enter: EnterCall | EnterAttention) -> list[Any]:
    before = model.register_forward_pre_hook(enter, with_kwargs=True)
    return [before, model.register_forward_hook(enter.leave, always_call=True)]


@contextmanager
def entering_calls(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Meanwhile, calls of `model` say which of their steps and rows run dense, as `plan` has it.

    Attention in eight bits follows them.
    """
    handles = _register(model, EnterCall(plan)) if plan.recipe.depends_on_call else []
    try:
        with dense_steps_told_by(model, "layers") if plan.recipe.has_dense_steps else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def begin_step(model: nn.Module, _args: tuple[Any, ...]) -> None:
    """Let adapters follow their layers, or refuse them, and tell CUDA graphs that a step begins.

    Those of torch.compile's mode "reduce-overhead" on blocks otherwise take each block's call for a step,
    and what a block gave for overwritten when the next reads it.
    """
    prepare_adapters(model)
    if not torch.compiler.is_compiling() and "torch._inductor.compile_fx" in sys.modules:
        torch.compiler.cudagraph_mark_step_begin()


def refuse_processors(attentions: tuple[str, ...], model: nn.Module, _args: tuple[Any, ...]) -> None:
    """RuntimeError where what rotated values go through may do more with them than mix tokens."""
    if torch.compiler.is_compiling():
        return
    for name in attentions:
        attn: Any = model.get_submodule(name)
        if not processor_known(attn):
            raise RuntimeError(
                f"the values of {name} are rotated (rotate_values), and its {type(attn.processor).__name__} "
                "may add others to them, which are not: use diffusers' own attention processors, or "
                "calibrate the dense model with yours in place"
            )


class EnterCall:
    """Sets the state of each call of a sparse model, and takes it back when the call ends or fails.

    `plan` may be replaced while calls run: each reads it once.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    # Outside of what torch.compile makes of the model: steps are told apart by the value of a tensor.
    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = self.plan
        architecture, recipe = plan.architecture, plan.recipe
        call = architecture.call_arguments(model, args, kwargs)
        rows = None
        if recipe.text_rows == "dense" and architecture.text_rows is not None:
            rows = local_text_rows(model, architecture.text_rows(call))
        dense = recipe.has_dense_steps and is_dense_call(architecture, recipe, model, call)
        if getattr(model, "peft_config", None):
            refuse_merged(model)
        enter_call(CallState(dense=dense, text_rows=rows), self)

    @torch.compiler.disable
    def leave(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        leave_call(self)


class EnterAttention:
    """Sets, for each call of a model, whether attention in eight bits leaves its step to the backend before.

    `ranges` of noise levels say which steps, as `Recipe.dense_sigmas`.
    """

    def __init__(self, ranges: Sequence[tuple[float, float]]) -> None:
        self.steps = Recipe.immediate(dense_sigmas=tuple(ranges))

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        architecture = architecture_of(model)
        call = architecture.call_arguments(model, args, kwargs)
        asked = f"bf16_sigmas={self.steps.dense_ranges} of fp8_attention"
        dense = is_dense_call(architecture, self.steps, model, call, asked)
        enter_call(CallState(dense=dense), self, "attention")

    @torch.compiler.disable
    def leave(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        leave_call(self, "attention")


def is_dense_call(
    architecture: Architecture, recipe: Recipe, model: nn.Module, call: dict[str, Any], asked: str = ""
) -> bool:
    """Whether `recipe` runs the step dense that this call of `model` is of.

    `asked` says what asks for dense steps, where it is not the recipe's fields.

    Raises
    ------
    ValueError, RuntimeError
        If it is not known which step that is, or its noise level where that decides.
    """
    timestep, asked = architecture.timestep(call), asked or recipe.describe_dense_steps()
    step = None if timestep is None and current_schedule() is not None else step_of(timestep)
    if timestep is None and step is None:
        raise ValueError(
            f"dense steps need the model's {architecture.timestep_argument!r} argument, which this call of "
            f"{type(model).__name__} lacks"
        )
    if step is None:
        if model.training:  # no picture, so no first or last steps of one
            return False
        raise RuntimeError(
            "some steps of a picture run dense here "
            f"({asked}), and a call alone does not tell which step it is: call "
            "the model through a diffusers pipeline, or put your sampling loop into `with "
            "rtlynx.schedule(timesteps):`"
        )
    if recipe.needs_sigma and step.sigma is None:
        raise RuntimeError(
            "steps at some noise levels run dense here "
            f"({asked}), and the noise level of this one is not known: say it "
            "with `rtlynx.schedule(timesteps, sigmas)`"
        )
    return recipe.is_dense_step(step.index, step.count, step.sigma)

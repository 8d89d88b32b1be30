"""From a variant to a pipeline that draws it: calibrated on prompts that are not measured, timed."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from baselines import BASELINES, WITH_INTERCEPT, Pruned
from caching import FirstBlockCache
from modelled_time import Layer, all_dense, step_ms
from rotations import rotating
from study_model import StudyModel
from torch import Tensor, nn
from variants import BY_HAND, Variant

import rtlynx
from rtlynx import CalibrationOptions, Distillation
from rtlynx.evaluate.layers import watch_linears
from rtlynx.evaluate.sampling import sample_pictures
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.models.plan import LayerPlan, make_plan
from rtlynx.models.sparsify import sparse_layers, state_of, target_model
from rtlynx.recipe import Budget, Recipe


@dataclass(frozen=True)
class Calibration:
    """How variants are calibrated: the same for all of a study, but for what a variant says.

    steps, recorded : sampling steps of each prompt, and how many of them are recorded.
    prompts, train_steps : caps below what variants ask for, for small trials.
    """

    steps: int = 24
    recorded: int = 6
    batch_size: int = 128
    prompts: int | None = None
    train_steps: int | None = None


@dataclass
class Built:
    """A variant, ready to draw.

    layers : name -> layer of the layers that differ from dense.
    plan : name -> what it is, of every candidate, for the model of time.
    recipe : as applied, plain values.
    distillation : settings of the training that followed, and what it did; None without one.
    unmodelled : why no time is modelled, or None.
    """

    pipeline: Any
    layers: dict[str, nn.Module] = field(default_factory=dict)
    plan: dict[str, Layer] = field(default_factory=dict)
    calibration_seconds: float | None = None
    recipe: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    unmodelled: str | None = None
    cache: FirstBlockCache | None = None

    def modelled_ms(self, architecture: str, steps: int) -> float | None:
        """Milliseconds of one full-size step; see `modelled_time`."""
        if self.unmodelled is not None:
            return None
        recipe = self.recipe or {}
        of = Recipe.from_dict(recipe)
        share = sum(of.is_dense_step(step, steps, 1 - step / steps) for step in range(steps)) / steps
        in_fp8 = of.dense_precision == "fp8"
        dense = {
            name: Layer("fp8-dense") if in_fp8 and layer.form != "dense" else Layer()
            for name, layer in self.plan.items()
        }
        computed = 1.0 if self.cache is None else self.cache.computed
        return step_ms(architecture, self.plan, dense_steps=share, dense=dense, computed=computed)


def build(variant: Variant, study: StudyModel, calibration: Calibration, *, progress: bool = False) -> Built:
    """Make `variant` on a copy of the dense model.

    Raises
    ------
    ValueError
        Where the model has no such variant.
    """
    missing = variant.missing_for(study.architecture)
    if missing is not None:
        raise ValueError(f"{variant.name}: {missing}")
    pipeline = study.copy_of_pipeline()
    model = target_model(pipeline)
    if variant.dtype:
        pipeline.to(getattr(torch, variant.dtype))
    built = Built(pipeline, plan=all_dense(layer.name for layer in _candidates(model)))
    start = time.perf_counter()
    if variant.weights is not None:
        _prune(built, study, variant, calibration)
        built.calibration_seconds = time.perf_counter() - start
    elif variant.recipe is not None:
        recipe = _recipe(variant, study, calibration)
        if recipe.needs_calibration:
            prompts = _calibration_prompts(study, variant, calibration)
            options = _options(variant, study, calibration)
            distill = _distill(variant, calibration)
            with rotating(variant.rotation):
                report = rtlynx.calibrate(
                    pipeline, prompts, recipe, options, distill=distill, progress=progress
                )
            if distill is not None and report.distillation is not None:
                built.distillation = {**asdict(distill), **asdict(report.distillation)}
        else:
            rtlynx.sparsify(pipeline, recipe)
        if recipe.needs_calibration or variant.layers == "by budget":
            built.calibration_seconds = time.perf_counter() - start
        _describe(built, model, recipe)
    if variant.attention == "fp8":
        rtlynx.fp8_attention(pipeline, bf16_sigmas=variant.bf16_sigmas)
        built.unmodelled = "attention is not in the model of time"
    if variant.cache is not None:
        built.cache = FirstBlockCache(model, variant.cache)
    return built


def _recipe(variant: Variant, study: StudyModel, calibration: Calibration) -> Recipe:
    """The variant's recipe with what depends on the model filled in."""
    recipe = variant.recipe
    assert recipe is not None
    if calibration.train_steps is not None:
        recipe = replace(recipe, train_steps=min(recipe.train_steps, calibration.train_steps))
    if variant.rank_of_width is not None:
        recipe = replace(recipe, rank=max(1, round(variant.rank_of_width * _width(study))))
    if variant.layers == "by hand":
        return replace(recipe, skip=BY_HAND[study.architecture])
    if variant.layers == "by budget":
        target = planned_ms(study, replace(recipe, skip=BY_HAND[study.architecture]))
        return by_budget(variant, recipe, study, calibration, target)
    return recipe


def _distill(variant: Variant, calibration: Calibration) -> Distillation | None:
    """The variant's training, of no more steps than the study's cap."""
    if variant.distill is None or calibration.train_steps is None:
        return variant.distill
    return replace(variant.distill, steps=min(variant.distill.steps, calibration.train_steps))


def _width(study: StudyModel) -> int:
    """Of the model: the least inputs that a layer has."""
    return min(layer.in_features for layer in _candidates(target_model(study.pipeline)))


def _candidates(model: nn.Module) -> Sequence[LayerPlan]:
    """Every layer that could be sparse."""
    return make_plan(model, Recipe.immediate(grouping="adjacent")).layers


def planned_ms(study: StudyModel, recipe: Recipe, only: Collection[str] | None = None) -> float:
    """Modelled milliseconds of a recipe on `study`'s model; `only` leaves all other layers dense."""
    layers = make_plan(target_model(study.pipeline), recipe).layers
    plan = {
        layer.name: _in_plan(layer, recipe) if only is None or layer.name in only else Layer()
        for layer in layers
    }
    ms = step_ms(study.architecture, plan)
    if ms is None:
        raise ValueError(f"no time is modelled for {study.architecture}")
    return ms


def by_budget(
    variant: Variant, recipe: Recipe, study: StudyModel, calibration: Calibration, target_ms: float
) -> Recipe:
    """`recipe` on the layers that the budget rule takes until `target_ms` is reached.

    The library's rule, priced by `modelled_time`, so that the comparison is at equal time: for each input,
    the error at the model's output of the layers that read it alone, over the milliseconds that they save
    alone, smallest first. Inputs that save nothing stay dense. Where the target is out of reach, all that
    save.
    """
    options = _options(variant, study, calibration)
    prompts = _calibration_prompts(study, variant, calibration)
    everything = replace(recipe, budget=Budget(speedup_share=1.0))  # so that calibration measures each input
    report = rtlynx.calibrate(study.copy_of_pipeline(), prompts, everything, options, progress=False)
    dense_ms = planned_ms(study, recipe, only=())
    saved = {cost.name: dense_ms - planned_ms(study, recipe, only=cost.layers) for cost in report.costs}
    worth = [cost for cost in report.costs if saved[cost.name] > 0]
    taken: set[str] = set()
    for cost in sorted(worth, key=lambda cost: cost.error / saved[cost.name]):
        if planned_ms(study, recipe, only=taken) <= target_ms:
            break
        taken.update(cost.layers)
    names = [layer for cost in report.costs for layer in cost.layers]
    return replace(recipe, skip=tuple(name for name in names if name not in taken))


def _options(variant: Variant, study: StudyModel, calibration: Calibration) -> CalibrationOptions:
    return CalibrationOptions(
        batch_size=calibration.batch_size,
        steps_per_prompt=calibration.recorded,
        sequential=variant.sequential,
        pipeline_kwargs={**study.settings, "num_inference_steps": calibration.steps},
    )


def _calibration_prompts(study: StudyModel, variant: Variant, calibration: Calibration) -> list[str]:
    wanted = variant.prompts if calibration.prompts is None else min(variant.prompts, calibration.prompts)
    if wanted > len(study.calibration):
        raise ValueError(f"there are {len(study.calibration)} calibration prompts; {wanted} are wanted")
    return list(study.calibration[:wanted])


def _describe(built: Built, model: nn.Module, recipe: Recipe) -> None:
    """Layers and their part in the model of time, from what calibration left on the model."""
    state = state_of(model)
    assert state is not None
    sparse = sparse_layers(model)
    built.layers = {name: layer for name, layer in sparse.items() if not layer.format.weights_only}
    built.recipe = state.plan.recipe.to_dict()
    for layer in state.plan.layers:
        built.plan[layer.name] = _in_plan(layer, recipe)
    patterns = {(layer.pattern.n, layer.pattern.m) for layer in state.plan.sparse}
    other = sorted(f"{n}:{m}" for n, m in patterns if (n, m) != (2, 4) and n < m)
    if other:
        built.unmodelled = f"there is no kernel for {', '.join(other)}"


def _in_plan(layer: LayerPlan, recipe: Recipe) -> Layer:
    # A share stays one: at toy widths the layer's own rank is the least that the library gives.
    rank = recipe.rank if isinstance(recipe.rank, float) else layer.rank / layer.in_features
    return Layer(
        layer.format.name,
        rank if layer.rank and layer.format.name not in ("dense", "fp8-dense") else 0.0,
        recipe.lowrank_sharing == "shared",
        layer.text_rows_dense,
    )


def _prune(built: Built, study: StudyModel, variant: Variant, calibration: Calibration) -> None:
    """Weight 2:4 by one of the baselines, on the layers that `Recipe` would make sparse."""
    assert variant.weights is not None
    model = target_model(built.pipeline)
    layers = make_plan(model, Recipe.immediate(grouping="adjacent")).sparse
    moments = input_moments(
        built.pipeline,
        layers,
        _calibration_prompts(study, variant, calibration),
        batch_size=calibration.batch_size,
        pipeline_kwargs={**study.settings, "num_inference_steps": calibration.steps},
    )
    for layer in layers:
        linear = model.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        of = moments[layer.candidate.reads]
        centred = variant.weights in WITH_INTERCEPT
        pruned = BASELINES[variant.weights](linear.weight.detach(), of.covariance if centred else of.gram)
        _put(linear, pruned, of.mean if centred else None)
        built.layers[layer.name] = linear
        form = "weight-2:4-fp8" if pruned.fp8 else "weight-2:4"
        built.plan[layer.name] = Layer(form, pruned.rank / layer.in_features, shared=False)


@torch.no_grad()
def _put(linear: nn.Linear, pruned: Pruned, mean: Tensor | None) -> None:
    """Give `linear` the weight, e4m3 inputs if it wants them, and with `mean` (K,) of X the mean error."""
    if mean is not None:
        error = (linear.weight.to(mean) - pruned.weight.to(mean)) @ mean
        bias = error if linear.bias is None else linear.bias.to(mean) + error
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    linear.weight.copy_(pruned.weight)
    if pruned.fp8:
        linear.register_forward_pre_hook(_in_e4m3)


def _in_e4m3(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each token rounded with a scale of its own, as the kernels do it."""
    x, *others = inputs
    return quantize_tokens(x).dequantize().to(x.dtype), *others


class Moments(NamedTuple):
    """Second moments X^T X / tokens (K, K) and mean (K,) of a layer's input, float64."""

    gram: Tensor
    mean: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.gram - torch.outer(self.mean, self.mean)


def input_moments(
    pipeline: Any,
    layers: Sequence[LayerPlan],
    prompts: Sequence[str],
    *,
    batch_size: int,
    pipeline_kwargs: Mapping[str, Any],
) -> dict[str, Moments]:
    """Moments of each distinct input of `layers`, over all steps of all prompts.

    Keys are `candidate.reads`. Each token counts once, of image or text.
    """
    first = {layer.candidate.reads: layer for layer in reversed(layers)}
    sums: dict[str, Moments] = {}
    counts: dict[str, int] = dict.fromkeys(first, 0)
    reads_of = {layer.name: reads for reads, layer in first.items()}

    def see(name: str, x: Tensor, _y: Tensor) -> None:
        reads, tokens = reads_of[name], x.detach().reshape(-1, x.shape[-1]).float()
        found = Moments((tokens.T @ tokens).double(), tokens.sum(0).double())
        sums[reads] = Moments(*map(torch.add, sums[reads], found)) if reads in sums else found
        counts[reads] += len(tokens)

    with watch_linears(target_model(pipeline), list(reads_of), see):
        sample_pictures(pipeline, prompts, batch_size=batch_size, pipeline_kwargs=pipeline_kwargs)
    return {reads: Moments(of.gram / counts[reads], of.mean / counts[reads]) for reads, of in sums.items()}

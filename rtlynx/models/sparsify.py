"""Make a model sparse and dense again."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.models.fingerprint import base_tensors, records, weight_fingerprint
from rtlynx.models.fusion import fuse_blocks, unfuse_blocks
from rtlynx.models.guards import guard, refuse_borrowed, refuse_foreign, refuse_meta, unguard, unwrapped
from rtlynx.models.hooks import EnterCall, register_hooks
from rtlynx.models.plan import LayerPlan, Plan, make_plan
from rtlynx.models.reparameterize import Reparameterization, reparameterize, undo_reparameterization
from rtlynx.models.transaction import all_or_none
from rtlynx.nn.input_cache import SharedInput
from rtlynx.nn.modulation import ModulationLinear
from rtlynx.nn.original import keep_original, keeps_original
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.nn.state_dict import OWN
from rtlynx.nn.tensor_parallel import TensorParallelLinear, shards_of
from rtlynx.recipe import NO_STEP, Recipe

# Attribute of a sparse model that holds its `SparseState`.
_STATE = "_rtlynx"

# Called with each model that has become sparse or dense.
observers: list[Callable[[nn.Module], None]] = []


@dataclass
class SparseState:
    """What rtlynx did to a model; kept on the model.

    base : fingerprints of the original weights of the sparse layers.
    hooks : handles of the model's forward pre-hooks.
    tensors : record of every tensor of the dense model (`fingerprint.record`), None where they are not known.
    errors : relative squared output error of the sparse layers that a calibration measured.
    reparameterization : what was done before, or None. `base` and `tensors` are of the model before that.
    enter : the one of its hooks that knows the steps, or None.
    """

    plan: Plan
    base: dict[str, str]
    hooks: Sequence[Any] = ()
    tensors: Mapping[str, str] | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    reparameterization: Reparameterization | None = None
    enter: EnterCall | None = None


def transformers_of(model_or_pipeline: Any) -> dict[str, nn.Module]:
    """Name -> module to work on: the module itself, or the transformers of a diffusers pipeline.

    Of a module that torch.compile, DataParallel or peft has wrapped, it is what is inside; the wrapper then
    runs what became of that.

    Raises
    ------
    TypeError
        If there is none.
    """
    if isinstance(model_or_pipeline, nn.Module):
        return {"transformer": unwrapped(model_or_pipeline)}
    further = (name for name in getattr(model_or_pipeline, "__dict__", ()) if "transformer" in name)
    found: dict[str, nn.Module] = {}
    for name in dict.fromkeys(("transformer", *further)):
        part = getattr(model_or_pipeline, name, None)
        if isinstance(part, nn.Module):
            part = unwrapped(part)
            if not any(part is one for one in found.values()):
                found[name] = part
    if not found:
        raise TypeError(
            f"expected a torch module or a diffusers pipeline with a transformer, "
            f"got {type(model_or_pipeline).__name__}"
        )
    return found


def target_model(model_or_pipeline: Any) -> nn.Module:
    """The module to work on, where there is to be one: `transformers_of`.

    Raises
    ------
    TypeError
        If there is none.
    ValueError
        If there are several.
    """
    found = transformers_of(model_or_pipeline)
    if len(found) > 1:
        raise ValueError(
            f"{type(model_or_pipeline).__name__} draws with several transformers ({', '.join(found)}), and "
            "this is about one: give one of them in place of the pipeline"
        )
    (model,) = found.values()
    return model


def state_of(model: nn.Module) -> SparseState | None:
    """The record that `sparsify` left on `model`, or None where the model is dense."""
    return getattr(model, _STATE, None)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Name -> layer of the sparse layers of `model`, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def comparable(dense: nn.Module, model: nn.Module) -> nn.Module:
    """The dense model whose layers those of `model` stand for: `dense`, or a reparameterized copy.

    Raises
    ------
    ValueError
        If `model` is reparameterized and it is not known how (it was loaded by from_pretrained).
    """
    state = state_of(model)
    if state is None or state.reparameterization is None:
        return dense
    bases = state.reparameterization.known
    twin = copy.deepcopy(dense)
    reparameterize(twin, state.plan.reparameterized, bases)
    return twin


def sparsify(model_or_pipeline: Any, recipe: Recipe | None = None) -> Any:
    """Make a model's linear layers sparse, in place and at once, without calibration.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
        For a pipeline, its `transformer`, and those that it draws with besides (`transformer_2`).
    recipe : Recipe, optional
        Default `Recipe.immediate()`: 2:4 with norm compensation, text stream dense.

    Returns
    -------
    nn.Module or diffusers pipeline
        The same object.

    Raises
    ------
    ValueError
        If the recipe needs calibration, the model has no linears, is sparse already, on "meta", an exported
        graph or prepared in a way that has to come after, or groups reach over tensor-parallel shards
        (`Recipe.tp_degree`). The model is then unchanged.
    TypeError
        If it is neither a module nor a pipeline with a transformer, or a layer is no plain `nn.Linear`.
    """
    recipe = recipe or Recipe.immediate()
    if recipe.needs_calibration:
        raise ValueError(
            "this recipe has something to calibrate (rank, refit, rotate_values, permute_hidden or budget): "
            "use rtlynx.calibrate(pipeline, prompts, recipe), or a recipe that needs none: "
            "Recipe.dense_fp8(), or Recipe.immediate() for selection and norm compensation alone"
        )
    models = transformers_of(model_or_pipeline).values()
    with all_or_none(*models):
        for model in models:
            plan = make_plan_for_dense(model, recipe)
            refuse_meta(model)
            apply_plan(model, plan)
    return model_or_pipeline


def make_plan_for_dense(model: nn.Module, recipe: Recipe) -> Plan:
    """`make_plan`, refusing a model that is sparse already, and layers that cannot be made sparse."""
    refuse_borrowed(model)
    if state_of(model) is not None or sparse_layers(model):
        raise ValueError(f"{type(model).__name__} is sparse already: call rtlynx.densify first")
    plan = make_plan(model, recipe)
    changed = (name for one in plan.reparameterized for name in one.layers)
    refuse_foreign(model, (*(layer.name for layer in plan.replaced), *changed))
    return plan


def apply_plan(
    model: nn.Module,
    plan: Plan,
    prepare: Callable[[str, SparseLinear], None] | None = None,
    base: Mapping[str, str] | None = None,
    tensors: dict[str, str] | None = None,
    done: Reparameterization | None = None,
) -> None:
    """Replace the planned layers of `model` by sparse ones; callers make it `all_or_none`.

    `prepare` is called with each new layer before any takes its place, to give it factors and weights.
    `base` gives the fingerprints of the original weights where the model does not hold those ("meta").
    `tensors` are the `records` of its `base_tensors`, where they have been taken already. `done` says how it
    was reparameterized before.
    """
    originals = {} if done is None else done.originals
    if tensors is None and base is None:
        tensors = records({**base_tensors(model), **originals})
    # Layers that read one tensor share a memory. Where it is not known which do, those of one block, which is
    # enough: they run one after the other.
    known = plan.knows_shared_inputs
    readers = Counter(_memory(layer, known) for layer in plan.replaced)
    traced = bool(plan.traced_reads)
    shared = {key: SharedInput(single=count == 1, traced=traced) for key, count in readers.items()}
    modules: dict[str, Any] = dict(model.named_modules())
    shards = shards_of(model, (layer.name for layer in plan.sparse))
    replacements, fingerprints = {}, {}
    for layer in plan.replaced:
        shard, dense = shards.get(layer.name), modules[layer.name]
        whole = dense if shard is None else shard.whole_linear(dense)
        kind = SparseLinear if shard is None else TensorParallelLinear
        if layer.format.weights_only:
            kind = ModulationLinear
        try:
            sparse = kind.from_linear(whole, pattern=layer.pattern, norm=layer.norm)
        except TypeError as error:
            raise TypeError(f"{layer.name}: {error}") from None
        set_what_runs_dense(sparse, layer, plan.recipe)
        sparse.shared_input = shared[_memory(layer, known)]
        if prepare is not None:
            prepare(layer.name, sparse)
        if layer.quantized and not sparse.format.quantized:  # nothing was calibrated: plain scales
            try:
                sparse.quantize(keep_dense=sparse.depends_on_call)
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from None
        if sparse.depends_on_call and sparse.dense_precision == "fp8":
            keep_original(sparse)  # in e4m3 also where the weight is the original one
        if isinstance(sparse, TensorParallelLinear) and shard is not None:
            try:
                sparse.take_shard(shard, dense)
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from None
        replacements[layer.name] = sparse
        weight: Tensor = whole.weight
        if base is None and f"{layer.name}.weight" in originals:
            original = originals[f"{layer.name}.weight"]
            weight = original if shard is None else shard.whole(original)
        fingerprints[layer.name] = weight_fingerprint(weight) if base is None else base[layer.name]
    _replace(model, replacements)
    guard(model)
    if done is not None and not all(keeps_original(layer) for layer in replacements.values()):
        done = replace(done, originals={})  # the model cannot be made dense again
    hooks, enter = register_hooks(model, plan)
    state = SparseState(plan, fingerprints, hooks, tensors, reparameterization=done, enter=enter)
    setattr(model, _STATE, state)
    fuse_blocks(model, plan.architecture)
    if not any(layer.weight.is_meta for layer in replacements.values()):
        prepare_layers(model)
    _tell(model)


def set_dense_steps(
    model_or_pipeline: Any,
    *,
    dense_steps: int = 0,
    dense_last_steps: int = 0,
    dense_sigmas: Sequence[tuple[float, float]] = (),
) -> Any:
    """Change which steps of a picture run dense, in a model that was made sparse with some dense steps.

    You may call it at any time, to trade speed for fidelity while the model serves: calls under way go on as
    they began. Steps that are not named run sparse.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
    dense_steps, dense_last_steps : int
        As in `Recipe`.
    dense_sigmas : sequence of (low, high)
        As in `Recipe`, but not "auto".

    Returns
    -------
    nn.Module or diffusers pipeline
        The same object.

    Raises
    ------
    ValueError
        If the model is not sparse, its recipe has no dense steps (it then keeps no original weights for
        them), or a value is one that `Recipe` refuses.
    TypeError
        If it is neither a module nor a pipeline with a transformer.
    """
    if isinstance(dense_sigmas, str):
        raise ValueError(
            f"dense_sigmas is a list of (low, high) here, got {dense_sigmas!r}: only calibration chooses them"
        )
    plans: list[tuple[SparseState, Plan]] = []
    for model in transformers_of(model_or_pipeline).values():
        state = state_of(model)
        if state is None or not state.plan.recipe.has_dense_steps:
            raise ValueError(
                f"{type(model).__name__} keeps no original weights for dense steps: make it sparse with a "
                "recipe of dense_steps, dense_last_steps or ranges of dense_sigmas, which may then be "
                "changed (where these are 'auto', calibration may choose none)"
            )
        recipe = replace(
            state.plan.recipe,
            dense_steps=dense_steps,
            dense_last_steps=dense_last_steps,
            dense_sigmas=tuple(dense_sigmas),
        )
        if not recipe.has_dense_steps:
            recipe = replace(recipe, dense_sigmas=NO_STEP)  # the original weights stay
        plans.append((state, replace(state.plan, recipe=recipe)))
    for state, plan in plans:
        assert state.enter is not None
        state.plan = state.enter.plan = plan
    return model_or_pipeline


def set_what_runs_dense(sparse: SparseLinear, layer: LayerPlan, recipe: Recipe) -> None:
    """Tell `sparse` which rows and steps run dense, and in which precision, as `recipe` says for `layer`."""
    dense = layer.has_dense_calls(recipe)
    sparse.dense_precision = recipe.dense_precision
    sparse.text_rows_dense = dense and layer.text_rows_dense
    sparse.dense_steps = dense and recipe.has_dense_steps
    sparse.lent = layer.candidate.lent


def prepare_layers(model: nn.Module) -> None:
    """Do what compiled code cannot: order weights for the kernels, find low-rank factors that are shared."""
    readers: dict[SharedInput, list[Tensor | None]] = {}
    for layer in sparse_layers(model).values():
        readers.setdefault(layer.shared_input, []).append(layer.lowrank_a)
        layer.prepare()
    state = state_of(model)
    if state is not None and state.plan.architecture.fused:
        for shared, lowrank_as in readers.items():
            shared.factor(lowrank_as)


def _memory(layer: LayerPlan, known: bool) -> str:
    """Key of the memory of inputs that a layer uses."""
    return layer.candidate.reads if known else layer.candidate.block


def densify(model_or_pipeline: Any) -> Any:
    """Undo `sparsify`, `calibrate` or `load`, in place: plain linears with their original weights.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
        A dense one stays as it is.

    Returns
    -------
    nn.Module or diffusers pipeline
        The same object.

    Raises
    ------
    RuntimeError
        If a weight was refitted, quantised or reparameterized and the original was not kept; the model is
        then unchanged.
    TypeError
        If it is neither a module nor a pipeline with a transformer.
    """
    models = transformers_of(model_or_pipeline).values()
    with all_or_none(*models):
        for model in models:
            _densify(model)
    return model_or_pipeline


def _densify(model: nn.Module) -> None:
    _replace(model, {name: layer.to_linear() for name, layer in sparse_layers(model).items()})
    unguard(model)
    state = state_of(model)
    if state is not None:
        unfuse_blocks(model)
        for hook in state.hooks:
            hook.remove()
        if state.reparameterization is not None:
            undo_reparameterization(model, state.reparameterization)
        delattr(model, _STATE)
    _tell(model)


def extra_bytes(model: nn.Module) -> int:
    """Bytes that a sparse model holds beyond the dense one: factors, scales and kept original weights.

    Negative where quantised weights save more than that. They are compared with weights of the dtype of the
    layer's bias and factors, or of bfloat16 where it has none.
    """
    state = state_of(model)
    done = state.reparameterization if state is not None else None
    total = done.bytes if done is not None else 0
    for layer in sparse_layers(model).values():
        added = layer.bias if layer.intercept == "added" else None
        for tensor in (added, *(getattr(layer, name) for name in OWN)):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
        if layer.format.quantized:
            full = layer.compute_dtype or torch.bfloat16
            entries, held = layer.in_features * layer.out_features, layer.held_weight
            total += held.numel() * held.element_size() - entries * full.itemsize
    return total


def _tell(model: nn.Module) -> None:
    for observer in observers:
        observer(model)


def _replace(model: nn.Module, replacements: dict[str, Any]) -> None:
    for name, new in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)

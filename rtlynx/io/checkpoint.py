"""Save what rtlynx did to a model, and do it to the same base model again.

A checkpoint is a folder: `rtlynx.json` (recipe, layers, digests) and `rtlynx.safetensors` (low-rank factors,
refitted weights and biases, quantised weights and their scales, in natural column order; rotations and
permutations). It goes onto the base model that it was made from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rtlynx._version import __version__
from rtlynx.calibration.apply import apply_solutions
from rtlynx.io.bases import BASES, basis_shape, stored_basis
from rtlynx.io.modulation import stored_modulation
from rtlynx.io.parts import check_target, parts_of, refuse_other_parts
from rtlynx.io.schema import check_schema, check_values, stored_formats, stored_pattern, wrong_numbers
from rtlynx.models.architecture import Reparameterizable
from rtlynx.models.fingerprint import base_tensors, records, same, weight_fingerprint
from rtlynx.models.guards import refuse_foreign, refuse_meta, refuse_prepared
from rtlynx.models.plan import Plan, make_plan
from rtlynx.models.reparameterize import fixed_reason, refuse_crossing, reparameterize
from rtlynx.models.sparsify import SparseState, sparse_layers, state_of
from rtlynx.models.transaction import all_or_none
from rtlynx.nn.packed_weight import held_state_dict
from rtlynx.nn.solution import Solution, stored_shapes
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.nn.state_dict import current_key
from rtlynx.nn.tensor_parallel import refuse_parallel, shards_of
from rtlynx.recipe import Recipe
from rtlynx.storage.checkpoint_folder import (
    INDEX,
    TENSORS,
    replaced_checkpoint,
    tensors_of,
    while_unchanged,
)
from rtlynx.storage.files import (
    CheckpointError,
    open_regular,
    read_json,
    read_tensors,
    sha256_of,
    write_json,
    write_tensors,
)

# Version 2 knows fp8 layers, version 4 intercepts and rotated values, version 5 permuted hidden features,
# version 6 layers that drop weights, version 7 modulation in eight bits.
FORMAT_VERSION = 7
# Most that safetensors takes for the header of a file.
_HEADER = 100 << 20

_One = TypeVar("_One", bound=Reparameterizable)


def save(model_or_pipeline: Any, folder: str | Path) -> None:
    """Save what makes a model sparse: recipe, low-rank factors, refitted and quantised weights.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
        A model that `sparsify`, `calibrate` or `load` made sparse, or its pipeline.
    folder : path
        Created, or its checkpoint replaced, also through a link. Of a pipeline with several transformers each
        has a folder of its name in it. A checkpoint is whole at every moment: readers, and
        whoever comes after a kill, find the older checkpoint or the new one. Several may save to it at once;
        one of theirs stays.

    Raises
    ------
    ValueError
        If the model is not sparse or sharded by tensor parallelism, or an adapter wraps a layer. If any
        tensor that the file does not hold has changed since the model was made sparse (a fused adapter,
        training): the change would be lost.
    FileExistsError
        If the folder holds anything that `save` did not write.
    OSError
        If it cannot be written: found before any work where that can be known. Nothing is left behind then.
    """
    parts = parts_of(model_or_pipeline, Path(folder))
    for model in parts.values():
        describe(model)
    check_target(Path(folder), several=len(parts) > 1)
    for model in parts.values():
        _refuse_changes(model)
    for part, model in parts.items():
        _save(model, part)


def _save(model: nn.Module, folder: Path) -> None:
    body = describe(model)
    layers = sparse_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for kind in solution_shapes(body["layers"][name]):
            tensors[f"{name}.{kind}"] = getattr(layer, kind)
    _refuse_unreadable(layers, tensors)
    tensors |= _bases(model)
    with replaced_checkpoint(folder) as new:
        write_tensors(new / TENSORS, tensors, {"format": "rtlynx"})
        write_json(new / INDEX, signed({**body, "tensors_sha256": sha256_of(new / TENSORS)}))


def _bases(model: nn.Module) -> dict[str, Tensor]:
    """Rotations and permutations, as the file calls them; ValueError where they are not known any more."""
    state = _state(model)
    if state.reparameterization is None:
        return {}
    try:
        known = state.reparameterization.known
    except ValueError as error:
        raise ValueError(f"{error}, which a checkpoint would have to hold: use save_pretrained") from None
    return {f"{one.name}.{BASES[one.setting]}": known[one.name] for one in state.plan.reparameterized}


def _refuse_changes(model: nn.Module) -> None:
    """ValueError unless all that `load` will take from the base model is still what it was there."""
    state = _state(model)
    offloaded = [name for name, one in held_state_dict(model).items() if getattr(one, "is_meta", False)]
    if offloaded:
        raise ValueError(f"{offloaded[0]} is on 'meta' (offloaded?): remove the offloading, then save")
    if state.tensors:
        found = records(base_tensors(model))
        done = state.reparameterization
        expected = {**state.tensors, **(done.records if done else {})}
        changed = [
            name for name, one in found.items() if name not in expected or not same(expected[name], one)
        ]
    else:  # it was loaded from files that say less
        weights = {f"{name}.weight": layer for name, layer in sparse_layers(model).items()}
        changed = [
            name
            for name, layer in weights.items()
            if not layer.refitted
            and not layer.format.quantized
            and weight_fingerprint(layer.weight) != state.base[name.removesuffix(".weight")]
        ]
    if changed:
        layer, _, kind = changed[0].rpartition(".")
        more = f" and {len(changed) - 1} more tensors have" if len(changed) > 1 else " has"
        raise ValueError(
            f"the {kind} of {layer or 'the model'}{more} changed since the model was made sparse (a merged "
            "adapter? training?), and a checkpoint holds only what making it sparse changed: save_pretrained "
            "saves all weights; or merge into the dense model, then make it sparse"
        )


def _refuse_unreadable(layers: dict[str, SparseLinear], tensors: dict[str, Tensor]) -> None:
    """ValueError for tensors that `load` would refuse."""
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        format, own = layers[name].format, layers[name].compute_dtype or tensor.dtype
        kinds = {"quantized": format.quantized, "weight_sparse": format.weight_sparse}
        wrong = wrong_numbers(kind, tensor, **kinds, own=own, refitted=True)
        if wrong is not None:
            raise ValueError(f"{key} {wrong}, and a checkpoint of that could not be loaded")


def describe(model: nn.Module) -> dict[str, Any]:
    """How a model is sparse, in JSON values: recipe, layers, digests of their original weights.

    Raises
    ------
    ValueError
        If the model is not sparse or is spread over processes, or an adapter wraps a sparse layer.
    """
    state = _state(model)
    refuse_parallel(model, "save it before it is sharded (load goes onto sharded models too)", context=False)
    layers = sparse_layers(model)
    for name in layers:
        if name not in state.base:
            raise ValueError(f"{name} is not where it was made sparse: detach adapters before saving")
    held = held_state_dict(model)
    gone = [name for name in state.tensors or () if name not in held]
    if gone:
        raise ValueError(f"{gone[0]} is not where it was: detach adapters before saving")
    return {
        "format": "rtlynx",
        "version": FORMAT_VERSION,
        "rtlynx": __version__,
        "model": type(model).__name__,
        "recipe": state.plan.recipe.to_dict(),
        "layers": {
            name: _describe(layer, state.base[name], state.errors.get(name)) for name, layer in layers.items()
        },
        "dense": {one.name: one.dense_reason for one in state.plan.layers if one.name not in layers},
        **({"base_tensors": dict(sorted(state.tensors.items()))} if state.tensors else {}),
        **({"reads": state.plan.traced_reads} if state.plan.traced_reads else {}),
        **({} if state.reparameterization is None else _describe_reparameterization(state)),
    }


def _state(model: nn.Module) -> SparseState:
    state = state_of(model)
    if state is None:
        raise ValueError(
            f"{type(model).__name__} is dense, there is nothing to save: sparsify or calibrate it"
        )
    return state


def _describe_reparameterization(state: SparseState) -> dict[str, Any]:
    records = {} if state.reparameterization is None else state.reparameterization.records
    return {
        "rotations": {one.name: one.size for one in state.plan.rotated},
        "permutations": {one.name: one.size for one in state.plan.permuted},
        "reparameterized_tensors": dict(sorted(records.items())),
    }


def signed(body: dict[str, Any]) -> dict[str, Any]:
    """`body` with its digest, as `check_index` wants it."""
    return {**body, "sha256": _digest(body)}


def load(model_or_pipeline: Any, folder: str | Path) -> Any:
    """Make a dense model sparse as a checkpoint says, in place.

    A model that diffusers' tensor parallelism has sharded takes its shards; all processes call this.

    Returns
    -------
    nn.Module or diffusers pipeline
        The same object.

    Raises
    ------
    CheckpointError
        If the folder is missing or damaged, or was made for another architecture, shape, version or other
        weights. The model is then unchanged.
    ValueError
        If the model is sparse already, on "meta", or prepared in a way that has to come after; or groups
        reach over tensor-parallel shards (`Recipe.tp_degree`).
    """
    parts = parts_of(model_or_pipeline, Path(folder))
    for model in parts.values():
        if state_of(model) is not None or sparse_layers(model):
            raise ValueError(f"{type(model).__name__} is sparse already: call rtlynx.densify first")
        refuse_prepared(model)
        refuse_meta(model)
    refuse_other_parts(Path(folder), parts)
    with all_or_none(*parts.values()):
        for part, model in parts.items():
            _load(model, part)
    return model_or_pipeline


def _load(model: nn.Module, folder: Path) -> None:
    # Once, and not before the folder turns out to be one: it reads much of the model.
    base = functools.cache(lambda: records(base_tensors(model)))
    plan, solutions, bases = while_unchanged(folder, lambda: _read_folder(model, folder, base))
    refuse_crossing(model, plan.reparameterized, bases)
    try:
        done = reparameterize(model, plan.reparameterized, bases) if bases else None
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    apply_solutions(model, plan, solutions, base(), done)


def _read_folder(
    model: nn.Module, folder: Path, base: Callable[[], dict[str, str]]
) -> tuple[Plan, dict[str, Solution], dict[str, Tensor]]:
    """Plan, solutions and bases of a checkpoint for `model`, whose records `base` takes, all checked."""
    index = read_index(folder)
    plan = stored_plan(model, index, folder)
    _check_base(model, index, folder, base())
    path, layers = tensors_of(folder, index), index["layers"]
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    bases = sum(8 * math.prod(basis_shape(one)) for one in plan.reparameterized)
    if size > _HEADER + sum(map(_most_bytes, layers.values())) + bases:
        raise CheckpointError(f"{path} is damaged: its {size} bytes are more than its layers can fill")
    if sha256_of(path) != index["tensors_sha256"]:
        raise CheckpointError(f"{path} is damaged: its digest is not the one in {INDEX}")
    tensors = {current_key(key): tensor for key, tensor in read_tensors(path)[0].items()}
    solutions = {}
    for name, entry in layers.items():
        linear: Any = model.get_submodule(name)
        solutions[name] = _stored_solution(name, entry, tensors, path, linear.weight.dtype)
    found = {one.name: stored_basis(one, tensors, path) for one in plan.reparameterized}
    if tensors:
        raise CheckpointError(f"{path} holds {sorted(tensors)[0]!r}, which {INDEX} does not know")
    return plan, solutions, found


def _most_bytes(entry: dict[str, Any]) -> int:
    """Of the tensors of one layer, in the widest numbers."""
    k, n, rank = entry["in_features"], entry["out_features"], entry["rank"]
    return 8 * (k * n + rank * (k + n) + n)


def _check_base(model: nn.Module, index: dict[str, Any], folder: Path, base: dict[str, str]) -> None:
    """CheckpointError unless `model` is the base model that the checkpoint was made of."""
    stored = index.get("base_tensors", {})
    found = dict(base)
    shards = shards_of(model, index["layers"])
    for name, entry in index["layers"].items():
        linear: Any = model.get_submodule(name)
        if name in shards:
            # Other tensor-parallel shards than these are not checked: gathering them for that alone is slow.
            linear = shards[name].whole_linear(linear)
            whole = {f"{name}.{kind}": one for kind, one in linear._parameters.items() if one is not None}
            found.update(records(whole) if stored else {})
        # The short one is for old files. It is exact, and a cast to float16 is not.
        if f"{name}.weight" not in stored and weight_fingerprint(linear.weight) != entry["base"]:
            raise CheckpointError(f"{folder} was made for other weights: {name} differs from its base model")
    if not stored:
        return
    for name in stored.keys() - model.state_dict().keys():
        raise CheckpointError(f"{folder} was made for another architecture: this model has no {name}")
    for name, one in found.items():
        if name not in stored:
            raise CheckpointError(f"{folder} was made for another architecture: its base model has no {name}")
        if not same(stored[name], one):
            raise CheckpointError(f"{folder} was made for other weights: {name} differs from its base model")


def read_index(folder: Path) -> dict[str, Any]:
    """The checked `rtlynx.json` of a checkpoint folder.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or of another version.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder")
    path = folder / INDEX
    index = read_json(path)
    check_index(index, path)
    return index


def check_index(index: Any, path: Path, *, whole_model: bool = False) -> None:
    """CheckpointError unless `index`, which was read from `path`, is what `signed(describe(...))` gave.

    `whole_model` tells that of a model that `save_pretrained` saved, which says more.
    """
    if not isinstance(index, dict) or index.get("format") != "rtlynx":
        raise CheckpointError(f"{path} is not an rtlynx checkpoint")
    check_values(index, path)
    version = index.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        raise CheckpointError(
            f"{path} is of format version {version}, this rtlynx reads versions 1 to {FORMAT_VERSION}"
            + (f": it was saved by rtlynx {index.get('rtlynx')}, upgrade to that" if newer else "")
        )
    body = {key: value for key, value in index.items() if key != "sha256"}
    if index.get("sha256") != _digest(body):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    check_schema(index, path, whole_model=whole_model)


def _describe(layer: SparseLinear, base: str, error: float | None) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "pattern": asdict(layer.pattern),
        "norm": layer.norm,
        "precision": layer.precision,
        "rank": layer.rank,
        "refitted": layer.refitted,
        "intercept": bool(layer.intercept),
        "base": base,
        **({} if error is None else {"error": error}),
        **({"weight_sparse": True} if layer.format.weight_sparse else {}),
    }


def _check_layers(model: nn.Module, layers: dict[str, Any], folder: Path) -> None:
    try:
        refuse_foreign(model, layers)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from None
    modules = dict(model.named_modules())
    for name, entry in layers.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"{folder} was made for another architecture: this model has no linear {name}"
            )
        expected = (entry["in_features"], entry["out_features"])
        found = (linear.in_features, linear.out_features)
        if found != expected:
            raise CheckpointError(
                f"{folder} was made for another size: {name} maps {expected[0]} -> {expected[1]} there, "
                f"{found[0]} -> {found[1]} here"
            )


def stored_plan(model: nn.Module, index: dict[str, Any], folder: Path) -> Plan:
    """The plan of a checkpoint for a dense model of the right class and shapes, which may be on "meta".

    Raises
    ------
    CheckpointError
        If the checkpoint was made for another architecture or size.
    """
    if index["model"] != type(model).__name__:
        raise CheckpointError(f"{folder} was made for {index['model']}, this is {type(model).__name__}")
    _check_layers(model, index["layers"], folder)
    try:
        plan = make_plan(model, Recipe.from_dict(index["recipe"])).reading(index.get("reads", {}))
    except ValueError as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from None
    modulation = stored_modulation(plan, index["layers"], folder)
    unknown = index["layers"].keys() - {layer.name for layer in (*plan.layers, *modulation)}
    if unknown:
        raise CheckpointError(f"{folder} makes layers sparse that cannot be: {', '.join(sorted(unknown))}")
    layers = []
    for layer in plan.layers:
        entry = index["layers"].get(layer.name)
        if entry is None:
            reason = index["dense"].get(layer.name) or "not in the checkpoint"
            layers.append(layer.dense(reason))
            continue
        kinds = stored_formats(entry)
        layers.append(
            replace(
                layer,
                pattern=stored_pattern(entry),
                norm=entry["norm"],
                rank=entry["rank"],
                quantized=kinds["quantized"],
                weight_sparse=kinds["weight_sparse"],
                dense_reason=None,
            )
        )
    rotations, permutations = index.get("rotations", {}), index.get("permutations", {})
    attentions = plan.architecture.attentions_of(model) if rotations else []
    mlps = plan.architecture.mlps_of(model) if permutations else []
    return replace(
        plan,
        layers=tuple(layers),
        modulation=modulation,
        rotated=_stored(model, attentions, rotations, "rotates values of", folder),
        permuted=_stored(model, mlps, permutations, "permutes hidden features of", folder),
        unrotated={},
        unpermuted={},
    )


def _stored(
    model: nn.Module, known: Sequence[_One], stored: dict[str, list[int]], does: str, folder: Path
) -> tuple[_One, ...]:
    """Those of `known` that a checkpoint has (name -> size); CheckpointError where `model` lacks one."""
    found = tuple(one for one in known if stored.get(one.name) == one.size)
    for name in stored.keys() - {one.name for one in found}:
        raise CheckpointError(f"{folder} was made for another architecture: it {does} {name}")
    for one in found:
        reason = fixed_reason(model, one)
        if reason is not None:
            raise CheckpointError(f"{folder} {does} {one.name}, which cannot be here: {reason}")
    return found


def _stored_solution(
    name: str, entry: dict[str, Any], tensors: dict[str, Tensor], path: Path, own: torch.dtype
) -> Solution:
    """The solution of one layer, checked; its tensors are taken out of `tensors`."""
    kinds = stored_formats(entry)

    def stored(kind: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors.pop(f"{name}.{kind}", None)
        if tensor is None:
            raise CheckpointError(f"{path} lacks the tensor {name}.{kind}")
        if tensor.shape != shape:
            raise CheckpointError(f"{path}: {name}.{kind} is {tuple(tensor.shape)}, should be {shape}")
        wrong = wrong_numbers(kind, tensor, **kinds, own=own, refitted=True)
        if wrong is not None:
            raise CheckpointError(f"{path}: {name}.{kind} {wrong}")
        return tensor

    found: dict[str, Any] = {kind: stored(kind, shape) for kind, shape in solution_shapes(entry).items()}
    solved = {"refitted": entry["refitted"], "weight_sparse": kinds["weight_sparse"]}
    return Solution(**found, **solved, error=entry.get("error", math.nan))


def solution_shapes(entry: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a checkpoint has of one layer."""
    sizes = entry["in_features"], entry["out_features"], entry["rank"]
    kinds = {"refitted": entry["refitted"], "intercept": entry.get("intercept", False)}
    return stored_shapes(*sizes, quantized=stored_formats(entry)["quantized"], **kinds)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

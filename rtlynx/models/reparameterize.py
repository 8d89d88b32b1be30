"""Give tensors inside a model another basis: in the layers that make them and in those that read them.

The values of attentions are rotated, the hidden features of MLPs permuted. The model computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from rtlynx.math.selection import Pattern, to_groups
from rtlynx.models.architecture import Attention, Mlp, Reparameterizable
from rtlynx.models.change_of_basis import REPARAMETERIZED, LayerChange, Side, Turn, turns, unfollow_basis
from rtlynx.models.fingerprint import is_plain, record, records, same
from rtlynx.models.fusion import hands_on
from rtlynx.models.guards import foreign_reason, wrapped_layer
from rtlynx.nn.lora import untouched

# Classes that compute feature by feature what comes between the layers of an MLP, or call what does.
_FEATURE_BY_FEATURE = {"FeedForward", "GELU"}


@dataclass(frozen=True)
class Reparameterization:
    """What was done to the parameters of a model.

    bases : attention -> R (H, d, d) float32, MLP -> order (K,) int32, on the CPU; or None where it is not
        known (any more). The hidden feature i is the dense model's order[i].
    originals : name of a parameter -> it, before; none where they were not kept.
    records : name of a parameter -> its record (`fingerprint.record`) since.
    """

    bases: Mapping[str, Tensor | None]
    originals: Mapping[str, nn.Parameter] = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of the originals."""
        return sum(tensor.nbytes for tensor in self.originals.values())

    @property
    def known(self) -> dict[str, Tensor]:
        """`bases`; ValueError where one is not known."""
        found = {name: basis for name, basis in self.bases.items() if basis is not None}
        if len(found) < len(self.bases):
            raise ValueError(
                "this model was loaded by from_pretrained, whose files hold rotated or permuted weights, and "
                "not how they came from the base model's"
            )
        return found


def fixed_reason(model: nn.Module, one: Reparameterizable) -> str | None:
    """Why `one` must keep its basis in `model`; None where it need not."""
    if isinstance(one, Attention) and not hands_on(model.get_submodule(one.name)):
        return "its attention processor is not known to mix values as diffusers' own does"
    modules = dict(model.named_modules())
    for name in one.layers:
        layer = modules.get(name)
        reason = "is not there" if layer is None else foreign_reason(layer)
        if reason is not None:
            return f"{name} {reason}"
    if isinstance(one, Attention) and one.value_heads > one.heads:  # (queries and keys, too)
        return f"{one.makers[0]} makes more than its values"
    if isinstance(one, Mlp):
        if any(cast(Any, modules[name]).out_features != one.width for name in one.makers):
            return f"what its up projection makes are not the {one.width} features that {one.name} reads"
        for name in one.between:
            module = modules.get(name)
            if type(module).__name__ not in _FEATURE_BY_FEATURE or not untouched(cast(nn.Module, module)):
                return f"{name} is not known to compute feature by feature, as diffusers' own does"
    return None


def hidden_groups(mlp: Mlp, pattern: Pattern, shards: int) -> list[Tensor] | None:
    """Places of hidden features that compete, (G, m) in each of `shards` equal parts of them.

    None where groups reach over parts, or over the hidden features.
    """
    places = to_groups(torch.arange(mlp.first + mlp.width), pattern) - mlp.first
    places = places[(places >= 0).all(1)]
    if mlp.width % shards or places.numel() != mlp.width:
        return None
    part = places // (mlp.width // shards)
    if bool((part != part[:, :1]).any()):
        return None
    return [places[part[:, 0] == number] for number in range(shards)]


def mark(model: nn.Module, changed: Iterable[Reparameterizable], bases: Mapping[str, Tensor | None]) -> None:
    """Let adapters know which layers of `model` have other bases than the dense model's, and which."""
    for one in changed:
        sides: tuple[tuple[tuple[str, ...], Side], ...] = (one.makers, "rows"), (one.readers, "columns")
        for names, side in sides:
            for name in names:
                layer = model.get_submodule(name)
                change = LayerChange(one, side, bases[one.name])
                setattr(layer, REPARAMETERIZED, (*getattr(layer, REPARAMETERIZED, ()), change))


def reparameterize(
    model: nn.Module, changed: Sequence[Reparameterizable], bases: Mapping[str, Tensor]
) -> Reparameterization:
    """Give `changed` the `bases` in a dense `model`, which computes the same up to rounding.

    Its parameters are new. Callers make it `all_or_none`.

    Raises
    ------
    ValueError
        If a rotation has no inverse, or a permutation reaches over tensor-parallel shards.
    """
    originals: dict[str, nn.Parameter] = {}

    def replace(name: str, kind: str, turn: Turn, basis: Tensor) -> None:
        linear = model.get_submodule(name)
        old = linear._parameters[kind]
        if old is not None:
            originals.setdefault(f"{name}.{kind}", old)  # (one layer may read two of `changed`)
            linear.register_parameter(kind, nn.Parameter(_turned(old, turn, basis), old.requires_grad))

    refuse_crossing(model, changed, bases)
    for one in changed:
        make, read = turns(one, bases[one.name])
        for name in one.makers:
            replace(name, "weight", *make)
            replace(name, "bias", *make)
        for name in one.readers:
            replace(name, "weight", *read)
    kept = {one.name: bases[one.name].cpu() for one in changed}
    mark(model, changed, kept)
    now = {name: cast(Tensor, model.get_parameter(name)) for name in originals}
    return Reparameterization(
        kept, originals, records({name: one for name, one in now.items() if is_plain(one)})
    )


def refuse_crossing(
    model: nn.Module, changed: Iterable[Reparameterizable], bases: Mapping[str, Tensor]
) -> None:
    """ValueError where a permutation reaches over the tensor-parallel shards of `model`."""
    for one in changed:
        weight: Any = model.get_submodule(one.readers[0])._parameters["weight"]
        if not isinstance(one, Mlp) or is_plain(weight) or not hasattr(weight, "placements"):
            continue
        degree = weight.device_mesh.size()
        parts = bases[one.name].unflatten(0, (degree, -1)) if one.width % degree == 0 else None
        home = torch.arange(degree)[:, None]
        if parts is None or bool((parts // parts.shape[1] != home).any()):
            raise ValueError(
                f"the hidden features of {one.name} were permuted (permute_hidden) across {degree} "
                f"tensor-parallel shards: calibrate with a recipe of tp_degree={degree}"
            )


def undo_reparameterization(model: nn.Module, done: Reparameterization) -> None:
    """Give the layers of `model` the parameters that they had before `reparameterize`.

    Raises
    ------
    RuntimeError
        If those were not kept, or the new ones have changed since. Callers make it `all_or_none`.
    """
    if not done.originals:
        raise RuntimeError(
            "values of this model were rotated (rotate_values) or hidden features permuted (permute_hidden) "
            "without keeping the original weights: load the dense model again"
        )
    for name, original in done.originals.items():
        layer, _, kind = name.rpartition(".")
        place = model.get_submodule(layer)
        linear: Any = wrapped_layer(place)
        now = linear._parameters[kind]
        if name in done.records and not same(done.records[name], record(now)):
            raise RuntimeError(
                f"{name} has changed since the values of this model were rotated, or its hidden features "
                "permuted (training?), and the change would be lost"
            )
        if (now.device, now.dtype) != (original.device, original.dtype):
            moved = original.detach().to(now.device, now.dtype)
            original = nn.Parameter(moved, original.requires_grad)
        linear.register_parameter(kind, original)
        vars(linear).pop(REPARAMETERIZED, None)
        unfollow_basis(place)


def _turned(old: Tensor, turn: Turn, basis: Tensor) -> Tensor:
    """`turn(old, basis)`; of a tensor-parallel shard, by the part of the basis that is its own."""
    tensor, device = old.detach(), old.device
    if is_plain(tensor):
        return turn(tensor, basis.to(device))
    from torch.distributed.tensor import DTensor

    shard = cast(Any, tensor)
    mesh, (placement,) = shard.device_mesh, shard.placements
    if placement.is_shard():  # heads are whole on each, and features stay in their shard
        basis = basis.tensor_split(mesh.size())[mesh.get_local_rank()]
        if not basis.is_floating_point():
            basis = basis - mesh.get_local_rank() * len(basis)
    part = turn(shard.to_local(), basis.to(device))
    return DTensor.from_local(part, mesh, (placement,), run_check=False)

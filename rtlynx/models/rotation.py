"""Rotate the values of a model's attentions: in the layers that make V and in those that read the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rtlynx.math.rotation import rotate_columns, rotate_rows
from rtlynx.models.architecture import Attention
from rtlynx.models.fingerprint import is_plain, record, records, same
from rtlynx.models.fusion import hands_on
from rtlynx.models.guards import ROTATED, foreign_reason


@dataclass(frozen=True)
class Rotation:
    """What was done to the values of a model.

    matrices : attention -> R (H, d, d) float32 on the CPU, or None where it is not known (any more).
    originals : name of a tensor -> it, before it was rotated; none where they were not kept.
    records : name of a tensor -> its record (`fingerprint.record`) since it was rotated.
    """

    matrices: Mapping[str, Tensor | None]
    originals: Mapping[str, nn.Parameter] = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of the originals."""
        return sum(tensor.nbytes for tensor in self.originals.values())


def fixed_reason(model: nn.Module, attention: Attention) -> str | None:
    """Why the values of `attention` cannot be rotated; None where they can."""
    if not hands_on(model.get_submodule(attention.name)):
        return "its attention processor is not known to mix values as diffusers' own does"
    modules = dict(model.named_modules())
    for name in (*attention.values, *attention.readers):
        layer = modules.get(name)
        reason = "is not there" if layer is None else foreign_reason(layer)
        if reason is not None:
            return f"{name} {reason}"
    return None


def mark_rotated(model: nn.Module, attentions: Iterable[Attention]) -> None:
    """Let adapters know which layers of `model` are rotated."""
    for attention in attentions:
        for name in (*attention.values, *attention.readers):
            setattr(model.get_submodule(name), ROTATED, True)


def rotate(model: nn.Module, attentions: Iterable[Attention], matrices: Mapping[str, Tensor]) -> Rotation:
    """Rotate the values of a dense `model`, which computes the same up to rounding; its parameters are new.

    Raises
    ------
    ValueError
        If a matrix has no inverse. Callers make it `all_or_none`.
    """
    attentions, originals = list(attentions), {}

    def replace(name: str, kind: str, turn: Callable[[Tensor, Tensor], Tensor], matrix: Tensor) -> None:
        linear = model.get_submodule(name)
        old = linear._parameters[kind]
        if old is not None:
            originals[f"{name}.{kind}"] = old
            linear.register_parameter(kind, nn.Parameter(_turned(old, turn, matrix), old.requires_grad))

    for attention in attentions:
        matrix = matrices[attention.name].double()
        inverse, failed = torch.linalg.inv_ex(matrix)
        if bool(failed.any()) or not bool(inverse.isfinite().all()):
            raise ValueError(f"the rotation of {attention.name} has no inverse")
        sharing = attention.heads // attention.value_heads
        for name in attention.values:
            replace(name, "weight", rotate_rows, matrix)
            replace(name, "bias", rotate_rows, matrix)
        for name in attention.readers:
            replace(name, "weight", partial(rotate_columns, sharing=sharing), inverse)
    mark_rotated(model, attentions)
    now = {name: cast(Tensor, model.get_parameter(name)) for name in originals}
    kept = {name: matrices[name].float().cpu() for name in (one.name for one in attentions)}
    return Rotation(kept, originals, records({name: one for name, one in now.items() if is_plain(one)}))


def rotate_back(model: nn.Module, rotation: Rotation) -> None:
    """Give the layers of `model` the parameters that they had before `rotate`.

    Raises
    ------
    RuntimeError
        If those were not kept, or the rotated ones have changed since. Callers make it `all_or_none`.
    """
    if not rotation.originals:
        raise RuntimeError(
            "the values of this model were rotated (rotate_values) without keeping the original weights: "
            "load the dense model again"
        )
    for name, original in rotation.originals.items():
        layer, _, kind = name.rpartition(".")
        linear: Any = model.get_submodule(layer)
        now = linear._parameters[kind]
        if name in rotation.records and not same(rotation.records[name], record(now)):
            raise RuntimeError(
                f"{name} has changed since the values of this model were rotated (training?), and the change "
                "would be lost"
            )
        if (now.device, now.dtype) != (original.device, original.dtype):
            moved = original.detach().to(now.device, now.dtype)
            original = nn.Parameter(moved, original.requires_grad)
        linear.register_parameter(kind, original)
        vars(linear).pop(ROTATED, None)


def _turned(old: Tensor, turn: Callable[[Tensor, Tensor], Tensor], matrix: Tensor) -> Tensor:
    """`turn(old, matrix)`; of a tensor-parallel shard, by the matrices of its heads."""
    tensor, device = old.detach(), old.device
    if is_plain(tensor):
        return turn(tensor, matrix.to(device))
    from torch.distributed.tensor import DTensor

    shard = cast(Any, tensor)
    mesh, (placement,) = shard.device_mesh, shard.placements
    if placement.is_shard():  # heads are whole on each
        matrix = matrix.tensor_split(mesh.size())[mesh.get_local_rank()]
    part = turn(shard.to_local(), matrix.to(device))
    return DTensor.from_local(part, mesh, (placement,), run_check=False)

"""Bases of values in place of the library's rotation, each of which leaves out a part of it.

The library gives each head R = M^½ Q, Q the eigenvectors of M^½ C M^½: C is the covariance of what the
attention gives, M the W^T W of its readers. It groups channels j, j + d/4, j + d/2, j + 3d/4 of one head.
Every function here takes what `rtlynx.math.rotation.value_rotation` does, and gives R (H, d, d).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration import reparameterize, run
from rtlynx.math.rotation import value_rotation
from rtlynx.models.plan import Plan, make_plan
from rtlynx.models.sparsify import make_plan_for_dense
from rtlynx.recipe import Recipe

Rotation = Callable[[Tensor, Tensor, int], Tensor]


def grouped(covariance: Tensor, gram: Tensor, m: int) -> Tensor:
    """No rotation: channels as they are, in groups j, j + d/m, ... inside the head."""
    del gram
    d = covariance.shape[-1]
    return torch.eye(d)[:, _beside(d, m)].to(covariance).expand_as(covariance)


def grouped_by_worth(covariance: Tensor, gram: Tensor, m: int) -> Tensor:
    """No rotation: channels by their energy at the readers' output, C_jj M_jj, strong beside weak ones."""
    d = covariance.shape[-1]
    worth = covariance.diagonal(dim1=-2, dim2=-1) * gram.diagonal(dim1=-2, dim2=-1)
    order = worth.argsort(dim=-1, descending=True)[:, _beside(d, m)]
    return nn.functional.one_hot(order, d).mT.to(covariance)


def without_metric(covariance: Tensor, gram: Tensor, m: int) -> Tensor:
    """Eigenvectors of C alone, strong beside weak ones."""
    del gram
    falling = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    return falling[..., _beside(covariance.shape[-1], m)]


def strong_beside_strong(covariance: Tensor, gram: Tensor, _m: int) -> Tensor:
    """The library's rotation with channels in falling order: those of like worth compete."""
    return value_rotation(covariance, gram, 1)


def across_heads(covariance: Tensor, gram: Tensor, m: int) -> Tensor:
    """The library's rotation for groups c, c + K/m, ... of all K channels: strong beside weak of other heads.

    For models in which each head has values of its own.
    """
    falling = value_rotation(covariance, gram, 1)
    heads, d = falling.shape[:2]
    # Members of a group are heads · d / m channels apart: as many places of a head as leaves this to shift.
    shifts = torch.arange(heads, device=falling.device) * math.gcd(heads, m) // heads * (d // m)
    order = (torch.arange(d, device=falling.device) + shifts[:, None]) % d
    return falling.gather(-1, order[:, None, :].expand_as(falling))


ROTATIONS: dict[str, Rotation] = {
    "grouped": grouped,
    "grouped-by-worth": grouped_by_worth,
    "without-metric": without_metric,
    "strong-beside-strong": strong_beside_strong,
    "across-heads": across_heads,
}


@contextmanager
def rotating(name: str) -> Iterator[None]:
    """Meanwhile, calibration turns values by one of `ROTATIONS`; by the library's own where `name` is ""."""
    put: list[tuple[Any, str, Any]] = []
    if name:
        put.append((reparameterize, "value_rotation", ROTATIONS[name]))
    if name == "across-heads":
        put.append((run, "make_plan_for_dense", _in_strided_groups))
    before = [getattr(module, attribute) for module, attribute, _ in put]
    try:
        for module, attribute, value in put:
            setattr(module, attribute, value)
        yield
    finally:
        for (module, attribute, _), value in zip(put, before, strict=True):
            setattr(module, attribute, value)


def _in_strided_groups(model: nn.Module, recipe: Recipe) -> Plan:
    """The plan, but rotated values are selected in the groups that they would be in without rotation."""
    plan = make_plan_for_dense(model, recipe)
    readers = {name for one in plan.rotated for name in one.readers}
    unrotated = {layer.name: layer for layer in make_plan(model, replace(recipe, rotate_values=False)).layers}
    layers = (
        replace(layer, pattern=unrotated[layer.name].pattern) if layer.name in readers else layer
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def _beside(d: int, m: int) -> Tensor:
    """Order in which channels j, j + d/m, ... are neighbours."""
    return torch.arange(d).unflatten(0, (m, -1)).T.flatten()

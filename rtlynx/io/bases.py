"""Rotations and permutations as checkpoints hold them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rtlynx.models.architecture import Attention, Reparameterizable
from rtlynx.storage.files import CheckpointError

# What the file calls R of an attention and the order of an MLP's hidden features.
BASES = {"rotate_values": "value_rotation", "permute_hidden": "hidden_permutation"}


def basis_shape(one: Reparameterizable) -> tuple[int, ...]:
    """Of the tensor that a checkpoint has of `one`: (H, d, d) of an attention, (K,) of an MLP."""
    return (*one.size, one.size[-1]) if isinstance(one, Attention) else tuple(one.size)


def stored_basis(one: Reparameterizable, tensors: dict[str, Tensor], path: Path) -> Tensor:
    """R of an attention, or the order of an MLP's hidden features, checked; it is taken out of `tensors`."""
    name, shape = f"{one.name}.{BASES[one.setting]}", basis_shape(one)
    basis = tensors.pop(name, None)
    if basis is None:
        raise CheckpointError(f"{path} lacks the tensor {name}")
    if isinstance(one, Attention):
        dtype, what = torch.float32, "finite torch.float32 numbers"
    else:
        dtype, what = torch.int32, f"torch.int32 numbers, each from 0 to {shape[0] - 1} once"
    right = basis.shape == shape and basis.dtype is dtype and bool(basis.isfinite().all())
    if not right or (dtype is torch.int32 and not torch.equal(basis.sort().values, torch.arange(len(basis)))):
        raise CheckpointError(f"{path}: {name} should be {shape} of {what}")
    return basis

"""Tell whether two models hold the same weights, without reading all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from rtlynx.linear import SparseLinear

_SAMPLES = 64


def weight_fingerprint(weight: Tensor) -> str:
    """Digest of a weight's shape and of 64 entries spread over it, as bfloat16 (so a cast model matches)."""
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)
    sample = flat[index].to(torch.bfloat16).float().cpu().numpy()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + sample.tobytes()).hexdigest()[:16]


def model_fingerprint(model: nn.Module, names: list[str]) -> str:
    """Digest of the model's class and the original weights of the linears `names`."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.original_weight() if isinstance(layer, SparseLinear) else layer.weight
        digest.update(f"{name}={weight_fingerprint(weight)};".encode())
    return digest.hexdigest()

"""The record of a solved layer: what calibration finds, checkpoints keep and `SparseLinear` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.math.fp8 import Quantized
from rtlynx.nn.sparse_linear import SparseLinear


@dataclass(frozen=True)
class Solution:
    """What calibration found for one layer. Tensors have the names that they have in the layer and in files.

    weight : (N, K) refitted W', or None where W stays; e4m3 values of W' or W for an fp8 layer.
    lowrank_a, lowrank_b : (r, K) and (N, r) low-rank factors A^T and B, or None.
    weight_scale : (N,) of a quantised `weight`, or None.
    bias : (N,) refitted bias, or None where the layer's own stays.
    refitted : whether a quantised `weight` is W'.
    weight_sparse : whether `weight` is quantised and 2:4-sparse.
    ridge : relative regularisation used, None where none was (trained factors).
    error_before, error : relative squared layer error without and with the solution, on held-out tokens
        where there are any.
    """

    weight: Tensor | None = None
    lowrank_a: Tensor | None = None
    lowrank_b: Tensor | None = None
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    refitted: bool = False
    weight_sparse: bool = False
    ridge: float | None = None
    error_before: float = float("nan")
    error: float = float("nan")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that it has, by name."""
        names = ("weight", "lowrank_a", "lowrank_b", "weight_scale", "bias")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def rows(self, start: int, stop: int) -> Solution:
        """The part of a solution over concatenated outputs that belongs to outputs `start` ... `stop` - 1."""
        parts: dict[str, Any] = {
            name: tensor[start:stop] for name, tensor in self.tensors.items() if name != "lowrank_a"
        }
        return replace(self, **parts)

    def install(self, layer: SparseLinear, *, keep_dense: bool) -> None:
        """Give `layer` the weight and the factors; `keep_dense` keeps the original weight beside them."""
        if self.lowrank_a is not None and self.lowrank_b is not None:
            layer.set_lowrank(self.lowrank_a, self.lowrank_b)
        if self.weight is None:
            return
        own = layer.weight.dtype
        if self.weight_scale is None:
            layer.set_refit(self.weight, keep_dense=keep_dense)
        else:
            quantised = Quantized(self.weight, self.weight_scale)
            kind = {"refitted": self.refitted, "sparse": self.weight_sparse}
            layer.set_quantized(quantised, keep_dense=keep_dense, **kind)
        if self.bias is not None:
            new, old = self.bias.detach().to(layer.weight.device, own, copy=True), layer.bias
            if keep_dense:
                layer.bias_dense = torch.zeros_like(new) if old is None else old.detach()
            layer.bias = nn.Parameter(new, requires_grad=layer.weight.requires_grad)
            layer.intercept = "added" if old is None else "refitted"


def stored_shapes(
    in_features: int, out_features: int, rank: int, *, quantized: bool, refitted: bool, intercept: bool
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a layer's solution has."""
    shapes: dict[str, tuple[int, ...]] = {}
    if refitted or quantized:
        shapes["weight"] = (out_features, in_features)
    if quantized:
        shapes["weight_scale"] = (out_features,)
    if rank:
        shapes |= {"lowrank_a": (rank, in_features), "lowrank_b": (out_features, rank)}
    if intercept:
        shapes["bias"] = (out_features,)
    return shapes

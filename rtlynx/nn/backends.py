"""Ways to compute a sparse layer. Each prepares the input (select, quantise, pack), then multiplies.

`choose_backend` is the one place that decides which of them serves a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from rtlynx.math import reference
from rtlynx.math.formats import BF16_SPARSE, FP8_DENSE, FP8_WEIGHT_SPARSE
from rtlynx.math.selection import pattern_mask, select
from rtlynx.math.tiles import pack_lowrank
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops import sparse_linear as ops

if TYPE_CHECKING:
    from rtlynx.nn.sparse_linear import SparseLinear


class Backend(Protocol):
    """One way to compute a layer."""

    def prepare(self, layer: SparseLinear, x: Tensor) -> Any:
        """All that the product needs of `x` (..., K); layers that read one input can share it."""
        ...

    def multiply(self, layer: SparseLinear, x: Tensor, prepared: Any) -> Tensor:
        """Y (..., N) of `x` (..., K), of which `prepare` gave `prepared`."""
        ...

    def lowrank_factor(self, layer: SparseLinear) -> Tensor | None:
        """A^T where `prepare` multiplies with it, so that layers with another A prepare again."""
        ...


class Reference:
    """Plain PyTorch, in the dtype of the input; differentiable."""

    def prepare(self, layer: SparseLinear, x: Tensor) -> reference.Compressed:
        if layer.whole_scale is None:
            return reference.compress(x, layer.pattern, layer.norm)
        mask = pattern_mask(x, layer.pattern)
        return reference.Compressed(select(x, mask), layer.whole_scale(x, mask=mask))

    def multiply(self, layer: SparseLinear, x: Tensor, prepared: reference.Compressed) -> Tensor:
        lowrank = None if layer.lowrank_a is None else linear(x, layer.lowrank_a)
        return reference.sparse_linear(prepared, layer.weight, layer.bias, lowrank, layer.lowrank_b)

    def lowrank_factor(self, layer: SparseLinear) -> Tensor | None:
        return None


class ReferenceFp8:
    """Eight-bit values in plain PyTorch."""

    def prepare(self, layer: SparseLinear, x: Tensor) -> fp8.CompressedFp8:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a quantised layer passes no gradient to its input: call the model under torch.no_grad()"
            )
        if layer.whole_scale is None:
            return fp8.compress_fp8(x, layer.pattern, layer.norm)
        values, token = fp8.compress_fp8(x, layer.pattern, "none")
        return fp8.CompressedFp8(values, layer.whole_scale(x, mask=pattern_mask(x, layer.pattern)) * token)

    def multiply(self, layer: SparseLinear, x: Tensor, prepared: fp8.CompressedFp8) -> Tensor:
        return fp8.linear_fp8(x, prepared, layer.fp8_parameters())

    def lowrank_factor(self, layer: SparseLinear) -> Tensor | None:
        return None


class DenseFp8(ReferenceFp8):
    """Eight-bit values of which none is dropped: one scaled product, where that serves.

    PyTorch's own, or ours where half of the weight is zero.
    """

    def multiply(self, layer: SparseLinear, x: Tensor, prepared: fp8.CompressedFp8) -> Tensor:
        return fp8.dense_linear_fp8(x, prepared, layer.fp8_parameters())


class Hopper:
    """The kernels on sparse tensor cores, in bfloat16 or e4m3, by torch operators."""

    def prepare(self, layer: SparseLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if layer.shared_input.single and layer.whole_scale is None:
            return None  # `multiply` does both in one call: half the host time
        x, norm, format, score = (
            _unit_stride(x),
            layer.norm == "scale",
            layer.format.name,
            layer.pattern.score,
        )
        groups = layer.pattern.grouping, ops.pattern_parts(layer.pattern, layer.in_features)
        lowrank_a = self.lowrank_factor(layer)
        if layer.whole_scale is None:
            return ops.compress(x, lowrank_a, *groups, norm, format, score)
        # The kernel's own s, of this shard, tells the norm of what is kept of it.
        tiles, local, _ = ops.compress(x, None, *groups, True, BF16_SPARSE.name, score)
        scale = layer.whole_scale(x, local=local.view(*x.shape[:-1], 1)).flatten()
        if layer.format.quantized:
            tiles, token, _ = ops.compress(x, None, *groups, False, format, score)
            scale = scale * token
        lowrank = x.new_empty(0, dtype=torch.uint8)
        if (
            lowrank_a is not None
        ):  # a pass of its own: T is to be divided by a scale that no pass over X knows
            product = linear(x.reshape(-1, x.shape[-1]), lowrank_a).float()
            lowrank = pack_lowrank((product / scale.unsqueeze(-1)).bfloat16())
        return tiles, scale, lowrank

    def multiply(
        self, layer: SparseLinear, x: Tensor, prepared: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        weight, lowrank_b, bias, weight_scale = layer.multiplied()
        lowrank_a, norm = self.lowrank_factor(layer), layer.norm == "scale"
        if prepared is None:
            parts = ops.pattern_parts(layer.pattern, layer.in_features)
            how = layer.pattern.grouping, parts, norm, weight_scale, layer.pattern.score
            return ops.linear(_unit_stride(x), weight, bias, lowrank_a, lowrank_b, *how)
        tiles, scale, lowrank = prepared
        scaled = scale if norm or weight_scale is not None else None
        rows = x.numel() // layer.in_features
        beside = None if lowrank_a is None else lowrank
        y = ops.gemm(tiles, scaled, beside, weight, lowrank_b, bias, rows, weight_scale)
        return y.view(*x.shape[:-1], layer.out_features)

    def lowrank_factor(self, layer: SparseLinear) -> Tensor | None:
        return layer.lowrank_a


REFERENCE, REFERENCE_FP8, DENSE_FP8, HOPPER = Reference(), ReferenceFp8(), DenseFp8(), Hopper()


def choose_backend(layer: SparseLinear, x: Tensor) -> Backend:
    """What serves `layer` for an input like `x` (..., K)."""
    if layer.format in (FP8_DENSE, FP8_WEIGHT_SPARSE):
        return DENSE_FP8
    if layer.supported(x):
        return HOPPER
    return REFERENCE_FP8 if layer.format.quantized else REFERENCE


def as_multiplied(x: Tensor) -> Tensor:
    """`x` as the product will see it: selection is of that."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

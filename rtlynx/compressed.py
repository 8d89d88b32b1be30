"""An input that exists compressed alone, and the one product of all layers that read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rtlynx.kernels import ops

if TYPE_CHECKING:
    from rtlynx.linear import SparseLinear


@dataclass
class CompressedInput:
    """Stands for an input (..., K) that exists compressed alone, for the layers that it was made for.

    Attributes
    ----------
    shape, dtype, device
        Of the dense input.
    compressed : blocks, scale and blocks of T, as from `rtlynx::compress`
    readers : the layers; they can be called with this in place of a tensor, each once or more
    first_ranks : first of each layer's columns of T
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    compressed: tuple[Tensor, Tensor, Tensor]
    readers: tuple[SparseLinear, ...]
    first_ranks: list[int]
    _outputs: list[Tensor] = field(default_factory=list)

    def output_of(self, layer: SparseLinear) -> Tensor:
        """Y (..., N) of one of the layers; all are computed when the first is asked for.

        Raises
        ------
        TypeError
            If the input was not compressed for this layer.
        """
        for index, reader in enumerate(self.readers):
            if reader is layer:
                if not self._outputs:
                    self._outputs = self._multiply()
                return self._outputs[index]
        raise TypeError("this input was compressed for other layers: call the layer with a tensor")

    def _multiply(self) -> list[Tensor]:
        blocks, scale, lowrank = self.compressed
        rows = math.prod(self.shape[:-1])
        of = [reader.multiplied() for reader in self.readers]
        biases, ups, scales = (
            [tensor for tensor in tensors if tensor is not None]
            for tensors in (
                [one.bias for one in of],
                [one.up for one in of],
                [one.column_scale for one in of],
            )
        )
        y = ops.gemm_joint(
            *(blocks, scale, lowrank),
            *([one.weight for one in of], ups, biases, scales, self.first_ranks, rows),
        )
        y = y.view(*self.shape[:-1], y.shape[-1])
        return list(y.split([reader.out_features for reader in self.readers], dim=-1))

"""Inputs that exist only in the form that products read, and the outputs of the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops.prologue_linear import prologue_linear

if TYPE_CHECKING:
    from rtlynx.nn.sparse_linear import SparseLinear


@dataclass
class PreparedInput:
    """Stands for an input (..., K) that exists in another format alone, for the layers that it was made for.

    Attributes
    ----------
    shape, dtype, device
        Of the dense input.
    readers : the layers; they can be called with this in place of a tensor, each once or more
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    readers: tuple[SparseLinear, ...]

    def output_of(self, layer: SparseLinear) -> Tensor:
        """Y (..., N) of one of the layers.

        Raises
        ------
        TypeError
            If the input was not made for this layer.
        """
        for index, reader in enumerate(self.readers):
            if reader is layer:
                return self._output(index)
        raise TypeError("this input was prepared for other layers: call the layer with a tensor")

    def _output(self, index: int) -> Tensor:
        raise NotImplementedError


@dataclass
class CompressedInput(PreparedInput):
    """An input that exists compressed alone; one operator serves all layers, when the first is called.

    Attributes
    ----------
    prologue : what is compressed: its name and arguments, and how, as `rtlynx::compress` takes it from
        `lowrank_a` on
    first_ranks : first of each layer's columns of T
    lowrank_bs : B of each layer where LoRAs are beside one; None for the layers' own
    """

    prologue: tuple[str, Sequence[Any], tuple[Any, ...]]
    first_ranks: list[int]
    lowrank_bs: list[Tensor] | None = None
    _outputs: list[Tensor] = field(default_factory=list)

    def _output(self, index: int) -> Tensor:
        if not self._outputs:
            self._outputs = self._multiply()
        return self._outputs[index]

    def _multiply(self) -> list[Tensor]:
        name, arguments, how = self.prologue
        x, *others = [one for one in arguments if isinstance(one, Tensor)]
        numbers = [one for one in arguments if not isinstance(one, Tensor)]
        of = [reader.multiplied() for reader in self.readers]
        biases, lowrank_bs, scales = (
            [tensor for tensor in tensors if tensor is not None]
            for tensors in (
                [one.bias for one in of],
                [one.lowrank_b for one in of],
                [one.column_scale for one in of],
            )
        )
        if self.lowrank_bs is not None:
            lowrank_bs = self.lowrank_bs
        weights = [one.weight for one in of]
        y = prologue_linear(
            *(x, others, numbers, name, *how), *(weights, lowrank_bs, biases, scales, self.first_ranks)
        )
        y = y.view(*self.shape[:-1], y.shape[-1])
        return list(y.split([reader.out_features for reader in self.readers], dim=-1))


@dataclass
class QuantizedInput(PreparedInput):
    """An input that exists in e4m3 alone, all of it.

    Layers by 2:4 weights share a launch, when the first of them is called; others have one each.

    Attributes
    ----------
    quantized : values (..., K) and scale (..., 1), as from `rtlynx::quantize`
    parameters : what each layer multiplies with
    beside : what LoRAs add to each layer's output, or None where none do
    """

    quantized: fp8.CompressedFp8
    parameters: list[fp8.Fp8Parameters]
    beside: list[fp8.Beside | None]
    _outputs: dict[int, Tensor] = field(default_factory=dict)

    def _output(self, index: int) -> Tensor:
        if self.parameters[index].packed is None:
            return fp8.scaled_product(self.quantized, self.parameters[index], self.beside[index])
        if index not in self._outputs:
            (group,) = [one for one in fp8.joined(self.parameters) if index in one]
            of = [self.parameters[i] for i in group], [self.beside[i] for i in group]
            self._outputs.update(zip(group, fp8.packed_products(self.quantized, *of), strict=True))
        return self._outputs[index]


@dataclass
class MixedInput(PreparedInput):
    """An input in several formats, for layers of which some drop entries and others do not.

    Attributes
    ----------
    parts : one for the layers of each format
    """

    parts: tuple[PreparedInput, ...]

    def _output(self, index: int) -> Tensor:
        layer = self.readers[index]
        (part,) = [part for part in self.parts if any(reader is layer for reader in part.readers)]
        return part.output_of(layer)

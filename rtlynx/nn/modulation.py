"""`ModulationLinear`: a linear layer of few tokens that holds its weight in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rtlynx.math.formats import FP8_WEIGHTS
from rtlynx.math.fp8 import Quantized
from rtlynx.nn.backends import as_multiplied
from rtlynx.nn.lora import untouched
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.ops.checks import FLOATS
from rtlynx.ops.dispatch import wants_gradient
from rtlynx.ops.fp8_weights import linear_fp8_weights, linear_fp8_weights_reference


class ModulationLinear(SparseLinear):
    """Y = X (Wq ⊙ c)^T + b, Wq in e4m3 with a scale c for each output channel; X stays as it is.

    For layers that make shifts, scales and gates of the timestep: one token a picture, so that reading the
    weight is all of their time. On a Hopper card, for bfloat16 and float32 without gradients, one kernel
    reads it once (`rtlynx.ops.fp8_weights`); elsewhere the layer runs in plain PyTorch.

    It is a `SparseLinear` of format "fp8-weights" in all that is no arithmetic: casts, state dicts, adapters.
    It does the same in all steps, and keeps no original weight.
    """

    def set_quantized(
        self, weight: Quantized, *, keep_dense: bool = False, refitted: bool = False, sparse: bool = False
    ) -> None:
        """As of `SparseLinear`; nothing but the weight and its scale is taken."""
        if keep_dense or refitted or sparse:
            raise ValueError("a modulation layer holds its own weight in eight bits, and no other beside it")
        super().set_quantized(weight)
        self.format = FP8_WEIGHTS

    def forward(self, input: Tensor | PreparedInput) -> Tensor:
        """X (..., K) -> Y (..., N) in the dtype of X."""
        assert isinstance(input, Tensor)  # it reads no prologue
        return self.activated(input, silu=False)

    def activated(self, x: Tensor, *, silu: bool) -> Tensor:
        """The layer's output of SiLU(`x`), rounded to the dtype of `x`, where `silu`; else of `x`."""
        x, bias = as_multiplied(x), self._parameters["bias"]
        plain = x.dtype not in FLOATS or wants_gradient(x, bias)
        run: Any = linear_fp8_weights_reference if plain else linear_fp8_weights
        return run(x, self.weight, self.weight_scale, bias, silu)

    def original_weight(self) -> Tensor:
        """As of `SparseLinear`; of a quantised layer never."""
        if not self.format.quantized:
            return self.weight
        raise RuntimeError(
            "this layer holds its weight in eight bits alone (modulation='fp8'): load the dense model again, "
            "or make it sparse with modulation='dense'"
        )

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, fp8 weights"


def modulation(silu: Callable[[Tensor], Tensor], layer: Any, x: Tensor) -> Tensor:
    """`layer`(`silu`(x)), as one kernel where both are what they seem; x (B, K)."""
    if type(layer) is ModulationLinear and type(silu) is nn.SiLU and untouched(layer) and untouched(silu):
        return layer.activated(x, silu=True)
    return layer(silu(x))

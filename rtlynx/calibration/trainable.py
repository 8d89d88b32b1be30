"""A sparse layer that can be trained, in the place of the dense one that it holds beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rtlynx.calibration.options import Distillation
from rtlynx.math.fp8 import dequantize, quantize_tokens, quantize_weight
from rtlynx.math.reference import Compressed, sparse_linear
from rtlynx.math.selection import norm_scale, pattern_mask, select
from rtlynx.models.plan import LayerPlan
from rtlynx.nn.call import CallState, current_call
from rtlynx.nn.solution import Solution
from rtlynx.recipe import Recipe

# Bytes a trained number takes: itself, its gradient and two moments of Adam's, each in float32.
BYTES_TRAINED = 16
_BYTES_MULTIPLIED = 2  # bfloat16


@dataclass
class Mode:
    """What the trainable layers of a model do at present.

    dense : whether they run dense, as the teacher.
    call : of the training batch, where something depends on it; None while a pipeline samples, whose hooks
        then say.
    """

    dense: bool = False
    call: CallState | None = None


class TrainableLinear(nn.Linear):
    """A planned sparse layer in float32 master weights; gradients go straight through what is not smooth.

    It computes what the solved `SparseLinear` would, in plain PyTorch. The gradient of the selection is that
    of its mask, held fixed; that of e4m3 rounding, of weight and input, is 1. Of a layer that drops weights
    those that the solution kept are trained. `weight` and `bias` stay those of the dense layer, with which it
    runs where `mode.dense`. A layer that drops nothing is not trained.

    Attributes
    ----------
    master : Parameter (N, K) float32, or None where a correction of some rank is trained, or nothing.
    up, down : Parameters (N, r) and (r, K) float32 of that correction, or None.
    master_bias : Parameter (N,) float32, or None.
    """

    master: nn.Parameter | None
    up: nn.Parameter | None
    down: nn.Parameter | None
    master_bias: nn.Parameter | None

    def __init__(
        self,
        dense: nn.Linear,
        plan: LayerPlan,
        recipe: Recipe,
        solution: Solution,
        mode: Mode,
        *,
        rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        self.weight, self.bias = dense.weight, dense.bias
        device = dense.weight.device
        # A folder gives solutions on the CPU.
        here: dict[str, Any] = {name: one.detach().to(device) for name, one in solution.tensors.items()}
        self.plan, self.solution, self.mode = plan, replace(solution, **here), mode
        self.dense_steps = plan.has_dense_calls(recipe) and recipe.has_dense_steps
        self.text_rows_dense = plan.has_dense_calls(recipe) and plan.text_rows_dense
        self.dense_quantized = recipe.dense_precision == "fp8"
        for name in ("master", "up", "down", "master_bias"):
            self.register_parameter(name, None)
        self._kept: Tensor | None = None  # weights (N, K) of a layer that drops others
        bias = dense.bias if solution.bias is None else self.solution.bias
        self.solved_bias = None if bias is None else bias.detach().to(dense.weight.dtype)
        if plan.drops_nothing:
            return
        if plan.weight_sparse:
            self._kept = self._solved() != 0
        if bias is not None:
            self.master_bias = nn.Parameter(bias.detach().to(torch.float32, copy=True))
        if rank is None:
            self.master = nn.Parameter(self._solved().to(torch.float32, copy=True))
            self.solution = replace(self.solution, weight=None, weight_scale=None)  # the master's now
            return
        rank = trained_rank(plan, rank)
        # So large that a step moves a weight by about the learning rate, as without a rank.
        drawn = torch.randn(rank, plan.in_features, generator=generator).div_(rank**0.5)
        self.down = nn.Parameter(drawn.to(device))
        self.up = nn.Parameter(torch.zeros(plan.out_features, rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """X (..., K) -> Y (..., N)."""
        if self.mode.dense:
            return linear(input, self.weight, self.bias)
        if not (self.dense_steps or self.text_rows_dense):
            return self._sparse(input)
        call = self.mode.call or current_call()
        if call.dense:
            return self._original(input)
        ranges = call.split(input.shape[-2]) if self.text_rows_dense else None
        if ranges is None:
            return self._sparse(input)
        (start, stop), others = ranges
        pieces = [self._sparse(input[..., slice(*one), :]) for one in others]
        pieces.insert(1 if start > 0 else 0, self._original(input[..., start:stop, :]))
        return torch.cat(pieces, dim=-2)

    def distilled(self) -> Solution:
        """The solution with what was trained; its error is not known."""
        if self.plan.drops_nothing:
            return self.solution
        found: dict[str, Any] = {"weight": self._master().detach()}
        if self.plan.quantized:
            found["weight"], found["weight_scale"] = quantize_weight(found["weight"])
        else:
            found["weight"] = found["weight"].to(self.weight.dtype)
        if self.master_bias is not None:
            found["bias"] = self.master_bias.detach()
        return replace(self.solution, **found, refitted=True, error=float("nan"))

    def _solved(self) -> Tensor:
        """Weight of the closed form (N, K)."""
        weight, scale = self.solution.weight, self.solution.weight_scale
        if weight is None:
            return self.weight.detach()
        return weight if scale is None else dequantize(weight, scale)

    def _master(self) -> Tensor:
        if self.master is not None:
            trained: Tensor = self.master
        elif self.up is not None and self.down is not None:
            trained = torch.addmm(self._solved().float(), self.up, self.down)
        else:
            return self._solved()
        return trained if self._kept is None else trained * self._kept

    def _sparse(self, x: Tensor) -> Tensor:
        plan, weight = self.plan, self._master()
        mask = None if plan.keeps_all else pattern_mask(x, plan.pattern)
        kept = x if mask is None else select(x, mask)
        if plan.quantized:
            kept = _input_in_e4m3(kept)
            # What is not trained is quantised already.
            weight = weight if plan.drops_nothing else _weight_in_e4m3(weight)
        scale = None
        if mask is not None and plan.norm != "none":
            scale = norm_scale(x, mask, paper_epsilon=plan.norm == "paper")
        bias = self.solved_bias if self.master_bias is None else self.master_bias.to(x.dtype)
        lowrank_a, lowrank_b = (
            None if one is None else one.to(x) for one in (self.solution.lowrank_a, self.solution.lowrank_b)
        )
        lowrank = None if lowrank_a is None else linear(x, lowrank_a)
        return sparse_linear(Compressed(kept, scale), weight.to(x.dtype), bias, lowrank, lowrank_b)

    def _original(self, x: Tensor) -> Tensor:
        if not self.dense_quantized:
            return linear(x, self.weight, self.bias)
        weight = quantize_weight(self.weight).dequantize().to(x.dtype)
        return linear(_input_in_e4m3(x), weight, self.bias)


def trained_bytes(layers: Iterable[LayerPlan], settings: Distillation) -> int:
    """Memory of what distillation keeps of the weights of `layers`, beside the model and its activations.

    Master weights, or a low-rank correction to each, with gradients and optimiser states; and, unless blocks
    are computed again in the backward pass, each weight as it is multiplied. Biases hardly count.
    """
    total, rank = 0, settings.rank
    for layer in layers:
        if not layer.drops_nothing:
            n, k = layer.out_features, layer.in_features
            total += BYTES_TRAINED * (n * k if rank is None else trained_rank(layer, rank) * (n + k))
            total += 0 if settings.gradient_checkpointing else _BYTES_MULTIPLIED * n * k
    return total


def trained_rank(layer: LayerPlan, rank: int) -> int:
    """Rank of the correction that a layer gets where `rank` is asked for."""
    return min(rank, layer.in_features, layer.out_features)


class _StraightThrough(torch.autograd.Function):
    """`rounded` forward, the gradient of `exact` backward."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _input_in_e4m3(kept: Tensor) -> Tensor:
    """What an eight-bit product sees of tokens (..., K), of which zeros were dropped."""
    return _StraightThrough.apply(kept, quantize_tokens(kept).dequantize().to(kept.dtype))


def _weight_in_e4m3(weight: Tensor) -> Tensor:
    """What an eight-bit product sees of a weight (N, K) float32."""
    return _StraightThrough.apply(weight, quantize_weight(weight).dequantize())

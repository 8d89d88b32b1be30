"""Layers of a dense checkpoint in eight bits as soon as their weights are read, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.math.fp8 import E4M3, Quantized, quantize_weight
from rtlynx.models.fingerprint import base_tensors, record, records, weight_fingerprint
from rtlynx.models.guards import refuse_foreign, refuse_meta
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.sparsify import apply_plan
from rtlynx.models.transaction import all_or_none
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.recipe import Recipe

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # diffusers casts others later


@dataclass(frozen=True)
class HeldBytes:
    """Bytes of an entry of a weight and of the original one beside it, as a dtype for accelerate to count by.

    No dtype has three or five, and accelerate reads the bits off a dtype's name.
    """

    count: int

    def __str__(self) -> str:
        return f"held{8 * self.count}"


class QuantizeOnLoad:
    """Does what `sparsify` does, but never holds the weight of more than one quantised layer as it was.

    The device that a model is loaded onto then holds no more than the model that comes out, and one layer.
    Layers that keep their weight in its own dtype are converted in `finish`: it stays anyway.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.weights = {f"{one.name}.weight" for one in plan.replaced if _only_eight_bits(one, plan.recipe)}
        # What is to be known of weights that are not there any more, by the name of the weight.
        self._scales: dict[str, Tensor] = {}
        self._fingerprints: dict[str, str] = {}
        self._records: dict[str, str] = {}

    def held(self, dtype: torch.dtype) -> dict[str, HeldBytes]:
        """What is held of each weight of a sparse layer, in a model of this `dtype`."""
        recipe, result = self._plan.recipe, {}
        for layer in self._plan.replaced:
            entry = E4M3.itemsize if layer.quantized else dtype.itemsize
            if layer.has_dense_calls(recipe) and recipe.dense_precision == "fp8":
                entry += E4M3.itemsize
            elif layer.has_dense_calls(recipe) and layer.quantized:
                entry += dtype.itemsize
            result[f"{layer.name}.weight"] = HeldBytes(entry)
        return result

    def takes(self, name: str, value: Tensor) -> bool:
        """Whether the parameter `name` is to come here."""
        return name in self.weights and value.dtype in _DTYPES

    def put(self, model: nn.Module, name: str, value: Tensor, device: Any) -> None:
        """Take the weight `name` of `model`; its linear layer holds eight-bit values without scales until
        `finish`.

        Raises
        ------
        ValueError
            If the weight is not finite.
        """
        layer = model.get_submodule(name.rpartition(".")[0])
        self._fingerprints[name], self._records[name] = weight_fingerprint(value), record(value)
        with torch.inference_mode(False), torch.no_grad():
            try:
                values, scale = quantize_weight(value.to(device))
            except ValueError as error:
                raise ValueError(f"{name.rpartition('.')[0]}: {error}") from None
            layer.weight, self._scales[name] = nn.Parameter(values, requires_grad=False), scale

    def finish(self, model: nn.Module) -> nn.Module:
        """Make `model`, whose weights are all there, sparse; raises what `sparsify` does."""
        missed = [one.name for one in self._plan.replaced if f"{one.name}.weight" not in self._scales]
        refuse_foreign(model, missed)
        refuse_meta(model)
        held = base_tensors(model)
        others = records({name: one for name, one in held.items() if name not in self._records})
        prints = self._fingerprints | {
            name: weight_fingerprint(held[name]) for name in (f"{one}.weight" for one in missed)
        }
        with all_or_none(model):
            apply_plan(
                model,
                self._plan,
                self._install,
                base={one.name: prints[f"{one.name}.weight"] for one in self._plan.replaced},
                tensors={name: self._records.get(name) or others[name] for name in held},
            )
        return model

    def _install(self, name: str, layer: SparseLinear) -> None:
        scale = self._scales.pop(f"{name}.weight", None)
        if scale is None:
            return
        quantised = Quantized(layer.weight, scale)
        if layer.depends_on_call:  # the original stays in eight bits, too
            layer.weight_dense, layer.weight_dense_scale = (one.detach().clone() for one in quantised)
        layer.set_quantized(quantised, keep_dense=layer.depends_on_call)


def _only_eight_bits(layer: LayerPlan, recipe: Recipe) -> bool:
    """Whether the weight of a layer stays in e4m3 alone."""
    return layer.quantized and (recipe.dense_precision == "fp8" or not layer.has_dense_calls(recipe))

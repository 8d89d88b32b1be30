"""What the tests of rtlynx beside other libraries share: sparse models, their formula, adapters."""

import copy

import torch
from formula_helpers import by_hand, group_indices
from helpers import copy_of, flux_call, tiny_flux
from torch import nn

from rtlynx import CalibrationOptions, Recipe, calibrate, sparsify
from rtlynx.models import sparse_layers

# kind -> how a tiny FLUX is made sparse
IMMEDIATE = {
    "immediate": Recipe.immediate(),
    "strided": Recipe.immediate(grouping="strided"),
    "adjacent": Recipe.immediate(grouping="adjacent"),
    "fp8": Recipe.immediate(precision="fp8"),
}
REFIT = Recipe(rank=4, ridge=0.1)


def sparse_flux(kind="immediate", **changes):
    """A tiny sparse FLUX: `kind` of `IMMEDIATE`, or "refit" (with a low-rank branch)."""
    return refit(**changes) if kind == "refit" else sparsify(tiny_flux(**changes), IMMEDIATE[kind])


def refit(recipe=REFIT, **changes):
    """A tiny FLUX, calibrated on two calls."""

    def make():
        model, calls = tiny_flux(**changes), [flux_call(0), flux_call(1)]
        options = CalibrationOptions(heldout=0.0)
        calibrate(model, calls=calls, recipe=recipe, options=options, progress=False)
        return model

    return copy_of(("refit", repr(recipe), repr(changes)), make)


class Formula(nn.Linear):
    """What a sparse layer computes, written from the specification, in float64."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight = layer.weight
        self.bias = layer.bias
        self.factors = {"lowrank_a": layer.lowrank_a, "lowrank_b": layer.lowrank_b}
        self.norm = layer.norm
        groups = group_indices(
            layer.in_features, 4, layer.pattern.grouping, layer.pattern.widths(layer.in_features)
        )
        self.groups = torch.tensor(groups)

    def mask(self, x):
        best = x[..., self.groups].abs().topk(2, dim=-1).indices
        kept = torch.zeros(*x.shape[:-1], *self.groups.shape, dtype=torch.bool).scatter(-1, best, True)
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[..., self.groups.flatten()] = kept.flatten(-2)
        return mask

    def forward(self, x, delta=0.0):
        """`delta` is added to the weight."""
        weight = self.weight + delta
        y = by_hand(x, weight, self.bias, mask=self.mask(x), norm=self.norm, **self.factors)
        return y.to(x.dtype)


def formulas(model):
    """Name -> `Formula` of each sparse layer of `model` (of its weights as they are now)."""
    return {
        name.removesuffix(".base_layer"): Formula(copy.deepcopy(layer))
        for name, layer in sparse_layers(model).items()
    }


def with_formulas(model):
    """A copy of `model` in which formulas stand in for the sparse layers."""
    twin = copy.deepcopy(model)
    for name, formula in formulas(model).items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, formula)
    assert not sparse_layers(twin)
    return twin


def adapter(model, names, seed=0, rank=4):
    """(state dict as diffusers loads it, {name: its delta B A}) of a LoRA for the layers `names`."""
    gen = torch.Generator().manual_seed(seed)
    state, deltas = {}, {}
    for name in names:
        layer = model.get_submodule(name)
        lowrank_a = torch.randn(rank, layer.in_features, generator=gen) / layer.in_features
        lowrank_b = torch.randn(layer.out_features, rank, generator=gen)
        state[f"transformer.{name}.lora_A.weight"] = lowrank_a
        state[f"transformer.{name}.lora_B.weight"] = lowrank_b
        deltas[name] = lowrank_b @ lowrank_a
    return state, deltas

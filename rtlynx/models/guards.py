"""What other libraries would do to a sparse model's weights unseen, refused with a reason."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from rtlynx.linear import SparseLinear


def guard(model: nn.Module) -> None:
    """Refuse, on `model` and its attention modules, what would lose sparsity or half-merge an adapter.

    Functions without a `self` take the place of methods: copies of the model carry them along unbound.
    """
    for module in model.modules():
        if callable(getattr(module, "fuse_projections", None)):
            module.fuse_projections = _refuse_fused_projections  # type: ignore[assignment]
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if any(layer.precision == "fp8" or layer.weight_dense is not None for layer in layers):
        model.fuse_lora = _refuse_merge  # type: ignore[assignment]


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    model.__dict__.pop("fuse_lora", None)
    for module in model.modules():
        module.__dict__.pop("fuse_projections", None)


def refuse_merged(model: nn.Module) -> None:
    """RuntimeError where an adapter was merged into a weight, but not into the original kept beside it."""
    for module in model.modules():
        if not getattr(module, "merged", False):
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, SparseLinear) and base.weight_dense is not None:
            raise RuntimeError(
                "an adapter is merged into the weights of sparse layers, but not into the original weights "
                "that dense rows and steps use: unmerge it and leave it beside the layers"
            )


def refuse_prepared(model: nn.Module) -> None:
    """ValueError where something was done to `model` that has to come after sparsity, or not at all."""
    kind = type(model).__name__
    if any(isinstance(getattr(module, "base_layer", None), nn.Linear) for module in model.modules()):
        raise ValueError(f"{kind} has adapters attached: make it sparse first, then load the adapters")
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            f"{kind} has fused query, key and value projections, beside which sparse ones would not run: "
            "call its unfuse_qkv_projections() first (sparse layers share their input without fusing)"
        )
    # With streams its groups remember the parameters that they found, and would miss new ones.
    if any(_group_offloaded(module) for module in model.modules()):
        raise ValueError(f"{kind} has group offloading enabled: make it sparse first, then enable offloading")


def _group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


def _refuse_fused_projections(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "a sparse model's query, key and value projections are not fused: diffusers would put one dense "
        "layer in their place, without what sparsity, refits and quantisation made of them. Leave the call "
        "out (sparse layers that read one input compress it once), or call rtlynx.densify first"
    )


def _refuse_merge(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "adapters are not merged into this model: its weights are quantised, or the original weights are "
        "kept beside them for dense rows and steps and would miss the adapter. Leave out fuse_lora(): beside "
        "the layers the adapter is exact"
    )

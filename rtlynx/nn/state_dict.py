"""What a state dict says of a sparse layer beside its tensors, so that it is loaded into a like layer alone.

A refitted weight looks like any other. Which one it is travels in the metadata of the state dict, where
PyTorch keeps the versions of modules. `torch.save` keeps it; loaders that know tensors alone do not see it.
(An entry of its own, by `get_extra_state`, breaks safetensors and diffusers' loader.) A copy such as
`dict(state_dict)` and a file of an older version have none. Those are loaded as long as the tensors agree.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from rtlynx.math.fp8 import E4M3, is_two_of_four

if TYPE_CHECKING:
    from rtlynx.nn.sparse_linear import SparseLinear

_REFITTED = "rtlynx_refitted"
# Tensors that dense layers have not.
OWN = ("lowrank_a", "lowrank_b", "weight_scale", "weight_dense", "weight_dense_scale", "bias_dense")
# What state dicts and files of checkpoint versions 1 and 2 call tensors.
_FORMER = {"lowrank_down": "lowrank_a", "lowrank_up": "lowrank_b"}


def current_key(key: str) -> str:
    """The key of a tensor of a sparse layer as it is called now."""
    layer, dot, name = key.rpartition(".")
    return f"{layer}{dot}{_FORMER.get(name, name)}"


def rename_former(state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Give the tensors of the layer `prefix` the names that they have now."""
    for former, name in _FORMER.items():
        if f"{prefix}{former}" in state_dict:
            state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}{former}")


def mark(layer: SparseLinear, state_dict: Any, prefix: str) -> None:
    """Note in the metadata of `state_dict`, which is being made, what the weight of `layer` is."""
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        metadata.setdefault(prefix[:-1], {})[_REFITTED] = layer.refitted


def refusal(
    layer: SparseLinear, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> str | None:
    """Why the weight in `state_dict` is not one for `layer`, or None where it is or there is none."""
    weight = state_dict.get(f"{prefix}weight")
    if weight is None:
        return None
    # PyTorch would cast one into the other, values without their scale.
    if (weight.dtype is E4M3) is not layer.format.quantized:
        return (
            f"{prefix}weight is {weight.dtype}, and the layer is "
            f"{'quantised to' if layer.format.quantized else 'not quantised to'} {E4M3}: "
            "load a quantised weight with its scale into a layer that is quantised"
        )
    if layer.format.weight_sparse and not weight.is_meta and not is_two_of_four(weight):
        return (
            f"{prefix}weight has more than two nonzero entries among four neighbours, and the layer's is "
            "2:4-sparse: load it into a model that was made sparse the same way"
        )
    original = state_dict.get(f"{prefix}weight_dense")
    if original is not None and (original.dtype is E4M3) is (layer.weight_dense_scale is None):
        return (
            f"{prefix}weight_dense is {original.dtype}, and the layer keeps its original weight in "
            f"{layer.dense_precision}: load it into a model of the same dense_precision"
        )
    refitted = metadata.get(_REFITTED)
    if refitted is not None and refitted is not layer.refitted:
        return (
            f"{prefix}weight is {'' if refitted else 'not '}a refitted one, and the layer's is"
            f"{'' if layer.refitted else ' not'}: load it into a model that was made sparse the same way "
            "(rtlynx.save and rtlynx.load keep that with the weights)"
        )
    # Without `strict` PyTorch would take the weight and drop what belongs to it.
    kinds = (*OWN, "bias")
    lost = [kind for kind in kinds if f"{prefix}{kind}" in state_dict and getattr(layer, kind) is None]
    if lost:
        return (
            f"{prefix}weight comes with a {lost[0]}, and the layer has none: load it into a model that was "
            "made sparse the same way"
        )
    return None

"""What a change of basis inside a model does to the layers around it, and to adapters beside those."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtlynx.math.rotation import rotate_columns, rotate_rows
from rtlynx.models.architecture import Attention, Reparameterizable
from rtlynx.nn.tensor_parallel import TensorParallelLinear

# Attribute of a layer that `rtlynx.models.reparameterize` changed: its `LayerChange`s.
REPARAMETERIZED = "rtlynx_reparameterized"

# From a parameter and a basis to the parameter in that basis.
Turn = Callable[[Tensor, Tensor], Tensor]

# Which features of a weight (N, K) change: those that its layer makes, or those that it reads.
Side = Literal["rows", "columns"]


@dataclass(frozen=True)
class LayerChange:
    """A change of basis as one layer sees it.

    one : the tensor that has another basis.
    side : "rows" where the layer makes it, "columns" where the layer reads it.
    basis : as in `Reparameterization.bases`; None where it is not known.
    """

    one: Reparameterizable
    side: Side
    basis: Tensor | None


def turns(one: Reparameterizable, basis: Tensor) -> tuple[tuple[Turn, Tensor], tuple[Turn, Tensor]]:
    """What gives the layers that make `one` the new basis, and those that read it; each with its argument.

    Raises
    ------
    ValueError
        If a rotation has no inverse.
    """
    if not isinstance(one, Attention):
        return (_permute_rows, basis), (_permute_columns, basis)
    matrix = basis.double()
    inverse, failed = torch.linalg.inv_ex(matrix)
    if bool(failed.any()) or not bool(inverse.isfinite().all()):
        raise ValueError(f"the rotation of {one.name} has no inverse")
    sharing = one.heads // one.value_heads
    return (rotate_rows, matrix), (partial(rotate_columns, sharing=sharing), inverse)


def _permute_rows(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor[order]


def _permute_columns(weight: Tensor, order: Tensor) -> Tensor:
    """Its last columns."""
    first = weight.shape[1] - len(order)
    return torch.cat((weight[:, :first], weight[:, first:][:, order]), dim=1)


# -------------------------------------------------------------------------------------------- adapters

# Child of a wrapper of peft that holds the bases of the layer inside.
_BASIS = "rtlynx_basis"
# Kinds of adapters of peft that `follow_basis` knows: products of a factor A and a factor B, and others that
# make the whole of what they add to the weight.
_FACTORS, _WHOLE = "lora", ("loha", "lokr")


class LayerBasis(nn.Module):
    """Turns what adds to the weight of a layer as that weight was turned; at each call, since it may change.

    Adapters so keep the tensors that they were trained with, and are saved, exchanged and scaled as ever.
    The bases move with the model and stay out of its state dict. Casts of the model leave them alone: errors
    of a rotation grow with the condition of its matrix.
    """

    def __init__(self, changes: Sequence[LayerChange], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.turns: list[tuple[Side, Turn, str]] = []
        for number, change in enumerate(changes):
            assert change.basis is not None
            make, read = turns(change.one, change.basis)
            turn, basis = make if change.side == "rows" else read
            self.turns.append((change.side, turn, f"basis_{number}"))
            basis = basis.to(device, dtype if basis.is_floating_point() else torch.int64)
            self.register_buffer(f"basis_{number}", basis, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerBasis:
        for name, basis in self._buffers.items():
            assert basis is not None
            moved = fn(basis)
            self._buffers[name] = moved if moved.dtype is basis.dtype else basis.to(moved.device)
        return self

    def forward(self, tensor: Tensor, *sides: Side) -> Tensor:
        """`tensor` with its rows (N, ...), its columns (..., K), or both in the bases of the layer."""
        for side, turn, name in self.turns:
            if side in sides:
                basis: Tensor = getattr(self, name)
                # Double, which autocast and TF32 leave alone: factors are small.
                tensor = turn(tensor, basis.double() if basis.is_floating_point() else basis)
        return tensor


class _Factor(nn.Linear):
    """A factor of a LoRA beside a layer whose basis changed."""

    held: tuple[LayerBasis, Side]  # a tuple, since the basis is the wrapper's own child

    def turned_weight(self) -> Tensor:
        """Its weight in the basis of the layer."""
        basis, side = self.held
        turned: Tensor = basis(self.weight, side)
        return turned

    def forward(self, x: Tensor) -> Tensor:
        basis, _ = self.held
        bias: Tensor | None = self._parameters["bias"]
        if bias is not None:  # of B: it adds to what the layer makes
            bias = basis(bias, "rows")
        return nn.functional.linear(x, self.turned_weight(), bias)


class _Factors(nn.ModuleDict):
    """The factors A, or B, of all LoRAs beside a layer; whoever puts one in, it becomes a `_Factor`."""

    held: tuple[LayerBasis, Side]

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, _as(_Factor, module, held=self.held))


def _as(kind: type[nn.Module], module: nn.Module, **more: Any) -> Any:
    """A `kind` that holds what `module` does, and `more`."""
    new: Any = kind.__new__(kind)
    new.__dict__.update(
        {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    )
    new.__dict__.update(more)
    return new


def basis_reason(kind: str, layer: Any) -> str | None:
    """Why adapters of a kind of peft cannot be given the bases of `layer`; None where they can."""
    if kind not in (_FACTORS, *_WHOLE):
        return f"adapters of the kind {kind} are not known to follow that, as a plain LoRA does"
    if any(change.basis is None for change in getattr(layer, REPARAMETERIZED)):
        return (
            "it is not known how, since from_pretrained loaded the model. Load the base model and make it "
            "sparse with rtlynx.load, which knows"
        )
    if isinstance(layer, TensorParallelLinear) or hasattr(layer.weight, "placements"):
        return "the layer is spread over GPUs (tensor parallelism)"
    return None


def follow_basis(wrapper: Any, layer: Any) -> None:
    """Let the adapters of peft in `wrapper`, also later ones, act in the bases of `layer` inside."""
    while wrapper is not layer:  # (adapters of several kinds wrap one another)
        if _BASIS not in wrapper._modules:
            _follow(wrapper, layer)
        wrapper = wrapper._modules["base_layer"]


def _follow(wrapper: Any, layer: Any) -> None:
    dtype = torch.float64 if layer.weight.dtype is torch.float64 else torch.float32
    device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device  # (offloaded)
    basis = LayerBasis(getattr(layer, REPARAMETERIZED), device, dtype)
    wrapper.add_module(_BASIS, basis)
    if not hasattr(wrapper, "lora_A"):
        wrapper.get_delta_weight = partial(_turned_delta, wrapper)
        wrapper.supports_lora_conversion = _unsupported
        return
    sides: tuple[tuple[str, Side], ...] = ("lora_A", "columns"), ("lora_B", "rows")
    for name, side in sides:
        factors = _as(_Factors, getattr(wrapper, name), held=(basis, side))
        for adapter, factor in list(factors.items()):
            factors[adapter] = factor
        setattr(wrapper, name, factors)


def _turned_delta(wrapper: Any, adapter: str, **options: Any) -> Tensor:
    """What a LoHa or LoKr adds to the weight (N, K)."""
    delta = type(wrapper).get_delta_weight(wrapper, adapter, **options)
    return wrapper._modules[_BASIS](delta, "rows", "columns")


def _unsupported(_adapter: str = "default") -> bool:
    """A LoRA made of turned deltas would be turned once more, and be wrong beside the dense model."""
    return False


def unfollow_basis(wrapper: Any) -> None:
    """Undo `follow_basis`."""
    while wrapper is not None:
        if wrapper._modules.pop(_BASIS, None) is not None:
            _unfollow(wrapper)
        wrapper = wrapper._modules.get("base_layer")


def _unfollow(wrapper: Any) -> None:
    for name in ("get_delta_weight", "supports_lora_conversion"):
        wrapper.__dict__.pop(name, None)
    for name in ("lora_A", "lora_B"):
        if hasattr(wrapper, name):
            plain = {adapter: _as(nn.Linear, factor) for adapter, factor in getattr(wrapper, name).items()}
            for one in plain.values():
                del one.__dict__["held"]
            setattr(wrapper, name, nn.ModuleDict(plain))

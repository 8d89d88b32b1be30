"""A linear layer that holds a 2:4-sparse weight packed, and shows it to everybody else as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.math.formats import Format
from rtlynx.math.fp8 import E4M3
from rtlynx.math.tiles import pack_weight, unpack_weight
from rtlynx.nn.cached_tensor import CachedTensor
from rtlynx.nn.settings import Settled
from rtlynx.ops.dispatch import weight_sparse_supports

_AS_HELD: ContextVar[bool] = ContextVar("_AS_HELD", default=False)


def held_state_dict(model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` with tiles in place of packed weights, which takes no memory."""
    before = _AS_HELD.set(True)
    try:
        return model.state_dict()
    finally:
        _AS_HELD.reset(before)


class PackableLinear(Settled):
    """A linear layer whose parameter `weight` may hold the tiles of a 2:4-sparse weight in its place.

    Tiles take 0.625 bytes an entry (`rtlynx.math.tiles.pack_weight`) and lie in the parameter as a vector of
    float8_e4m3fn, so that whatever moves or counts parameters does so with them. Hooks of offloading may put
    another tensor into the parameter at any time: its shape alone says what it holds.

    Calls of the layer never change what it holds: they may run beside each other or under such hooks. Where a
    hook brought the weight itself, they multiply by a packed copy.
    """

    format: Format
    _packed_weight: CachedTensor

    @property
    def weight(self) -> Tensor:
        """The weight (N, K); a copy, made at each reading, where it is held packed."""
        held = self._parameters.get("weight")
        if held is not None:
            return nn.Parameter(self._dense(), requires_grad=False) if self.holds_tiles else held
        computed: Tensor | None = self.__dict__.get("weight")  # (by weight_norm: no parameter)
        if computed is None:
            raise AttributeError(f"{type(self).__name__} has no attribute 'weight'")
        return computed

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        self.__dict__["weight"] = weight  # (parameters do not come here: `nn.Module` registers them)

    @weight.deleter
    def weight(self) -> None:
        self.__dict__.pop("weight")

    @property
    def held_weight(self) -> Tensor:
        """The parameter as it lies in memory: the weight (N, K), or its tiles."""
        held = self._parameters.get("weight")
        return self.weight if held is None else held

    @property
    def holds_tiles(self) -> bool:
        """Whether the parameter holds tiles in place of the weight."""
        return self.held_weight.ndim == 1 and self.format.weight_sparse

    @property
    def tiles(self) -> Tensor:
        """What the parameter holds where it `holds_tiles`, as kernels take it."""
        return self.held_weight.detach().view(torch.uint8)

    def _dense(self) -> Tensor:
        return unpack_weight(self.tiles, self.out_features, self.in_features)

    @property
    def packs(self) -> bool:
        """Whether a kernel reads the weight packed, where it lies now."""
        return self.format.weight_sparse and weight_sparse_supports(self.held_weight, self.in_features)

    def multiplied_weight(self) -> tuple[Tensor | None, Tensor | None]:
        """What fp8 products read: the weight, or its tiles where a kernel takes those."""
        held = self.held_weight
        if not self.packs:
            return self._dense() if self.holds_tiles else held, None  # (hooks take tiles to any device)
        if self.holds_tiles:
            return None, self.tiles
        if torch.compiler.is_compiling() and self._packed_weight.kept is None:
            return held, None  # packing looks at values, which compiled code cannot
        return None, self._packed_weight.get((held,), "2:4", partial(pack_weight, held))

    def pack(self) -> None:
        """Hold the weight packed from now on, where a kernel reads it so; the parameter stays the same."""
        parameter = self._parameters.get("weight") is not None
        if parameter and self.packs and not self.holds_tiles:
            self._packed_weight.drop()
            with torch.inference_mode(False), torch.no_grad():
                tiles = pack_weight(self.held_weight).view(E4M3)
            if tiles.is_cuda:
                torch.cuda.current_stream(tiles.device).synchronize()  # other streams may read it next
            self._hold(tiles)

    def unpack(self) -> None:
        """Undo `pack`."""
        if self.holds_tiles:
            with torch.inference_mode(False), torch.no_grad():
                weight = self._dense()
            self._hold(weight)

    def unpack_to_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Undo `pack` where `fn` takes tensors to another device, on which a kernel may read no tiles."""
        held = self.held_weight
        if self.holds_tiles and not (self.packs and fn(held.new_empty(0)).device == held.device):
            self.unpack()

    def _hold(self, tensor: Tensor) -> None:
        held = self.held_weight
        if held.is_inference():  # it has no version, and would have none later
            with torch.inference_mode(False):
                self._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
        else:
            held.data = tensor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.holds_tiles and not _AS_HELD.get():
            weight = self.weight
            destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        held = self.held_weight
        tiles = held.detach() if self.holds_tiles else None
        self.unpack()
        super()._load_from_state_dict(*args)
        if tiles is not None and self.held_weight is held:  # (else the state dict's tensor was assigned)
            if not held.is_meta:
                with torch.no_grad():
                    tiles.copy_(pack_weight(held).view(E4M3))
            held.data = tiles  # graphs and hooks know these

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.holds_tiles and not self.packs:  # pickled on a card, and read where there is none
            self.unpack()

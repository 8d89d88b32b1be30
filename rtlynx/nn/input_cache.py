"""What layers that read one input share: its compressed form, and one low-rank factor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.math.tiles import LOWRANK_COLUMNS
from rtlynx.nn.cached_tensor import CachedTensor

_T = TypeVar("_T")


class SharedInput:
    """Remembers the compressed form of the last input, for layers that read the same tensor (q, k, v).

    Safe by construction: an entry is used only for the very same tensor object at the same version, in the
    same stream or the same capture of a CUDA graph, and dies with the tensor. Nothing is remembered where
    versions are not tracked (inference mode), or where the input needs a gradient. torch.compile knows no
    versions: there, what was seen to read one unchanged tensor is remembered until `forget_traced`.

    Parameters
    ----------
    single : bool
        Whether one layer alone is known to read its input, so that there is nothing to remember.
    traced : bool
        Whether compiled code may remember: a call showed that these layers read one tensor at one version,
        and `forget_traced` is called after the last of them.
    """

    def __init__(self, *, single: bool = False, traced: bool = False) -> None:
        self.single, self.traced = single, traced
        self._in_graph: tuple[Tensor, object, Tensor | None, Any] | None = None
        self._entry: tuple[weakref.ref[Tensor], Tensor | None, object, Any] | None = None
        self._compared: dict[tuple[int, int], tuple[weakref.ref[Tensor], weakref.ref[Tensor], object, bool]]
        self._compared = {}
        self._one_factor = False
        self._joined = CachedTensor()

    def compress(
        self, x: Tensor, key: object, compute: Callable[[], _T], lowrank_a: Tensor | None = None
    ) -> _T:
        """`compute()` for `x`, or what it gave when last called for this `x`, `key` and low-rank factor."""
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if self.single or differentiable:
            return compute()
        if torch.compiler.is_compiling():
            return self._compress_in_graph(x, key, compute, lowrank_a) if self.traced else compute()
        if x.is_inference():
            return compute()
        if lowrank_a is not None and lowrank_a.is_inference():
            return compute()
        place = _place(x) if x.is_cuda else None
        entry = self._entry
        if entry is not None and entry[0]() is x:
            remembered = entry[1]
            state = (x._version, None if remembered is None else remembered._version, place, key)
            if entry[2] == state and self._same(remembered, lowrank_a):
                return entry[3]
        result = compute()
        state = (x._version, None if lowrank_a is None else lowrank_a._version, place, key)
        self._entry = (weakref.ref(x, self._forget), lowrank_a, state, result)
        return result

    def _compress_in_graph(
        self, x: Tensor, key: object, compute: Callable[[], _T], lowrank_a: Tensor | None
    ) -> _T:
        """As `compress`, while torch.compile traces: tensors are then variables of the graph."""
        entry = self._in_graph
        if entry is not None and entry[0] is x and entry[1] == key and entry[2] is lowrank_a:
            return entry[3]
        result = compute()
        self._in_graph = (x, key, lowrank_a, result)
        return result

    def forget_traced(self, _block: Any, _args: Any, _output: Any) -> None:
        """A forward hook of the block whose layers share: no graph hands its variables to the next call."""
        self._in_graph = None

    def factor(self, lowrank_as: Sequence[Tensor | None]) -> tuple[Tensor | None, list[int]]:
        """A^T of layers that read one input, as one tensor, and the first of its rows that are each one's.

        Factors that are equal are one. Under torch.compile they are if they were when last asked for.
        """
        first = lowrank_as[0]
        if first is None:
            return None, [0] * len(lowrank_as)
        if not torch.compiler.is_compiling():
            self._one_factor = all(self._same(first, other) for other in lowrank_as[1:])
        if self._one_factor or len(lowrank_as) == 1:
            return first, [0] * len(lowrank_as)
        given = [lowrank_a for lowrank_a in lowrank_as if lowrank_a is not None]
        starts = accumulate(
            (-(-len(lowrank_a) // LOWRANK_COLUMNS) * LOWRANK_COLUMNS for lowrank_a in given[:-1]), initial=0
        )
        return self._joined.get(tuple(given), None, partial(_beside, given)), list(starts)

    def forget_factors(self) -> None:
        """A factor was replaced."""
        self._one_factor = False
        self._joined.drop()

    def _same(self, one: Tensor | None, other: Tensor | None) -> bool:
        """Whether two factors are one or equal (by default they are); compared once for their versions."""
        if one is other:
            return True
        if one is None or other is None:
            return False
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        if one.is_inference() or other.is_inference():
            return False  # without versions nothing can be remembered, and each may have its own
        versions = (one._version, other._version)
        known = self._compared.get((id(one), id(other)))
        if known is None or known[0]() is not one or known[1]() is not other or known[2] != versions:
            if one.is_cuda and torch.cuda.is_current_stream_capturing():
                return False  # comparing waits for the card
            known = (weakref.ref(one), weakref.ref(other), versions, torch.equal(one, other))
            self._compared[id(one), id(other)] = known
        return known[3]

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._entry is not None and self._entry[0] is dead:
            self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        # A copy of the model shares nothing with the tensors seen by the original.
        return SharedInput(single=self.single, traced=self.traced)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_one_factor": self._one_factor, "_joined": CachedTensor()}
        settings = {"single": self.single, "traced": self.traced, "_in_graph": None}
        return {**settings, "_entry": None, "_compared": {}, **kept}


def _beside(lowrank_as: Sequence[Tensor]) -> Tensor:
    """A^T of several layers, each from a multiple of LOWRANK_COLUMNS on."""
    *others, last = lowrank_as
    return torch.cat(
        [*(pad(lowrank_a, (0, 0, 0, -len(lowrank_a) % LOWRANK_COLUMNS)) for lowrank_a in others), last]
    )


def _place(x: Tensor) -> object:
    """Where work on `x` goes: its stream, or the capture under way there.

    What one capture computed is nothing to another, or to a run outside: the tensor that a graph reads keeps
    its version, but only replays of that graph fill what was made of it.
    """
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    if not torch.cuda.is_current_stream_capturing():
        return stream
    try:
        from cuda.bindings import driver
    except ImportError:
        return object()  # equal to nothing
    return stream, int(driver.cuStreamGetCaptureInfo(stream)[2])

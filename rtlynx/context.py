"""What the sparse layers of one model share while it runs: the sampling step, text rows, selections."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtlynx.kernels.ops import Compressed


class SparseContext:
    """State of one forward pass, written by the model's hook and read by its layers.

    Attributes
    ----------
    dense_step : bool
        Run every sparse layer densely, with its original weight, in this forward pass.
    text_rows : tuple[int, int | None] | None
        Half-open range of text tokens on the token axis (-2) of joint blocks, or None where unknown.
    """

    def __init__(self) -> None:
        self.dense_step = False
        self.text_rows: tuple[int, int | None] | None = None


class SharedInput:
    """Remembers the compressed form of the last input, for layers that read the same tensor (q, k, v).

    Safe by construction: an entry is used only for the very same tensor object at the same version, and dies
    with the tensor. Nothing is remembered where versions are not tracked (inference mode), where the input
    needs a gradient, or under torch.compile (which merges equal work itself).
    """

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], int, object, Compressed] | None = None

    def compress(self, x: Tensor, key: object, compute: Callable[[], Compressed]) -> Compressed:
        """`compute()` for `x`, or what it gave when last called for this `x` and `key`."""
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if torch.compiler.is_compiling() or differentiable or x.is_inference():
            return compute()
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1] == x._version and entry[2] == key:
            return entry[3]
        result = compute()
        self._entry = (weakref.ref(x, self._forget), x._version, key, result)
        return result

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._entry is not None and self._entry[0] is dead:
            self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return SharedInput()  # a copy of the model shares nothing with the tensors seen by the original

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}


class StepTracker:
    """Tells sampling steps apart by the model's own `timestep` argument.

    A new value is a new step, the same value another guidance pass of the same step, a value against the
    schedule's direction the first step of a new picture (also after an aborted run).

    Parameters
    ----------
    descending : bool
        True where the timestep falls while sampling (FLUX, Qwen-Image), False where it rises (Z-Image).
    """

    def __init__(self, descending: bool = True) -> None:
        self.descending = descending
        self.step = -1
        self._last: float | None = None

    def update(self, timestep: Tensor | float) -> int:
        """Index (from 0) of the step that a forward pass at `timestep` belongs to.

        A batch at different timesteps (training) is no sampling step: returns -1 and changes nothing.
        """
        if isinstance(timestep, Tensor):
            flat = timestep.detach().flatten()
            if flat.numel() == 0 or bool((flat != flat[0]).any()):
                return -1
            value = float(flat[0])
        else:
            value = float(timestep)
        if self._last is None:
            self.step = 0
        elif value != self._last:
            forward = value < self._last if self.descending else value > self._last
            self.step = self.step + 1 if forward else 0
        self._last = value
        return self.step

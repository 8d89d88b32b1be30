"""Which of torch.compile's guards are left out: those of code, and of settings that one string stands for."""

from __future__ import annotations

from collections.abc import Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from rtlynx.nn.settings import SETTINGS
from rtlynx.nn.sparse_linear import SparseLinear

# Values of globals that change by nothing but a replacement of code in a running program.
_CODE = (FunctionType, BuiltinFunctionType, ModuleType, CodeType, type, torch._ops.OpOverload, torch.dtype)
_CONSTANTS = (int, float, str)
_OURS = "G['__import_rtlynx_dot_"


def needed(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's `guards` (GuardFilterEntry) of one graph have to be checked before each call.

    A `guard_filter_fn` of torch.compile. Left out are guards

    - of global functions, classes, modules and dtypes, and of this package's constants;
    - of what `SparseLinear.settings` tells, of layers whose `settings` are guarded, and of their methods.

    Guards are known by the names of what they are of. Of names in a form that is not known, all are kept.
    """
    of_settings = {one.name for one in guards if one.name.endswith(".settings")}
    layers = {one.name for one in guards if type(one.value) is SparseLinear}
    told = sorted(layer for layer in layers if f"{layer}.settings" in of_settings)
    settings = tuple(f"{layer}.{name}" for layer in told for name in SETTINGS)
    types = tuple(f"type({layer})" for layer in told)
    return [
        not (
            _of_code(one)
            or (one.name in told and _of_method(one))
            or any(name in one.name for name in settings)
            or any(name in one.name for name in types)
        )
        for one in guards
    ]


def _of_code(guard: Any) -> bool:
    """Whether this is of a global that is as good as code."""
    if not guard.is_global:
        return False
    value = guard.value
    constant = isinstance(value, _CONSTANTS) and not isinstance(value, bool)
    return isinstance(value, _CODE) or (constant and guard.name.startswith(_OURS))


def _of_method(guard: Any) -> bool:
    """Whether this is of a method that no attribute of a layer hides; offloading replaces `forward` alone."""
    name = getattr(guard.orig_guard.create_fn, "keywords", {}).get("attr")
    return name is not None and name != "forward"

"""A way around Dynamo's limit, to be removed: https://github.com/pytorch/pytorch/issues/171593.

Dynamo compiles one code object at most `torch._dynamo.config.recompile_limit` (8) times, and a budget makes
more kinds of blocks than that. Once it counts modules that are compiled in place one by one, in the oldest
PyTorch that pyproject.toml takes, `FusedForward` holds its function itself and needs no `formats`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any


@functools.cache
def with_own_code(function: Callable[..., Any], _key: str) -> Callable[..., Any]:
    """A copy of a plain `function` without defaults, with a code object of its own for each key."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__)

"""What was found out about arguments of one form, kept: to ask again costs a call more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_MOST = 4096  # forms that are kept of one function
_NEW = object()


def form_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Equal for arguments that differ in the contents and places of tensors alone."""
    return tuple(
        [
            (one.dtype, one.shape, one.stride(), one.device)
            if isinstance(one, Tensor)
            else form_of(one)
            if isinstance(one, list)
            else one
            for one in arguments
        ]
    )


def placed_form_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Equal for tensors that differ in their contents alone; those at one place are on one device."""
    return tuple(
        [None if one is None else (one.data_ptr(), one.dtype, one.shape, one.stride()) for one in tensors]
    )


def by_form(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, whose result depends on the form of its arguments alone, asked once for each.

    Where gradients are recorded it is asked each time: a form does not tell what wants one. What it raises
    is not kept. Not for fake tensors, whose sizes are no numbers.
    """
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def remembered(*arguments: Any) -> _T:
        if torch.is_grad_enabled():
            return function(*arguments)
        form = form_of(arguments)
        found = known.get(form, _NEW)
        if found is _NEW:
            found = function(*arguments)
            keep(known, form, found)
        return found

    return remembered


def keep(known: dict[tuple[Any, ...], _T], form: tuple[Any, ...], value: _T) -> None:
    """Remember `value`; a process that sees new forms without end begins anew."""
    if len(known) >= _MOST:
        known.clear()
    known[form] = value

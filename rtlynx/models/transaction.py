"""Changes of a model that happen whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def all_or_none(*models: nn.Module) -> Iterator[None]:
    """Give every module of `models` back what it held before if the body fails, whatever ends it.

    Attributes, submodules, parameters, buffers and hooks are restored, also after Ctrl-C and where memory ran
    out. The entries of tensors are not: nothing here changes those in place. Inference mode is off inside,
    since tensors made under it could not be tracked or saved later.
    """
    before = [(module, _shallow(module)) for model in models for module in model.modules()]
    try:
        with torch.inference_mode(False):
            yield
    except BaseException:
        for module, attributes in before:
            _restore(module, attributes)
        raise


def _shallow(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of its content where it is a dict (registries of submodules, hooks ...)."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else None)
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    held = vars(module)
    for name in held.keys() - attributes.keys():
        del held[name]
    for name, (value, content) in attributes.items():
        held[name] = value
        if content is not None and not _same(value, content):
            value.clear()  # in place, since the handles of hooks know this very dict
            value.update(content)


def _same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two dicts hold the very same objects in the same order."""
    pairs = zip(one.items(), other.items(), strict=False)
    return len(one) == len(other) and all(a[0] == b[0] and a[1] is b[1] for a, b in pairs)

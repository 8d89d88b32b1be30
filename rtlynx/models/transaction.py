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

    Attributes, submodules, parameters, buffers, hooks, and attributes of attention processors are restored,
    also after Ctrl-C and where memory ran out. The entries of tensors are not: nothing here changes those in
    place. Inference mode is off inside, since tensors made under it could not be tracked or saved later.
    """
    before = [(part, _shallow(part)) for model in models for part in _parts(model)]
    try:
        with torch.inference_mode(False):
            yield
    except BaseException:
        for part, attributes in before:
            _restore(part, attributes)
        raise


def _parts(model: nn.Module) -> Iterator[Any]:
    """Modules, and attention processors, which are none, and hold what fp8 attention follows."""
    for module in model.modules():
        yield module
        processor = vars(module).get("processor")
        if hasattr(processor, "__dict__"):
            yield processor


def _shallow(part: Any) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of its content where it is a dict (registries of submodules, hooks ...)."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(part).items()
    }


def _restore(part: Any, attributes: dict[str, tuple[Any, Any]]) -> None:
    held = vars(part)
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

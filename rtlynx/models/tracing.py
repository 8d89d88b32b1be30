"""Which layers of a model read one tensor, as one call of it tells."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.models.architecture import Candidate


def shared_reads(
    model: nn.Module, candidates: Iterable[Candidate], call: Mapping[str, Any]
) -> dict[str, str]:
    """Layer -> first layer of its block that reads the same: each time it is called the same tensor object.

    Layers that are not called are left out. A tensor that was changed in place in between is another.

    Parameters
    ----------
    model : dense, and not compiled
    call : arguments of one call of `model`, by name
    """
    count = itertools.count()
    numbers: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # id -> tensor, version, number
    read: dict[str, list[int]] = {}

    def note(name: str, x: Tensor) -> None:
        known, version = numbers.get(id(x)), 0 if x.is_inference() else x._version
        if known is None or known[0]() is not x or known[1] != version:
            known = numbers[id(x)] = (weakref.ref(x), version, next(count))
        read.setdefault(name, []).append(known[2])

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(name, args[0] if args else kwargs["input"])

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    blocks = {candidate.name: (candidate.block, candidate.stream) for candidate in candidates}
    handles = [watch(name) for name in blocks]
    try:
        with torch.inference_mode(False), torch.no_grad():
            model(**call)
    finally:
        for handle in handles:
            handle.remove()
    first: dict[object, str] = {}
    return {name: first.setdefault((blocks[name], tuple(seen)), name) for name, seen in read.items()}

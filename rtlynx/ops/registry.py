"""How the torch operators of this package are registered: on a Hopper card, elsewhere, and for shapes alone.

`Library.define` and `impl` directly: a `custom_op` costs three times the host time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtlynx.ops.dispatch import card_unsupported_reason, wants_gradient

_LIBRARY = torch.library.Library("rtlynx", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def operator(
    schema: str, *, hopper: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Register an operator of namespace rtlynx, whose first argument is a tensor, and return it.

    hopper : on a Hopper card, with its device current
    reference : everywhere else
    fake : shapes alone
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, _on_cuda(hopper, reference), "CUDA")
    torch.library.register_fake(f"rtlynx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.rtlynx, name).default


def _on_cuda(hopper: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Tensor, *rest: Any) -> Any:
        index = first.get_device()
        if index < 0 or card_unsupported_reason(index) is not None:  # (-1: another argument is on the card)
            return reference(first, *rest)
        if index == torch._C._cuda_getDevice():  # (a tensor is on a card, so CUDA is ready)
            return hopper(first, *rest)
        with torch.cuda.device(index):
            return hopper(first, *rest)

    return run


def refuse_gradients(*tensors: Tensor | None) -> None:
    """RuntimeError where a gradient would be lost."""
    if wants_gradient(*tensors):
        raise RuntimeError(
            "rtlynx operators have no gradient: call them under torch.no_grad(), or let SparseLinear choose"
        )

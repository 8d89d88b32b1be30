"""All settings of a sparse layer in one string, by which compiled code knows them."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# Attributes of a layer that say what it computes, beside its tensors.
SETTINGS = (
    "pattern", "norm", "format", "refitted", "intercept", "dense_reason", "dense_precision",
    "text_rows_dense", "dense_steps", "in_features", "out_features",
)  # fmt: skip


class Settled(nn.Linear):
    """A linear layer whose `settings` follow the attributes of `SETTINGS`.

    torch.compile guards each attribute that it reads, before every call of a block. One string stands for
    them all: `rtlynx.models.compilation` leaves the other guards out where code is guarded by the string.
    """

    settings: str

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SETTINGS:
            self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()  # layers that were pickled before had no `settings`

    def _settle(self) -> None:
        values = [(name, self.__dict__.get(name)) for name in SETTINGS]
        self.__dict__["settings"] = sys.intern(repr(values))  # equal strings are one: compared at once

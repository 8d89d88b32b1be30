"""Tells diffusers of rtlynx once diffusers is there, without importing it.

diffusers' registry of quantizers imports transformers and torchao, which takes seconds and may fail. So
`import rtlynx` leaves it alone: when somebody else has imported it, `rtlynx.io.quantizer` is imported too.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "diffusers.quantizers.auto"


def register_with_diffusers() -> None:
    """Register now where diffusers' registry is imported, else as soon as it will be."""
    if sys.modules.get(REGISTRY) is not None:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    """Import `rtlynx.io.quantizer`, which registers itself. diffusers works on where that fails."""
    try:
        importlib.import_module("rtlynx.io.quantizer")
    except Exception as error:
        warnings.warn(
            f"diffusers cannot load sparse models: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class _Watch:
    """A finder that finds what the others do, and has the registry's loader call `_register` afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Change this one loader rather than wrap it, so that whoever asks for a module's source finds it."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module

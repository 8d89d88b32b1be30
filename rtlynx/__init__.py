"""rtlynx: faster diffusion transformers on Hopper GPUs, by fp8 and 2:4 sparsity.

Importing this package costs next to nothing: PyTorch and the rest are imported with the first name that is
used. It makes diffusers know sparse models, whichever of the two is imported first.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rtlynx._version import __version__ as __version__
from rtlynx.io.registration import register_with_diffusers

if TYPE_CHECKING:
    from rtlynx.calibration import (
        CalibrationError,
        CalibrationOptions,
        CalibrationReport,
        Distillation,
        calibrate,
    )
    from rtlynx.io.checkpoint import load, save
    from rtlynx.io.quantizer import RTLynxConfig
    from rtlynx.math.selection import Pattern, nm_mask, norm_scale, pack, unpack
    from rtlynx.models.attention import fp8_attention
    from rtlynx.models.compilation import compile
    from rtlynx.models.sparsify import densify, set_dense_steps, sparsify
    from rtlynx.nn.call import schedule
    from rtlynx.nn.sparse_linear import SparseLinear
    from rtlynx.recipe import Budget, Recipe
    from rtlynx.storage.files import CheckpointError

__all__ = [
    "Budget",
    "CalibrationError",
    "CalibrationOptions",
    "CalibrationReport",
    "CheckpointError",
    "Distillation",
    "Pattern",
    "RTLynxConfig",
    "Recipe",
    "SparseLinear",
    "calibrate",
    "compile",
    "densify",
    "fp8_attention",
    "load",
    "nm_mask",
    "norm_scale",
    "pack",
    "save",
    "schedule",
    "set_dense_steps",
    "sparsify",
    "unpack",
]

# Module -> the public names that it defines.
_MODULES = {
    "calibration": (
        "CalibrationError",
        "CalibrationOptions",
        "CalibrationReport",
        "Distillation",
        "calibrate",
    ),
    "io.checkpoint": ("load", "save"),
    "io.quantizer": ("RTLynxConfig",),
    "math.selection": ("Pattern", "nm_mask", "norm_scale", "pack", "unpack"),
    "models.attention": ("fp8_attention",),
    "models.compilation": ("compile",),
    "models.sparsify": ("densify", "set_dense_steps", "sparsify"),
    "nn.call": ("schedule",),
    "nn.sparse_linear": ("SparseLinear",),
    "recipe": ("Budget", "Recipe"),
    "storage.files": ("CheckpointError",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name or a submodule, imported when it is first asked for."""
    if name in _HOMES:
        value = getattr(_import(_HOMES[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return _import(name)
        except ModuleNotFoundError as error:
            if error.name != f"rtlynx.{name}":
                raise
    raise AttributeError(f"module 'rtlynx' has no attribute {name!r}")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"rtlynx.{module}")
    except AttributeError as error:  # of a broken library, which Python would take for "no such name here"
        raise ImportError(f"rtlynx.{module} cannot be imported: {error}", name=f"rtlynx.{module}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_diffusers()

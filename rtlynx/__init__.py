"""rtlynx: 2:4 activation sparsity for diffusion transformers."""

__version__ = "0.1.0"

from rtlynx.calibration import CalibrationError, CalibrationOptions, CalibrationReport, calibrate
from rtlynx.call import schedule
from rtlynx.checkpoint import load, save
from rtlynx.files import CheckpointError
from rtlynx.linear import SparseLinear
from rtlynx.models import densify, sparsify
from rtlynx.pattern import Pattern, nm_mask, norm_scale, pack, unpack
from rtlynx.quantizer import RTLynxConfig
from rtlynx.recipe import Budget, Recipe

__all__ = [
    "Budget",
    "CalibrationError",
    "CalibrationOptions",
    "CalibrationReport",
    "CheckpointError",
    "Pattern",
    "RTLynxConfig",
    "Recipe",
    "SparseLinear",
    "calibrate",
    "densify",
    "load",
    "nm_mask",
    "norm_scale",
    "pack",
    "save",
    "schedule",
    "sparsify",
    "unpack",
]

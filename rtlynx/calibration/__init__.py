"""Calibration: second moments of a model's own activations, and what follows from them in closed form."""

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.options import CalibrationOptions, CalibrationReport, Distillation
from rtlynx.calibration.run import calibrate

__all__ = ["CalibrationError", "CalibrationOptions", "CalibrationReport", "Distillation", "calibrate"]

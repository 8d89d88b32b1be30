"""What sparsity does to a model: layer errors, picture metrics, and the demo."""

from rtlynx.evaluate.evaluation import EvaluationSettings, evaluate_model
from rtlynx.evaluate.layers import energy_kept, layer_errors
from rtlynx.evaluate.metrics import KernelDistance, kid, psnr, ssim
from rtlynx.evaluate.sampling import compare, sample_pictures

__all__ = [
    "EvaluationSettings",
    "KernelDistance",
    "compare",
    "energy_kept",
    "evaluate_model",
    "kid",
    "layer_errors",
    "psnr",
    "sample_pictures",
    "ssim",
]

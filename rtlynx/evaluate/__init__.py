"""What sparsity does to a model: layer errors, picture metrics, and the demo."""

from rtlynx.evaluate.layers import energy_kept, layer_errors
from rtlynx.evaluate.metrics import KernelDistance, kid, psnr, ssim
from rtlynx.evaluate.sampling import compare, sample_pictures

__all__ = [
    "KernelDistance",
    "compare",
    "energy_kept",
    "kid",
    "layer_errors",
    "psnr",
    "sample_pictures",
    "ssim",
]

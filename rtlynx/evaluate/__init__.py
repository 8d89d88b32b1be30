"""What sparsity does to a model: layer errors, picture metrics, plots of layers, and the demo."""

from rtlynx.evaluate.dense_steps_plot import plot_dense_steps
from rtlynx.evaluate.layer_plots import plot_layers, save_plot
from rtlynx.evaluate.layers import energy_kept, layer_errors
from rtlynx.evaluate.metrics import KernelDistance, kid, psnr, ssim
from rtlynx.evaluate.sampling import compare, sample_pictures

__all__ = [
    "KernelDistance",
    "compare",
    "energy_kept",
    "kid",
    "layer_errors",
    "plot_dense_steps",
    "plot_layers",
    "psnr",
    "sample_pictures",
    "save_plot",
    "ssim",
]

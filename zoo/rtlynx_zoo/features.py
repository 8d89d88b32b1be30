"""A small network that tells emoji apart: features for kernel distances (KID) and for retrieval.

Trained by us (training.features) so that Twemoji's and Noto's drawings of the same emoji, shifted,
recoloured, blurred, bent or noisy, land close together. It is neither Inception nor CLIP: its numbers compare
with each other, not with published ones.
"""

from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rtlynx_zoo.prompts import ASSETS, all_prompts

FEATURES = 128


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; the first may halve the picture."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(self.norm2(self.conv2(h)) + self.shortcut(x))


class FeatureNet(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> (B, 128) of unit length. Its last map is 4x4: layout counts."""

    def __init__(self, widths: tuple[int, ...] = (48, 96, 160, 256)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)  # 32x32
        blocks, before = [], widths[0]
        for i, width in enumerate(widths):
            blocks += [
                ResidualBlock(before, width, stride=1 if i == 0 else 2),
                ResidualBlock(width, width, stride=1),
            ]
            before = width
        self.blocks = nn.Sequential(*blocks)  # 4x4
        self.reduce = nn.Conv2d(before, 32, 1)
        self.head = nn.Linear(32 * 16 + before, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(x * 2 - 1))  # (B, 256, 4, 4)
        pooled = h.mean(dim=(2, 3))
        return F.normalize(self.head(torch.cat([self.reduce(h).flatten(1), pooled], dim=1)), dim=1)


def load_feature_network(device: str | torch.device = "cpu") -> FeatureNet:
    """The trained network, float32, eval mode, gradients off: (B, 3, 64, 64) in [0, 1] -> (B, 128)."""
    network = FeatureNet()
    weights = load_file(ASSETS / "feature-network.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return network.eval().requires_grad_(False).to(device)


@cache
def _real() -> Tensor:
    return F.normalize(load_file(ASSETS / "features.safetensors")["features"].float(), dim=1)


def real_features() -> tuple[list[str], Tensor]:
    """(names, features (n, 128) float32 of unit length) of all real Twemoji pictures, in one order."""
    return all_prompts(), _real().clone()


def retrieve(features: Tensor) -> list[str]:
    """Features (B, 128) of unit length -> for each, the name of the nearest real picture (cosine)."""
    names = all_prompts()
    return [names[i] for i in (features.cpu().float() @ _real().T).argmax(dim=1).tolist()]

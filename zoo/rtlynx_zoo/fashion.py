"""A small classifier of Fashion-MNIST: features for Fréchet distances, precision and recall of flux-fashion.

Trained by us (training.fashion_classifier) on the 60,000 training pictures. It is not Inception: its figures
compare with each other, not with published ones.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import rtlynx_zoo
from rtlynx_zoo.features import ResidualBlock
from rtlynx_zoo.prompts import FASHION_CLASSES

FEATURES = 64
CLASSIFIER, TEST_FEATURES = "classifier.safetensors", "test-features.safetensors"


class FashionClassifier(nn.Module):
    """(B, 1 or 3, 32, 32) in [0, 1] -> features (B, 64), from which `classify` makes logits (B, 10)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1)  # 16x16
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, width, stride=1 if width == widths[0] else 2)
                for before, width in zip((widths[0], *widths), widths, strict=False)
            )
        )  # 4x4
        self.reduce = nn.Conv2d(widths[-1], 16, 1)
        self.head = nn.Linear(16 * 16 + widths[-1], FEATURES)
        self.classes = nn.Linear(FEATURES, len(FASHION_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(x.mean(1, keepdim=True) * 2 - 1))
        return self.head(torch.cat([self.reduce(h).flatten(1), h.mean(dim=(2, 3))], dim=1))

    def classify(self, features: Tensor) -> Tensor:
        return self.classes(F.gelu(features))


def load_classifier(device: str | torch.device = "cpu") -> FashionClassifier:
    """The trained network, float32, eval mode, gradients off.

    Raises FileNotFoundError where its weights are not here.
    """
    network = FashionClassifier()
    network.load_state_dict({name: weight.float() for name, weight in load_file(_file(CLASSIFIER)).items()})
    return network.eval().requires_grad_(False).to(device)


def real_features() -> Tensor:
    """Features (10000, 64), float32, of the real pictures of the test set, in its order.

    Raises FileNotFoundError where they are not here.
    """
    return load_file(_file(TEST_FEATURES))["features"].float()


def _file(name: str) -> Path:
    path = rtlynx_zoo.folder("flux-fashion") / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} of zoo:flux-fashion is not here: it is in studies/models/flux-fashion of the rtlynx "
            "repository, not in the wheel; install from a checkout (pip install -e ./zoo). "
            f"Looked in {path.parent}"
        )
    return path

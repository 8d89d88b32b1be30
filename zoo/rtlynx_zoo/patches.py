"""A picture as a sequence of tokens: patches of 4x4 pixels, in every model of the zoo."""

import math

import torch.nn.functional as F
from torch import Tensor

SIZE = 64  # of the emoji models' pictures
PATCH = 4
GRID = SIZE // PATCH  # 16 patches a side: 256 image tokens of 4 * 4 * 3 = 48 channels


def patchify(pictures: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, (S / 4)^2, 16 C): patches row by row; (B, 3, 64, 64) -> (B, 256, 48)."""
    return F.pixel_unshuffle(pictures, PATCH).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    side = grid_of(tokens)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), PATCH)


def grid_of(tokens: Tensor) -> int:
    """Patches a side of a square picture (B, patches, channels)."""
    return math.isqrt(tokens.shape[1])

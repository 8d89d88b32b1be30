"""A picture as a sequence of tokens: 64x64 pixels, patches of 4x4, in every model of the zoo."""

import torch.nn.functional as F
from torch import Tensor

SIZE = 64
PATCH = 4
GRID = SIZE // PATCH  # 16 patches a side: 256 image tokens of 4 * 4 * 3 = 48 channels


def patchify(pictures: Tensor) -> Tensor:
    """(B, 3, 64, 64) -> (B, 256, 48): patches row by row."""
    return F.pixel_unshuffle(pictures, PATCH).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor) -> Tensor:
    """(B, 256, 48) -> (B, 3, 64, 64): the inverse of `patchify`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (GRID, GRID)), PATCH)

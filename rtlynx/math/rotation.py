"""Rotation of the values inside attention heads, so that 2:4 selection behind the attention costs less.

Attention mixes tokens, not channels: for values V R it gives what it gives for V, times R. So each head may
have its values in any basis, if what reads the head undoes that. Both are folded into weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the readers' mean energy: what keeps R invertible where they leave a direction out.
_RIDGE = 1e-4


def value_rotation(covariance: Tensor, gram: Tensor, m: int) -> Tensor:
    """R of each head: channels by what they are worth at the output, strong beside weak ones.

    With M = `gram` + ridge and Q the eigenvectors of M^1/2 C M^1/2, R is M^1/2 Q. Where the attention gives A
    the channels of A R are uncorrelated, and a dropped entry is an error of its magnitude at the readers'
    output. Of the channels in falling order j, j + d/m, j + 2d/m, ... become neighbours.

    Parameters
    ----------
    covariance : Tensor (H, d, d), float64
        C, of what the attention gives.
    gram : Tensor (H, d, d), float64
        W^T W of the columns W of the head, over all layers that read it.
    m : int
        How many neighbours compete; divides d.

    Returns
    -------
    Tensor (H, d, d), float64, invertible.
    """
    d = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, _RIDGE * mean, 1.0)  # heads that nobody reads keep their basis
    eye = torch.eye(d, dtype=gram.dtype, device=gram.device)
    energies, basis = torch.linalg.eigh(gram + ridge[..., None, None] * eye)
    root = basis * energies.clamp_min(0).sqrt()[..., None, :] @ basis.mT
    falling = torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(-1)
    order = torch.arange(d, device=gram.device).unflatten(0, (m, -1)).T.flatten()
    return (root @ falling)[..., order]


def rotate_rows(values: Tensor, rotation: Tensor) -> Tensor:
    """R^T W_h of each head h.

    Parameters
    ----------
    values : Tensor (H d, ...)
        Weight or bias of a layer that makes V.
    rotation : Tensor (H, d, d)

    Returns
    -------
    Tensor of the shape and dtype of `values`.
    """
    by_head = values.unflatten(0, rotation.shape[:2]).to(rotation)
    return torch.einsum("hde,hd...->he...", rotation, by_head).flatten(0, 1).to(values.dtype)


def rotate_columns(weight: Tensor, inverse: Tensor, sharing: int = 1) -> Tensor:
    """W_h R^-T of each head h.

    Parameters
    ----------
    weight : Tensor (N, K)
        Of a layer that reads what the attention gives with its first H `sharing` d columns.
    inverse : Tensor (H, d, d)
        R^-1.
    sharing : int
        How many heads in a row share one, in grouped-query attention.

    Returns
    -------
    Tensor of the shape and dtype of `weight`.
    """
    inverse = inverse.repeat_interleave(sharing, dim=0)
    width = inverse.shape[0] * inverse.shape[1]
    by_head = weight[:, :width].unflatten(1, inverse.shape[:2]).to(inverse)
    turned = torch.einsum("nhd,hed->nhe", by_head, inverse).flatten(1).to(weight.dtype)
    return torch.cat((turned, weight[:, width:]), dim=1)

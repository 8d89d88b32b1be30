"""The paper's way to the low-rank branch: trained on the layer's own activations, everything else frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx.math.reference import Norm, compress
from rtlynx.math.selection import Pattern

LEARNING_RATE = 1e-3
TOKENS_PER_STEP = 2048


def train_lowrank(
    tokens: Tensor,
    weight: Tensor,
    pattern: Pattern,
    norm: Norm,
    *,
    rank: int,
    steps: int = 2000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Low-rank factors that minimise ||s S(X) W^T + X A B^T - X W^T||² by AdamW (RT-Lynx).

    Parameters
    ----------
    tokens : Tensor (M, K), dense inputs
    weight : Tensor (N, K)
    pattern, norm
        As the layer runs.
    rank, steps : int
    seed : int
        Of the start and the order of tokens.

    Returns
    -------
    A^T (r, K), B (N, r) in float32: A starts random, B at zero, as in LoRA.
    """
    tokens, weight = tokens.float(), weight.detach().float()
    device, (m, k), n = weight.device, tokens.shape, weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    lowrank_a = torch.randn(rank, k, generator=generator).div_(k**0.5).to(device).requires_grad_()
    lowrank_b = torch.zeros(n, rank, device=device, requires_grad=True)
    kept, scale = compress(tokens, pattern, norm)
    seen = kept if scale is None else kept * scale
    rest = (tokens - seen).to(device) @ weight.T  # what the sparse path misses
    tokens = tokens.to(device)
    unit = rest.square().mean().clamp_min(1e-30)  # a relative loss, so that one learning rate fits all layers
    batches = torch.randint(m, (steps, min(m, TOKENS_PER_STEP)), generator=generator).to(device)
    optimiser = torch.optim.AdamW(
        (lowrank_a, lowrank_b), lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for rows in batches:
            missing = tokens[rows] @ lowrank_a.T @ lowrank_b.T - rest[rows]
            loss = missing.square().mean() / unit
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return lowrank_a.detach(), lowrank_b.detach()

"""One process or several (torchrun): who am I, and what does process 0 say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world() -> int:
    return dist.get_world_size() if distributed() else 1


def broadcast(value: Any) -> Any:
    """Rank 0's value on every process."""
    if not distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_processes(mine: Sequence[float], device: torch.device) -> list[float]:
    """The sums of each number over all processes, in float64."""
    if not distributed():
        return list(mine)
    numbers = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return numbers.tolist()


def all_rows(mine: Tensor, device: torch.device) -> Tensor:
    """Rows (N, K) of all processes in float32 on the CPU, in order of rank, however many each has."""
    sizes = torch.tensor([len(mine)], device=device)
    all_sizes = [torch.zeros_like(sizes) for _ in range(world())]
    dist.all_gather(all_sizes, sizes)
    longest = max(int(size) for size in all_sizes)
    padded = torch.nn.functional.pad(mine.float(), (0, 0, 0, longest - len(mine))).to(device)
    pieces = [torch.zeros_like(padded) for _ in all_sizes]
    if longest:
        dist.all_gather(pieces, padded)
    return torch.cat([piece[: int(size)].cpu() for piece, size in zip(pieces, all_sizes, strict=True)])

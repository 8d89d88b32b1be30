"""Where a step's GPU time goes, by names of kernels: linear layers, attention, NCCL, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LINEAR = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "compress", "quantize", "splitk", "gemv")
ATTENTION = ("flash", "fmha", "sdpa", "attention", "cudnn_generated")
STEPS = 3


def kind(kernel: str) -> str:
    """ "linear", "attention", "communication" or "rest"."""
    name = kernel.lower()
    if name.startswith("nccl"):
        return "communication"
    if name.startswith("triton_") and "_tem_" not in name:  # elementwise, named after its neighbours too
        return "rest"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "linear" if any(part in name for part in LINEAR) else "rest"


class KernelTime(NamedTuple):
    """All launches of one kernel in a step."""

    launches: float = 0.0
    ms: float = 0.0


def kernels_of(step: Callable[[], object]) -> dict[str, KernelTime]:
    """Kernel -> what it takes in `step`; of NCCL's, waiting for other cards included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found: dict[str, KernelTime] = {}
    for event in trace.events():
        if event.device_type == DeviceType.CUDA:
            launches, ms = found.get(event.name, KernelTime())
            ms += event.time_range.elapsed_us() / 1e3 / STEPS
            found[event.name] = KernelTime(launches + 1 / STEPS, ms)
    return found


def kernels_ms(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that kernels of each kind take in `step`."""
    times = {"linear": 0.0, "attention": 0.0, "rest": 0.0}
    for name, taken in kernels_of(step).items():
        times[kind(name)] = times.get(kind(name), 0.0) + taken.ms
    return times


def split(step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of all kernels of `step`."""
    times = kernels_ms(step)
    total = sum(times.values())
    return {name: time / total for name, time in times.items()} if total else times

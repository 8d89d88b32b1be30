"""Where a step's GPU time goes, by names of kernels: linear layers, attention, NCCL, and the rest."""

from __future__ import annotations

from collections.abc import Callable

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


def kernels_ms(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that kernels of each kind take in `step`; of NCCL's, waiting for other cards included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times = {"linear": 0.0, "attention": 0.0, "rest": 0.0}
    for event in trace.events():
        if event.device_type == DeviceType.CUDA:
            of = kind(event.name)
            times[of] = times.get(of, 0.0) + event.time_range.elapsed_us() / 1e3 / STEPS
    return times


def split(step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of all kernels of `step`."""
    times = kernels_ms(step)
    total = sum(times.values())
    return {name: time / total for name, time in times.items()} if total else times

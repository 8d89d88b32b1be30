"""Where the GPU time of a step goes: linear layers, attention, and the rest, by the names of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LINEAR = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "compress", "quantize", "splitk", "gemv")
ATTENTION = ("flash", "fmha", "sdpa", "attention", "cudnn_generated")
STEPS = 3


def kind(kernel: str) -> str:
    """ "linear", "attention" or "rest"."""
    name = kernel.lower()
    if name.startswith("triton_") and "_tem_" not in name:  # elementwise, named after its neighbours too
        return "rest"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "linear" if any(part in name for part in LINEAR) else "rest"


def split(step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of all kernels of `step`."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    shares = {"linear": 0.0, "attention": 0.0, "rest": 0.0}
    for event in trace.events():
        if event.device_type == DeviceType.CUDA:
            shares[kind(event.name)] += event.time_range.elapsed_us()
    total = sum(shares.values())
    return {name: time / total for name, time in shares.items()} if total else shares

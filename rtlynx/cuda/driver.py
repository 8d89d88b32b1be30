"""The CUDA driver: calls that say what failed and what to do, torch's context, loading during capture.

cuda-bindings is imported inside the functions: it exists on Linux only, and this module everywhere.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from rtlynx.cuda.tuning import H100_SMS

INVALID_CONTEXT = 201
_ADVICE = {
    1: "The grid has a zero, or the parameters or the shared memory do not fit the kernel.",
    2: "Free GPU memory.",
    200: "The cached code is of no use: empty the folder that `rtlynx doctor` names.",
    209: "The driver is too old for this NVRTC, or the card is no Hopper: see `rtlynx doctor`.",
    400: "Is the stream one of the current device? Launch under torch.cuda.device(x.device).",
    500: "The source has no such function, or it lacks extern \"C\".",
    700: "A kernel before this one read or wrote outside its memory: find it with CUDA_LAUNCH_BLOCKING=1 "
    "or compute-sanitizer. This process cannot use the GPU any more.",
    701: "The kernel needs more registers or shared memory than the card has.",
    719: "A kernel before this one failed: find it with CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer. "
    "This process cannot use the GPU any more.",
    801: "The driver does not know this call: update it.",
}  # fmt: skip
_lock = threading.Lock()
_contexts: dict[int, Any] = {}


def call(function: Any, *arguments: Any, doing: str = "") -> tuple[Any, ...]:
    """Results of a call of cuda.bindings.driver.

    Raises
    ------
    RuntimeError
        If its status is not success.
    """
    status, *results = function(*arguments)
    if int(status):
        fail(int(status), doing or function.__name__)
    return tuple(results)


def fail(status: int, doing: str) -> NoReturn:
    """RuntimeError with the driver's name for `status` and what to do about it."""
    from cuda.bindings import driver

    name = driver.CUresult(status).name
    advice = _ADVICE.get(status, "`rtlynx doctor` tells what works here.")
    raise RuntimeError(f"{doing} failed: {name}. {advice}")


@functools.cache
def multiprocessors(device: int | None) -> int:
    """Of CUDA device `device`; an H100's where torch sees none, so that plans can be looked at anywhere."""
    if not torch.cuda.is_available():
        return H100_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def bind_context(device: int) -> None:
    """Make the context that torch uses on `device` the current one of this thread."""
    from cuda.bindings import driver

    with _lock:
        if device not in _contexts:  # retained once and kept, as torch keeps it
            (_contexts[device],) = call(driver.cuDevicePrimaryCtxRetain, driver.CUdevice(device))
    call(driver.cuCtxSetCurrent, _contexts[device])


@contextmanager
def allowed_during_capture() -> Iterator[None]:
    """Let this thread load code while a CUDA graph is captured.

    Loading is no work of the captured stream, but it may allocate, which a capture refuses to threads that
    do not say that they know.
    """
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (before,) = call(driver.cuThreadExchangeStreamCaptureMode, relaxed)
    try:
        yield
    finally:
        call(driver.cuThreadExchangeStreamCaptureMode, before)

"""Two processes that work together, neither a copy of this one: torch may crash in one that had threads."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from unittest import mock

import torch.multiprocessing

PROCESSES = 2
TIMEOUT = 150  # seconds
# Imported once, by a process without threads that the others are copies of.
PRELOADED = ["pytest", "peft", "checkpoint_helpers", "fusion_helpers", "parallel_helpers"]


def server():
    """The context whose processes come from that one; they get nothing from here but their arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # (Python 3.11 tells it nothing of pytest's `sys.path`.)
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        multiprocessing.forkserver.ensure_running()
    return context


def in_two_processes(work, *arguments, timeout=TIMEOUT, method="forkserver"):
    """Call `work(rank, *arguments)` in both at once.

    Raises torch's `ProcessException` where one fails or dies, which ends the other, and TimeoutError.
    """
    if method == "forkserver":
        server()
    started = torch.multiprocessing.start_processes(
        work, arguments, PROCESSES, join=False, start_method=method
    )
    deadline = time.monotonic() + timeout
    try:
        while not started.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the processes were not done after {timeout} seconds")
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()

"""Results of a run: what computed them, and files that are written together."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rtlynx._version import __version__
from rtlynx.storage.files import atomic_file, write_json


def environment() -> dict[str, Any]:
    """Machine and versions, in JSON values."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }
    return {"rtlynx": __version__, "torch": torch.__version__, "machine": machine}


def write_results(folder: Path, files: Mapping[str, bytes], results: Mapping[str, Any]) -> None:
    """Write `files` and results.json into `folder`, all or none: each is renamed once all are written."""
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(atomic_file(folder / name)).write_bytes(content)
        write_json(stack.enter_context(atomic_file(folder / "results.json")), results)

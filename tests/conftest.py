"""What all tests share: the `gpu` marker, one thread each, the command line, a fast folder."""

import os

# Before NumPy and torch are imported, here and in processes that tests start: two workers with two threads
# each spend more time on waiting for each other than on work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# glibc gives freed tensors back to the system at once; to get their pages again costs a fifth of the time.
# Read when a process starts: by the workers of `pytest -n`.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))

import gc
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Nothing here has to outlive a power cut, and disks take milliseconds each time.
os.fsync = lambda descriptor: None

# What is imported stays. To search it for garbage again and again took a tenth of the time.
gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # of tensors and their graphs few are garbage so soon
    gc.enable()


def pytest_collection_modifyitems(items):
    import torch  # (not by the process that only hands tests to the workers of `pytest -n`)

    # The models here are tiny: on a busy machine threads that wait for each other take ten times as long as
    # one that does not. What runs in parallel are the workers of `pytest -n`.
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords and isinstance(item, pytest.Function):  # (else it says so itself)
            item.add_marker(skip)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `rtlynx` with some arguments: its exit code, and what it wrote to stdout and stderr."""
    from rtlynx.cli.main import main

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rtlynx", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def _served(monkeypatch):
    """Fused blocks run as on a card, their operators in plain PyTorch (`fusion_helpers.serve`)."""
    from fusion_helpers import serve

    serve(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """Counts what is called of this package's operators (`fusion_helpers.count_calls`)."""
    from fusion_helpers import count_calls

    return count_calls(monkeypatch)


@pytest.fixture
def place(tmp_path):
    """A folder in memory where there is such a thing: waiting for disks is not what is tested here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def recorded(monkeypatch):
    """What calibration records of each batch of prompts: its list of calls."""
    from rtlynx.calibration.calls import CallStore

    kept = []
    original = CallStore.put

    def spy(store, batch, calls):
        kept.append(calls)
        original(store, batch, calls)

    monkeypatch.setattr(CallStore, "put", spy)
    return kept

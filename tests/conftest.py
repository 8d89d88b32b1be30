"""What all tests share: the `gpu` marker, one thread each, and the command line."""

import sys

import pytest
import torch

# The models here are tiny: on a busy machine threads that wait for each other take ten times as long as one
# that does not. What runs in parallel are the workers of `pytest -n`.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `rtlynx` with some arguments: its exit code, and what it wrote to stdout and stderr."""
    from rtlynx.cli import main  # wants diffusers, without which the tests of the kernels run too

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rtlynx", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call

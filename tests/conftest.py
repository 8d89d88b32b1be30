"""What all tests share: the `gpu` marker, and one thread each."""

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

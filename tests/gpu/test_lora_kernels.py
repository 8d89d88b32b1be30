"""What LoRAs add, prepared by one kernel: T and packed B against float64."""

import pytest
import torch
from lora_cases import CASES, check

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_case(case):
    check(case)

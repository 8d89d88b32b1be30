"""Moments that a Hopper card sums in TF32."""

import pytest
import torch

from rtlynx.calibration.moments import Moments, rounded_to_tf32
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.math.selection import nm_mask

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_on_the_card_are_those_of_float64(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4096, 512, generator=generator, device="cuda").to(dtype)
    s = quantize_tokens(x, nm_mask(x)).dequantize()
    before = torch.backends.cuda.matmul.fp32_precision
    moments = Moments(512, device="cuda")
    moments.add(x, s)
    assert torch.backends.cuda.matmul.fp32_precision == before
    s = s if dtype is torch.float32 else rounded_to_tf32(s)
    x, s = x.double(), s.double()
    for found, wanted in ((moments.dense, x.T @ x), (moments.cross, s.T @ x), (moments.kept, s.T @ s)):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5

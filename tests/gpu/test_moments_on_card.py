"""Moments that a Hopper card sums in TF32."""

import pytest
import torch

from rtlynx.calibration.moments import RunningMoments
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.math.selection import nm_mask
from rtlynx.math.tf32 import rounded_to_tf32

pytestmark = pytest.mark.gpu


def tokens(dtype, count=4096, mean=0.0):
    generator = torch.Generator("cuda").manual_seed(0)
    x = (mean + torch.randn(count, 512, generator=generator, device="cuda")).to(dtype)
    return x, quantize_tokens(x, nm_mask(x)).dequantize()


def deviations_in_tf32(t):
    mean = t.double().mean(0)
    return mean + rounded_to_tf32(t - mean.float())


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_on_the_card_are_those_of_float64(dtype):
    x, s = tokens(dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    moments = RunningMoments(512, device="cuda")
    moments.add(x, s)
    assert torch.backends.cuda.matmul.fp32_precision == before
    if dtype is not torch.float32:
        x, s = (deviations_in_tf32(t.float()) for t in (x, s))
    # Tensor cores truncate what they add up.
    found, x, s = moments.mean(), x.double(), s.double()
    for name, wanted in (("dense", x.T @ x), ("cross", s.T @ x), ("kept", s.T @ s)):
        assert off(getattr(found, name), wanted / len(x)) < (1e-5 if dtype is torch.float32 else 1e-4)


def test_wide_moments_are_those_of_float64():
    """Products by blocks, of a width that is no multiple of theirs."""
    generator = torch.Generator("cuda").manual_seed(1)
    x = (1 + torch.randn(300, 4104, generator=generator, device="cuda")).bfloat16()
    s = quantize_tokens(x, nm_mask(x)).dequantize()
    moments = RunningMoments(4104, device="cuda")
    for part in zip(x.split(100), s.split(100), strict=True):
        moments.add(*part)
    found, x, s = moments.mean(), x.double(), s.double()
    for name, wanted in (("dense", x.T @ x), ("cross", s.T @ x), ("kept", s.T @ s)):
        assert off(getattr(found, name), wanted / len(x)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mean", [50.0, 300.0])
def test_a_mean_that_outweighs_its_deviation_leaves_the_covariance(dtype, mean):
    x, s = tokens(dtype, 16 * 4096, mean)
    moments = RunningMoments(512, device="cuda")
    for part in zip(x.split(4096), s.split(4096), strict=True):
        moments.add(*part)
    found, x = moments.mean().centred(), x.double()
    assert off(found.dense, torch.cov(x.T, correction=0)) < 1e-3
    assert float(torch.linalg.eigvalsh(found.dense)[0]) > 0
    # S is all but singular: of four inputs that hardly differ from 300 two are kept.
    assert float(torch.linalg.eigvalsh(found.kept)[0]) > -1e-5 * float(found.kept.diagonal().mean())

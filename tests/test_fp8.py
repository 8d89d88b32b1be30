"""fp8 layers in plain PyTorch against their formula in float64, and against what eight bits can do."""

import pytest
import torch
from formula_helpers import slow_mask
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_helpers import PATTERNS, K, N, factors, mask_for, tokens

from rtlynx import Pattern, norm_scale
from rtlynx.math.fp8 import quantize_tokens, quantize_weight
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops.dispatch import scaled_mm_supports
from rtlynx.ops.fp8_linear import (
    Fp8Parameters,
    compress_fp8,
    dense_linear_fp8,
    fold_lowrank,
    fold_lowrank_b,
    linear_fp8,
)

EVERYTHING = Pattern(1, 1)


def parameters(bias=True, lowrank=False, dtype=torch.float32, seed=5):
    weight = tokens(N, K, seed=seed) / 6
    lowrank_a, lowrank_b = factors() if lowrank else (None, None)
    cast = (
        None if t is None else t.to(dtype)
        for t in (tokens(N, seed=seed + 1) if bias else None, lowrank_a, lowrank_b)
    )
    return weight, Fp8Parameters(*quantize_weight(weight), *cast)


def eight_bits(compressed, of, x):
    """The product in float64 from the eight-bit values, with unrounded factors."""
    seen = compressed.values.double() * compressed.scale.double()
    y = seen @ (of.weight.double() * of.scale.double().unsqueeze(-1)).T
    if of.lowrank_a is not None:
        y = y + x.double() @ of.lowrank_a.double().T @ of.lowrank_b.double().T
    return y if of.bias is None else y + of.bias.double()


# ------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("grouping", PATTERNS)
@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_selected_before_it_is_quantised(grouping, norm, dtype):
    pattern, _ = PATTERNS[grouping]
    x = (tokens(7, K) * torch.linspace(0.01, 50, 7).unsqueeze(-1)).to(dtype)
    mask = mask_for(x, grouping)
    values, scale = compress_fp8(x, pattern, norm)
    expected, t = quantize_tokens(torch.where(mask, x, 0))
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    s = (
        (x.double().square().sum(-1) / (x.double() * mask).square().sum(-1)).sqrt()
        if norm == "scale"
        else 1.0
    )
    torch.testing.assert_close(
        scale.double(), t.double() * torch.as_tensor(s).unsqueeze(-1), rtol=1e-6, atol=0
    )


def test_selection_sees_entries_that_eight_bits_cannot_tell_apart():
    x = torch.tensor([[1.0, 1.01, 1.02, 1.03]])  # all are 1 in e4m3
    values, _ = compress_fp8(x, Pattern(), "none")
    assert (values.float() != 0).tolist() == [[False, False, True, True]]


def test_dense_fp8_keeps_everything_and_has_no_norm_scale():
    x = tokens(2, 5, K)
    for norm in ("none", "scale"):
        values, scale = compress_fp8(x, EVERYTHING, norm)
        plain = quantize_tokens(x)
        assert torch.equal(scale, plain.scale)
        assert torch.equal(values.view(torch.uint8), plain.values.view(torch.uint8))
    with pytest.raises(ValueError, match="do not split"):
        compress_fp8(tokens(2, 6), Pattern(4, 4), "none")


def test_the_papers_formula_has_no_fp8_form():
    with pytest.raises(ValueError, match="paper's printed formula"):
        compress_fp8(tokens(), Pattern(), "paper")


def test_dequantize():
    x = tokens(2, 9, K)
    whole = compress_fp8(x, Pattern(), "scale")
    torch.testing.assert_close(whole.dequantize(), whole.values.float() * whole.scale, rtol=0, atol=0)
    s = norm_scale(x, slow_mask(x))
    assert relative_error(whole.dequantize(), torch.where(slow_mask(x), x, 0) * s) < 0.04


# --------------------------------------------------------------------------------------------- product


@pytest.mark.parametrize("grouping", [*PATTERNS, "everything"])
@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lowrank", [False, True])
def test_product_of_the_eight_bit_values(grouping, norm, bias, lowrank):
    pattern = EVERYTHING if grouping == "everything" else PATTERNS[grouping][0]
    _, of = parameters(bias, lowrank)
    x = tokens(2, 5, K)
    compressed = compress_fp8(x, pattern, norm)
    y = linear_fp8(x, compressed, of)
    assert y.dtype == torch.float32
    assert relative_error(y, eight_bits(compressed, of, x)) < 1e-6
    assert torch.equal(y, dense_linear_fp8(x, compressed, of))  # no card here: the same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lowrank", [False, True])
def test_half_precision_rounds_the_folded_factors_and_the_result(dtype, lowrank):
    _, of = parameters(True, lowrank, dtype)
    x = (tokens(40, K) * torch.logspace(-4, 2, 40).unsqueeze(-1)).to(dtype)
    compressed = compress_fp8(x, Pattern(), "scale")
    y = linear_fp8(x, compressed, of)
    assert y.dtype == dtype
    # by hand: T' and B' in bfloat16 (float16 would overflow: c is about 1e-3), sums in float64
    acc = compressed.values.double() @ of.weight.double().T
    if lowrank:
        t = (x.double() @ of.lowrank_a.double().T / compressed.scale).bfloat16()
        lowrank_b = (of.lowrank_b.double() / of.scale.unsqueeze(-1)).bfloat16()
        assert relative_error(fold_lowrank(x, of.lowrank_a, compressed.scale), t) < 1e-4
        assert relative_error(fold_lowrank_b(of.lowrank_b, of.scale), lowrank_b) < 1e-4
        acc = acc + t.double() @ lowrank_b.double().T
    expected = acc * of.scale * compressed.scale + of.bias.double()
    half_step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * half_step, atol=1e-6)


@pytest.mark.parametrize("k", [K, 10240])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lowrank", [False, True])
def test_pytorchs_scaled_product_is_called_for_the_same_function(monkeypatch, bias, lowrank, k):
    """On a CPU, where PyTorch has that product too: scales, transposes and shapes are right."""
    monkeypatch.setattr("rtlynx.ops.fp8_linear.scaled_mm_supports", lambda *_: True)
    wide = torch.cat((tokens(N, k), tokens(N, k, seed=8))) / 6  # 48 outputs
    _, lowrank_b = factors()
    cast = (
        t.bfloat16() if wanted else None
        for t, wanted in (
            (tokens(2 * N), bias),
            (tokens(lowrank_b.shape[1], k, seed=9), lowrank),
            (torch.cat((lowrank_b, -lowrank_b)), lowrank),
        )
    )
    of = Fp8Parameters(*quantize_weight(wide), *cast)
    for shape in ((5, k), (2, 3, k), (1, k), (k,)):
        x = tokens(*shape).bfloat16() * 30
        compressed = compress_fp8(x, EVERYTHING, "none")
        y = dense_linear_fp8(x, compressed, of)
        assert (y.dtype, y.shape) == (torch.bfloat16, (*shape[:-1], 2 * N))
        assert relative_error(y, eight_bits(compressed, of, x)) < 5e-3


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("k", [4096, 10240])
def test_what_cublas_refuses_of_few_rows_is_not_asked_of_it(monkeypatch, k, refuses):
    """Fast accumulation of many columns: CUDA 13.0's not with a bias, CUDA 12.9's not at all."""
    asked = []

    def scaled_mm(*args, **options):
        asked.append((options["bias"] is not None, options["use_fast_accum"]))
        return true_product(*args, **options)

    true_product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8, "_REFUSES_WITHOUT_BIAS", refuses)
    bias = tokens(32).bfloat16()
    of = Fp8Parameters(*quantize_weight(tokens(32, k) / 6), bias, None, None)
    x = tokens(3, k).bfloat16()
    compressed = compress_fp8(x, EVERYTHING, "none")
    y = fp8.scaled_product(compressed, of)
    assert relative_error(y, eight_bits(compressed, of, x)) < 5e-3
    assert asked == [(True, True) if k == 4096 else (False, not refuses)]


def test_error_is_that_of_eight_bits():
    weight, of = parameters(bias=False)
    x = tokens(200, K)
    y = dense_linear_fp8(x, compress_fp8(x, EVERYTHING, "none"), of)
    # each of two factors is rounded by at most 2^-4, uniformly in each octave: about 2.5 % in the mean square
    assert 0.01 < relative_error(y, x @ weight.T) < 0.05


@settings(max_examples=50, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20))
def test_powers_of_two_go_through(power_x, power_w):
    weight, of = parameters(bias=False)
    x = tokens()
    plain = linear_fp8(x, compress_fp8(x, Pattern(), "scale"), of)
    moved_of = Fp8Parameters(*quantize_weight(weight * 2.0**power_w), None, None, None)
    moved_x = x * 2.0**power_x
    moved = linear_fp8(moved_x, compress_fp8(moved_x, Pattern(), "scale"), moved_of)
    assert torch.equal(moved, plain * 2.0 ** (power_x + power_w))


def test_a_token_of_zeros_gives_the_bias():
    _, of = parameters(lowrank=True)
    x = torch.zeros(2, K)
    y = linear_fp8(x, compress_fp8(x, Pattern(), "scale"), of)
    assert torch.equal(y, of.bias.expand(2, N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", [Pattern(), EVERYTHING])
def test_a_token_that_is_not_finite_ruins_itself_alone(bad, pattern):
    _, of = parameters(lowrank=True)
    x = tokens(6, K)
    expected = linear_fp8(x, compress_fp8(x, pattern, "scale"), of)
    x[2, 5] = bad
    y = linear_fp8(x, compress_fp8(x, pattern, "scale"), of)
    assert bool(torch.isnan(y[2]).all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], expected[others])


def test_no_rows_at_all():
    _, of = parameters(lowrank=True)
    x = tokens(0, K)
    compressed = compress_fp8(x, Pattern(), "scale")
    assert linear_fp8(x, compressed, of).shape == (0, N)


def test_autocast_does_not_reach_into_the_product():
    _, of = parameters(lowrank=True)
    x = tokens()
    compressed = compress_fp8(x, Pattern(), "scale")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_fp8(x, compressed, of)
    assert torch.equal(inside, linear_fp8(x, compressed, of))


# ------------------------------------------------------------------------------------------- on a card

CARD = "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_card_quantises_to_the_same_bits(dtype):
    gen = torch.Generator().manual_seed(0)
    x = (torch.randn(512, 256, generator=gen) * torch.logspace(-42, 37, 512).unsqueeze(-1)).to(dtype)
    x[3] = 0
    x[4, 7], x[5, 8] = float("nan"), -float("inf")
    for pattern in (Pattern(), EVERYTHING):
        ours = compress_fp8(x.to(CARD), pattern, "none")
        theirs = compress_fp8(x, pattern, "none")
        assert torch.equal(ours.values.cpu().view(torch.uint8), theirs.values.view(torch.uint8))
        # the bits of a NaN are any
        torch.testing.assert_close(ours.scale.cpu(), theirs.scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(192, 512), (3072, 4096), (3072, 10240), (3072, 12288), (3072, 15360)])
@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_dense_fp8_on_a_card(bias, lowrank, n, k):
    """Row-wise scaled products, at token counts that are no multiples of anything, a short prompt's too."""
    gen = torch.Generator().manual_seed(1)
    r = 8
    weight = torch.randn(n, k, generator=gen) / k**0.5
    cast = (
        torch.randn(*shape, generator=gen).to(CARD, torch.bfloat16) if wanted else None
        for shape, wanted in (((n,), bias), ((r, k), lowrank), ((n, r), lowrank))
    )
    of = Fp8Parameters(*(t.to(CARD) for t in quantize_weight(weight)), *cast)
    for shape in ((1, k), (19, k), (32, k), (64, k), (3, 77, k), (1000, k)):
        x = torch.randn(*shape, generator=gen).to(CARD, torch.bfloat16)
        compressed = compress_fp8(x, EVERYTHING, "none")
        if CARD == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
            assert scaled_mm_supports(x, of)
        y = dense_linear_fp8(x, compressed, of)
        assert (y.shape, y.dtype) == ((*shape[:-1], n), torch.bfloat16)
        # tensor cores sum e4m3 products in some 14 bits
        assert relative_error(y.cpu(), eight_bits(compressed, of, x).cpu()) < 8e-3

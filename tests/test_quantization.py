"""Quantisation to e4m3 against exact arithmetic: the nearest of a table made from the format."""

import bisect
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from formula_helpers import slow_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx.math.fp8 import (
    CHANNEL_SCALE_FLOOR,
    MULTIPLIERS,
    TOKEN_SCALE_FLOOR,
    dequantize,
    quantize_tokens,
    quantize_weight,
)

# Code -> value of the non-negative finite e4m3 numbers, from the definition of the format.
TABLE = [Fraction(m, 8) * Fraction(2) ** -6 for m in range(8)]
TABLE += [(1 + Fraction(m, 8)) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
F32 = np.float32


def nearest_code(value):
    """Code of the e4m3 number nearest to a finite float: ties to even, saturating."""
    size = min(Fraction(abs(float(value))), Fraction(448))
    at = bisect.bisect_left(TABLE, size)
    if TABLE[at] != size:
        below, above = size - TABLE[at - 1], TABLE[at] - size
        at -= below < above or (below == above and at % 2)
    return at | (0x80 if np.signbit(value) else 0)


def scale_by_hand(amax, floor):
    return F32(1) if amax == 0 else max(F32(amax) * F32(1 / 448), F32(floor))


def row_by_hand(row, kept=None, floor=TOKEN_SCALE_FLOOR):
    """Codes and scale of one token of finite float32 numbers, one operation at a time."""
    kept = [True] * len(row) if kept is None else kept
    row = [F32(x) if keep else F32(0) for x, keep in zip(row, kept, strict=True)]
    scale = scale_by_hand(max(abs(x) for x in row), floor)
    inverse = F32(1) / scale
    return [nearest_code(x * inverse) for x in row], scale


def codes(values):
    return values.view(torch.uint8).tolist()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
similar = st.floats(-8, 8, width=32)  # most rows of `finite` hold one large entry and zeros
rows = st.one_of(st.lists(finite, min_size=1, max_size=12), st.lists(similar, min_size=1, max_size=12))


# ------------------------------------------------------------------------------------------------ tokens


@settings(max_examples=400, deadline=None)
@given(rows)
def test_tokens_follow_the_formula_to_the_bit(row):
    values, scale = quantize_tokens(torch.tensor([row], dtype=torch.float32))
    expected, t = row_by_hand(row)
    assert scale.dtype == torch.float32
    assert scale.tolist() == [[float(t)]]
    assert codes(values) == [expected]


@settings(max_examples=100, deadline=None)
@given(rows, st.data())
def test_the_scale_is_of_what_is_kept(row, data):
    kept = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    values, scale = quantize_tokens(torch.tensor([row]), torch.tensor([kept]))
    expected, t = row_by_hand(row, kept)
    assert scale.tolist() == [[float(t)]]
    assert codes(values) == [expected]
    assert all(code == 0 for code, keep in zip(codes(values)[0], kept, strict=True) if not keep)


def test_every_number_of_the_format_and_every_midpoint():
    both = sorted({*TABLE, *(((a + b) / 2) for a, b in itertools.pairwise(TABLE))})
    row = torch.tensor([float(x) for x in both])  # the largest is 448: the scale is 1 up to a rounding
    values, scale = quantize_tokens(torch.stack((row, -row)))
    assert scale[0, 0] == F32(448) * F32(1 / 448) == 1
    expected = [nearest_code(float(x)) for x in both]
    assert codes(values) == [
        expected,
        [code | 0x80 if x else 0x80 for code, x in zip(expected, both, strict=True)],
    ]
    exact = torch.tensor([float(x) for x in TABLE])
    assert torch.equal(quantize_tokens(exact[None]).dequantize()[0], exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_shape_and_dtype_and_a_scale_for_each_token(dtype):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] *= 100
    values, scale = quantize_tokens(x, slow_mask(x))
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, x.shape)
    assert scale.shape == (2, 3, 1)
    for row, mask, codes_, t in zip(
        x.flatten(0, 1), slow_mask(x).flatten(0, 1), codes(values.flatten(0, 1)), scale.flatten(), strict=True
    ):
        expected = row_by_hand(row.float().tolist(), mask.tolist())
        assert (codes_, float(t)) == (expected[0], float(expected[1]))


def test_zeros_and_nothing():
    values, scale = quantize_tokens(torch.tensor([[0.0, -0.0]]))
    assert scale.tolist() == [[1.0]]
    assert codes(values) == [[0, 0x80]]
    for shape in ((0, 8), (3, 0), (2, 0, 4)):
        values, scale = quantize_tokens(torch.zeros(shape))
        assert values.shape == shape
        assert scale.shape == (*shape[:-1], 1)
        assert bool((scale == 1).all())


@pytest.mark.parametrize("size", [2.0**-149, 2.0**-133, 2.0**-126, 1e-34, 3e38, 3.4028234e38])
def test_the_smallest_and_the_largest_numbers_keep_their_scale_finite(size):
    x = torch.tensor([[size, -size / 2, 0.0]])
    values, scale = quantize_tokens(x)
    assert scale.item() >= 2.0**-126
    assert np.isfinite(F32(1) / F32(scale.item()))
    expected, t = row_by_hand(x[0].tolist())
    assert (codes(values)[0], scale.item()) == (expected, float(t))
    if size >= 1e-34:
        assert codes(values)[0][0] == len(TABLE) - 1  # 448


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_that_is_not_finite_is_nan_and_no_other(bad, dtype):
    x = torch.ones(3, 8, dtype=dtype)
    x[1, 2] = bad
    mask = slow_mask(x)
    values, scale = quantize_tokens(x, mask)
    assert codes(values)[1] == [0x7F if keep else 0 for keep in mask[1].tolist()]
    assert bool(torch.isnan(scale[1]).all())
    assert codes(values)[0] == codes(values)[2] == [0x7E if keep else 0 for keep in mask[0].tolist()]
    # what was dropped does not matter
    kept = torch.ones(3, 8, dtype=torch.bool)
    kept[1, 2] = False
    assert bool(torch.isfinite(quantize_tokens(x, kept).dequantize()).all())


@settings(max_examples=100, deadline=None)
@given(st.lists(similar, min_size=1, max_size=12), st.integers(-60, 60))
def test_a_power_of_two_moves_the_scale_alone(row, power):
    x = torch.tensor([row])
    moved = quantize_tokens(x * 2.0**power)
    plain = quantize_tokens(x)
    if float(x.abs().max()) > 1e-15:  # above the floor and above subnormals in both
        assert torch.equal(moved.scale, plain.scale * 2.0**power)
        large = x.abs() > 1e-15
        assert torch.equal(moved.values.float()[large], plain.values.float()[large])


@settings(max_examples=100, deadline=None)
@given(st.lists(similar, min_size=1, max_size=12))
def test_error_is_within_half_a_step(row):
    x = torch.tensor([row]).double()
    got = quantize_tokens(x)
    error = (got.dequantize().double() - x).abs()
    t = got.scale.double()
    # relative 2^-4 above the subnormals, half of their step 2^-9 below; and a few roundings of float32
    bound = torch.maximum(x.abs() / 16, t * 2.0**-10) * (1 + 1e-5)
    assert bool((error <= bound).all())


def test_no_gradient_comes_through():
    x = torch.randn(2, 8, requires_grad=True)
    values, scale = quantize_tokens(x)
    assert not values.requires_grad
    assert not scale.requires_grad


# ---------------------------------------------------------------------------------------------- weights


def weight(n=6, k=16, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def gram(k=16, seed=1, tokens=64):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=gen, dtype=torch.float64) * torch.linspace(0.1, 4, k)
    return x.T @ x


@settings(max_examples=100, deadline=None)
@given(rows)
def test_weights_follow_the_formula_to_the_bit(row):
    values, scale = quantize_weight(torch.tensor([row, [1.0] * len(row)]))
    expected, c = row_by_hand(row, floor=CHANNEL_SCALE_FLOOR)
    assert scale.shape == (2,)
    assert scale[0].item() == float(c)
    assert codes(values) == [expected, [0x7E] * len(row)]


def test_channels_of_zeros_and_of_almost_nothing():
    w = torch.zeros(3, 4)
    w[1] = 1e-38
    w[2] = -1.0
    values, scale = quantize_weight(w, torch.eye(4))
    assert scale[0] == 1
    assert codes(values)[0] == [0, 0, 0, 0]
    assert bool(torch.isfinite(1e6 / scale).all())  # B / c
    assert dequantize(values, scale)[2].tolist() == pytest.approx([-1.0] * 4, rel=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_takes_the_best_of_its_grid_channel_by_channel(seed):
    w, g = weight(seed=seed), gram(seed=seed + 10)
    found = quantize_weight(w, g)
    for row in range(len(w)):
        plain = scale_by_hand(float(w[row].abs().max()), CHANNEL_SCALE_FLOOR)
        errors = {}
        for multiplier in MULTIPLIERS:
            c = F32(plain * F32(multiplier))
            numbers = [nearest_code(F32(x) * (F32(1) / c)) for x in w[row].tolist()]
            signed = [float(TABLE[q & 0x7F]) * (-1 if q & 0x80 else 1) for q in numbers]
            off = w[row].double() - torch.tensor(signed, dtype=torch.float64) * float(c)
            errors[float(c)] = float(off @ g @ off)
        best = min(errors, key=errors.get)
        assert found.scale[row].item() == best
        assert errors[best] < errors[float(plain)] * (1 + 1e-12)
    assert bool((found.scale != quantize_weight(w).scale).any())  # a case in which the search matters


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_search_is_never_worse_than_the_plain_scale(seed):
    w, g = weight(seed=seed) * 10.0 ** (seed % 7 - 3), gram(seed=seed + 1, tokens=5)
    plain, found = quantize_weight(w).dequantize(), quantize_weight(w, g).dequantize()

    def error(w_hat):
        off = w.double() - w_hat.double()
        return ((off @ g) * off).sum(-1)

    assert bool((error(found) <= error(plain) * (1 + 1e-6)).all())


def test_many_channels_are_each_on_their_own():
    w, g = weight(n=2100, k=8), gram(8)
    whole = quantize_weight(w, g)
    parts = [quantize_weight(piece, g) for piece in (w[:7], w[7:2060], w[2060:])]
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))
    assert codes(whole.values) == codes(torch.cat([part.values.view(torch.uint8) for part in parts]))


def test_what_cannot_be_quantised_is_refused():
    w = weight()
    w[3, 2] = float("inf")
    with pytest.raises(ValueError, match="output channel 3 holds NaN or Inf"):
        quantize_weight(w)
    with pytest.raises(ValueError, match=r"moments .* are \(16, 16\), got \(8, 8\)"):
        quantize_weight(weight(), gram(8))
    with pytest.raises(ValueError, match=r"a weight is \(N, K\)"):
        quantize_weight(torch.zeros(4))

"""Selection, norm scale and the packed format against a slow loop written from the specification."""

import math

import pytest
import torch
from formula_helpers import group_indices, slow_mask
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx import Pattern, nm_mask, norm_scale, pack, unpack
from rtlynx.math.selection import Packed, from_groups, pattern_mask, select, to_groups

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EXPONENT_BITS = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
DTYPES = list(INTEGERS)
# The six nibbles that PTX defines for two kept of four: index pairs 01, 02, 03, 12, 13, 23.
LEGAL_NIBBLES = {0x4: (0, 1), 0x8: (0, 2), 0xC: (0, 3), 0x9: (1, 2), 0xD: (1, 3), 0xE: (2, 3)}
# n, m, grouping, parts, width, widths of the parts
SHAPES = [
    (2, 4, "adjacent", 1, 16, None),
    (2, 4, "strided", 1, 16, (16,)),
    (2, 4, "strided", 2, 16, (8, 8)),
    (2, 4, "strided", (4, 12), 16, (4, 12)),
    (1, 4, "adjacent", 1, 12, None),
    (3, 4, "strided", (8, 4), 12, (8, 4)),
    (4, 8, "adjacent", 1, 16, None),
    (4, 8, "strided", 1, 24, (24,)),
    (8, 16, "adjacent", 1, 32, None),
    (1, 1, "adjacent", 1, 3, None),
    (4, 4, "strided", (4, 8), 12, (4, 8)),
]


def from_bits(bits, dtype):
    """Unsigned bit patterns -> tensor of `dtype` with exactly these bits."""
    integer = INTEGERS[dtype]
    span = 1 << (8 * integer.itemsize)
    signed = [b - span if b >= span // 2 else b for b in bits]
    return torch.tensor(signed, dtype=integer).view(dtype)


def bits_of(x):
    return x.contiguous().view(INTEGERS[x.dtype])


@st.composite
def any_bits(draw, width=16, rows=2):
    """Rows of any bit pattern at all, rich in ties, zeros of both signs, subnormals, Inf and NaN payloads."""
    dtype = draw(st.sampled_from(DTYPES))
    sign = 1 << (8 * dtype.itemsize - 1)
    inf = EXPONENT_BITS[dtype]
    one = bits_of(torch.ones(1, dtype=dtype)).item()
    special = [0, 1, 2, one, one + 1, inf - 1, inf, inf + 1, inf | (inf & -inf) >> 1, sign - 1]
    special += [value | sign for value in special]
    bit = st.one_of(st.sampled_from(special), st.integers(0, 2 * sign - 1))
    bits = draw(st.lists(bit, min_size=rows * width, max_size=rows * width))
    return from_bits(bits, dtype).reshape(rows, width)


@given(any_bits())
@settings(max_examples=150, deadline=None)
def test_mask_of_any_bits_is_what_the_slow_loop_keeps(x):
    assert torch.equal(nm_mask(x), slow_mask(x))
    assert torch.equal(nm_mask(x, grouping="strided"), slow_mask(x, grouping="strided"))


@pytest.mark.parametrize(("n", "m", "grouping", "parts", "k", "widths"), SHAPES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_pattern_is_what_the_slow_loop_keeps(n, m, grouping, parts, k, widths, data):
    x = data.draw(any_bits(width=k))
    mask = nm_mask(x, n, m, grouping, parts)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, slow_mask(x, n, m, grouping, widths))
    for group in group_indices(k, m, grouping, widths):
        assert mask[:, group].sum(-1).tolist() == [n] * len(x)


@given(any_bits())
@settings(max_examples=50, deadline=None)
def test_what_is_kept_is_at_least_as_large_as_what_is_dropped(x):
    groups, kept = x.float().abs().unflatten(-1, (-1, 4)), nm_mask(x).unflatten(-1, (-1, 4))
    smallest_kept = groups.masked_fill(~kept, math.inf).nan_to_num(math.inf, math.inf).amin(-1)
    largest_dropped = groups.masked_fill(kept, 0.0).amax(-1)
    finite = torch.isfinite(groups).all(-1)
    assert bool((smallest_kept >= largest_dropped)[finite].all())
    has_broken = ~finite
    survives = (~torch.isfinite(groups) & kept).any(-1)
    assert torch.equal(survives, has_broken)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_order_of_special_values(dtype):
    nan, inf, tiny = math.nan, math.inf, torch.finfo(dtype).smallest_normal / 4
    rows = {
        (0.0, -0.0, 0.0, -0.0): [0, 1],  # zeros of both signs tie
        (-0.0, 0.0, tiny, 0.0): [0, 2],  # a subnormal is more than zero
        (tiny, -2 * tiny, 2 * tiny, tiny): [1, 2],
        (1.0, -1.0, 1.0, -1.0): [0, 1],  # ties to the lower index, whatever the sign
        (-1.0, 1.0, 2.0, 1.0): [0, 2],
        (inf, 1.0, nan, -inf): [0, 2],  # NaN, then the first Inf
        (1.0, 2.0, -inf, 3.0): [2, 3],
        (nan, -nan, nan, inf): [0, 1],  # all NaNs tie
        (torch.finfo(dtype).max, -inf, inf, nan): [1, 3],
    }
    for row, expected in rows.items():
        mask = nm_mask(torch.tensor(row, dtype=dtype))
        assert mask.nonzero().flatten().tolist() == expected, row


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_payloads_tie(dtype):
    inf = EXPONENT_BITS[dtype]
    sign = 1 << (8 * dtype.itemsize - 1)
    x = from_bits([inf + 1, sign - 1, (sign - 1) | sign, inf + 5], dtype)
    assert bool(x.isnan().all())
    assert nm_mask(x).tolist() == [True, True, False, False]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["adjacent", "strided"]))
@settings(max_examples=30, deadline=None)
def test_permuting_groups_permutes_the_mask(seed, grouping):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (5, 32), generator=gen).float()
    groups = torch.tensor(group_indices(32, 4, grouping))
    order = torch.randperm(8, generator=gen)
    permutation = torch.empty(32, dtype=torch.long)
    permutation[groups.flatten()] = groups[order].flatten()
    assert torch.equal(
        nm_mask(x[:, permutation], grouping=grouping), nm_mask(x, grouping=grouping)[:, permutation]
    )


@given(any_bits(), st.integers(-6, 6))
@settings(max_examples=50, deadline=None)
def test_mask_does_not_depend_on_scale(x, power):
    limit = torch.finfo(x.dtype)
    x = torch.where((x.abs() > limit.max / 128) | (x.abs() < limit.smallest_normal * 128), 1.0, x)
    assert torch.equal(nm_mask(x * 2.0**power), nm_mask(x))


def test_groupings_hold_the_same_groups_in_another_place():
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    index = torch.tensor(group_indices(24, 4, "strided", (8, 16))).flatten()
    assert torch.equal(nm_mask(x, grouping="strided", parts=(8, 16))[:, index], nm_mask(x[:, index]))
    assert torch.equal(to_groups(x, Pattern(grouping="strided", parts=(8, 16))).flatten(1), x[:, index])


@pytest.mark.parametrize(("n", "m", "grouping", "parts", "k", "widths"), SHAPES)
def test_groups_round_trip(n, m, grouping, parts, k, widths):
    x = torch.arange(2 * k).reshape(2, k)
    pattern = Pattern(n, m, grouping, parts)
    assert to_groups(x, pattern)[0].tolist() == group_indices(k, m, grouping, widths)
    assert torch.equal(from_groups(to_groups(x, pattern), pattern), x)


@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
def test_non_contiguous_input_and_any_leading_dimensions(grouping):
    x = torch.randn(6, 32, 5, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    sliced = x[::2, 1:, :16]
    assert not sliced.is_contiguous()
    assert torch.equal(nm_mask(sliced, grouping=grouping), nm_mask(sliced.contiguous(), grouping=grouping))
    packed, whole = pack(sliced, grouping), pack(sliced.contiguous(), grouping)
    assert torch.equal(packed.values, whole.values)
    assert torch.equal(packed.metadata, whole.metadata)
    assert nm_mask(x[0, 0, :8]).shape == (8,)
    assert nm_mask(x[:0]).shape == (0, 5, 32)
    every_other = torch.randn(4, 32)[:, ::2]
    assert torch.equal(nm_mask(every_other), slow_mask(every_other))


# --------------------------------------------------------------------------------------------- norm scale


def exact_scale(row, kept):
    """||x|| / ||x kept|| in Python floats, after dividing by the largest."""
    largest = max(abs(v) for v in row)
    total = math.fsum((v / largest) ** 2 for v in row)
    return math.sqrt(total / math.fsum((v / largest) ** 2 for v, k in zip(row, kept, strict=True) if k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1e-10, 1e-4, 1.0, 1e4, 1e10, 1e19, 1e30])
def test_scale_restores_the_norm_at_any_magnitude(dtype, magnitude):
    if dtype == torch.float16:
        magnitude = min(max(magnitude, 1e-3), 1e4)
    x = (torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * magnitude).to(dtype)
    mask = nm_mask(x)
    s = norm_scale(x, mask)
    assert s.shape == (8, 1)
    assert s.dtype == torch.float32
    for i, (row, kept) in enumerate(zip(x.tolist(), mask.tolist(), strict=True)):
        assert float(s[i]) == pytest.approx(exact_scale(row, kept), rel=1e-6)
    restored = (s.double() * select(x, mask).double()).norm(dim=-1)
    assert relative_error(restored, x.double().norm(dim=-1)) < 1e-6


@given(any_bits())
@settings(max_examples=50, deadline=None)
def test_scale_of_any_token(x):
    mask = nm_mask(x)
    s = norm_scale(x, mask)
    for i, (row, kept) in enumerate(zip(x.tolist(), mask.tolist(), strict=True)):
        if not all(map(math.isfinite, row)) or not any(row):
            assert float(s[i]) == 1.0
        else:
            assert float(s[i]) == pytest.approx(exact_scale(row, kept), rel=1e-5)


def test_scale_spans_the_whole_range_within_one_token():
    x = torch.tensor(
        [[1e30, 1e-30, 0.0, 0.0, 1e-30, 1e-30, 1e-30, 0.0], [3e38, 3e38, 3e38, 3e38, 0, 0, 0, 0]]
    )
    s = norm_scale(x, nm_mask(x))
    assert s.flatten().tolist() == pytest.approx([1.0, math.sqrt(2)])


def test_scale_of_zero_and_empty_tokens_is_one():
    x = torch.tensor([[0.0, -0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert norm_scale(x, nm_mask(x)).flatten().tolist() == pytest.approx([1.0, math.sqrt(2)])
    assert norm_scale(torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.bool)).shape == (0, 1)


@pytest.mark.parametrize("magnitude", [1e-5, 1e-4, 1e-3, 1.0, 1e3])
def test_paper_variant_is_the_printed_formula(magnitude):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)) * magnitude
    mask = nm_mask(x)
    s = norm_scale(x, mask, paper_epsilon=True)
    for i, (row, kept) in enumerate(zip(x.tolist(), mask.tolist(), strict=True)):
        total = math.fsum(v * v for v in row)
        printed = math.sqrt(total / (math.fsum(v * v for v, k in zip(row, kept, strict=True) if k) + 1e-8))
        assert float(s[i]) == pytest.approx(printed, rel=1e-5)


def test_paper_variant_breaks_as_the_paper_does():
    x = torch.tensor([[0.0] * 4, [1e20] * 4])
    s = norm_scale(x, nm_mask(x), paper_epsilon=True)
    assert float(s[0]) == 0.0
    assert not math.isfinite(float(s[1]))


def test_gradients_of_the_scale_are_finite_also_for_zero_tokens():
    x = torch.tensor([[0.0] * 4, [1.0, 2.0, 3.0, 4.0], [1e-30] * 4], requires_grad=True)
    mask = nm_mask(x)
    norm_scale(x, mask).sum().backward()
    assert bool(torch.isfinite(x.grad[:2]).all())
    assert bool((x.grad[0] == 0).all())
    reference = x.detach()[1].double().requires_grad_()
    (reference.norm() / reference[2:].norm()).backward()
    assert relative_error(x.grad[1], reference.grad) < 1e-6


# ---------------------------------------------------------------------------------------------- pack


def test_packed_bytes_of_a_worked_example():
    x = torch.tensor([[0.0, 3.0, -2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 5.0]])
    packed = pack(x)
    assert packed.values.tolist() == [[3.0, -2.0, 1.0, 1.0, 0.0, 5.0]]
    # groups keep (1, 2), (0, 1), (0, 3): nibbles 9, 4, C; the odd last nibble is a legal filler
    assert packed.metadata.tolist() == [[0x49, 0x4C]]
    assert packed.metadata.dtype == torch.uint8


@given(any_bits(width=12), st.sampled_from([("adjacent", 1), ("strided", 1), ("strided", (4, 8))]))
@settings(max_examples=80, deadline=None)
def test_pack_round_trips_bit_for_bit(x, grouped):
    grouping, parts = grouped
    packed = pack(x, grouping, parts)
    assert packed.values.shape == (2, 6)
    assert packed.metadata.shape == (2, 2)
    widths = (12,) if parts == 1 else parts
    mask = slow_mask(x, 2, 4, grouping, widths)
    expected = torch.where(mask, bits_of(x), 0)
    assert torch.equal(bits_of(unpack(packed)), expected)
    for byte in packed.metadata.flatten().tolist():
        assert byte & 0xF in LEGAL_NIBBLES
        assert byte >> 4 in LEGAL_NIBBLES
    # the kept values lie in index order, group by group, as the hardware reads them
    nibbles = [n for byte in packed.metadata[0].tolist() for n in (byte & 0xF, byte >> 4)][:3]
    groups = group_indices(12, 4, grouping, widths)
    order = [group[i] for group, nibble in zip(groups, nibbles, strict=True) for i in LEGAL_NIBBLES[nibble]]
    assert torch.equal(bits_of(packed.values[0]), bits_of(x[0])[order])


@pytest.mark.parametrize("filled", [0, 1])
def test_groups_with_fewer_than_two_non_zeros_stay_legal(filled):
    for position in range(4):
        x = torch.zeros(1, 8)
        x[0, position] = filled
        packed = pack(x)
        assert {int(packed.metadata[0, 0]) & 0xF, int(packed.metadata[0, 0]) >> 4} <= set(LEGAL_NIBBLES)
        assert torch.equal(unpack(packed), x)


def test_illegal_metadata_is_refused():
    values = torch.ones(1, 4)
    for byte in range(256):
        packed = Packed(values, torch.tensor([[byte]], dtype=torch.uint8), Pattern())
        if byte & 0xF in LEGAL_NIBBLES and byte >> 4 in LEGAL_NIBBLES:
            first, second = LEGAL_NIBBLES[byte & 0xF], LEGAL_NIBBLES[byte >> 4]
            expected = [float(i in first) for i in range(4)] + [float(i in second) for i in range(4)]
            assert unpack(packed).tolist() == [expected]
        else:
            with pytest.raises(ValueError, match="illegal index pair"):
                unpack(packed)


def test_metadata_that_does_not_fit_the_values_is_refused():
    good = pack(torch.randn(2, 16))
    for values, metadata in (
        (good.values, good.metadata[:, :1]),
        (good.values[:, :5], good.metadata),
        (good.values, good.metadata[:1]),
        (good.values[:1], good.metadata),
    ):
        with pytest.raises(ValueError, match="metadata"):
            unpack(Packed(values, metadata, good.pattern))


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5}, "n <= m"),
        ({"n": 0}, "n <= m"),
        ({"n": -1, "m": 4}, "n <= m"),
        ({"n": 1.5}, "whole numbers"),
        ({"m": 5}, "do not split into groups of 5"),
        ({"grouping": "random"}, "grouping"),
        ({"grouping": "strided", "parts": 3}, "3 part"),
        ({"grouping": "strided", "parts": (4, 4)}, "add up to 8"),
        ({"grouping": "strided", "parts": (6, 10)}, "divisible"),
        ({"grouping": "strided", "parts": 0}, "parts"),
        ({"grouping": "strided", "parts": ()}, "parts"),
        ({"grouping": "strided", "parts": (20, -4)}, "parts"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nm_mask(torch.randn(2, 16), **arguments)


@pytest.mark.parametrize("width", [2, 6, 341])
def test_widths_that_do_not_split_are_refused(width):
    for function in (nm_mask, pack):
        with pytest.raises(ValueError, match=f"{width} entries do not split"):
            function(torch.randn(2, width))
    assert f"{width} entries" in Pattern().misfit(width)
    assert Pattern().misfit(8) is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_only_floating_point_is_selected(dtype):
    with pytest.raises(TypeError, match="selection needs one of float64, float32, bfloat16, float16"):
        nm_mask(torch.ones(2, 8, dtype=dtype))


# ------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "grouping", "parts", "k", "widths"), SHAPES)
def test_cuda_selects_and_packs_as_the_cpu_does(n, m, grouping, parts, k, widths, dtype):
    gen = torch.Generator().manual_seed(4)
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (512, k), generator=gen, dtype=torch.int64).to(integer)
    ties = torch.randint(-2, 3, (512, k), generator=gen).to(dtype)
    x = torch.cat((bits.view(dtype), ties))
    pattern = Pattern(n, m, grouping, parts)
    mask = pattern_mask(x, pattern)
    assert torch.equal(pattern_mask(x.cuda(), pattern).cpu(), mask)
    torch.testing.assert_close(
        norm_scale(x.cuda(), mask.cuda()).cpu(), norm_scale(x, mask), rtol=1e-6, atol=0
    )
    if (n, m) == (2, 4):
        ours, theirs = pack(x, grouping, parts), pack(x.cuda(), grouping, parts)
        assert torch.equal(bits_of(theirs.values.cpu()), bits_of(ours.values))
        assert torch.equal(theirs.metadata.cpu(), ours.metadata)
        assert torch.equal(bits_of(unpack(theirs).cpu()), bits_of(unpack(ours)))

"""The packed tiles against a slow loop written from the description of the format."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx import Pattern, nm_mask
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.math.tiles import (
    FP8_SPARSE,
    compute_order,
    lowrank_bytes,
    pack_a,
    pack_a_fp8,
    pack_lowrank,
    packed_a_bytes,
    unpack_a,
    unpack_lowrank,
)

ADJACENT = Pattern()
STRIDED = Pattern(grouping="strided")


def slow_groups(k, pattern):
    """Columns of every group, in compute order."""
    if pattern.grouping == "adjacent":
        return [[4 * c + i for i in range(4)] for c in range(k // 4)]
    widths = pattern.parts
    if isinstance(widths, int):
        widths = (k // widths,) * widths
    groups, offset = [], 0
    for width in widths:
        groups += [[offset + c + i * (width // 4) for i in range(4)] for c in range(width // 4)]
        offset += width
    return groups


def magnitude(bits):
    return min(bits & 0x7FFF, 0x7F81)  # every NaN counts the same


def slow_selection(row, columns):
    """Of a group, the two entries that are kept, by index, and its nibble."""
    entries = [row[column] for column in columns]
    i0, i1 = sorted(sorted(range(4), key=lambda i: (-magnitude(entries[i]), i))[:2])
    return entries[i0], entries[i1], i0 | i1 << 2


def slow_tiles(bits, k, pattern):
    """Rows of 16-bit patterns -> the bytes of the tiles, one entry at a time."""
    rows, groups = len(bits), slow_groups(k, pattern)
    row_tiles, column_tiles = (rows + 63) // 64, (k + 63) // 64
    out = bytearray()
    for mt in range(row_tiles):
        for kb in range(column_tiles):
            values, words = bytearray(4096), [0] * 128
            for r in range(64):
                for c in range(16):
                    row, group = 64 * mt + r, 16 * kb + c
                    first, second, nibble = 0, 0, 4
                    if row < rows and group < len(groups):
                        first, second, nibble = slow_selection(bits[row], groups[group])
                    chunk, inside = divmod(c * 4, 16)  # two values of two bytes a group
                    place = r * 64 + (chunk ^ (r >> 1 & 3)) * 16 + inside
                    struct.pack_into("<HH", values, place, first, second)
                    warp, half, g = r // 16, r // 8 % 2, r % 8
                    step, h, n = c // 8, c // 4 % 2, c % 4
                    words[warp * 32 + g * 4 + step * 2 + h] |= nibble << (16 * half + 4 * n)
            out += values + struct.pack("<128I", *words)
    return list(out)


def slow_e4m3(value):
    """The nearest e4m3 number's bits, ties to even, by trying all of them."""

    def number(code):
        exponent, mantissa = code >> 3, code & 7
        return (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)

    sign = 0x80 if struct.pack("<f", value)[3] & 0x80 else 0
    return sign | min(range(0x7F), key=lambda code: (abs(number(code) - abs(value)), code & 1))


def slow_tiles_fp8(bits, k, pattern, scales):
    """The same in fp8, values quantised by the `scales` of rows."""
    rows, groups = len(bits), slow_groups(k, pattern)
    out = bytearray()
    for mt in range((rows + 63) // 64):
        for kb in range((k + 127) // 128):
            values, words = bytearray(4096), [0] * 256
            for r in range(64):
                for c in range(32):
                    row, group = 64 * mt + r, 32 * kb + c
                    pair, nibble = (0, 0), 4
                    if row < rows and group < len(groups):
                        *kept, nibble = slow_selection(bits[row], groups[group])
                        inverse = torch.tensor(1.0) / scales[row]
                        floats = from_bits([kept])[0].float() * inverse
                        pair = [slow_e4m3(float(value)) for value in floats]
                    chunk, inside = divmod(c * 2, 16)  # two values of a byte a group
                    place = r * 64 + (chunk ^ (r >> 1 & 3)) * 16 + inside
                    values[place : place + 2] = bytes(pair)
                    step, b, n = c // 16, c // 8 % 2, c % 8
                    thread = r // 16 * 32 + r % 8 * 4 + 2 * b + r // 8 % 2
                    words[thread * 2 + step] |= nibble << (4 * n)
            out += values + struct.pack("<256I", *words)
    return list(out)


def signed(bits):
    return [b - 0x10000 if b >= 0x8000 else b for b in bits]


def from_bits(rows):
    return torch.tensor([signed(row) for row in rows], dtype=torch.int16).view(torch.bfloat16)


def to_bits(x):
    return [[b & 0xFFFF for b in row] for row in x.view(torch.int16).tolist()]


def random_bits(rows, k, seed=0):
    """Any bit pattern: subnormals, infinities and NaNs among them; a tenth of the rows all ties."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-0x8000, 0x8000, (rows, k), generator=generator)
    ties = torch.rand(rows, 1, generator=generator) < 0.1
    return torch.where(ties, bits[:, :1], bits).to(torch.int16).view(torch.bfloat16)


PATTERNS = [ADJACENT, STRIDED, Pattern(grouping="strided", parts=2), "uneven"]


def pattern_for(pattern, k):
    return Pattern(grouping="strided", parts=(4, k - 4)) if pattern == "uneven" else pattern


@pytest.mark.parametrize("pattern", PATTERNS, ids=["adjacent", "strided", "halves", "uneven"])
@pytest.mark.parametrize("k", [64, 192, 24, 8])
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 129])
def test_format_is_the_description(rows, k, pattern):
    pattern = pattern_for(pattern, k)
    x = random_bits(rows, k)
    packed_a = pack_a(x, pattern)
    assert packed_a.shape == (packed_a_bytes(rows, k),)
    assert packed_a.tolist() == slow_tiles(to_bits(x), k, pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["adjacent", "strided", "halves", "uneven"])
@pytest.mark.parametrize(("rows", "k"), [(1, 128), (65, 192), (7, 24), (64, 8), (20, 256)])
def test_fp8_format_is_the_description(rows, k, pattern):
    pattern = pattern_for(pattern, k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, :4] = 0.0
    packed_a, scale = pack_a_fp8(x, pattern)
    assert packed_a.shape == (packed_a_bytes(rows, k, FP8_SPARSE),)
    torch.testing.assert_close(scale, x.float().abs().amax(-1) / 448)
    assert packed_a.tolist() == slow_tiles_fp8(to_bits(x), k, pattern, scale)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["adjacent", "strided", "halves", "uneven"])
def test_fp8_round_trip_at_size(pattern):
    k = 1000
    pattern = pattern_for(pattern, k)
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = nm_mask(x, 2, 4, pattern.grouping, pattern.parts)
    packed_a, scale = pack_a_fp8(x, pattern)
    expected = quantize_tokens(x, mask)
    unpacked = unpack_a(packed_a, 300, k, FP8_SPARSE)
    assert unpacked.dtype == torch.float8_e4m3fn
    assert torch.equal(unpacked.float(), compute_order(expected.values.float(), pattern))
    assert torch.equal(scale, expected.scale[:, 0])


@pytest.mark.parametrize("k", [4, 20])
@pytest.mark.parametrize("pattern", [ADJACENT, STRIDED])
def test_an_odd_number_of_groups(k, pattern):
    x = random_bits(65, k)
    assert pack_a(x, pattern).tolist() == slow_tiles(to_bits(x), k, pattern)


bit_patterns = st.one_of(
    st.sampled_from([0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0x7FFF, 0x3F80, 0xBF80]),
    st.integers(0, 0xFFFF),
)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_bits_in_any_groups(data):
    widths = data.draw(st.lists(st.integers(1, 9).map(lambda g: 4 * g), min_size=1, max_size=3))
    k, rows = sum(widths), data.draw(st.integers(1, 3))
    pattern = data.draw(st.sampled_from([ADJACENT, Pattern(grouping="strided", parts=tuple(widths))]))
    bits = [data.draw(st.lists(bit_patterns, min_size=k, max_size=k)) for _ in range(rows)]
    x = from_bits(bits)
    packed_a = pack_a(x, pattern)
    assert packed_a.tolist() == slow_tiles(bits, k, pattern)
    kept = torch.where(nm_mask(x, 2, 4, pattern.grouping, pattern.parts), x.view(torch.int16), 0)
    expected = compute_order(kept, pattern)
    assert torch.equal(unpack_a(packed_a, rows, k).view(torch.int16), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["adjacent", "strided", "halves", "uneven"])
def test_round_trip_at_size(pattern):
    k = 1000
    pattern = pattern_for(pattern, k)
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = x * nm_mask(x, 2, 4, pattern.grouping, pattern.parts)
    unpacked = unpack_a(pack_a(x, pattern), 300, k)
    assert torch.equal(unpacked, compute_order(kept, pattern))
    weight = torch.randn(7, k).double()
    # The product does not see the order.
    torch.testing.assert_close(unpacked.double() @ compute_order(weight, pattern).T, kept.double() @ weight.T)


def test_compute_order_of_a_strided_weight():
    weight = torch.arange(16).expand(2, 16)
    order = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    assert compute_order(weight, STRIDED).tolist() == [order, order]
    assert compute_order(weight, ADJACENT) is weight


def test_rows_of_any_stride():
    whole = random_bits(40, 3 * 64)
    part = whole[::2, 64:128]
    assert torch.equal(pack_a(part, ADJACENT), pack_a(part.contiguous(), ADJACENT))


def test_no_rows():
    packed_a = pack_a(torch.empty(0, 64, dtype=torch.bfloat16), ADJACENT)
    assert packed_a.shape == (0,)
    assert unpack_a(packed_a, 0, 64).shape == (0, 64)


@pytest.mark.parametrize("rank", [1, 5, 16, 32, 33, 64, 320])
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_lowrank_tiles_are_the_description(rows, rank):
    t = random_bits(rows, rank)
    packed_a = pack_lowrank(t)
    assert packed_a.shape == (lowrank_bytes(rows, rank),)
    bits, expected = to_bits(t), []
    for mt in range((rows + 63) // 64):
        for rb in range((rank + 31) // 32):
            block = bytearray(4096)
            for r in range(min(64, rows - 64 * mt)):
                for c in range(min(32, rank - 32 * rb)):
                    place = r * 64 + (c // 8 ^ (r >> 1 & 3)) * 16 + c % 8 * 2
                    struct.pack_into("<H", block, place, bits[64 * mt + r][32 * rb + c])
            expected += block
    assert packed_a.tolist() == expected
    assert torch.equal(unpack_lowrank(packed_a, rows, rank).view(torch.int16), t.view(torch.int16))


def test_illegal_indices_are_refused():
    packed_a = pack_a(random_bits(3, 64), ADJACENT)
    for nibble in (0x0, 0x5, 0xA, 0xF, 0x1, 0x6):  # equal, or out of order
        damaged = packed_a.clone()
        damaged[4096] = damaged[4096] & 0xF0 | nibble
        with pytest.raises(ValueError, match="illegal index pair"):
            unpack_a(damaged, 3, 64)


def test_what_tiles_cannot_hold_is_refused():
    x = random_bits(3, 64)
    with pytest.raises(ValueError, match=r"bfloat16 matrix, got torch\.float32"):
        pack_a(x.float(), ADJACENT)
    with pytest.raises(ValueError, match="bfloat16 matrix"):
        pack_a(x[None], ADJACENT)
    with pytest.raises(ValueError, match="a pattern 4:8"):
        pack_a(x, Pattern(4, 8))
    with pytest.raises(ValueError, match="62 entries do not split"):
        pack_a(x[:, :62], ADJACENT)
    packed_a = pack_a(x, ADJACENT)
    with pytest.raises(ValueError, match=r"packed_a of X of shape \(65, 64\) are 9216 bytes"):
        unpack_a(packed_a, 65, 64)
    with pytest.raises(ValueError, match=r"low-rank tiles of T of shape \(3, 5\) are 4096 bytes"):
        unpack_lowrank(packed_a, 3, 5)

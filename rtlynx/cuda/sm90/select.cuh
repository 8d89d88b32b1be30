// Keep 2 of 4: the one place that decides, for every kernel.
#pragma once
#include "ptx.cuh"

#ifndef SCORE_MAGNITUDE  // rules are listed in rtlynx.math.scores
#error "the selection rule is SCORE_MAGNITUDE"
#endif

DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

DEVICE uint32_t min_u16x2(uint32_t a, uint32_t b) {
    uint32_t least;
    asm("min.u16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
    return least;
}

// `permute` for selectors whose nibbles are below 8: without a mask.
DEVICE uint32_t permute_unmasked(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t permuted;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(permuted) : "r"(a), "r"(b), "r"(selector));
    return permuted;
}

// Magnitudes of two entries as integers, which order as they do: NaN above Inf, all NaN equal.
DEVICE uint32_t magnitudes_of(uint32_t pair) { return min_u16x2(pair & 0x7FFF7FFFu, 0x7F817F81u); }

// What is kept of a group.
struct Kept {
    // Picks the bytes of the pair that is kept from those of the group, in index order: the nibbles 2 i0, 2 i0 + 1,
    // 2 i1, 2 i1 + 1. The upper half picks what is dropped, in any order.
    uint32_t selector;
    uint32_t largest;  // its upper half is the magnitude of the largest entry

    DEVICE uint32_t pair(uint32_t e01, uint32_t e23) const { return permute_unmasked(e01, e23, selector); }
    DEVICE uint32_t dropped(uint32_t e01, uint32_t e23) const { return permute_unmasked(e01, e23, selector >> 16); }
};

// The lower half of a key settles ties, for the lower index. Nibble by nibble, the sum of two indices' tells the lower
// of them, the higher, and the two others: where in `kSelectorBytes` the byte for its index is.
//
// In constant memory, since an instruction takes one immediate operand.
__constant__ uint32_t kTieBreak[4] = {0x4030, 0x1431, 0x1312, 0x0042};
__constant__ uint32_t kSelectorBytes[2] = {0x32101032, 0x76327654};

// The key of entry `index` of a group, from the lower or the upper half of a word of magnitudes.
template <bool kUpper>
DEVICE uint32_t key_of(uint32_t magnitudes, int index) {
    return kUpper ? (magnitudes & 0xFFFF0000u) | kTieBreak[index] : magnitudes * 0x10000u + kTieBreak[index];
}

// The largest keys of a group win (rtlynx.math.selection).
DEVICE Kept keep_two_of_four(uint32_t key0, uint32_t key1, uint32_t key2, uint32_t key3) {
    const uint32_t high0 = max(key0, key1), low0 = min(key0, key1), high1 = max(key2, key3), low1 = min(key2, key3);
    const uint32_t first = max(high0, high1), second = max(max(min(high0, high1), low0), low1);
    return {permute_unmasked(kSelectorBytes[0], kSelectorBytes[1], first + second), first};
}

// What of vectors of eight columns of a row is kept: each holds two adjacent groups, or four hold the entries of eight.
template <int kVectors>
struct Selected {
    static constexpr int kGroups = kVectors * 2;
    uint32_t pairs[kGroups];
    uint32_t nibbles;  // of indices, from the lowest on
};

// The nibbles of two groups, in the highest byte.
DEVICE uint32_t nibbles_of(const Kept& first, const Kept& second) {
    const uint32_t indices = permute(first.selector, second.selector, 0x5410) & 0x06060606u;
    return indices * (1u << 23 | 1u << 17 | 1u << 11 | 1u << 5);
}

DEVICE uint32_t word_of(const uint4& four, int i) {
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Select from `x`. `largest` is raised to the largest magnitude, and `drop(j, pair)` is called for what group j loses.
template <bool kAdjacent, int kVectors, class Drop>
DEVICE Selected<kVectors> select_row(const uint4 (&x)[kVectors], uint32_t& largest, const Drop& drop) {
    static_assert(kAdjacent || kVectors == 4, "an entry of strided groups in each vector");
    Selected<kVectors> out;
    uint32_t bytes[kVectors], largest_key = 0;
    Kept even;
    unroll<kVectors * 2>([&](auto j) {
        constexpr int group = decltype(j)::value;
        uint32_t e01, e23;
        Kept kept;
        if constexpr (kAdjacent) {
            e01 = word_of(x[group / 2], group % 2 * 2);
            e23 = word_of(x[group / 2], group % 2 * 2 + 1);
            const uint32_t m01 = magnitudes_of(e01), m23 = magnitudes_of(e23);
            kept = keep_two_of_four(key_of<false>(m01, 0), key_of<true>(m01, 1), key_of<false>(m23, 2),
                                    key_of<true>(m23, 3));
        } else {
            constexpr bool upper = group % 2;
            uint32_t words[4], keys[4];
            unroll<4>([&](auto i) {
                words[i] = word_of(x[i], group / 2);
                keys[i] = key_of<upper>(magnitudes_of(words[i]), i);
            });
            kept = keep_two_of_four(keys[0], keys[1], keys[2], keys[3]);
            e01 = permute(words[0], words[1], upper ? 0x7632 : 0x5410);
            e23 = permute(words[2], words[3], upper ? 0x7632 : 0x5410);
        }
        out.pairs[group] = kept.pair(e01, e23);
        drop(j, kept.dropped(e01, e23));
        largest_key = max(largest_key, kept.largest);
        if constexpr (group % 2)
            bytes[group / 2] = nibbles_of(even, kept);
        else
            even = kept;
    });
    largest = max(largest, largest_key >> 16);
    out.nibbles = permute(bytes[0], bytes[1], 0x0073);
    if constexpr (kVectors == 4) out.nibbles = permute(out.nibbles, permute(bytes[2], bytes[3], 0x0073), 0x5410);
    return out;
}

// Sums of squares of a row and of what is kept of it, in units of the row's own magnitude so far, so that they
// neither overflow nor vanish for any bf16 input.
struct alignas(16) RowNorm {
    uint32_t largest;  // bits of the largest magnitude
    float total, kept;

    // 2^-exponent of `largest`, within what a float can hold.
    DEVICE static float unit(uint32_t largest) {
        return __uint_as_float((254u - min(max(largest >> 7, 1u), 253u)) << 23);
    }
    DEVICE void raise(uint32_t to) {
        if (to <= largest) return;
        const int by = int(min(max(to >> 7, 1u), 253u)) - int(min(max(largest >> 7, 1u), 253u));
        const float r = __uint_as_float(uint32_t(max(127 - by, 0)) << 23);
        total *= r * r;
        kept *= r * r;
        largest = to;
    }
    DEVICE void add(const RowNorm& other) {
        RowNorm o = other;
        raise(o.largest);
        o.raise(largest);
        total += o.total;
        kept += o.kept;
    }
    // s of the row; 1 where the row is zero or not finite.
    DEVICE float scale() const { return largest == 0 || largest >= 0x7F80u ? 1.f : sqrtf(total / kept); }
};

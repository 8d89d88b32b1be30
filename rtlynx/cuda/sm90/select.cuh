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

// What is kept of a group, and the magnitude of its largest entry.
struct Kept {
    uint32_t pair;         // two bf16, in index order
    uint32_t early, late;  // 3 - i0 and 3 - i1, i0 < i1: the nibble i0 | i1 << 2 is 15 - early - 4 late
    uint32_t largest;      // bits & 0x7FFF of the largest entry, 0x7F81 for any NaN
};

// Of entries 0, 1 and 2, 3 of a group the largest magnitudes win, compared as integers: NaN above Inf, all NaN equal.
// Ties go to the lower index (rtlynx.math.selection). Each key carries 3 - index in its lowest byte, which settles ties
// and tells afterwards who won.
DEVICE Kept keep_two_of_four(uint32_t e01, uint32_t e23) {
    const uint32_t k01 = min_u16x2(e01 & 0x7FFF7FFFu, 0x7F817F81u), k23 = min_u16x2(e23 & 0x7FFF7FFFu, 0x7F817F81u);
    const uint32_t index = 0x03020100u;
    const int c0 = permute(k01, index, 0x4107), c1 = permute(k01, index, 0x4326);
    const int c2 = permute(k23, index, 0x4105), c3 = permute(k23, index, 0x4324);
    const int high0 = max(c0, c1), low0 = min(c0, c1), high1 = max(c2, c3), low1 = min(c2, c3);
    const int first = max(high0, high1), second = max(min(high0, high1), max(low0, low1));
    const uint32_t t1 = first & 3, t2 = second & 3;  // 3 - index
    Kept kept;
    kept.early = max(t1, t2);
    kept.late = min(t1, t2);
    kept.pair = permute(e01, e23, 0x7676u - kept.early * 0x22u - kept.late * 0x2200u);
    kept.largest = first >> 8;
    return kept;
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

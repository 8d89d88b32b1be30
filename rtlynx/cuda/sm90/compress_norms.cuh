// Norms of rows, and of what is kept of them, in the compress kernel.
#pragma once
#include "compress_prologue.cuh"
#include "k_tile.cuh"

// Sums of squares of a warp's 16 rows, on the tensor cores: the diagonals of X X^T, from words as they lie in
// registers. Rows `row` of A are x, rows `row` + 8 are y, two words of one row. With B = x the upper diagonal gathers
// x^2, with B = y the lower one y^2. Lane 4g + g / 2 ends up with the sums of row g.
struct SquareSums {
    float upper[4], lower[4];

    DEVICE static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b));
    }
    DEVICE void add(uint32_t x, uint32_t y) {
        mma(upper, x, y, x);
        mma(lower, x, y, y);
    }
    DEVICE float sum(int quad_idx) const { return quad_idx % 2 ? upper[1] + lower[3] : upper[0] + lower[2]; }
};

// What the main loop finds out about a lane's two rows.
struct RowStatistics {
    uint32_t largest[2] = {0, 0};
    SquareSums total[2] = {}, kept[2] = {};

    DEVICE void add_squares(const LaneValues (&x)[2], const LaneSelected (&selected)[2]) {
        unroll<2>([&](auto i) {
            unroll<kNumK32 * 2>([&](auto j) { total[i].add(x[i].word(j * 2), x[i].word(j * 2 + 1)); });
            unroll<kGroupsPerLane / 2>(
                [&](auto j) { kept[i].add(selected[i].pairs[j * 2], selected[i].pairs[j * 2 + 1]); });
        });
    }
};

// Squares as they are neither overflow nor vanish beside the largest: magnitudes from 2^-40 to 2^55.
DEVICE bool plain_squares_do(uint32_t largest) {
    return largest == 0 || largest >= 0x7F80u || (largest >= (127 - 40) << 7 && largest < (127 + 55) << 7);
}

// Both bf16 of a pair in units of the row's magnitude, squared and summed.
DEVICE float add_scaled_squares(uint32_t pair, float unit, float sum) {
    const float a = bf16_low(pair) * unit, b = bf16_high(pair) * unit;
    return fmaf(a, a, fmaf(b, b, sum));
}

struct TwoNorms {
    RowNorm of[2];
};

// What this lane holds of its rows' norms, for magnitudes whose squares a float does not hold. A second pass over the
// inputs, rarely needed and so not inlined.
__device__ __noinline__ TwoNorms scaled_norms(const Parameters& p, const Row (&rows)[2], const KSplit& k_split) {
    TwoNorms norms = {};
    const int quad_lane = threadIdx.x % 4;
    for (int index = 0; index < k_split.num_k_tiles; ++index) {
        const int k_tile = k_split.k_tile(index);
        const LaneColumns columns = lane_columns(p, k_tile, quad_lane);
        LaneValues x[2];
        unroll<kNumK32>([&](auto k32) {
            if constexpr (MODE == GATHER) {
                unroll<2>([&](auto i) {
                    x[i].v[k32] = gather(p, rows[i].in_bounds ? rows[i].input[0] : nullptr, k_tile, quad_lane, k32);
                });
            } else {
                uint4 input[2][Prologue::kInputs] = {}, output[2];
                unroll<2>([&](auto i) {
                    if (rows[i].in_bounds && columns[k32] < p.columns)
                        unroll<Prologue::kInputs>([&](auto j) {
                            input[i][j] =
                                *reinterpret_cast<const uint4*>(p.prologue.input_at(rows[i], j, columns[k32]));
                        });
                });
                apply_prologue(p, rows, columns[k32], input, output);
                unroll<2>([&](auto i) { x[i].v[k32] = output[i]; });
            }
        });
        unroll<2>([&](auto i) {
            RowNorm& norm = norms.of[i];
            uint32_t largest = norm.largest;
            const LaneSelected selected = select_row(x[i], largest);
            norm.raise(largest);
            const float unit = RowNorm::unit(largest);
            unroll<kNumK32 * 4>([&](auto j) { norm.total = add_scaled_squares(x[i].word(j), unit, norm.total); });
            unroll<kGroupsPerLane>([&](auto j) { norm.kept = add_scaled_squares(selected.pairs[j], unit, norm.kept); });
        });
    }
    return norms;
}

// Store this split's part of the norms of the warp's rows.
DEVICE void store_norms(const Parameters& p, const WorkCoord& at, const KSplit& k_split, const Row (&rows)[2],
                        RowStatistics& stats, RowNorm (&smem_norms)[kKSplitsPerCta][BLOCK_M]) {
    uint32_t (&largest)[2] = stats.largest;
    unroll<2>([&](auto i) {
        largest[i] = max(largest[i], __shfl_xor_sync(~0u, largest[i], 1));
        largest[i] = max(largest[i], __shfl_xor_sync(~0u, largest[i], 2));
    });
    RowNorm norms[2] = {{largest[0], stats.total[0].sum(at.quad_idx), stats.kept[0].sum(at.quad_idx)},
                        {largest[1], stats.total[1].sum(at.quad_idx), stats.kept[1].sum(at.quad_idx)}};
    const bool plain[2] = {plain_squares_do(largest[0]), plain_squares_do(largest[1])};
    unroll<2>([&](auto i) {
        const float unit = largest[i] ? RowNorm::unit(largest[i]) : 0.f;
        norms[i].total *= unit * unit;
        norms[i].kept *= unit * unit;
        if (plain[i] && at.quad_lane == at.quad_idx / 2) smem_norms[at.k_split_in_cta][at.row + i * 8] = norms[i];
    });
    if (__any_sync(~0u, !plain[0] || !plain[1])) {  // once more, in units of the rows' own magnitude
        const Row copies[2] = {rows[0], rows[1]};   // so that the main loop may keep its own in registers
        const TwoNorms scaled = scaled_norms(p, copies, k_split);
        unroll<2>([&](auto i) {
            const RowNorm sum = reduce_quad(scaled.of[i]);
            if (!plain[i] && at.quad_lane == 0) smem_norms[at.k_split_in_cta][at.row + i * 8] = sum;
        });
    }
}

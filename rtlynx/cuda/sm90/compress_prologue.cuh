// The compress kernel's prologue: its application to a lane's two rows, and the pass that finds rows' moments first.
#pragma once
#include "compress_reductions.cuh"

// This lane's two rows.
DEVICE void open_rows(const Parameters& p, int first_row, Row (&rows)[2]) {
    unroll<2>([&](auto i) {
        const int row = first_row + i * 8;
        rows[i].in_bounds = row < p.rows;
        p.prologue.open_row(rows[i], min(row, p.rows - 1));
    });
}

// Eight bf16 values of each of a lane's two rows, zeros outside of X.
DEVICE void apply_prologue(const Parameters& p, const Row (&rows)[2], int column,
                           const uint4 (&input)[2][Prologue::kInputs], uint4 (&output)[2]) {
    const int column_in_bounds = min(column, p.columns - 8);
    Prologue::Modulation modulation = p.prologue.load_modulation(rows[0], column_in_bounds);
    unroll<2>([&](auto i) {
        // In strided mode always loaded anew: registers do not hold the first row's until the second's turn.
        if (i == 1 && Prologue::kNeedsMoments &&
            (MODE == STRIDED || rows[1].modulation_offset != rows[0].modulation_offset))
            modulation = p.prologue.load_modulation(rows[1], column_in_bounds);
        output[i] = p.prologue.apply(rows[i], modulation, column, input[i]);
        if constexpr (Prologue::kNeedsMoments)
            output[i] = select(rows[i].in_bounds && column < p.columns, output[i], uint4{0, 0, 0, 0});
    });
}

template <int N>
DEVICE void add_moments(RowMoments (&sums)[2], const uint4 (&values)[2][N]) {
    unroll<2>([&](auto i) { sums[i].add(Prologue::moments(values[i])); });
}

DEVICE uint4 load_input(const Row& row, int column) {
    return __ldg(reinterpret_cast<const uint4*>(row.input[0] + column));
}

// Moments of what this lane holds of its rows. First come the k tiles that are on their way into shared memory already,
// then others several at a time. Those that reach beyond the matrix come last, chunk by chunk.
DEVICE void add_lane_moments(const Parameters& p, const WorkCoord& at, const KSplit& k_split, const Row (&rows)[2],
                             uint32_t smem_stages, RowMoments (&sums)[2]) {
    const int num_whole = k_split.num_whole_k_tiles(p.columns);
    unroll<NUM_STAGES - 1>([&](auto stage) {
        cp_async_wait<NUM_STAGES - 2 - decltype(stage)::value>();
        if (stage >= num_whole) return;
        uint4 values[2][kNumK32];
        unroll<kNumK32>([&](auto k32) {
            unroll<2>([&](auto i) {
                values[i][k32] = load_smem_16(smem_stages + stage * kStageBytes + k32 * kInputK32Bytes +
                                              swizzle_64b(at.row + i * 8, at.quad_lane));
            });
        });
        add_moments(sums, values);
    });
    int index = min(NUM_STAGES - 1, num_whole);
    unroll<2>([&](auto pass) {
        constexpr int together = decltype(pass)::value == 0 ? 4 / kNumK32 : 1;
        for (; index + together <= num_whole; index += together) {
            uint4 values[2][together * kNumK32];
            unroll<together>([&](auto j) {
                const LaneColumns columns = lane_columns(p, k_split.k_tile(index + j), at.quad_lane);
                unroll<kNumK32>([&](auto k32) {
                    unroll<2>([&](auto i) { values[i][j * kNumK32 + k32] = load_input(rows[i], columns[k32]); });
                });
            });
            add_moments(sums, values);
        }
    });
#pragma unroll 1
    for (; index < k_split.num_k_tiles; ++index) {
        const LaneColumns columns = lane_columns(p, k_split.k_tile(index), at.quad_lane);
#pragma unroll 1
        for (int k32 = 0; k32 < kNumK32; ++k32) {
            if (columns[k32] >= p.columns) continue;
            unroll<2>([&](auto i) {
                const uint4 value[1] = {load_input(rows[i], columns[k32])};
                sums[i].add(Prologue::moments(value));
            });
        }
    }
}

// The pass over the inputs that finds the moments of this lane's rows.
DEVICE void find_moments(const Parameters& p, const WorkCoord& at, const KSplit& k_split, uint32_t smem_stages,
                         Row (&rows)[2], RowMoments (&smem_parts)[kKSplitsPerCta][BLOCK_M],
                         RowMoments (&smem_moments)[BLOCK_M]) {
    RowMoments sums[2] = {};
    add_lane_moments(p, at, k_split, rows, smem_stages, sums);
    unroll<2>([&](auto i) {
        const RowMoments sum = reduce_quad(sums[i]);
        if (at.quad_lane == 0) smem_parts[at.k_split_in_cta][at.row + i * 8] = sum;
    });
    sync_k_splits();
    if (threadIdx.x < BLOCK_M) smem_moments[threadIdx.x] = reduce_k_splits(smem_parts, threadIdx.x, k_split.num_splits);
    __syncthreads();
    unroll<2>([&](auto i) { p.prologue.set_moments(rows[i], smem_moments[at.row + i * 8]); });
}

// Rows that a CTA takes whole, in the kernels that quantise and that compress them: read once, kept in registers as
// bf16.
//
// A thread has CHUNKS vectors of eight columns of each of ROWS rows, in the same columns. `Coord` says where it works:
// `row(i)` and `column(chunk)`, at least p.columns where there is none, and whether rows beyond the matrix are zeros
// (kPadsRows) or never looked at.
#pragma once
#include "e4m3.cuh"
#include "prologues.cuh"

constexpr int kMaxWarps = MAX_THREADS / 32;
static_assert(MAX_THREADS % 32 == 0, "sums over a warp are those of whole warps");
static_assert(kMaxWarps <= 32, "a warp reads what the warps found, a lane one of them");
static_assert(!Prologue::kNeedsMoments || Prologue::kInputs == 1, "moments are those of the first input");

// Keeps the compiler from holding what it has unpacked of these for the next use: twice the registers.
DEVICE void stay_packed(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

DEVICE float reduce_warp(float mine) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) mine += __shfl_xor_sync(~0u, mine, distance);
    return mine;  // the same in every lane
}

// Rows' sums over the CTA from each thread's part, in the same order whenever it runs.
DEVICE void reduce_rows(float (&parts)[ROWS], float (&smem_parts)[ROWS][kMaxWarps]) {
    const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32, num_warps = blockDim.x / 32;
    unroll<ROWS>([&](auto i) {
        parts[i] = reduce_warp(parts[i]);
        if (lane_idx == 0) smem_parts[i][warp_idx] = parts[i];
    });
    __syncthreads();
    unroll<ROWS>([&](auto i) { parts[i] = reduce_warp(lane_idx < num_warps ? smem_parts[i][lane_idx] : 0.f); });
}

template <class Parameters, class Coord>
DEVICE void load_rows(const Parameters& p, const Coord& at, Row (&rows)[ROWS],
                      uint4 (&input)[ROWS][CHUNKS][Prologue::kInputs]) {
    unroll<ROWS>([&](auto i) {
        rows[i].in_bounds = at.row(i) < p.rows;
        p.prologue.open_row(rows[i], min(at.row(i), p.rows - 1));
        unroll<CHUNKS>([&](auto chunk) {
            const int column = at.column(chunk);
            const bool in_bounds = (!Coord::kPadsRows || rows[i].in_bounds) && column < p.columns;
            unroll<Prologue::kInputs>([&](auto j) {
                input[i][chunk][j] =
                    load_once(p.prologue.input_at(rows[i], j, column), in_bounds && p.prologue.reads(j, column));
            });
        });
    });
}

// Moments of the rows, from registers.
template <class Parameters, class Coord>
DEVICE void find_moments(const Parameters& p, const Coord& at, uint4 (&input)[ROWS][CHUNKS][Prologue::kInputs],
                         Row (&rows)[ROWS]) {
    __shared__ float smem_mean[ROWS][kMaxWarps], smem_m2[ROWS][kMaxWarps];
    float mean[ROWS] = {}, m2[ROWS] = {};
    if constexpr (Prologue::kCentred) {
        unroll<ROWS>([&](auto i) {
            unroll<CHUNKS>([&](auto chunk) {  // zeros where the row has ended
                const F32x8 x = unpack(input[i][chunk][0]);
                unroll<8>([&](auto j) { mean[i] += x.v[j]; });
                stay_packed(input[i][chunk][0]);
            });
        });
        reduce_rows(mean, smem_mean);
        unroll<ROWS>([&](auto i) { mean[i] /= float(p.columns); });
    }
    unroll<ROWS>([&](auto i) {
        unroll<CHUNKS>([&](auto chunk) {
            const F32x8 x = unpack(input[i][chunk][0]);
            float squares = 0.f;
            unroll<8>([&](auto j) {
                const float deviation = x.v[j] - mean[i];
                squares = fmaf(deviation, deviation, squares);
            });
            if (at.column(chunk) < p.columns) m2[i] += squares;
            stay_packed(input[i][chunk][0]);
        });
    });
    reduce_rows(m2, smem_m2);
    unroll<ROWS>([&](auto i) { p.prologue.set_moments(rows[i], {float(p.columns), mean[i], m2[i]}); });
}

// Make of the inputs what is quantised, zeros outside of the matrix.
template <class Parameters, class Coord>
DEVICE void apply_prologue(const Parameters& p, const Coord& at, const Row (&rows)[ROWS],
                           const uint4 (&input)[ROWS][CHUNKS][Prologue::kInputs], uint4 (&output)[ROWS][CHUNKS]) {
    unroll<CHUNKS>([&](auto chunk) {
        const int column = at.column(chunk);
        const bool in_row = column < p.columns;
        Prologue::Modulation modulation = p.prologue.load_modulation(rows[0], in_row ? column : 0);
        unroll<ROWS>([&](auto i) {
            if constexpr (Prologue::kNeedsMoments && i > 0) {
                if (rows[i].modulation_offset != rows[i - 1].modulation_offset)
                    modulation = p.prologue.load_modulation(rows[i], in_row ? column : 0);
            }
            output[i][chunk] = p.prologue.apply(rows[i], modulation, column, input[i][chunk]);
            if constexpr (Prologue::kNeedsMoments)
                output[i][chunk] =
                    select((!Coord::kPadsRows || rows[i].in_bounds) && in_row, output[i][chunk], uint4{0, 0, 0, 0});
            if constexpr (Prologue::kTransforms) {
                if (p.dense != nullptr && rows[i].in_bounds && in_row)
                    *reinterpret_cast<uint4*>(p.dense + int64_t(at.row(i)) * p.columns + column) = output[i][chunk];
            }
        });
    });
}

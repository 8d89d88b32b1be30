// X (M, K) bf16, or what a prologue makes of its inputs -> all of it as e4m3 in natural order, and each row's scale t.
//
// A CTA takes ROWS rows at one time. Each thread has CHUNKS vectors of eight neighbours of each row, in the same
// columns. What is to be quantised stays in registers as bf16 until its row's largest is known, so inputs are read
// once. Several CTAs on an SM hide each other's latency.
//
// Macros: PROLOGUE_<NAME> (what X is), ROWS, CHUNKS, MAX_THREADS (of a CTA: whole warps, as many as K needs), MIN_CTAS
// (of so many threads, that an SM is to hold), PARAMETER_FIELDS (layout.cuh).
#include "whole_rows.cuh"

struct Parameters {
    Prologue prologue;
    uint8_t* values;  // (M, K)
    float* scale;     // (M)
    uint16_t* dense;  // (M, K), or null: what was quantised, to test prologues
    int rows, columns;
};
#include "layout.cuh"

// Where a thread works.
struct WorkCoord {
    static constexpr bool kPadsRows = false;
    int first_row, first_column, column_step;
    int warp_idx, lane_idx, num_warps;

    DEVICE int row(int i) const { return first_row + i; }
    DEVICE int column(int chunk) const { return first_column + chunk * column_step; }
};

DEVICE WorkCoord work_coord() {
    WorkCoord at;
    at.warp_idx = threadIdx.x / 32, at.lane_idx = threadIdx.x % 32, at.num_warps = blockDim.x / 32;
    at.first_row = blockIdx.x * ROWS, at.column_step = blockDim.x * 8, at.first_column = threadIdx.x * 8;
    return at;
}

DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) {
    uint32_t largest;
    asm("max.u16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
    return largest;
}

// Largest of even and of odd columns, as integers, which order as magnitudes do, NaN above Inf.
DEVICE uint32_t largest_of(const uint4& v) {
    constexpr uint32_t magnitude = 0x7FFF7FFFu;
    return max_u16x2(max_u16x2(v.x & magnitude, v.y & magnitude), max_u16x2(v.z & magnitude, v.w & magnitude));
}

// Reduce rows' largest over the CTA, quantise and store.
DEVICE void store_rows(const Parameters& p, const WorkCoord& at, const Row (&rows)[ROWS],
                       const uint4 (&output)[ROWS][CHUNKS], uint32_t (&largest)[ROWS],
                       uint32_t (&smem_largest)[ROWS][kMaxWarps]) {
    unroll<ROWS>([&](auto i) {
        largest[i] = __reduce_max_sync(~0u, max(largest[i] & 0xFFFFu, largest[i] >> 16));
        if (at.lane_idx == 0) smem_largest[i][at.warp_idx] = largest[i];
    });
    __syncthreads();
    unroll<ROWS>([&](auto i) {
        largest[i] = __reduce_max_sync(~0u, at.lane_idx < at.num_warps ? smem_largest[i][at.lane_idx] : 0u);
        if (!rows[i].in_bounds) return;
        const float t = token_scale(largest[i]), inverse = __frcp_rn(t);
        if (threadIdx.x == 0) p.scale[at.first_row + i] = t;
        uint8_t* values = p.values + int64_t(at.first_row + i) * p.columns;
        unroll<CHUNKS>([&](auto chunk) {
            const int column = at.column(chunk);
            const uint4& v = output[i][chunk];
            if (column < p.columns)
                *reinterpret_cast<uint2*>(values + column) =
                    uint2{quantized(v.x, v.y, inverse), quantized(v.z, v.w, inverse)};
        });
    });
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_CTAS) quantize(const __grid_constant__ Parameters p) {
    __shared__ uint32_t smem_largest[ROWS][kMaxWarps];
    const WorkCoord at = work_coord();

    launch_dependents();
    grid_dependency_wait();

    Row rows[ROWS];
    uint4 input[ROWS][CHUNKS][Prologue::kInputs];
    load_rows(p, at, rows, input);
    if constexpr (Prologue::kNeedsMoments) find_moments(p, at, input, rows);
    uint4 output[ROWS][CHUNKS];
    uint32_t largest[ROWS] = {};
    apply_prologue(p, at, rows, input, output);
    unroll<ROWS>([&](auto i) {
        unroll<CHUNKS>([&](auto chunk) { largest[i] = max_u16x2(largest[i], largest_of(output[i][chunk])); });
    });
    store_rows(p, at, rows, output, largest, smem_largest);
}

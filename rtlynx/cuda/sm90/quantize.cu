// X (M, K) bf16, or what a prologue makes of its inputs -> all of it as e4m3 in natural order, and each row's scale t.
//
// A CTA takes ROWS rows at one time. Each thread has CHUNKS vectors of eight neighbours of each row, in the same
// columns. What is to be quantised stays in registers as bf16 until its row's largest is known, so inputs are read
// once. Several CTAs on an SM hide each other's latency.
//
// Macros: PROLOGUE_<NAME> (what X is), ROWS, CHUNKS, MAX_THREADS (of a CTA: whole warps, as many as K needs), MIN_CTAS
// (of so many threads, that an SM is to hold), PARAMETER_FIELDS (layout.cuh).
#include "e4m3.cuh"
#include "prologues.cuh"

constexpr int kMaxWarps = MAX_THREADS / 32;
static_assert(MAX_THREADS % 32 == 0, "sums over a warp are those of whole warps");
static_assert(kMaxWarps <= 32, "a warp reads what the warps found, a lane one of them");
static_assert(!Prologue::kNeedsMoments || Prologue::kInputs == 1, "moments are those of the first input");

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
    int first_row, first_column, column_step;
    int warp_idx, lane_idx, num_warps;

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

DEVICE void load_rows(const Parameters& p, const WorkCoord& at, Row (&rows)[ROWS],
                      uint4 (&input)[ROWS][CHUNKS][Prologue::kInputs]) {
    unroll<ROWS>([&](auto i) {
        rows[i].in_bounds = at.first_row + i < p.rows;
        p.prologue.open_row(rows[i], min(at.first_row + i, p.rows - 1));
        unroll<CHUNKS>([&](auto chunk) {
            const int column = at.column(chunk);
            unroll<Prologue::kInputs>([&](auto j) {
                input[i][chunk][j] = load_once(p.prologue.input_at(rows[i], j, column), column < p.columns);
            });
        });
    });
}

// Moments of the rows, from registers.
DEVICE void find_moments(const Parameters& p, const WorkCoord& at, uint4 (&input)[ROWS][CHUNKS][Prologue::kInputs],
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

// What is to be quantised, and the largest of even and of odd columns of each row.
DEVICE void apply_prologue(const Parameters& p, const WorkCoord& at, const Row (&rows)[ROWS],
                           const uint4 (&input)[ROWS][CHUNKS][Prologue::kInputs], uint4 (&output)[ROWS][CHUNKS],
                           uint32_t (&largest)[ROWS]) {
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
                output[i][chunk] = select(in_row, output[i][chunk], uint4{0, 0, 0, 0});
            largest[i] = max_u16x2(largest[i], largest_of(output[i][chunk]));
            if constexpr (Prologue::kTransforms) {
                if (p.dense != nullptr && rows[i].in_bounds && in_row)
                    *reinterpret_cast<uint4*>(p.dense + int64_t(at.first_row + i) * p.columns + column) =
                        output[i][chunk];
            }
        });
    });
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
    apply_prologue(p, at, rows, input, output, largest);
    store_rows(p, at, rows, output, largest, smem_largest);
}

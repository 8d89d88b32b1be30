// X (M, K) bf16, or what a producer makes of its inputs -> all of it as e4m3 in natural order, and each row's scale t.
//
// A CTA takes ROWS rows at one time, and each thread CHUNKS vectors of eight neighbours of each, the same columns. What
// is to be quantised stays in registers as bf16 until its row's largest is known, so inputs are read once. Several CTAs
// on a multiprocessor hide what one waits for.
//
// Macros: SOURCE (what X is), ROWS, CHUNKS, MAX_THREADS (of a CTA: whole warps, as many as K needs), MIN_CTAS (of so
// many threads, that an SM is to hold), PARAMETER_BYTES (as the host packs them).
#include "e4m3.cuh"
#include "producers.cuh"

constexpr bool CENTRED = SOURCE == ADALN;  // whether moments are about a row's mean, or about zero
constexpr int MAX_WARPS = MAX_THREADS / 32;
static_assert(MAX_WARPS <= 32, "a warp reads what the warps found, a lane one of them");

struct Parameters {
    Source source;
    uint8_t* values;  // (M, K)
    float* scale;     // (M)
    uint16_t* dense;  // (M, K), or null: what was quantised, to test producers
    int rows, columns;
};
static_assert(sizeof(Parameters) == PARAMETER_BYTES, "the host packs them");

DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) {
    uint32_t largest;
    asm("max.u16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
    return largest;
}

// Of even and of odd columns, as integers, which order as magnitudes do, NaN above Inf.
DEVICE uint32_t largest_of(const uint4& v) {
    constexpr uint32_t magnitude = 0x7FFF7FFFu;
    return max_u16x2(max_u16x2(v.x & magnitude, v.y & magnitude), max_u16x2(v.z & magnitude, v.w & magnitude));
}

// Keeps the compiler from holding what it has unpacked of these for the next use: twice the registers.
DEVICE void stay_packed(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

DEVICE float sum_of_warp(float mine) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) mine += __shfl_xor_sync(~0u, mine, distance);
    return mine;  // the same in every lane
}

// Rows' sums over the CTA from each thread's part, in the same order whenever it runs.
DEVICE void sum_rows(float (&parts)[ROWS], float (&shared)[ROWS][MAX_WARPS]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    unroll<ROWS>([&](auto i) {
        parts[i] = sum_of_warp(parts[i]);
        if (lane == 0) shared[i][warp] = parts[i];
    });
    __syncthreads();
    unroll<ROWS>([&](auto i) { parts[i] = sum_of_warp(lane < warps ? shared[i][lane] : 0.f); });
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_CTAS) quantize(const __grid_constant__ Parameters p) {
    __shared__ uint32_t shared_largest[ROWS][MAX_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int first_row = blockIdx.x * ROWS, step = blockDim.x * 8, first_column = threadIdx.x * 8;

    let_next_kernel_start();
    wait_for_previous_kernel();

    Row rows[ROWS];
    uint4 raw[ROWS][CHUNKS][Source::RAWS];
    unroll<ROWS>([&](auto i) {
        rows[i].inside = first_row + i < p.rows;
        p.source.open(rows[i], min(first_row + i, p.rows - 1));
        unroll<CHUNKS>([&](auto chunk) {
            const int column = first_column + chunk * step;
            unroll<Source::RAWS>(
                [&](auto r) { raw[i][chunk][r] = load_once(p.source.at(rows[i], r, column), column < p.columns); });
        });
    });

    if constexpr (Source::MOMENTS) {
        __shared__ float shared_mean[ROWS][MAX_WARPS], shared_m2[ROWS][MAX_WARPS];
        float mean[ROWS] = {}, m2[ROWS] = {};
        if constexpr (CENTRED) {
            unroll<ROWS>([&](auto i) {
                unroll<CHUNKS>([&](auto chunk) {  // zeros where the row has ended
                    const Eight x = unpack(raw[i][chunk][0]);
                    unroll<8>([&](auto j) { mean[i] += x.v[j]; });
                    stay_packed(raw[i][chunk][0]);
                });
            });
            sum_rows(mean, shared_mean);
            unroll<ROWS>([&](auto i) { mean[i] /= float(p.columns); });
        }
        unroll<ROWS>([&](auto i) {
            unroll<CHUNKS>([&](auto chunk) {
                const Eight x = unpack(raw[i][chunk][0]);
                float squares = 0.f;
                unroll<8>([&](auto j) {
                    const float deviation = x.v[j] - mean[i];
                    squares = fmaf(deviation, deviation, squares);
                });
                if (first_column + chunk * step < p.columns) m2[i] += squares;
                stay_packed(raw[i][chunk][0]);
            });
        });
        sum_rows(m2, shared_m2);
        unroll<ROWS>([&](auto i) { p.source.finish(rows[i], {float(p.columns), mean[i], m2[i]}); });
    }

    uint4 made[ROWS][CHUNKS];
    uint32_t largest[ROWS] = {};
    unroll<CHUNKS>([&](auto chunk) {
        const int column = first_column + chunk * step;
        const bool in_row = column < p.columns;
        Source::Modulation modulation = p.source.modulation(rows[0], in_row ? column : 0);
        unroll<ROWS>([&](auto i) {
            if constexpr (Source::MOMENTS && i > 0) {
                if (rows[i].parameters != rows[i - 1].parameters)
                    modulation = p.source.modulation(rows[i], in_row ? column : 0);
            }
            made[i][chunk] = p.source.make(rows[i], modulation, column, raw[i][chunk]);
            if constexpr (Source::MOMENTS) made[i][chunk] = choose(in_row, made[i][chunk], uint4{0, 0, 0, 0});
            largest[i] = max_u16x2(largest[i], largest_of(made[i][chunk]));
            if constexpr (Source::TRANSFORMS) {
                if (p.dense != nullptr && rows[i].inside && in_row)
                    *reinterpret_cast<uint4*>(p.dense + int64_t(first_row + i) * p.columns + column) = made[i][chunk];
            }
        });
    });
    unroll<ROWS>([&](auto i) {
        largest[i] = __reduce_max_sync(~0u, max(largest[i] & 0xFFFFu, largest[i] >> 16));
        if (lane == 0) shared_largest[i][warp] = largest[i];
    });
    __syncthreads();
    unroll<ROWS>([&](auto i) {
        largest[i] = __reduce_max_sync(~0u, lane < warps ? shared_largest[i][lane] : 0u);
        if (!rows[i].inside) return;
        const float t = token_scale(largest[i]), inverse = __frcp_rn(t);
        if (threadIdx.x == 0) p.scale[first_row + i] = t;
        uint8_t* values = p.values + int64_t(first_row + i) * p.columns;
        unroll<CHUNKS>([&](auto chunk) {
            const int column = first_column + chunk * step;
            const uint4& v = made[i][chunk];
            if (column < p.columns)
                *reinterpret_cast<uint2*>(values + column) =
                    uint2{quantized(v.x, v.y, inverse), quantized(v.z, v.w, inverse)};
        });
    });
}

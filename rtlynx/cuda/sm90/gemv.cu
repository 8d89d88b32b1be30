// Y (M, N) = f(X) (M, K) W^T * c + b for few rows M: W (N, K) is e4m3 with a scale c for each output channel, X and Y
// are bf16 or float32, f is SiLU or nothing. Bound by reading W, which is read once for all rows of a pass.
//
// A CTA takes TILE_N output channels, a warp 16 of them and every kSplits-th CHUNK of k. W is operand A of
// m16n8k16 products in bf16, which holds every e4m3 value exactly; rows of X are the COLUMNS of operand B. Which
// k an instruction multiplies is free as long as both operands agree, so a lane's 16 bytes of W lie together, and so do
// its 16 values of X. Partial sums of the warps meet in shared memory.
//
// A float32 row of X takes three columns, whose sum in bf16 it is to its last bit.
//
// Macros: FLOAT32 (0 or 1, of X and Y), THREADS, TILE_N, CHUNK, COLUMNS, PARTS (columns of a row of X), PADDING (of a
// column in shared memory, so that two share no banks), DEPTH (chunks of W that a warp has in flight), MIN_CTAS (that
// an SM is to hold), PARAMETER_FIELDS (layout.cuh), PROLOGUE_IDENTITY (for prologues.cuh, which has SiLU).
#include "e4m3.cuh"
#include "prologues.cuh"

constexpr int kSplits = THREADS / 32 / (TILE_N / 16);
static_assert(CHUNK == 64 && COLUMNS == 8, "a lane's 16 bytes of W, and the columns of a matrix instruction");

struct Parameters {
    const uint8_t* weight;            // (N, K), rows at multiples of 16 bytes
    const float* scale;               // (N)
    const void* bias;                 // (N), or null
    const void* x;                    // (M, K), rows at multiples of 16 bytes
    void* y;                          // (M, N)
    int64_t weight_stride, x_stride;  // of rows, in entries
    int rows, rows_per_pass, n, k;    // k is a multiple of 16
    int bias_is_float32, silu;
};
#include "layout.cuh"

DEVICE int padded_k(const Parameters& p) { return (p.k + CHUNK - 1) / CHUNK * CHUNK; }
DEVICE int smem_stride(const Parameters& p) { return padded_k(p) + PADDING; }

// Zeros beyond K. (By `load_once`, which stays behind `grid_dependency_wait`.)
DEVICE F32x8 load_x(const Parameters& p, int row, int column) {
    const int64_t at = row * p.x_stride + column;
    const bool inside = column < p.k;
    if constexpr (!FLOAT32) return unpack(load_once(static_cast<const uint16_t*>(p.x) + at, inside));
    const float* from = static_cast<const float*>(p.x) + at;
    const uint4 a = load_once(from, inside), b = load_once(from + 4, inside);
    const uint32_t bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    F32x8 v;
#pragma unroll
    for (int i = 0; i < 8; ++i) v.v[i] = __uint_as_float(bits[i]);
    return v;
}

// f(X) of `rows` rows to shared memory, PARTS columns of operand B for each.
DEVICE void stage_x(const Parameters& p, uint32_t smem_x, int first_row, int rows) {
    const int vectors = padded_k(p) / 8;
    for (int i = threadIdx.x; i < rows * vectors; i += THREADS) {
        const int row = i / vectors, column = i % vectors * 8;
        F32x8 v = load_x(p, first_row + row, column);
        if (p.silu) {
#pragma unroll
            for (int j = 0; j < 8; ++j) v.v[j] = silu(v.v[j]);
        }
        uint32_t to = smem_x + 2 * (row * PARTS * smem_stride(p) + column);
#pragma unroll
        for (int part = 0; part < PARTS; ++part, to += 2 * smem_stride(p)) {
            const uint4 rounded = pack(v);
            store_smem_16(to, rounded);
            const F32x8 taken = unpack(rounded);
#pragma unroll
            for (int j = 0; j < 8; ++j) v.v[j] -= taken.v[j];
        }
    }
}

// What a lane reads of W: 16 bytes of two channels in each chunk of its warp.
struct WeightRows {
    const uint8_t* row[2];
    bool in_bounds[2];
    int first_k, end_k;

    DEVICE void load(int step, uint4 (&to)[2]) const {
        const int k = step * (kSplits * CHUNK);
#pragma unroll
        for (int i = 0; i < 2; ++i) to[i] = load_once(row[i] + k, in_bounds[i] && first_k + k < end_k);
    }
};

DEVICE void multiply_chunk(float (&sum)[4], const uint4 (&weight)[2], uint32_t smem_column) {
    const uint4 low = load_smem_16(smem_column), high = load_smem_16(smem_column + 16);
    const uint32_t x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const uint32_t first[4] = {weight[0].x, weight[0].y, weight[0].z, weight[0].w};
    const uint32_t second[4] = {weight[1].x, weight[1].y, weight[1].z, weight[1].w};
    unroll<4>([&](auto j) {
        const uint32_t a[4] = {bf16_of_e4m3(first[j]), bf16_of_e4m3(second[j]), bf16_of_e4m3(first[j] >> 16),
                               bf16_of_e4m3(second[j] >> 16)};
        mma_m16n8k16(sum, a, x[2 * j], x[2 * j + 1]);
    });
}

DEVICE void store_y(const Parameters& p, const float (&smem_sum)[kSplits][TILE_N][COLUMNS + 1], int first_row,
                    int rows) {
    const int channel = threadIdx.x % TILE_N, row = threadIdx.x / TILE_N, n = blockIdx.x * TILE_N + channel;
    if (row >= rows || n >= p.n) return;
    float y = 0.f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int split = 0; split < kSplits; ++split) y += smem_sum[split][channel][row * PARTS + part];
    y *= p.scale[n];
    if (p.bias != nullptr)
        y += p.bias_is_float32 ? static_cast<const float*>(p.bias)[n]
                               : bf16_low(static_cast<const uint16_t*>(p.bias)[n]);
    const int64_t at = int64_t(first_row + row) * p.n + n;
    if constexpr (FLOAT32)
        static_cast<float*>(p.y)[at] = y;
    else
        static_cast<uint16_t*>(p.y)[at] = uint16_t(pack_bf16(y, 0.f));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) gemv(const __grid_constant__ Parameters p) {
    extern __shared__ uint4 smem[];
    __shared__ float smem_sum[kSplits][TILE_N][COLUMNS + 1];
    const uint32_t smem_x = smem_address(smem);
    const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32, split = warp_idx % kSplits;
    const int group = lane_idx / 4, first_channel = warp_idx / kSplits * 16 + group;
    const int first_row = blockIdx.y * p.rows_per_pass, rows = min(p.rows_per_pass, p.rows - first_row);

    WeightRows weight;
    weight.first_k = split * CHUNK + lane_idx % 4 * 16, weight.end_k = p.k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int n = blockIdx.x * TILE_N + first_channel + 8 * i;
        weight.in_bounds[i] = n < p.n;
        weight.row[i] = p.weight + min(n, p.n - 1) * p.weight_stride + weight.first_k;
    }

    launch_dependents();
    grid_dependency_wait();

    uint4 loaded[DEPTH][2];
    unroll<DEPTH>([&](auto i) { weight.load(i, loaded[i]); });
    stage_x(p, smem_x, first_row, rows);
    __syncthreads();

    // (Columns without a row of X repeat the last one; nobody reads their sums.)
    const uint32_t smem_column = smem_x + 2 * (min(group, rows * PARTS - 1) * smem_stride(p) + weight.first_k);
    const int steps = (padded_k(p) / CHUNK - split + kSplits - 1) / kSplits;
    float sum[4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += DEPTH) {
        unroll<DEPTH>([&](auto i) {
            if (step + i >= steps) return;
            multiply_chunk(sum, loaded[i], smem_column + 2 * (step + i) * (kSplits * CHUNK));
            weight.load(step + i + DEPTH, loaded[i]);
        });
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) smem_sum[split][first_channel + i / 2 * 8][lane_idx % 4 * 2 + i % 2] = sum[i];
    __syncthreads();
    store_y(p, smem_sum, first_row, rows);
}

// What LoRAs add beside layers that read one quantised input: T = Xq A of values Xq (M, K) in e4m3, and each layer's B
// by its channels' scales, in the tiles that the product by a 2:4-sparse weight reads (rtlynx/math/tiles.py).
//
// CTAs of two kinds. Some make T: each of BLOCK_M rows by COLUMNS columns, a cluster shares their K. Four pairs of
// warps have 32 rows each, and the warps of a pair take turns along K. Operands go from L2 to registers: e4m3 becomes
// bf16, which holds it, and A stays bf16. Within 64 entries of K lane 4g + q holds 16 q ... + 15 of both operands, so
// that it loads 16 bytes at a time. The other CTAs pack 64 rows of B each.
//
// Macros: COLUMNS (of T of a CTA; more in gridDim.y), THREADS, BLOCK_M, BLOCK_K (of K that a CTA takes at a time),
// PITCH (float32 of a row of T in shared memory), MAX_PIECES, MAX_LAYERS (of a launch), PARAMETER_FIELDS (layout.cuh).
#include "e4m3.cuh"

constexpr int kWarpM = 32, kWarpK = 64, kColumnTiles = COLUMNS / 8;
static_assert(THREADS == BLOCK_M / kWarpM * 64 && BLOCK_K == 2 * kWarpK, "a pair of warps for each kWarpM rows");
constexpr int kBlockColumns = 32, kBlockBytes = 64 * kBlockColumns * 2;  // of a tile of B
static_assert(COLUMNS % 8 == 0, "a matrix instruction makes eight columns");

// A LoRA. Its columns of T are `column` ... + rank - 1.
struct Piece {
    const uint16_t* lowrank_a;  // A^T (rank, K)
    const uint16_t* lowrank_b;  // B (N, rank)
    int rank, column;
};

// A layer. Its LoRAs lie side by side in T.
struct Layer {
    const float* weight_scale;  // (N)
    int64_t first_byte;         // of its tiles
    int n, rank, column, tile_end;
};

struct Parameters {
    const uint8_t* values;     // (M, K)
    const float* token_scale;  // (M), or null: T is of the values alone
    const float* scalings;     // one a piece, or null: all 1
    uint16_t* lowrank;         // (M, columns)
    uint8_t* packed_b;
    int rows, k, columns, num_pieces, num_layers, lowrank_ctas;
    Piece piece[MAX_PIECES];
    Layer layer[MAX_LAYERS];
};
#include "layout.cuh"

// Whose column of T it is; -1 where it is between layers.
DEVICE int piece_of(const Parameters& p, int column) {
    for (int i = 0; i < p.num_pieces; ++i)
        if (column >= p.piece[i].column && column < p.piece[i].column + p.piece[i].rank) return i;
    return -1;
}

DEVICE uint4 load_16(const void* from, bool inside) {
    return inside ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}

template <int kIndex>
DEVICE uint32_t word(const uint4& v) {
    return kIndex == 0 ? v.x : kIndex == 1 ? v.y : kIndex == 2 ? v.z : v.w;
}

using Accumulators = float[2][kColumnTiles][4];  // of 16 rows by 8 columns each

// T of this warp's rows over its share of K.
DEVICE void multiply(const Parameters& p, int first_row, int first_column, Accumulators& accum) {
    const int lane_idx = threadIdx.x % 32, quad_idx = lane_idx / 4, quad_lane = lane_idx % 4;
    const uint8_t* rows[4];
    unroll<4>([&](auto i) {
        const int row = min(first_row + quad_idx + i * 8, p.rows - 1);
        rows[i] = p.values + int64_t(row) * p.k + quad_lane * 16;
    });
    const uint16_t* factors[kColumnTiles];
    unroll<kColumnTiles>([&](auto n) {
        const int column = first_column + n * 8 + quad_idx, piece = piece_of(p, column);
        factors[n] = nullptr;
        if (piece >= 0)
            factors[n] = p.piece[piece].lowrank_a + int64_t(column - p.piece[piece].column) * p.k + quad_lane * 16;
    });
    const int step = cluster_size() * BLOCK_K, last = p.k - quad_lane * 16;
    int k = cluster_rank() * BLOCK_K + threadIdx.x / 32 % 2 * kWarpK;
    uint4 next[4];
    unroll<4>([&](auto i) { next[i] = load_16(rows[i] + k, k < last); });
#pragma unroll 1
    for (; k < p.k; k += step) {
        uint4 x[4], a[kColumnTiles][2];
        unroll<kColumnTiles>([&](auto n) {
            const bool inside = factors[n] != nullptr && k < last;
            unroll<2>([&](auto half) { a[n][half] = load_16(factors[n] + k + half * 8, inside); });
        });
        unroll<4>([&](auto i) {
            x[i] = next[i];
            next[i] = load_16(rows[i] + k + step, k + step < last);
        });
        unroll<4>([&](auto k16) {
            constexpr int w = decltype(k16)::value;
            unroll<2>([&](auto m16) {
                const uint32_t low = word<w>(x[m16 * 2]), high = word<w>(x[m16 * 2 + 1]);
                const uint32_t of_x[4] = {bf16_of_e4m3(low), bf16_of_e4m3(high), bf16_of_e4m3(low >> 16),
                                          bf16_of_e4m3(high >> 16)};
                unroll<kColumnTiles>([&](auto n) {
                    const uint4& four = a[n][w / 2];
                    mma_m16n8k16(accum[m16][n], of_x, word<w % 2 * 2>(four), word<w % 2 * 2 + 1>(four));
                });
            });
        });
    }
}

// Sum the two parts of each pair of warps into shared memory.
DEVICE void gather_parts(const Accumulators& accum, float* smem) {
    const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
    float* to = smem + (warp_idx / 2 * kWarpM + lane_idx / 4) * PITCH + lane_idx % 4 * 2;
    unroll<2>([&](auto turn) {
        if (warp_idx % 2 == turn) {
            unroll<2>([&](auto m16) {
                unroll<kColumnTiles>([&](auto n) {
                    unroll<4>([&](auto i) {
                        float& sum = to[(m16 * 16 + i / 2 * 8) * PITCH + n * 8 + i % 2];
                        sum = turn == 0 ? accum[m16][n][i] : sum + accum[m16][n][i];
                    });
                });
            });
        }
        __syncthreads();
    });
}

DEVICE void make_lowrank(const Parameters& p) {
    extern __shared__ __align__(16) float smem[];
    __shared__ float smem_scalings[COLUMNS];
    const int num_ctas = cluster_size(), cta_rank = cluster_rank();
    const int first_row = blockIdx.x / num_ctas * BLOCK_M, first_column = blockIdx.y * COLUMNS;
    if (threadIdx.x < COLUMNS) {
        const int piece = p.scalings == nullptr ? -1 : piece_of(p, first_column + threadIdx.x);
        smem_scalings[threadIdx.x] = piece < 0 ? 1.f : p.scalings[piece];
    }
    Accumulators accum = {};
    multiply(p, first_row + threadIdx.x / 64 * kWarpM, first_column, accum);
    gather_parts(accum, smem);
    cluster_sync();
    // Each CTA finishes every num_ctas-th row, a thread eight columns at a time.
    for (int task = threadIdx.x; task < BLOCK_M / num_ctas * kColumnTiles; task += THREADS) {
        const int chunk = task % kColumnTiles, row = cta_rank + task / kColumnTiles * num_ctas;
        const uint32_t own_part = smem_address(smem + row * PITCH + chunk * 8);
        float sum[8] = {};
        for (int cta = 0; cta < num_ctas; ++cta) {
            const uint32_t from = map_to_cta(own_part, cta);
            const float4 low = load_cluster_smem(from), high = load_cluster_smem(from + 16);
            const float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            unroll<8>([&](auto i) { sum[i] += part[i]; });
        }
        const int column = first_column + chunk * 8;
        if (first_row + row >= p.rows || column >= p.columns) continue;
        const float t = p.token_scale == nullptr ? 1.f : p.token_scale[first_row + row];
        unroll<8>([&](auto i) { sum[i] = sum[i] * t * smem_scalings[chunk * 8 + i]; });
        *reinterpret_cast<uint4*>(p.lowrank + int64_t(first_row + row) * p.columns + column) = uint4{
            pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
    }
    cluster_sync();  // no CTA leaves while another reads its shared memory
}

// B / c of 64 rows of a layer.
DEVICE void pack_b(const Parameters& p, int tile) {
    int layer = 0, tile_begin = 0;
    while (layer < p.num_layers && tile >= p.layer[layer].tile_end) tile_begin = p.layer[layer++].tile_end;
    if (layer == p.num_layers) return;
    const int n = p.layer[layer].n, rank = p.layer[layer].rank,
              rank_blocks = (rank + kBlockColumns - 1) / kBlockColumns;
    const int row_in_tile = threadIdx.x / 4, chunk = threadIdx.x % 4, m64 = tile - tile_begin;
    const int row = m64 * 64 + row_in_tile;
    const float c = row < n ? p.layer[layer].weight_scale[row] : 1.f;
    uint8_t* to = p.packed_b + p.layer[layer].first_byte + int64_t(m64) * rank_blocks * kBlockBytes + row_in_tile * 64 +
                  ((chunk ^ row_in_tile >> 1) & 3) * 16;
    for (int block = 0; block < rank_blocks; ++block, to += kBlockBytes) {
        float values[8];
        unroll<8>([&](auto i) {
            const int column = block * kBlockColumns + chunk * 8 + i;
            values[i] = 0.f;
            if (row >= n || column >= rank) return;
            const Piece& of = p.piece[piece_of(p, p.layer[layer].column + column)];
            const int own = p.layer[layer].column + column - of.column;
            values[i] = bf16_low(of.lowrank_b[int64_t(row) * of.rank + own]) / c;
        });
        *reinterpret_cast<uint4*>(to) = uint4{pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                                              pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7])};
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) lora(const __grid_constant__ Parameters p) {
    launch_dependents();
    grid_dependency_wait();
    const int block = blockIdx.x;
    if (block < p.lowrank_ctas)
        make_lowrank(p);
    else if (blockIdx.y == 0)
        pack_b(p, block - p.lowrank_ctas);
}

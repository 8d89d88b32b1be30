// What the GEMM's warps agree on: parameters, shared memory layout, tile scheduler, pipeline state.
#pragma once
#include "wgmma.cuh"

constexpr int kWgmmaM = 64;                   // rows of one wgmma, of a packed block and of a block of T'
constexpr int kWgmmaSparseK = FP8 ? 64 : 32;  // logical
constexpr int BLOCK_K = FP8 ? 128 : 64;       // logical k of a stage
constexpr int kNumConsumerWarpgroups = CONSUMER_WARPS / 4;
constexpr int kM64PerTile = BLOCK_M / kWgmmaM;
constexpr int kM64PerWarpgroup = kM64PerTile / kNumConsumerWarpgroups;  // in the accumulators of a warpgroup
constexpr int kNumConsumerThreads = CONSUMER_WARPS * 32, kNumProducerThreads = THREADS - kNumConsumerThreads;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 168 at entry

// A packed block holds 64 rows x BLOCK_K: 64 bytes of kept values a row, then the metadata.
constexpr int kMetadataOffset = kWgmmaM * 64;
constexpr int kMetadataWords = FP8 ? 2 : 1;  // of a thread
constexpr int kPackedBlockBytes = kMetadataOffset + 512 * kMetadataWords;
constexpr int kLowrankBlockK = 32;  // columns of T' in a block, and ranks of a stage
constexpr int kLowrankBlockBytes = kWgmmaM * kLowrankBlockK * 2;

// A stage: kM64PerTile packed blocks, BLOCK_N rows of W. A stage of the low-rank product lies in the same places.
constexpr int kABytes = kM64PerTile * kPackedBlockBytes;
constexpr int kWeightBytes = BLOCK_N * 128;
constexpr int kLowrankBBytes = BLOCK_N * kLowrankBlockK * 2;
constexpr int kStageBytes = kABytes + kWeightBytes;

// Behind the stages, for each consumer warp: 16 rows x 64 columns on their way out, the scale and bias of a tile's
// columns, a TileInfo. Last come the barriers.
constexpr int kStagingBytes = 16 * 64 * 2;
constexpr int kAffineBytes = FP8 ? BLOCK_N * 8 : 0;
constexpr int kTileInfoBytes = 32;
constexpr int kStagingOffset = NUM_STAGES * kStageBytes;
constexpr int kAffineOffset = kStagingOffset + CONSUMER_WARPS * kStagingBytes;
constexpr int kTileInfoOffset = kAffineOffset + CONSUMER_WARPS * kAffineBytes;
constexpr int kBarrierOffset = kTileInfoOffset + CONSUMER_WARPS * kTileInfoBytes;
constexpr int kSmemBytes = kBarrierOffset + NUM_STAGES * 2 * 8;

static_assert(BLOCK_K == 2 * kWgmmaSparseK, "a stage is two sparse wgmmas");
static_assert(BLOCK_K * (FP8 ? 1 : 2) == 128, "a row of W in a stage is one span of the 128-byte swizzle");
static_assert(kABytes % 1024 == 0 && kStageBytes % 1024 == 0, "the 128-byte swizzle repeats every 1024 bytes");
static_assert(kPackedBlockBytes % 512 == 0 && kLowrankBlockBytes % 512 == 0,
              "the 64-byte swizzle repeats every 512 bytes");
static_assert(kLowrankBlockBytes <= kPackedBlockBytes && kLowrankBBytes <= kWeightBytes,
              "a stage of the low-rank product has room where X~ and W lie");
static_assert(BLOCK_N <= 256, "a TMA box has at most 256 rows");
static_assert(kNumProducerThreads == 128, "the producer is a warpgroup, of other registers");
static_assert(kM64PerTile <= 32, "each lane of the producer warp copies one packed block");
static_assert(NUM_STAGES >= 2, "a stage is released when the next one's wgmmas have been issued");
static_assert(SKEW >= 1 && SKEW <= NUM_STAGES, "the first warpgroup issues SKEW stages before the second frees one");
static_assert(kSmemBytes == SHARED_BYTES, "the host gives a CTA as much shared memory as it divides here");
static_assert(kSmemBytes <= 227 * 1024, "a CTA has 227 KB of shared memory");
static_assert(kNumProducerThreads * kProducerRegisters + kNumConsumerThreads * kConsumerRegisters <= 64 * 1024,
              "an SM has 64 K registers");

// Columns [previous column_end, column_end) of Y: one layer of several that share an input.
struct Layer {
    int column_end;
    int tile_end;          // column tiles up to here; where TRANSPOSED row tiles
    int first_rank_block;  // its columns of T', in blocks
    int rank_blocks;
};

struct Parameters {
    TensorMap weight[MAX_LAYERS];     // box (BLOCK_K, BLOCK_N rows), 128-byte swizzle
    TensorMap lowrank_b[MAX_LAYERS];  // box (kLowrankBlockK, BLOCK_N rows), 64-byte swizzle
    // The sparse operand: one for all layers, or one a layer where TRANSPOSED.
    const uint8_t* packed_a[MAX_LAYERS];  // (blocks of 64 rows, k_blocks) packed blocks
    const uint8_t* lowrank[MAX_LAYERS];  // (blocks of 64 rows, total_rank_blocks) blocks of T'; of B' as many as it has
    const float* scale[MAX_LAYERS];      // (M), or null for s = 1; where TRANSPOSED c, found as a bias is
    uint16_t* out;                       // (M, N), contiguous
    // One a layer, found at columns of Y: the host has moved the addresses back by those before the layer.
    const void* bias[MAX_LAYERS];           // bf16 or float32, or null
    const float* column_scale[MAX_LAYERS];  // with FP8, else null; where TRANSPOSED (M), t
    int rows, columns;  // M, and N in memory: rows of Y are stored 16 bytes at a time, so every layer's end is a
                        // multiple of 8, but the last where TRANSPOSED
    int k_blocks, total_rank_blocks;
    int num_m_tiles, num_n_tiles, m_tiles_per_swizzle;
    int whole_tiles;                            // the first of them; the rest are split along k
    int split_tiles, split_ctas, split_stages;  // how many, among how many CTAs, stages of each
    float4* workspace;  // (split_ctas, CONSUMER_WARPS, kM64PerWarpgroup, BLOCK_N / 8, 32) partial sums
    uint64_t* ready;    // (split_ctas, CONSUMER_WARPS): `nonce` where a warp's sums are there
    uint64_t nonce;     // a random number of this launch, so that `ready` need not be initialised
    int bias_is_float, num_layers;
    Layer layer[MAX_LAYERS];
};
#include "layout.cuh"

// ---- tile scheduler --------------------------------------------------------------------------------------

struct Tile {
    int first_m64, num_m64;  // of the sparse operand
    int row, column, column_end;
    int layer, dense_row;  // whose columns of Y these are, and the first row of the dense operand
    int first_rank_block, rank_blocks;
};

// Which of the sparse operands is a layer's.
DEVICE int sparse_of(int layer) { return TRANSPOSED ? layer : 0; }

// Where a layer's rows of tiles end.
DEVICE int row_end(const Parameters& p, int layer) { return TRANSPOSED ? p.layer[layer].column_end : p.rows; }

// Row tiles run fastest inside bands of `m_tiles_per_swizzle`, so that what runs at one time shares operands in L2.
DEVICE Tile get_tile(const Parameters& p, int tile_idx) {
    const int band = tile_idx / (p.m_tiles_per_swizzle * p.num_n_tiles);
    const int first_m_tile = band * p.m_tiles_per_swizzle;
    const int band_m_tiles = min(p.m_tiles_per_swizzle, p.num_m_tiles - first_m_tile);
    const int idx_in_band = tile_idx - first_m_tile * p.num_n_tiles;
    const int n_tile = idx_in_band / band_m_tiles;
    const int m_tile = first_m_tile + idx_in_band - n_tile * band_m_tiles;
    const int tile_of_layers = TRANSPOSED ? m_tile : n_tile;
    Tile tile;
    tile.layer = 0;
    while (tile_of_layers >= p.layer[tile.layer].tile_end) ++tile.layer;
    const Layer& layer = p.layer[tile.layer];
    const int first_tile = tile.layer ? p.layer[tile.layer - 1].tile_end : 0;
    const int first_column = tile.layer ? p.layer[tile.layer - 1].column_end : 0;  // of Y
    const int first_row = TRANSPOSED ? first_column : 0;
    tile.first_m64 = (TRANSPOSED ? m_tile - first_tile : m_tile) * kM64PerTile;
    tile.row = first_row + tile.first_m64 * kWgmmaM;
    tile.num_m64 = min(kM64PerTile, (row_end(p, tile.layer) - tile.row + kWgmmaM - 1) / kWgmmaM);
    tile.dense_row = (TRANSPOSED ? n_tile : n_tile - first_tile) * BLOCK_N;
    tile.column = TRANSPOSED ? tile.dense_row : first_column + tile.dense_row;
    tile.column_end = TRANSPOSED ? p.rows : layer.column_end;
    tile.first_rank_block = layer.first_rank_block;
    tile.rank_blocks = layer.rank_blocks;
    return tile;
}

// threadIdx.x, read anew: what is derived from it is not kept in registers through the main loop.
DEVICE int reload_thread_idx() {
    int thread_idx;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_idx));
    return thread_idx;
}

// gridDim.x, likewise.
DEVICE int reload_num_ctas() {
    int num_ctas;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(num_ctas));
    return num_ctas;
}

enum class TilePart { kWhole, kBeginning, kEnd };

// Stages [k_begin, k_end) of a tile. The end of a tile waits for the CTAs from `peer` on to this one.
struct WorkTile {
    int tile_idx, k_begin, k_end, peer;
    TilePart part;
};

DEVICE int split_begin(const Parameters& p, int cta) { return cta * (p.split_tiles * p.split_stages) / p.split_ctas; }

// How many work tiles this CTA may have.
DEVICE int num_work_tiles(const Parameters& p) {
    const int cta = blockIdx.x, num_ctas = reload_num_ctas();
    return 2 + max(0, (p.whole_tiles - cta + num_ctas - 1) / num_ctas);
}

// Work tile `work_idx` of `num_work` of this CTA, false where there is none. The last but one is the beginning of a
// split tile, the last the end of one. CTAs start in order, so one that waits for those before it cannot wait for ever.
DEVICE bool get_work_tile(const Parameters& p, int work_idx, int num_work, WorkTile& work) {
    const int cta = blockIdx.x, num_ctas = reload_num_ctas();
    if (work_idx < num_work - 2) {
        work = {cta + work_idx * num_ctas, 0, 1 << 30, 0, TilePart::kWhole};
        return true;
    }
    if (cta >= p.split_ctas) return false;
    const int begin = split_begin(p, cta), end = split_begin(p, cta + 1), stages = p.split_stages;
    const int tile = begin / stages, tile_begin = tile * stages, tile_end = tile_begin + stages;
    if (work_idx == num_work - 2) {
        if (end == tile_end) return false;
        const bool next = end > tile_end;
        work = {p.whole_tiles + tile + next, next ? 0 : begin - tile_begin, end - (next ? tile_end : tile_begin), 0,
                TilePart::kBeginning};
        return true;
    }
    if (end < tile_end) return false;
    // The last CTA whose split begins at or before the tile's beginning.
    const int peer = ((tile_begin + 1) * p.split_ctas - 1) / (p.split_tiles * stages);
    work = {p.whole_tiles + tile, begin - tile_begin, stages, peer, peer < cta ? TilePart::kEnd : TilePart::kWhole};
    return true;
}

// ---- pipeline --------------------------------------------------------------------------------------------

// A place in the ring of stages; `phase` flips at every turn.
struct PipelineState {
    uint32_t smem_base;
    int stage_idx = 0;
    uint32_t phase = 0;

    DEVICE uint32_t smem_stage() const { return smem_base + stage_idx * kStageBytes; }
    DEVICE uint32_t full_barrier() const { return smem_base + kBarrierOffset + stage_idx * 8; }
    DEVICE uint32_t empty_barrier() const { return smem_base + kBarrierOffset + (NUM_STAGES + stage_idx) * 8; }
    DEVICE uint32_t previous_empty_barrier() const {
        return smem_base + kBarrierOffset + (NUM_STAGES + (stage_idx == 0 ? NUM_STAGES : stage_idx) - 1) * 8;
    }
    DEVICE void advance() {
        if (++stage_idx == NUM_STAGES) {
            stage_idx = 0;
            phase ^= 1;
        }
    }
};

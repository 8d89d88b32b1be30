// What the compress kernel reads: parameters, which columns a lane holds, and their way into shared memory.
#pragma once
#if RANK > 0
#define BLOCK_N RANK
#include "wgmma.cuh"
#endif
#include "compress_parameters.cuh"

// With a low-rank product or FP8 a CTA is one warpgroup on 64 rows, and the CTAs of a cluster split K. Else the warps
// of a CTA split the K of the same 16 rows.
constexpr bool kClusterSplitsK = RANK > 0 || FP8;
constexpr int kNumWarps = THREADS / 32;
constexpr int BLOCK_M = kClusterSplitsK ? 64 : 16;  // rows of a CTA
constexpr int kKSplitsPerCta = kClusterSplitsK ? 1 : kNumWarps;

// A warp compresses a k tile at a time: 16 rows x kTileK, which are kNumK32 times 32 columns.
constexpr int kNumK32 = MODE == ADJACENT ? 2 : 4;
constexpr int kTileK = kNumK32 * 32;
constexpr int kGroupsPerLane = kNumK32 * 2;  // groups of four of one of a lane's two rows

// K is split by chunks: the least that is whole k tiles and whole packed blocks.
constexpr int kChunkK = kTileK > BLOCK_K ? kTileK : BLOCK_K;
constexpr int kTilesPerChunk = kChunkK / kTileK, kBlocksPerChunk = kChunkK / BLOCK_K;

// A stage: a k tile of each input of the prologue, then of A^T. Both lie 32 columns, 64 bytes of a row, at a time.
constexpr int kInputK32Bytes = BLOCK_M * 64, kLowrankAK32Bytes = RANK * 64;
constexpr int kInputBytes = kNumK32 * kInputK32Bytes;
constexpr int kStageBytes = Prologue::kInputs * kInputBytes + kNumK32 * kLowrankAK32Bytes;

#if RANK > 0
constexpr int kLowrankBlockK = 32, kLowrankBlockBytes = 64 * kLowrankBlockK * 2;  // of a block of T'
constexpr int kLowrankPitch = RANK + 4;  // float32 of a row of T in shared memory, so that rows lie in other banks
static_assert(RANK % kLowrankBlockK == 0, "a CTA stores whole blocks of T'");
static_assert(kInputK32Bytes % 512 == 0 && kLowrankAK32Bytes % 512 == 0,
              "the 64-byte swizzle of wgmma operands repeats every 512 bytes");
#endif

// Shared memory, but for what waits of tiles of K: the ring of stages of a CTA or of each warp, later T.
#if RANK > 0
constexpr int kTBytes = BLOCK_M * kLowrankPitch * 4;
#else
constexpr int kTBytes = 0;
#endif
constexpr int kStagesBytes = kKSplitsPerCta * NUM_STAGES * kStageBytes;
static_assert(SHARED_BYTES == (kStagesBytes > kTBytes ? kStagesBytes : kTBytes),
              "the host gives a CTA as much shared memory as it divides here");

static_assert(kTileK % BLOCK_K == 0 || BLOCK_K % kTileK == 0, "a chunk is both");
static_assert(!FP8 || kBlocksPerChunk == 1, "with FP8 what is deferred counts chunks as packed blocks");
static_assert(MODE != GATHER || !Prologue::kTransforms, "a prologue reads 16 bytes at a time");
static_assert(NUM_STAGES >= 2, "loads run ahead of the main loop");
static_assert(THREADS >= BLOCK_M, "a thread finishes a row");
static_assert(!kClusterSplitsK || kNumWarps == 4, "a CTA is one warpgroup");

// First of the eight columns that a lane of a quad holds in each 32 columns of a k tile; at least p.columns where there
// are none.
struct LaneColumns {
    int base, stride;

    DEVICE int operator[](int k32) const { return base + k32 * stride; }
};

DEVICE LaneColumns lane_columns(const Parameters& p, int k_tile, int quad_lane) {
    if constexpr (MODE == ADJACENT) {
        return {k_tile * kTileK + quad_lane * 8, 32};
    } else {
        const int group = k_tile * 32 + quad_lane * 8;
        if (group * 4 >= p.columns) return {p.columns, 0};
        const GroupColumns first = strided_group(p, group);
        return {first.base, first.stride};
    }
}

// An element at a time: entry `k32` of this lane's eight groups of a row.
DEVICE uint4 gather(const Parameters& p, const uint16_t* row, int k_tile, int quad_lane, int k32) {
    uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int group = k_tile * 32 + quad_lane * 8 + j;
        if (row == nullptr || group * 4 >= p.columns) continue;
        const GroupColumns of = p.adjacent ? GroupColumns{group * 4, 1} : strided_group(p, group);
        pairs[j / 2] |= uint32_t(row[of.base + k32 * of.stride]) << (j % 2 * 16);
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Which k tiles a CTA or warp works on: every `num_splits`-th chunk.
struct KSplit {
    int split_idx, num_splits, num_k_tiles;

    DEVICE KSplit(const Parameters& p, int split_idx, int num_splits) : split_idx(split_idx), num_splits(num_splits) {
        const int chunks = (p.k_blocks + kBlocksPerChunk - 1) / kBlocksPerChunk;
        num_k_tiles = own_chunks(chunks) * kTilesPerChunk;
    }
    // How many of the first `chunks` chunks are its own.
    DEVICE int own_chunks(int chunks) const { return (chunks - split_idx + num_splits - 1) / num_splits; }
    // Of its k tiles, those in chunks that do not reach beyond the matrix.
    DEVICE int num_whole_k_tiles(int columns) const { return own_chunks(columns / kChunkK) * kTilesPerChunk; }
    // Its k tile number `index`.
    DEVICE int k_tile(int index) const {
        return (split_idx + index / kTilesPerChunk * num_splits) * kTilesPerChunk + index % kTilesPerChunk;
    }
};

// First of this lane's two rows, within the CTA. The other is 8 below.
DEVICE int lane_row() { return (kClusterSplitsK ? threadIdx.x / 32 * 16 : 0) + threadIdx.x % 32 / 4; }

// Start loading a k tile into a stage: what this thread selects from, and its part of A^T.
DEVICE void load_k_tile_async(const Parameters& p, uint32_t smem_stage, int k_tile, const Row (&rows)[2],
                              int first_rank) {
    const int quad_lane = threadIdx.x % 4, row = lane_row();
    const LaneColumns columns = lane_columns(p, k_tile, quad_lane);
    unroll<2>([&](auto i) {
        unroll<kNumK32>([&](auto k32) {
            const uint32_t to = smem_stage + k32 * kInputK32Bytes + swizzle_64b(row + i * 8, quad_lane);
            if constexpr (MODE == GATHER) {
                store_smem_16(to, gather(p, rows[i].in_bounds ? rows[i].input[0] : nullptr, k_tile, quad_lane, k32));
            } else {
                const bool in_bounds = rows[i].in_bounds && columns[k32] < p.columns;
                unroll<Prologue::kInputs>([&](auto input) {
                    const uint16_t* from = in_bounds ? p.prologue.input_at(rows[i], input, columns[k32])
                                                     : p.prologue.input_at(rows[i], input, 0);
                    cp_async(to + input * kInputBytes, from, in_bounds && p.prologue.reads(input, columns[k32]));
                });
            }
        });
    });
    if constexpr (RANK > 0) {
        const uint32_t smem_lowrank_a = smem_stage + Prologue::kInputs * kInputBytes;
        unroll<kNumK32>([&](auto k32) {
#pragma unroll
            for (int n = threadIdx.x / 4; n < RANK; n += THREADS / 4) {
                const bool in_bounds = first_rank + n < p.rank && columns[k32] < p.columns;
                const uint16_t* from = p.lowrank_a + int64_t(in_bounds ? first_rank + n : 0) * p.columns;
                const uint32_t to = smem_lowrank_a + k32 * kLowrankAK32Bytes + swizzle_64b(n, quad_lane);
                if constexpr (MODE == GATHER)
                    store_smem_16(to, gather(p, first_rank + n < p.rank ? from : nullptr, k_tile, quad_lane, k32));
                else
                    cp_async(to, from + (in_bounds ? columns[k32] : 0), in_bounds);
            }
        });
    }
}

// Where a thread works.
struct WorkCoord {
    int warp_idx, quad_idx, quad_lane;
    int cta_rank, num_ctas;  // of the cluster
    int m64, m16;            // 64 rows of X, and which 16 of them are this warp's
    int first_row;           // of X, of this CTA
    int row;                 // in the CTA: the first of this lane's two, the other is 8 below
    int k_split_in_cta;
    int first_rank;        // of the columns of T' of this CTA
    bool stores_packed_a;  // one CTA does, of those with different columns of T'
};

DEVICE WorkCoord work_coord() {
    const int lane_idx = threadIdx.x % 32;
    WorkCoord at;
    at.warp_idx = threadIdx.x / 32, at.quad_idx = lane_idx / 4, at.quad_lane = lane_idx % 4;
    at.row = lane_row();
    at.num_ctas = kClusterSplitsK ? cluster_size() : 1;
    at.cta_rank = kClusterSplitsK ? cluster_rank() : 0;
    at.k_split_in_cta = kClusterSplitsK ? 0 : at.warp_idx;
    at.m64 = kClusterSplitsK ? blockIdx.x / at.num_ctas : blockIdx.x / 4;
    at.m16 = kClusterSplitsK ? at.warp_idx : blockIdx.x % 4;
    at.first_row = kClusterSplitsK ? at.m64 * BLOCK_M : blockIdx.x * BLOCK_M;
    at.stores_packed_a = RANK == 0 || blockIdx.y == 0;
    at.first_rank = blockIdx.y * RANK;
    return at;
}

// The ring of stages in shared memory, of a CTA or of a warp.
struct StageRing {
    uint32_t smem_begin, smem_next;

    DEVICE uint32_t after(uint32_t smem_stage) const {
        return smem_stage + kStageBytes == smem_begin + NUM_STAGES * kStageBytes ? smem_begin
                                                                                 : smem_stage + kStageBytes;
    }
    // Start loading k tile number `index` of a split into the next stage.
    DEVICE void load_async(const Parameters& p, const KSplit& k_split, int index, const Row (&rows)[2],
                           int first_rank) {
        if (index < k_split.num_k_tiles) load_k_tile_async(p, smem_next, k_split.k_tile(index), rows, first_rank);
        cp_async_commit();
        smem_next = after(smem_next);
    }
};

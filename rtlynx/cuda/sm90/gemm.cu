// Y = s * (X~ W^T + T' B^T) + b. X~ is 2:4-sparse bf16 in packed blocks; W (N, K), B (N, r) and Y (M, N) are bf16.
// Up to MAX_LAYERS layers that read one X~, each with a W, B and b of its own, lie beside each other in Y.
// With FP8 X~ and W are e4m3, and columns have a scale too: Y = s * (X~ W^T + T' B'^T) * c + b. T' and B' are bf16.
//
// Persistent, one CTA an SM, stream-K (Osama et al. 2023) for the last, incomplete wave: its tiles are cut along k
// into equal splits for all CTAs. After its whole tiles each CTA computes the beginning of some tile and leaves its
// partial sums in a workspace. Then it computes the end of another tile, and adds what the CTAs before it have left,
// in order.
//
// Warp-specialised: a producer warp fills a ring of stages by bulk copies and TMA. A stage holds, for one BLOCK_K, up
// to four packed blocks of 64 rows (values and metadata together) and BLOCK_N rows of W. Two consumer warpgroups own
// two wgmma tiles of 64 rows each of the BLOCK_M x BLOCK_N tile, and read both operands from shared memory. The
// low-rank branch is rank / 32 more stages of dense k in the same accumulators. The second warpgroup runs SKEW stages
// behind the first, so that one multiplies at the full rate while the other stores its part of the tile.
//
// With TRANSPOSED the sparse operand is a weight (N, K), in e4m3, and the dense one all of X (M, K): rows of a tile are
// output channels, columns tokens, and the epilogue turns them: Y is (M, N) all the same (gemm_transposed.cuh). A
// low-rank product has its factors the other way round, too: packed tiles of B, and T in the place of B. Layers that
// read one X then lie below each other in tiles, and beside each other in Y all the same.
//
// Macros: FP8 (0 or 1), BLOCK_M, BLOCK_N, NUM_STAGES, SKEW, CONSUMER_WARPS, THREADS, SHARED_BYTES, STORE_N (columns
// that a warp stores at a time), MAX_LAYERS (of a product), PARAMETER_FIELDS (layout.cuh), TRANSPOSED (0 or 1).
#include "gemm_epilogue.cuh"
#if TRANSPOSED
#include "gemm_transposed.cuh"
using TileScales = TokenScales;
#else
using TileScales = TileAffine;
#endif

// ---- producer --------------------------------------------------------------------------------------------

// Load stages [k_begin, k_end), each kStageK of k: a lane copies a block of A, lane 0 also the rows of the dense
// operand.
template <int kStageK, int kBlockBytes, int kDenseBytes>
DEVICE void load_stages(PipelineState& pipe, const uint8_t* block, const TensorMap& map, int k_begin, int k_end,
                        const Tile& tile) {
    const int lane_idx = threadIdx.x;
    block += int64_t(k_begin) * kBlockBytes;
#pragma unroll 1
    for (int k = k_begin * kStageK; k < k_end * kStageK; k += kStageK, pipe.advance(), block += kBlockBytes) {
        barrier_wait(pipe.empty_barrier(), pipe.phase ^ 1);
        if (lane_idx == 0) barrier_arrive_expect_tx(pipe.full_barrier(), tile.num_m64 * kBlockBytes + kDenseBytes);
        __syncwarp();
        if (lane_idx < tile.num_m64)
            tma_load_bulk(pipe.smem_stage() + lane_idx * kPackedBlockBytes, block, kBlockBytes, pipe.full_barrier(),
                          kEvictLast);
        if (lane_idx == 0)
            tma_load_2d(pipe.smem_stage() + kABytes, map, k, tile.dense_row, pipe.full_barrier(), kEvictFirst);
    }
}

DEVICE void run_producer(const Parameters& p, uint32_t smem_base) {
    grid_dependency_wait();
    PipelineState pipe{smem_base};
    const int num_work = num_work_tiles(p);
#pragma unroll 1
    for (int work_idx = 0; work_idx < num_work; ++work_idx) {
        WorkTile work;
        if (!get_work_tile(p, work_idx, num_work, work)) continue;
        const Tile tile = get_tile(p, work.tile_idx);
        const int64_t m64 = tile.first_m64 + threadIdx.x;
        const uint8_t* packed_a = p.packed_a[sparse_of(tile.layer)] + m64 * p.k_blocks * kPackedBlockBytes;
        load_stages<BLOCK_K, kPackedBlockBytes, kWeightBytes>(pipe, packed_a, p.weight[tile.layer], work.k_begin,
                                                              min(work.k_end, p.k_blocks), tile);
        const int total_rank_blocks = TRANSPOSED ? tile.rank_blocks : p.total_rank_blocks;
        const uint8_t* lowrank =
            p.lowrank[sparse_of(tile.layer)] + (m64 * total_rank_blocks + tile.first_rank_block) * kLowrankBlockBytes;
        load_stages<kLowrankBlockK, kLowrankBlockBytes, kLowrankBBytes>(
            pipe, lowrank, p.lowrank_b[tile.layer], max(work.k_begin - p.k_blocks, 0),
            min(work.k_end - p.k_blocks, tile.rank_blocks), tile);
    }
}

// ---- consumers -------------------------------------------------------------------------------------------

// A thread's metadata of a packed block: a word for both wgmmas of a stage, or one for each.
DEVICE void load_metadata(uint32_t address, uint32_t (&words)[kMetadataWords]) {
    if constexpr (FP8)
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
    else
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
}

// This warp no longer reads the stage.
DEVICE void release_stage(uint32_t empty_barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty_barrier);
}

// The first warpgroup lets the second into a work tile when it has issued stage `k_signal` of it. It may be as many
// short work tiles ahead as there are stages. A second arrival before the wait would be lost, so barriers take turns.
struct SkewBarrier {
    static constexpr int kTurns = 8;
    static_assert(kNumConsumerWarpgroups == 2, "one signals, the other waits");
    static_assert(NUM_STAGES < kTurns && 1 + kTurns <= 16, "a CTA has 16 named barriers, the first for __syncthreads");
    int k_signal, work_idx;

    DEVICE int barrier() const { return 1 + work_idx % kTurns; }
    DEVICE void stage_issued(int k) const {
        if (k == k_signal) named_barrier_arrive(barrier(), kNumConsumerThreads);
    }
    DEVICE void wait() const { named_barrier_sync(barrier(), kNumConsumerThreads); }
};

// Multiply stages [k_begin, k_end) of a tile, sparse before k_sparse_end, into the accumulators of this warpgroup. It
// owns the wgmma tiles `warpgroup_idx` and `warpgroup_idx + kNumConsumerWarpgroups`, kNumM64 of them in the matrix.
//
// One stage's wgmmas stay in flight while the next stage's are issued. Metadata registers alternate, so that none is
// written under a wgmma that reads it. `before_last_wait` runs while the last products are computed.
template <int kNumM64, class Body>
DEVICE void mainloop(Accumulators& d, PipelineState& pipe, int warpgroup_idx, int k_begin, int k_sparse_end, int k_end,
                     const SkewBarrier& skew_barrier, const Body& before_last_wait) {
    const uint32_t a_offset = warpgroup_idx * kPackedBlockBytes;
    const uint32_t metadata_offset = a_offset + kMetadataOffset + threadIdx.x % 128 * (kMetadataWords * 4);
    constexpr int kNextM64 = kNumConsumerWarpgroups * kPackedBlockBytes;
    uint32_t metadata[2][kNumM64][kMetadataWords];

    auto finish_stage = [&](int k) {
        wgmma_commit();
        wgmma_wait<1>();
        if (k > k_begin) release_stage(pipe.previous_empty_barrier());
        skew_barrier.stage_issued(k);
        pipe.advance();
    };
    auto sparse_stage = [&](int k, uint32_t (&e)[kNumM64][kMetadataWords]) {
        barrier_wait(pipe.full_barrier(), pipe.phase);
        const uint32_t smem_stage = pipe.smem_stage();
        unroll<kNumM64>([&](auto i) { load_metadata(smem_stage + metadata_offset + i * kNextM64, e[i]); });
        const uint64_t a = make_smem_descriptor<64>(smem_stage + a_offset);
        const uint64_t b = make_smem_descriptor<128>(smem_stage + kABytes);
        wgmma_fence();
        unroll<2>([&](auto half) {
            unroll<kNumM64>([&](auto i) {
                constexpr int h = decltype(half)::value;
                wgmma_sparse<h>(d[i], a + i * (kNextM64 >> 4) + 2 * h, b + 4 * h, e[i][FP8 ? h : 0],
                                h > 0 || k > k_begin);
            });
        });
        finish_stage(k);
    };
    int k = k_begin;
#pragma unroll 1
    for (; k + 1 < k_sparse_end; k += 2) {
        sparse_stage(k, metadata[0]);
        sparse_stage(k + 1, metadata[1]);
    }
    if (k < k_sparse_end) sparse_stage(k++, metadata[0]);

#pragma unroll 1
    for (; k < k_end; ++k) {
        barrier_wait(pipe.full_barrier(), pipe.phase);
        const uint32_t smem_stage = pipe.smem_stage();
        const uint64_t a = make_smem_descriptor<64>(smem_stage + a_offset);
        const uint64_t b = make_smem_descriptor<64>(smem_stage + kABytes);
        wgmma_fence();
        unroll<2>([&](auto half) {
            unroll<kNumM64>([&](auto i) {
                wgmma_dense(d[i], a + i * (kNextM64 >> 4) + 2 * half, b + 2 * half, half > 0 || k > k_begin);
            });
        });
        finish_stage(k);
    }
    before_last_wait();
    wgmma_wait<0>();
    release_stage(pipe.previous_empty_barrier());
    unroll<kNumM64>([&](auto m64) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i)  // nothing may read an accumulator before the wait
            asm volatile("" : "+f"(d[m64][i])::"memory");
    });
}

// Pass through the stages of a tile in which this warpgroup has no rows.
DEVICE void skip_stages(PipelineState& pipe, int k_begin, int k_end, const SkewBarrier& skew_barrier) {
#pragma unroll 1
    for (int k = k_begin; k < k_end; ++k, pipe.advance()) {
        barrier_wait(pipe.full_barrier(), pipe.phase);
        release_stage(pipe.empty_barrier());
        skew_barrier.stage_issued(k);
    }
}

DEVICE void run_consumer(const Parameters& p, uint32_t smem_base) {
    const int warpgroup_idx = threadIdx.x / 128 - 1, warp_idx = threadIdx.x / 32 - 4;
    const uint32_t smem_tile_info = smem_base + kTileInfoOffset + warp_idx * kTileInfoBytes;
    PipelineState pipe{smem_base};
    Accumulators d;
    grid_dependency_wait();
#pragma unroll 1
    for (int work_idx = 0;; ++work_idx) {
        WorkTile work;
        const int num_work = num_work_tiles(p);
        if (work_idx == num_work) break;
        if (!get_work_tile(p, work_idx, num_work, work)) continue;
        const Tile tile = get_tile(p, work.tile_idx);
        const int own_m64 = (tile.num_m64 - warpgroup_idx + kNumConsumerWarpgroups - 1) / kNumConsumerWarpgroups;
        const int num_m64 = max(0, min(kM64PerWarpgroup, own_m64));
        store_tile_info(smem_tile_info,
                        {tile.row, tile.column, tile.column_end, num_m64, int(work.part) | tile.layer << 8, work.peer});
        const int k_end = min(work.k_end, p.k_blocks + tile.rank_blocks), k_sparse_end = min(k_end, p.k_blocks);
        const SkewBarrier skew_barrier{warpgroup_idx == 0 ? min(work.k_begin + SKEW, k_end) - 1 : -1, work_idx};
        if (warpgroup_idx == 1) skew_barrier.wait();
        TileScales scales;
        auto before_last_wait = [&]() {
            const TileInfo info = load_tile_info(smem_tile_info);
            prefetch_scale(p, info, reload_thread_idx() / 128 - 1);
            scales.load(p, info, smem_base);
        };
        static_assert(kM64PerWarpgroup == 2, "the main loop is compiled for two wgmma tiles and for one");
        if (num_m64 == 2)
            mainloop<2>(d, pipe, warpgroup_idx, work.k_begin, k_sparse_end, k_end, skew_barrier, before_last_wait);
        else if (num_m64 == 1)
            mainloop<1>(d, pipe, warpgroup_idx, work.k_begin, k_sparse_end, k_end, skew_barrier, before_last_wait);
        else
            skip_stages(pipe, work.k_begin, k_end, skew_barrier);
        wgmma_wait<0>();  // also where no product was: what follows writes to accumulators
        TileInfo info = load_tile_info(smem_tile_info);
        spill_loop_state(smem_tile_info, pipe, work_idx);
        if (info.part() == TilePart::kBeginning) store_partials(p, d, info.num_m64);
        if (info.part() == TilePart::kEnd) add_partials(p, d, info.peer, info.num_m64);
        unroll<kM64PerWarpgroup>([&](auto i) {
            info = load_tile_info(smem_tile_info);
            if (info.part() != TilePart::kBeginning && i < info.num_m64)
                store_m64(p, d[i], scales, info, reload_thread_idx() / 128 - 1 + i * kNumConsumerWarpgroups, smem_base);
        });
        restore_loop_state(smem_tile_info, pipe, work_idx);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t smem_base = smem_address(smem);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.num_layers; ++i) {
            prefetch_tensor_map(p.weight[i]);
            prefetch_tensor_map(p.lowrank_b[i]);
        }
        PipelineState pipe{smem_base};
        for (int i = 0; i < NUM_STAGES; ++i, pipe.advance()) {
            barrier_init(pipe.full_barrier(), 1);
            barrier_init(pipe.empty_barrier(), CONSUMER_WARPS);
        }
        fence_barrier_init();
    }
    __syncthreads();

    if (threadIdx.x < kNumProducerThreads) {
        warpgroup_reg_dealloc<kProducerRegisters>();
        if (threadIdx.x < 32) run_producer(p, smem_base);
    } else {
        warpgroup_reg_alloc<kConsumerRegisters>();
        run_consumer(p, smem_base);
    }
}

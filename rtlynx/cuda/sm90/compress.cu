// X (M, K) bf16, or what a prologue makes of its inputs -> packed 2:4 blocks, norm scale s, T' = (X A) / s.
// With FP8 kept values are quantised to e4m3 by a scale t of their row, and s t takes the place of s.
//
// A warp works on k tiles of 16 rows x 64 columns (adjacent groups) or 128 (strided). Lane 4g + q owns rows g and
// g + 8, and in each 32 columns the eight from 8q on. k tiles come into shared memory by cp.async, NUM_STAGES - 1
// ahead. Each thread fetches what it selects from itself. It lies there in the 64-byte swizzle in which wgmma reads X
// and A^T for the low-rank product. (The order of k inside 32 columns is free there, as both are laid out alike.)
//
// Without a low-rank product the warps of a CTA split K of the same 16 rows. With one they are a warpgroup on 64 rows,
// so that A^T is read once for all, and the CTAs of a cluster split K. With FP8 they are that in any case: kept values
// wait in shared memory until the whole row's largest is known, and one CTA's does not hold those of a long row.
//
// Macros: FP8 (0 or 1), PROLOGUE_<NAME> (what X is), SCORE_<NAME> (what is kept), MODE (how groups lie), RANK (columns
// of T' of a CTA; more in gridDim.y), NUM_STAGES, THREADS, MIN_CTAS (that an SM is to hold), MAX_K_SPLITS (CTAs of a
// cluster, or warps), SHARED_BYTES and DEFERRED_BYTES (of what waits of a tile of K), MAX_PARTS (of strided groups),
// PARAMETER_FIELDS (layout.cuh).
#include "compress_norms.cuh"
#include "deferred_quantize.cuh"

// ---- main loop -------------------------------------------------------------------------------------------

// Apply the prologue to a k tile in shared memory. With a low-rank product the output takes the place of the input.
DEVICE void load_k_tile(const Parameters& p, const WorkCoord& at, const Row (&rows)[2], uint32_t smem_stage, int k_tile,
                        LaneValues (&x)[2]) {
    const LaneColumns columns = lane_columns(p, k_tile, at.quad_lane);
    unroll<kNumK32>([&](auto k32) {
        const uint32_t from = smem_stage + k32 * kInputK32Bytes + swizzle_64b(at.row, at.quad_lane), next_row = 8 * 64;
        uint4 input[2][Prologue::kInputs], output[2];
        unroll<2>([&](auto i) {
            unroll<Prologue::kInputs>(
                [&](auto j) { input[i][j] = load_smem_16(from + i * next_row + j * kInputBytes); });
        });
        apply_prologue(p, rows, columns[k32], input, output);
        unroll<2>([&](auto i) {
            x[i].v[k32] = output[i];
            if constexpr (Prologue::kTransforms) {
                if (p.dense != nullptr && at.stores_packed_a && rows[i].in_bounds && columns[k32] < p.columns)
                    *reinterpret_cast<uint4*>(p.dense + int64_t(at.first_row + at.row + i * 8) * p.columns +
                                              columns[k32]) = output[i];
                if constexpr (RANK > 0) store_smem_16(from + i * next_row, output[i]);
            }
        });
    });
}

#if RANK > 0
// Start T += X A over a k tile.
DEVICE void multiply_lowrank_async(float (&accum)[RANK / 2], uint32_t smem_stage, bool is_first) {
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    unroll<kNumK32>([&](auto k32) {
        const uint64_t a = make_smem_descriptor<64>(smem_stage + k32 * kInputK32Bytes);
        const uint64_t b =
            make_smem_descriptor<64>(smem_stage + Prologue::kInputs * kInputBytes + k32 * kLowrankAK32Bytes);
        wgmma_dense(accum, a, b, k32 > 0 || !is_first);
        wgmma_dense(accum, a + 2, b + 2, 1);
    });
    wgmma_commit();
}

// This CTA's part of T, into shared memory.
DEVICE void store_lowrank_part(const WorkCoord& at, const float (&accum)[RANK / 2], bool is_empty,
                               float* smem_lowrank) {
#pragma unroll
    for (int i = 0; i < RANK / 2; ++i) {
        float value = accum[i];
        asm volatile("" : "+f"(value)::"memory");
        smem_lowrank[(at.row + i / 2 % 2 * 8) * kLowrankPitch + i / 4 * 8 + at.quad_lane * 2 + i % 2] =
            is_empty ? 0.f : value;
    }
}

// Sum the CTAs' parts of T, divide by s and store T': of every num_ctas-th row, a thread eight columns at a time.
DEVICE void store_lowrank(const Parameters& p, const WorkCoord& at, int own_rows, uint32_t smem_lowrank,
                          const float (&smem_scale)[BLOCK_M]) {
    for (int task = threadIdx.x; task < own_rows * (RANK / 8); task += THREADS) {
        const int chunk = task % (RANK / 8), row = at.cta_rank + task / (RANK / 8) * at.num_ctas;
        const uint32_t own_part = smem_lowrank + (row * kLowrankPitch + chunk * 8) * 4;
        F32x8 sum{};
#pragma unroll 4
        for (int cta = 0; cta < at.num_ctas; ++cta) {
            const uint32_t from = map_to_cta(own_part, cta);
            const float4 low = load_cluster_smem(from), high = load_cluster_smem(from + 16);
            const float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            unroll<8>([&](auto i) { sum.v[i] += part[i]; });
        }
        const float inverse = 1.f / smem_scale[row];
        unroll<8>([&](auto i) { sum.v[i] *= inverse; });
        const int column = at.first_rank + chunk * 8, rank_block = column / kLowrankBlockK;
        if (rank_block < p.rank_blocks)
            *reinterpret_cast<uint4*>(p.lowrank + (int64_t(at.m64) * p.rank_blocks + rank_block) * kLowrankBlockBytes +
                                      swizzle_64b(row, column % kLowrankBlockK / 8)) = pack(sum);
    }
}
#endif

constexpr int kAccumulators = RANK > 0 ? RANK / 2 : 1;

// Select, store and multiply the k tiles of this split.
DEVICE void mainloop(const Parameters& p, const WorkCoord& at, const KSplit& k_split, const Row (&rows)[2],
                     StageRing& ring, [[maybe_unused]] uint32_t smem_deferred, RowStatistics& stats,
                     [[maybe_unused]] float (&accum)[kAccumulators]) {
    uint32_t smem_stage = ring.smem_begin;
#pragma unroll 1
    for (int index = 0; index < k_split.num_k_tiles; ++index) {
        const int k_tile = k_split.k_tile(index);
        cp_async_wait<NUM_STAGES - 2>();
        LaneValues x[2];
        load_k_tile(p, at, rows, smem_stage, k_tile, x);
#if RANK > 0
        multiply_lowrank_async(accum, smem_stage, index == 0);
#endif
        // Over the stage before this one, which everybody has left.
        ring.load_async(p, k_split, index + NUM_STAGES - 1, rows, at.first_rank);
        smem_stage = ring.after(smem_stage);
        const LaneSelected selected[2] = {select_row(x[0], stats.largest[0]), select_row(x[1], stats.largest[1])};
        if (at.stores_packed_a) {
#if FP8
            defer_k_tile(smem_deferred + index / kTilesPerChunk * kDeferredBytes, k_tile, selected);
            store_metadata(p, at.m64, at.m16, k_tile, selected);
#else
            store_k_tile(p, at.m64, at.m16, k_tile, selected);
#endif
        }
        if (p.norm) stats.add_squares(x, selected);
#if RANK > 0
        wgmma_wait<0>();
#endif
    }
}

// ---- the end of a row ------------------------------------------------------------------------------------

// Scales of this CTA's share of the rows, stored and kept in shared memory. With FP8 a CTA needs the scales of all
// rows, of which it holds a split of K; `smem_inverse` are 1 / t.
DEVICE void store_scales(const Parameters& p, const WorkCoord& at, int num_splits, int own_rows,
                         const RowNorm (&smem_norms)[kKSplitsPerCta][BLOCK_M], float (&smem_scale)[BLOCK_M],
                         [[maybe_unused]] float (&smem_inverse)[FP8 ? BLOCK_M : 1]) {
    if (threadIdx.x >= (FP8 ? BLOCK_M : own_rows)) return;
    const int row_in_cta = FP8 ? threadIdx.x : at.cta_rank + threadIdx.x * at.num_ctas;
    const int row = at.first_row + row_in_cta;
    float scale = 1.f;
    if (FP8 || p.norm) {
        const RowNorm norm = reduce_k_splits(smem_norms, row_in_cta, num_splits);
        if (p.norm) scale = norm.scale();
#if FP8
        const float t = token_scale(norm.largest);
        smem_inverse[row_in_cta] = __frcp_rn(t);
        scale *= t;
#endif
        if (at.stores_packed_a && row < p.rows && (!FP8 || row_in_cta % at.num_ctas == at.cta_rank))
            p.scale[row] = scale;
    }
    smem_scale[row_in_cta] = scale;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) compress(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ RowNorm smem_norms[kKSplitsPerCta][BLOCK_M];
    const WorkCoord at = work_coord();
    const KSplit k_split(p, kClusterSplitsK ? at.cta_rank : at.warp_idx, kClusterSplitsK ? at.num_ctas : kNumWarps);
    const uint32_t smem_stages = smem_address(smem) + (kClusterSplitsK ? 0 : at.warp_idx * NUM_STAGES * kStageBytes);
    uint32_t smem_deferred = 0;
#if FP8
    smem_deferred =
        smem_stages + NUM_STAGES * kStageBytes + at.warp_idx * (k_split.num_k_tiles / kTilesPerChunk) * kDeferredBytes;
#endif

    launch_dependents();
    grid_dependency_wait();

    Row rows[2];
    open_rows(p, at.first_row + at.row, rows);
    StageRing ring{smem_stages, smem_stages};
    for (int index = 0; index < NUM_STAGES - 1; ++index) ring.load_async(p, k_split, index, rows, at.first_rank);
    if constexpr (Prologue::kNeedsMoments) {
        __shared__ RowMoments smem_parts[kKSplitsPerCta][BLOCK_M], smem_moments[BLOCK_M];
        find_moments(p, at, k_split, smem_stages, rows, smem_parts, smem_moments);
    }

    RowStatistics stats;
    float accum[kAccumulators];
    mainloop(p, at, k_split, rows, ring, smem_deferred, stats, accum);
    if (!kClusterSplitsK && !p.norm) return;

    store_norms(p, at, k_split, rows, stats, smem_norms);
#if RANK > 0
    __syncthreads();  // the stages are free
    store_lowrank_part(at, accum, k_split.num_k_tiles == 0, reinterpret_cast<float*>(smem));
#endif
    sync_k_splits();
    // Each CTA finishes every num_ctas-th row: its scale first, then T'.
    const int own_rows = (BLOCK_M - at.cta_rank + at.num_ctas - 1) / at.num_ctas;
    __shared__ float smem_scale[BLOCK_M], smem_inverse[FP8 ? BLOCK_M : 1];
    store_scales(p, at, k_split.num_splits, own_rows, smem_norms, smem_scale, smem_inverse);
#if FP8
    __syncthreads();
    if (at.stores_packed_a) {
        const float inverse[2] = {smem_inverse[at.row], smem_inverse[at.row + 8]};
#pragma unroll 1
        for (int chunk = 0; chunk < k_split.num_k_tiles / kTilesPerChunk; ++chunk)
            store_quantized(p, at.m64, at.m16, k_split.split_idx + chunk * k_split.num_splits,
                            smem_deferred + chunk * kDeferredBytes, inverse);
    }
#endif
#if RANK > 0
    __syncthreads();
    store_lowrank(p, at, own_rows, smem_stages, smem_scale);
#endif
    if constexpr (kClusterSplitsK) cluster_sync();  // no CTA leaves while another reads its shared memory
}

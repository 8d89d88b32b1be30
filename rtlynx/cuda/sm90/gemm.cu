// Y = s * (X~ W^T + T' B^T) + b, X~ 2:4-sparse bf16 in packed blocks, W (N, K) and B (N, r) bf16, Y (M, N) bf16. Up to
// MAX_LAYERS layers that read one X~, each with a W, B and b of its own, lie beside each other in Y.
// With FP8 X~ and W are e4m3, and columns have a scale too: Y = s * (X~ W^T + T' B'^T) * c + b, T' and B' bf16 still.
//
// Persistent, one CTA an SM. The tiles of the last, incomplete wave are cut along k into equal shares for all CTAs:
// after its whole tiles each computes the beginning of some tile and leaves its sums in a workspace, then the end of
// another tile, to which it adds what the CTAs before it have left, in order (stream-K, Osama et al. 2023).
//
// A producer warp fills a ring of stages by bulk copies: per BLOCK_K, up to four packed blocks of 64 rows (values and
// metadata together) and BN rows of W. Two consumer warpgroups own two 64-row slabs each of the 256 x BN tile and read
// both operands from shared memory. The low-rank branch is rank / 32 more stages of dense k in the same accumulators.
// The second warpgroup runs SKEW stages behind the first, so that one multiplies at the full rate while the other
// stores its part of the tile.
//
// Macros: FP8 (0 or 1), BN, STAGES, SKEW, PARAMETER_BYTES (as the host packs them).
#include "gemm_epilogue.cuh"

// ---- producer --------------------------------------------------------------------------------------------

// Stages [first, last) of K columns: lanes 0 to 3 copy a slab of A each, lane 0 also its rows of the dense operand.
template <int K, int BYTES, int BOX_BYTES>
DEVICE void fetch(Cursor& at, const uint8_t* slab, const TensorMap& map, int first, int last, const Tile& tile) {
    const int lane = threadIdx.x;
    slab += int64_t(first) * BYTES;
#pragma unroll 1
    for (int k = first * K; k < last * K; k += K, at.advance(), slab += BYTES) {
        barrier_wait(at.empty(), at.phase ^ 1);
        if (lane == 0) barrier_expect(at.full(), tile.slabs * BYTES + BOX_BYTES);
        __syncwarp();
        if (lane < tile.slabs) copy_bulk(at.data() + lane * BLOCK_BYTES, slab, BYTES, at.full(), EVICT_LAST);
        if (lane == 0) copy_box(at.data() + A_BYTES, map, k, tile.weight_row, at.full(), EVICT_FIRST);
    }
}

DEVICE void produce(const Parameters& p, uint32_t shared) {
    wait_for_previous_kernel();
    Cursor at{shared};
    const int items = work_items(p);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
        Work work;
        if (!work_at(p, item, items, work)) continue;
        const Tile tile = tile_at(p, work.tile);
        const int64_t slab = tile.first_slab + threadIdx.x;
        fetch<BLOCK_K, BLOCK_BYTES, WEIGHT_BYTES>(at, p.blocks + slab * p.k_blocks * BLOCK_BYTES, p.weight[tile.layer],
                                                  work.first, min(work.last, p.k_blocks), tile);
        const uint8_t* lowrank = p.lowrank + (slab * p.total_rank_blocks + tile.first_rank_block) * RANK_BYTES;
        fetch<RANK_K, RANK_BYTES, UP_BYTES>(at, lowrank, p.up[tile.layer], max(work.first - p.k_blocks, 0),
                                            min(work.last - p.k_blocks, tile.rank_blocks), tile);
    }
}

// ---- consumers -------------------------------------------------------------------------------------------

// A thread's metadata of a block: a word for both instructions of a stage, or one for each.
DEVICE void load_metadata(uint32_t address, uint32_t (&words)[METADATA_WORDS]) {
    if constexpr (FP8)
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
    else
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
}

// This warp no longer reads the stage.
DEVICE void release(uint32_t empty) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// The first warpgroup lets the second into an item of work when it has issued stage `at` of it. It may be as many short
// items ahead as there are stages, and a second arrival before the wait would be lost, so barriers take turns.
struct Signal {
    static constexpr int TURNS = 8;
    static_assert(GROUPS == 2 && STAGES < TURNS);
    int at, item;

    DEVICE int barrier() const { return 1 + item % TURNS; }
    DEVICE void after(int k) const {
        if (k == at) named_arrive(barrier(), 256);
    }
    DEVICE void wait() const { named_sync(barrier(), 256); }
};

// Stages [first, last) of a tile, sparse before k_last, into the accumulators of this warpgroup, which owns slabs
// `group` and `group + GROUPS`, COUNT of them in the matrix. One stage's instructions stay in flight while the next is
// issued; metadata registers alternate, so that none is written under an instruction that reads it. `meanwhile` runs
// before the last wait.
template <int COUNT, class Meanwhile>
DEVICE void multiply(Accumulators& d, Cursor& at, int group, int first, int k_last, int last, const Signal& signal,
                     const Meanwhile& meanwhile) {
    const uint32_t offset = group * BLOCK_BYTES;
    const uint32_t metadata = offset + METADATA + threadIdx.x % 128 * (METADATA_WORDS * 4);
    constexpr int next_slab = GROUPS * BLOCK_BYTES;
    uint32_t e[2][COUNT][METADATA_WORDS];

    auto finish_stage = [&](int k) {
        wgmma_commit();
        wgmma_wait<1>();
        if (k > first) release(at.previous_empty());
        signal.after(k);
        at.advance();
    };
    auto sparse_stage = [&](int k, uint32_t (&meta)[COUNT][METADATA_WORDS]) {
        barrier_wait(at.full(), at.phase);
        const uint32_t data = at.data();
        unroll<COUNT>([&](auto i) { load_metadata(data + metadata + i * next_slab, meta[i]); });
        const uint64_t a = matrix_descriptor<64>(data + offset), b = matrix_descriptor<128>(data + A_BYTES);
        wgmma_fence();
        unroll<2>([&](auto half) {
            unroll<COUNT>([&](auto i) {
                constexpr int h = decltype(half)::value;
                wgmma_sparse<h>(d[i], a + i * (next_slab >> 4) + 2 * h, b + 4 * h, meta[i][FP8 ? h : 0],
                                h > 0 || k > first);
            });
        });
        finish_stage(k);
    };
    int k = first;
#pragma unroll 1
    for (; k + 1 < k_last; k += 2) {
        sparse_stage(k, e[0]);
        sparse_stage(k + 1, e[1]);
    }
    if (k < k_last) sparse_stage(k++, e[0]);

#pragma unroll 1
    for (; k < last; ++k) {
        barrier_wait(at.full(), at.phase);
        const uint32_t data = at.data();
        const uint64_t a = matrix_descriptor<64>(data + offset), b = matrix_descriptor<64>(data + A_BYTES);
        wgmma_fence();
        unroll<2>([&](auto half) {
            unroll<COUNT>([&](auto i) {
                wgmma_dense(d[i], a + i * (next_slab >> 4) + 2 * half, b + 2 * half, half > 0 || k > first);
            });
        });
        finish_stage(k);
    }
    meanwhile();
    wgmma_wait<0>();
    release(at.previous_empty());
    unroll<COUNT>([&](auto slab) {
#pragma unroll
        for (int i = 0; i < BN / 2; ++i)  // nothing may read an accumulator before the wait
            asm volatile("" : "+f"(d[slab][i])::"memory");
    });
}

// A tile in which this warpgroup has no rows.
DEVICE void skip(Cursor& at, int first, int last, const Signal& signal) {
#pragma unroll 1
    for (int k = first; k < last; ++k, at.advance()) {
        barrier_wait(at.full(), at.phase);
        release(at.empty());
        signal.after(k);
    }
}

DEVICE void consume(const Parameters& p, uint32_t shared) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
    const uint32_t note_address = shared + NOTES + warp * 32;
    Cursor at{shared};
    Accumulators d;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int item = 0;; ++item) {
        Work work;
        const int items = work_items(p);
        if (item == items) break;
        if (!work_at(p, item, items, work)) continue;
        const Tile tile = tile_at(p, work.tile);
        const int count = max(0, min(SLABS_A_GROUP, (tile.slabs - group + GROUPS - 1) / GROUPS));
        write_note(note_address,
                   {tile.first_slab, tile.column, tile.column_end, count, int(work.part) | tile.layer << 8, work.peer});
        const int last = min(work.last, p.k_blocks + tile.rank_blocks), k_last = min(last, p.k_blocks);
        const Signal signal{group == 0 ? min(work.first + SKEW, last) - 1 : -1, item};
        if (group == 1) signal.wait();
        TileAffine affine;  // asked for while the last products are computed
        auto meanwhile = [&]() {
            const Note note = read_note(note_address);
            touch_scale(p, note, thread_now() / 128 - 1);
            affine.load(p, note, shared);
        };
        if (count == SLABS_A_GROUP)
            multiply<SLABS_A_GROUP>(d, at, group, work.first, k_last, last, signal, meanwhile);
        else if (SLABS_A_GROUP > 1 && count == 1)
            multiply<1>(d, at, group, work.first, k_last, last, signal, meanwhile);
        else
            skip(at, work.first, last, signal);
        wgmma_wait<0>();  // also where no product was: what follows writes to accumulators
        Note note = read_note(note_address);
        park(note_address, at, item);
        if (note.part() == Part::BEGINNING) leave_sums(p, d, note.count);
        if (note.part() == Part::END) add_sums(p, d, note.peer, note.count);
        unroll<SLABS_A_GROUP>([&](auto i) {
            note = read_note(note_address);
            if (note.part() != Part::BEGINNING && i < note.count)
                store_slab(p, d[i], affine, note, thread_now() / 128 - 1 + i * GROUPS, shared);
        });
        unpark(note_address, at, item);
    }
}

extern "C" __global__ void __launch_bounds__(128 + GROUPS * 128, 1) gemm(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.layers; ++i) {
            prefetch_map(p.weight[i]);
            prefetch_map(p.up[i]);
        }
        Cursor at{shared};
        for (int i = 0; i < STAGES; ++i, at.advance()) {
            barrier_init(at.full(), 1);
            barrier_init(at.empty(), CONSUMER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(p, shared);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
}

// Y = s * (X~ W^T + T' B^T) + b, X~ 2:4-sparse bf16 in packed blocks, W (N, K) and B (N, r) bf16, Y (M, N) bf16.
//
// Persistent, one CTA an SM. The tiles of the last, incomplete wave are cut along k into equal shares for all CTAs:
// after its whole tiles each computes the beginning of some tile and leaves its sums in a workspace, then the end of
// another tile, to which it adds what the CTAs before it have left, in order (stream-K, Osama et al. 2023).
//
// A producer thread fills a ring of stages by bulk copies: per 64 k, up to four
// packed blocks of 64 rows (values and metadata together) and BN rows of W. Two consumer warpgroups own two
// 64-row slabs each of the 256 x BN tile and read both operands from shared memory. The low-rank branch is
// rank / 32 more stages of dense k in the same accumulators. The second warpgroup runs SKEW stages behind the
// first, so that one multiplies at the full rate while the other stores its part of the tile.
#include "wgmma.cuh"

constexpr int BLOCK_ROWS = 64;      // rows of a packed block, and of one instruction
constexpr int BLOCK_K = 64;         // logical k of a stage
constexpr int BLOCK_BYTES = 4608;   // 64 rows x 64 bytes of kept values, 512 bytes of metadata
constexpr int METADATA = 4096;      // where the metadata of a block starts
constexpr int RANK_K = 32;          // low-rank columns of a stage
constexpr int RANK_BYTES = 4096;    // 64 rows x 32 columns
constexpr int GROUPS = 2;           // consumer warpgroups
constexpr int SLABS_A_GROUP = 2;
constexpr int SLABS = GROUPS * SLABS_A_GROUP;  // 64-row slabs of a tile
constexpr int A_BYTES = SLABS * BLOCK_BYTES;
constexpr int STAGE_BYTES = A_BYTES + BN * BLOCK_K * 2;
constexpr int STAGING_BYTES = 16 * 64 * 2;  // of one warp: 16 rows x 64 columns on their way out
constexpr int CONSUMER_WARPS = GROUPS * 4;
constexpr int STAGING = STAGES * STAGE_BYTES;
constexpr int NOTES = STAGING + CONSUMER_WARPS * STAGING_BYTES;  // each consumer warp's Tile, in 32 bytes
constexpr int BARRIERS = NOTES + CONSUMER_WARPS * 32;
constexpr int MAX_SEGMENTS = 8;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;  // of 168 at entry

// Columns [previous column_end, column_end) of Y: one layer of several that share an input.
struct Segment {
    int column_end;
    int tile_end;          // column tiles up to here
    int first_rank_block;  // its columns of T', in units of RANK_K
    int rank_blocks;
};

struct Parameters {
    TensorMap weight;        // box (64 k, BN / CLUSTER rows), 128-byte swizzle
    TensorMap up;            // box (32 columns, BN / CLUSTER rows), 64-byte swizzle
    const uint8_t* blocks;   // (slabs, k_blocks) packed blocks
    const uint8_t* lowrank;  // (slabs, total_rank_blocks) blocks of T'
    const float* scale;      // (M), or null for s = 1
    const void* bias;        // (N) bf16 or float32, or null
    uint16_t* out;           // (M, N), contiguous
    int rows, columns;       // N and every segment's end are multiples of 8: rows of Y are stored 16 bytes at a time
    int k_blocks, total_rank_blocks;
    int slabs, row_tiles, column_tiles, row_tiles_together;
    int whole_tiles;         // the first of them; the rest are cut into shares
    int split_tiles, split_ctas, split_stages;  // how many, among how many CTAs, stages of each
    float4* workspace;       // (split_ctas, CONSUMER_WARPS, SLABS_A_GROUP, BN / 8, 32) sums
    uint64_t* ready;         // (split_ctas, CONSUMER_WARPS): `nonce` where a warp's sums are there
    uint64_t nonce;          // a random number of this launch, so that `ready` need not be initialised
    int bias_is_float, segments;
    Segment segment[MAX_SEGMENTS];
};

struct Tile {
    int first_slab, slabs;
    int column, column_end;
    int first_rank_block, rank_blocks;
};

// Row tiles run fastest inside bands of `row_tiles_together`, so that what runs at one time shares operands.
DEVICE Tile tile_at(const Parameters& p, int index) {
    const int band = index / (p.row_tiles_together * p.column_tiles);
    const int first_row_tile = band * p.row_tiles_together;
    const int band_rows = min(p.row_tiles_together, p.row_tiles - first_row_tile);
    const int within = index - first_row_tile * p.column_tiles;
    const int column_tile = within / band_rows;
    const int row_tile = (first_row_tile + within - column_tile * band_rows) * CLUSTER +
                         (CLUSTER > 1 ? int(cluster_rank()) : 0);
    int segment = 0;
    while (column_tile >= p.segment[segment].tile_end) ++segment;
    const int first_tile = segment ? p.segment[segment - 1].tile_end : 0;
    const int first_column = segment ? p.segment[segment - 1].column_end : 0;
    Tile tile;
    tile.first_slab = row_tile * SLABS;
    tile.slabs = max(0, min(SLABS, p.slabs - tile.first_slab));
    tile.column = first_column + (column_tile - first_tile) * BN;
    tile.column_end = p.segment[segment].column_end;
    tile.first_rank_block = p.segment[segment].first_rank_block;
    tile.rank_blocks = p.segment[segment].rank_blocks;
    return tile;
}

// threadIdx.x, read anew: what is derived from it is not kept in registers through the main loop.
DEVICE int thread_now() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

enum class Part { WHOLE, BEGINNING, END };

// Stages [first, last) of a tile. An END waits for the CTAs from `peer` on to this one.
struct Work {
    int tile, first, last, peer;
    Part part;
};

DEVICE int share_begin(const Parameters& p, int cta) {
    return cta * (p.split_tiles * p.split_stages) / p.split_ctas;
}

// Work number `item` of this CTA, false where there is none: the last but one is the beginning of a split tile, the
// last the end of one. CTAs start in order, so one that waits for those before it cannot wait for ever.
DEVICE bool work_at(const Parameters& p, int item, int items, Work& work) {
    const int cta = blockIdx.x / CLUSTER, ctas = gridDim.x / CLUSTER;
    if (item < items - 2) {
        work = {cta + item * ctas, 0, 1 << 30, 0, Part::WHOLE};
        return true;
    }
    if (cta >= p.split_ctas) return false;
    const int begin = share_begin(p, cta), end = share_begin(p, cta + 1), stages = p.split_stages;
    const int tile = begin / stages, tile_begin = tile * stages, tile_end = tile_begin + stages;
    if (item == items - 2) {
        if (end == tile_end) return false;
        const bool next = end > tile_end;
        work = {p.whole_tiles + tile + next, next ? 0 : begin - tile_begin, end - (next ? tile_end : tile_begin), 0,
                Part::BEGINNING};
        return true;
    }
    if (end < tile_end) return false;
    // The last CTA whose share begins at or before the tile's.
    const int peer = ((tile_begin + 1) * p.split_ctas - 1) / (p.split_tiles * stages);
    work = {p.whole_tiles + tile, begin - tile_begin, stages, peer, peer < cta ? Part::END : Part::WHOLE};
    return true;
}

DEVICE int work_items(const Parameters& p) {
    const int cta = blockIdx.x / CLUSTER, ctas = gridDim.x / CLUSTER;
    return 2 + max(0, (p.whole_tiles - cta + ctas - 1) / ctas);
}

// A place in the ring of stages; `phase` flips at every turn.
struct Cursor {
    uint32_t shared;
    int stage = 0;
    uint32_t phase = 0;

    DEVICE uint32_t data() const { return shared + stage * STAGE_BYTES; }
    DEVICE uint32_t full() const { return shared + BARRIERS + stage * 8; }
    DEVICE uint32_t empty() const { return shared + BARRIERS + (STAGES + stage) * 8; }
    DEVICE uint32_t previous_empty() const {
        return shared + BARRIERS + (STAGES + (stage == 0 ? STAGES : stage) - 1) * 8;
    }
    DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// ---- producer --------------------------------------------------------------------------------------------

// BN rows of `map` from `column` on; in a cluster each CTA fetches its share for all.
template <int ROW_BYTES>
DEVICE void fetch_columns(const TensorMap& map, const Cursor& at, int k, int column) {
    const uint32_t to = at.data() + A_BYTES;
    if constexpr (CLUSTER == 1) {
        copy_box(to, map, k, column, at.full(), EVICT_FIRST);
    } else {
        constexpr int share = BN / CLUSTER;
        const int first = cluster_rank() * share;
        copy_box_multicast(to + first * ROW_BYTES, map, k, column + first, at.full(), (1 << CLUSTER) - 1, EVICT_FIRST);
    }
}

// Stages [first, last) of K columns: lanes 0 to 3 copy a slab of A each, lane 0 also its rows of the dense operand.
template <int K, int BYTES>
DEVICE void fetch(Cursor& at, const uint8_t* slab, const TensorMap& map, int first, int last, const Tile& tile) {
    const int lane = threadIdx.x;
    slab += int64_t(first) * BYTES;
#pragma unroll 1
    for (int k = first * K; k < last * K; k += K, at.advance(), slab += BYTES) {
        barrier_wait(at.empty(), at.phase ^ 1);
        if (lane == 0) barrier_expect(at.full(), tile.slabs * BYTES + BN * K * 2);
        __syncwarp();
        if (lane < tile.slabs) copy_bulk(at.data() + lane * BLOCK_BYTES, slab, BYTES, at.full(), EVICT_LAST);
        if (lane == 0) fetch_columns<K * 2>(map, at, k, tile.column);
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
        fetch<BLOCK_K, BLOCK_BYTES>(at, p.blocks + slab * p.k_blocks * BLOCK_BYTES, p.weight, work.first,
                                    min(work.last, p.k_blocks), tile);
        const uint8_t* lowrank = p.lowrank + (slab * p.total_rank_blocks + tile.first_rank_block) * RANK_BYTES;
        fetch<RANK_K, RANK_BYTES>(at, lowrank, p.up, max(work.first - p.k_blocks, 0),
                                  min(work.last - p.k_blocks, tile.rank_blocks), tile);
    }
}

// ---- consumers -------------------------------------------------------------------------------------------

using Accumulators = float[SLABS_A_GROUP][BN / 2];

DEVICE void store_streaming(uint16_t* to, const uint4& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

DEVICE uint32_t load_shared(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// This warp no longer reads the stage; in a cluster, the other CTA's copies fill it too.
DEVICE void release(uint32_t empty) {
    if (threadIdx.x % 32 < CLUSTER) {
        if constexpr (CLUSTER == 1)
            barrier_arrive(empty);
        else
            barrier_arrive_cluster(map_to_cta(empty, threadIdx.x % 32));
    }
}

// Stages [first, last) of a tile, sparse before k_last, into the accumulators of this warpgroup, which owns slabs `group` and `group + GROUPS`, COUNT
// of them in the matrix. One stage's instructions stay in flight while the next is issued; metadata registers
// alternate, so that none is written under an instruction that reads it. `meanwhile` runs before the last wait.
template <int COUNT, class Meanwhile>
DEVICE void multiply(Accumulators& d, Cursor& at, int group, int first, int k_last, int last, int signal_at,
                     const Meanwhile& meanwhile) {
    const uint32_t offset = group * BLOCK_BYTES;
    const uint32_t metadata = offset + METADATA + threadIdx.x % 128 * 4;
    constexpr int next_slab = GROUPS * BLOCK_BYTES;
    uint32_t e[2][COUNT];

    auto finish_stage = [&](int k) {
        wgmma_commit();
        wgmma_wait<1>();
        if (k > first) release(at.previous_empty());
        if (k == signal_at) named_arrive(group + 1, 256);
        at.advance();
    };
    auto sparse_stage = [&](int k, uint32_t (&meta)[COUNT]) {
        barrier_wait(at.full(), at.phase);
        const uint32_t data = at.data();
        unroll<COUNT>([&](auto i) { meta[i] = load_shared(data + metadata + i * next_slab); });
        const uint64_t a = matrix_descriptor<64>(data + offset), b = matrix_descriptor<128>(data + A_BYTES);
        wgmma_fence();
        unroll<COUNT>([&](auto i) { wgmma_sparse<0>(d[i], a + i * (next_slab >> 4), b, meta[i], k > first); });
        unroll<COUNT>([&](auto i) { wgmma_sparse<1>(d[i], a + i * (next_slab >> 4) + 2, b + 4, meta[i], 1); });
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
DEVICE void skip(Cursor& at, int group, int first, int last, int signal_at) {
#pragma unroll 1
    for (int k = first; k < last; ++k, at.advance()) {
        barrier_wait(at.full(), at.phase);
        release(at.empty());
        if (k == signal_at) named_arrive(group + 1, 256);
    }
}

// What the epilogue must know waits in shared memory, not in registers, while the accumulators are live.
struct Note {
    int first_slab, column, column_end, count;
    int part, peer;
};

DEVICE void write_note(uint32_t address, const Note& note) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(note.first_slab), "r"(note.column),
                     "r"(note.column_end), "r"(note.count)
                     : "memory");
        asm volatile("st.shared.v2.u32 [%0 + 16], {%1, %2};" ::"r"(address), "r"(note.part), "r"(note.peer) : "memory");
    }
    __syncwarp();
}
DEVICE Note read_note(uint32_t address) {
    Note note;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(note.first_slab), "=r"(note.column), "=r"(note.column_end), "=r"(note.count)
                 : "r"(address)
                 : "memory");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 16];" : "=r"(note.part), "=r"(note.peer) : "r"(address) : "memory");
    return note;
}

// The loop's own state, likewise.
DEVICE void park(uint32_t address, const Cursor& at, int item) {
    if (thread_now() % 32 == 0)
        asm volatile("st.shared.v2.u32 [%0 + 24], {%1, %2};" ::"r"(address), "r"(at.stage | at.phase << 16), "r"(item)
                     : "memory");
    __syncwarp();
}
DEVICE void unpark(uint32_t address, Cursor& at, int& item) {
    uint32_t place;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 24];" : "=r"(place), "=r"(item) : "r"(address) : "memory");
    at.stage = place & 0xFFFF;
    at.phase = place >> 16;
}

DEVICE void touch(const void* p) {
    uint32_t value;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
}

// Bring what the epilogue reads into L1 while the last products are computed: bias and s of this warp.
DEVICE void touch_affine(const Parameters& p, const Note& note, int group) {
    const int lane = thread_now() % 32;
    if (p.bias != nullptr && lane * (BN / 32) + note.column < p.columns)
        touch(static_cast<const uint8_t*>(p.bias) + (note.column + lane * (BN / 32) & ~1) * (2 << p.bias_is_float));
    const int row = (note.first_slab + group + lane / 16 * GROUPS) * BLOCK_ROWS + thread_now() / 32 % 4 * 16 + lane % 16;
    if (p.scale != nullptr && row < p.rows) touch(p.scale + row);
}

struct Pair {
    float low, high;
};

// Bias of `column` and the next, both inside or both outside of Y.
DEVICE Pair load_bias(const Parameters& p, int column) {
    if (p.bias == nullptr || column >= p.columns) return {0.f, 0.f};
    if (p.bias_is_float) return static_cast<const Pair*>(p.bias)[column / 2];
    const uint32_t both = static_cast<const uint32_t*>(p.bias)[column / 2];
    return {bf16_low(both), bf16_high(both)};
}

// Scale, bias, round and store one slab. Each warp turns 16 rows x 64 columns in its own 2 KB of shared memory
// (16-byte chunks xor-swizzled by row), so that rows leave as whole 128-byte lines.
DEVICE void store_slab(const Parameters& p, const float (&d)[BN / 2], const Note& tile, int slab, uint32_t shared) {
    const int thread = thread_now(), lane = thread % 32, warp = thread / 32 % 4, row = lane / 8, chunk = lane % 8;
    const uint32_t staging = shared + STAGING + (thread / 32 - 4) * STAGING_BYTES;
    const int row0 = (tile.first_slab + slab) * BLOCK_ROWS + warp * 16 + row;
    Pair s{1.f, 1.f};  // of this lane's rows
    if (p.scale != nullptr) {
        const int first = row0 - row + lane / 4;
        s = {p.scale[min(first, p.rows - 1)], p.scale[min(first + 8, p.rows - 1)]};
    }
    // Xor moves among chunks: staging is aligned. Of the four 8x8 matrices of a stmatrix: rows 0-7, rows 8-15, then
    // the same of the next 8 columns.
    const uint32_t to = staging + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
    const uint32_t from = staging + row * 128 + (chunk ^ row) * 16;
    unroll<BN / 64>([&](auto wide) {
        // Each lane loads the bias of two of the 64 columns, and the warp passes it around.
        const Pair bias = load_bias(p, tile.column + wide * 64 + lane * 2);
        unroll<4>([&](auto part) {
            uint32_t out[4];
            unroll<2>([&](auto half) {
                constexpr int block = decltype(part)::value * 2 + decltype(half)::value;
                const float* c = d + (wide * 8 + block) * 4;
                const float b0 = __shfl_sync(~0u, bias.low, block * 4 + lane % 4);
                const float b1 = __shfl_sync(~0u, bias.high, block * 4 + lane % 4);
                out[half * 2] = pack_bf16(fmaf(c[0], s.low, b0), fmaf(c[1], s.low, b1));
                out[half * 2 + 1] = pack_bf16(fmaf(c[2], s.high, b0), fmaf(c[3], s.high, b1));
            });
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to ^ part * 32),
                         "r"(out[0]), "r"(out[1]), "r"(out[2]), "r"(out[3])
                         : "memory");
        });
        __syncwarp();
        const int column = tile.column + wide * 64 + chunk * 8;
        uint16_t* out = p.out + int64_t(row0) * p.columns + column;
        unroll<4>([&](auto i) {
            uint4 value;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                         : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                         : "r"(from ^ i % 2 * 64), "n"(i * 512)
                         : "memory");
            if (column < tile.column_end && row0 + i * 4 < p.rows) store_streaming(out, value);
            out += int64_t(p.columns) * 4;
        });
        __syncwarp();
    });
}

// ---- shares of a tile -------------------------------------------------------------------------------------

DEVICE float4* sums_of(const Parameters& p, int cta, int slab) {
    const int warp = thread_now() / 32 - 4;
    return p.workspace + int64_t((cta * CONSUMER_WARPS + warp) * SLABS_A_GROUP + slab) * (BN / 8 * 32) + thread_now() % 32;
}
DEVICE uint64_t* ready_of(const Parameters& p, int cta) { return p.ready + cta * CONSUMER_WARPS + thread_now() / 32 - 4; }

DEVICE void leave_sums(const Parameters& p, const Accumulators& d, int count) {
    const int cta = blockIdx.x / CLUSTER;
    unroll<SLABS_A_GROUP>([&](auto i) {
        if (i >= count) return;
        float4* to = sums_of(p, cta, i);
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
            __stcg(to + j * 32, float4{d[i][j * 4], d[i][j * 4 + 1], d[i][j * 4 + 2], d[i][j * 4 + 3]});
    });
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(ready_of(p, cta)), "l"(p.nonce) : "memory");
}

// Add what the CTAs from `peer` on have left. Marks are taken back, so that a replayed graph finds none.
DEVICE void add_sums(const Parameters& p, Accumulators& d, int peer, int count) {
#pragma unroll 1
    for (int cta = peer; cta < int(blockIdx.x) / CLUSTER; ++cta) {
        if (thread_now() % 32 == 0) {
            uint64_t* ready = ready_of(p, cta);
            uint64_t mark;
            do {
                asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(mark) : "l"(ready) : "memory");
            } while (mark != p.nonce);
            *ready = 0;
        }
        __syncwarp();
        unroll<SLABS_A_GROUP>([&](auto i) {
            if (i >= count) return;
            const float4* from = sums_of(p, cta, i);
#pragma unroll
            for (int j = 0; j < BN / 8; ++j) {
                const float4 sum = __ldcg(from + j * 32);
                d[i][j * 4] += sum.x;
                d[i][j * 4 + 1] += sum.y;
                d[i][j * 4 + 2] += sum.z;
                d[i][j * 4 + 3] += sum.w;
            }
        });
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
        write_note(note_address, {tile.first_slab, tile.column, tile.column_end, count, int(work.part), work.peer});
        const int last = min(work.last, p.k_blocks + tile.rank_blocks), k_last = min(last, p.k_blocks);
        // Each warpgroup lets the next one into a tile when it is SKEW stages ahead.
        const int signal_at = group + 1 < GROUPS ? min(work.first + SKEW, last) - 1 : -1;
        if (group > 0) named_sync(group, 256);
        auto meanwhile = [&]() { touch_affine(p, read_note(note_address), thread_now() / 128 - 1); };
        if (count == SLABS_A_GROUP)
            multiply<SLABS_A_GROUP>(d, at, group, work.first, k_last, last, signal_at, meanwhile);
        else if (SLABS_A_GROUP > 1 && count == 1)
            multiply<1>(d, at, group, work.first, k_last, last, signal_at, meanwhile);
        else
            skip(at, group, work.first, last, signal_at);
        wgmma_wait<0>();  // also where no product was: what follows writes to accumulators
        Note note = read_note(note_address);
        park(note_address, at, item);
        if (note.part == int(Part::BEGINNING)) leave_sums(p, d, note.count);
        if (note.part == int(Part::END)) add_sums(p, d, note.peer, note.count);
        unroll<SLABS_A_GROUP>([&](auto i) {
            note = read_note(note_address);
            if (note.part != int(Part::BEGINNING) && i < note.count)
                store_slab(p, d[i], note, thread_now() / 128 - 1 + i * GROUPS, shared);
        });
        unpark(note_address, at, item);
    }
}

extern "C" __global__ void __launch_bounds__(128 + GROUPS * 128, 1)
gemm(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    if (threadIdx.x == 0) {
        prefetch_map(p.weight);
        prefetch_map(p.up);
        Cursor at{shared};
        for (int i = 0; i < STAGES; ++i, at.advance()) {
            barrier_init(at.full(), 1);
            barrier_init(at.empty(), CONSUMER_WARPS * CLUSTER);
        }
        barrier_init_fence();
    }
    if constexpr (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();

    if (threadIdx.x < 128) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(p, shared);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // no CTA leaves while the other may still signal it
}

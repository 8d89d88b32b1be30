// Y = s * (X~ W^T + T' B^T) + b, X~ 2:4-sparse bf16 in packed blocks, W (N, K) and B (N, r) bf16, Y (M, N) bf16.
//
// Persistent, one CTA an SM. A producer thread fills a ring of stages by bulk copies: per 64 k, up to four
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
    int slabs, row_tiles, column_tiles, row_tiles_together, tiles;
    int bias_is_float;
    int segments;
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

// `count` stages of K columns: lanes 0 to 3 copy a slab of A each, lane 0 also its rows of the dense operand.
template <int K, int BYTES>
DEVICE void fetch(Cursor& at, const uint8_t* slab, const TensorMap& map, int count, const Tile& tile) {
    const int lane = threadIdx.x;
#pragma unroll 1
    for (int k = 0; k < count * K; k += K, at.advance(), slab += BYTES) {
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
#pragma unroll 1
    for (int index = blockIdx.x / CLUSTER; index < p.tiles; index += gridDim.x / CLUSTER) {
        const Tile tile = tile_at(p, index);
        const int64_t slab = tile.first_slab + threadIdx.x;
        fetch<BLOCK_K, BLOCK_BYTES>(at, p.blocks + slab * p.k_blocks * BLOCK_BYTES, p.weight, p.k_blocks, tile);
        const uint8_t* lowrank = p.lowrank + (slab * p.total_rank_blocks + tile.first_rank_block) * RANK_BYTES;
        fetch<RANK_K, RANK_BYTES>(at, lowrank, p.up, tile.rank_blocks, tile);
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

// One tile's product into the accumulators of this warpgroup, which owns slabs `group` and `group + GROUPS`, COUNT
// of them in the matrix. One stage's instructions stay in flight while the next is issued; metadata registers
// alternate, so that none is written under an instruction that reads it. `meanwhile` runs before the last wait.
template <int COUNT, class Meanwhile>
DEVICE void multiply(Accumulators& d, Cursor& at, int group, int k_blocks, int rank_blocks, int signal_at,
                     const Meanwhile& meanwhile) {
    const uint32_t offset = group * BLOCK_BYTES;
    const uint32_t metadata = offset + METADATA + threadIdx.x % 128 * 4;
    constexpr int next_slab = GROUPS * BLOCK_BYTES;
    uint32_t e[2][COUNT];

    auto finish_stage = [&](int k) {
        wgmma_commit();
        wgmma_wait<1>();
        if (k) release(at.previous_empty());
        if (k == signal_at) named_arrive(group + 1, 256);
        at.advance();
    };
    auto sparse_stage = [&](int k, uint32_t (&meta)[COUNT]) {
        barrier_wait(at.full(), at.phase);
        const uint32_t data = at.data();
        unroll<COUNT>([&](auto i) { meta[i] = load_shared(data + metadata + i * next_slab); });
        const uint64_t a = matrix_descriptor<64>(data + offset), b = matrix_descriptor<128>(data + A_BYTES);
        wgmma_fence();
        unroll<COUNT>([&](auto i) { wgmma_sparse<0>(d[i], a + i * (next_slab >> 4), b, meta[i], k); });
        unroll<COUNT>([&](auto i) { wgmma_sparse<1>(d[i], a + i * (next_slab >> 4) + 2, b + 4, meta[i], 1); });
        finish_stage(k);
    };
    int k = 0;
#pragma unroll 1
    for (; k + 1 < k_blocks; k += 2) {
        sparse_stage(k, e[0]);
        sparse_stage(k + 1, e[1]);
    }
    if (k < k_blocks) sparse_stage(k, e[0]);

#pragma unroll 1
    for (k = k_blocks; k < k_blocks + rank_blocks; ++k) {
        barrier_wait(at.full(), at.phase);
        const uint32_t data = at.data();
        const uint64_t a = matrix_descriptor<64>(data + offset), b = matrix_descriptor<64>(data + A_BYTES);
        wgmma_fence();
        unroll<2>([&](auto half) {
            unroll<COUNT>([&](auto i) { wgmma_dense(d[i], a + i * (next_slab >> 4) + 2 * half, b + 2 * half, 1); });
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
DEVICE void skip(Cursor& at, int group, int stages, int signal_at) {
#pragma unroll 1
    for (int k = 0; k < stages; ++k, at.advance()) {
        barrier_wait(at.full(), at.phase);
        release(at.empty());
        if (k == signal_at) named_arrive(group + 1, 256);
    }
}

// What the epilogue needs from memory, asked for while the last products are computed: bf16 bias of two columns
// of each 64 for a lane, s of one of the warp's rows (lane / 16 is the slab); the warp passes both around.
struct Affine {
    uint32_t bias[BN / 64];
    float scale;
};

DEVICE Affine load_affine(const Parameters& p, const Tile& tile, int group) {
    Affine affine;
    const int lane = threadIdx.x % 32;
    unroll<BN / 64>([&](auto i) {
        const int column = tile.column + i * 64 + lane * 2;
        affine.bias[i] = 0;
        if (p.bias != nullptr && !p.bias_is_float && column < p.columns)
            affine.bias[i] = static_cast<const uint32_t*>(p.bias)[column / 2];
    });
    affine.scale = 1.f;
    const int row = (tile.first_slab + group + lane / 16 * GROUPS) * BLOCK_ROWS + threadIdx.x / 32 % 4 * 16 + lane % 16;
    if (p.scale != nullptr) affine.scale = p.scale[min(row, p.rows - 1)];
    return affine;
}

// Scale, bias, round and store one slab. Each warp turns 16 rows x 64 columns in its own 2 KB of shared memory
// (16-byte chunks xor-swizzled by row), so that rows leave as whole 128-byte lines.
DEVICE void store_slab(const Parameters& p, const float (&d)[BN / 2], const Tile& tile, int slab,
                       const uint32_t (&bias)[BN / 64], float s_low, float s_high, uint32_t staging) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 8, chunk = lane % 8;
    const int row0 = (tile.first_slab + slab) * BLOCK_ROWS + warp * 16 + row;
    // Xor moves among chunks: staging is aligned. Of the four 8x8 matrices of a stmatrix: rows 0-7, rows 8-15, then
    // the same of the next 8 columns.
    const uint32_t to = staging + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
    const uint32_t from = staging + row * 128 + (chunk ^ row) * 16;
    unroll<BN / 64>([&](auto wide) {
        float even = bf16_low(bias[wide]), odd = bf16_high(bias[wide]);
        if (p.bias_is_float && tile.column + wide * 64 + lane * 2 < p.columns) {
            const float2 both = static_cast<const float2*>(p.bias)[(tile.column + wide * 64) / 2 + lane];
            even = both.x;
            odd = both.y;
        }
        unroll<4>([&](auto part) {
            uint32_t out[4];
            unroll<2>([&](auto half) {
                constexpr int block = decltype(part)::value * 2 + decltype(half)::value;
                const float* c = d + (wide * 8 + block) * 4;
                const float b0 = __shfl_sync(~0u, even, block * 4 + lane % 4);
                const float b1 = __shfl_sync(~0u, odd, block * 4 + lane % 4);
                out[half * 2] = pack_bf16(fmaf(c[0], s_low, b0), fmaf(c[1], s_low, b1));
                out[half * 2 + 1] = pack_bf16(fmaf(c[2], s_high, b0), fmaf(c[3], s_high, b1));
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

// What the epilogue must know waits in shared memory, not in registers, while the accumulators are live.
DEVICE void write_note(uint32_t note, const Tile& tile, int count) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(note), "r"(tile.first_slab), "r"(tile.column),
                     "r"(tile.column_end), "r"(count)
                     : "memory");
    __syncwarp();
}
DEVICE int read_note(uint32_t note, Tile& tile) {
    int count;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.first_slab), "=r"(tile.column), "=r"(tile.column_end), "=r"(count)
                 : "r"(note)
                 : "memory");
    return count;
}

DEVICE void consume(const Parameters& p, uint32_t shared) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
    const uint32_t staging = shared + STAGING + warp * STAGING_BYTES, note = shared + NOTES + warp * 32;
    Cursor at{shared};
    Accumulators d;
    wait_for_previous_kernel();
    if (SKEW > 0 && group > 0) named_sync(group, 256);
#pragma unroll 1
    for (int index = blockIdx.x / CLUSTER; index < p.tiles; index += gridDim.x / CLUSTER) {
        Tile tile = tile_at(p, index);
        int count = max(0, min(SLABS_A_GROUP, (tile.slabs - group + GROUPS - 1) / GROUPS));
        write_note(note, tile, count);
        // After which stage of its first tile a warpgroup lets the next one start.
        const int signal_at = group + 1 < GROUPS && index == blockIdx.x / CLUSTER ? min(SKEW, p.k_blocks) - 1 : -1;
        Affine affine;
        auto meanwhile = [&]() {
            read_note(note, tile);
            affine = load_affine(p, tile, group);
        };
        if (count == SLABS_A_GROUP)
            multiply<SLABS_A_GROUP>(d, at, group, p.k_blocks, tile.rank_blocks, signal_at, meanwhile);
        else if (SLABS_A_GROUP > 1 && count == 1)
            multiply<1>(d, at, group, p.k_blocks, tile.rank_blocks, signal_at, meanwhile);
        else
            skip(at, group, p.k_blocks + tile.rank_blocks, signal_at);
        count = read_note(note, tile);
        unroll<SLABS_A_GROUP>([&](auto i) {
            const int row = i * 16 + threadIdx.x % 32 / 4;
            const float s_low = __shfl_sync(~0u, affine.scale, row), s_high = __shfl_sync(~0u, affine.scale, row + 8);
            if (i < count) store_slab(p, d[i], tile, group + i * GROUPS, affine.bias, s_low, s_high, staging);
        });
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

// What the GEMM's roles agree on: parameters, shared memory, the order of tiles and the shares of split ones.
#pragma once
#include "wgmma.cuh"

constexpr int BLOCK_ROWS = 64;               // rows of a packed block, and of one instruction
constexpr int BLOCK_K = FP8 ? 128 : 64;      // logical k of a stage
constexpr int METADATA = 4096;               // where the metadata of a block starts: 64 rows x 64 bytes are kept
constexpr int METADATA_WORDS = FP8 ? 2 : 1;  // of a thread
constexpr int BLOCK_BYTES = METADATA + 512 * METADATA_WORDS;
constexpr int WEIGHT_BYTES = BN * 128;                // BN rows of W, BLOCK_K columns
constexpr int RANK_K = 32;                            // low-rank columns of a stage
constexpr int RANK_BYTES = 4096, UP_BYTES = BN * 64;  // 64 rows of T', BN rows of B
constexpr int GROUPS = 2;                             // consumer warpgroups
constexpr int SLABS_A_GROUP = 2;
constexpr int SLABS = GROUPS * SLABS_A_GROUP;  // 64-row slabs of a tile
constexpr int A_BYTES = SLABS * BLOCK_BYTES;
constexpr int STAGE_BYTES = A_BYTES + WEIGHT_BYTES;
constexpr int STAGING_BYTES = 16 * 64 * 2;  // of one warp: 16 rows x 64 columns on their way out
constexpr int CONSUMER_WARPS = GROUPS * 4;
constexpr int STAGING = STAGES * STAGE_BYTES;
constexpr int AFFINE = STAGING + CONSUMER_WARPS * STAGING_BYTES;
constexpr int AFFINE_BYTES = FP8 ? BN * 8 : 0;                 // of one warp: scale and bias of a tile's columns
constexpr int NOTES = AFFINE + CONSUMER_WARPS * AFFINE_BYTES;  // each consumer warp's Tile, in 32 bytes
constexpr int BARRIERS = NOTES + CONSUMER_WARPS * 32;
constexpr int MAX_LAYERS = 4;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;  // of 168 at entry

// Columns [previous column_end, column_end) of Y: one layer of several that share an input.
struct Layer {
    int column_end;
    int tile_end;          // column tiles up to here
    int first_rank_block;  // its columns of T', in units of RANK_K
    int rank_blocks;
};

struct Parameters {
    TensorMap weight[MAX_LAYERS];  // box (BLOCK_K, BN rows), 128-byte swizzle
    TensorMap up[MAX_LAYERS];      // box (32 columns, BN rows), 64-byte swizzle
    const uint8_t* blocks;         // (slabs, k_blocks) packed blocks
    const uint8_t* lowrank;        // (slabs, total_rank_blocks) blocks of T'
    const float* scale;            // (M), or null for s = 1
    uint16_t* out;                 // (M, N), contiguous
    // One a layer, found at columns of Y: the host has moved the addresses back by those before the layer.
    const void* bias[MAX_LAYERS];           // bf16 or float32, or null
    const float* column_scale[MAX_LAYERS];  // with FP8, else null
    int rows, columns;  // N and every layer's end are multiples of 8: rows of Y are stored 16 bytes at a time
    int k_blocks, total_rank_blocks;
    int slabs, row_tiles, column_tiles, row_tiles_together;
    int whole_tiles;                            // the first of them; the rest are cut into shares
    int split_tiles, split_ctas, split_stages;  // how many, among how many CTAs, stages of each
    float4* workspace;                          // (split_ctas, CONSUMER_WARPS, SLABS_A_GROUP, BN / 8, 32) sums
    uint64_t* ready;                            // (split_ctas, CONSUMER_WARPS): `nonce` where a warp's sums are there
    uint64_t nonce;  // a random number of this launch, so that `ready` need not be initialised
    int bias_is_float, layers;
    Layer layer[MAX_LAYERS];
};
static_assert(sizeof(Parameters) == PARAMETER_BYTES, "the host packs them");

struct Tile {
    int first_slab, slabs;
    int column, column_end;
    int layer, weight_row;  // whose columns these are, and the first one's row of its weight
    int first_rank_block, rank_blocks;
};

// Row tiles run fastest inside bands of `row_tiles_together`, so that what runs at one time shares operands.
DEVICE Tile tile_at(const Parameters& p, int index) {
    const int band = index / (p.row_tiles_together * p.column_tiles);
    const int first_row_tile = band * p.row_tiles_together;
    const int band_rows = min(p.row_tiles_together, p.row_tiles - first_row_tile);
    const int within = index - first_row_tile * p.column_tiles;
    const int column_tile = within / band_rows;
    const int row_tile = first_row_tile + within - column_tile * band_rows;
    Tile tile;
    tile.layer = 0;
    while (column_tile >= p.layer[tile.layer].tile_end) ++tile.layer;
    const Layer& layer = p.layer[tile.layer];
    const int first_tile = tile.layer ? p.layer[tile.layer - 1].tile_end : 0;
    const int first_column = tile.layer ? p.layer[tile.layer - 1].column_end : 0;
    tile.first_slab = row_tile * SLABS;
    tile.slabs = min(SLABS, p.slabs - tile.first_slab);
    tile.weight_row = (column_tile - first_tile) * BN;
    tile.column = first_column + tile.weight_row;
    tile.column_end = layer.column_end;
    tile.first_rank_block = layer.first_rank_block;
    tile.rank_blocks = layer.rank_blocks;
    return tile;
}

// threadIdx.x, read anew: what is derived from it is not kept in registers through the main loop.
DEVICE int thread_now() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// gridDim.x, likewise.
DEVICE int ctas_now() {
    int ctas;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(ctas));
    return ctas;
}

enum class Part { WHOLE, BEGINNING, END };

// Stages [first, last) of a tile. An END waits for the CTAs from `peer` on to this one.
struct Work {
    int tile, first, last, peer;
    Part part;
};

DEVICE int share_begin(const Parameters& p, int cta) { return cta * (p.split_tiles * p.split_stages) / p.split_ctas; }

// Work number `item` of this CTA, false where there is none: the last but one is the beginning of a split tile, the
// last the end of one. CTAs start in order, so one that waits for those before it cannot wait for ever.
DEVICE bool work_at(const Parameters& p, int item, int items, Work& work) {
    const int cta = blockIdx.x, ctas = ctas_now();
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
    const int cta = blockIdx.x, ctas = ctas_now();
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

// What the compress kernel reads: parameters, which columns a lane holds, and their way into shared memory.
#pragma once
#if RANK > 0
#define BN RANK
#include "wgmma.cuh"
#endif
#include "producers.cuh"

#define ADJACENT 0
#define STRIDED 1
#define GATHER 2  // any grouping and alignment, an element at a time; SOURCE == MATRIX

constexpr int BLOCK_K = FP8 ? 128 : 64;  // logical k of a block, whose 64 rows keep 64 bytes each
constexpr int METADATA = 4096, BLOCK_BYTES = METADATA + BLOCK_K * 8;
constexpr bool SLAB = RANK > 0 || FP8;  // whether the warps of a CTA own rows, or shares of K
constexpr int WARPS = SLAB ? 4 : 8, THREADS = WARPS * 32;
constexpr int ROWS = SLAB ? 64 : 16;             // of a CTA
constexpr int TILES = MODE == ADJACENT ? 2 : 4;  // 32-column tiles of a unit
constexpr int GROUPS = TILES * 2;                // of a lane's row in a unit
constexpr int UNIT_K = TILES * 32;
// CTAs or warps that share K take turns at portions: whole units and whole blocks.
constexpr int PORTION_K = UNIT_K > BLOCK_K ? UNIT_K : BLOCK_K;
constexpr int PORTION_UNITS = PORTION_K / UNIT_K, PORTION_BLOCKS = PORTION_K / BLOCK_K;
constexpr int X_TILE = ROWS * 64, DOWN_TILE = RANK * 64;
constexpr int RAW_BYTES = TILES * X_TILE;
constexpr int STAGE_BYTES = Source::RAWS * RAW_BYTES + TILES * DOWN_TILE;
#if RANK > 0
constexpr int RANK_BYTES = 4096, RANK_K = 32;  // of a block of T'
constexpr int T_PITCH = RANK + 4;
#endif
constexpr int MAX_PARTS = 8;
constexpr int MAX_SHARES = FP8 ? 16 : 8;  // of K
constexpr int SHARES_HERE = SLAB ? 1 : WARPS;

// Groups [previous group_end, group_end) lie strided in the columns from first_column on.
struct Part {
    int group_end;
    int first_column;
};

struct Parameters {
    Source source;
    const uint16_t* down;  // A^T (rank, K), contiguous
    uint8_t* blocks;
    float* scale;  // (M), what rows of the product are multiplied by; null where that is 1
    uint8_t* lowrank;
    uint16_t* dense;  // (M, K), or null: what was selected from, to test producers
    int rows, columns;
    int k_blocks, rank, rank_blocks;
    int adjacent;  // for GATHER
    int norm;      // whether `scale` includes s
    int parts;
    Part part[MAX_PARTS];
};
static_assert(sizeof(Parameters) == PARAMETER_BYTES, "the host packs them");

// Entry i of the group is column base + i * stride.
struct Run {
    int base, stride;
};

DEVICE Run run_at(const Parameters& p, int group) {
    int part = 0, first = 0;
    while (part + 1 < p.parts && group >= p.part[part].group_end) first = p.part[part++].group_end;
    return {p.part[part].first_column + group - first, p.part[part].group_end - first};
}

// First of the eight columns that lane q holds of each tile of a unit; at least `columns` where there are none.
struct Columns {
    int base, stride;

    DEVICE int operator[](int tile) const { return base + tile * stride; }
};

DEVICE Columns columns_of(const Parameters& p, int unit, int q) {
    if constexpr (MODE == ADJACENT) {
        return {unit * UNIT_K + q * 8, 32};
    } else {
        const int group = unit * 32 + q * 8;
        if (group * 4 >= p.columns) return {p.columns, 0};
        const Run run = run_at(p, group);
        return {run.base, run.stride};
    }
}

DEVICE uint32_t swizzled(int row, int chunk) { return row * 64 + ((chunk ^ row >> 1) & 3) * 16; }

// An element at a time: eight groups' entry `tile` of a row.
DEVICE uint4 gather(const Parameters& p, const uint16_t* row, int unit, int q, int tile) {
    uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int group = unit * 32 + q * 8 + j;
        if (row == nullptr || group * 4 >= p.columns) continue;
        const Run run = p.adjacent ? Run{group * 4, 1} : run_at(p, group);
        pairs[j / 2] |= uint32_t(row[run.base + tile * run.stride]) << (j % 2 * 16);
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Which units of K a CTA or warp works on: every `shares`-th portion.
struct Share {
    int share, shares, units;

    DEVICE Share(const Parameters& p, int share, int shares) : share(share), shares(shares) {
        const int portions = (p.k_blocks + PORTION_BLOCKS - 1) / PORTION_BLOCKS;
        units = of(portions) * PORTION_UNITS;
    }
    // Units of its portions among the first `portions`.
    DEVICE int of(int portions) const { return (portions - share + shares - 1) / shares; }
    DEVICE int whole_units(int columns) const { return of(columns / PORTION_K) * PORTION_UNITS; }
    DEVICE int unit(int index) const {
        return (share + index / PORTION_UNITS * shares) * PORTION_UNITS + index % PORTION_UNITS;
    }
};

// First of this lane's two rows, within the CTA.
DEVICE int own_row() { return (SLAB ? threadIdx.x / 32 * 16 : 0) + threadIdx.x % 32 / 4; }

// Start a unit's way into a stage: this thread's chunks of X, and its share of A^T.
DEVICE void fetch(const Parameters& p, uint32_t stage, int unit, const Row (&rows)[2], int first_rank) {
    const int q = threadIdx.x % 4, mine = own_row();
    const Columns columns = columns_of(p, unit, q);
    unroll<2>([&](auto i) {
        unroll<TILES>([&](auto tile) {
            const uint32_t to = stage + tile * X_TILE + swizzled(mine + i * 8, q);
            if constexpr (MODE == GATHER) {
                store_shared_16(to, gather(p, rows[i].inside ? rows[i].raw[0] : nullptr, unit, q, tile));
            } else {
                const bool inside = rows[i].inside && columns[tile] < p.columns;
                unroll<Source::RAWS>([&](auto raw) {
                    const uint16_t* from =
                        inside ? p.source.at(rows[i], raw, columns[tile]) : p.source.at(rows[i], raw, 0);
                    copy_async(to + raw * RAW_BYTES, from, inside);
                });
            }
        });
    });
    if constexpr (RANK > 0) {
        const uint32_t down = stage + Source::RAWS * RAW_BYTES;
        unroll<TILES>([&](auto tile) {
#pragma unroll
            for (int n = threadIdx.x / 4; n < RANK; n += THREADS / 4) {
                const bool inside = first_rank + n < p.rank && columns[tile] < p.columns;
                const uint16_t* row = p.down + int64_t(inside ? first_rank + n : 0) * p.columns;
                const uint32_t to = down + tile * DOWN_TILE + swizzled(n, q);
                if constexpr (MODE == GATHER)
                    store_shared_16(to, gather(p, first_rank + n < p.rank ? row : nullptr, unit, q, tile));
                else
                    copy_async(to, row + (inside ? columns[tile] : 0), inside);
            }
        });
    }
}

// What the kernels that compress are told, and how packed blocks and groups lie.
#pragma once
#include "prologues.cuh"

#define ADJACENT 0
#define STRIDED 1
#define GATHER 2  // any grouping and alignment, an element at a time; without a prologue

// A packed block holds 64 rows x BLOCK_K: 64 bytes of kept values a row, then the metadata.
constexpr int BLOCK_K = FP8 ? 128 : 64;
constexpr int kMetadataOffset = 64 * 64;
constexpr int kPackedBlockBytes = kMetadataOffset + BLOCK_K * 8;

// Groups [previous group_end, group_end) lie strided in the columns from first_column on.
struct Part {
    int group_end;
    int first_column;
};

struct Parameters {
    Prologue prologue;
    const uint16_t* lowrank_a;  // A^T (rank, K), contiguous
    uint8_t* packed_a;
    float* scale;  // (M), what rows of the product are multiplied by; null where that is 1
    uint8_t* lowrank;
    uint16_t* dense;  // (M, K), or null: what was selected from, to test prologues
    int rows, columns;
    int k_blocks, rank, rank_blocks;
    int adjacent;  // for GATHER
    int norm;      // whether `scale` includes s
    int num_parts;
    Part part[MAX_PARTS];
};
#include "layout.cuh"

// Entry i of a group is column base + i * stride.
struct GroupColumns {
    int base, stride;
};

DEVICE GroupColumns strided_group(const Parameters& p, int group) {
    int part = 0, first = 0;
    while (part + 1 < p.num_parts && group >= p.part[part].group_end) first = p.part[part++].group_end;
    return {p.part[part].first_column + group - first, p.part[part].group_end - first};
}

// Where a 16-byte chunk of a 64-byte row lies under the 64-byte swizzle.
DEVICE uint32_t swizzle_64b(int row, int chunk) { return row * 64 + ((chunk ^ row >> 1) & 3) * 16; }

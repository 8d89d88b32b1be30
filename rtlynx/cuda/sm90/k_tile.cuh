// A k tile: what a lane holds of it, what is kept of that, and how it is stored.
#pragma once
#include "compress_tiles.cuh"
#include "select.cuh"

// A lane's eight values in each 32 columns, of one row.
struct LaneValues {
    uint4 v[kNumK32];

    DEVICE uint32_t word(int i) const {
        const uint4& four = v[i / 4];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
    }
};

using LaneSelected = Selected<kNumK32>;

DEVICE LaneSelected select_row(const LaneValues& x, uint32_t& largest) {
    return select_row<MODE == ADJACENT>(x.v, largest, [](int, uint32_t) {});
}

#if !FP8
// Store values and metadata of this lane's two rows, in the `m16`-th 16 rows of the packed blocks.
DEVICE void store_k_tile(const Parameters& p, int m64, int m16, int k_tile, const LaneSelected (&selected)[2]) {
    const int lane_idx = threadIdx.x % 32, quad_idx = lane_idx / 4, quad_lane = lane_idx % 4;
    uint8_t* blocks = p.packed_a + int64_t(m64) * p.k_blocks * kPackedBlockBytes;
    const int row = m16 * 16 + quad_idx;
    if constexpr (MODE == ADJACENT) {
        uint8_t* block = blocks + int64_t(k_tile) * kPackedBlockBytes;
        uint32_t words[2];
        unroll<2>([&](auto half) {
            unroll<2>([&](auto i) {
                *reinterpret_cast<uint2*>(block + swizzle_64b(row + i * 8, half * 2 + quad_lane / 2) +
                                          quad_lane % 2 * 8) =
                    uint2{selected[i].pairs[half * 2], selected[i].pairs[half * 2 + 1]};
            });
            const uint32_t low = (selected[0].nibbles >> (half * 8)) & 0xFF;
            const uint32_t high = (selected[1].nibbles >> (half * 8)) & 0xFF;
            words[half] = (low | high << 16) << (quad_lane % 2 * 8);
            words[half] |= __shfl_xor_sync(~0u, words[half], 1);
        });
        uint32_t* metadata = reinterpret_cast<uint32_t*>(block + kMetadataOffset + m16 * 128);
        metadata[quad_idx * 4 + quad_lane % 2 * 2 + quad_lane / 2] = quad_lane % 2 ? words[1] : words[0];
    } else {
        const int k_block = k_tile * 2 + quad_lane / 2, half = quad_lane % 2;
        if (k_block >= p.k_blocks) return;
        uint8_t* block = blocks + int64_t(k_block) * kPackedBlockBytes;
        unroll<2>([&](auto i) {
            unroll<2>([&](auto chunk) {
                const uint32_t* pairs = selected[i].pairs + chunk * 4;
                *reinterpret_cast<uint4*>(block + swizzle_64b(row + i * 8, half * 2 + chunk)) =
                    uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
            });
        });
        const uint32_t low = selected[0].nibbles, high = selected[1].nibbles;
        *reinterpret_cast<uint2*>(block + kMetadataOffset + m16 * 128 + (quad_idx * 4 + half * 2) * 4) =
            uint2{permute(low, high, 0x5410), permute(low, high, 0x7632)};
    }
}
#endif

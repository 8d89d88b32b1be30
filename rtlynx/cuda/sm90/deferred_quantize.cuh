// With FP8 kept values wait in shared memory as bf16 until their row's largest is known, then leave as e4m3.
#pragma once
#include "e4m3.cuh"
#include "k_tile.cuh"

#if FP8
constexpr int kDeferredBytes = 16 * 128;  // of a warp's 16 rows in a packed block: 64 kept values each
static_assert(DEFERRED_BYTES == kNumWarps * kDeferredBytes, "the host gives a CTA room for all its warps");
static_assert(kTBytes <= kStagesBytes, "T is gathered where the stages were, and must not reach what is deferred");

DEVICE uint8_t* packed_block(const Parameters& p, int m64, int k_block) {
    return p.packed_a + (int64_t(m64) * p.k_blocks + k_block) * kPackedBlockBytes;
}

// Where kept values 16 `chunk` ... + 15 of a row of the warp wait: 16 of their 32 bytes, without bank conflicts.
DEVICE uint32_t deferred_address(uint32_t smem_block, int row, int chunk, int half) {
    return smem_block + row * 128 + ((chunk ^ row) & 3) * 32 + ((half ^ row) & 1) * 16;
}

DEVICE void defer_k_tile(uint32_t smem_block, int k_tile, const LaneSelected (&selected)[2]) {
    const int lane_idx = threadIdx.x % 32, quad_idx = lane_idx / 4, quad_lane = lane_idx % 4;
    unroll<2>([&](auto i) {
        const int row = quad_idx + i * 8;
        const uint32_t* pairs = selected[i].pairs;
        if constexpr (MODE == ADJACENT) {
            unroll<kNumK32>([&](auto k32) {
                const int chunk = k_tile % kTilesPerChunk * kNumK32 + k32;
                const uint32_t to = deferred_address(smem_block, row, chunk, quad_lane / 2) + quad_lane % 2 * 8;
                asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(pairs[k32 * 2]), "r"(pairs[k32 * 2 + 1])
                             : "memory");
            });
        } else {
            unroll<2>([&](auto half) {
                const uint32_t* four = pairs + half * 4;
                store_smem_16(deferred_address(smem_block, row, quad_lane, half),
                              uint4{four[0], four[1], four[2], four[3]});
            });
        }
    });
}

// Store the metadata of this lane's two rows. Thread 4g + 2b + i of the warp supplies row g + 8i of the 32 logical k
// from 64 h + 32 b on: a word for each of the packed block's two wgmmas h.
DEVICE void store_metadata(const Parameters& p, int m64, int m16, int k_tile, const LaneSelected (&selected)[2]) {
    const int lane_idx = threadIdx.x % 32, quad_lane = lane_idx % 4;
    uint8_t* block = packed_block(p, m64, k_tile / kTilesPerChunk);
    uint32_t* words = reinterpret_cast<uint32_t*>(block + kMetadataOffset + m16 * 256) + lane_idx / 4 * 8;
    if constexpr (MODE == ADJACENT) {
        // Each lane has a byte of four words, by 32 columns and row. After two exchanges a lane has a whole word: the
        // one of its place in the quad.
        uint32_t mine = permute(selected[0].nibbles, selected[1].nibbles, 0x5140);
        uint32_t keep = quad_lane & 2 ? mine >> 16 : mine & 0xFFFF, give = quad_lane & 2 ? mine & 0xFFFF : mine >> 16;
        uint32_t got = __shfl_xor_sync(~0u, give, 2);
        const uint32_t both = quad_lane & 2 ? got | keep << 16 : keep | got << 16;
        keep = permute(both, 0, quad_lane & 1 ? 0x4431 : 0x4420),
        give = permute(both, 0, quad_lane & 1 ? 0x4420 : 0x4431);
        got = __shfl_xor_sync(~0u, give, 1);
        words[quad_lane * 2 + k_tile % kTilesPerChunk] = permute(keep, got, quad_lane & 1 ? 0x1504 : 0x5140);
    } else {
        unroll<2>([&](auto i) { words[(quad_lane % 2 * 2 + i) * 2 + quad_lane / 2] = selected[i].nibbles; });
    }
}

// Quantise and store a packed block's values of this lane's two rows, which have waited in `smem_block`.
DEVICE void store_quantized(const Parameters& p, int m64, int m16, int k_block, uint32_t smem_block,
                            const float (&inverse)[2]) {
    const int lane_idx = threadIdx.x % 32, quad_idx = lane_idx / 4, quad_lane = lane_idx % 4;
    uint8_t* block = packed_block(p, m64, k_block);
    unroll<2>([&](auto i) {
        const int row = quad_idx + i * 8;
        const uint4 a = load_smem_16(deferred_address(smem_block, row, quad_lane, 0));
        const uint4 b = load_smem_16(deferred_address(smem_block, row, quad_lane, 1));
        *reinterpret_cast<uint4*>(block + swizzle_64b(m16 * 16 + row, quad_lane)) =
            uint4{quantized(a.x, a.y, inverse[i]), quantized(a.z, a.w, inverse[i]), quantized(b.x, b.y, inverse[i]),
                  quantized(b.z, b.w, inverse[i])};
    });
}
#endif

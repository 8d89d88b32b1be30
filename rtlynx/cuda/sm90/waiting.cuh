// With FP8: kept values wait in shared memory as bf16 until their row's largest is known, then leave as e4m3.
#pragma once
#include "e4m3.cuh"
#include "unit.cuh"

#if FP8
constexpr int WAITING_BYTES = 16 * 128;  // of a warp's 16 rows in a block: 64 kept values each
#if RANK > 0
static_assert(ROWS * T_PITCH * 4 <= STAGES * STAGE_BYTES, "T, gathered where stages were, spares what waits");
#endif

// 16 of the 32 bytes in which kept values 16 `chunk` ... + 15 of a row of the warp wait, without bank conflicts.
DEVICE uint32_t waiting(uint32_t block, int row, int chunk, int half) {
    return block + row * 128 + ((chunk ^ row) & 3) * 32 + ((half ^ row) & 1) * 16;
}

DEVICE void keep_waiting(uint32_t block, int unit, const Selected (&selected)[2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    unroll<2>([&](auto i) {
        const int row = g + i * 8;
        const uint32_t* pairs = selected[i].pairs;
        if constexpr (MODE == ADJACENT) {
            unroll<TILES>([&](auto tile) {
                const uint32_t to = waiting(block, row, unit % PORTION_UNITS * TILES + tile, q / 2) + q % 2 * 8;
                asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(pairs[tile * 2]),
                             "r"(pairs[tile * 2 + 1])
                             : "memory");
            });
        } else {
            unroll<2>([&](auto half) {
                const uint32_t* four = pairs + half * 4;
                store_shared_16(waiting(block, row, q, half), uint4{four[0], four[1], four[2], four[3]});
            });
        }
    });
}

// Metadata of this lane's rows g and g + 8. Thread 4g + 2b + i of the warp supplies row g + 8i of the 32 logical k from
// 64 `instruction` + 32 b on, a word for each of the block's two instructions.
DEVICE void store_metadata(const Parameters& p, int slab, int sixteen, int unit, const Selected (&selected)[2]) {
    const int lane = threadIdx.x % 32, q = lane % 4;
    uint8_t* block = p.blocks + (int64_t(slab) * p.k_blocks + unit / PORTION_UNITS) * BLOCK_BYTES;
    uint32_t* words = reinterpret_cast<uint32_t*>(block + METADATA + sixteen * 256) + lane / 4 * 8;
    if constexpr (MODE == ADJACENT) {
        // Each lane has a byte of four words, by tile and row; after two exchanges it has the q-th word as a whole.
        uint32_t mine = permute(selected[0].nibbles, selected[1].nibbles, 0x5140);
        uint32_t keep = q & 2 ? mine >> 16 : mine & 0xFFFF, give = q & 2 ? mine & 0xFFFF : mine >> 16;
        uint32_t got = __shfl_xor_sync(~0u, give, 2);
        const uint32_t both = q & 2 ? got | keep << 16 : keep | got << 16;
        keep = permute(both, 0, q & 1 ? 0x4431 : 0x4420), give = permute(both, 0, q & 1 ? 0x4420 : 0x4431);
        got = __shfl_xor_sync(~0u, give, 1);
        words[q * 2 + unit % PORTION_UNITS] = permute(keep, got, q & 1 ? 0x1504 : 0x5140);
    } else {
        unroll<2>([&](auto i) { words[(q % 2 * 2 + i) * 2 + q / 2] = selected[i].nibbles; });
    }
}

// A block's values of this lane's rows g and g + 8, which have waited in `from`.
DEVICE void store_quantized(const Parameters& p, int slab, int sixteen, int block_index, uint32_t from,
                            const float (&inverse)[2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint8_t* block = p.blocks + (int64_t(slab) * p.k_blocks + block_index) * BLOCK_BYTES;
    unroll<2>([&](auto i) {
        const int row = g + i * 8;
        const uint4 a = load_shared_16(waiting(from, row, q, 0)), b = load_shared_16(waiting(from, row, q, 1));
        *reinterpret_cast<uint4*>(block + swizzled(sixteen * 16 + row, q)) =
            uint4{quantized(a.x, a.y, inverse[i]), quantized(a.z, a.w, inverse[i]), quantized(b.x, b.y, inverse[i]),
                  quantized(b.z, b.w, inverse[i])};
    });
}
#endif

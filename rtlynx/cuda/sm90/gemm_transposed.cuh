// The way out of a product whose rows are output channels and whose columns are tokens: Y (tokens, channels).
#pragma once
#include "gemm_epilogue.cuh"

static_assert(FP8, "weights are packed in e4m3");

// Named barriers of the warpgroups, behind those by which one starts the other (SkewBarrier).
constexpr int kFirstStoreBarrier = 9;

// t of a tile's tokens, in this warp's shared memory.
struct TokenScales {
    DEVICE void load(const Parameters& p, const TileInfo& info, uint32_t smem_base) {
        const int thread_idx = reload_thread_idx(), lane_idx = thread_idx % 32;
        const uint32_t to = TileAffine::smem_affine(smem_base, thread_idx) + lane_idx * 4;
        unroll<BLOCK_N / 32>([&](auto n32) {
            const int token = info.column + n32 * 32 + lane_idx;
            const float t = token < info.column_end ? p.column_scale[0][token] : 0.f;
            asm volatile("st.shared.f32 [%0 + %1], %2;" ::"r"(to), "n"(n32 * 128), "f"(t) : "memory");
        });
        __syncwarp();
    }
    // Of tokens 8 kN8 + 2 (lane % 4) and the next.
    template <int kN8>
    DEVICE static Pair of(uint32_t smem_base, int thread_idx) {
        Pair t;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];"
                     : "=f"(t.low), "=f"(t.high)
                     : "r"(TileAffine::smem_affine(smem_base, thread_idx) + thread_idx % 4 * 8), "n"(kN8 * 32)
                     : "memory");
        return t;
    }
};

DEVICE float load_channel_bias(const Parameters& p, int layer, int channel) {
    const void* bias = p.bias[layer];
    if (bias == nullptr) return 0.f;
    if (p.bias_is_float) return static_cast<const float*>(bias)[channel];
    return bf16_low(static_cast<const uint16_t*>(bias)[channel]);
}

// Scale, bias, round and store one wgmma tile: 64 channels of BLOCK_N tokens. The warps of a warpgroup turn it
// together, 64 tokens at a time, so that tokens leave as whole 128-byte lines of 64 channels. In shared memory a
// token's 16-byte chunks are xor-swizzled by the token.
DEVICE void store_m64(const Parameters& p, const float (&d)[BLOCK_N / 2], const TokenScales& scales,
                      const TileInfo& info, int m64, uint32_t smem_base) {
    const int thread_idx = reload_thread_idx(), lane_idx = thread_idx % 32, warp_idx = thread_idx / 32 % 4;
    const int warpgroup_idx = thread_idx / 128 - 1, first_channel = info.row + m64 * kWgmmaM;
    const uint32_t smem_staging = smem_base + kStagingOffset + warpgroup_idx * (4 * kStagingBytes);
    // The two channels whose sums this lane holds.
    const int channel_end = row_end(p, info.layer());
    const int low = min(first_channel + warp_idx * 16 + lane_idx / 4, channel_end - 1);
    const int high = min(first_channel + warp_idx * 16 + lane_idx / 4 + 8, channel_end - 1);
    const Pair c{p.scale[info.layer()][low], p.scale[info.layer()][high]};
    const Pair bias{load_channel_bias(p, info.layer(), low), load_channel_bias(p, info.layer(), high)};
    // Of the four 8x8 matrices of a transposing stmatrix: channels 0-7, channels 8-15, then those of the next 8 tokens.
    const uint32_t to =
        smem_staging + (lane_idx / 16 * 8 + lane_idx % 8) * 128 + (warp_idx * 2 + lane_idx / 8 % 2 ^ lane_idx % 8) * 16;
    // What this lane stores: tokens 4 i + store_token, 8 channels.
    const int store_token = warp_idx * 16 + lane_idx / 8, channel = first_channel + lane_idx % 8 * 8;
    const uint32_t from = smem_staging + store_token * 128 + (lane_idx % 8 ^ lane_idx / 8) * 16;
    unroll<BLOCK_N / 64>([&](auto n64) {
        named_barrier_sync(kFirstStoreBarrier + warpgroup_idx, 128);  // all have read what was there
        unroll<4>([&](auto n16) {
            uint32_t out[4];
            unroll<2>([&](auto half) {
                constexpr int n8 = decltype(n64)::value * 8 + decltype(n16)::value * 2 + decltype(half)::value;
                const float* sum = d + n8 * 4;
                const Pair t = scales.of<n8>(smem_base, thread_idx);
                out[half * 2] = pack_bf16(apply_affine(sum[0], c.low, t.low, bias.low),
                                          apply_affine(sum[1], c.low, t.high, bias.low));
                out[half * 2 + 1] = pack_bf16(apply_affine(sum[2], c.high, t.low, bias.high),
                                              apply_affine(sum[3], c.high, t.high, bias.high));
            });
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0 + %1], {%2, %3, %4, %5};" ::"r"(to),
                         "n"(n16 * 16 * 128), "r"(out[0]), "r"(out[1]), "r"(out[2]), "r"(out[3])
                         : "memory");
        });
        named_barrier_sync(kFirstStoreBarrier + warpgroup_idx, 128);
        const int token = info.column + n64 * 64 + store_token;
        uint16_t* out = p.out + int64_t(token) * p.columns + channel;
        unroll<4>([&](auto i) {
            const uint4 value = load_smem_16((from ^ i % 2 * 64) + i * 512);
            if (channel < channel_end && token + i * 4 < info.column_end) store_streaming(out, value);
            out += int64_t(p.columns) * 4;
        });
    });
}

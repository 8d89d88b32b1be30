// The GEMM's epilogue: accumulators to Y, or as partial sums to the workspace where a tile is split along k.
#pragma once
#include "gemm_schedule.cuh"

static_assert(BLOCK_N % STORE_N == 0,
              "a tile is stored STORE_N columns at a time: what is beyond the last of them would be lost");
static_assert(kStagingBytes == 16 * STORE_N * 2, "a warp's 16 rows of so many columns, in bf16");

using Accumulators = float[kM64PerWarpgroup][BLOCK_N / 2];

// What the epilogue must know. It waits in shared memory, not in registers, while the accumulators are live.
struct TileInfo {
    int row, column, column_end, num_m64;
    int part_and_layer, peer;

    DEVICE TilePart part() const { return TilePart(part_and_layer & 0xFF); }
    DEVICE int layer() const { return part_and_layer >> 8; }
};
static_assert(sizeof(TileInfo) == 24 && kTileInfoBytes == 32, "the loop's own state takes the last 8 bytes");

DEVICE void store_tile_info(uint32_t address, const TileInfo& info) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(info.row), "r"(info.column),
                     "r"(info.column_end), "r"(info.num_m64)
                     : "memory");
        asm volatile("st.shared.v2.u32 [%0 + 16], {%1, %2};" ::"r"(address), "r"(info.part_and_layer), "r"(info.peer)
                     : "memory");
    }
    __syncwarp();
}
DEVICE TileInfo load_tile_info(uint32_t address) {
    TileInfo info;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(info.row), "=r"(info.column), "=r"(info.column_end), "=r"(info.num_m64)
                 : "r"(address)
                 : "memory");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 16];"
                 : "=r"(info.part_and_layer), "=r"(info.peer)
                 : "r"(address)
                 : "memory");
    return info;
}

// The loop's own state waits there too.
DEVICE void spill_loop_state(uint32_t address, const PipelineState& pipe, int work_idx) {
    if (reload_thread_idx() % 32 == 0)
        asm volatile("st.shared.v2.u32 [%0 + 24], {%1, %2};" ::"r"(address), "r"(pipe.stage_idx | pipe.phase << 16),
                     "r"(work_idx)
                     : "memory");
    __syncwarp();
}
DEVICE void restore_loop_state(uint32_t address, PipelineState& pipe, int& work_idx) {
    uint32_t state;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 24];" : "=r"(state), "=r"(work_idx) : "r"(address) : "memory");
    pipe.stage_idx = state & 0xFFFF;
    pipe.phase = state >> 16;
}

// A load that nobody waits for.
DEVICE void prefetch_to_l1(const void* p) {
    [[maybe_unused]] uint32_t value;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
}

// Bring this warp's s into L1 while the last products are computed.
DEVICE void prefetch_scale(const Parameters& p, const TileInfo& info, int warpgroup_idx) {
    const int lane_idx = reload_thread_idx() % 32;
    const int row = info.row + (warpgroup_idx + lane_idx / 16 * kNumConsumerWarpgroups) * kWgmmaM +
                    reload_thread_idx() / 32 % 4 * 16 + lane_idx % 16;
    const float* scale = p.scale[sparse_of(info.layer())];
    if (scale != nullptr && row < row_end(p, info.layer())) prefetch_to_l1(scale + row);
}

struct Pair {
    float low, high;
};

// Bias of `column` of Y and the next, both inside or both outside of their layer.
DEVICE Pair load_bias(const Parameters& p, const TileInfo& info, int column) {
    const void* bias = p.bias[info.layer()];
    if (bias == nullptr || column >= info.column_end) return {0.f, 0.f};
    if (p.bias_is_float) return static_cast<const Pair*>(bias)[column / 2];
    const uint32_t both = static_cast<const uint32_t*>(bias)[column / 2];
    return {bf16_low(both), bf16_high(both)};
}

// What an accumulator of the columns 2i, 2i + 1 of a tile is multiplied by, and what is added after the row's scale.
struct Affine {
    Pair scale, bias;
};

#if FP8
// That of a tile, in this warp's shared memory.
struct TileAffine {
    DEVICE static uint32_t smem_affine(uint32_t smem_base, int thread_idx) {
        return smem_base + kAffineOffset + (thread_idx / 32 - 4) * kAffineBytes;
    }
    DEVICE void load(const Parameters& p, const TileInfo& info, uint32_t smem_base) {
        const int lane_idx = reload_thread_idx() % 32;
        const uint32_t to = smem_affine(smem_base, reload_thread_idx());
        unroll<BLOCK_N / STORE_N>([&](auto n64) {
            const int column = info.column + n64 * STORE_N + lane_idx * 2;
            const Pair bias = load_bias(p, info, column);
            Pair scale{1.f, 1.f};
            if (column < info.column_end)
                scale = reinterpret_cast<const Pair*>(p.column_scale[info.layer()])[column / 2];
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + (n64 * 32 + lane_idx) * 16),
                         "f"(scale.low), "f"(scale.high), "f"(bias.low), "f"(bias.high)
                         : "memory");
        });
        __syncwarp();
    }
    // Where a lane finds its two of every eight columns.
    DEVICE static uint32_t place(uint32_t smem_base, int thread_idx) {
        return smem_affine(smem_base, thread_idx) + thread_idx % 4 * 16;
    }
    template <int kN8>
    DEVICE Affine of(uint32_t place) const {
        Affine a;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
                     : "=f"(a.scale.low), "=f"(a.scale.high), "=f"(a.bias.low), "=f"(a.bias.high)
                     : "r"(place), "n"(kN8 * 64)
                     : "memory");
        return a;
    }
};
#else
// That of a tile: each lane holds two of every 64 columns, and the warp passes them around.
struct TileAffine {
    Pair bias[BLOCK_N / STORE_N];

    DEVICE void load(const Parameters& p, const TileInfo& info, uint32_t) {
        unroll<BLOCK_N / STORE_N>([&](auto n64) {
            bias[n64] = load_bias(p, info, info.column + n64 * STORE_N + reload_thread_idx() % 32 * 2);
        });
    }
    DEVICE static int place(uint32_t, int thread_idx) { return thread_idx % 4; }
    template <int kN8>
    DEVICE Affine of(int place) const {
        const Pair mine = bias[kN8 / 8];
        const int from_lane = kN8 % 8 * 4 + place;
        return {{1.f, 1.f}, {__shfl_sync(~0u, mine.low, from_lane), __shfl_sync(~0u, mine.high, from_lane)}};
    }
};
#endif

// An accumulator on its way out; a scale of 1 is no multiplication.
DEVICE float apply_affine(float sum, float column_scale, float row_scale, float bias) {
    return fmaf(FP8 ? sum * column_scale : sum, row_scale, bias);
}

DEVICE void store_streaming(uint16_t* to, const uint4& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Scale, bias, round and store one wgmma tile. Each warp turns 16 rows x 64 columns in its own 2 KB of shared memory,
// so that rows leave as whole 128-byte lines. There 16-byte chunks are xor-swizzled by row.
DEVICE void store_m64(const Parameters& p, const float (&d)[BLOCK_N / 2], const TileAffine& affine,
                      const TileInfo& info, int m64, uint32_t smem_base) {
    const int thread_idx = reload_thread_idx(), lane_idx = thread_idx % 32, warp_idx = thread_idx / 32 % 4;
    const int store_row = lane_idx / 8, chunk = lane_idx % 8;  // what this lane stores: rows 4 i + store_row, 8 columns
    const uint32_t smem_staging = smem_base + kStagingOffset + (thread_idx / 32 - 4) * kStagingBytes;
    const int row0 = info.row + m64 * kWgmmaM + warp_idx * 16 + store_row;
    Pair s{1.f, 1.f};  // of the two rows whose sums this lane holds
    if (p.scale[0] != nullptr) {
        const int first = row0 - store_row + lane_idx / 4;
        s = {p.scale[0][min(first, p.rows - 1)], p.scale[0][min(first + 8, p.rows - 1)]};
    }
    // Xor moves among chunks: staging is aligned. Of the four 8x8 matrices of a stmatrix: rows 0-7, rows 8-15, then
    // the same of the next 8 columns.
    const uint32_t to = smem_staging + lane_idx % 16 * 128 + (lane_idx / 16 ^ lane_idx % 8) * 16;
    const uint32_t from = smem_staging + store_row * 128 + (chunk ^ store_row) * 16;
    const auto place = affine.place(smem_base, thread_idx);
    unroll<BLOCK_N / STORE_N>([&](auto n64) {
        unroll<4>([&](auto n16) {
            uint32_t out[4];
            unroll<2>([&](auto half) {
                constexpr int n8 = decltype(n64)::value * 8 + decltype(n16)::value * 2 + decltype(half)::value;
                const float* c = d + n8 * 4;
                const Affine a = affine.template of<n8>(place);
                out[half * 2] = pack_bf16(apply_affine(c[0], a.scale.low, s.low, a.bias.low),
                                          apply_affine(c[1], a.scale.high, s.low, a.bias.high));
                out[half * 2 + 1] = pack_bf16(apply_affine(c[2], a.scale.low, s.high, a.bias.low),
                                              apply_affine(c[3], a.scale.high, s.high, a.bias.high));
            });
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to ^ n16 * 32),
                         "r"(out[0]), "r"(out[1]), "r"(out[2]), "r"(out[3])
                         : "memory");
        });
        __syncwarp();
        const int column = info.column + n64 * STORE_N + chunk * 8;
        uint16_t* out = p.out + int64_t(row0) * p.columns + column;
        unroll<4>([&](auto i) {
            uint4 value;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                         : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                         : "r"(from ^ i % 2 * 64), "n"(i * 512)
                         : "memory");
            if (column < info.column_end && row0 + i * 4 < p.rows) store_streaming(out, value);
            out += int64_t(p.columns) * 4;
        });
        __syncwarp();
    });
}

// ---- tiles that are split along k -------------------------------------------------------------------------

DEVICE float4* partials_of(const Parameters& p, int cta, int m64) {
    const int warp_idx = reload_thread_idx() / 32 - 4;
    return p.workspace + int64_t((cta * CONSUMER_WARPS + warp_idx) * kM64PerWarpgroup + m64) * (BLOCK_N / 8 * 32) +
           reload_thread_idx() % 32;
}
DEVICE uint64_t* ready_flag_of(const Parameters& p, int cta) {
    return p.ready + cta * CONSUMER_WARPS + reload_thread_idx() / 32 - 4;
}

// Leave this CTA's partial sums, and mark them as there.
DEVICE void store_partials(const Parameters& p, const Accumulators& d, int num_m64) {
    const int cta = blockIdx.x;
    unroll<kM64PerWarpgroup>([&](auto i) {
        if (i >= num_m64) return;
        float4* to = partials_of(p, cta, i);
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j)
            __stcg(to + j * 32, float4{d[i][j * 4], d[i][j * 4 + 1], d[i][j * 4 + 2], d[i][j * 4 + 3]});
    });
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(ready_flag_of(p, cta)), "l"(p.nonce) : "memory");
}

// Add the partial sums that the CTAs from `peer` on have left. Marks are taken back, so that a replayed graph finds
// none.
DEVICE void add_partials(const Parameters& p, Accumulators& d, int peer, int num_m64) {
#pragma unroll 1
    for (int cta = peer; cta < int(blockIdx.x); ++cta) {
        if (reload_thread_idx() % 32 == 0) {
            uint64_t* ready_flag = ready_flag_of(p, cta);
            uint64_t mark;
            do {
                asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(mark) : "l"(ready_flag) : "memory");
            } while (mark != p.nonce);
            *ready_flag = 0;
        }
        __syncwarp();
        unroll<kM64PerWarpgroup>([&](auto i) {
            if (i >= num_m64) return;
            const float4* from = partials_of(p, cta, i);
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; ++j) {
                const float4 sum = __ldcg(from + j * 32);
                d[i][j * 4] += sum.x;
                d[i][j * 4 + 1] += sum.y;
                d[i][j * 4 + 2] += sum.z;
                d[i][j * 4 + 3] += sum.w;
            }
        });
    }
}

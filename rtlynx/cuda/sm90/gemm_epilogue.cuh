// The way out of the GEMM's accumulators: to Y, or to the workspace where a tile is shared.
#pragma once
#include "gemm_schedule.cuh"

static_assert(BN % 64 == 0, "a tile is stored 64 columns at a time: what is beyond the last 64 would be lost");

using Accumulators = float[SLABS_A_GROUP][BN / 2];

// What the epilogue must know waits in shared memory, not in registers, while the accumulators are live.
struct Note {
    int first_slab, column, column_end, count;
    int part_and_layer, peer;

    DEVICE Part part() const { return Part(part_and_layer & 0xFF); }
    DEVICE int layer() const { return part_and_layer >> 8; }
};

DEVICE void write_note(uint32_t address, const Note& note) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(note.first_slab), "r"(note.column),
                     "r"(note.column_end), "r"(note.count)
                     : "memory");
        asm volatile("st.shared.v2.u32 [%0 + 16], {%1, %2};" ::"r"(address), "r"(note.part_and_layer), "r"(note.peer)
                     : "memory");
    }
    __syncwarp();
}
DEVICE Note read_note(uint32_t address) {
    Note note;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(note.first_slab), "=r"(note.column), "=r"(note.column_end), "=r"(note.count)
                 : "r"(address)
                 : "memory");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + 16];"
                 : "=r"(note.part_and_layer), "=r"(note.peer)
                 : "r"(address)
                 : "memory");
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
    [[maybe_unused]] uint32_t value;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
}

// Bring this warp's s into L1 while the last products are computed.
DEVICE void touch_scale(const Parameters& p, const Note& note, int group) {
    const int lane = thread_now() % 32;
    const int row =
        (note.first_slab + group + lane / 16 * GROUPS) * BLOCK_ROWS + thread_now() / 32 % 4 * 16 + lane % 16;
    if (p.scale != nullptr && row < p.rows) touch(p.scale + row);
}

struct Pair {
    float low, high;
};

// Bias of `column` of Y and the next, both inside or both outside of their layer.
DEVICE Pair load_bias(const Parameters& p, const Note& note, int column) {
    const void* bias = p.bias[note.layer()];
    if (bias == nullptr || column >= note.column_end) return {0.f, 0.f};
    if (p.bias_is_float) return static_cast<const Pair*>(bias)[column / 2];
    const uint32_t both = static_cast<const uint32_t*>(bias)[column / 2];
    return {bf16_low(both), bf16_high(both)};
}

// What an accumulator of the columns 2i, 2i + 1 of a tile is multiplied by, and what is added after the row's scale.
struct Affine {
    Pair scale, bias;
};

#if FP8
// A tile's, in this warp's shared memory.
struct TileAffine {
    DEVICE static uint32_t base(uint32_t shared, int thread) {
        return shared + AFFINE + (thread / 32 - 4) * AFFINE_BYTES;
    }
    DEVICE void load(const Parameters& p, const Note& note, uint32_t shared) {
        const int lane = thread_now() % 32;
        const uint32_t to = base(shared, thread_now());
        unroll<BN / 64>([&](auto wide) {
            const int at = note.column + wide * 64 + lane * 2;
            const Pair bias = load_bias(p, note, at);
            Pair scale{1.f, 1.f};
            if (at < note.column_end) scale = reinterpret_cast<const Pair*>(p.column_scale[note.layer()])[at / 2];
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + (wide * 32 + lane) * 16), "f"(scale.low),
                         "f"(scale.high), "f"(bias.low), "f"(bias.high)
                         : "memory");
        });
        __syncwarp();
    }
    // Where a lane finds its two of every eight columns.
    DEVICE static uint32_t place(uint32_t shared, int thread) { return base(shared, thread) + thread % 4 * 16; }
    template <int EIGHT>
    DEVICE Affine of(uint32_t place) const {
        Affine a;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
                     : "=f"(a.scale.low), "=f"(a.scale.high), "=f"(a.bias.low), "=f"(a.bias.high)
                     : "r"(place), "n"(EIGHT * 64)
                     : "memory");
        return a;
    }
};
#else
// A tile's, each lane's two of every 64 columns; the warp passes them around.
struct TileAffine {
    Pair bias[BN / 64];

    DEVICE void load(const Parameters& p, const Note& note, uint32_t) {
        unroll<BN / 64>(
            [&](auto wide) { bias[wide] = load_bias(p, note, note.column + wide * 64 + thread_now() % 32 * 2); });
    }
    DEVICE static int place(uint32_t, int thread) { return thread % 4; }
    template <int EIGHT>
    DEVICE Affine of(int place) const {
        const Pair mine = bias[EIGHT / 8];
        const int from = EIGHT % 8 * 4 + place;
        return {{1.f, 1.f}, {__shfl_sync(~0u, mine.low, from), __shfl_sync(~0u, mine.high, from)}};
    }
};
#endif

// An accumulator on its way out; a scale of 1 is no multiplication.
DEVICE float finished(float sum, float column_scale, float row_scale, float bias) {
    return fmaf(FP8 ? sum * column_scale : sum, row_scale, bias);
}

DEVICE void store_streaming(uint16_t* to, const uint4& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Scale, bias, round and store one slab. Each warp turns 16 rows x 64 columns in its own 2 KB of shared memory
// (16-byte chunks xor-swizzled by row), so that rows leave as whole 128-byte lines.
DEVICE void store_slab(const Parameters& p, const float (&d)[BN / 2], const TileAffine& affine, const Note& tile,
                       int slab, uint32_t shared) {
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
    const auto place = affine.place(shared, thread);
    unroll<BN / 64>([&](auto wide) {
        unroll<4>([&](auto part) {
            uint32_t out[4];
            unroll<2>([&](auto half) {
                constexpr int block = decltype(wide)::value * 8 + decltype(part)::value * 2 + decltype(half)::value;
                const float* c = d + block * 4;
                const Affine a = affine.template of<block>(place);
                out[half * 2] = pack_bf16(finished(c[0], a.scale.low, s.low, a.bias.low),
                                          finished(c[1], a.scale.high, s.low, a.bias.high));
                out[half * 2 + 1] = pack_bf16(finished(c[2], a.scale.low, s.high, a.bias.low),
                                              finished(c[3], a.scale.high, s.high, a.bias.high));
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
    return p.workspace + int64_t((cta * CONSUMER_WARPS + warp) * SLABS_A_GROUP + slab) * (BN / 8 * 32) +
           thread_now() % 32;
}
DEVICE uint64_t* ready_of(const Parameters& p, int cta) {
    return p.ready + cta * CONSUMER_WARPS + thread_now() / 32 - 4;
}

DEVICE void leave_sums(const Parameters& p, const Accumulators& d, int count) {
    const int cta = blockIdx.x;
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
    for (int cta = peer; cta < int(blockIdx.x); ++cta) {
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

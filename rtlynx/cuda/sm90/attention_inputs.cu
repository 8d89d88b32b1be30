// Queries, keys and values (B, T, H, D) bf16, as products leave them -> the e4m3 or bf16 that attention reads,
// (B, S, H, D) contiguous. rtlynx/math/attention.py defines it.
//
// Queries and keys: RMS norm over D, rotation of pairs of neighbours, times a power of two. Values: less a mean, over a
// scale, both of each channel and of a sample of its tokens; in bf16 as they are, copied where `value` is not null.
// Tokens come in two streams, the second behind the first.
//
// A lane holds eight neighbours of a head. A warp takes a token, all heads of its query and of its key, and so loads
// its rotation once. A CTA of values takes some tokens of one head. It looks at the whole sample by itself, most of it
// in L2: a kernel or a wait between the two would take longer. Those CTAs come first, since they work longest.
//
// Macros: FP8 (1: e4m3 out, 0: bf16), HEAD_DIM (64 or 128), REACH (the largest sampled value becomes this), WARPS (of a
// CTA), PARAMETER_FIELDS (layout.cuh).
#include "e4m3.cuh"
#include "f32x8.cuh"

constexpr int kInFlight = 4;  // vectors that a lane waits for at one time
constexpr int kLanes = HEAD_DIM / 8, kHeadsOfWarp = 32 / kLanes, kRows = WARPS * kHeadsOfWarp;
constexpr int kOutBytes = FP8 ? 1 : 2;
static_assert(HEAD_DIM % 8 == 0 && 32 % kLanes == 0, "a warp holds whole heads");

// (B, T, H, D) whose last axis is dense; strides in elements.
struct Heads {
    const uint16_t* data;
    int64_t batch_stride, token_stride, head_stride;

    DEVICE const uint16_t* at(int batch, int token, int head) const {
        return data + batch * batch_stride + token * token_stride + head * head_stride;
    }
};

struct Stream {
    Heads query, key, value;
    const uint16_t *query_weight, *key_weight;  // (D)
    // (T, D) each; without sine, (T, D / 2, 2) of both; without cosine there is no rotation. Strides are shared.
    const float *cosine, *sine;
    int64_t rotary_batch_stride, rotary_token_stride;
};

struct Parameters {
    Stream stream[2];
    uint8_t *query, *key, *value;
    float *value_scale, *value_mean;  // (B, H, D)
    float query_factor, key_factor, eps;
    int batches, tokens, first_tokens, heads;  // tokens of both streams, and of the first
    int value_chunks, chunk_tokens;            // CTAs of a head's values (0 in bf16), and tokens of each
    int samples, sample_step;
};
#include "layout.cuh"

// y = own * x + other * (the x beside it in its pair): norm's weight and rotation in one.
struct Turn {
    F32x8 own, other;
};

DEVICE F32x8 load_f32x8(const float* from) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from) + 1);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

DEVICE Turn load_rotation(const Stream& s, int batch, int token, int column) {
    Turn turn;
    if (s.cosine == nullptr) {
        unroll<8>([&](auto i) { turn.own.v[i] = 1.f, turn.other.v[i] = 0.f; });
        return turn;
    }
    const int64_t at = batch * s.rotary_batch_stride + token * s.rotary_token_stride + column;
    turn.own = load_f32x8(s.cosine + at);
    if (s.sine != nullptr) {
        turn.other = load_f32x8(s.sine + at);
    } else {
        unroll<4>([&](auto i) {
            turn.other.v[2 * i] = turn.other.v[2 * i + 1] = turn.own.v[2 * i + 1];
            turn.own.v[2 * i + 1] = turn.own.v[2 * i];
        });
    }
    unroll<4>([&](auto i) { turn.other.v[2 * i] = -turn.other.v[2 * i]; });
    return turn;
}

DEVICE uint2 to_e4m3(const F32x8& e) {
    return {pack_e4m3(e.v[0], e.v[1]) | pack_e4m3(e.v[2], e.v[3]) << 16,
            pack_e4m3(e.v[4], e.v[5]) | pack_e4m3(e.v[6], e.v[7]) << 16};
}

DEVICE void store(uint8_t* to, const F32x8& e) {
    if constexpr (FP8)
        *reinterpret_cast<uint2*>(to) = to_e4m3(e);
    else
        *reinterpret_cast<uint4*>(to) = pack(e);
}

// A sum over the lanes of a head, the same in each of them.
DEVICE float reduce_head(float mine) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) mine += __shfl_xor_sync(~0u, mine, distance);
    return mine;
}

// All heads of a token, several at one time: of each `change`, called by all lanes, makes what is stored. `from` is the
// lane's place in head 0, `to` too.
template <class Change>
DEVICE void each_head(const Parameters& p, const uint16_t* from, int64_t head_stride, uint8_t* to, Change change) {
    const int first = threadIdx.x % 32 / kLanes;
    for (int begin = 0; begin < p.heads; begin += kInFlight * kHeadsOfWarp) {
        uint4 loaded[kInFlight];
        unroll<kInFlight>([&](auto i) {
            const int head = begin + i * kHeadsOfWarp + first;
            loaded[i] = load_once(from + head * head_stride, head < p.heads);
        });
        unroll<kInFlight>([&](auto i) {
            const int head = begin + i * kHeadsOfWarp + first;
            const F32x8 y = change(unpack(loaded[i]));
            if (head < p.heads) store(to + head * HEAD_DIM * kOutBytes, y);
        });
    }
}

DEVICE void normalize(const Parameters& p, const uint16_t* from, int64_t head_stride, const uint16_t* norm_weight,
                      const Turn& rotation, float factor, uint8_t* to) {
    const F32x8 weight = load_vector(norm_weight);
    Turn turn;
    unroll<8>([&](auto i) {
        turn.own.v[i] = rotation.own.v[i] * weight.v[i];
        turn.other.v[i] = rotation.other.v[i] * weight.v[i ^ 1];
    });
    each_head(p, from, head_stride, to, [&](const F32x8& x) {
        float squares = 0.f;
        unroll<8>([&](auto j) { squares = fmaf(x.v[j], x.v[j], squares); });
        const float scale = rsqrtf(fmaf(reduce_head(squares), 1.f / HEAD_DIM, p.eps)) * factor;
        F32x8 y;
        unroll<8>([&](auto j) { y.v[j] = fmaf(x.v[j], turn.own.v[j], x.v[j ^ 1] * turn.other.v[j]) * scale; });
        return y;
    });
}

DEVICE void normalize_token(const Parameters& p, int cta) {
    const int index = cta * WARPS + threadIdx.x / 32;
    if (index >= p.batches * p.tokens) return;
    const int batch = index / p.tokens, token = index - batch * p.tokens, column = threadIdx.x % kLanes * 8;
    const bool second = token >= p.first_tokens;
    const Stream& s = p.stream[second];
    const int own = second ? token - p.first_tokens : token;
    const Turn rotation = load_rotation(s, batch, own, column);
    const int64_t out = (int64_t(index) * p.heads * HEAD_DIM + column) * kOutBytes;
    normalize(p, s.query.at(batch, own, 0) + column, s.query.head_stride, s.query_weight + column, rotation,
              p.query_factor, p.query + out);
    normalize(p, s.key.at(batch, own, 0) + column, s.key.head_stride, s.key_weight + column, rotation, p.key_factor,
              p.key + out);
    if (!FP8 && p.value != nullptr)
        each_head(p, s.value.at(batch, own, 0) + column, s.value.head_stride, p.value + out,
                  [](const F32x8& x) { return x; });
}

// Vectors of the tokens first, first + step, ... of a head's values; zeros from `end` on.
DEVICE void load_values(const Parameters& p, int batch, int head, int column, int first, int step, int end,
                        uint4 (&loaded)[kInFlight]) {
    unroll<kInFlight>([&](auto i) {
        const int token = first + i * step;
        const bool second = token >= p.first_tokens;
        const Heads& of = p.stream[second].value;
        const uint16_t* from = of.at(batch, second ? token - p.first_tokens : token, head) + column;
        loaded[i] = load_once(from, token < end);
    });
}

struct ValueMoments {
    F32x8 mean, scale;
};

// Of the sample, in the same order whichever CTA looks.
DEVICE ValueMoments sample_values(const Parameters& p, int batch, int head, int column) {
    __shared__ float4 smem_sum[WARPS][HEAD_DIM / 4], smem_largest[WARPS][HEAD_DIM / 4];
    const int warp_idx = threadIdx.x / 32, row = threadIdx.x / kLanes, end = p.samples * p.sample_step;
    F32x8 sum = {}, largest = {};
    for (int begin = 0; begin < p.samples; begin += kInFlight * kRows) {
        uint4 loaded[kInFlight];
        load_values(p, batch, head, column, (begin + row) * p.sample_step, kRows * p.sample_step, end, loaded);
        unroll<kInFlight>([&](auto i) {
            const F32x8 x = unpack(loaded[i]);
            unroll<8>([&](auto j) {
                sum.v[j] += x.v[j];
                largest.v[j] = fmaxf(largest.v[j], fabsf(x.v[j]));
            });
        });
    }
    unroll<8>([&](auto j) {
#pragma unroll
        for (int distance = kLanes; distance < 32; distance *= 2) {
            sum.v[j] += __shfl_xor_sync(~0u, sum.v[j], distance);
            largest.v[j] = fmaxf(largest.v[j], __shfl_xor_sync(~0u, largest.v[j], distance));
        }
    });
    if (threadIdx.x % 32 < kLanes) {
        unroll<2>([&](auto i) {
            smem_sum[warp_idx][column / 4 + i] = {sum.v[4 * i], sum.v[4 * i + 1], sum.v[4 * i + 2], sum.v[4 * i + 3]};
            smem_largest[warp_idx][column / 4 + i] = {largest.v[4 * i], largest.v[4 * i + 1], largest.v[4 * i + 2],
                                                      largest.v[4 * i + 3]};
        });
    }
    __syncthreads();
    ValueMoments of = {};
    for (int warp = 0; warp < WARPS; ++warp) {
        const float* sums = reinterpret_cast<const float*>(smem_sum[warp]) + column;
        const float* most = reinterpret_cast<const float*>(smem_largest[warp]) + column;
        unroll<8>([&](auto j) {
            of.mean.v[j] += sums[j];
            of.scale.v[j] = fmaxf(of.scale.v[j], most[j]);
        });
    }
    unroll<8>([&](auto j) {
        of.mean.v[j] /= float(p.samples);
        of.scale.v[j] = fmaxf(of.scale.v[j] * (1.f / REACH), 0x1p-126f);
    });
    return of;
}

DEVICE void quantize_values(const Parameters& p) {
    const int chunk = blockIdx.x % p.value_chunks, batch_head = blockIdx.x / p.value_chunks;
    const int batch = batch_head / p.heads, head = batch_head - batch * p.heads;
    const int column = threadIdx.x % kLanes * 8, row = threadIdx.x / kLanes;
    const ValueMoments of = sample_values(p, batch, head, column);
    if (chunk == 0 && row == 0) {
        unroll<8>([&](auto j) {
            p.value_scale[batch_head * HEAD_DIM + column + j] = of.scale.v[j];
            p.value_mean[batch_head * HEAD_DIM + column + j] = of.mean.v[j];
        });
    }
    F32x8 inverse;
    unroll<8>([&](auto j) { inverse.v[j] = __frcp_rn(of.scale.v[j]); });
    const int end = min(p.tokens, (chunk + 1) * p.chunk_tokens);
    for (int begin = chunk * p.chunk_tokens + row; begin < end; begin += kInFlight * kRows) {
        uint4 loaded[kInFlight];
        load_values(p, batch, head, column, begin, kRows, end, loaded);
        unroll<kInFlight>([&](auto i) {
            const int token = begin + i * kRows;
            F32x8 x = unpack(loaded[i]);
            unroll<8>([&](auto j) { x.v[j] = (x.v[j] - of.mean.v[j]) * inverse.v[j]; });
            if (token < end) {
                const int64_t at = (int64_t(batch) * p.tokens + token) * p.heads + head;
                *reinterpret_cast<uint2*>(p.value + at * HEAD_DIM + column) = to_e4m3(x);
            }
        });
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) attention_inputs(const __grid_constant__ Parameters p) {
    launch_dependents();
    grid_dependency_wait();
    if constexpr (FP8) {
        const int value_ctas = p.batches * p.heads * p.value_chunks;
        if (int(blockIdx.x) < value_ctas)
            quantize_values(p);
        else
            normalize_token(p, blockIdx.x - value_ctas);
    } else {
        normalize_token(p, blockIdx.x);
    }
}

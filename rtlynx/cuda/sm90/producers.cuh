// What the compress kernel compresses: a matrix, or the output of an elementwise chain that is never stored.
//
// A Source names the matrices it reads (RAWS of them, tile by tile through shared memory) and makes eight
// neighbouring values of a row from them: float32 inside, rounded once to bf16. It may want a row's moments first, and
// parameters of the columns (a Modulation). Where the matrices end it reads zeros, and without a Modulation it must
// make zeros of them. `make` has no branches, so that the rounds of several chunks overlap.
#pragma once
#include "ptx.cuh"

#define MATRIX 0
#define ADALN 1
#define RMSNORM 2
#define GELU 3
#define SILU_GATE 4
#define CONCAT_GELU 5

// Count, mean and sum of squared deviations, merged without cancellation (Chan et al. 1979).
struct alignas(16) RowMoments {
    float count, mean, m2;

    DEVICE void add(const RowMoments& other) {
        if (other.count == 0.f) return;
        const float all = count + other.count, delta = other.mean - mean, share = __fdividef(other.count, all);
        mean = fmaf(delta, share, mean);
        m2 += other.m2 + delta * delta * count * share;
        count = all;
    }
};

// Rows (batch, token) of a tensor whose last axis is dense.
struct Matrix {
    const uint16_t* data;
    int64_t batch_stride, row_stride;  // in elements
    int rows_per_batch;

    DEVICE int batch(int row) const { return row / rows_per_batch; }
    DEVICE const uint16_t* row(int index) const {
        const int b = batch(index);
        return data + b * batch_stride + (index - b * rows_per_batch) * row_stride;
    }
};

struct Eight {
    float v[8];
};

DEVICE Eight unpack(const uint4& p) {
    return {{bf16_low(p.x), bf16_high(p.x), bf16_low(p.y), bf16_high(p.y), bf16_low(p.z), bf16_high(p.z), bf16_low(p.w),
             bf16_high(p.w)}};
}
DEVICE uint4 pack(const Eight& e) {
    return {pack_bf16(e.v[0], e.v[1]), pack_bf16(e.v[2], e.v[3]), pack_bf16(e.v[4], e.v[5]), pack_bf16(e.v[6], e.v[7])};
}
DEVICE uint4 choose(bool first, const uint4& a, const uint4& b) {
    return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
}
DEVICE Eight load_parameters(const uint16_t* from) { return unpack(__ldg(reinterpret_cast<const uint4*>(from))); }

// Moments of 8 N values.
template <int N>
DEVICE RowMoments moments_of(const uint4 (&values)[N]) {
    RowMoments m{8.f * N, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < N * 8; ++i) m.mean += unpack(values[i / 8]).v[i % 8];
    m.mean *= 1.f / (8 * N);
#pragma unroll
    for (int i = 0; i < N * 8; ++i) {
        const float deviation = unpack(values[i / 8]).v[i % 8] - m.mean;
        m.m2 = fmaf(deviation, deviation, m.m2);
    }
    return m;
}

// 1 / (1 + 2^x)
DEVICE float inverse_of_one_and_power(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
    return inverse;
}
constexpr float LOG2_E = 1.4426950409f;
DEVICE float silu(float x) { return x * inverse_of_one_and_power(-LOG2_E * x); }
// tanh form: x / 2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), exact for small outputs too.
DEVICE float gelu_tanh(float x) {
    constexpr float linear = -LOG2_E * 1.5957691216f, cubic = linear * .044715f;
    return x * inverse_of_one_and_power(x * fmaf(cubic * x, x, linear));
}

// Where a row of the inputs lies, and what is known of it.
struct Row {
    bool inside;
    const uint16_t* raw[2];
    int parameters;  // offset of its batch in the modulation
    float mean, inverse_deviation;
};

struct Elementwise {
    static constexpr int RAWS = 1;
    static constexpr bool MOMENTS = false;
    static constexpr bool TRANSFORMS = true;

    struct Modulation {};
    DEVICE Modulation modulation(const Row&, int) const { return {}; }

    DEVICE void finish(Row&, const RowMoments&) const {}
    template <int N>
    DEVICE static RowMoments moments(const uint4 (&values)[N]) {
        return moments_of(values);
    }
};

#if SOURCE == MATRIX
struct Source : Elementwise {
    static constexpr bool TRANSFORMS = false;
    Matrix x;

    DEVICE void open(Row& row, int index) const { row.raw[0] = x.row(index); }
    DEVICE const uint16_t* at(const Row& row, int, int column) const { return row.raw[0] + column; }
    DEVICE uint4 make(const Row&, const Modulation&, int, const uint4 (&raw)[1]) const { return raw[0]; }
};

#elif SOURCE == ADALN
// layer_norm(x) * (1 + scale) + shift, a scale and a shift for each batch.
struct Source : Elementwise {
    static constexpr bool MOMENTS = true;
    Matrix x;
    const uint16_t *shift, *scale;
    int parameter_stride;  // from batch to batch, 0 where all share one
    float epsilon;

    DEVICE void open(Row& row, int index) const {
        row.raw[0] = x.row(index);
        row.parameters = x.batch(index) * parameter_stride;
    }
    DEVICE const uint16_t* at(const Row& row, int, int column) const { return row.raw[0] + column; }
    DEVICE void finish(Row& row, const RowMoments& m) const {
        row.mean = m.mean;
        row.inverse_deviation = rsqrtf(m.m2 / m.count + epsilon);
    }
    struct Modulation {
        Eight factor, shift;
    };
    DEVICE Modulation modulation(const Row& row, int column) const {
        Modulation of{load_parameters(scale + row.parameters + column),
                      load_parameters(shift + row.parameters + column)};
#pragma unroll
        for (int i = 0; i < 8; ++i) of.factor.v[i] += 1.f;
        return of;
    }
    DEVICE uint4 make(const Row& row, const Modulation& of, int, const uint4 (&raw)[1]) const {
        Eight e = unpack(raw[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            e.v[i] = fmaf((e.v[i] - row.mean) * row.inverse_deviation, of.factor.v[i], of.shift.v[i]);
        return pack(e);
    }
};

#elif SOURCE == RMSNORM
// rms_norm(x) * weight * scale, a scale for each batch.
struct Source : Elementwise {
    static constexpr bool MOMENTS = true;
    Matrix x;
    const uint16_t *weight, *scale;
    int parameter_stride;
    float epsilon;

    DEVICE void open(Row& row, int index) const {
        row.raw[0] = x.row(index);
        row.parameters = x.batch(index) * parameter_stride;
    }
    DEVICE const uint16_t* at(const Row& row, int, int column) const { return row.raw[0] + column; }
    // About zero, which is all that it needs.
    template <int N>
    DEVICE static RowMoments moments(const uint4 (&values)[N]) {
        RowMoments m{8.f * N, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < N * 8; ++i) {
            const float value = unpack(values[i / 8]).v[i % 8];
            m.m2 = fmaf(value, value, m.m2);
        }
        return m;
    }
    DEVICE void finish(Row& row, const RowMoments& m) const {
        row.inverse_deviation = rsqrtf(m.m2 / m.count + epsilon);
    }
    using Modulation = Eight;
    DEVICE Modulation modulation(const Row& row, int column) const {
        Eight of = load_parameters(weight + column);
        const Eight a = load_parameters(scale + row.parameters + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) of.v[i] *= a.v[i];
        return of;
    }
    DEVICE uint4 make(const Row& row, const Modulation& of, int, const uint4 (&raw)[1]) const {
        Eight e = unpack(raw[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = e.v[i] * row.inverse_deviation * of.v[i];
        return pack(e);
    }
};

#elif SOURCE == GELU
struct Source : Elementwise {
    Matrix x;

    DEVICE void open(Row& row, int index) const { row.raw[0] = x.row(index); }
    DEVICE const uint16_t* at(const Row& row, int, int column) const { return row.raw[0] + column; }
    DEVICE uint4 make(const Row&, const Modulation&, int, const uint4 (&raw)[1]) const {
        Eight e = unpack(raw[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = gelu_tanh(e.v[i]);
        return pack(e);
    }
};

#elif SOURCE == SILU_GATE
// silu(a) * b
struct Source : Elementwise {
    static constexpr int RAWS = 2;
    Matrix a, b;

    DEVICE void open(Row& row, int index) const {
        row.raw[0] = a.row(index);
        row.raw[1] = b.row(index);
    }
    DEVICE const uint16_t* at(const Row& row, int raw, int column) const { return row.raw[raw] + column; }
    DEVICE uint4 make(const Row&, const Modulation&, int, const uint4 (&raw)[2]) const {
        Eight e = unpack(raw[0]);
        const Eight gate = unpack(raw[1]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = silu(e.v[i]) * gate.v[i];
        return pack(e);
    }
};

#elif SOURCE == CONCAT_GELU
// cat(a, gelu(b)) along the columns; a has a multiple of 8.
struct Source : Elementwise {
    Matrix a, b;
    int columns_a;

    DEVICE void open(Row& row, int index) const {
        row.raw[0] = a.row(index);
        row.raw[1] = b.row(index) - columns_a;
    }
    DEVICE const uint16_t* at(const Row& row, int, int column) const {
        return (column < columns_a ? row.raw[0] : row.raw[1]) + column;
    }
    DEVICE uint4 make(const Row&, const Modulation&, int column, const uint4 (&raw)[1]) const {
        Eight e = unpack(raw[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = gelu_tanh(e.v[i]);
        return choose(column < columns_a, raw[0], pack(e));
    }
};
#endif

// What the compress kernel compresses: a matrix, or the output of an elementwise chain that is never stored.
//
// A Source names the matrices it reads (RAWS of them, tile by tile through shared memory) and makes eight
// neighbouring values of a row from them: float32 inside, rounded once to bf16. It may want a row's moments first.
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
        const float all = count + other.count, delta = other.mean - mean, share = other.count / all;
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
DEVICE Eight load_parameters(const uint16_t* from) { return unpack(__ldg(reinterpret_cast<const uint4*>(from))); }

DEVICE RowMoments moments_of(const Eight& e) {
    RowMoments m{8.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 8; ++i) m.mean += e.v[i] * .125f;
#pragma unroll
    for (int i = 0; i < 8; ++i) m.m2 = fmaf(e.v[i] - m.mean, e.v[i] - m.mean, m.m2);
    return m;
}

DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
// tanh form: x / 2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), exact for small outputs too.
DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691216f * fmaf(.044715f * x * x, x, x)); }

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

    DEVICE void finish(Row&, const RowMoments&) const {}
};

#if SOURCE == MATRIX
struct Source : Elementwise {
    static constexpr bool TRANSFORMS = false;
    Matrix x;

    DEVICE void open(Row& row, int index) const { row.raw[0] = x.row(index); }
    DEVICE const uint16_t* at(const Row& row, int, int column) const { return row.raw[0] + column; }
    DEVICE uint4 make(const Row&, int, const uint4 (&raw)[1]) const { return raw[0]; }
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
    DEVICE uint4 make(const Row& row, int column, const uint4 (&raw)[1]) const {
        Eight e = unpack(raw[0]);
        const Eight a = load_parameters(scale + row.parameters + column);
        const Eight b = load_parameters(shift + row.parameters + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = fmaf((e.v[i] - row.mean) * row.inverse_deviation, 1.f + a.v[i], b.v[i]);
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
    DEVICE void finish(Row& row, const RowMoments& m) const {
        row.inverse_deviation = rsqrtf(m.m2 / m.count + m.mean * m.mean + epsilon);
    }
    DEVICE uint4 make(const Row& row, int column, const uint4 (&raw)[1]) const {
        Eight e = unpack(raw[0]);
        const Eight w = load_parameters(weight + column), a = load_parameters(scale + row.parameters + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = e.v[i] * row.inverse_deviation * w.v[i] * a.v[i];
        return pack(e);
    }
};

#elif SOURCE == GELU
struct Source : Elementwise {
    Matrix x;

    DEVICE void open(Row& row, int index) const { row.raw[0] = x.row(index); }
    DEVICE const uint16_t* at(const Row& row, int, int column) const { return row.raw[0] + column; }
    DEVICE uint4 make(const Row&, int, const uint4 (&raw)[1]) const {
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
    DEVICE uint4 make(const Row&, int, const uint4 (&raw)[2]) const {
        Eight e = unpack(raw[0]);
        const Eight gate = unpack(raw[1]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = e.v[i] * sigmoid(e.v[i]) * gate.v[i];
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
        return row.raw[column < columns_a ? 0 : 1] + column;
    }
    DEVICE uint4 make(const Row&, int column, const uint4 (&raw)[1]) const {
        if (column < columns_a) return raw[0];
        Eight e = unpack(raw[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = gelu_tanh(e.v[i]);
        return pack(e);
    }
};
#endif

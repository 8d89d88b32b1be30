// What the compress kernel compresses: a matrix, or the output of an elementwise chain that is never stored.
//
// A Source gives eight neighbouring values of a row as bf16, rounded once from float32, and may want the row's
// moments first.
#pragma once
#include "ptx.cuh"

#define MATRIX 0

// Count, mean and sum of squared deviations, merged without cancellation (Chan et al. 1979).
struct RowMoments {
    float count, mean, m2;

    DEVICE void add(const RowMoments& other) {
        if (other.count == 0.f) return;
        const float all = count + other.count, delta = other.mean - mean, share = other.count / all;
        mean = fmaf(delta, share, mean);
        m2 += other.m2 + delta * delta * count * share;
        count = all;
    }
    DEVICE void add(const uint4& v, int entries) {
        if (entries <= 0) return;
        const float x[8] = {bf16_low(v.x), bf16_high(v.x), bf16_low(v.y), bf16_high(v.y),
                            bf16_low(v.z), bf16_high(v.z), bf16_low(v.w), bf16_high(v.w)};
        RowMoments eight;
        eight.count = float(entries);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += i < entries ? x[i] : 0.f;
        eight.mean = sum / eight.count;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float d = i < entries ? x[i] - eight.mean : 0.f;
            eight.m2 = fmaf(d, d, eight.m2);
        }
        add(eight);
    }
};

// Rows (batch, token) of a tensor whose last axis is dense.
struct Matrix {
    const uint16_t* data;
    int64_t batch_stride, row_stride;  // in elements
    int rows_per_batch;

    DEVICE const uint16_t* row(int index) const {
        const int batch = index / rows_per_batch;
        return data + batch * batch_stride + (index - batch * rows_per_batch) * row_stride;
    }
};

DEVICE uint4 load_eight(const uint16_t* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// What a Source may leave as it is.
struct Elementwise {
    static constexpr bool moments = false;  // whether `finish` wants the moments of the rows of `raw`
    template <class Row>
    DEVICE uint4 raw_eight(const Row&, int) const { return {}; }
    template <class Row>
    DEVICE uint16_t raw_one(const Row&, int) const { return 0; }
    template <class Row>
    DEVICE void finish(Row&, const RowMoments&) const {}
};

#if SOURCE == MATRIX
struct Row {
    const uint16_t* data;  // null outside of the matrix
};

struct Source : Elementwise {
    Matrix x;

    DEVICE Row row(int index, int rows) const { return {index < rows ? x.row(index) : nullptr}; }
    DEVICE uint4 eight(const Row& row, int column) const {
        return row.data ? load_eight(row.data + column) : uint4{0, 0, 0, 0};
    }
    DEVICE uint16_t one(const Row& row, int column) const { return row.data ? row.data[column] : uint16_t(0); }
};
#endif

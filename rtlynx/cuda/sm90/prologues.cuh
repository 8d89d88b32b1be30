// Prologues of the compress and quantise kernels: what is computed of the inputs, elementwise, in front of a layer. The
// result is never stored. One is chosen by a macro, PROLOGUE_ADALN and so on. PROLOGUE_IDENTITY is the input itself.
// The host's table of them is prologues.py: its names and the fields of `struct Prologue` here are the same.
//
// A Prologue names the matrices that it reads, kInputs of them. `apply` makes eight neighbouring values of a row from
// the same eight columns of each: float32 inside, rounded once to bf16. It has no branches, so that the computations of
// several vectors overlap.
// A Prologue may need a row's moments first (kNeedsMoments), and parameters of the columns (a Modulation).
// Where the matrices end it reads zeros. Without a Modulation it must make zeros of them.
#pragma once
#include "f32x8.cuh"

// Count, mean and sum of squared deviations, merged without cancellation (Chan et al. 1979).
struct alignas(16) RowMoments {
    float count, mean, m2;

    DEVICE void add(const RowMoments& other) {
        if (other.count == 0.f) return;
        const float all = count + other.count, delta = other.mean - mean, weight = __fdividef(other.count, all);
        mean = fmaf(delta, weight, mean);
        m2 += other.m2 + delta * delta * count * weight;
        count = all;
    }
};

// Rows (batch, token) of a tensor whose last axis is dense.
struct Matrix {
    const uint16_t* data;
    int64_t batch_stride, row_stride;  // in elements
    int rows_per_batch;

    DEVICE int batch(int row) const { return row < rows_per_batch ? 0 : row / rows_per_batch; }  // (a long division)
    DEVICE const uint16_t* row(int index) const {
        const int b = batch(index);
        return data + b * batch_stride + (index - b * rows_per_batch) * row_stride;
    }
};

DEVICE uint4 select(bool first, const uint4& a, const uint4& b) {
    return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
}

// Which row of a table a token takes.
DEVICE int chosen(const int* choice, int index, int last) { return min(max(__ldg(choice + index), 0), last); }

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

// The same about zero: an RMS norm needs no mean.
template <int N>
DEVICE RowMoments moments_about_zero(const uint4 (&values)[N]) {
    RowMoments m{8.f * N, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < N * 8; ++i) {
        const float value = unpack(values[i / 8]).v[i % 8];
        m.m2 = fmaf(value, value, m.m2);
    }
    return m;
}

// 1 / (1 + 2^x)
DEVICE float inverse_of_one_plus_exp2(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
    return inverse;
}
constexpr float kLog2E = 1.4426950409f;
DEVICE float silu(float x) { return x * inverse_of_one_plus_exp2(-kLog2E * x); }
// tanh form: x / 2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), exact for small outputs too.
DEVICE float gelu_tanh(float x) {
    constexpr float linear = -kLog2E * 1.5957691216f, cubic = linear * .044715f;
    return x * inverse_of_one_plus_exp2(x * fmaf(cubic * x, x, linear));
}

// Where a row of the inputs lies, and what is known of it.
struct Row {
    bool in_bounds;
    const uint16_t* input[2];
    int modulation_offset;  // of its batch
    float mean, inv_std;
};

// What a prologue has unless it says otherwise: one input, no moments, no parameters of the columns.
struct PrologueBase {
    static constexpr int kInputs = 1;
    static constexpr bool kNeedsMoments = false;
    static constexpr bool kCentred = true;     // whether moments are about a row's mean, or about zero
    static constexpr bool kTransforms = true;  // whether `apply` changes anything

    struct Modulation {};
    DEVICE Modulation load_modulation(const Row&, int) const { return {}; }

    DEVICE void set_moments(Row&, const RowMoments&) const {}
    template <int N>
    DEVICE static RowMoments moments(const uint4 (&values)[N]) {
        return moments_of(values);
    }
    // Whether `apply` reads this input in these columns; zeros are loaded where it does not.
    DEVICE bool reads(int, int) const { return true; }
};

#if defined(PROLOGUE_IDENTITY)
struct Prologue : PrologueBase {
    static constexpr bool kTransforms = false;
    Matrix x;

    DEVICE void open_row(Row& row, int index) const { row.input[0] = x.row(index); }
    DEVICE const uint16_t* input_at(const Row& row, int, int column) const { return row.input[0] + column; }
    DEVICE uint4 apply(const Row&, const Modulation&, int, const uint4 (&input)[1]) const { return input[0]; }
};

#elif defined(PROLOGUE_ADALN) || defined(PROLOGUE_RMS_ADALN) || defined(PROLOGUE_ADALN_BY_TOKEN) || \
    defined(PROLOGUE_ADALN_OF_TOKENS) || defined(PROLOGUE_RMS_ADALN_OF_TOKENS)
// norm(x) * (1 + scale) + shift: a layer norm, or an RMS norm. A scale and a shift for each batch, or those that
// each token chooses, or each token's own and what is common to all of them.
struct Prologue : PrologueBase {
    static constexpr bool kNeedsMoments = true;
#if defined(PROLOGUE_RMS_ADALN) || defined(PROLOGUE_RMS_ADALN_OF_TOKENS)
    static constexpr bool kCentred = false;
    template <int N>
    DEVICE static RowMoments moments(const uint4 (&values)[N]) {
        return moments_about_zero(values);
    }
#endif
    Matrix x;
    const uint16_t *shift, *scale;
#if defined(PROLOGUE_ADALN_BY_TOKEN)
    const int* choice;
    int modulation_stride;  // from choice to choice
    int last_choice;
    DEVICE int modulation_offset(int index) const { return chosen(choice, index, last_choice) * modulation_stride; }
#elif defined(PROLOGUE_ADALN_OF_TOKENS) || defined(PROLOGUE_RMS_ADALN_OF_TOKENS)
    static constexpr int kOffsetUnit = 8;  // a long video has more entries than an int counts
    const uint16_t *common_shift, *common_scale;
    int modulation_stride;  // from token to token
    DEVICE int modulation_offset(int index) const { return index * (modulation_stride / kOffsetUnit); }
#else
    int modulation_stride;  // from batch to batch, 0 where all share one
    DEVICE int modulation_offset(int index) const { return x.batch(index) * modulation_stride; }
#endif
    float eps;

    DEVICE void open_row(Row& row, int index) const {
        row.input[0] = x.row(index);
        row.modulation_offset = modulation_offset(index);
    }
    DEVICE const uint16_t* input_at(const Row& row, int, int column) const { return row.input[0] + column; }
    DEVICE void set_moments(Row& row, const RowMoments& m) const {
        row.mean = kCentred ? m.mean : 0.f;
        row.inv_std = rsqrtf(m.m2 / m.count + eps);
    }
#if defined(PROLOGUE_ADALN_OF_TOKENS) || defined(PROLOGUE_RMS_ADALN_OF_TOKENS)
    struct Modulation {  // as in memory: half the registers, and every row has its own
        uint4 scale, shift;
        int column;
    };
    DEVICE Modulation load_modulation(const Row& row, int column) const {
        const int64_t at = int64_t(row.modulation_offset) * kOffsetUnit + column;
        return {__ldg(reinterpret_cast<const uint4*>(scale + at)), __ldg(reinterpret_cast<const uint4*>(shift + at)),
                column};
    }
    DEVICE uint4 apply(const Row& row, const Modulation& of, int, const uint4 (&input)[1]) const {
        F32x8 e = unpack(input[0]);
        const F32x8 own_scale = unpack(of.scale), added_scale = load_vector(common_scale + of.column);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            e.v[i] = (e.v[i] - row.mean) * row.inv_std * (1.f + own_scale.v[i] + added_scale.v[i]);
        const F32x8 own_shift = unpack(of.shift), added_shift = load_vector(common_shift + of.column);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] += own_shift.v[i] + added_shift.v[i];
        return pack(e);
    }
#else
    struct Modulation {
        F32x8 factor, shift;
    };
    DEVICE Modulation load_modulation(const Row& row, int column) const {
        Modulation of{load_vector(scale + row.modulation_offset + column),
                      load_vector(shift + row.modulation_offset + column)};
#pragma unroll
        for (int i = 0; i < 8; ++i) of.factor.v[i] += 1.f;
        return of;
    }
    DEVICE uint4 apply(const Row& row, const Modulation& of, int, const uint4 (&input)[1]) const {
        F32x8 e = unpack(input[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = fmaf((e.v[i] - row.mean) * row.inv_std, of.factor.v[i], of.shift.v[i]);
        return pack(e);
    }
#endif
};

#elif defined(PROLOGUE_RMSNORM) || defined(PROLOGUE_RMSNORM_BY_TOKEN)
// rms_norm(x) * weight * scale, a scale for each batch, or one that each token chooses.
struct Prologue : PrologueBase {
    static constexpr bool kNeedsMoments = true;
    static constexpr bool kCentred = false;
    Matrix x;
    const uint16_t *weight, *scale;
#ifdef PROLOGUE_RMSNORM_BY_TOKEN
    const int* choice;
    int modulation_stride;
    int last_choice;
    DEVICE int modulation(int index) const { return chosen(choice, index, last_choice); }
#else
    int modulation_stride;
    DEVICE int modulation(int index) const { return x.batch(index); }
#endif
    float eps;

    DEVICE void open_row(Row& row, int index) const {
        row.input[0] = x.row(index);
        row.modulation_offset = modulation(index) * modulation_stride;
    }
    DEVICE const uint16_t* input_at(const Row& row, int, int column) const { return row.input[0] + column; }
    template <int N>
    DEVICE static RowMoments moments(const uint4 (&values)[N]) {
        return moments_about_zero(values);
    }
    DEVICE void set_moments(Row& row, const RowMoments& m) const { row.inv_std = rsqrtf(m.m2 / m.count + eps); }
    using Modulation = F32x8;
    DEVICE Modulation load_modulation(const Row& row, int column) const {
        F32x8 of = load_vector(weight + column);
        const F32x8 a = load_vector(scale + row.modulation_offset + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) of.v[i] *= a.v[i];
        return of;
    }
    DEVICE uint4 apply(const Row& row, const Modulation& of, int, const uint4 (&input)[1]) const {
        F32x8 e = unpack(input[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = e.v[i] * row.inv_std * of.v[i];
        return pack(e);
    }
};

#elif defined(PROLOGUE_GELU)
struct Prologue : PrologueBase {
    Matrix x;

    DEVICE void open_row(Row& row, int index) const { row.input[0] = x.row(index); }
    DEVICE const uint16_t* input_at(const Row& row, int, int column) const { return row.input[0] + column; }
    DEVICE uint4 apply(const Row&, const Modulation&, int, const uint4 (&input)[1]) const {
        F32x8 e = unpack(input[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = gelu_tanh(e.v[i]);
        return pack(e);
    }
};

#elif defined(PROLOGUE_SILU_GATE)
// silu(a) * b
struct Prologue : PrologueBase {
    static constexpr int kInputs = 2;
    Matrix a, b;

    DEVICE void open_row(Row& row, int index) const {
        row.input[0] = a.row(index);
        row.input[1] = b.row(index);
    }
    DEVICE const uint16_t* input_at(const Row& row, int input, int column) const { return row.input[input] + column; }
    DEVICE uint4 apply(const Row&, const Modulation&, int, const uint4 (&input)[2]) const {
        F32x8 e = unpack(input[0]);
        const F32x8 gate = unpack(input[1]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = silu(e.v[i]) * gate.v[i];
        return pack(e);
    }
};

#elif defined(PROLOGUE_CONCAT_GELU)
// cat(a, gelu(b)) along the columns; a has a multiple of 8.
struct Prologue : PrologueBase {
    Matrix a, b;
    int columns_a;

    DEVICE void open_row(Row& row, int index) const {
        row.input[0] = a.row(index);
        row.input[1] = b.row(index) - columns_a;
    }
    DEVICE const uint16_t* input_at(const Row& row, int, int column) const {
        return (column < columns_a ? row.input[0] : row.input[1]) + column;
    }
    DEVICE uint4 apply(const Row&, const Modulation&, int column, const uint4 (&input)[1]) const {
        F32x8 e = unpack(input[0]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = gelu_tanh(e.v[i]);
        return select(column < columns_a, input[0], pack(e));
    }
};

#elif defined(PROLOGUE_CONCAT_SILU_GATE)
// cat(a, silu(b1) * b2) along the columns, b1 and b2 the halves of b; a and either half have multiples of 8.
struct Prologue : PrologueBase {
    static constexpr int kInputs = 2;
    Matrix a, b;
    int columns_a, columns_b;  // the latter of a half

    DEVICE void open_row(Row& row, int index) const {
        row.input[0] = a.row(index);
        row.input[1] = b.row(index) - columns_a;
    }
    DEVICE bool reads(int input, int column) const { return input == 0 || column >= columns_a; }
    DEVICE const uint16_t* input_at(const Row& row, int input, int column) const {
        return (column < columns_a ? row.input[0] : row.input[1] + input * columns_b) + column;
    }
    DEVICE uint4 apply(const Row&, const Modulation&, int column, const uint4 (&input)[2]) const {
        F32x8 e = unpack(input[0]);
        const F32x8 gated = unpack(input[1]);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = silu(e.v[i]) * gated.v[i];
        return select(column < columns_a, input[0], pack(e));
    }
};
#else
#error "no PROLOGUE_<NAME> is defined that is known here"
#endif

static_assert(Prologue::kInputs <= sizeof(Row::input) / sizeof(Row::input[0]), "a Row holds where each input lies");

// How values of a row become e4m3: rtlynx.math.fp8.quantize_tokens, to the bit, in one place for every kernel. And
// back, to bf16.
#pragma once
#include "ptx.cuh"

// t of a row: its largest / 448, in one multiplication. It is 1 for a row of zeros, NaN for one that is not finite.
DEVICE float token_scale(uint32_t largest) {
    if (largest >= 0x7F80u) return __uint_as_float(0x7FFFFFFFu);
    return largest == 0 ? 1.f : fmaxf(__fmul_rn(__uint_as_float(largest << 16), 0x1.24924ap-9f), 0x1p-126f);
}

DEVICE uint32_t pack_e4m3(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// Four values, two words of pairs, times the row's 1 / t.
DEVICE uint32_t quantized(uint32_t first, uint32_t second, float inverse) {
    const uint32_t low = pack_e4m3(__fmul_rn(bf16_low(first), inverse), __fmul_rn(bf16_high(first), inverse));
    const uint32_t high = pack_e4m3(__fmul_rn(bf16_low(second), inverse), __fmul_rn(bf16_high(second), inverse));
    return low | high << 16;
}

// The two e4m3 of the lower half as bf16, which holds each of them, NaN too.
DEVICE uint32_t bf16_of_e4m3(uint32_t pair) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
    float low, high;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}\n"
        : "=f"(low), "=f"(high)
        : "r"(halves));
    return pack_bf16(low, high);
}

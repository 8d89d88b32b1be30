// Eight neighbours of a row: bf16 in memory, float32 in registers.
#pragma once
#include "ptx.cuh"

struct F32x8 {
    float v[8];
};

DEVICE F32x8 unpack(const uint4& p) {
    return {{bf16_low(p.x), bf16_high(p.x), bf16_low(p.y), bf16_high(p.y), bf16_low(p.z), bf16_high(p.z), bf16_low(p.w),
             bf16_high(p.w)}};
}
DEVICE uint4 pack(const F32x8& e) {
    return {pack_bf16(e.v[0], e.v[1]), pack_bf16(e.v[2], e.v[3]), pack_bf16(e.v[4], e.v[5]), pack_bf16(e.v[6], e.v[7])};
}
DEVICE F32x8 load_vector(const uint16_t* from) { return unpack(__ldg(reinterpret_cast<const uint4*>(from))); }

// The two warpgroup matrix instructions at the width BLOCK_N of a tile: m64, n = BLOCK_N, float32 accumulators.
//
// PTX: wgmma.mma_async.sp (k32 bf16 or k64 e4m3, A sparse in shared memory) and wgmma.mma_async (k16, dense, bf16).
// PTX wants every accumulator register by name, so the preprocessor writes the list: BLOCK_N / 2 registers a thread.
#pragma once
#include "ptx.cuh"

#define REGS8(a) "%" #a "0, %" #a "1, %" #a "2, %" #a "3, %" #a "4, %" #a "5, %" #a "6, %" #a "7"
#define REGS10(a) REGS8(a) ", %" #a "8, %" #a "9"
#define REGS40 REGS10() ", " REGS10(1) ", " REGS10(2) ", " REGS10(3)
#define REGS80 REGS40 ", " REGS10(4) ", " REGS10(5) ", " REGS10(6) ", " REGS10(7)

#define ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC8(i) ACC4(i), ACC4(i + 4)
#define ACC32(i) ACC8(i), ACC8(i + 8), ACC8(i + 16), ACC8(i + 24)

#if BLOCK_N == 32
#define ACC_LIST REGS10() ", %10, %11, %12, %13, %14, %15"
#define ACC_OPERANDS ACC8(0), ACC8(8)
#define OP0 "%16"
#define OP1 "%17"
#define OP2 "%18"
#define OP3 "%19"
#define OP4 "%20"
#elif BLOCK_N == 64
#define ACC_LIST REGS10() ", " REGS10(1) ", " REGS10(2) ", %30, %31"
#define ACC_OPERANDS ACC32(0)
#define OP0 "%32"
#define OP1 "%33"
#define OP2 "%34"
#define OP3 "%35"
#define OP4 "%36"
#elif BLOCK_N == 128
#define ACC_LIST REGS40 ", " REGS10(4) ", " REGS10(5) ", %60, %61, %62, %63"
#define ACC_OPERANDS ACC32(0), ACC32(32)
#define OP0 "%64"
#define OP1 "%65"
#define OP2 "%66"
#define OP3 "%67"
#define OP4 "%68"
#elif BLOCK_N == 192
#define ACC_LIST REGS80 ", " REGS10(8) ", %90, %91, %92, %93, %94, %95"
#define ACC_OPERANDS ACC32(0), ACC32(32), ACC32(64)
#define OP0 "%96"
#define OP1 "%97"
#define OP2 "%98"
#define OP3 "%99"
#define OP4 "%100"
#else
#error "BLOCK_N is one of 32, 64, 128, 192"
#endif

#define STRING_(x) #x
#define STRING(x) STRING_(x)

#if FP8
#define SPARSE_SHAPE "k64.f32.e4m3.e4m3 {"
#define SPARSE_END ", p, 1, 1;\n"
#else
#define SPARSE_SHAPE "k32.f32.bf16.bf16 {"
#define SPARSE_END ", p, 1, 1, 0, 0;\n"
#endif

// d (+)= A B^T over 32 logical k (e4m3: 64), the kHalf-th wgmma of a stage. The lanes of a quad that supply
// the metadata `e`: with bf16 one pair for either half, with e4m3 all.
template <int kHalf>
DEVICE void wgmma_sparse(float (&d)[BLOCK_N / 2], uint64_t a, uint64_t b, uint32_t e, uint32_t accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, " OP3
        ", 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n" STRING(BLOCK_N) SPARSE_SHAPE ACC_LIST "}, " OP0 ", " OP1 ", " OP2
                                                                                     ", " OP4 SPARSE_END "}\n"
        : ACC_OPERANDS
        : "l"(a), "l"(b), "r"(e), "r"(accumulate), "n"(FP8 ? 0 : kHalf));
}

// d (+)= A B^T over 16 k, both dense.
DEVICE void wgmma_dense(float (&d)[BLOCK_N / 2], uint64_t a, uint64_t b, uint32_t accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, " OP2
        ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" STRING(BLOCK_N) "k16.f32.bf16.bf16 {" ACC_LIST "}, " OP0 ", " OP1
                                                            ", p, 1, 1, 0, 0;\n"
                                                            "}\n"
        : ACC_OPERANDS
        : "l"(a), "l"(b), "r"(accumulate));
}

// What a kernel is measured against: the bytes that it moves, 16 in for every OUT out, and no work.
// Each thread loads 16 vectors of 16 bytes, coalesced across the block, and stores OUT that depend on all of them.
// MODE 0: plain accesses in the compiler's order. 1: streaming ones. 2: streaming, all loads before a store.

static_assert(OUT >= 1 && OUT <= 16, "of 16 vectors a thread stores at most as many as it loads");
static_assert(MODE >= 0 && MODE <= 2, "0, 1 or 2");

__device__ uint4 load(const uint4* p) { return MODE == 0 ? __ldg(p) : __ldcs(p); }

__device__ uint4 mixed(uint4 a, uint4 b) { return make_uint4(a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w); }

struct Buffers {
    const uint4* in;
    uint4* out;
};

extern "C" __global__ void __launch_bounds__(THREADS) copy_bytes(const __grid_constant__ Buffers buffers) {
    const uint4* __restrict__ in = buffers.in + size_t(blockIdx.x) * THREADS * 16 + threadIdx.x;
    uint4* __restrict__ out = buffers.out + size_t(blockIdx.x) * THREADS * OUT + threadIdx.x;
    // Back to back as compression does it: the next copy is on the card before this one ends.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    uint4 v[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = load(in + i * THREADS);
    if (MODE == 2) {
        // NOTE: stores that need every load are what keeps the compiler from issuing them in between.
        uint4 all = v[0];
#pragma unroll
        for (int i = 1; i < 16; ++i) all = mixed(all, v[i]);
#pragma unroll
        for (int i = 0; i < OUT; ++i) v[i] = mixed(v[i], all);
    }
#pragma unroll
    for (int i = 0; i < OUT; ++i) {
        uint4 stored = v[i];
#pragma unroll
        for (int j = i + OUT; j < 16; j += OUT) stored = mixed(stored, v[j]);
        if (MODE == 0)
            out[i * THREADS] = stored;
        else
            __stcs(out + i * THREADS, stored);
    }
}

// What compress.cu makes in fp8 without a low-rank product, by CTAs that take whole rows: the same bytes of the same
// bfloat16 rows. (Moments and norms are summed in another order.)
//
// Kept values stay in registers until their row's largest is known, so nothing waits in shared memory and no cluster
// shares a row. A CTA takes ROWS rows, row r and, of two, r + 8, whose indices share sectors. A thread has UNITS times
// four vectors of eight columns of each, which are 32 logical columns: 16 bytes of values and a word of indices.
// Adjacent groups: vectors of neighbouring threads are neighbours, so that each access is of whole sectors. Strided
// groups: the four vectors hold the four entries of eight groups.
//
// Macros: FP8 (1), PROLOGUE_<NAME> (what X is), SCORE_<NAME> (what is kept), MODE (how groups lie), ROWS, CHUNKS
// (vectors of a row in a thread), MAX_THREADS (of a CTA: whole warps, as many as K needs), MIN_CTAS (of so many
// threads, that an SM is to hold), MAX_PARTS (of strided groups), PARAMETER_FIELDS (layout.cuh).
#include "compress_parameters.cuh"
#include "select.cuh"
#include "whole_rows.cuh"

constexpr int kUnits = CHUNKS / 4;
static_assert(FP8, "in bf16 nothing waits for the end of a row");
static_assert(CHUNKS % 4 == 0, "four vectors make a word of indices");
static_assert(ROWS == 1 || ROWS == 2, "rows r and r + 8");

// Where a thread works. `unit` counts 32 logical columns, of strided groups; a thread's units are `num_threads` apart.
struct WorkCoord {
    static constexpr bool kPadsRows = true;
    int first_row;
    GroupColumns columns[kUnits];

    DEVICE int row(int i) const { return first_row + i * 8; }
    DEVICE int column(int chunk) const { return columns[chunk / 4].base + chunk % 4 * columns[chunk / 4].stride; }
};

// Rows r and r + 8 are neighbours in time.
DEVICE WorkCoord work_coord(const Parameters& p) {
    WorkCoord at;
    const uint32_t index = blockIdx.x * ROWS;
    at.first_row = (index & ~15u) | (index / 2 & 7) | (index & 1) << 3;
    unroll<kUnits>([&](auto unit) {
        if constexpr (MODE == ADJACENT) {
            const int step = blockDim.x * 8;
            at.columns[unit] = {int(threadIdx.x) * 8 + unit * 4 * step, step};
        } else {
            const int group = (unit * blockDim.x + threadIdx.x) * 8;
            at.columns[unit] = group * 4 < p.columns ? strided_group(p, group) : GroupColumns{p.columns, 0};
        }
    });
    return at;
}

// ---- norms -----------------------------------------------------------------------------------------------

// Two bf16 times a power of two.
DEVICE uint32_t scaled(uint32_t pair, uint32_t unit) {
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(unit));
    return product;
}

DEVICE float add_squares(uint32_t pair, float sum) {
    const float low = bf16_low(pair), high = bf16_high(pair);
    return fmaf(low, low, fmaf(high, high, sum));
}

// Norms of a unit in its own magnitude.
DEVICE RowNorm norm_of(const uint32_t (&kept)[8], const uint32_t (&dropped)[8], uint32_t largest) {
    const uint32_t unit = (__float_as_uint(RowNorm::unit(largest)) >> 16) * 0x10001u;
    RowNorm norm{largest, 0.f, 0.f};
    unroll<8>([&](auto j) {
        norm.kept = add_squares(scaled(kept[j], unit), norm.kept);
        norm.total = add_squares(scaled(dropped[j], unit), norm.total);
    });
    norm.total += norm.kept;
    return norm;
}

// Norms of a warp from its lanes', in the magnitude `largest`.
DEVICE RowNorm reduce_norms(RowNorm mine, uint32_t largest) {
    mine.raise(largest);
    return {largest, reduce_warp(mine.total), reduce_warp(mine.kept)};
}

// Select from what this thread has of a row. Returns the warp's norms of it, or its largest alone.
template <bool kNorm>
DEVICE RowNorm select_units(const uint4 (&x)[CHUNKS], Selected<4> (&selected)[kUnits]) {
    RowNorm norm{};
    unroll<kUnits>([&](auto unit) {
        const uint4 vectors[4] = {x[unit * 4], x[unit * 4 + 1], x[unit * 4 + 2], x[unit * 4 + 3]};
        uint32_t dropped[8], largest = 0;
        selected[unit] =
            select_row<MODE == ADJACENT>(vectors, largest, [&](auto j, uint32_t pair) { dropped[j] = pair; });
        if constexpr (kNorm && unit == 0)
            norm = norm_of(selected[unit].pairs, dropped, largest);
        else if constexpr (kNorm)
            norm.add(norm_of(selected[unit].pairs, dropped, largest));
        else
            norm.largest = max(norm.largest, largest);
    });
    const uint32_t largest = __reduce_max_sync(~0u, norm.largest);
    if constexpr (kNorm) return reduce_norms(norm, largest);
    return {largest, 0.f, 0.f};
}

// ---- indices ---------------------------------------------------------------------------------------------

// Four lanes have a byte each of four words, word j's in byte j. Lane q of them gets word q.
DEVICE uint32_t transpose_quad(uint32_t mine) {
    const uint32_t lane = threadIdx.x;
    mine = permute_unmasked(mine, __shfl_xor_sync(~0u, mine, 2), lane & 2 ? 0x3276 : 0x5410);
    return permute_unmasked(mine, __shfl_xor_sync(~0u, mine, 1), lane & 1 ? 0x3715 : 0x6240);
}

// ---- stores ----------------------------------------------------------------------------------------------

// Where this thread's 32 logical columns lie in packed blocks: of the first unit the block, and the place in it.
struct Place {
    static constexpr int kThreadsPerBlock = MODE == ADJACENT ? 16 : 4;
    uint32_t block = threadIdx.x / kThreadsPerBlock, chunk = threadIdx.x / (kThreadsPerBlock / 4) % 4;
    uint32_t step = blockDim.x / kThreadsPerBlock;  // from vector to vector; of strided groups from unit to unit
};

// Metadata: thread 4g + 2b + i of the 16 rows' warp has row g + 8i of the columns from 64 h + 32 b on, word h.
DEVICE uint32_t index_offset(uint32_t row, uint32_t chunk) {
    return kMetadataOffset + row / 16 % 4 * 256 + row % 8 * 32 + row / 8 % 2 * 8 + chunk % 2 * 16 + chunk / 2 * 4;
}

DEVICE void store_indices(const Parameters& p, const Place& at, uint8_t* slab, uint32_t row,
                          const Selected<4> (&selected)[kUnits]) {
    unroll<kUnits>([&](auto unit) {
        uint32_t word = selected[unit].nibbles, steps = unit;
        if constexpr (MODE == ADJACENT) word = transpose_quad(word), steps = unit * 4 + threadIdx.x % 4;
        const uint32_t block = at.block + steps * at.step;
        if (block < p.k_blocks)
            *reinterpret_cast<uint32_t*>(slab + block * kPackedBlockBytes + index_offset(row, at.chunk)) = word;
    });
}

DEVICE void store_values(const Parameters& p, const Place& at, uint8_t* slab, uint32_t row, float inverse,
                         const Selected<4> (&selected)[kUnits]) {
    uint64_t first = __cvta_generic_to_global(slab + at.block * kPackedBlockBytes + swizzle_64b(row % 64, at.chunk));
    if constexpr (MODE == ADJACENT) first += threadIdx.x % 4 * 4;
    asm volatile("" : "+l"(first));  // or its sum is made anew for every store
    const auto store = [&](uint32_t steps, auto what) {
        using What = decltype(what);
        if (at.block + steps * at.step < p.k_blocks)
            *static_cast<What*>(__cvta_global_to_generic(first + uint64_t(at.step) * (steps * kPackedBlockBytes))) =
                what;
    };
    unroll<kUnits>([&](auto unit) {
        const uint32_t* pairs = selected[unit].pairs;
        uint32_t words[4];
        unroll<4>([&](auto j) { words[j] = quantized(pairs[j * 2], pairs[j * 2 + 1], inverse); });
        if constexpr (MODE == ADJACENT)
            unroll<4>([&](auto j) { store(unit * 4 + j, words[j]); });
        else
            store(int(unit), uint4{words[0], words[1], words[2], words[3]});
    });
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_CTAS)
    compress_rows(const __grid_constant__ Parameters p) {
    __shared__ RowNorm smem_norms[ROWS][kMaxWarps];
    const WorkCoord at = work_coord(p);
    const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32, num_warps = blockDim.x / 32;

    launch_dependents();
    grid_dependency_wait();

    Row rows[ROWS];
    uint4 input[ROWS][CHUNKS][Prologue::kInputs];
    load_rows(p, at, rows, input);
    if constexpr (Prologue::kNeedsMoments) find_moments(p, at, input, rows);
    uint4 output[ROWS][CHUNKS];
    apply_prologue(p, at, rows, input, output);

    Selected<4> selected[ROWS][kUnits];
    unroll<ROWS>([&](auto i) {
        const RowNorm norm =
            p.norm ? select_units<true>(output[i], selected[i]) : select_units<false>(output[i], selected[i]);
        if (lane_idx == 0) smem_norms[i][warp_idx] = norm;
    });

    // Indices leave while other warps arrive.
    const Place place;
    uint8_t* slab = p.packed_a + uint64_t(uint32_t(at.first_row) / 64 * p.k_blocks) * kPackedBlockBytes;
    unroll<ROWS>([&](auto i) { store_indices(p, place, slab, at.row(i), selected[i]); });
    __syncthreads();
    unroll<ROWS>([&](auto i) {
        const uint32_t mine = lane_idx < num_warps ? smem_norms[i][lane_idx].largest : 0;
        const uint32_t largest = __reduce_max_sync(~0u, mine);
        const float t = token_scale(largest);
        store_values(p, place, slab, at.row(i), __frcp_rn(t), selected[i]);
        if (warp_idx == 0 && rows[i].in_bounds) {
            float scale = t;
            if (p.norm)
                scale *= reduce_norms(lane_idx < num_warps ? smem_norms[i][lane_idx] : RowNorm{}, largest).scale();
            if (lane_idx == 0) p.scale[at.row(i)] = scale;
        }
    });
}

// X (M, K) bf16, or what a producer makes of its inputs -> packed 2:4 blocks, norm scale s, T' = (X A) / s.
// With FP8 kept values are quantised to e4m3 by a scale t of their row, and s t takes the place of s.
//
// A warp works on units of 16 rows x 64 k (adjacent groups) or 128 k (strided): lane 4g + q owns rows g and g + 8 and
// in each 32-column tile the eight columns from 8q on. Tiles come into shared memory by cp.async, STAGES - 1 units
// ahead, each thread fetching what it selects from itself, already in the 64-byte swizzle in which wgmma reads X and
// A^T for the low-rank product (the order of k inside a tile is free there, as both are laid out alike).
//
// Without a low-rank product the warps of a CTA share K of the same 16 rows. With one they are a warpgroup on 64
// rows, so that A^T is read once for all, and the CTAs of a cluster share K. With FP8 they are that in any case: kept
// values wait in shared memory until the whole row's largest is known, which one CTA's does not hold of a long row.
//
// Macros: FP8 (0 or 1), SOURCE (what X is), MODE (how groups lie), RANK (columns of T' of a CTA; more in gridDim.y),
// STAGES, MIN_CTAS (that an SM is to hold), PARAMETER_BYTES (as the host packs them).
#include "compress_tiles.cuh"
#include "waiting.cuh"

// Both bf16 of a pair in units of the row's magnitude, squared and summed.
DEVICE float squares(uint32_t pair, float unit, float sum) {
    const float a = bf16_low(pair) * unit, b = bf16_high(pair) * unit;
    return fmaf(a, a, fmaf(b, b, sum));
}

// Sums of squares of a warp's sixteen rows, on the tensor cores: the diagonals of X X^T, from words as they lie in
// registers. Rows `row` of A are x, rows `row` + 8 are y, two words of one row; with B = x the upper diagonal gathers
// x^2, with B = y the lower one y^2. Lane 4g + g / 2 ends up with the sums of row g.
struct Squares {
    float upper[4], lower[4];

    DEVICE static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b));
    }
    DEVICE void add(uint32_t x, uint32_t y) {
        mma(upper, x, y, x);
        mma(lower, x, y, y);
    }
    DEVICE float sum(int g) const { return g % 2 ? upper[1] + lower[3] : upper[0] + lower[2]; }
};

// Squares as they are neither overflow nor vanish beside the largest: magnitudes from 2^-40 to 2^55.
DEVICE bool plain_squares_do(uint32_t largest) {
    return largest == 0 || largest >= 0x7F80u || (largest >= (127 - 40) << 7 && largest < (127 + 55) << 7);
}

// The bf16 values of a tile's chunk in a lane's two rows, zeros outside of X.
DEVICE void make(const Parameters& p, const Row (&rows)[2], int column, const uint4 (&raw)[2][Source::RAWS],
                 uint4 (&made)[2]) {
    const int inside = min(column, p.columns - 8);
    Source::Modulation modulation = p.source.modulation(rows[0], inside);
    unroll<2>([&](auto i) {
        // (In strided mode registers do not hold the first row's until the second's turn.)
        if (i == 1 && Source::MOMENTS && (MODE == STRIDED || rows[1].parameters != rows[0].parameters))
            modulation = p.source.modulation(rows[1], inside);
        made[i] = p.source.make(rows[i], modulation, column, raw[i]);
        if constexpr (Source::MOMENTS)
            made[i] = choose(rows[i].inside && column < p.columns, made[i], uint4{0, 0, 0, 0});
    });
}

// This lane's share of its rows' norms, for magnitudes whose squares a float does not hold.
struct TwoNorms {
    RowNorm of[2];
};
__device__ __noinline__ TwoNorms scaled_norms(const Parameters& p, const Row (&rows)[2], const Share& own) {
    TwoNorms norms = {};
    const int q = threadIdx.x % 4;
    for (int index = 0; index < own.units; ++index) {
        const int unit = own.unit(index);
        const Columns columns = columns_of(p, unit, q);
        Values x[2];
        unroll<TILES>([&](auto tile) {
            if constexpr (MODE == GATHER) {
                unroll<2>([&](auto i) {
                    x[i].v[tile] = gather(p, rows[i].inside ? rows[i].raw[0] : nullptr, unit, q, tile);
                });
            } else {
                uint4 raw[2][Source::RAWS] = {}, made[2];
                unroll<2>([&](auto i) {
                    if (rows[i].inside && columns[tile] < p.columns)
                        unroll<Source::RAWS>([&](auto r) {
                            raw[i][r] = *reinterpret_cast<const uint4*>(p.source.at(rows[i], r, columns[tile]));
                        });
                });
                make(p, rows, columns[tile], raw, made);
                unroll<2>([&](auto i) { x[i].v[tile] = made[i]; });
            }
        });
        unroll<2>([&](auto i) {
            RowNorm& norm = norms.of[i];
            uint32_t largest = norm.largest;
            const Selected selected = select_row(x[i], largest);
            norm.raise(largest);
            const float in_units = RowNorm::unit(largest);
            unroll<TILES * 4>([&](auto j) { norm.total = squares(x[i].word(j), in_units, norm.total); });
            unroll<GROUPS>([&](auto j) { norm.kept = squares(selected.pairs[j], in_units, norm.kept); });
        });
    }
    return norms;
}

// ---- sums over a row: four lanes, then the shares of K, always in the same order --------------------------

template <class T>
DEVICE T from_lane(const T& mine, int distance) {
    T other;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
    uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); ++i) to[i] = __shfl_xor_sync(~0u, from[i], distance);
    return other;
}

template <class T>
DEVICE T combine_quad(T mine) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        T other = from_lane(mine, distance);
        if (threadIdx.x & distance) {  // the lower lane's part first in both
            other.add(mine);
            mine = other;
        } else {
            mine.add(other);
        }
    }
    return mine;
}

DEVICE void sync_shares() {
    if constexpr (SLAB)
        cluster_sync();
    else
        __syncthreads();
}

// A row's parts from all shares of K; sizeof(T) is 16.
template <class T>
DEVICE T combine_shares(const T (&parts)[SHARES_HERE][ROWS], int row, int shares) {
    T part[MAX_SHARES], sum{};
#pragma unroll
    for (int i = 0; i < MAX_SHARES; ++i) {  // all are asked for before the first is used
        if constexpr (!SLAB)
            part[i] = parts[i][row];
        else if (i < shares)
            reinterpret_cast<float4&>(part[i]) = load_cluster(map_to_cta(shared_address(&parts[0][row]), i));
    }
#pragma unroll
    for (int i = 0; i < MAX_SHARES; ++i)
        if (i < shares) sum.add(part[i]);
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) compress(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ RowNorm shared_norm[SHARES_HERE][ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, mine = own_row();
    const int ctas = SLAB ? cluster_size() : 1, cta = SLAB ? cluster_rank() : 0;
    const int share = SLAB ? cta : warp, shares = SLAB ? ctas : WARPS, share_here = SLAB ? 0 : warp;
    const int slab = SLAB ? blockIdx.x / ctas : blockIdx.x / 4, sixteen = SLAB ? warp : blockIdx.x % 4;
    const int first_row = SLAB ? slab * ROWS : blockIdx.x * ROWS;  // of the CTA
    const uint32_t memory_address = shared_address(memory);
    const uint32_t shared = memory_address + (SLAB ? 0 : warp * STAGES * STAGE_BYTES);
    const Share own(p, share, shares);
#if FP8
    const uint32_t waiting_blocks = shared + STAGES * STAGE_BYTES + warp * (own.units / PORTION_UNITS) * WAITING_BYTES;
#endif
    const bool first_ranks = RANK == 0 || blockIdx.y == 0;
    const int first_rank = blockIdx.y * RANK;

    let_next_kernel_start();
    wait_for_previous_kernel();

    Row rows[2];
    unroll<2>([&](auto i) {
        const int row = first_row + mine + i * 8;
        rows[i].inside = row < p.rows;
        p.source.open(rows[i], min(row, p.rows - 1));
    });
    uint32_t next_stage = shared;
    auto start = [&](int index) {
        if (index < own.units) fetch(p, next_stage, own.unit(index), rows, first_rank);
        copy_async_commit();
        next_stage = next_stage + STAGE_BYTES == shared + STAGES * STAGE_BYTES ? shared : next_stage + STAGE_BYTES;
    };
    for (int index = 0; index < STAGES - 1; ++index) start(index);

    if constexpr (Source::MOMENTS) {
        __shared__ RowMoments shared_moments[SHARES_HERE][ROWS], whole[ROWS];
        RowMoments sums[2] = {};
        auto load = [&](const Row& row, int column) {
            return __ldg(reinterpret_cast<const uint4*>(row.raw[0] + column));
        };
        auto add = [&](auto& values) { unroll<2>([&](auto i) { sums[i].add(Source::moments(values[i])); }); };
        // Units that lie in the matrix as a whole: those that are on their way into shared memory already, then the
        // others, several at a time; and last what is left, chunk by chunk.
        const int own_whole = own.whole_units(p.columns);
        unroll<STAGES - 1>([&](auto u) {
            copy_async_wait<STAGES - 2 - decltype(u)::value>();
            if (u >= own_whole) return;
            uint4 values[2][TILES];
            unroll<TILES>([&](auto tile) {
                unroll<2>([&](auto i) {
                    values[i][tile] =
                        load_shared_16(shared + u * STAGE_BYTES + tile * X_TILE + swizzled(mine + i * 8, q));
                });
            });
            add(values);
        });
        int index = min(STAGES - 1, own_whole);
        unroll<2>([&](auto halvings) {
            constexpr int together = decltype(halvings)::value == 0 ? 4 / TILES : 1;
            for (; index + together <= own_whole; index += together) {
                uint4 values[2][together * TILES];
                unroll<together>([&](auto u) {
                    const Columns columns = columns_of(p, own.unit(index + u), q);
                    unroll<TILES>([&](auto tile) {
                        unroll<2>([&](auto i) { values[i][u * TILES + tile] = load(rows[i], columns[tile]); });
                    });
                });
                add(values);
            }
        });
#pragma unroll 1
        for (; index < own.units; ++index) {
            const Columns columns = columns_of(p, own.unit(index), q);
#pragma unroll 1
            for (int tile = 0; tile < TILES; ++tile) {
                if (columns[tile] >= p.columns) continue;
                unroll<2>([&](auto i) {
                    const uint4 value[1] = {load(rows[i], columns[tile])};
                    sums[i].add(Source::moments(value));
                });
            }
        }
        unroll<2>([&](auto i) {
            const RowMoments sum = combine_quad(sums[i]);
            if (q == 0) shared_moments[share_here][mine + i * 8] = sum;
        });
        sync_shares();
        if (threadIdx.x < ROWS) whole[threadIdx.x] = combine_shares(shared_moments, threadIdx.x, shares);
        __syncthreads();
        unroll<2>([&](auto i) { p.source.finish(rows[i], whole[mine + i * 8]); });
    }

    uint32_t largest[2] = {0, 0};
    Squares total[2] = {}, kept[2] = {};
#if RANK > 0
    float t[RANK / 2];
#endif
    uint32_t stage = shared;
#pragma unroll 1
    for (int index = 0; index < own.units; ++index) {
        const int unit = own.unit(index);
        copy_async_wait<STAGES - 2>();
        const Columns columns = columns_of(p, unit, q);
        Values x[2];
        unroll<TILES>([&](auto tile) {
            const uint32_t at = stage + tile * X_TILE + swizzled(mine, q), next_row = 8 * 64;
            uint4 raw[2][Source::RAWS], made[2];
            unroll<2>([&](auto i) {
                unroll<Source::RAWS>([&](auto r) { raw[i][r] = load_shared_16(at + i * next_row + r * RAW_BYTES); });
            });
            make(p, rows, columns[tile], raw, made);
            unroll<2>([&](auto i) {
                x[i].v[tile] = made[i];
                if constexpr (Source::TRANSFORMS) {
                    if (p.dense != nullptr && first_ranks && rows[i].inside && columns[tile] < p.columns)
                        *reinterpret_cast<uint4*>(p.dense + int64_t(first_row + mine + i * 8) * p.columns +
                                                  columns[tile]) = made[i];
                    if constexpr (RANK > 0) store_shared_16(at + i * next_row, made[i]);
                }
            });
        });
#if RANK > 0
        fence_for_wgmma();
        __syncthreads();
        wgmma_fence();
        unroll<TILES>([&](auto tile) {
            const uint64_t a = matrix_descriptor<64>(stage + tile * X_TILE);
            const uint64_t b = matrix_descriptor<64>(stage + Source::RAWS * RAW_BYTES + tile * DOWN_TILE);
            wgmma_dense(t, a, b, tile > 0 || index > 0);
            wgmma_dense(t, a + 2, b + 2, 1);
        });
        wgmma_commit();
#endif
        start(index + STAGES - 1);  // over the stage before this one, which everybody has left
        stage = stage + STAGE_BYTES == shared + STAGES * STAGE_BYTES ? shared : stage + STAGE_BYTES;
        const Selected selected[2] = {select_row(x[0], largest[0]), select_row(x[1], largest[1])};
        if (first_ranks) {
#if FP8
            keep_waiting(waiting_blocks + index / PORTION_UNITS * WAITING_BYTES, unit, selected);
            store_metadata(p, slab, sixteen, unit, selected);
#else
            store_unit(p, slab, sixteen, unit, selected);
#endif
        }
        if (p.norm) {
            unroll<2>([&](auto i) {
                unroll<TILES * 2>([&](auto j) { total[i].add(x[i].word(j * 2), x[i].word(j * 2 + 1)); });
                unroll<GROUPS / 2>(
                    [&](auto j) { kept[i].add(selected[i].pairs[j * 2], selected[i].pairs[j * 2 + 1]); });
            });
        }
#if RANK > 0
        wgmma_wait<0>();
#endif
    }
    if (!SLAB && !p.norm) return;
    unroll<2>([&](auto i) {
        largest[i] = max(largest[i], __shfl_xor_sync(~0u, largest[i], 1));
        largest[i] = max(largest[i], __shfl_xor_sync(~0u, largest[i], 2));
    });
    RowNorm norms[2] = {{largest[0], total[0].sum(g), kept[0].sum(g)}, {largest[1], total[1].sum(g), kept[1].sum(g)}};
    const bool plain[2] = {plain_squares_do(largest[0]), plain_squares_do(largest[1])};
    unroll<2>([&](auto i) {
        const float unit = largest[i] ? RowNorm::unit(largest[i]) : 0.f;
        norms[i].total *= unit * unit;
        norms[i].kept *= unit * unit;
        if (plain[i] && q == g / 2) shared_norm[share_here][mine + i * 8] = norms[i];
    });
    if (__any_sync(~0u, !plain[0] || !plain[1])) {  // once more, in units of the rows' own magnitude
        const Row copies[2] = {rows[0], rows[1]};   // so that the loop above may keep its own in registers
        const TwoNorms scaled = scaled_norms(p, copies, own);
        unroll<2>([&](auto i) {
            const RowNorm sum = combine_quad(scaled.of[i]);
            if (!plain[i] && q == 0) shared_norm[share_here][mine + i * 8] = sum;
        });
    }
#if RANK > 0
    __syncthreads();  // the stages are free
    float* shared_t = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < RANK / 2; ++i) {
        float value = t[i];
        asm volatile("" : "+f"(value)::"memory");
        shared_t[(mine + i / 2 % 2 * 8) * T_PITCH + i / 4 * 8 + q * 2 + i % 2] = own.units ? value : 0.f;
    }
#endif
    sync_shares();
    // Each CTA finishes every ctas-th row: its scale first, then T', a thread eight columns of a row. With FP8 it needs
    // the scales of all rows, of which it holds a share of K.
    const int own_rows = (ROWS - cta + ctas - 1) / ctas;
    [[maybe_unused]] __shared__ float shared_scale[ROWS];
#if FP8
    __shared__ float shared_inverse[ROWS];
#endif
    if (threadIdx.x < (FP8 ? ROWS : own_rows)) {
        const int in_cta = FP8 ? threadIdx.x : cta + threadIdx.x * ctas, row = first_row + in_cta;
        float scale = 1.f;
        if (FP8 || p.norm) {
            const RowNorm norm = combine_shares(shared_norm, in_cta, shares);
            if (p.norm) scale = norm.scale();
#if FP8
            const float t = token_scale(norm.largest);
            shared_inverse[in_cta] = __frcp_rn(t);
            scale *= t;
#endif
            if (first_ranks && row < p.rows && (!FP8 || in_cta % ctas == cta)) p.scale[row] = scale;
        }
        shared_scale[in_cta] = scale;
    }
#if FP8
    __syncthreads();
    if (first_ranks) {
        const float inverse[2] = {shared_inverse[mine], shared_inverse[mine + 8]};
#pragma unroll 1
        for (int block = 0; block < own.units / PORTION_UNITS; ++block)
            store_quantized(p, slab, sixteen, share + block * shares, waiting_blocks + block * WAITING_BYTES, inverse);
    }
#endif
#if RANK > 0
    __syncthreads();
    for (int task = threadIdx.x; task < own_rows * (RANK / 8); task += THREADS) {
        const int own_row = task / (RANK / 8), chunk = task % (RANK / 8), in_slab = cta + own_row * ctas;
        const uint32_t own = shared + (in_slab * T_PITCH + chunk * 8) * 4;
        Eight sum{};
#pragma unroll 4
        for (int other = 0; other < ctas; ++other) {
            const uint32_t from = map_to_cta(own, other);
            const float4 low = load_cluster(from), high = load_cluster(from + 16);
            const float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            unroll<8>([&](auto i) { sum.v[i] += part[i]; });
        }
        const float inverse = 1.f / shared_scale[in_slab];
        unroll<8>([&](auto i) { sum.v[i] *= inverse; });
        const int column = first_rank + chunk * 8, rank_block = column / RANK_K;
        if (rank_block < p.rank_blocks)
            *reinterpret_cast<uint4*>(p.lowrank + (int64_t(slab) * p.rank_blocks + rank_block) * RANK_BYTES +
                                      swizzled(in_slab, column % RANK_K / 8)) = pack(sum);
    }
#endif
    if constexpr (SLAB) cluster_sync();  // no CTA leaves while another reads its shared memory
}

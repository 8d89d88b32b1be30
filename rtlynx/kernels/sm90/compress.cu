// X (M, K) bf16, or what a producer makes of its inputs -> packed 2:4 blocks, norm scale s, T' = (X A) / s.
//
// A warp works on units of 16 rows x 64 k (adjacent groups) or 128 k (strided): lane 4g + q owns rows g and g + 8 and
// in each 32-column tile the eight columns from 8q on. Tiles come into shared memory by cp.async, STAGES - 1 units
// ahead, each thread fetching what it selects from itself, already in the 64-byte swizzle in which wgmma reads X and
// A^T for the low-rank product (the order of k inside a tile is free there, as both are laid out alike).
//
// Without a low-rank product the warps of a CTA share K of the same 16 rows. With one they are a warpgroup on 64
// rows, so that A^T is read once for all, and the CTAs of a cluster share K.
//
// Macros: SOURCE (what X is), MODE (how groups lie), RANK (columns of T' of a CTA; more in gridDim.y), STAGES.
#include "compress_tiles.cuh"
#include "select.cuh"

// Both bf16 of a pair in units of the row's magnitude, squared and summed.
DEVICE float squares(uint32_t pair, float unit, float sum) {
    const float a = bf16_low(pair) * unit, b = bf16_high(pair) * unit;
    return fmaf(a, a, fmaf(b, b, sum));
}

struct Values {
    uint4 v[TILES];

    DEVICE uint32_t word(int i) const {
        const uint4& four = v[i / 4];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
    }
};

struct Selected {
    uint32_t pairs[GROUPS];
    uint32_t nibbles;  // from the lowest on
};

DEVICE Selected select_row(const Values& x, uint32_t& largest) {
    Selected out;
    out.nibbles = 0xFFFFFFFFu;
    unroll<GROUPS>([&](auto j) {
        uint32_t e01, e23;
        if constexpr (MODE == ADJACENT) {
            e01 = x.word(j * 2);
            e23 = x.word(j * 2 + 1);
        } else {
            constexpr uint32_t both = decltype(j)::value % 2 ? 0x7632 : 0x5410;
            e01 = permute(x.word(j / 2), x.word(4 + j / 2), both);
            e23 = permute(x.word(8 + j / 2), x.word(12 + j / 2), both);
        }
        const Kept kept = keep_two_of_four(e01, e23);
        out.pairs[j] = kept.pair;
        out.nibbles -= kept.early << (j * 4);
        out.nibbles -= kept.late << (j * 4 + 2);
        largest = max(largest, kept.largest);
    });
    return out;
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

// Packed values and metadata of this lane's rows g and g + 8, in the slab's `sixteen`-th sixteen rows.
DEVICE void store_unit(const Parameters& p, int slab, int sixteen, int unit, const Selected (&selected)[2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint8_t* band = p.blocks + int64_t(slab) * p.k_blocks * BLOCK_BYTES;
    const int first_row = sixteen * 16 + g;
    if constexpr (MODE == ADJACENT) {
        uint8_t* block = band + int64_t(unit) * BLOCK_BYTES;
        uint32_t words[2];
        unroll<2>([&](auto half) {
            unroll<2>([&](auto i) {
                *reinterpret_cast<uint2*>(block + swizzled(first_row + i * 8, half * 2 + q / 2) + q % 2 * 8) =
                    uint2{selected[i].pairs[half * 2], selected[i].pairs[half * 2 + 1]};
            });
            const uint32_t low = (selected[0].nibbles >> (half * 8)) & 0xFF;
            const uint32_t high = (selected[1].nibbles >> (half * 8)) & 0xFF;
            words[half] = (low | high << 16) << (q % 2 * 8);
            words[half] |= __shfl_xor_sync(~0u, words[half], 1);
        });
        uint32_t* metadata = reinterpret_cast<uint32_t*>(block + METADATA + sixteen * 128);
        metadata[g * 4 + q % 2 * 2 + q / 2] = q % 2 ? words[1] : words[0];
    } else {
        const int k_block = unit * 2 + q / 2, half = q % 2;
        if (k_block >= p.k_blocks) return;
        uint8_t* block = band + int64_t(k_block) * BLOCK_BYTES;
        unroll<2>([&](auto i) {
            unroll<2>([&](auto part) {
                const uint32_t* pairs = selected[i].pairs + part * 4;
                *reinterpret_cast<uint4*>(block + swizzled(first_row + i * 8, half * 2 + part)) =
                    uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
            });
        });
        const uint32_t low = selected[0].nibbles, high = selected[1].nibbles;
        *reinterpret_cast<uint2*>(block + METADATA + sixteen * 128 + (g * 4 + half * 2) * 4) =
            uint2{permute(low, high, 0x5410), permute(low, high, 0x7632)};
    }
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
__device__ __noinline__ TwoNorms scaled_norms(const Parameters& p, const Row (&rows)[2], int share, int shares) {
    TwoNorms norms = {};
    const int q = threadIdx.x % 4;
    for (int unit = share; unit * UNIT_BLOCKS < p.k_blocks; unit += shares) {
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
    const int units = (p.k_blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS;
    const int own_units = (units - share + shares - 1) / shares;  // share, share + shares, ...
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
        if (index < own_units) fetch(p, next_stage, share + index * shares, rows, first_rank);
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
        const int own_whole = (p.columns / (64 * UNIT_BLOCKS) - share + shares - 1) / shares;
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
                    const Columns columns = columns_of(p, share + (index + u) * shares, q);
                    unroll<TILES>([&](auto tile) {
                        unroll<2>([&](auto i) { values[i][u * TILES + tile] = load(rows[i], columns[tile]); });
                    });
                });
                add(values);
            }
        });
#pragma unroll 1
        for (; index < own_units; ++index) {
            const Columns columns = columns_of(p, share + index * shares, q);
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
    for (int index = 0; index < own_units; ++index) {
        const int unit = share + index * shares;
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
        if (first_ranks) store_unit(p, slab, sixteen, unit, selected);
        if (p.scale != nullptr) {
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
    if (!SLAB && p.scale == nullptr) return;
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
        const TwoNorms scaled = scaled_norms(p, copies, share, shares);
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
        shared_t[(mine + i / 2 % 2 * 8) * T_PITCH + i / 4 * 8 + q * 2 + i % 2] = own_units ? value : 0.f;
    }
#endif
    sync_shares();
    // Each CTA finishes every ctas-th row: s first, then T', a thread eight columns of a row.
    const int own_rows = (ROWS - cta + ctas - 1) / ctas;
#if RANK > 0
    __shared__ float shared_scale[ROWS];
#endif
    if (threadIdx.x < own_rows) {
        const int in_cta = cta + threadIdx.x * ctas, row = first_row + in_cta;
        float s = 1.f;
        if (p.scale != nullptr) {
            s = combine_shares(shared_norm, in_cta, shares).scale();
            if (first_ranks && row < p.rows) p.scale[row] = s;
        }
#if RANK > 0
        shared_scale[threadIdx.x] = s;
#endif
    }
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
        const float inverse = 1.f / shared_scale[own_row];
        unroll<8>([&](auto i) { sum.v[i] *= inverse; });
        const int column = first_rank + chunk * 8, rank_block = column / RANK_K;
        if (rank_block < p.rank_blocks)
            *reinterpret_cast<uint4*>(p.lowrank + (int64_t(slab) * p.rank_blocks + rank_block) * RANK_BYTES +
                                      swizzled(in_slab, column % RANK_K / 8)) = pack(sum);
    }
#endif
    if constexpr (SLAB) cluster_sync();  // no CTA leaves while another reads its shared memory
}

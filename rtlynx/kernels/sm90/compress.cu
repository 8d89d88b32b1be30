// X (M, K) bf16, or what a producer makes of its inputs -> packed 2:4 blocks, norm scale s, T' = (X A) / s.
//
// A CTA takes ROW_GROUPS x 16 rows and, in a cluster, a share of K; K_WARPS warps split that share again. A warp
// works on units of 16 rows x 64 k (adjacent groups) or 16 x 128 (strided): lane 4g + q holds rows g and g + 8 and
// eight neighbouring columns, which is at once a coalesced 16-byte load, whole groups to select from, and an A
// fragment of mma.m16n8k16 (the order of k inside an instruction is free as long as A^T is loaded alike).
//
// Macros: SOURCE (what X is), MODE (how groups lie), RANK_TILES (8-column tiles of T', 0 for none), ROW_GROUPS,
// K_WARPS, CLUSTER.
#include "producers.cuh"
#include "select.cuh"

#define ADJACENT 0
#define STRIDED 1
#define GATHER 2  // any grouping and alignment, an element at a time

constexpr int BLOCK_BYTES = 4608, METADATA = 4096, RANK_BYTES = 4096, RANK_K = 32;
constexpr int THREADS = ROW_GROUPS * K_WARPS * 32;
constexpr int ROWS = ROW_GROUPS * 16;
constexpr int SPLITS = K_WARPS * CLUSTER;
constexpr int VECTORS = MODE == ADJACENT ? 2 : 4;  // runs of eight columns that a lane holds of a row
constexpr int UNIT_BLOCKS = MODE == ADJACENT ? 1 : 2;
// The next unit is loaded before this one is worked on, where registers allow.
constexpr bool PREFETCH = RANK_TILES == 0 ? MODE != GATHER : MODE == ADJACENT && RANK_TILES <= 8;
constexpr int MAX_PARTS = 8;
constexpr int RANK_COLUMNS = RANK_TILES * 8;
constexpr int RANK_PITCH = RANK_COLUMNS + 4;

// Groups [previous group_end, group_end): entry i of the c-th of them is column first_column + c * step + i * stride.
struct Part {
    int group_end;
    int first_column;
};

struct Parameters {
    Source source;
    const uint16_t* down;  // A^T (rank, K), contiguous
    uint8_t* blocks;
    float* scale;          // (M), or null for s = 1
    uint8_t* lowrank;
    int rows, columns;
    int k_blocks, rank, rank_blocks;
    int adjacent;          // for GATHER
    int parts;
    Part part[MAX_PARTS];
};

// Where the columns of a lane's run lie: entry i of its groups starts at base + i * stride.
struct Run {
    int base, stride, group;
    bool inside;
};

DEVICE Run run_at(const Parameters& p, int group) {
    Run run{0, 0, group, group * 4 < p.columns};
    int part = 0, first = 0;
    while (part + 1 < p.parts && group >= p.part[part].group_end) first = p.part[part++].group_end;
    run.stride = p.part[part].group_end - first;
    run.base = p.part[part].first_column + group - first;
    return run;
}

DEVICE int column_of(const Parameters& p, int group, int entry) {
    if (p.adjacent) return group * 4 + entry;
    const Run run = run_at(p, group);
    return run.base + entry * run.stride;
}

// The VECTORS runs of eight columns of one row, or of one column of A.
struct Values {
    uint4 v[VECTORS];
};

template <class Load8, class Load1>
DEVICE Values gather(const Parameters& p, int unit, const Load8& load8, const Load1& load1) {
    const int q = threadIdx.x % 4;
    Values values;
    if constexpr (MODE == ADJACENT) {
        unroll<2>([&](auto half) {
            const int column = unit * 64 + half * 32 + q * 8;
            values.v[half] = column < p.columns ? load8(column) : uint4{0, 0, 0, 0};
        });
    } else if constexpr (MODE == STRIDED) {
        const Run run = run_at(p, unit * 32 + q * 8);
        unroll<4>([&](auto i) {
            values.v[i] = run.inside ? load8(run.base + i * run.stride) : uint4{0, 0, 0, 0};
        });
    } else {
        for (int i = 0; i < 4; ++i) {
            uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int group = unit * 32 + q * 8 + j;
                if (group * 4 < p.columns) pairs[j / 2] |= uint32_t(load1(column_of(p, group, i))) << (j % 2 * 16);
            }
            values.v[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
    return values;
}

// A float of one bf16 of a pair, in units of the row's magnitude, squared and summed.
DEVICE float squares(uint32_t pair, float unit, float sum) {
    const float a = bf16_low(pair) * unit, b = bf16_high(pair) * unit;
    return fmaf(a, a, fmaf(b, b, sum));
}

// Selection of one row's share of a unit: kept pairs, nibbles from the lowest on, the norm so far.
template <int GROUPS>
struct Selected {
    uint32_t pairs[GROUPS];
    uint32_t nibbles;
};

DEVICE Selected<VECTORS * 2> select_row(const Values& x, RowNorm& norm) {
    constexpr int groups = VECTORS * 2;
    Selected<groups> out;
    out.nibbles = 0;
    uint32_t largest = norm.largest;
    unroll<groups>([&](auto j) {
        uint32_t e01, e23;
        if constexpr (MODE == ADJACENT) {
            const uint4& v = x.v[j / 2];
            e01 = j % 2 ? v.z : v.x;
            e23 = j % 2 ? v.w : v.y;
        } else {
            auto word = [&](int i) {
                const uint4& v = x.v[i];
                return j / 2 == 0 ? v.x : j / 2 == 1 ? v.y : j / 2 == 2 ? v.z : v.w;
            };
            constexpr uint32_t both = decltype(j)::value % 2 ? 0x7632 : 0x5410;
            e01 = permute(word(0), word(1), both);
            e23 = permute(word(2), word(3), both);
        }
        const Kept kept = keep_two_of_four(e01, e23);
        out.pairs[j] = kept.pair;
        out.nibbles |= kept.nibble << (j * 4);
        largest = max(largest, kept.largest);
    });
    norm.raise(largest);
    const float unit = RowNorm::unit(norm.largest);
    unroll<VECTORS>([&](auto i) {
        norm.total = squares(x.v[i].x, unit, norm.total);
        norm.total = squares(x.v[i].y, unit, norm.total);
        norm.total = squares(x.v[i].z, unit, norm.total);
        norm.total = squares(x.v[i].w, unit, norm.total);
    });
    unroll<groups>([&](auto j) { norm.kept = squares(out.pairs[j], unit, norm.kept); });
    return out;
}

// Packed values and metadata of rows g and g + 8 (selected[0], [1]) of row group `group` of 16 rows.
DEVICE void store_unit(const Parameters& p, int group, int unit, const Selected<VECTORS * 2> (&selected)[2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint8_t* band = p.blocks + int64_t(group / 4) * p.k_blocks * BLOCK_BYTES;
    const int first_row = group % 4 * 16 + g;
    if constexpr (MODE == ADJACENT) {
        uint8_t* block = band + int64_t(unit) * BLOCK_BYTES;
        uint32_t words[2];
        unroll<2>([&](auto half) {
            unroll<2>([&](auto i) {
                const int row = first_row + i * 8, chunk = (half * 2 + q / 2) ^ ((row >> 1) & 3);
                *reinterpret_cast<uint2*>(block + row * 64 + chunk * 16 + q % 2 * 8) =
                    uint2{selected[i].pairs[half * 2], selected[i].pairs[half * 2 + 1]};
            });
            const uint32_t low = (selected[0].nibbles >> (half * 8)) & 0xFF;
            const uint32_t high = (selected[1].nibbles >> (half * 8)) & 0xFF;
            words[half] = (low | high << 16) << (q % 2 * 8);
            words[half] |= __shfl_xor_sync(~0u, words[half], 1);
        });
        uint32_t* metadata = reinterpret_cast<uint32_t*>(block + METADATA + group % 4 * 128);
        metadata[g * 4 + q % 2 * 2 + q / 2] = q % 2 ? words[1] : words[0];
    } else {
        const int k_block = unit * 2 + q / 2, half = q % 2;
        if (k_block >= p.k_blocks) return;
        uint8_t* block = band + int64_t(k_block) * BLOCK_BYTES;
        unroll<2>([&](auto i) {
            const int row = first_row + i * 8;
            unroll<2>([&](auto part) {
                const uint32_t* pairs = selected[i].pairs + part * 4;
                const int chunk = (half * 2 + part) ^ ((row >> 1) & 3);
                *reinterpret_cast<uint4*>(block + row * 64 + chunk * 16) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
            });
        });
        const uint32_t low = selected[0].nibbles, high = selected[1].nibbles;
        *reinterpret_cast<uint2*>(block + METADATA + group % 4 * 128 + (g * 4 + half * 2) * 4) =
            uint2{permute(low, high, 0x5410), permute(low, high, 0x7632)};
    }
}

DEVICE void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// T += X A over a unit; lane 4g + q loads row n = 8 tile + g of A^T at the columns where it holds X.
DEVICE void multiply_unit(const Parameters& p, int unit, int first_rank, const Values (&x)[2],
                          float (&t)[RANK_TILES > 0 ? RANK_TILES : 1][4]) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int tile = 0; tile < RANK_TILES; ++tile) {
        const int n = first_rank + tile * 8 + g;
        const uint16_t* row = p.down + int64_t(n) * p.columns;
        const bool inside = n < p.rank;
        const Values a = gather(
            p, unit,
            [&](int column) {
                return inside ? __ldg(reinterpret_cast<const uint4*>(row + column)) : uint4{0, 0, 0, 0};
            },
            [&](int column) { return inside ? row[column] : uint16_t(0); });
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            mma(t[tile], x[0].v[i].x, x[1].v[i].x, x[0].v[i].y, x[1].v[i].y, a.v[i].x, a.v[i].y);
            mma(t[tile], x[0].v[i].z, x[1].v[i].z, x[0].v[i].w, x[1].v[i].w, a.v[i].z, a.v[i].w);
        }
    }
}

struct Shared {
    RowNorm norm[K_WARPS][ROWS];
    RowMoments moments[K_WARPS][ROWS];
    float t[RANK_TILES > 0 ? ROWS * RANK_PITCH : 1];
};

// The same object in CTA `rank` of the cluster.
template <class T>
DEVICE T load_from_cta(const T& object, int rank) {
    if constexpr (CLUSTER == 1) return object;
    T copy;
    const uint32_t from = map_to_cta(shared_address(&object), rank);
    float* words = reinterpret_cast<float*>(&copy);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); ++i) words[i] = load_cluster_f32(from + i * 4);
    return copy;
}

DEVICE void sync_all() {
    if constexpr (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();
}

// Parts of a row's sum from all warps and CTAs that share it, always in the same order.
template <class T>
DEVICE T combine(const T (&parts)[K_WARPS][ROWS], int row) {
    T sum{};
    for (int cta = 0; cta < CLUSTER; ++cta)
        for (int warp = 0; warp < K_WARPS; ++warp) sum.add(load_from_cta(parts[warp][row], cta));
    return sum;
}

// A sum over the four lanes of a quad, the same in each.
template <class T>
DEVICE T combine_quad(T mine) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        T other;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
        uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
        for (int i = 0; i < int(sizeof(T) / 4); ++i) to[i] = __shfl_xor_sync(~0u, from[i], distance);
        if (threadIdx.x & distance) {  // the lower lane's part first in both
            other.add(mine);
            mine = other;
        } else {
            mine.add(other);
        }
    }
    return mine;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
compress(const __grid_constant__ Parameters p) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int row_warp = warp % ROW_GROUPS, k_warp = warp / ROW_GROUPS;
    const int cta_row = blockIdx.x / CLUSTER * ROWS;
    const int group = cta_row / 16 + row_warp;
    const int first_unit = (CLUSTER > 1 ? int(cluster_rank()) : 0) * K_WARPS + k_warp;
    const int units = (p.k_blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS;
    const bool store = RANK_TILES == 0 || blockIdx.y == 0;
    const int first_rank = blockIdx.y * RANK_COLUMNS;
    const int mine = row_warp * 16 + g;  // first of this lane's rows, within the CTA

    let_next_kernel_start();
    wait_for_previous_kernel();

    Row rows[2] = {p.source.row(cta_row + mine, p.rows), p.source.row(cta_row + mine + 8, p.rows)};
    auto load = [&](int unit, int i) {
        return gather(
            p, unit, [&](int column) { return p.source.eight(rows[i], column); },
            [&](int column) { return p.source.one(rows[i], column); });
    };
    if constexpr (Source::moments) {
        RowMoments sums[2] = {};
        for (int unit = first_unit; unit < units; unit += SPLITS) {
            unroll<2>([&](auto i) {
                const Values raw = gather(
                    p, unit, [&](int column) { return p.source.raw_eight(rows[i], column); },
                    [&](int column) { return p.source.raw_one(rows[i], column); });
                unroll<VECTORS>([&](auto j) {
                    const int group_ = MODE == ADJACENT ? unit * 16 + j * 8 + q * 2 : unit * 32 + q * 8;
                    sums[i].add(raw.v[j], MODE == GATHER ? min(8, p.columns / 4 - group_)
                                                         : (group_ * 4 < p.columns ? 8 : 0));
                });
            });
        }
        unroll<2>([&](auto i) {
            const RowMoments sum = combine_quad(sums[i]);
            if (q == 0) shared.moments[k_warp][mine + i * 8] = sum;
        });
        sync_all();
        unroll<2>([&](auto i) { p.source.finish(rows[i], combine(shared.moments, mine + i * 8)); });
        if constexpr (CLUSTER > 1) cluster_arrive();  // matched before shared memory is left, below
    }

    RowNorm norm[2] = {};
    float t[RANK_TILES > 0 ? RANK_TILES : 1][4] = {};
    Values x[2];
    if (PREFETCH && first_unit < units) unroll<2>([&](auto i) { x[i] = load(first_unit, i); });
    for (int unit = first_unit; unit < units; unit += SPLITS) {
        Values next[2];
        if constexpr (PREFETCH) {
            if (unit + SPLITS < units) unroll<2>([&](auto i) { next[i] = load(unit + SPLITS, i); });
        } else {
            unroll<2>([&](auto i) { x[i] = load(unit, i); });
        }
        const Selected<VECTORS * 2> selected[2] = {select_row(x[0], norm[0]), select_row(x[1], norm[1])};
        if (store) store_unit(p, group, unit, selected);
        if constexpr (RANK_TILES > 0) multiply_unit(p, unit, first_rank, x, t);
        if constexpr (PREFETCH) unroll<2>([&](auto i) { x[i] = next[i]; });
    }
    if (RANK_TILES == 0 && p.scale == nullptr) return;

    if constexpr (Source::moments && CLUSTER > 1) cluster_wait();
    unroll<2>([&](auto i) {
        const RowNorm sum = combine_quad(norm[i]);
        if (q == 0) shared.norm[k_warp][mine + i * 8] = sum;
    });
    if constexpr (RANK_TILES > 0) {
        for (int turn = 0; turn < K_WARPS; ++turn) {  // warps that share rows add up in order
            if (turn == k_warp) {
#pragma unroll
                for (int tile = 0; tile < RANK_TILES; ++tile)
                    unroll<4>([&](auto i) {
                        float& sum = shared.t[(mine + i / 2 * 8) * RANK_PITCH + tile * 8 + q * 2 + i % 2];
                        sum = turn == 0 ? t[tile][i] : sum + t[tile][i];
                    });
            }
            __syncthreads();
        }
    }
    sync_all();
    // Each CTA of the cluster finishes a share of the rows: a thread eight columns of T' of a row.
    constexpr int share = ROWS / CLUSTER;
    const int chunks = RANK_TILES > 0 ? RANK_TILES : 1;
    for (int task = threadIdx.x; task < share * chunks; task += THREADS) {
        const int local = (CLUSTER > 1 ? int(cluster_rank()) : 0) * share + task / chunks, chunk = task % chunks;
        const int row = cta_row + local;
        float s = 1.f;
        if (p.scale != nullptr) {
            s = combine(shared.norm, local).scale();
            if (store && chunk == 0 && row < p.rows) p.scale[row] = s;
        }
        if constexpr (RANK_TILES > 0) {
            float sum[8] = {};
            for (int cta = 0; cta < CLUSTER; ++cta)
                unroll<8>([&](auto i) {
                    sum[i] += load_from_cta(shared.t[local * RANK_PITCH + chunk * 8 + i], cta);
                });
            const int column = first_rank + chunk * 8, rank_block = column / RANK_K;
            if (rank_block < p.rank_blocks) {
                const int in_slab = row % 64, place = (column % RANK_K / 8) ^ ((in_slab >> 1) & 3);
                uint8_t* to = p.lowrank + (int64_t(row / 64) * p.rank_blocks + rank_block) * RANK_BYTES;
                *reinterpret_cast<uint4*>(to + in_slab * 64 + place * 16) =
                    uint4{pack_bf16(sum[0] / s, sum[1] / s), pack_bf16(sum[2] / s, sum[3] / s),
                          pack_bf16(sum[4] / s, sum[5] / s), pack_bf16(sum[6] / s, sum[7] / s)};
            }
        }
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // no CTA leaves while another reads its shared memory
}

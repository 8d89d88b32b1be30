// Sums over a row in the compress kernel: of four lanes, then of the splits of K, always in the same order.
#pragma once
#include "compress_tiles.cuh"

template <class T>
DEVICE T shuffle_xor(const T& mine, int distance) {
    T other;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
    uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); ++i) to[i] = __shfl_xor_sync(~0u, from[i], distance);
    return other;
}

template <class T>
DEVICE T reduce_quad(T mine) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        T other = shuffle_xor(mine, distance);
        if (threadIdx.x & distance) {  // the lower lane's part first in both
            other.add(mine);
            mine = other;
        } else {
            mine.add(other);
        }
    }
    return mine;
}

// Wait for all that split the K of the same rows.
DEVICE void sync_k_splits() {
    if constexpr (kClusterSplitsK)
        cluster_sync();
    else
        __syncthreads();
}

// A row's parts from all splits of K.
template <class T>
DEVICE T reduce_k_splits(const T (&smem_parts)[kKSplitsPerCta][BLOCK_M], int row, int num_splits) {
    static_assert(sizeof(T) == 16, "a part is read in one load");
    T part[MAX_K_SPLITS], sum{};
#pragma unroll
    for (int i = 0; i < MAX_K_SPLITS; ++i) {  // all are asked for before the first is used
        if constexpr (!kClusterSplitsK)
            part[i] = smem_parts[i][row];
        else if (i < num_splits)
            reinterpret_cast<float4&>(part[i]) = load_cluster_smem(map_to_cta(smem_address(&smem_parts[0][row]), i));
    }
#pragma unroll
    for (int i = 0; i < MAX_K_SPLITS; ++i)
        if (i < num_splits) sum.add(part[i]);
    return sum;
}

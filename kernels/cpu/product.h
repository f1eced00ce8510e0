// SPDX-License-Identifier: Apache-2.0
// Matrix products with the accumulators in registers: strips of kStrip rows by up to kVectors
// vectors. An element of the left matrix is broadcast, so that one may lie in memory as it likes.
#pragma once

#include "lanes.h"

namespace diffxkv {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStrip = 8;  // 24 accumulators of 32 registers
#else
constexpr int kStrip = 4;  // 12 of 16
#endif
constexpr int kVectors = 3;

// The left matrix: element (row, k) is at data[row * row_stride + k * step].
struct Left {
    const float* data;
    int64_t row_stride, step;
};

// One strip: to[r, :] = (Add: to[r, :] * scale) + sum over k < depth of left(r, k) * right[k, :].
// right and to have Columns * kLanes columns, of which the first V * kLanes are computed.
template <int V, bool Add, int Columns = kVectors>
inline void multiply_strip(Left left, const float* right, int64_t depth, const Lanes* scale,
                           float* to) {
    constexpr int columns = Columns * kLanes;
    Lanes sum[kStrip][V];
#pragma GCC unroll 8
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v)
            sum[r][v] = Add ? load_lanes(to + r * columns + v * kLanes) * scale[v] : Lanes{};
    for (int64_t k = 0; k < depth; ++k) {
        Lanes x[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) x[v] = load_lanes(right + k * columns + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kStrip; ++r) {
            const Lanes a = broadcast(left.data[r * left.row_stride + k * left.step]);
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) sum[r][v] += a * x[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) store_lanes(to + r * columns + v * kLanes, sum[r][v]);
}

}  // namespace diffxkv

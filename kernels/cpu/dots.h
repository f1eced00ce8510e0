// SPDX-License-Identifier: Apache-2.0
// Dot products of one key row with several query rows; head_dim known at compile time where common.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace diffxkv {

// Calls f(integral_constant<int, Dim>) with Dim = dim if the kernels specialise for it, else 0.
template <class F>
inline auto with_dim(int64_t dim, F&& f) {
    switch (dim) {
        case 64: return f(std::integral_constant<int, 64>());
        case 80: return f(std::integral_constant<int, 80>());
        case 96: return f(std::integral_constant<int, 96>());
        case 128: return f(std::integral_constant<int, 128>());
        case 256: return f(std::integral_constant<int, 256>());
        default: return f(std::integral_constant<int, 0>());
    }
}

// out[i * out_stride] = row . q[i] for i < count; row [dim], q [count, dim], dim a multiple of 16.
template <int Dim>
inline void dots(const float* row, const float* q, int64_t count, int64_t any_dim, float* out,
                 int64_t out_stride) {
    const int64_t dim = Dim ? Dim : any_dim;
    for (int64_t i = 0; i < count; i += 4) {
        // Heads past the last repeat it: a group need not be a multiple of four.
        const int64_t left = count - i - 1;
        const float* q0 = q + i * dim;
        const float* q1 = q0 + (left < 1 ? left : 1) * dim;
        const float* q2 = q0 + (left < 2 ? left : 2) * dim;
        const float* q3 = q0 + (left < 3 ? left : 3) * dim;
        Lanes a{}, b{}, c{}, d{};
        for (int64_t j = 0; j < dim; j += kLanes) {
            Lanes x = load_lanes(row + j);
            a += x * load_lanes(q0 + j);
            b += x * load_lanes(q1 + j);
            c += x * load_lanes(q2 + j);
            d += x * load_lanes(q3 + j);
        }
        Quad sums = sum_lanes(a, b, c, d);
        for (int64_t k = 0; k < 4 && k <= left; ++k) out[(i + k) * out_stride] = sums[k];
    }
}

}  // namespace diffxkv

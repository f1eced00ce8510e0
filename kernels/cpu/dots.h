// SPDX-License-Identifier: Apache-2.0
// Dot products of one key row with several query rows; head_dim known at compile time where common.
#pragma once

#include <cstdint>
#include <type_traits>

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

// out[i * out_stride] = row . q[i] for i < count; row [dim], q [count, dim].
template <int Dim>
inline void dots(const float* row, const float* q, int64_t count, int64_t any_dim, float* out,
                 int64_t out_stride) {
    const int64_t dim = Dim ? Dim : any_dim;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, q += 4 * dim) {
        float a = 0.f, b = 0.f, c = 0.f, d = 0.f;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t j = 0; j < dim; ++j) {
            a += row[j] * q[j];
            b += row[j] * q[dim + j];
            c += row[j] * q[2 * dim + j];
            d += row[j] * q[3 * dim + j];
        }
        out[i * out_stride] = a, out[(i + 1) * out_stride] = b;
        out[(i + 2) * out_stride] = c, out[(i + 3) * out_stride] = d;
    }
    for (; i < count; ++i, q += dim) {
        float a = 0.f;
#pragma omp simd reduction(+ : a)
        for (int64_t j = 0; j < dim; ++j) a += row[j] * q[j];
        out[i * out_stride] = a;
    }
}

}  // namespace diffxkv

// SPDX-License-Identifier: Apache-2.0
// The rotation of kernels/basis/rotation.py: a normalised block Hadamard transform of one row.
#pragma once

#include <cmath>
#include <cstdint>

namespace diffxkv {

// Rotates row [dim] in place; blocks are the largest power of two that divides dim.
inline void rotate_row(float* row, int64_t dim) {
    const int64_t block = dim & -dim;
    for (int64_t half = 1; half < block; half *= 2)
        for (int64_t first = 0; first < dim; first += 2 * half)
#pragma omp simd
            for (int64_t i = first; i < first + half; ++i) {
                const float a = row[i], b = row[i + half];
                row[i] = a + b;
                row[i + half] = a - b;
            }
    const float scale = 1.f / std::sqrt(static_cast<float>(block));
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) row[i] *= scale;
}

}  // namespace diffxkv

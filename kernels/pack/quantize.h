// SPDX-License-Identifier: Apache-2.0
// Asymmetric quantization of one row; bit for bit what naive.py computes.
#pragma once

#include <algorithm>

#include "store.h"

namespace diffxkv {

constexpr float kFp16Max = 65504.f;
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds small numbers, ties to even

// Share of a row's min/max range that codes cover: CLIP of quantize.py.
inline float clip(int64_t bits) { return bits == 2 ? 0.8f : 1.f; }

// Codes, in split-plane order, of one row against its clipped range; meta gets scale and zero, the
// row is overwritten.
inline void quantize_row(float* row, int64_t dim, int64_t bits, uint8_t* out, Half* meta) {
    float lowest = row[0], highest = row[0];
#pragma omp simd reduction(min : lowest) reduction(max : highest)
    for (int64_t i = 0; i < dim; ++i) {
        lowest = row[i] < lowest ? row[i] : lowest;
        highest = row[i] > highest ? row[i] : highest;
    }
    const float levels = static_cast<float>((1 << bits) - 1);
    const float range = (highest - lowest) * clip(bits) / levels;
    from_float(std::min(range, kFp16Max), meta[0]);
    const float scale = to_float(meta[0]);
    const float first = 0.5f * lowest + 0.5f * highest - scale * (levels / 2);
    from_float(std::clamp(first, -kFp16Max, kFp16Max), meta[1]);
    const float zero = to_float(meta[1]);
    const float step = scale > 0.f ? scale : 1.f;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        float code = (row[i] - zero) / step;
        code = code > 0.f ? code : 0.f;
        code = code < levels ? code : levels;
        row[i] = (code + kRound) - kRound;
    }
    const int64_t planes = 8 / bits, bytes = dim / planes;
#pragma omp simd
    for (int64_t i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>(static_cast<int>(row[i]));
    for (int64_t plane = 1; plane < planes; ++plane) {
        const float* codes = row + plane * bytes;
        const int shift = static_cast<int>(plane * bits);
#pragma omp simd
        for (int64_t i = 0; i < bytes; ++i)
            out[i] = static_cast<uint8_t>(out[i] | static_cast<int>(codes[i]) << shift);
    }
}

}  // namespace diffxkv

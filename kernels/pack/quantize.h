// SPDX-License-Identifier: Apache-2.0
// Asymmetric quantization of one row; bit for bit what quantize.py computes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace diffxkv {

constexpr uint8_t kLow = 1, kHigh = 2;  // tier codes of layout.py
constexpr float kFp16Max = 65504.f;
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds small numbers, ties to even

// Nearest fp16 of a finite |x| <= 65504, ties to even.
inline uint16_t to_half(float x) {
#ifdef __F16C__
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    // Adding a power of two that has the wanted last place as its own lets the FPU round: 13 bits
    // above x for normal numbers, 2^-1 (whose last place is 2^-24) for fp16 subnormals.
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    const uint32_t sign = word >> 16 & 0x8000;
    const float magnitude = std::fabs(x);
    std::memcpy(&word, &magnitude, sizeof word);
    if (magnitude < 6.103515625e-05f) {
        const float shifted = magnitude + 0.5f;
        std::memcpy(&word, &shifted, sizeof word);
        return static_cast<uint16_t>(sign | (word - 0x3f000000));
    }
    word += 0xfff + (word >> 13 & 1);
    return static_cast<uint16_t>(sign | ((word >> 13) - (112 << 10)));
#endif
}

// Share of a row's min/max range that codes cover: CLIP of quantize.py.
inline float clip(int64_t bits) { return bits == 2 ? 0.8f : 1.f; }

// Codes, in split-plane order, of one row against its clipped range; meta gets scale and zero, the
// row is overwritten.
inline void quantize_row(float* row, int64_t dim, int64_t bits, uint8_t* out, uint16_t* meta) {
    float lowest = row[0], highest = row[0];
#pragma omp simd reduction(min : lowest) reduction(max : highest)
    for (int64_t i = 0; i < dim; ++i) {
        lowest = row[i] < lowest ? row[i] : lowest;
        highest = row[i] > highest ? row[i] : highest;
    }
    const float levels = static_cast<float>((1 << bits) - 1);
    const float range = (highest - lowest) * clip(bits) / levels;
    meta[0] = to_half(range > kFp16Max ? kFp16Max : range);
    const float scale = to_float(Half{meta[0]});
    const float first = 0.5f * lowest + 0.5f * highest - scale * (levels / 2);
    meta[1] = to_half(first > kFp16Max ? kFp16Max : first < -kFp16Max ? -kFp16Max : first);
    const float zero = to_float(Half{meta[1]});
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

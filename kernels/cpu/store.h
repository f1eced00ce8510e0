// SPDX-License-Identifier: Apache-2.0
// Floats to elements of the model's dtype, rounded to nearest, ties to even.
#pragma once

#include <cmath>

#include "rows.h"

namespace diffxkv {

inline void from_float(float x, float& to) { to = x; }

inline void from_float(float x, BFloat& to) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    const bool nan = (word & 0x7fffffff) > 0x7f800000;
    word += 0x7fff + (word >> 16 & 1);
    to.bits = nan ? 0x7fc0 : static_cast<uint16_t>(word >> 16);
}

inline void from_float(float x, Half& to) {
#ifdef __F16C__
    to.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    // Adding a power of two that has the wanted last place as its own lets the FPU round fp16's
    // subnormals; what is too large, or NaN, stays so.
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    const uint32_t sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    if (word >= 0x477ff000) {  // from 65520 on
        to.bits = static_cast<uint16_t>(sign | (word > 0x7f800000 ? 0x7e00 : 0x7c00));
    } else if (word < 0x38800000) {  // below 2^-14
        const float shifted = std::fabs(x) + 0.5f;
        std::memcpy(&word, &shifted, sizeof word);
        to.bits = static_cast<uint16_t>(sign | (word - 0x3f000000));
    } else {
        word += 0xfff + (word >> 13 & 1);
        to.bits = static_cast<uint16_t>(sign | ((word >> 13) - (112 << 10)));
    }
#endif
}

// Calls f(T()) with the element type of `dtype`.
template <class F>
inline void with_element(DType dtype, F&& f) {
    switch (dtype) {
        case kBFloat16: return f(BFloat());
        case kFloat16: return f(Half());
        default: return f(float());
    }
}

// One row [dim] to elements of `dtype`.
inline void float_to_row(const float* row, DType dtype, int64_t dim, uint8_t* out) {
    with_element(dtype, [&](auto element) {
        auto* to = reinterpret_cast<decltype(element)*>(out);
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) from_float(row[i], to[i]);
    });
}

}  // namespace diffxkv

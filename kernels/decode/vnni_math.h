// SPDX-License-Identifier: Apache-2.0
// Sixteen floats at a time: exponentials, and integers split into two signed bytes for vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace diffxkv {

constexpr int32_t kSplitMax = 127 * 256 + 127;

// Sixteen integers x = 256 * high + low, both signed bytes.
inline void split_bytes(__m512i x, void* high, void* low) {
    __m512i top = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(static_cast<__m128i*>(high), _mm512_cvtepi32_epi8(top));
    _mm_storeu_si128(static_cast<__m128i*>(low), _mm512_cvtepi32_epi8(x));
}

inline float absolute_max(const float* x, int64_t n) {
    float top = 0.f;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) {
        float a = x[i] < 0.f ? -x[i] : x[i];
        top = a > top ? a : top;
    }
    return top;
}

constexpr float kPadding = -1e30f;  // a score that weighs nothing, but finite

// 2^x below 3e-7 relative error; underflows to 0.
inline __m512 exp2_lanes(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.8775767e-3f);
    for (float c : {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

}  // namespace diffxkv

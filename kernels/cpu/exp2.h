// SPDX-License-Identifier: Apache-2.0
// A base-2 exponential that compilers vectorise on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace diffxkv {

// 2^r - 1, of a number or of lanes, for r in [-0.5, 0.5].
template <typename T>
inline T exp2_minus_one_near_zero(T r) {
    T y = 1.535336188319500e-4f * r + 1.339887440266574e-3f;
    y = y * r + 9.618437357674640e-3f;
    y = y * r + 5.550332471162809e-2f;
    y = y * r + 2.402264791363012e-1f;
    y = y * r + 6.931472028550421e-1f;
    return y * r;
}

// 2^x below 2e-7 relative error, x clamped to [-126, 126]: -inf gives 2^-126, in effect nothing.
inline float fast_exp2(float x) {
    x = x > -126.f ? x : -126.f;
    x = x < 126.f ? x : 126.f;
    int32_t whole = static_cast<int32_t>(x + (x < 0.f ? -0.5f : 0.5f));
    float r = x - static_cast<float>(whole);
    float y = exp2_minus_one_near_zero(r) + 1.f;
    int32_t bits = (whole + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

// Lanes as a whole number and what is left of them, for |x| < 2^22.
struct WholeAndRest {
    IntLanes whole;  // in the last bits
    Lanes rest;      // in [-0.5, 0.5]

    explicit WholeAndRest(Lanes x) {
        const Lanes shifted = x + 12582912.f;  // 1.5 * 2^23: x is rounded in the last bits
        rest = x - (shifted - 12582912.f);
        std::memcpy(&whole, &shifted, sizeof whole);
    }

    // y * 2^whole.
    Lanes scale(Lanes y) const {
        IntLanes bits;
        std::memcpy(&bits, &y, sizeof bits);
        bits += whole << 23;
        std::memcpy(&y, &bits, sizeof y);
        return y;
    }
};

// The same in every lane, for x <= 126; NaN gives 2^-126, too.
inline Lanes fast_exp2(Lanes x) {
    const WholeAndRest parts(max_lanes(x, broadcast(-126.f)));
    return parts.scale(exp2_minus_one_near_zero(parts.rest) + 1.f);
}

}  // namespace diffxkv

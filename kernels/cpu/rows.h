// SPDX-License-Identifier: Apache-2.0
// Elements of one row: conversions to float and unpacking of split-plane codes.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace diffxkv {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Half {
    uint16_t bits;
};

struct BFloat {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat x) {
    uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
}

inline float to_float(Half x) {
#ifdef __F16C__
    return _cvtsh_ss(x.bits);
#else
    // Shift exponent and mantissa into place and scale by 2^112: exact for subnormals too.
    uint32_t word = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    float result;
    std::memcpy(&result, &word, sizeof result);
    result *= 5.192296858534828e33f;
    std::memcpy(&word, &result, sizeof word);
    if ((x.bits & 0x7c00) == 0x7c00) word |= 0x7f800000;
    word |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
    std::memcpy(&result, &word, sizeof result);
    return result;
#endif
}

// Codes of one row as floats (not yet times scale plus zero). `dim` is a multiple of 16.
template <int Bits>
inline void codes_to_float(const uint8_t* row, int64_t dim, float* out) {
    constexpr int planes = 8 / Bits, mask = (1 << Bits) - 1;
    const int64_t bytes = dim / planes;
    for (int plane = 0; plane < planes; ++plane) {
#pragma omp simd
        for (int64_t i = 0; i < bytes; ++i)
            out[plane * bytes + i] = static_cast<float>((row[i] >> (plane * Bits)) & mask);
    }
}

template <class T>
inline void raw_to_float(const uint8_t* row, int64_t dim, float* out) {
    const T* elements = reinterpret_cast<const T*>(row);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) out[i] = to_float(elements[i]);
}

// One stored row as floats: codes for 2, 4 or 8 bits, elements of `raw` for 0 bits.
inline void row_to_float(const uint8_t* row, int64_t bits, DType raw, int64_t dim, float* out) {
    switch (bits) {
        case 2: return codes_to_float<2>(row, dim, out);
        case 4: return codes_to_float<4>(row, dim, out);
        case 8: return codes_to_float<8>(row, dim, out);
        default: break;
    }
    switch (raw) {
        case kBFloat16: return raw_to_float<BFloat>(row, dim, out);
        case kFloat16: return raw_to_float<Half>(row, dim, out);
        default: return raw_to_float<float>(row, dim, out);
    }
}

// Scale and zero of a token's key and value (one meta row of four fp16); raw rows have 1 and 0.
struct Meta {
    float key_scale, key_zero, value_scale, value_zero;
};

inline Meta load_meta(const uint8_t* row) {
    Half h[4];
    std::memcpy(h, row, sizeof h);
    return {to_float(h[0]), to_float(h[1]), to_float(h[2]), to_float(h[3])};
}

constexpr Meta kRawMeta{1.f, 0.f, 1.f, 0.f};

}  // namespace diffxkv

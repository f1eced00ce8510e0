// SPDX-License-Identifier: Apache-2.0
// AVX-512 byte shuffles that bring stored rows into the operand order of vpdpbusd, which adds four
// products of neighbouring bytes into each 32-bit lane.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace diffxkv {

// Keys: dword `c` of sixteen rows becomes out[c * stride], lane t holding row t. `mask` selects the
// dwords that exist; the others read as zero.
inline void transpose_dwords(const uint8_t* const* rows, int64_t offset, __mmask16 mask,
                             __m512i* out, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + offset);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 * r + c], 128-bit lane L: dword 4 * L + c of rows 4r .. 4r + 3.
    for (int c = 0; c < 4; ++c) {
        __m512i even01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        __m512i odd01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i even23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        __m512i odd23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        out[c * stride] = _mm512_shuffle_i32x4(even01, even23, 0x88);
        out[(4 + c) * stride] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
        out[(8 + c) * stride] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
        out[(12 + c) * stride] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
}

// Values: byte i of four rows becomes one dword. A wide chunk takes up to 64 bytes of a row and
// yields four vectors, a narrow one up to 32 bytes and two.
inline void interleave_wide(const uint8_t* const* rows, int64_t offset, __mmask16 mask,
                            __m512i* out) {
    __m512i r[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + offset);
    __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]), high01 = _mm512_unpackhi_epi8(r[0], r[1]);
    __m512i low23 = _mm512_unpacklo_epi8(r[2], r[3]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
    out[0] = _mm512_unpacklo_epi16(low01, low23);
    out[1] = _mm512_unpackhi_epi16(low01, low23);
    out[2] = _mm512_unpacklo_epi16(high01, high23);
    out[3] = _mm512_unpackhi_epi16(high01, high23);
}

inline void interleave_narrow(const uint8_t* const* rows, int64_t offset, __mmask8 mask,
                              __m512i* out) {
    __m256i r[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm256_maskz_loadu_epi32(mask, rows[i] + offset);
    __m512i r02 = _mm512_inserti64x4(_mm512_castsi256_si512(r[0]), r[2], 1);
    __m512i r13 = _mm512_inserti64x4(_mm512_castsi256_si512(r[1]), r[3], 1);
    __m512i low = _mm512_unpacklo_epi8(r02, r13), high = _mm512_unpackhi_epi8(r02, r13);
    __m512i pair01 = _mm512_shuffle_i64x2(low, high, 0x44);
    __m512i pair23 = _mm512_shuffle_i64x2(low, high, 0xee);
    out[0] = _mm512_unpacklo_epi16(pair01, pair23);
    out[1] = _mm512_unpackhi_epi16(pair01, pair23);
}

// Byte of the chunk that lane `lane` of output vector `vector` holds.
inline int64_t wide_byte(int64_t vector, int64_t lane) {
    return lane / 4 * 16 + vector * 4 + lane % 4;
}

inline int64_t narrow_byte(int64_t vector, int64_t lane) {
    constexpr int64_t start[4] = {0, 16, 8, 24};
    return start[lane / 4] + vector * 4 + lane % 4;
}

// Stretch of a value row that is interleaved at once; `vector`: the first it fills of the row's.
struct Chunk {
    int64_t offset, bytes, vector;
    bool wide() const { return bytes > 32; }
};

// How a value row is cut into chunks, and which element each lane of the result holds.
struct InterleavePlan {
    InterleavePlan(int64_t row_bytes, int64_t bits) {
        for (int64_t at = 0; at < row_bytes; at += 64) {
            Chunk chunk{at, std::min<int64_t>(64, row_bytes - at), vectors()};
            chunks.push_back(chunk);
            for (int64_t v = 0; v < (chunk.wide() ? 4 : 2); ++v)
                for (int64_t plane = 0; plane < 8 / bits; ++plane)
                    for (int64_t lane = 0; lane < 16; ++lane) {
                        int64_t byte = chunk.wide() ? wide_byte(v, lane) : narrow_byte(v, lane);
                        bool exists = byte < chunk.bytes;
                        element.push_back(exists ? plane * row_bytes + at + byte : -1);
                    }
        }
    }

    int64_t vectors() const { return static_cast<int64_t>(element.size()) / 16; }

    std::vector<Chunk> chunks;
    std::vector<int64_t> element;  // [vectors * 16]: element of the output row, or -1
};

// sums += codes (unsigned bytes) . weights (signed bytes). As assembly, because GCC 12 copies the
// accumulator around the intrinsic, which costs more than the instruction.
inline void add_dots(__m512i& sums, __m512i codes, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(weights));
}

// Field `plane` of every byte.
template <int Bits>
inline __m512i plane_codes(__m512i bytes, int plane) {
    if (Bits == 8) return bytes;
    return _mm512_and_si512(_mm512_srli_epi16(bytes, plane * Bits),
                            _mm512_set1_epi8((1 << Bits) - 1));
}

template <int Bits, int Count>
inline void store_planes(const __m512i* bytes, __m512i* to) {
#pragma GCC unroll 4
    for (int v = 0; v < Count; ++v)
#pragma GCC unroll 4
        for (int plane = 0; plane < 8 / Bits; ++plane)
            to[v * (8 / Bits) + plane] = plane_codes<Bits>(bytes[v], plane);
}

}  // namespace diffxkv

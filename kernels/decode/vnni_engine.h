// SPDX-License-Identifier: Apache-2.0
// AVX-512 VNNI engine for quantized tiers: both products run on integers, 64 multiplications to an
// instruction. Codes are the unsigned operand as they are stored; queries and weights become 16-bit
// integers (scaled by their own maximum), split into two signed bytes x = 256 * high + low. Sums
// are exact in 32 bits (256 codes of 255 times 32639 < 2^31), so the only error is that rounding:
// about 2e-5 in the LSE and 1e-4 of the norm of outputs that average out to almost nothing.
#pragma once

#include <vector>

#include "engine.h"
#include "rows.h"
#include "vnni_interleave.h"

namespace diffxkv {

constexpr int32_t kSplitMax = 127 * 256 + 127;

struct SplitBytes {
    int8_t high, low;
};

inline SplitBytes split_bytes(int32_t x) {
    int32_t high = (x + 128) >> 8;
    return {static_cast<int8_t>(high), static_cast<int8_t>(x - high * 256)};
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

class VnniEngine final : public Engine {
   public:
    VnniEngine(Tier tier, int64_t dim, int64_t group)
        : tier_(tier), dim_(dim), group_(group), key_bytes_(dim * tier.key_bits / 8),
          value_bytes_(dim * tier.value_bits / 8), softmax_(group), zero_(group), q_scale_(group),
          q_sum_(group), factor_(group), w_scale_(group), q_codes_(2 * group * dim),
          w_codes_(2 * group * kTile), scores_(group * kTile) {
        plan_values();
        keys_.resize((key_bytes_ + 63) / 64 * 16 * 2);
        values_.resize(kTile / 4 * vectors_);
        out_.resize(group * vectors_);
    }

    void begin(const float* q) override {
        std::fill(out_.begin(), out_.end(), _mm512_setzero_si512());
        const int64_t quads = dim_ / 4;
        for (int64_t g = 0; g < group_; ++g, q += dim_) {
            softmax_[g].reset();
            zero_[g] = 0.f;
            float top = absolute_max(q, dim_), inverse = top > 0.f ? kSplitMax / top : 0.f;
            int64_t sum = 0;
            for (int64_t d = 0; d < dim_; ++d) {
                int32_t x = static_cast<int32_t>(std::lrint(q[d] * inverse));
                SplitBytes s = split_bytes(x);
                int8_t* to = quad(q_codes_, quads, d / 4, g) + d % 4;
                to[0] = s.high, to[4] = s.low;
                sum += x;
            }
            q_scale_[g] = top / kSplitMax;
            q_sum_[g] = q_scale_[g] * static_cast<float>(sum);
        }
    }

    void process(Tile& tile) override {
        load_metas(tile);
        int64_t padded = align_up(tile.n, 32);
        for (int64_t t = tile.n; t < padded; ++t) {
            tile.key[t] = tile.key[0], tile.value[t] = tile.value[0];
            meta_[0][t] = meta_[1][t] = meta_[2][t] = meta_[3][t] = 0.f;
        }
        for (int64_t t = 0; t < padded; t += 32) {
            switch (tier_.key_bits) {
                case 2: score_block<2>(tile, t); break;
                case 4: score_block<4>(tile, t); break;
                default: score_block<8>(tile, t);
            }
        }
        for (int64_t g = 0; g < group_; ++g) weigh(g, tile.n, padded);
        switch (tier_.value_bits) {
            case 2: interleave<2>(tile); break;
            case 4: interleave<4>(tile); break;
            default: interleave<8>(tile);
        }
        in_blocks([&](auto width, int64_t g) { add_values<width>(g, (tile.n + 3) / 4); });
    }

    void finish(const Partial& partial) override {
        std::vector<float> row(dim_);
        for (int64_t g = 0; g < group_; ++g) {
            const float* out = reinterpret_cast<const float*>(&out_[g * vectors_]);
            for (size_t i = 0; i < element_.size(); ++i)
                if (element_[i] >= 0) row[element_[i]] = out[i] + zero_[g];
            merge_group(partial, g, dim_, softmax_[g], [&](int64_t d) { return row[d]; });
        }
    }

   private:
    // Split codes are kept as dwords [block of up to 4 heads][index][head][high, low], the order in
    // which the inner loops read them. Returns the high dword; the low one follows.
    int8_t* quad(std::vector<int8_t>& codes, int64_t count, int64_t index, int64_t g) const {
        int64_t first = g / 4 * 4, width = std::min<int64_t>(4, group_ - first);
        return codes.data() + 8 * (first * count + index * width + g - first);
    }

    template <int N>
    struct Width {
        constexpr operator int() const { return N; }
    };

    // Calls f(width, first head) for blocks of up to four query heads.
    template <class F>
    void in_blocks(F&& f) {
        for (int64_t g = 0; g < group_; g += 4) {
            switch (group_ - g) {
                case 1: f(Width<1>(), g); break;
                case 2: f(Width<2>(), g); break;
                case 3: f(Width<3>(), g); break;
                default: f(Width<4>(), g);
            }
        }
    }

    struct Chunk {
        int64_t offset, bytes;
        bool wide() const { return bytes > 32; }
    };

    // Cuts a value row into chunks and notes which element each lane of the output holds.
    void plan_values() {
        const int64_t planes = 8 / tier_.value_bits;
        for (int64_t at = 0; at < value_bytes_; at += 64) {
            Chunk chunk{at, std::min<int64_t>(64, value_bytes_ - at)};
            chunks_.push_back(chunk);
            for (int64_t v = 0; v < (chunk.wide() ? 4 : 2); ++v)
                for (int64_t plane = 0; plane < planes; ++plane)
                    for (int64_t lane = 0; lane < 16; ++lane) {
                        int64_t byte = chunk.wide() ? wide_byte(v, lane) : narrow_byte(v, lane);
                        bool exists = byte < chunk.bytes;
                        element_.push_back(exists ? plane * value_bytes_ + at + byte : -1);
                    }
        }
        vectors_ = static_cast<int64_t>(element_.size()) / 16;
    }

    void load_metas(const Tile& tile) {
        const __m512i split = _mm512_set_epi16(
            31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17, 13, 9, 5, 1,
            28, 24, 20, 16, 12, 8, 4, 0);
        int64_t t = 0;
        while (t < tile.n) {
            if (t + 8 <= tile.n && tile.meta[t + 7] - tile.meta[t] == 7 * kMetaBytes) {
                __m512i words = _mm512_permutexvar_epi16(split, _mm512_loadu_si512(tile.meta[t]));
                __m512 keys = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
                __m512 values = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
                _mm256_storeu_ps(meta_[0] + t, _mm512_castps512_ps256(keys));
                _mm256_storeu_ps(meta_[1] + t, _mm512_extractf32x8_ps(keys, 1));
                _mm256_storeu_ps(meta_[2] + t, _mm512_castps512_ps256(values));
                _mm256_storeu_ps(meta_[3] + t, _mm512_extractf32x8_ps(values, 1));
                t += 8;
                continue;
            }
            Meta m = load_meta(tile.meta[t]);
            meta_[0][t] = m.key_scale, meta_[1][t] = m.key_zero;
            meta_[2][t] = m.value_scale, meta_[3][t] = m.value_zero;
            ++t;
        }
    }

    template <int Bits>
    void score_block(const Tile& tile, int64_t t) {
        for (int64_t at = 0; at < key_bytes_; at += 64) {
            int64_t dwords = std::min<int64_t>(16, (key_bytes_ - at) / 4);
            __mmask16 mask = static_cast<__mmask16>((1u << dwords) - 1);
            __m512i* out = keys_.data() + at / 2;
            transpose_dwords(tile.key + t, at, mask, out, 2);
            transpose_dwords(tile.key + t + 16, at, mask, out + 1, 2);
        }
        in_blocks([&](auto width, int64_t g) { dot_block<Bits, width>(g, t); });
    }

    // Scores of 32 tokens (in lanes) for heads g .. g + W - 1.
    template <int Bits, int W>
    void dot_block(int64_t g, int64_t t) {
        constexpr int planes = 8 / Bits;
        const int64_t dwords = key_bytes_ / 4;
        __m512i high[W][2], low[W][2];
        for (int i = 0; i < W; ++i)
            high[i][0] = high[i][1] = low[i][0] = low[i][1] = _mm512_setzero_si512();
        for (int plane = 0; plane < planes; ++plane) {
            const int32_t* q = reinterpret_cast<const int32_t*>(
                quad(q_codes_, dim_ / 4, plane * dwords, g));
            for (int64_t c = 0; c < dwords; ++c, q += 2 * W) {
                __m512i first = plane_codes<Bits>(keys_[2 * c], plane);
                __m512i second = plane_codes<Bits>(keys_[2 * c + 1], plane);
                for (int i = 0; i < W; ++i) {
                    __m512i qh = _mm512_set1_epi32(q[2 * i]), ql = _mm512_set1_epi32(q[2 * i + 1]);
                    high[i][0] = _mm512_dpbusd_epi32(high[i][0], first, qh);
                    high[i][1] = _mm512_dpbusd_epi32(high[i][1], second, qh);
                    low[i][0] = _mm512_dpbusd_epi32(low[i][0], first, ql);
                    low[i][1] = _mm512_dpbusd_epi32(low[i][1], second, ql);
                }
            }
        }
        for (int i = 0; i < W; ++i)
            for (int half = 0; half < 2; ++half) {
                int64_t at = t + 16 * half;
                __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high[i][half], 8), low[i][half]);
                __m512 scaled =
                    _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(q_scale_[g + i]));
                __m512 zero = _mm512_mul_ps(_mm512_loadu_ps(meta_[1] + at),
                                            _mm512_set1_ps(q_sum_[g + i]));
                _mm512_storeu_ps(scores_.data() + (g + i) * kTile + at,
                                 _mm512_fmadd_ps(_mm512_loadu_ps(meta_[0] + at), scaled, zero));
            }
    }

    // Scores of head g to split weights, value_scale included; the zeros collect in one scalar.
    void weigh(int64_t g, int64_t n, int64_t padded) {
        float* w = scores_.data() + g * kTile;
        for (int64_t t = n; t < padded; ++t) w[t] = kMinusInf;
        factor_[g] = softmax_[g].absorb(w, padded);
        float zero = 0.f;
#pragma omp simd reduction(+ : zero)
        for (int64_t t = 0; t < padded; ++t) {
            zero += w[t] * meta_[3][t];
            w[t] *= meta_[2][t];
        }
        zero_[g] = zero_[g] * factor_[g] + zero;
        float top = absolute_max(w, padded);
        w_scale_[g] = top / kSplitMax;
        const __m512 inverse = _mm512_set1_ps(top > 0.f ? kSplitMax / top : 0.f);
        for (int64_t t = 0; t < padded; t += 16) {
            __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + t), inverse));
            __m512i h = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
            alignas(16) int32_t high[4], low[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(h));
            _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(x));
            for (int64_t i = 0; i < 4; ++i) {
                int32_t pair[2] = {high[i], low[i]};
                __builtin_memcpy(quad(w_codes_, kTile / 4, t / 4 + i, g), pair, sizeof pair);
            }
        }
    }

    // Value rows of the tile to values_ [n / 4][vectors_].
    template <int Bits>
    void interleave(const Tile& tile) {
        for (int64_t t = 0; t < tile.n; t += 4) {
            __m512i* to = values_.data() + t / 4 * vectors_;
            for (const Chunk& chunk : chunks_) {
                const uint32_t mask = (1u << chunk.bytes / 4) - 1;
                __m512i bytes[4];
                if (chunk.wide())
                    interleave_wide(tile.value + t, chunk.offset, static_cast<__mmask16>(mask),
                                    bytes);
                else
                    interleave_narrow(tile.value + t, chunk.offset, static_cast<__mmask8>(mask),
                                      bytes);
                for (int v = 0; v < (chunk.wide() ? 4 : 2); ++v)
                    for (int plane = 0; plane < 8 / Bits; ++plane)
                        *to++ = plane_codes<Bits>(bytes[v], plane);
            }
        }
    }

    // out = out * factor + weights . values for heads g .. g + W - 1, two vectors at a time.
    template <int W>
    void add_values(int64_t g, int64_t quads) {
        const int32_t* w0 =
            reinterpret_cast<const int32_t*>(quad(w_codes_, kTile / 4, 0, g));
        for (int64_t v = 0; v < vectors_; v += 2) {
            __m512i high[W][2], low[W][2];
            for (int i = 0; i < W; ++i)
                high[i][0] = high[i][1] = low[i][0] = low[i][1] = _mm512_setzero_si512();
            const int32_t* w = w0;
            for (int64_t t = 0; t < quads; ++t, w += 2 * W) {
                __m512i first = values_[t * vectors_ + v], second = values_[t * vectors_ + v + 1];
                for (int i = 0; i < W; ++i) {
                    __m512i wh = _mm512_set1_epi32(w[2 * i]), wl = _mm512_set1_epi32(w[2 * i + 1]);
                    high[i][0] = _mm512_dpbusd_epi32(high[i][0], first, wh);
                    high[i][1] = _mm512_dpbusd_epi32(high[i][1], second, wh);
                    low[i][0] = _mm512_dpbusd_epi32(low[i][0], first, wl);
                    low[i][1] = _mm512_dpbusd_epi32(low[i][1], second, wl);
                }
            }
            for (int i = 0; i < W; ++i)
                for (int j = 0; j < 2; ++j) {
                    __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high[i][j], 8), low[i][j]);
                    __m512 add = _mm512_mul_ps(_mm512_cvtepi32_ps(dot),
                                               _mm512_set1_ps(w_scale_[g + i]));
                    __m512i& out = out_[(g + i) * vectors_ + v + j];
                    out = _mm512_castps_si512(_mm512_fmadd_ps(
                        _mm512_castsi512_ps(out), _mm512_set1_ps(factor_[g + i]), add));
                }
        }
    }

    Tier tier_;
    int64_t dim_, group_, key_bytes_, value_bytes_, vectors_ = 0;
    std::vector<Chunk> chunks_;
    std::vector<int64_t> element_;  // [vectors_ * 16]: element of the output row, or -1
    std::vector<RunningSoftmax> softmax_;
    std::vector<float> zero_, q_scale_, q_sum_, factor_, w_scale_;
    std::vector<int8_t> q_codes_, w_codes_;
    std::vector<float> scores_;          // [group, kTile]
    std::vector<__m512i> keys_, values_, out_;
    float meta_[4][kTile];               // key scale, key zero, value scale, value zero
};

}  // namespace diffxkv

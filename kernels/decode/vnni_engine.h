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
#include "vnni_math.h"

namespace diffxkv {

class VnniEngine final : public Engine {
   public:
    VnniEngine(const Layout& layout, Tier tier, int64_t group, SoftCap cap)
        : tier_(tier), cap_(cap), dim_(layout.head_dim), group_(group),
          key_bytes_(layout.row_bytes(tier.key_bits)),
          value_bytes_(layout.row_bytes(tier.value_bits)),
          values_plan_(value_bytes_, tier.value_bits), vectors_(values_plan_.vectors()),
          softmax_(group), zero_(group), q_scale_(group), q_sum_(group), factor_(group),
          w_scale_(group), q_codes_(group * dim_ / 2), w_codes_(2 * group * kTile), scores_(group * kTile) {
        keys_.resize((key_bytes_ + 63) / 64 * 16 * 2);
        values_.resize(kTile / 4 * vectors_);
        out_.resize(group * vectors_);
    }

    void begin(const float* q) override {
        std::fill(out_.begin(), out_.end(), _mm512_setzero_si512());
        for (int64_t g = 0; g < group_; ++g, q += dim_) {
            softmax_[g].reset();
            zero_[g] = 0.f;
            float top = absolute_max(q, dim_), inverse = top > 0.f ? kSplitMax / top : 0.f;
            __m512i sum = _mm512_setzero_si512();
            for (int64_t d = 0; d < dim_; d += 16) {
                __m512i x = _mm512_cvtps_epi32(
                    _mm512_mul_ps(_mm512_loadu_ps(q + d), _mm512_set1_ps(inverse)));
                sum = _mm512_add_epi32(sum, x);
                alignas(16) int32_t high[4], low[4];
                split_bytes(x, high, low);
                for (int64_t i = 0; i < 4; ++i) {
                    int32_t* to = query(d / 4 + i, g);
                    to[0] = high[i], to[1] = low[i];
                }
            }
            q_scale_[g] = top / kSplitMax;
            q_sum_[g] = q_scale_[g] * static_cast<float>(_mm512_reduce_add_epi32(sum));
        }
    }

    void process(Tile& tile, const Tile& next) override {
        const int64_t padded = align_up(tile.n, 32);
        for (int64_t t = tile.n; t < padded; ++t)
            tile.key[t] = tile.key[0], tile.value[t] = tile.value[0], tile.meta[t] = tile.meta[0];
        load_metas(tile, padded);
        TileFetcher ahead(next, key_bytes_, value_bytes_);
        for (int64_t t = 0; t < padded; t += 32) {
            switch (tier_.key_bits) {
                case 2: score_block<2>(tile, t, ahead); break;
                case 4: score_block<4>(tile, t, ahead); break;
                default: score_block<8>(tile, t, ahead);
            }
        }
        for (int64_t g = 0; g < group_; ++g) {
            ahead.fetch(8);
            weigh(g, tile.n, padded);
        }
        for (const Chunk& chunk : values_plan_.chunks) {
            switch (tier_.value_bits) {
                case 2: interleave<2>(tile, chunk, ahead); break;
                case 4: interleave<4>(tile, chunk, ahead); break;
                default: interleave<8>(tile, chunk, ahead);
            }
        }
        in_blocks([&](auto width, int64_t g) { add_values<width>(g, (tile.n + 3) / 4, ahead); });
    }

    void finish(const Partial& partial) override {
        std::vector<float> row(dim_);
        for (int64_t g = 0; g < group_; ++g) {
            const float* out = reinterpret_cast<const float*>(&out_[g * vectors_]);
            for (size_t i = 0; i < values_plan_.element.size(); ++i)
                if (values_plan_.element[i] >= 0) row[values_plan_.element[i]] = out[i] + zero_[g];
            merge_group(partial, g, dim_, softmax_[g], [&](int64_t d) { return row[d]; });
        }
    }

   private:
    // Four elements of a split query: their high bytes, then their low bytes. They lie
    // [block of up to 4 heads][index][head][high, low], the order in which dot_block reads them.
    int32_t* query(int64_t index, int64_t g) {
        int64_t first = g / 4 * 4, width = std::min<int64_t>(4, group_ - first);
        return q_codes_.data() + 2 * (first * dim_ / 4 + index * width + g - first);
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

    // Meta rows of tokens [0, padded) to meta_; those past tile.n become zero.
    void load_metas(const Tile& tile, int64_t padded) {
        const __m512i split = _mm512_set_epi16(
            31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17, 13, 9, 5, 1,
            28, 24, 20, 16, 12, 8, 4, 0);
        for (int64_t t = 0; t < padded; t += 8) {
            const int64_t left = tile.n - t;
            const __mmask8 mask = left >= 8 ? 0xff : left <= 0 ? 0 : (1 << left) - 1;
            __m512i rows = _mm512_mask_i64gather_epi64(
                _mm512_setzero_si512(), mask, _mm512_loadu_si512(tile.meta + t), nullptr, 1);
            rows = _mm512_permutexvar_epi16(split, rows);
            __m512 keys = _mm512_cvtph_ps(_mm512_castsi512_si256(rows));
            __m512 values = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(rows, 1));
            _mm256_storeu_ps(meta_[0] + t, _mm512_castps512_ps256(keys));
            _mm256_storeu_ps(meta_[1] + t, _mm512_extractf32x8_ps(keys, 1));
            _mm256_storeu_ps(meta_[2] + t, _mm512_castps512_ps256(values));
            _mm256_storeu_ps(meta_[3] + t, _mm512_extractf32x8_ps(values, 1));
        }
    }

    template <int Bits>
    void score_block(const Tile& tile, int64_t t, TileFetcher& ahead) {
        for (int64_t at = 0; at < key_bytes_; at += 64) {
            int64_t dwords = std::min<int64_t>(16, (key_bytes_ - at) / 4);
            __mmask16 mask = static_cast<__mmask16>((1u << dwords) - 1);
            __m512i* out = keys_.data() + at / 2;
            ahead.fetch(8);
            transpose_dwords(tile.key + t, at, mask, out, 2);
            ahead.fetch(8);
            transpose_dwords(tile.key + t + 16, at, mask, out + 1, 2);
        }
        in_blocks([&](auto width, int64_t g) {
            ahead.fetch(8);
            dot_block<Bits, width>(g, t);
        });
    }

    // Scores of 32 tokens (in lanes) for heads g .. g + W - 1.
    template <int Bits, int W>
    void dot_block(int64_t g, int64_t t) {
        constexpr int planes = 8 / Bits;
        const int64_t dwords = key_bytes_ / 4;
        __m512i high[W][2], low[W][2];
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i)
            high[i][0] = high[i][1] = low[i][0] = low[i][1] = _mm512_setzero_si512();
        for (int plane = 0; plane < planes; ++plane) {
            const int32_t* q = query(plane * dwords, g);
            for (int64_t c = 0; c < dwords; ++c, q += 2 * W) {
                __m512i first = plane_codes<Bits>(keys_[2 * c], plane);
                __m512i second = plane_codes<Bits>(keys_[2 * c + 1], plane);
#pragma GCC unroll 4
                for (int i = 0; i < W; ++i) {
                    __m512i qh = _mm512_set1_epi32(q[2 * i]), ql = _mm512_set1_epi32(q[2 * i + 1]);
                    add_dots(high[i][0], first, qh);
                    add_dots(high[i][1], second, qh);
                    add_dots(low[i][0], first, ql);
                    add_dots(low[i][1], second, ql);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i)
#pragma GCC unroll 2
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
        cap_.apply(w, n);
        for (int64_t t = n; t < padded; ++t) w[t] = kPadding;
        __m512 most = _mm512_set1_ps(softmax_[g].max);
        for (int64_t t = 0; t < padded; t += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(w + t));
        const float top = _mm512_reduce_max_ps(most);
        __m512 sum = _mm512_setzero_ps(), zero = sum, largest = sum;
        for (int64_t t = 0; t < padded; t += 16) {
            __m512 p = exp2_lanes(_mm512_sub_ps(_mm512_loadu_ps(w + t), _mm512_set1_ps(top)));
            __m512 scaled = _mm512_mul_ps(p, _mm512_loadu_ps(meta_[2] + t));
            sum = _mm512_add_ps(sum, p);
            zero = _mm512_fmadd_ps(p, _mm512_loadu_ps(meta_[3] + t), zero);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(scaled));
            _mm512_storeu_ps(w + t, scaled);
        }
        const float factor = std::exp2(softmax_[g].max - top);
        softmax_[g] = {top, softmax_[g].sum * factor + _mm512_reduce_add_ps(sum)};
        zero_[g] = zero_[g] * factor + _mm512_reduce_add_ps(zero);
        factor_[g] = factor;
        split_weights(g, padded, _mm512_reduce_max_ps(largest));
    }

    void split_weights(int64_t g, int64_t padded, float largest) {
        const float* w = scores_.data() + g * kTile;
        int8_t* to = w_codes_.data() + 2 * g * kTile;
        const __m512 inverse = _mm512_set1_ps(largest > 0.f ? kSplitMax / largest : 0.f);
        w_scale_[g] = largest / kSplitMax;
        for (int64_t t = 0; t < padded; t += 16) {
            __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + t), inverse));
            split_bytes(x, to + t, to + kTile + t);
        }
    }

    // One chunk of the tile's value rows to its vectors of values_ [n / 4][vectors_].
    template <int Bits>
    void interleave(const Tile& tile, const Chunk& chunk, TileFetcher& ahead) {
        const uint32_t mask = (1u << chunk.bytes / 4) - 1;
        __m512i* to = values_.data() + chunk.vector;
        for (int64_t t = 0; t < tile.n; t += 4, to += vectors_) {
            ahead.fetch(2);
            __m512i bytes[4];
            if (chunk.wide()) {
                interleave_wide(tile.value + t, chunk.offset, static_cast<__mmask16>(mask), bytes);
                store_planes<Bits, 4>(bytes, to);
            } else {
                interleave_narrow(tile.value + t, chunk.offset, static_cast<__mmask8>(mask), bytes);
                store_planes<Bits, 2>(bytes, to);
            }
        }
    }

    // out = out * factor + weights . values for heads g .. g + W - 1, two vectors at a time.
    template <int W>
    void add_values(int64_t g, int64_t quads, TileFetcher& ahead) {
        const auto* w = reinterpret_cast<const int32_t*>(w_codes_.data() + 2 * g * kTile);
        for (int64_t v = 0; v < vectors_; v += 2) {
            ahead.fetch(16);
            __m512i high[W][2], low[W][2];
            for (int i = 0; i < W; ++i)
                high[i][0] = high[i][1] = low[i][0] = low[i][1] = _mm512_setzero_si512();
            for (int64_t t = 0; t < quads; ++t) {
                __m512i first = values_[t * vectors_ + v], second = values_[t * vectors_ + v + 1];
                for (int i = 0; i < W; ++i) {
                    __m512i wh = _mm512_set1_epi32(w[i * kTile / 2 + t]);
                    __m512i wl = _mm512_set1_epi32(w[i * kTile / 2 + kTile / 4 + t]);
                    add_dots(high[i][0], first, wh);
                    add_dots(high[i][1], second, wh);
                    add_dots(low[i][0], first, wl);
                    add_dots(low[i][1], second, wl);
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
    SoftCap cap_;
    int64_t dim_, group_, key_bytes_, value_bytes_;
    InterleavePlan values_plan_;
    int64_t vectors_;
    std::vector<RunningSoftmax> softmax_;
    std::vector<float> zero_, q_scale_, q_sum_, factor_, w_scale_;
    std::vector<int32_t> q_codes_;
    std::vector<int8_t> w_codes_;  // [group][high, low][kTile]
    std::vector<float> scores_;          // [group, kTile]
    std::vector<__m512i> keys_, values_, out_;
    float meta_[4][kTile];               // key scale, key zero, value scale, value zero
};

}  // namespace diffxkv

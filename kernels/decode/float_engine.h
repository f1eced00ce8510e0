// SPDX-License-Identifier: Apache-2.0
// Portable engine for every format: rows become floats, the compiler vectorises the rest.
#pragma once

#include <vector>

#include "dots.h"
#include "engine.h"
#include "rows.h"

namespace diffxkv {

// Dim: head_dim at compile time, or 0 for any.
template <int Dim>
class FloatEngine final : public Engine {
   public:
    FloatEngine(const Layout& layout, Tier tier, DType raw, int64_t group, SoftCap cap)
        : tier_(tier), raw_(raw), cap_(cap), dim_(layout.head_dim), group_(group),
          key_bytes_(layout.row_bytes(tier.key_bits)),
          value_bytes_(layout.row_bytes(tier.value_bits)), softmax_(group), zero_(group),
          q_sum_(group), scores_(group * kTile), rows_(kRows * dim_), out_(group * dim_) {}

    void begin(const float* q) override {
        q_ = q;
        for (int64_t g = 0; g < group_; ++g) {
            softmax_[g].reset();
            zero_[g] = q_sum_[g] = 0.f;
            for (int64_t d = 0; d < dim(); ++d) q_sum_[g] += q[g * dim() + d];
        }
        std::fill(out_.begin(), out_.end(), 0.f);
    }

    void process(Tile& tile, const Tile& next) override {
        TileFetcher ahead(next, key_bytes_, value_bytes_);
        for (int64_t t = 0; t < tile.n; ++t) {
            ahead.fetch(1);
            meta_[t] = tier_.raw() ? kRawMeta : load_meta(tile.meta[t]);
            score_token(tile.key[t], t);
        }
        for (int64_t g = 0; g < group_; ++g) weigh(g, tile.n);
        for (int64_t t = 0; t < tile.n; t += kRows) {
            ahead.fetch(kRows);
            add_values(tile, t);
        }
    }

    void finish(const Partial& partial) override {
        for (int64_t g = 0; g < group_; ++g)
            merge_group(partial, g, dim(), softmax_[g],
                        [&](int64_t d) { return out_[g * dim() + d] + zero_[g]; });
    }

   private:
    static constexpr int64_t kRows = 4;  // value rows per pass over the output

    int64_t dim() const { return Dim ? Dim : dim_; }

    // Scores of one token: key_scale * (q . codes) + key_zero * sum(q).
    void score_token(const uint8_t* key, int64_t t) {
        float* row = rows_.data();
        row_to_float(key, tier_.key_bits, raw_, dim(), row);
        dots<Dim>(row, q_, group_, dim_, scores_.data() + t, kTile);
        const Meta& m = meta_[t];
        for (int64_t g = 0; g < group_; ++g) {
            float& score = scores_[g * kTile + t];
            score = m.key_scale * score + m.key_zero * q_sum_[g];
        }
    }

    // Scores of head g to weights times value_scale; the zeros collect in one scalar.
    void weigh(int64_t g, int64_t n) {
        float* scores = scores_.data() + g * kTile;
        cap_.apply(scores, n);
        float factor = softmax_[g].absorb(scores, n);
        float zero = 0.f;
        for (int64_t t = 0; t < n; ++t) {
            zero += scores[t] * meta_[t].value_zero;
            scores[t] *= meta_[t].value_scale;
        }
        zero_[g] = zero_[g] * factor + zero;
        float* out = out_.data() + g * dim();
#pragma omp simd
        for (int64_t d = 0; d < dim(); ++d) out[d] *= factor;
    }

    // Adds up to kRows value rows, starting with token t.
    void add_values(const Tile& tile, int64_t t) {
        int64_t count = std::min(kRows, tile.n - t);
        float* v = rows_.data();
        for (int64_t i = 0; i < count; ++i)
            row_to_float(tile.value[t + i], tier_.value_bits, raw_, dim(), v + i * dim());
        for (int64_t g = 0; g < group_; ++g) {
            const float* w = scores_.data() + g * kTile + t;
            float* out = out_.data() + g * dim();
            if (count == kRows) {
#pragma omp simd
                for (int64_t d = 0; d < dim(); ++d)
                    out[d] += w[0] * v[d] + w[1] * v[dim() + d] + w[2] * v[2 * dim() + d] +
                              w[3] * v[3 * dim() + d];
                continue;
            }
            for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
                for (int64_t d = 0; d < dim(); ++d) out[d] += w[i] * v[i * dim() + d];
            }
        }
    }

    Tier tier_;
    DType raw_;
    SoftCap cap_;
    int64_t dim_, group_, key_bytes_, value_bytes_;
    const float* q_ = nullptr;
    std::vector<RunningSoftmax> softmax_;
    std::vector<float> zero_, q_sum_, scores_, rows_, out_;
    Meta meta_[kTile];
};

}  // namespace diffxkv

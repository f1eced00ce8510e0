// SPDX-License-Identifier: Apache-2.0
// Attention of one group of query heads over raw pages, whose rows lie at a fixed distance: no
// addresses to gather, and the scores stay with the caller, who may grade the tokens by them.
#pragma once

#include <vector>

#include "dots.h"
#include "engine.h"
#include "rows.h"

namespace diffxkv {

// Dim: head_dim at compile time, or 0 for any multiple of 16.
template <int Dim>
class OpenEngine {
   public:
    OpenEngine(DType raw, int64_t group, int64_t dim)
        : raw_(raw), group_(group), dim_(dim), softmax_(group), out_(group * dim),
          weights_(group * kPageTokens), rows_(raw == kFloat32 ? 0 : kPageTokens * dim) {}

    // Starts a new group; q: [G, D], already times sm_scale * log2(e).
    void begin(const float* q) {
        q_ = q;
        for (RunningSoftmax& s : softmax_) s.reset();
        std::fill(out_.begin(), out_.end(), 0.f);
    }

    // Attends to n of a page's tokens, `stride` bytes apart; scores: [G, 64], base 2, written up to
    // a multiple of four tokens.
    void attend(const uint8_t* key, const uint8_t* value, int64_t stride, int64_t n,
                float* scores) {
        Rows k = rows(key, stride, n);
        for (int64_t g = 0; g < group_; g += 2) {
            float* to = scores + g * kPageTokens;
            if (g + 1 < group_) {
                score<2>(k, n, q_ + g * dim(), to);
            } else {
                score<1>(k, n, q_ + g * dim(), to);
            }
        }
        Rows v = rows(value, stride, n);
        for (int64_t g = 0; g < group_; ++g) {
            float* w = weights_.data() + g * kPageTokens;
            std::copy(scores + g * kPageTokens, scores + g * kPageTokens + n, w);
            const float factor = softmax_[g].absorb(w, n);
            float* out = out_.data() + g * dim();
            int64_t d = 0;
            for (; d + 4 * kLanes <= dim(); d += 4 * kLanes) add<4>(v, n, w, factor, out, d);
            for (; d < dim(); d += kLanes) add<1>(v, n, w, factor, out, d);
        }
    }

    // Merges what was attended since begin() into `partial`.
    void finish(const Partial& partial) {
        for (int64_t g = 0; g < group_; ++g)
            merge_group(partial, g, dim(), softmax_[g],
                        [&](int64_t d) { return out_[g * dim() + d]; });
    }

   private:
    // Floats, `stride` of them from one row to the next.
    struct Rows {
        const float* first;
        int64_t stride;
        const float* operator[](int64_t t) const { return first + t * stride; }
    };

    int64_t dim() const { return Dim ? Dim : dim_; }

    Rows rows(const uint8_t* first, int64_t stride, int64_t n) {
        if (raw_ == kFloat32) return {reinterpret_cast<const float*>(first), stride / 4};
        for (int64_t t = 0; t < n; ++t)
            row_to_float(first + t * stride, 0, raw_, dim(), rows_.data() + t * dim());
        return {rows_.data(), dim()};
    }

    // Scores of W heads. Tokens past the last repeat it.
    template <int W>
    void score(Rows k, int64_t n, const float* q, float* to) const {
        for (int64_t t = 0; t < n; t += 4) {
            const int64_t left = n - 1 - t;
            const float* row[4];
            for (int i = 0; i < 4; ++i) row[i] = k[t + (left < i ? left : i)];
            Lanes sums[W][4] = {};
            for (int64_t d = 0; d < dim(); d += kLanes) {
                Lanes x[W];
                for (int w = 0; w < W; ++w) x[w] = load_lanes(q + w * dim() + d);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    Lanes y = load_lanes(row[i] + d);
                    for (int w = 0; w < W; ++w) sums[w][i] += x[w] * y;
                }
            }
            for (int w = 0; w < W; ++w) {
                Quad four = sum_lanes(sums[w][0], sums[w][1], sums[w][2], sums[w][3]);
                std::memcpy(to + w * kPageTokens + t, &four, sizeof four);
            }
        }
    }

    // out = out * factor + weights . values, N vectors from element d on.
    template <int N>
    static void add(Rows v, int64_t n, const float* w, float factor, float* out, int64_t d) {
        Lanes sums[N];
        for (int i = 0; i < N; ++i) sums[i] = load_lanes(out + d + i * kLanes) * factor;
        for (int64_t t = 0; t < n; ++t) {
            const float* row = v[t] + d;
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) sums[i] += w[t] * load_lanes(row + i * kLanes);
        }
        for (int i = 0; i < N; ++i) store_lanes(out + d + i * kLanes, sums[i]);
    }

    DType raw_;
    int64_t group_, dim_;
    const float* q_ = nullptr;
    std::vector<RunningSoftmax> softmax_;
    std::vector<float> out_, weights_, rows_;
};

}  // namespace diffxkv

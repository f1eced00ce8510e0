// SPDX-License-Identifier: Apache-2.0
// Attention of one group of query rows over raw pages, whose rows lie at a fixed distance: no
// addresses to gather, and the first query's scores go to the caller, who may grade tokens by them.
#pragma once

#include <vector>

#include "dots.h"
#include "engine.h"
#include "rows.h"

namespace diffxkv {

// Tokens [first, end) of a page; none if first >= end.
struct Span {
    int64_t first, end;
};

// Dim: head_dim at compile time, or 0 for any multiple of 16.
template <int Dim>
class OpenEngine {
   public:
    // group: query heads of the KV head; a group of rows has them for each of `queries` tokens.
    OpenEngine(DType raw, int64_t group, int64_t queries, int64_t dim, SoftCap cap)
        : raw_(raw), group_(group), queries_(queries), dim_(dim), cap_(cap),
          softmax_(group * queries), out_(group * queries * dim),
          weights_(group * queries * kPageTokens), rows_(raw == kFloat32 ? 0 : kPageTokens * dim) {}

    // Starts a new group of rows; q: [queries * G, D], already times scale * log2(e).
    void begin(const float* q) {
        q_ = q;
        for (RunningSoftmax& s : softmax_) s.reset();
        std::fill(out_.begin(), out_.end(), 0.f);
    }

    // Attends to a page's tokens, `stride` bytes apart. seen: what each query sees, neither end
    // before that of the query before; the last sees some. scores: [G, 64], to which those of the
    // first query are written, base 2; or null.
    void attend(const uint8_t* key, const uint8_t* value, int64_t stride, const Span* seen,
                float* scores) {
        const int64_t first = seen[0].first & -4, n = seen[queries_ - 1].end - first;
        const Rows k = rows(key + first * stride, stride, n);
        const int64_t count = queries_ * group_;
        for (int64_t r = 0; r < count; r += 2) {
            float* to = weights(r) + first;
            if (r + 1 < count) {
                score<2>(k, n, q_ + r * dim(), to);
            } else {
                score<1>(k, n, q_ + r * dim(), to);
            }
        }
        if (cap_.on())
            for (int64_t r = 0; r < count; ++r) cap_.apply(weights(r), first + n);
        if (scores) std::copy_n(weights(0), group_ * kPageTokens, scores);
        const Rows v = rows(value + first * stride, stride, n);
        for (int64_t i = 0; i < queries_; ++i) {
            const auto [begin, end] = seen[i];
            if (begin >= end) continue;
            for (int64_t r = i * group_; r < (i + 1) * group_; ++r)
                weigh(r, v.from(begin - first), end - begin, weights(r) + begin);
        }
    }

    // Merges what was attended since begin() into `partial`.
    void finish(const Partial& partial) {
        for (int64_t r = 0; r < queries_ * group_; ++r)
            merge_group(partial, r, dim(), softmax_[r],
                        [&](int64_t d) { return out_[r * dim() + d]; });
    }

   private:
    // Floats, `stride` of them from one row to the next.
    struct Rows {
        const float* first;
        int64_t stride;
        const float* operator[](int64_t t) const { return first + t * stride; }
        Rows from(int64_t t) const { return {first + t * stride, stride}; }
    };

    int64_t dim() const { return Dim ? Dim : dim_; }

    float* weights(int64_t r) { return weights_.data() + r * kPageTokens; }

    Rows rows(const uint8_t* first, int64_t stride, int64_t n) {
        if (raw_ == kFloat32) return {reinterpret_cast<const float*>(first), stride / 4};
        for (int64_t t = 0; t < n; ++t)
            row_to_float(first + t * stride, 0, raw_, dim(), rows_.data() + t * dim());
        return {rows_.data(), dim()};
    }

    // Scores of W rows. Tokens past the last repeat it.
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

    // Adds n tokens, whose scores are w, to what row r has attended.
    void weigh(int64_t r, Rows v, int64_t n, float* w) {
        const float factor = softmax_[r].absorb(w, n);
        float* out = out_.data() + r * dim();
        int64_t d = 0;
        for (; d + 4 * kLanes <= dim(); d += 4 * kLanes) add<4>(v, n, w, factor, out, d);
        for (; d < dim(); d += kLanes) add<1>(v, n, w, factor, out, d);
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
    int64_t group_, queries_, dim_;
    SoftCap cap_;
    const float* q_ = nullptr;
    std::vector<RunningSoftmax> softmax_;
    std::vector<float> out_, weights_, rows_;
};

}  // namespace diffxkv

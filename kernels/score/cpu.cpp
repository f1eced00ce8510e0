// SPDX-License-Identifier: Apache-2.0
// Attention that the tokens of open pages receive from sampled queries (see cpu.py).

#include <algorithm>
#include <atomic>
#include <vector>

#include "dots.h"
#include "exp2.h"
#include "payload.h"
#include "pool.h"
#include "rows.h"

namespace diffxkv {
namespace {

struct ScoreInput {
    const float* q;    // [S, Hq, D], times sm_scale * log2(e)
    const float* lse;  // [S, Hq], base 2
    const int32_t *q_indptr, *q_position;
    const uint8_t* key;  // [R, 64, H, D]
    int64_t batch, kv_heads, group, dim, page_bytes, row_bytes;
    DType dtype;
    const int32_t *indptr, *slots, *page_position;
};

constexpr int64_t kQueries = 8;  // queries whose rows stay in L1 together

// Scores of one page for one KV head.
template <int Dim>
class PageScorer {
   public:
    explicit PageScorer(const ScoreInput& in)
        : in_(in), row_(in.dim), q_(kQueries * in.group * in.dim),
          dots_(kQueries * in.group * kPageTokens), sums_(in.group * kPageTokens) {}

    // scores [64] = max over the group of the sums over `sequence`'s queries.
    void score(int64_t entry, int64_t sequence, int64_t head, float* scores) {
        std::fill(sums_.begin(), sums_.end(), 0.f);
        const uint8_t* key = in_.key + in_.slots[entry] * in_.page_bytes + head * in_.row_bytes;
        const int64_t start = static_cast<int64_t>(in_.page_position[entry]) * kPageTokens;
        const int64_t end = in_.q_indptr[sequence + 1];
        for (int64_t s = in_.q_indptr[sequence]; s < end; s += kQueries)
            add_queries(s, std::min(kQueries, end - s), head, key, start);
        std::copy(sums_.begin(), sums_.begin() + kPageTokens, scores);
        for (int64_t i = kPageTokens; i < in_.group * kPageTokens; ++i)
            scores[i % kPageTokens] = std::max(scores[i % kPageTokens], sums_[i]);
    }

   private:
    void add_queries(int64_t first, int64_t count, int64_t head, const uint8_t* key,
                     int64_t start) {
        const int64_t last = *std::max_element(in_.q_position + first, in_.q_position + first + count);
        const int64_t tokens = std::min(kPageTokens, last - start);  // those before some query
        if (tokens <= 0) return;
        const int64_t width = in_.group * in_.dim, heads = in_.kv_heads * in_.group;
        for (int64_t i = 0; i < count; ++i) {
            const float* q = in_.q + ((first + i) * heads + head * in_.group) * in_.dim;
            std::copy(q, q + width, q_.data() + i * width);
        }
        for (int64_t t = 0; t < tokens; ++t, key += in_.kv_heads * in_.row_bytes) {
            row_to_float(key, 0, in_.dtype, in_.dim, row_.data());
            dots<Dim>(row_.data(), q_.data(), count * in_.group, in_.dim, dots_.data() + t,
                      kPageTokens);
        }
        for (int64_t r = 0; r < count * in_.group; ++r) {
            const int64_t s = first + r / in_.group, g = r % in_.group;
            const int64_t seen = std::min(tokens, in_.q_position[s] - start);
            const float lse = in_.lse[s * heads + head * in_.group + g];
            const float* dot = dots_.data() + r * kPageTokens;
            float* sum = sums_.data() + g * kPageTokens;
#pragma omp simd
            for (int64_t t = 0; t < seen; ++t) sum[t] += fast_exp2(dot[t] - lse);
        }
    }

    const ScoreInput& in_;
    std::vector<float> row_, q_, dots_, sums_;
};

template <int Dim>
void run(const ScoreInput& in, float* accum, int64_t accum_stride, int64_t threads) {
    const int64_t entries = in.indptr[in.batch];
    std::vector<int64_t> sequence(entries);
    for (int64_t b = 0; b < in.batch; ++b)
        std::fill(sequence.begin() + in.indptr[b], sequence.begin() + in.indptr[b + 1], b);
    std::vector<float> scores(entries * in.kv_heads * kPageTokens);
    const int64_t count = entries * in.kv_heads;
    std::atomic<int64_t> next{0}, next_head{0};
    Pool::instance().run(threads, [&] {
        PageScorer<Dim> scorer(in);
        for (int64_t i; (i = next.fetch_add(1)) < count;)
            scorer.score(i / in.kv_heads, sequence[i / in.kv_heads], i % in.kv_heads,
                         scores.data() + i * kPageTokens);
    });
    // Sequences may share a slot: one thread owns a head, so adds cannot race and their order is
    // always the same.
    Pool::instance().run(threads, [&] {
        for (int64_t h; (h = next_head.fetch_add(1)) < in.kv_heads;)
            for (int64_t e = 0; e < entries; ++e) {
                const float* from = scores.data() + (e * in.kv_heads + h) * kPageTokens;
                float* to = accum + in.slots[e] * accum_stride + h * kPageTokens;
                for (int64_t t = 0; t < kPageTokens; ++t) to[t] += from[t];
            }
    });
}

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// key: raw pages of `dtype`, page_stride elements from one slot to the next; accum: fp32
// [R, H, 64], accum_stride elements from one slot to the next.
extern "C" void diffxkv_score_open(const float* q, const float* lse, const int32_t* q_indptr,
                                   const int32_t* q_position, int64_t batch, int64_t group,
                                   int64_t kv_heads, int64_t dim, const uint8_t* key,
                                   int64_t page_stride, int64_t dtype, const int32_t* indptr,
                                   const int32_t* slots, const int32_t* page_position, float* accum,
                                   int64_t accum_stride, int64_t threads) {
    const int64_t itemsize = dtype == kFloat32 ? 4 : 2;
    ScoreInput in{q, lse, q_indptr, q_position, key, batch, kv_heads, group, dim,
                  page_stride * itemsize, dim * itemsize, static_cast<DType>(dtype), indptr, slots,
                  page_position};
    with_dim(dim, [&](auto known) { run<known>(in, accum, accum_stride, threads); });
}

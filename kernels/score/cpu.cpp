// SPDX-License-Identifier: Apache-2.0
// Attention that the tokens of open pages receive from sampled queries (see cpu.py). Lanes of a
// vector are tokens, so that sums over queries and maxima over heads need no lane to meet another.

#include <algorithm>
#include <atomic>
#include <vector>

#include "exp2.h"
#include "payload.h"
#include "pool.h"
#include "product.h"
#include "rows.h"

namespace diffxkv {
namespace {

struct ScoreInput {
    const uint8_t* q;  // [S, Hq, D] of q_dtype
    DType q_dtype;
    float scale;       // of scores, to base 2
    const float* lse;  // [S, Hq], base 2
    const int32_t *q_indptr, *q_position;
    const uint8_t* key;  // [R, 64, H, D]
    int64_t batch, kv_heads, group, dim, page_bytes;
    DType dtype;
    const int32_t *indptr, *slots, *page_position;
};

// One open page and KV head of a sequence.
struct Item {
    int64_t sequence, head, entry;
};

constexpr int kWide = 2;  // vectors of a block of tokens: it stays in L1 while all queries pass
constexpr int64_t kBlock = kWide * kLanes;

int64_t itemsize(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

class PageScorer {
   public:
    explicit PageScorer(const ScoreInput& in)
        : in_(in), row_(kLanes * in.dim), keys_(in.dim * kBlock), scores_(kStrip * kBlock),
          sums_(in.group * kBlock) {}

    // scores [64] = max over the group of the sums over the sequence's queries.
    void score(const Item& item, float* scores) {
        if (item.sequence != sequence_ || item.head != head_) load_queries(item);
        const int64_t start = in_.page_position[item.entry] * kPageTokens;
        for (int64_t t = 0; t < kPageTokens; t += kBlock) {
            load_keys(item, t);
            score_block(start + t, scores + t);
        }
    }

   private:
    // Row r is query r / group and head r % group of the KV head's.
    void load_queries(const Item& item) {
        sequence_ = item.sequence, head_ = item.head;
        const int64_t first = in_.q_indptr[sequence_];
        rows_ = (in_.q_indptr[sequence_ + 1] - first) * in_.group;
        q_.resize((rows_ + kStrip - 1) * in_.dim);  // a strip may read beyond the last row
        lse_.resize(rows_), position_.resize(rows_);
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t s = first + r / in_.group;
            const int64_t at = (s * in_.kv_heads + head_) * in_.group + r % in_.group;
            float* q = q_.data() + r * in_.dim;
            row_to_float(in_.q + at * in_.dim * itemsize(in_.q_dtype), 0, in_.q_dtype, in_.dim, q);
            for (int64_t d = 0; d < in_.dim; ++d) q[d] *= in_.scale;
            lse_[r] = in_.lse[at], position_[r] = in_.q_position[s];
        }
    }

    // keys [D, kBlock], of tokens t ... of the page.
    void load_keys(const Item& item, int64_t t) {
        const int64_t row_bytes = in_.dim * itemsize(in_.dtype);
        const uint8_t* key = in_.key + in_.slots[item.entry] * in_.page_bytes +
                             (t * in_.kv_heads + head_) * row_bytes;
        for (float* to = keys_.data(); to < keys_.data() + kBlock; to += kLanes) {
            for (int i = 0; i < kLanes; ++i, key += in_.kv_heads * row_bytes)
                row_to_float(key, 0, in_.dtype, in_.dim, row_.data() + i * in_.dim);
            for (int64_t d = 0; d < in_.dim; d += kLanes) {
                Lanes square[kLanes];
                for (int i = 0; i < kLanes; ++i)
                    square[i] = load_lanes(row_.data() + i * in_.dim + d);
                transpose(square);
                for (int i = 0; i < kLanes; ++i) store_lanes(to + (d + i) * kBlock, square[i]);
            }
        }
    }

    // scores [kBlock], of tokens at positions `start` ...
    void score_block(int64_t start, float* scores) {
        std::fill_n(sums_.data(), in_.group * kBlock, 0.f);
        for (int64_t r = 0; r < rows_; r += kStrip) {
            const int64_t end = std::min(r + kStrip, rows_);
            if (*std::max_element(&position_[r], position_.data() + end) <= start) continue;
            multiply_strip<kWide, false, kWide>({&q_[r * in_.dim], in_.dim, 1}, keys_.data(),
                                                in_.dim, nullptr, scores_.data());
            for (int64_t i = r; i < end; ++i) add_row(i, position_[i] - start, i - r);
        }
        std::copy_n(sums_.data(), kBlock, scores);
        for (int64_t i = kBlock; i < in_.group * kBlock; ++i)
            scores[i % kBlock] = std::max(scores[i % kBlock], sums_.data()[i]);
    }

    // Adds what row r gives to the first `seen` tokens; the others may hold anything.
    void add_row(int64_t r, int64_t seen, int64_t strip_row) {
        const float* score = scores_.data() + strip_row * kBlock;
        float* sum = sums_.data() + r % in_.group * kBlock;
        for (int64_t t = 0; t < kBlock; t += kLanes) {
            const Lanes weight = fast_exp2(load_lanes(score + t) - lse_[r]);
            const Lanes limit = broadcast(static_cast<float>(seen - t));
            store_lanes(sum + t, load_lanes(sum + t) + (lane_ < limit ? weight : Lanes{}));
        }
    }

    static Lanes count_lanes() {
        Lanes x;
        for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
        return x;
    }

    const ScoreInput& in_;
    const Lanes lane_ = count_lanes();
    int64_t sequence_ = -1, head_ = -1, rows_ = 0;  // of the queries in q_
    std::vector<float> q_, lse_;
    std::vector<int64_t> position_;
    Floats row_, keys_, scores_, sums_;
};

// Pages of one sequence and head follow each other: they meet the same queries.
std::vector<Item> list_items(const ScoreInput& in) {
    std::vector<Item> items;
    for (int64_t b = 0; b < in.batch; ++b)
        for (int64_t h = 0; in.q_indptr[b] < in.q_indptr[b + 1] && h < in.kv_heads; ++h)
            for (int64_t e = in.indptr[b]; e < in.indptr[b + 1]; ++e) items.push_back({b, h, e});
    return items;
}

void run(const ScoreInput& in, float* accum, int64_t accum_stride, int64_t threads) {
    const std::vector<Item> items = list_items(in);
    const int64_t count = items.size();
    std::vector<float> scores(count * kPageTokens);
    std::atomic<int64_t> next{0}, next_head{0};
    Pool::instance().run(threads, [&] {
        PageScorer scorer(in);
        for (int64_t i; (i = next.fetch_add(1)) < count;)
            scorer.score(items[i], &scores[i * kPageTokens]);
    });
    // Sequences may share a slot: one thread owns a head, so adds cannot race and their order is
    // always the same.
    Pool::instance().run(threads, [&] {
        for (int64_t h; (h = next_head.fetch_add(1)) < in.kv_heads;)
            for (int64_t i = 0; i < count; ++i) {
                if (items[i].head != h) continue;
                float* to = accum + in.slots[items[i].entry] * accum_stride + h * kPageTokens;
                for (int64_t t = 0; t < kPageTokens; ++t) to[t] += scores[i * kPageTokens + t];
            }
    });
}

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// q: of `q_dtype`, scale: of scores, to base 2; key: raw pages of `dtype`, page_stride elements from
// one slot to the next; accum: fp32 [R, H, 64], accum_stride elements from one slot to the next.
extern "C" void diffxkv_score_open(const uint8_t* q, int64_t q_dtype, double scale,
                                   const float* lse, const int32_t* q_indptr,
                                   const int32_t* q_position, int64_t batch, int64_t group,
                                   int64_t kv_heads, int64_t dim, const uint8_t* key,
                                   int64_t page_stride, int64_t dtype, const int32_t* indptr,
                                   const int32_t* slots, const int32_t* page_position, float* accum,
                                   int64_t accum_stride, int64_t threads) {
    const DType raw = static_cast<DType>(dtype);
    const ScoreInput in{q, static_cast<DType>(q_dtype), static_cast<float>(scale), lse, q_indptr,
                        q_position, key, batch, kv_heads, group, dim, page_stride * itemsize(raw),
                        raw, indptr, slots, page_position};
    run(in, accum, accum_stride, threads);
}

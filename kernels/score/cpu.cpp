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
#include "softcap.h"

namespace diffxkv {
namespace {

// cpu.py passes words of 64 bits.
struct Queries {
    const uint8_t* q;  // [S, Hq, D]
    DType dtype;
    const float* lse;                // [S, Hq], base 2
    const int32_t *indptr, *position;  // [B + 1], [S]
    int64_t batch, group;
};

struct OpenPages {
    const uint8_t* keys;  // [R, 64, H, D]
    DType dtype;
    int64_t stride;  // of slots, in elements
    int64_t kv_heads, dim;
    const int32_t *indptr, *slots, *position;
};

// One open page and KV head of a sequence.
struct Tile {
    int64_t sequence, head, entry;
};

constexpr int kWide = 2;  // vectors of a block of tokens: it stays in L1 while all queries pass
constexpr int64_t kBlock = kWide * kLanes;

int64_t itemsize(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

class PageScorer {
   public:
    PageScorer(const Queries& queries, const OpenPages& pages, float scale, SoftCap cap)
        : queries_(queries), pages_(pages), dim_(pages.dim), group_(queries.group), scale_(scale),
          cap_(cap), row_(kLanes * dim_), keys_(dim_ * kBlock), scores_(kStrip * kBlock),
          sums_(group_ * kBlock) {}

    // scores [64] = max over the group of the sums over the sequence's queries.
    void score(const Tile& tile, float* scores) {
        if (tile.sequence != sequence_ || tile.head != head_) load_queries(tile);
        const int64_t start = pages_.position[tile.entry] * kPageTokens;
        for (int64_t t = 0; t < kPageTokens; t += kBlock) {
            load_keys(tile, t);
            score_block(start + t, scores + t);
        }
    }

   private:
    // Row r is query r / group and head r % group of the KV head's.
    void load_queries(const Tile& tile) {
        sequence_ = tile.sequence, head_ = tile.head;
        const int64_t first = queries_.indptr[sequence_];
        rows_ = (queries_.indptr[sequence_ + 1] - first) * group_;
        q_.resize((rows_ + kStrip - 1) * dim_);  // a strip may read beyond the last row
        lse_.resize(rows_), position_.resize(rows_);
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t s = first + r / group_;
            const int64_t at = (s * pages_.kv_heads + head_) * group_ + r % group_;
            float* q = q_.data() + r * dim_;
            const uint8_t* source = queries_.q + at * dim_ * itemsize(queries_.dtype);
            row_to_float(source, 0, queries_.dtype, dim_, q);
            for (int64_t d = 0; d < dim_; ++d) q[d] *= scale_;
            lse_[r] = queries_.lse[at], position_[r] = queries_.position[s];
        }
    }

    // keys [D, kBlock], of tokens t ... of the page.
    void load_keys(const Tile& tile, int64_t t) {
        const int64_t row_bytes = dim_ * itemsize(pages_.dtype);
        const int64_t page = pages_.slots[tile.entry] * pages_.stride * itemsize(pages_.dtype);
        const uint8_t* key = pages_.keys + page + (t * pages_.kv_heads + head_) * row_bytes;
        for (float* to = keys_.data(); to < keys_.data() + kBlock; to += kLanes) {
            for (int i = 0; i < kLanes; ++i, key += pages_.kv_heads * row_bytes)
                row_to_float(key, 0, pages_.dtype, dim_, row_.data() + i * dim_);
            for (int64_t d = 0; d < dim_; d += kLanes) {
                Lanes square[kLanes];
                for (int i = 0; i < kLanes; ++i)
                    square[i] = load_lanes(row_.data() + i * dim_ + d);
                transpose(square);
                for (int i = 0; i < kLanes; ++i) store_lanes(to + (d + i) * kBlock, square[i]);
            }
        }
    }

    // scores [kBlock], of tokens at positions `start` ...
    void score_block(int64_t start, float* scores) {
        std::fill_n(sums_.data(), group_ * kBlock, 0.f);
        for (int64_t r = 0; r < rows_; r += kStrip) {
            const int64_t end = std::min(r + kStrip, rows_);
            if (*std::max_element(&position_[r], position_.data() + end) <= start) continue;
            multiply_strip<kWide, false, kWide>({&q_[r * dim_], dim_, 1}, keys_.data(),
                                                dim_, nullptr, scores_.data());
            cap_.apply(scores_.data(), (end - r) * kBlock);
            for (int64_t i = r; i < end; ++i) add_row(i, position_[i] - start, i - r);
        }
        std::copy_n(sums_.data(), kBlock, scores);
        for (int64_t i = kBlock; i < group_ * kBlock; ++i)
            scores[i % kBlock] = std::max(scores[i % kBlock], sums_.data()[i]);
    }

    // Adds what row r gives to the first `seen` tokens; the others may hold anything.
    void add_row(int64_t r, int64_t seen, int64_t strip_row) {
        const float* score = scores_.data() + strip_row * kBlock;
        float* sum = sums_.data() + r % group_ * kBlock;
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

    const Queries& queries_;
    const OpenPages& pages_;
    const int64_t dim_, group_;
    const float scale_;
    const SoftCap cap_;
    const Lanes lane_ = count_lanes();
    int64_t sequence_ = -1, head_ = -1, rows_ = 0;  // of the queries in q_
    std::vector<float> q_, lse_;
    std::vector<int64_t> position_;
    Floats row_, keys_, scores_, sums_;
};

// Pages of one sequence and head follow each other: they meet the same queries.
std::vector<Tile> list_tiles(const Queries& queries, const OpenPages& pages) {
    std::vector<Tile> tiles;
    for (int64_t b = 0; b < queries.batch; ++b) {
        if (queries.indptr[b] == queries.indptr[b + 1]) continue;
        for (int64_t h = 0; h < pages.kv_heads; ++h)
            for (int64_t e = pages.indptr[b]; e < pages.indptr[b + 1]; ++e)
                tiles.push_back({b, h, e});
    }
    return tiles;
}

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// scale: of scores, to base 2; cap: of scores in base 2, 0: none; accum: fp32 [R, H, 64],
// accum_stride elements from one slot to the next.
extern "C" void diffxkv_score_open(const Queries* queries, const OpenPages* pages, float scale,
                                   float cap, float* accum, int64_t accum_stride,
                                   int64_t threads) {
    const std::vector<Tile> tiles = list_tiles(*queries, *pages);
    const int64_t count = tiles.size();
    std::vector<float> scores(count * kPageTokens);
    std::atomic<int64_t> next{0}, next_head{0};
    Pool::instance().run(threads, [&] {
        PageScorer scorer(*queries, *pages, scale, SoftCap(cap));
        for (int64_t i; (i = next.fetch_add(1)) < count;)
            scorer.score(tiles[i], &scores[i * kPageTokens]);
    });
    // Sequences may share a slot: one thread owns a head, so adds cannot race and their order is
    // always the same.
    Pool::instance().run(threads, [&] {
        for (int64_t h; (h = next_head.fetch_add(1)) < pages->kv_heads;)
            for (int64_t i = 0; i < count; ++i) {
                if (tiles[i].head != h) continue;
                float* to = accum + pages->slots[tiles[i].entry] * accum_stride + h * kPageTokens;
                for (int64_t t = 0; t < kPageTokens; ++t) to[t] += scores[i * kPageTokens + t];
            }
    });
}

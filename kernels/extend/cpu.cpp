// SPDX-License-Identifier: Apache-2.0
// Attention of many new queries per sequence, over its sealed and its open pages in one pass,
// behind a plain C ABI (see cpu.py).

#include <atomic>

#include "pool.h"
#include "query_tile.h"

namespace diffxkv {
namespace {

// A tile of rows against the pages [first_page, last_page) of its sequence, sealed ones first.
struct Item {
    Rows rows;
    int64_t first_page, last_page, split;
};

struct Problem {
    Queries queries;
    const SealedPages* sealed;  // or null
    const OpenPages* open;      // or null
    std::vector<int64_t> prior;  // [B], tokens of a sequence's listed pages before its first new one

    int64_t sealed_pages(int64_t b) const {
        return sealed ? sealed->indptr[b + 1] - sealed->indptr[b] : 0;
    }
    int64_t rows(int64_t b) const {
        return (queries.indptr[b + 1] - queries.indptr[b]) * queries.group;
    }
    // Open tokens that the last row of a tile sees.
    int64_t visible(const Rows& rows) const {
        return open ? prior[rows.sequence] + (rows.first + rows.count - 1) / queries.group + 1 : 0;
    }
    // The first position that the first row of a tile sees.
    int64_t lowest(const Rows& rows) const {
        if (!open || queries.window_left < 0) return 0;
        const int64_t own = open->q_position[rows.sequence] + rows.first / queries.group;
        return std::max<int64_t>(own - queries.window_left, 0);
    }
    // Open pages that lie before it.
    int64_t hidden_pages(const Rows& rows) const {
        if (!open || queries.window_left < 0) return 0;
        const int32_t *begin = open->page_position + open->indptr[rows.sequence],
                      *end = open->page_position + open->indptr[rows.sequence + 1];
        return std::lower_bound(begin, end, lowest(rows) / kPageTokens) - begin;
    }
    int64_t pages(const Rows& rows) const {
        return sealed_pages(rows.sequence) + (visible(rows) + kPageTokens - 1) / kPageTokens -
               hidden_pages(rows);
    }
};

// Tokens of sequence b's listed pages before its first new one, or -1: a page of new ones is absent.
int64_t tokens_before(const OpenPages& open, int64_t b, int64_t new_tokens) {
    const int32_t *begin = open.page_position + open.indptr[b],
                  *end = open.page_position + open.indptr[b + 1];
    const int64_t start = open.q_position[b], first = start / kPageTokens;
    const int32_t* at = std::lower_bound(begin, end, first);
    const int64_t count = (start + new_tokens - 1) / kPageTokens - first + 1;
    if (end - at < count) return -1;
    for (int64_t i = 0; i < count; ++i)
        if (at[i] != first + i) return -1;
    return (at - begin) * kPageTokens + start % kPageTokens;
}

class Worker {
   public:
    Worker(const Problem& problem, int64_t tile_rows)
        : in_(problem), tile_(problem.queries, tile_rows), panel_(problem.queries.dim) {}

    void operator()(const Item& item, const Output& to) {
        tile_.begin(item.rows);
        const int64_t sealed = in_.sealed_pages(item.rows.sequence);
        if (item.first_page < sealed)
            attend_sealed(item.rows, item.first_page, std::min(item.last_page, sealed));
        if (item.last_page > sealed) {
            const int64_t hidden = in_.hidden_pages(item.rows);
            attend_open(item.rows, hidden + std::max<int64_t>(item.first_page - sealed, 0),
                        hidden + item.last_page - sealed);
        }
        tile_.finish(to);
    }

   private:
    void attend_sealed(const Rows& rows, int64_t begin, int64_t end) {
        const SealedPages& sealed = *in_.sealed;
        tile_.load(sealed.key_mean != nullptr);
        panel_.clear();
        const int32_t* pages = sealed.pages + sealed.indptr[rows.sequence];
        for (int64_t i = begin; i < end; ++i) {
            const HeadRecord r = sealed.record(pages[i], rows.head);
            if (!panel_.fits(r.n_high + r.n_low)) {
                tile_.attend(panel_);
                panel_.clear();
            }
            panel_.add_sealed(sealed, pages[i], rows.head);
        }
        if (panel_.size()) tile_.attend(panel_);
        if (sealed.key_mean) tile_.leave_sealed(sealed.key_mean + rows.head * in_.queries.dim);
    }

    void attend_open(const Rows& rows, int64_t begin, int64_t end) {
        const OpenPages& open = *in_.open;
        const int64_t visible = in_.visible(rows), lowest = in_.lowest(rows);
        const int64_t listed = open.indptr[rows.sequence];
        tile_.load(false);
        for (int64_t i = begin; i < end;) {
            panel_.clear();
            for (; i < end && panel_.fits(kPageTokens); ++i) {
                const int64_t page = open.page_position[listed + i] * kPageTokens;
                panel_.add_open(open, in_.queries.kv_heads, listed + i, rows.head,
                                std::max<int64_t>(lowest - page, 0),
                                std::min(kPageTokens, visible - i * kPageTokens));
            }
            tile_.attend_causal(panel_, open.q_position[rows.sequence]);
        }
    }

    const Problem& in_;
    QueryTile tile_;
    Panel panel_;
};

constexpr int64_t kMostRows = 192;   // of a tile: what it reads is converted or unpacked for all
constexpr int64_t kLeastPages = 8;   // of a tile, if it is split

// Divides the problem so that every thread has several items, the longest first.
class Items {
   public:
    Items(const Problem& in, int64_t threads) : in_(in) {
        const int64_t wanted = threads == 1 ? 1 : 4 * threads;
        while (tile_rows_ > kColumns && count_tiles() < wanted) tile_rows_ /= 2;
        int64_t most_pages = 0;
        each_tile([&](const Rows& rows) { most_pages = std::max(most_pages, in_.pages(rows)); });
        const int64_t tiles = std::max<int64_t>(count_tiles(), 1);
        splits_ = std::max<int64_t>(
            std::min((wanted + tiles - 1) / tiles, most_pages / kLeastPages), 1);
        each_tile([&](const Rows& rows) {
            const int64_t pages = in_.pages(rows);
            for (int64_t s = 0; s < splits_; ++s)
                items_.push_back({rows, pages * s / splits_, pages * (s + 1) / splits_, s});
        });
        auto cost = [](const Item& x) { return x.rows.count * (x.last_page - x.first_page); };
        std::stable_sort(items_.begin(), items_.end(),
                         [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
    }

    int64_t size() const { return static_cast<int64_t>(items_.size()); }
    const Item& operator[](int64_t i) const { return items_[i]; }
    int64_t tile_rows() const { return tile_rows_; }
    int64_t splits() const { return splits_; }

   private:
    template <class F>
    void each_tile(F&& f) const {
        for (int64_t b = 0; b < in_.queries.batch; ++b)
            for (int64_t head = 0; head < in_.queries.kv_heads; ++head)
                for (int64_t r = 0; r < in_.rows(b); r += tile_rows_)
                    f(Rows{b, head, r, std::min(tile_rows_, in_.rows(b) - r)});
    }

    int64_t count_tiles() const {
        int64_t count = 0;
        each_tile([&](const Rows&) { ++count; });
        return count;
    }

    const Problem& in_;
    int64_t tile_rows_ = kMostRows, splits_ = 1;
    std::vector<Item> items_;
};

// to = the union of `splits` parts of n rows each, one after the other, and the sink of the row's
// query head, of which there are `heads`.
void merge_row(const Output& parts, int64_t splits, int64_t n, int64_t row, int64_t heads,
               int64_t dim, const Output& to) {
    const float sink = sink_of(to, row % heads);
    float top = sink, *sum = to.out + row * dim;
    for (int64_t s = 0; s < splits; ++s) top = std::max(top, parts.lse[s * n + row]);
    std::fill_n(sum, dim, 0.f);
    to.lse[row] = top;
    if (top == kMinusInf) return;
    float total = std::exp2(sink - top);
    for (int64_t s = 0; s < splits; ++s) {
        const float weight = std::exp2(parts.lse[s * n + row] - top);
        const float* from = parts.out + (s * n + row) * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += weight * from[d];
        total += weight;
    }
    for (int64_t d = 0; d < dim; ++d) sum[d] /= total;
    to.lse[row] = top + std::log2(total);
}

void run(const Problem& in, const Output& to, int64_t threads) {
    const Queries& q = in.queries;
    const Items items(in, threads);
    const int64_t heads = q.kv_heads * q.group, rows = q.indptr[q.batch] * heads;
    const int64_t parts = items.splits() > 1 ? items.splits() * rows : 0;
    std::vector<float> out(parts * q.dim), lse(parts);
    std::atomic<int64_t> next{0}, next_row{0};
    Pool::instance().run(threads, [&] {
        Worker worker(in, items.tile_rows());
        for (int64_t i; (i = next.fetch_add(1)) < items.size();) {
            const int64_t part = items[i].split * rows;
            worker(items[i], parts ? Output{&out[part * q.dim], &lse[part], nullptr} : to);
        }
    });
    if (!parts) return;
    constexpr int64_t kChunk = 16;
    Pool::instance().run(threads, [&] {
        for (int64_t r; (r = next_row.fetch_add(kChunk)) < rows;)
            for (int64_t i = r; i < std::min(r + kChunk, rows); ++i)
                merge_row({out.data(), lse.data(), nullptr}, items.splits(), rows, i, heads, q.dim, to);
    });
}

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// sealed, open: null where there are none. out: fp32 [T, Hq, D]; lse: fp32 [T, Hq]. Returns -1, or
// the number of a sequence whose open pages lack new tokens; nothing is written then.
extern "C" int64_t diffxkv_extend(const Queries* queries, const SealedPages* sealed,
                                  const OpenPages* open, float* out, float* lse, int64_t threads) {
    Problem problem{*queries, sealed, open, std::vector<int64_t>(queries->batch)};
    for (int64_t b = 0; open && b < queries->batch; ++b) {
        const int64_t new_tokens = queries->indptr[b + 1] - queries->indptr[b];
        if (!new_tokens) continue;
        problem.prior[b] = tokens_before(*open, b, new_tokens);
        if (problem.prior[b] < 0) return b;
    }
    run(problem, {out, lse, queries->sinks}, threads);
    return -1;
}

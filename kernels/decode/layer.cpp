// SPDX-License-Identifier: Apache-2.0
// One layer of a decode step in one call: new keys and values to raw pages, attention over open and
// sealed pages at once, and what the open pages' tokens received of it (see layer.py).

#include <optional>

#include "layer_pages.h"
#include "rotate.h"
#include "store.h"
#include "streams.h"

namespace diffxkv {
namespace {

// Elements of the model's dtype, `stride` of them from one token to the next.
struct Heads {
    const uint8_t* first;
    int64_t stride;
};

class Layer {
   public:
    Layer(const Tables& tables, const Batch& batch, int64_t layer, int64_t group,
          const Softmax& softmax)
        : tables_(tables), batch_(batch), softmax_(softmax), layout_(*tables.layout),
          dtype_(static_cast<DType>(tables.raw_dtype)), group_(group),
          rows_(batch.queries * group), row_bytes_(layout_.row_bytes(0)),
          token_bytes_(layout_.kv_heads * row_bytes_), keys_(tables.keys[layer]),
          values_(tables.values[layer]),
          scores_(tables.scores ? tables.scores + layer * tables.scores_layer : nullptr),
          key_mean_(tables.key_means
                        ? tables.key_means + layer * layout_.kv_heads * layout_.head_dim
                        : nullptr),
          sealed_{tables.arena, tables.frames + layer * tables.frames_layer,
                  tables.heads + layer * tables.heads_layer, tables.frames_page,
                  tables.heads_page},
          pages_(tables, batch, softmax.window_left),
          logits_(scores_ ? new float[pages_.open.size() * page_logits()] : nullptr) {}

    // Keys and values of the new tokens to raw pages.
    void write(Heads k, Heads v) {
        const int64_t bytes = layout_.raw_itemsize;
        for (int64_t t = 0; t < batch_.size * batch_.queries; ++t) {
            const int64_t at = batch_.rows[t] * token_bytes_;
            std::memcpy(keys_ + at, k.first + t * k.stride * bytes, token_bytes_);
            std::memcpy(values_ + at, v.first + t * v.stride * bytes, token_bytes_);
        }
    }

    // out: [B * N, Hq, D] of the model's dtype; lse: fp32 [B * N, Hq].
    template <int Dim>
    void attend(Heads q, uint8_t* out, float* lse) {
        const Shape shape{batch_.size, layout_.kv_heads, rows_, layout_.head_dim};
        WorkTiles tiles(shape, pages_.first.data(), batch_.threads);
        std::atomic<int64_t> next_tile{0}, next_head{0};
        Pool::instance().run(batch_.threads, [&] {
            Worker<Dim> worker(*this);
            for (int64_t i; (i = next_tile.fetch_add(1)) < tiles.size();)
                worker.run(tiles.tile(i), q, tiles.partial(i));
        });
        Pool::instance().run(batch_.threads, [&] {
            std::vector<float> merged(rows_ * shape.dim), merged_lse(rows_), sinks;
            for (int64_t i; (i = next_head.fetch_add(1)) < shape.batch * shape.kv_heads;) {
                const int64_t sequence = i / shape.kv_heads, head = i % shape.kv_heads;
                load_sinks(head, sinks);
                tiles.merge(sequence, head, softmax_.sinks ? sinks.data() : nullptr, merged.data(),
                            merged_lse.data());
                for (int64_t n = 0; n < batch_.queries; ++n) {
                    const int64_t at = query(sequence, n, head), width = group_ * shape.dim;
                    std::copy_n(&merged_lse[n * group_], group_, lse + at);
                    float_to_row(&merged[n * width], dtype_, width, out + at * row_bytes_);
                }
            }
        });
    }

    // Adds to the tokens before a sequence's first query what they received of it, in units of
    // uniform attention: a query that sees n tokens gives each n times its probability.
    void score(const float* lse) {
        if (!scores_) return;
        std::atomic<int64_t> next{0};
        // Sequences may share a page: one thread owns a head, so adds cannot race and their order is
        // always the same.
        Pool::instance().run(batch_.threads, [&] {
            for (int64_t h; (h = next.fetch_add(1)) < layout_.kv_heads;)
                for (size_t i = 0; i < pages_.open.size(); ++i) score_page(i, h, lse);
        });
    }

   private:
    template <int Dim>
    class Worker {
       public:
        explicit Worker(Layer& layer)
            : layer_(layer), dim_(layer.layout_.head_dim),
              open_(layer.dtype_, layer.group_, layer.batch_.queries, dim_, layer.softmax_.cap),
              seen_(layer.batch_.queries), q_(2 * layer.rows_ * dim_), max_(layer.rows_),
              sum_(layer.rows_), out_(layer.rows_ * dim_) {
            if (layer.tables_.arena)
                streams_.emplace(layer.layout_, layer.dtype_, layer.rows_, layer.softmax_.cap);
        }

        void run(const WorkTile& tile, Heads q, const Partial& partial) {
            const Layer& on = layer_;
            float *plain = q_.data(), *rotated = plain + on.rows_ * dim_;
            load_queries(tile, q, plain);
            open_.begin(plain);
            if (streams_) {
                std::copy(plain, rotated, rotated);
                if (on.key_mean_)
                    for (int64_t r = 0; r < on.rows_; ++r) rotate_row(rotated + r * dim_, dim_);
                streams_->begin(rotated);
            }
            const int32_t *page = on.pages_.id.data(), *opened = on.pages_.opened.data();
            for (int64_t i = tile.first_page; i < tile.last_page; ++i) {
                if (streams_)
                    on.sealed_.prefetch(on.layout_, page[std::min(i + kAhead, tile.last_page - 1)],
                                        tile.head);
                if (opened[i] < 0) {
                    streams_->push(on.sealed_, page[i], tile.head);
                } else {
                    attend_open(opened[i], tile.head);
                }
            }
            open_.finish(partial);
            if (on.key_mean_) {
                finish_sealed(partial, plain, on.key_mean_ + tile.head * dim_);
            } else if (streams_) {
                streams_->finish(partial);
            }
        }

       private:
        // Queries of the tile's sequence and head, scaled: [queries * G, D].
        void load_queries(const WorkTile& tile, Heads q, float* to) const {
            const Layer& on = layer_;
            const int64_t width = on.group_ * dim_, bytes = on.layout_.raw_itemsize;
            for (int64_t n = 0; n < on.batch_.queries; ++n) {
                const int64_t token = tile.sequence * on.batch_.queries + n;
                row_to_float(q.first + (token * q.stride + tile.head * width) * bytes, 0, on.dtype_,
                             width, to + n * width);
            }
            for (int64_t i = 0; i < on.rows_ * dim_; ++i) to[i] *= on.softmax_.scale;
        }

        // Back from the basis of sealed pages (kernels/basis/sealed.py). q: scaled, not rotated.
        void finish_sealed(const Partial& partial, const float* q, const float* mean) {
            std::fill(max_.begin(), max_.end(), kMinusInf);
            std::fill(sum_.begin(), sum_.end(), 0.f);
            std::fill(out_.begin(), out_.end(), 0.f);
            streams_->finish({max_.data(), sum_.data(), out_.data()});
            for (int64_t r = 0; r < layer_.rows_; ++r, q += dim_) {
                float lacking = 0.f, *row = &out_[r * dim_];
#pragma omp simd reduction(+ : lacking)
                for (int64_t d = 0; d < dim_; ++d) lacking += q[d] * mean[d];
                rotate_row(row, dim_);
                merge_group(partial, r, dim_, {max_[r] + lacking, sum_[r]},
                            [&](int64_t d) { return row[d]; });
            }
        }

        void attend_open(int64_t opened, int64_t head) {
            Layer& on = layer_;
            const OpenPage& page = on.pages_.open[opened];
            for (size_t n = 0; n < seen_.size(); ++n)
                seen_[n] = page.seen(on.batch_, on.softmax_.window_left, n);
            const int64_t at = page.slot * kPageTokens * on.token_bytes_ + head * on.row_bytes_;
            open_.attend(on.keys_ + at, on.values_ + at, on.token_bytes_, seen_.data(),
                         on.scores_ ? on.logits(opened, head) : nullptr);
        }

        Layer& layer_;
        const int64_t dim_;
        OpenEngine<Dim> open_;
        std::optional<SealedStreams> streams_;  // where there are sealed pages
        std::vector<Span> seen_;                // by query
        std::vector<float> q_, max_, sum_, out_;
    };

    // First query head of a KV head, of query n of a sequence: a row of the output.
    int64_t query(int64_t sequence, int64_t n, int64_t head) const {
        return ((sequence * batch_.queries + n) * layout_.kv_heads + head) * group_;
    }

    // Sinks in base 2 of the rows of a KV head, if there are any.
    void load_sinks(int64_t head, std::vector<float>& to) const {
        to.clear();
        for (int64_t r = 0; softmax_.sinks && r < rows_; ++r)
            to.push_back(softmax_.sinks[head * group_ + r % group_] * kLog2E);
    }

    int64_t page_logits() const { return layout_.kv_heads * group_ * kPageTokens; }

    float* logits(int64_t opened, int64_t head) {
        return logits_.get() + opened * page_logits() + head * group_ * kPageTokens;
    }

    void score_page(int64_t opened, int64_t head, const float* lse) {
        const OpenPage& page = pages_.open[opened];
        const int64_t position = batch_.position(page.sequence, 0);
        const int64_t n = std::min(position - page.place * kPageTokens, kPageTokens);
        const float* of = lse + query(page.sequence, 0, head);
        float* most = logits(opened, head);  // of the group, from here on
        for (int64_t t = 0; t < n; ++t) most[t] -= of[0];
        for (int64_t g = 1; g < group_; ++g)
#pragma omp simd
            for (int64_t t = 0; t < n; ++t) {
                const float other = most[g * kPageTokens + t] - of[g];
                most[t] = most[t] > other ? most[t] : other;
            }
        float* to = scores_ + (page.slot * layout_.kv_heads + head) * kPageTokens;
        const float seen = std::log2(static_cast<float>(position + 1));
#pragma omp simd
        for (int64_t t = 0; t < n; ++t) to[t] += fast_exp2(most[t] + seen);
    }

    const Tables& tables_;
    const Batch& batch_;
    const Softmax& softmax_;
    const Layout& layout_;
    DType dtype_;
    int64_t group_, rows_, row_bytes_, token_bytes_;  // rows_: of a KV head, those of all queries
    uint8_t *keys_, *values_;
    float* scores_;
    const float* key_mean_;
    SealedPages sealed_;
    Pages pages_;
    std::unique_ptr<float[]> logits_;  // [open pages][H][G][64] of the first queries, base 2; null: nothing is scored
};

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// q, out: [B * N, Hq, D]; k, v: [B * N, H, D]; N new tokens of each sequence. scale, cap: of scores in
// base 2; cap 0: none. sinks: fp32 [Hq], or null.
extern "C" void diffxkv_decode_layer(const Tables* tables, const Batch* batch, int64_t layer,
                                     int64_t group, const uint8_t* q, int64_t q_stride,
                                     const uint8_t* k, int64_t k_stride, const uint8_t* v,
                                     int64_t v_stride, float scale, float cap, int64_t window_left,
                                     const float* sinks, uint8_t* out, float* lse) {
    const Softmax softmax{scale, SoftCap(cap), window_left, sinks};
    Layer step(*tables, *batch, layer, group, softmax);
    step.write({k, k_stride}, {v, v_stride});
    with_dim(tables->layout->head_dim,
             [&](auto dim) { step.template attend<dim>({q, q_stride}, out, lse); });
    step.score(lse);
}

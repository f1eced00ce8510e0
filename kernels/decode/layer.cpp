// SPDX-License-Identifier: Apache-2.0
// One layer of a decode step in one call: new keys and values to raw pages, attention over open and
// sealed pages at once, and what the open pages' tokens received of it (see layer.py).

#include "open_engine.h"
#include "rotate.h"
#include "store.h"
#include "streams.h"

namespace diffxkv {
namespace {

// Everything that stays while the server runs; layer.py passes it as words of 64 bits.
struct Tables {
    const Layout* layout;
    int64_t raw_dtype;
    const float* key_means;  // [L, H, D], which sealed keys lack; null: they are the model's own
    const uint8_t* arena;
    const int32_t *frames, *heads, *raw_slot;
    int64_t frames_layer, frames_page, heads_layer, heads_page;  // strides in int32 words
    uint8_t *const *keys, *const *values;  // by layer: [R, 64, H, D] of raw_dtype
    float* scores;                         // [L, R, H, 64]; null: nothing is scored
    int64_t scores_layer;
};
static_assert(sizeof(Tables) == 15 * 8, "layer.py passes 15 words");

// The batch; also words. Pages of sequence b are table[b * width + ...].
struct Batch {
    int64_t size, width;
    const int32_t *table, *lengths;
    const int64_t* rows;  // of raw pages, for the new tokens
    int64_t threads;
};
static_assert(sizeof(Batch) == 6 * 8, "layer.py passes 6 words");

// Elements of the model's dtype, `stride` of them from one token to the next.
struct Heads {
    const uint8_t* first;
    int64_t stride;
};

struct OpenPage {
    int64_t sequence, place, slot;
};

// The batch's pages, numbered sequence by sequence.
struct Pages {
    std::vector<int32_t> first;  // [B + 1]
    std::vector<int32_t> opened;  // of each page: its number among the open ones, or -1
    std::vector<OpenPage> open;

    Pages(const Tables& tables, const Batch& batch) : first(batch.size + 1) {
        for (int64_t b = 0; b < batch.size; ++b) {
            const int64_t count = (batch.lengths[b] + kPageTokens - 1) / kPageTokens;
            first[b + 1] = first[b] + static_cast<int32_t>(count);
            for (int64_t place = 0; place < count; ++place) {
                const int64_t slot = tables.raw_slot[batch.table[b * batch.width + place]];
                opened.push_back(slot < 0 ? -1 : static_cast<int32_t>(open.size()));
                if (slot >= 0) open.push_back({b, place, slot});
            }
        }
    }
};

class Layer {
   public:
    Layer(const Tables& tables, const Batch& batch, int64_t layer, int64_t group, float scale)
        : tables_(tables), batch_(batch), layout_(*tables.layout),
          dtype_(static_cast<DType>(tables.raw_dtype)), group_(group),
          row_bytes_(layout_.row_bytes(0)), token_bytes_(layout_.kv_heads * row_bytes_),
          scale_(scale), keys_(tables.keys[layer]), values_(tables.values[layer]),
          scores_(tables.scores ? tables.scores + layer * tables.scores_layer : nullptr),
          key_mean_(tables.key_means
                        ? tables.key_means + layer * layout_.kv_heads * layout_.head_dim
                        : nullptr),
          sealed_{tables.arena, tables.frames + layer * tables.frames_layer,
                  tables.heads + layer * tables.heads_layer, tables.frames_page,
                  tables.heads_page},
          pages_(tables, batch),
          logits_(scores_ ? new float[pages_.open.size() * page_logits()] : nullptr) {}

    void write(Heads k, Heads v) {
        const int64_t bytes = layout_.raw_itemsize;
        for (int64_t b = 0; b < batch_.size; ++b) {
            const int64_t at = batch_.rows[b] * token_bytes_;
            std::memcpy(keys_ + at, k.first + b * k.stride * bytes, token_bytes_);
            std::memcpy(values_ + at, v.first + b * v.stride * bytes, token_bytes_);
        }
    }

    // out: [B, Hq, D] of the model's dtype; lse: fp32 [B, Hq].
    template <int Dim>
    void attend(Heads q, uint8_t* out, float* lse) {
        const Shape shape{batch_.size, layout_.kv_heads, group_, layout_.head_dim};
        const int64_t rows = shape.batch * shape.kv_heads;
        WorkTiles tiles(shape, pages_.first.data(), batch_.threads);
        std::atomic<int64_t> next_tile{0}, next_row{0};
        Pool::instance().run(batch_.threads, [&] {
            Worker<Dim> worker(*this);
            for (int64_t i; (i = next_tile.fetch_add(1)) < tiles.size();)
                worker.run(tiles.tile(i), q, tiles.partial(i));
        });
        Pool::instance().run(batch_.threads, [&] {
            std::vector<float> group(group_ * shape.dim);
            for (int64_t r; (r = next_row.fetch_add(1)) < rows;) {
                tiles.merge(r / shape.kv_heads, r % shape.kv_heads, group.data(), lse + r * group_);
                float_to_row(group.data(), dtype_, group_ * shape.dim, out + r * group_ * row_bytes_);
            }
        });
    }

    // Adds to the tokens before a sequence's query what they received, in units of uniform attention:
    // a query that sees n tokens gives each n times its probability.
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
            : layer_(layer), open_(layer.dtype_, layer.group_, layer.layout_.head_dim),
              streams_(layer.layout_, layer.dtype_, layer.group_),
              q_(2 * layer.group_ * layer.layout_.head_dim), max_(layer.group_), sum_(layer.group_),
              out_(layer.group_ * layer.layout_.head_dim),
              unscored_(layer.scores_ ? 0 : layer.group_ * kPageTokens) {}

        void run(const WorkTile& tile, Heads q, const Partial& partial) {
            const Layer& on = layer_;
            const int64_t dim = on.layout_.head_dim, width = on.group_ * dim;
            const uint8_t* group =
                q.first + (tile.sequence * q.stride + tile.head * width) * on.layout_.raw_itemsize;
            float *plain = q_.data(), *rotated = plain + width;
            row_to_float(group, 0, on.dtype_, width, plain);
            for (int64_t i = 0; i < width; ++i) plain[i] *= on.scale_;
            std::copy(plain, plain + width, rotated);
            if (on.key_mean_)
                for (int64_t g = 0; g < on.group_; ++g) rotate_row(rotated + g * dim, dim);
            open_.begin(plain);
            streams_.begin(rotated);
            const int32_t* table = on.batch_.table + tile.sequence * on.batch_.width -
                                   on.pages_.first[tile.sequence];
            for (int64_t i = tile.first_page; i < tile.last_page; ++i) {
                on.sealed_.prefetch(on.layout_, table[std::min(i + kAhead, tile.last_page - 1)],
                                    tile.head);
                const int64_t opened = on.pages_.opened[i];
                if (opened < 0) {
                    streams_.push(on.sealed_, table[i], tile.head);
                } else {
                    attend_open(opened, tile.head);
                }
            }
            open_.finish(partial);
            if (on.key_mean_) {
                finish_sealed(partial, plain, on.key_mean_ + tile.head * dim);
            } else {
                streams_.finish(partial);
            }
        }

       private:
        // Back from the basis of sealed pages (kernels/basis/sealed.py). q: scaled, not rotated.
        void finish_sealed(const Partial& partial, const float* q, const float* mean) {
            const int64_t dim = layer_.layout_.head_dim;
            std::fill(max_.begin(), max_.end(), kMinusInf);
            std::fill(sum_.begin(), sum_.end(), 0.f);
            std::fill(out_.begin(), out_.end(), 0.f);
            streams_.finish({max_.data(), sum_.data(), out_.data()});
            for (int64_t g = 0; g < layer_.group_; ++g, q += dim) {
                float lacking = 0.f, *row = &out_[g * dim];
#pragma omp simd reduction(+ : lacking)
                for (int64_t d = 0; d < dim; ++d) lacking += q[d] * mean[d];
                rotate_row(row, dim);
                merge_group(partial, g, dim, {max_[g] + lacking, sum_[g]},
                            [&](int64_t d) { return row[d]; });
            }
        }

        void attend_open(int64_t opened, int64_t head) {
            Layer& on = layer_;
            const OpenPage& page = on.pages_.open[opened];
            const int64_t left = on.batch_.lengths[page.sequence] - page.place * kPageTokens;
            const int64_t at =
                page.slot * kPageTokens * on.token_bytes_ + head * on.row_bytes_;
            open_.attend(on.keys_ + at, on.values_ + at, on.token_bytes_,
                         std::min(left, kPageTokens),
                         on.scores_ ? on.logits(opened, head) : unscored_.data());
        }

        Layer& layer_;
        OpenEngine<Dim> open_;
        SealedStreams streams_;
        std::vector<float> q_, max_, sum_, out_, unscored_;
    };

    int64_t page_logits() const { return layout_.kv_heads * group_ * kPageTokens; }

    float* logits(int64_t opened, int64_t head) {
        return logits_.get() + opened * page_logits() + head * group_ * kPageTokens;
    }

    void score_page(int64_t opened, int64_t head, const float* lse) {
        const OpenPage& page = pages_.open[opened];
        const int64_t length = batch_.lengths[page.sequence];
        const int64_t n = std::min(length - 1 - page.place * kPageTokens, kPageTokens);
        const float* of = lse + (page.sequence * layout_.kv_heads + head) * group_;
        float* most = logits(opened, head);  // of the group, from here on
        for (int64_t t = 0; t < n; ++t) most[t] -= of[0];
        for (int64_t g = 1; g < group_; ++g)
#pragma omp simd
            for (int64_t t = 0; t < n; ++t) {
                const float other = most[g * kPageTokens + t] - of[g];
                most[t] = most[t] > other ? most[t] : other;
            }
        float* to = scores_ + (page.slot * layout_.kv_heads + head) * kPageTokens;
        const float seen = std::log2(static_cast<float>(length));
#pragma omp simd
        for (int64_t t = 0; t < n; ++t) to[t] += fast_exp2(most[t] + seen);
    }

    const Tables& tables_;
    const Batch& batch_;
    const Layout& layout_;
    DType dtype_;
    int64_t group_, row_bytes_, token_bytes_;
    float scale_;
    uint8_t *keys_, *values_;
    float* scores_;
    const float* key_mean_;
    SealedPages sealed_;
    Pages pages_;
    std::unique_ptr<float[]> logits_;  // [open pages][H][G][64], base 2; null: nothing is scored
};

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// scale: of q.k, times log2(e).
extern "C" void diffxkv_decode_layer(const Tables* tables, const Batch* batch, int64_t layer,
                                     int64_t group, const uint8_t* q, int64_t q_stride, const uint8_t* k,
                                     int64_t k_stride, const uint8_t* v, int64_t v_stride,
                                     float scale, uint8_t* out, float* lse) {
    Layer step(*tables, *batch, layer, group, scale);
    step.write({k, k_stride}, {v, v_stride});
    with_dim(tables->layout->head_dim,
             [&](auto dim) { step.template attend<dim>({q, q_stride}, out, lse); });
    step.score(lse);
}

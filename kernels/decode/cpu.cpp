// SPDX-License-Identifier: Apache-2.0
// Decode attention over sealed and over open pages, behind a plain C ABI (see cpu.py).

#include <memory>
#include <utility>

#include "float_engine.h"
#include "items.h"
#ifdef __AVX512VNNI__
#include "vnni_engine.h"
#endif

namespace diffxkv {
namespace {

std::unique_ptr<Engine> make_engine(const Layout& layout, Tier tier, DType raw, int64_t group) {
#ifdef __AVX512VNNI__
    if (!tier.raw()) return std::make_unique<VnniEngine>(layout, tier, group);
#endif
    return with_dim(layout.head_dim, [&](auto dim) -> std::unique_ptr<Engine> {
        return std::make_unique<FloatEngine<dim>>(layout, tier, raw, group);
    });
}

// Rows of one tier on their way through its engine: one tile waits while the next is gathered, so
// that its rows are fetched during the arithmetic on the first.
class Stream {
   public:
    Stream(const Layout& layout, Tier tier, DType raw, int64_t group)
        : engine_(make_engine(layout, tier, raw, group)) {}

    void begin(const float* q) {
        engine_->begin(q);
        full_->n = next_->n = 0;
    }

    void finish(const Partial& partial) {
        advance();
        advance();
        engine_->finish(partial);
    }

    // Queues `count` <= kTile tokens; fill(Tile&, first) sets their row addresses.
    template <class Fill>
    void push(int64_t count, Fill&& fill) {
        if (next_->n + count > kTile) advance();
        fill(*next_, next_->n);
        next_->n += count;
    }

   private:
    void advance() {
        if (full_->n) engine_->process(*full_, *next_);
        full_->n = 0;
        std::swap(full_, next_);
    }

    std::unique_ptr<Engine> engine_;
    Tile tiles_[2];
    Tile *full_ = &tiles_[0], *next_ = &tiles_[1];
};

struct SealedPages {
    Layout layout;
    const uint8_t* arena;
    const int32_t *frames, *heads;
    int64_t frames_stride, heads_stride;  // int32 words per page
    const int32_t* pages;
};

class SealedWorker {
   public:
    SealedWorker(const SealedPages& in, DType raw, int64_t group)
        : in_(in), high_(in.layout, in.layout.high, raw, group),
          low_(in.layout, in.layout.low, raw, group) {}

    void operator()(const Item& item, const float* q, const Partial& partial) {
        high_.begin(q);
        low_.begin(q);
        for (int64_t i = item.first_page; i < item.last_page; ++i) {
            const int64_t ahead = in_.pages[std::min(i + kAhead, item.last_page - 1)];
            __builtin_prefetch(in_.heads + ahead * in_.heads_stride + 2 * item.head);
            prefetch_bytes(reinterpret_cast<const uint8_t*>(in_.frames + ahead * in_.frames_stride),
                           in_.layout.max_frames * 4);
            push_page(in_.pages[i], item.head);
        }
        high_.finish(partial);
        low_.finish(partial);
    }

   private:
    static constexpr int64_t kAhead = 4;

    void push_page(int64_t page, int64_t head) {
        HeadRecord r = head_record(in_.heads + page * in_.heads_stride + 2 * head);
        Payload<const uint8_t> payload{in_.arena, in_.frames + page * in_.frames_stride,
                                       in_.layout.frame_bytes};
        Sections s = sections(in_.layout, r.n_high, r.n_low);
        push_tier(high_, in_.layout.high, payload, r.offset, s.high, r.n_high);
        push_tier(low_, in_.layout.low, payload, r.offset, s.low, r.n_low);
    }

    void push_tier(Stream& stream, Tier tier, const Payload<const uint8_t>& payload, int64_t offset,
                   const TierSections& s, int64_t n) {
        if (!n) return;
        stream.push(n, [&](Tile& tile, int64_t at) {
            auto rows = [&](int64_t section, int64_t row_bytes, const uint8_t** to) {
                payload.each_run(offset + section, row_bytes, n,
                                 [&](const uint8_t* row, int64_t first, int64_t count) {
                                     set_rows(to + first, row, row_bytes, count);
                                 });
            };
            rows(s.key, in_.layout.row_bytes(tier.key_bits), tile.key + at);
            rows(s.value, in_.layout.row_bytes(tier.value_bits), tile.value + at);
            if (tier.raw()) return;
            rows(s.meta, kMetaBytes, tile.meta + at);
            for (int64_t i = 0; i < n; i += 8) __builtin_prefetch(tile.meta[at + i]);
            __builtin_prefetch(tile.meta[at + n - 1]);
        });
    }

    const SealedPages& in_;
    Stream high_, low_;
};

struct OpenPages {
    Layout layout;  // of raw rows
    const uint8_t *key, *value;
    int64_t page_bytes, token_bytes;
    const int32_t *indptr, *slots, *last_len;
};

class OpenWorker {
   public:
    OpenWorker(const OpenPages& in, DType raw, int64_t group)
        : in_(in), stream_(in.layout, in.layout.high, raw, group) {}

    void operator()(const Item& item, const float* q, const Partial& partial) {
        stream_.begin(q);
        for (int64_t i = item.first_page; i < item.last_page; ++i) {
            bool last = i == in_.indptr[item.sequence + 1] - 1;
            int64_t n = last ? in_.last_len[item.sequence] : kPageTokens;
            int64_t base = in_.slots[i] * in_.page_bytes + item.head * in_.layout.row_bytes(0);
            stream_.push(n, [&](Tile& tile, int64_t at) {
                for (int64_t t = 0; t < n; ++t, base += in_.token_bytes) {
                    tile.key[at + t] = in_.key + base;
                    tile.value[at + t] = in_.value + base;
                }
            });
        }
        stream_.finish(partial);
    }

   private:
    const OpenPages& in_;
    Stream stream_;
};

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// q: fp32 [B, Hkv * G, D], times sm_scale * log2(e). out: fp32 like q; lse: fp32 [B, Hkv * G].
extern "C" void diffxkv_decode_sealed(const float* q, int64_t batch, int64_t group,
                                      const uint8_t* arena, const int32_t* frames,
                                      int64_t frames_stride, const int32_t* heads,
                                      int64_t heads_stride, const int32_t* indptr,
                                      const int32_t* pages, const Layout* layout, int64_t raw_dtype,
                                      float* out, float* lse, int64_t threads) {
    Shape shape{batch, layout->kv_heads, group, layout->head_dim};
    SealedPages in{*layout, arena, frames, heads, frames_stride, heads_stride, pages};
    run_items(shape, q, indptr, out, lse, threads,
              [&] { return SealedWorker(in, static_cast<DType>(raw_dtype), group); });
}

// key, value: [R, 64, Hkv, D] of raw_dtype, page_stride elements from one slot to the next.
extern "C" void diffxkv_decode_open(const float* q, int64_t batch, int64_t group, int64_t kv_heads,
                                    int64_t dim, const uint8_t* key, const uint8_t* value,
                                    int64_t page_stride, int64_t raw_dtype, const int32_t* indptr,
                                    const int32_t* slots, const int32_t* last_len, float* out,
                                    float* lse, int64_t threads) {
    const int64_t itemsize = raw_dtype == kFloat32 ? 4 : 2;
    Shape shape{batch, kv_heads, group, dim};
    Layout layout{dim, kv_heads, itemsize, {0, 0}, {0, 0}, 0, 0, 0};
    OpenPages in{layout, key, value, page_stride * itemsize, kv_heads * dim * itemsize,
                 indptr, slots, last_len};
    run_items(shape, q, indptr, out, lse, threads,
              [&] { return OpenWorker(in, static_cast<DType>(raw_dtype), group); });
}

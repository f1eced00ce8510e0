// SPDX-License-Identifier: Apache-2.0
// Sealed pages on their way to the engines of their two tiers.
#pragma once

#include <memory>
#include <utility>

#include "float_engine.h"
#include "work.h"
#ifdef __AVX512VNNI__
#include "vnni_engine.h"
#endif

namespace diffxkv {

inline std::unique_ptr<Engine> make_engine(const Layout& layout, Tier tier, DType raw, int64_t group,
                                           SoftCap cap) {
#ifdef __AVX512VNNI__
    if (!tier.raw()) return std::make_unique<VnniEngine>(layout, tier, group, cap);
#endif
    return with_dim(layout.head_dim, [&](auto dim) -> std::unique_ptr<Engine> {
        return std::make_unique<FloatEngine<dim>>(layout, tier, raw, group, cap);
    });
}

// Rows of one tier on their way through its engine: one tile waits while the next is gathered, so
// that its rows are fetched during the arithmetic on the first.
class Stream {
   public:
    Stream(const Layout& layout, Tier tier, DType raw, int64_t group, SoftCap cap)
        : engine_(make_engine(layout, tier, raw, group, cap)) {}

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

// One layer's tables.
struct SealedPages {
    const uint8_t* arena;
    const int32_t *frames, *heads;
    int64_t frames_stride, heads_stride;  // int32 words per page

    // Fetches what `SealedStreams::push` reads of a page first.
    void prefetch(const Layout& layout, int64_t page, int64_t head) const {
        __builtin_prefetch(heads + page * heads_stride + 2 * head);
        prefetch_bytes(reinterpret_cast<const uint8_t*>(frames + page * frames_stride),
                       layout.max_frames * 4);
    }
};

constexpr int64_t kAhead = 4;  // pages between `prefetch` and `push`

// Both tiers of one KV head at a time.
class SealedStreams {
   public:
    SealedStreams(const Layout& layout, DType raw, int64_t group, SoftCap cap)
        : layout_(layout), high_(layout, layout.high, raw, group, cap),
          low_(layout, layout.low, raw, group, cap) {}

    void begin(const float* q) {
        high_.begin(q);
        low_.begin(q);
    }

    void push(const SealedPages& in, int64_t page, int64_t head) {
        HeadRecord r = head_record(in.heads + page * in.heads_stride + 2 * head);
        Payload<const uint8_t> payload{in.arena, in.frames + page * in.frames_stride,
                                       layout_.frame_bytes};
        Sections s = sections(layout_, r.n_high, r.n_low);
        push_tier(high_, layout_.high, payload, r.offset, s.high, r.n_high);
        push_tier(low_, layout_.low, payload, r.offset, s.low, r.n_low);
    }

    void finish(const Partial& partial) {
        high_.finish(partial);
        low_.finish(partial);
    }

   private:
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
            rows(s.key, layout_.row_bytes(tier.key_bits), tile.key + at);
            rows(s.value, layout_.row_bytes(tier.value_bits), tile.value + at);
            if (tier.raw()) return;
            rows(s.meta, kMetaBytes, tile.meta + at);
            for (int64_t i = 0; i < n; i += 8) __builtin_prefetch(tile.meta[at + i]);
            __builtin_prefetch(tile.meta[at + n - 1]);
        });
    }

    Layout layout_;
    Stream high_, low_;
};

}  // namespace diffxkv

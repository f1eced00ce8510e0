// SPDX-License-Identifier: Apache-2.0
// Keys and values of a tile of tokens in fp32, read from open or from sealed pages once for all the
// query rows that attend to them.
#pragma once

#include <algorithm>

#include "payload.h"
#include "product.h"
#include "rows.h"

namespace diffxkv {

// Raw pages of all sequences; the members match OpenArgs of cpu.py.
struct OpenPages {
    const uint8_t *key, *value;                      // [R, 64, H, D]
    int64_t page_stride, dtype;                      // in elements; DType
    const int32_t *indptr, *slots, *page_position;   // [B + 1], [N], [N]
    const int32_t* q_position;                       // [B]
};

// Sealed pages of all sequences; the members match SealedArgs of cpu.py.
struct SealedPages {
    const Layout* layout;
    const uint8_t* arena;
    const int32_t *frames, *heads;        // of this layer
    int64_t frames_stride, heads_stride;  // int32 words per page
    const int32_t *indptr, *pages;        // [B + 1], [N]
    int64_t raw_dtype;
    // [H, D], rotated, which sealed keys lack; null: queries and outputs are in their basis.
    const float* key_mean;

    HeadRecord record(int64_t page, int64_t head) const {
        return head_record(heads + page * heads_stride + 2 * head);
    }
};

class Panel {
   public:
    static constexpr int64_t kTokens = 128;

    explicit Panel(int64_t dim)
        : dim_(dim), keys_((kTokens + kStrip) * stride()), values_(kTokens * stride()) {}

    int64_t size() const { return size_; }
    bool fits(int64_t tokens) const { return size_ + tokens <= kTokens; }
    void clear() { size_ = 0; }

    // Rows [tokens, D] as the left side of scores; up to kStrip - 1 rows beyond the last may be read.
    Left keys(int64_t token) const { return {keys_.data() + token * stride(), stride(), 1}; }
    // Columns of the values, [D, tokens].
    Left values(int64_t d) const { return {values_.data() + d, 1, stride()}; }

    // Tokens [first, end) of a raw page, the i-th one listed of all sequences. A panel has tokens of
    // open pages, by position, or of sealed ones.
    void add_open(const OpenPages& in, int64_t kv_heads, int64_t i, int64_t head, int64_t first,
                  int64_t end) {
        const int64_t itemsize = in.dtype == kFloat32 ? 4 : 2;
        const int64_t row_bytes = dim_ * itemsize, token_bytes = kv_heads * row_bytes;
        int64_t at = in.slots[i] * in.page_stride * itemsize + head * row_bytes;
        at += first * token_bytes;
        for (int64_t t = first; t < end; ++t, at += token_bytes, ++size_) {
            position_[size_] = in.page_position[i] * kPageTokens + t;
            const DType dtype = static_cast<DType>(in.dtype);
            row_to_float(in.key + at, 0, dtype, dim_, keys_.data() + size_ * stride());
            row_to_float(in.value + at, 0, dtype, dim_, values_.data() + size_ * stride());
        }
    }

    // How many of the open pages' tokens lie before a position.
    int64_t before(int64_t position) const {
        return std::lower_bound(position_, position_ + size_, position) - position_;
    }

    // What a sealed page keeps of one head.
    void add_sealed(const SealedPages& in, int64_t page, int64_t head) {
        const HeadRecord r = in.record(page, head);
        const Layout& layout = *in.layout;
        const Payload<const uint8_t> payload{in.arena, in.frames + page * in.frames_stride,
                                             layout.frame_bytes};
        const Sections s = sections(layout, r.n_high, r.n_low);
        const DType raw = static_cast<DType>(in.raw_dtype);
        add_tier(layout, layout.high, payload, r.offset, s.high, r.n_high, raw);
        add_tier(layout, layout.low, payload, r.offset, s.low, r.n_low, raw);
    }

   private:
    // Rows of multiples of 2 KiB would share a few sets of the cache.
    int64_t stride() const { return dim_ + 16; }

    void add_tier(const Layout& layout, Tier tier, const Payload<const uint8_t>& payload,
                  int64_t offset, const TierSections& s, int64_t count, DType raw) {
        Meta meta[kPageTokens];
        if (!tier.raw())
            payload.each_run(offset + s.meta, kMetaBytes, count,
                             [&](const uint8_t* row, int64_t first, int64_t rows) {
                                 for (int64_t i = 0; i < rows; ++i)
                                     meta[first + i] = load_meta(row + i * kMetaBytes);
                             });
        auto read = [&](int64_t section, int64_t bits, float* to, auto&& scale_and_zero) {
            const int64_t bytes = layout.row_bytes(bits);
            payload.each_run(offset + section, bytes, count,
                             [&](const uint8_t* row, int64_t first, int64_t rows) {
                                 for (int64_t i = first; i < first + rows; ++i, row += bytes) {
                                     float* x = to + (size_ + i) * stride();
                                     row_to_float(row, bits, raw, dim_, x);
                                     if (bits) scale_and_zero(meta[i], x);
                                 }
                             });
        };
        auto scaled = [&](float* x, float scale, float zero) {
#pragma omp simd
            for (int64_t d = 0; d < dim_; ++d) x[d] = x[d] * scale + zero;
        };
        read(s.key, tier.key_bits, keys_.data(),
             [&](const Meta& m, float* x) { scaled(x, m.key_scale, m.key_zero); });
        read(s.value, tier.value_bits, values_.data(),
             [&](const Meta& m, float* x) { scaled(x, m.value_scale, m.value_zero); });
        size_ += count;
    }

    int64_t dim_, size_ = 0;
    int64_t position_[kTokens];  // of open pages' tokens
    Floats keys_, values_;
};

}  // namespace diffxkv

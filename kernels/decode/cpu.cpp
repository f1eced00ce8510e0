// SPDX-License-Identifier: Apache-2.0
// Decode attention over sealed and over open pages, behind a plain C ABI (see cpu.py).

#include "open_engine.h"
#include "streams.h"

namespace diffxkv {
namespace {

class SealedWorker {
   public:
    SealedWorker(const Layout& layout, const SealedPages& in, const int32_t* pages, DType raw,
                 int64_t group, SoftCap cap)
        : layout_(layout), in_(in), pages_(pages), streams_(layout, raw, group, cap) {}

    void operator()(const WorkTile& tile, const float* q, const Partial& partial) {
        streams_.begin(q);
        for (int64_t i = tile.first_page; i < tile.last_page; ++i) {
            in_.prefetch(layout_, pages_[std::min(i + kAhead, tile.last_page - 1)], tile.head);
            streams_.push(in_, pages_[i], tile.head);
        }
        streams_.finish(partial);
    }

   private:
    const Layout& layout_;
    const SealedPages& in_;
    const int32_t* pages_;
    SealedStreams streams_;
};

struct OpenPages {
    const uint8_t *key, *value;
    int64_t page_bytes, token_bytes, row_bytes;
    const int32_t *indptr, *slots, *position, *last_len;
    int64_t window_left;  // negative: there is no window

    // What the sequence's query, its last token, sees of page i.
    Span seen(int64_t sequence, int64_t i) const {
        const int64_t last = indptr[sequence + 1] - 1, tokens = last_len[sequence];
        if (window_left < 0) return {0, i == last ? tokens : kPageTokens};
        const int64_t query = position[last] * kPageTokens + tokens - 1;
        return {std::max<int64_t>(query - window_left - position[i] * kPageTokens, 0),
                i == last ? tokens : kPageTokens};
    }
};

template <int Dim>
class OpenWorker {
   public:
    OpenWorker(const OpenPages& in, DType raw, int64_t group, int64_t dim, SoftCap cap)
        : in_(in), engine_(raw, group, 1, dim, cap) {}

    void operator()(const WorkTile& tile, const float* q, const Partial& partial) {
        engine_.begin(q);
        for (int64_t i = tile.first_page; i < tile.last_page; ++i) {
            const Span seen = in_.seen(tile.sequence, i);
            if (seen.first >= seen.end) continue;
            const int64_t at = in_.slots[i] * in_.page_bytes + tile.head * in_.row_bytes;
            engine_.attend(in_.key + at, in_.value + at, in_.token_bytes, &seen, nullptr);
        }
        engine_.finish(partial);
    }

   private:
    const OpenPages& in_;
    OpenEngine<Dim> engine_;
};

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// q: fp32 [B, Hkv * G, D], times scale * log2(e). cap: of scores in base 2; 0: none. out: fp32 like q;
// lse: fp32 [B, Hkv * G].
extern "C" void diffxkv_decode_sealed(const float* q, int64_t batch, int64_t group, float cap,
                                      const SealedTables* tables, const int32_t* indptr,
                                      const int32_t* pages, int64_t raw_dtype, float* out,
                                      float* lse, int64_t threads) {
    const Layout& layout = *tables->layout;
    Shape shape{batch, layout.kv_heads, group, layout.head_dim};
    SealedPages in{tables->arena, tables->frames, tables->heads, tables->frames_stride,
                   tables->heads_stride};
    run_tiles(shape, q, indptr, out, lse, threads,
              [&] { return SealedWorker(layout, in, pages, static_cast<DType>(raw_dtype), group, SoftCap(cap)); });
}

// key, value: [R, 64, Hkv, D] of raw_dtype, page_stride elements from one slot to the next.
extern "C" void diffxkv_decode_open(const float* q, int64_t batch, int64_t group, int64_t kv_heads,
                                    int64_t dim, float cap, int64_t window_left, const uint8_t* key,
                                    const uint8_t* value, int64_t page_stride, int64_t raw_dtype,
                                    const int32_t* indptr, const int32_t* slots,
                                    const int32_t* position, const int32_t* last_len, float* out,
                                    float* lse, int64_t threads) {
    const int64_t itemsize = raw_dtype == kFloat32 ? 4 : 2;
    Shape shape{batch, kv_heads, group, dim};
    OpenPages in{key, value, page_stride * itemsize, kv_heads * dim * itemsize, dim * itemsize,
                 indptr, slots, position, last_len, window_left};
    with_dim(dim, [&](auto known) {
        run_tiles(shape, q, indptr, out, lse, threads, [&] {
            return OpenWorker<known>(in, static_cast<DType>(raw_dtype), group, dim, SoftCap(cap));
        });
    });
}

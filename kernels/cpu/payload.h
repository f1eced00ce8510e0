// SPDX-License-Identifier: Apache-2.0
// Where the bytes of a sealed page lie. Mirrors kernels/layout/page.py, which explains the format.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffxkv {

// Bits per key and value element; 0 stands for raw elements of the model's dtype.
struct Tier {
    int64_t key_bits, value_bits;
    bool raw() const { return key_bits == 0; }
};

// Passed from Python as an array of int64 (kernels/cpu/abi.py: layout_words).
struct Layout {
    int64_t head_dim, kv_heads, raw_itemsize;
    Tier high, low;
    int64_t frame_bytes, max_frames, align;

    int64_t row_bytes(int64_t bits) const {
        return bits ? head_dim * bits / 8 : head_dim * raw_itemsize;
    }
};
static_assert(sizeof(Layout) == 10 * sizeof(int64_t), "abi.py passes ten words");

constexpr uint8_t kLow = 1, kHigh = 2;  // codes of tiers
constexpr int64_t kPageTokens = 64;
constexpr int64_t kMetaBytes = 8;
constexpr int64_t kTokenMetadataBytes = 2;

// Offsets fit 32 bits (the directory holds int32), where division is much cheaper.
inline int64_t divide(int64_t x, int64_t by) {
    return static_cast<uint32_t>(x) / static_cast<uint32_t>(by);
}

inline int64_t align_up(int64_t x, int64_t multiple) {
    return divide(x + multiple - 1, multiple) * multiple;
}

// Byte offsets of one tier's sections, relative to the start of the head's payload.
struct TierSections {
    int64_t key, value, meta;
};

struct Sections {
    TierSections high, low;
    int64_t token_metadata, total;
};

inline Sections sections(const Layout& layout, int64_t n_high, int64_t n_low) {
    int64_t cursor = 0;
    auto take = [&cursor](int64_t n, int64_t row) {
        if (row) cursor = align_up(cursor, row);
        int64_t start = cursor;
        cursor += n * row;
        return start;
    };
    const Tier &high = layout.high, &low = layout.low;
    Sections s;
    s.high.key = take(n_high, layout.row_bytes(high.key_bits));
    s.high.value = take(n_high, layout.row_bytes(high.value_bits));
    s.low.key = take(n_low, layout.row_bytes(low.key_bits));
    s.low.value = take(n_low, layout.row_bytes(low.value_bits));
    s.high.meta = take(n_high, high.raw() ? 0 : kMetaBytes);
    s.low.meta = take(n_low, low.raw() ? 0 : kMetaBytes);
    s.token_metadata = take(n_high + n_low, kTokenMetadataBytes);
    s.total = align_up(cursor, layout.align);
    return s;
}

// One head's record in the page directory: int32 [2].
struct HeadRecord {
    int64_t offset, n_high, n_low;
};

inline HeadRecord head_record(const int32_t* words) {
    return {words[0], words[1] & 0xff, (words[1] >> 8) & 0xff};
}

// The virtual byte space of one (page, layer). Byte is uint8_t or const uint8_t.
template <class Byte>
struct Payload {
    Byte* arena;            // [F, frame_bytes]
    const int32_t* frames;  // [max_frames] of this (page, layer)
    int64_t frame_bytes;

    // Calls f(Byte* first_row, int64_t index_of_first_row, int64_t rows) for each stretch of rows
    // that lies contiguously in one frame. No row straddles two frames.
    template <class F>
    void each_run(int64_t offset, int64_t row_bytes, int64_t count, F&& f) const {
        int64_t frame = divide(offset, frame_bytes), inside = offset - frame * frame_bytes;
        for (int64_t row = 0; row < count; ++frame, inside = 0) {
            int64_t rows = count - row;
            if (inside + rows * row_bytes > frame_bytes)
                rows = divide(frame_bytes - inside, row_bytes);
            f(arena + static_cast<int64_t>(frames[frame]) * frame_bytes + inside, row, rows);
            row += rows;
        }
    }

    // The byte at a position, and what follows it in its row.
    Byte* at(int64_t offset) const {
        const int64_t frame = divide(offset, frame_bytes), inside = offset - frame * frame_bytes;
        return arena + static_cast<int64_t>(frames[frame]) * frame_bytes + inside;
    }
};

// Sealed pages of one layer: kernels/pages.py has them by the same name, abi.py passes the words.
struct SealedTables {
    const Layout* layout;
    uint8_t* arena;         // [F, frame_bytes]
    const int32_t* frames;  // [V, max_frames], strided by page
    int64_t frames_stride;
    const int32_t* heads;  // [V, H, 2], strided by page
    int64_t heads_stride;

    HeadRecord record(int64_t page, int64_t head) const {
        return head_record(heads + page * heads_stride + 2 * head);
    }
    Payload<uint8_t> payload(int64_t page) const {
        return {arena, frames + page * frames_stride, layout->frame_bytes};
    }
};

}  // namespace diffxkv

// SPDX-License-Identifier: Apache-2.0
// What layer.py passes of a decode step, as words of 64 bits, and the pages that its queries see.
#pragma once

#include <algorithm>
#include <vector>

#include "open_engine.h"
#include "payload.h"

namespace diffxkv {

// Everything that stays while the server runs. arena is null where no layer has sealed pages; then
// of the layout only the shape of raw pages counts.
struct Tables {
    const Layout* layout;
    int64_t raw_dtype;
    const float* key_means;  // [L, H, D], which sealed keys lack; null: they are the model's own
    const uint8_t* arena;
    const int32_t *frames, *heads;
    int64_t frames_layer, frames_page, heads_layer, heads_page;  // strides in int32 words
    const int32_t* raw_slot;
    uint8_t *const *keys, *const *values;  // by layer: [R, 64, H, D] of raw_dtype
    float* scores;                         // [L, R, H, 64]; null: nothing is scored
    int64_t scores_layer;
};
static_assert(sizeof(Tables) == 15 * 8, "layer.py passes 15 words");

// The batch. Pages of sequence b are table[b * width + ...].
struct Batch {
    int64_t size, width;
    const int32_t *table, *lengths;
    const int64_t* rows;  // [size * queries], of raw pages, for the new tokens
    int64_t queries;      // new tokens of each sequence
    int64_t threads;

    // Position of new token i of a sequence.
    int64_t position(int64_t sequence, int64_t i) const { return lengths[sequence] - queries + i; }
};
static_assert(sizeof(Batch) == 7 * 8, "layer.py passes 7 words");

// Of one layer.
struct Softmax {
    float scale;  // of q.k, times log2(e)
    SoftCap cap;
    int64_t window_left;  // tokens before it that a query sees; negative: all
    const float* sinks;   // [Hq], logits; or null
};

struct OpenPage {
    int64_t sequence, place, slot;

    // What new token i of the sequence sees of it.
    Span seen(const Batch& batch, int64_t window_left, int64_t i) const {
        auto within = [&](int64_t position) {
            return std::clamp<int64_t>(position - place * kPageTokens, 0, kPageTokens);
        };
        const int64_t own = batch.position(sequence, i);
        return {window_left < 0 ? 0 : within(own - window_left), within(own + 1)};
    }
};

// The pages that some query of the batch sees, numbered sequence by sequence.
struct Pages {
    std::vector<int32_t> first;   // [B + 1]
    std::vector<int32_t> id;      // of each
    std::vector<int32_t> opened;  // of each: its number among the open ones, or -1
    std::vector<OpenPage> open;

    Pages(const Tables& tables, const Batch& batch, int64_t window_left) : first(batch.size + 1) {
        for (int64_t b = 0; b < batch.size; ++b) {
            const int64_t count = (batch.lengths[b] + kPageTokens - 1) / kPageTokens;
            const int64_t hidden =
                window_left < 0 ? 0 : std::max<int64_t>(batch.position(b, 0) - window_left, 0);
            for (int64_t place = hidden / kPageTokens; place < count; ++place)
                add(tables, batch.table[b * batch.width + place], {b, place, 0});
            first[b + 1] = static_cast<int32_t>(id.size());
        }
    }

   private:
    void add(const Tables& tables, int32_t page, OpenPage at) {
        at.slot = tables.raw_slot[page];
        if (at.slot < 0 && !tables.arena) return;
        id.push_back(page);
        opened.push_back(at.slot < 0 ? -1 : static_cast<int32_t>(open.size()));
        if (at.slot >= 0) open.push_back(at);
    }
};

}  // namespace diffxkv

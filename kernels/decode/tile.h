// SPDX-License-Identifier: Apache-2.0
// A tile: up to kTile tokens of one tier and KV head, gathered from as many pages as it takes, so
// that the arithmetic works on full blocks however few tokens a page has kept.
#pragma once

#include <cstdint>

#include "payload.h"

namespace diffxkv {

constexpr int64_t kTile = 128;

constexpr int64_t kStep = 8;

struct Tile {
    int64_t n = 0;
    const uint8_t* key[kTile + kStep];
    const uint8_t* value[kTile + kStep];
    const uint8_t* meta[kTile + kStep];  // of four fp16 each; unused by raw tiers
};

// Addresses of `count` adjacent rows, written kStep at a time (a few percent faster than a loop over
// each run's own length): up to kStep - 1 entries beyond the last are overwritten, which the rows
// that follow put right.
inline void set_rows(const uint8_t** to, const uint8_t* row, int64_t row_bytes, int64_t count) {
    for (int64_t i = 0; i < count; i += kStep, row += kStep * row_bytes)
        for (int64_t j = 0; j < kStep; ++j) to[i + j] = row + j * row_bytes;
}

inline void prefetch_bytes(const uint8_t* begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i);
}

// Fetches the rows of the tile to come, a few at a time between pieces of arithmetic: a core has
// some ten line fill buffers, and a burst of requests would wait for them.
class TileFetcher {
   public:
    TileFetcher(const Tile& tile, int64_t key_bytes, int64_t value_bytes)
        : tile_(tile), key_bytes_(key_bytes), value_bytes_(value_bytes) {}

    void fetch(int64_t rows) {
        for (; rows > 0 && key_ < tile_.n; --rows) prefetch_bytes(tile_.key[key_++], key_bytes_);
        for (; rows > 0 && value_ < tile_.n; --rows)
            prefetch_bytes(tile_.value[value_++], value_bytes_);
    }

   private:
    const Tile& tile_;
    int64_t key_bytes_, value_bytes_, key_ = 0, value_ = 0;
};

}  // namespace diffxkv

// SPDX-License-Identifier: Apache-2.0
// A tile: up to kTile tokens of one tier and KV head, gathered from as many pages as it takes, so
// that the arithmetic works on full blocks however few tokens a page has kept.
#pragma once

#include <cstdint>

#include "payload.h"

namespace diffxkv {

constexpr int64_t kTile = 128;

struct Tile {
    int64_t n = 0;
    const uint8_t* key[kTile];
    const uint8_t* value[kTile];
    const uint8_t* meta[kTile];  // of four fp16 each; unused by raw tiers
};

// Fetch ahead into L2: a tile is worked on only when full, long after its rows are known.
inline void prefetch_bytes(const uint8_t* begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
}

}  // namespace diffxkv

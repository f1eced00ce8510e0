// SPDX-License-Identifier: Apache-2.0
// Attention of one group of query rows over the tokens of one tier, a tile at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "exp2.h"
#include "softcap.h"
#include "tile.h"

namespace diffxkv {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Unnormalised result of a group over some tokens; scores are in base 2. Its rows are the query
// heads of one KV head, for each of a sequence's new tokens.
struct Partial {
    float* max;  // [G], -inf: nothing attended
    float* sum;  // [G]
    float* out;  // [G, D]
};

class Engine {
   public:
    virtual ~Engine() = default;
    // Starts a new group; q: [G, D], already times scale * log2(e).
    virtual void begin(const float* q) = 0;
    // Attends to tile.n > 0 tokens and fetches the rows of `next` meanwhile. May write to the tile
    // beyond n.
    virtual void process(Tile& tile, const Tile& next) = 0;
    // Merges what was attended since begin() into `partial`.
    virtual void finish(const Partial& partial) = 0;
};

// Running softmax of one query row.
struct RunningSoftmax {
    float max, sum;

    void reset() { max = kMinusInf, sum = 0.f; }

    // Turns base-2 scores [n] into weights exp2(score - max) in place; returns the factor by which
    // what was accumulated before must be scaled.
    float absorb(float* scores, int64_t n) {
        float top = max;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < n; ++i) top = scores[i] > top ? scores[i] : top;
        float factor = std::exp2(max - top), total = 0.f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; ++i) {
            scores[i] = fast_exp2(scores[i] - top);
            total += scores[i];
        }
        sum = sum * factor + total;
        max = top;
        return factor;
    }
};

// partial[g] += other, both unnormalised; `element(d)` is element d of the other's output.
template <class Element>
inline void merge_group(const Partial& partial, int64_t g, int64_t dim, RunningSoftmax other,
                        Element&& element) {
    if (other.max == kMinusInf) return;
    float top = std::max(partial.max[g], other.max);
    float old = std::exp2(partial.max[g] - top), now = std::exp2(other.max - top);
    float* out = partial.out + g * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = out[d] * old + element(d) * now;
    partial.sum[g] = partial.sum[g] * old + other.sum * now;
    partial.max[g] = top;
}

}  // namespace diffxkv

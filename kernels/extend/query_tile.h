// SPDX-License-Identifier: Apache-2.0
// Attention of a tile of query rows, which are a sequence's new tokens times its GQA group: row r is
// query head r % group of new token r / group. Lanes of a vector are rows: scores are kept
// transposed, so that the maxima and sums of a softmax need no lane to meet another.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exp2.h"
#include "panel.h"
#include "softcap.h"

namespace diffxkv {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kColumns = kVectors * kLanes;  // rows of a block

// New queries of all sequences; the members match QueryArgs of cpu.py.
struct Queries {
    const uint8_t* data;         // [T, Hq, D]
    int64_t token_stride, dtype;  // in elements; DType
    const int32_t* indptr;       // [B + 1]
    int64_t batch, kv_heads, group, dim;
    double scale, cap;    // of scores, to base 2; of scores in base 2, 0: none
    int64_t window_left;  // tokens of open pages before it that a query sees; negative: all
    const float* sinks;   // [Hq], logits; or null
};

// Rows [first, first + count) of one sequence and KV head.
struct Rows {
    int64_t sequence, head, first, count;
};

// Normalised output fp32 [T, Hq, D] and base-2 LSE [T, Hq]. sinks: [Hq], to be counted in; or null.
struct Output {
    float *out, *lse;
    const float* sinks;
};

// A query head's sink in base 2; -inf: it has none.
inline float sink_of(const Output& to, int64_t head) {
    return to.sinks ? to.sinks[head] * kLog2E : kMinusInf;
}

class QueryTile {
   public:
    QueryTile(const Queries& in, int64_t most_rows)
        : in_(in), cap_(static_cast<float>(in.cap)),
          scores_(Panel::kTokens * kColumns + kStrip * kColumns),
          row_(kLanes * in.dim) {
        for (int64_t r = 0; r < most_rows; r += kColumns) blocks_.emplace_back(in.dim);
    }

    // Starts with other rows, which have attended to nothing.
    void begin(const Rows& rows) {
        rows_ = rows;
        for (int64_t b = 0; b < used_blocks(); ++b) {
            Block& block = blocks_[b];
            std::fill_n(block.out.data(), in_.dim * kColumns, 0.f);
            for (int v = 0; v < kVectors; ++v)
                block.max[v] = broadcast(kMinusInf), block.sum[v] = Lanes{};
        }
    }

    // Reads the queries that the next panels will meet; rotates them if so wanted.
    void load(bool rotated) {
        for (int64_t r = 0; r < rows_.count; r += kLanes) {
            Block& block = blocks_[r / kColumns];
            load_lanes_of(r, block.q.data() + r % kColumns);
            if (rotated) rotate(block.q.data() + r % kColumns);
        }
    }

    // Back from the basis of sealed pages (kernels/basis/sealed.py), in which the queries still are,
    // and the mean.
    void leave_sealed(const float* key_mean) {
        for (int64_t r = 0; r < rows_.count; r += kLanes) {
            Block& block = blocks_[r / kColumns];
            const int64_t column = r % kColumns;
            Lanes lacking{};
            for (int64_t d = 0; d < in_.dim; ++d)
                lacking += load_lanes(block.q.data() + d * kColumns + column) * key_mean[d];
            block.max[column / kLanes] += lacking;
            rotate(block.out.data() + column);
        }
    }

    // Every row attends to the whole panel.
    void attend(const Panel& panel) {
        for (int64_t b = 0; b < used_blocks(); ++b) attend_block(b, panel, panel.size(), nullptr);
    }

    // The panel has tokens of open pages, of which a row sees those up to its own, as far back as its
    // window reaches. position: of the sequence's first query.
    void attend_causal(const Panel& panel, int64_t position) {
        for (int64_t b = 0; b < used_blocks(); ++b) {
            const int64_t row = rows_.first + b * kColumns;
            const int64_t last = std::min(row + kColumns, rows_.first + rows_.count) - 1;
            auto first_of = [&](int64_t r) {
                const int64_t own = position + r / in_.group;
                return in_.window_left < 0 ? 0 : panel.before(own - in_.window_left);
            };
            auto end_of = [&](int64_t r) { return panel.before(position + r / in_.group + 1); };
            const int64_t n = end_of(last);
            if (first_of(row) >= n) continue;
            const bool masked = end_of(row) < n || first_of(last) > 0;
            Mask mask;
            for (int64_t i = 0; masked && i < kColumns; ++i) {
                mask.first[i] = static_cast<float>(first_of(row + i));
                mask.end[i] = static_cast<float>(end_of(row + i));
            }
            attend_block(b, panel, n, masked ? &mask : nullptr);
        }
    }

    void finish(const Output& to) {
        for (int64_t r = 0; r < rows_.count; r += kLanes) finish_lanes(r, to);
    }

   private:
    struct Block {
        explicit Block(int64_t dim) : q(dim * kColumns), out(dim * kColumns) {}
        Floats q, out;  // [D, kColumns]
        Lanes max[kVectors], sum[kVectors];
    };

    // Tokens [first, end) of a panel that each row sees.
    struct Mask {
        alignas(64) float first[kColumns], end[kColumns];
    };

    int64_t used_blocks() const { return (rows_.count + kColumns - 1) / kColumns; }

    // Row r of this tile as new token and query head.
    std::pair<int64_t, int64_t> query(int64_t r) const {
        const int64_t row = rows_.first + r;
        return {in_.indptr[rows_.sequence] + row / in_.group,
                rows_.head * in_.group + row % in_.group};
    }

    void load_lanes_of(int64_t r, float* to) {
        const int64_t dim = in_.dim, itemsize = in_.dtype == kFloat32 ? 4 : 2;
        const int64_t count = std::min<int64_t>(kLanes, rows_.count - r);
        std::fill_n(row_.data() + count * dim, (kLanes - count) * dim, 0.f);
        for (int64_t i = 0; i < count; ++i) {
            const auto [token, head] = query(r + i);
            row_to_float(in_.data + (token * in_.token_stride + head * dim) * itemsize, 0,
                         static_cast<DType>(in_.dtype), dim, row_.data() + i * dim);
        }
        for (int64_t d = 0; d < dim; d += kLanes) {
            Lanes square[kLanes];
            for (int i = 0; i < kLanes; ++i)
                square[i] = load_lanes(row_.data() + i * dim + d) * static_cast<float>(in_.scale);
            transpose(square);
            for (int i = 0; i < kLanes; ++i) store_lanes(to + (d + i) * kColumns, square[i]);
        }
    }

    // Block Hadamard transform over head_dim of kLanes columns: `rotate` of kernels/basis/rotation.py.
    void rotate(float* q) {
        const int64_t block = in_.dim & -in_.dim;
        const float scale = 1.f / std::sqrt(static_cast<float>(block));
        for (int64_t width = 1; width < block; width *= 2)
            for (int64_t d = 0; d < in_.dim; ++d) {
                if (d & width) continue;
                float *a = q + d * kColumns, *b = a + width * kColumns;
                const Lanes x = load_lanes(a), y = load_lanes(b);
                const float s = 2 * width == block ? scale : 1.f;
                store_lanes(a, (x + y) * s);
                store_lanes(b, (x - y) * s);
            }
    }

    void attend_block(int64_t b, const Panel& panel, int64_t n, const Mask* mask) {
        const int64_t vectors = (rows_.count - b * kColumns + kLanes - 1) / kLanes;
        switch (std::min<int64_t>(vectors, kVectors)) {
            case 1: return attend_vectors<1>(blocks_[b], panel, n, mask);
            case 2: return attend_vectors<2>(blocks_[b], panel, n, mask);
            default: return attend_vectors<3>(blocks_[b], panel, n, mask);
        }
    }

    template <int V>
    void attend_vectors(Block& block, const Panel& panel, int64_t n, const Mask* mask) {
        float* scores = scores_.data();
        for (int64_t t = 0; t < n; t += kStrip)
            multiply_strip<V, false>(panel.keys(t), block.q.data(), in_.dim, nullptr,
                                     scores + t * kColumns);
        if (cap_.on())
            for (int64_t t = 0; t < n; ++t) cap_.apply(scores + t * kColumns, V * kLanes);
        Lanes fade[V];
        for (int v = 0; v < V; ++v) {
            Lanes top = block.max[v];
            for (int64_t t = 0; t < n; ++t) {
                float* at = scores + t * kColumns + v * kLanes;
                Lanes x = load_lanes(at);
                if (mask) {
                    const Lanes token = broadcast(static_cast<float>(t));
                    x = load_lanes(mask->end + v * kLanes) > token ? x : broadcast(kMinusInf);
                    x = load_lanes(mask->first + v * kLanes) > token ? broadcast(kMinusInf) : x;
                    store_lanes(at, x);
                }
                top = max_lanes(top, x);
            }
            fade[v] = fast_exp2(block.max[v] - top);
            Lanes sum = block.sum[v] * fade[v];
            for (int64_t t = 0; t < n; ++t) {
                float* at = scores + t * kColumns + v * kLanes;
                const Lanes weight = fast_exp2(load_lanes(at) - top);
                store_lanes(at, weight);
                sum += weight;
            }
            block.max[v] = top, block.sum[v] = sum;
        }
        for (int64_t d = 0; d < in_.dim; d += kStrip)
            multiply_strip<V, true>(panel.values(d), scores, n, fade,
                                    block.out.data() + d * kColumns);
    }

    void finish_lanes(int64_t r, const Output& to) {
        const Block& block = blocks_[r / kColumns];
        const int64_t v = r % kColumns / kLanes, dim = in_.dim;
        const int64_t heads = in_.kv_heads * in_.group;
        const int64_t count = std::min<int64_t>(kLanes, rows_.count - r);
        float* rows[kLanes];
        Lanes factor{};
        for (int64_t i = 0; i < count; ++i) {
            const auto [token, head] = query(r + i);
            const int64_t at = token * heads + head;
            const float max = block.max[v][i], sink = sink_of(to, head), top = std::max(max, sink);
            rows[i] = to.out + at * dim;
            factor[i] = 0.f, to.lse[at] = kMinusInf;
            if (top == kMinusInf) continue;
            const float weight = std::exp2(max - top);
            const float sum = block.sum[v][i] * weight + std::exp2(sink - top);
            factor[i] = weight / sum;
            to.lse[at] = top + std::log2(sum);
        }
        for (int64_t d = 0; d < dim; d += kLanes) {
            Lanes square[kLanes];
            for (int i = 0; i < kLanes; ++i)
                square[i] = load_lanes(block.out.data() + (d + i) * kColumns + v * kLanes) * factor;
            transpose(square);
            for (int64_t i = 0; i < count; ++i) store_lanes(rows[i] + d, square[i]);
        }
    }

    const Queries& in_;
    const SoftCap cap_;
    Rows rows_{};
    std::vector<Block> blocks_;
    Floats scores_, row_;  // [tokens, kColumns]; [kLanes, D]
};

}  // namespace diffxkv

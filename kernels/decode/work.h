// SPDX-License-Identifier: Apache-2.0
// Work tiles of split-KV decode: (sequence, range of its pages, KV head), merged at the end.
#pragma once

#include <atomic>
#include <vector>

#include "engine.h"
#include "pool.h"

namespace diffxkv {

// group: query rows of a KV head, those of all new tokens of a sequence.
struct Shape {
    int64_t batch, kv_heads, group, dim;
};

struct WorkTile {
    int64_t sequence, head, first_page, last_page;
};

// Sequences cut into equal ranges of pages, all heads of a range side by side.
class WorkTiles {
   public:
    WorkTiles(const Shape& shape, const int32_t* indptr, int64_t threads) : shape_(shape) {
        // About 16 tiles per thread level out ragged lengths; a range shorter than 8 pages would
        // not fill the tiles. One thread alone gains nothing from cutting.
        const int64_t pages = indptr[shape.batch] - indptr[0];
        const int64_t wanted = 16 * threads;
        int64_t range = (pages * shape.kv_heads + wanted - 1) / wanted;
        if (range < 8) range = 8;
        if (threads == 1) range = pages + 1;
        first_.push_back(0);
        for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t p = indptr[b]; p < indptr[b + 1]; p += range)
                ranges_.push_back({b, 0, p, std::min<int64_t>(p + range, indptr[b + 1])});
            first_.push_back(static_cast<int64_t>(ranges_.size()));
        }
        const int64_t rows = size() * shape.group;
        max_.assign(rows, kMinusInf);
        sum_.assign(rows, 0.f);
        out_.assign(rows * shape.dim, 0.f);
    }

    int64_t size() const { return static_cast<int64_t>(ranges_.size()) * shape_.kv_heads; }

    WorkTile tile(int64_t i) const {
        WorkTile tile = ranges_[i / shape_.kv_heads];
        tile.head = i % shape_.kv_heads;
        return tile;
    }

    Partial partial(int64_t i) {
        const int64_t row = i * shape_.group;
        return {&max_[row], &sum_[row], &out_[row * shape_.dim]};
    }

    // Merges the tiles of one (sequence, head) into out [group, dim] and lse [group]. sinks: [group],
    // logits in base 2 that take weight and give nothing; or null.
    void merge(int64_t sequence, int64_t head, const float* sinks, float* out, float* lse) const {
        const int64_t dim = shape_.dim;
        for (int64_t g = 0; g < shape_.group; ++g) {
            auto row = [&](int64_t r) { return (r * shape_.kv_heads + head) * shape_.group + g; };
            const int64_t begin = first_[sequence], end = first_[sequence + 1];
            float top = kMinusInf, total = 0.f, *to = out + g * dim;
            for (int64_t r = begin; r < end; ++r) top = std::max(top, max_[row(r)]);
            if (sinks) top = std::max(top, sinks[g]), total = std::exp2(sinks[g] - top);
            std::fill(to, to + dim, 0.f);
            lse[g] = kMinusInf;
            if (top == kMinusInf) continue;
            for (int64_t r = begin; r < end; ++r) {
                float weight = std::exp2(max_[row(r)] - top);
                total += weight * sum_[row(r)];
                const float* from = &out_[row(r) * dim];
                for (int64_t d = 0; d < dim; ++d) to[d] += weight * from[d];
            }
            for (int64_t d = 0; d < dim; ++d) to[d] /= total;
            lse[g] = top + std::log2(total);
        }
    }

   private:
    Shape shape_;
    std::vector<WorkTile> ranges_;
    std::vector<int64_t> first_;  // [batch + 1]: first range of each sequence
    std::vector<float> max_, sum_, out_;
};

// Runs every tile and writes out [B, Hkv * G, D] and lse [B, Hkv * G]. `make_worker()` is called
// once per thread; the worker is called as worker(tile, q, partial).
template <class MakeWorker>
void run_tiles(const Shape& shape, const float* q, const int32_t* indptr, float* out, float* lse,
               int64_t threads, MakeWorker&& make_worker) {
    WorkTiles tiles(shape, indptr, threads);
    const int64_t count = tiles.size(), rows = shape.batch * shape.kv_heads;
    std::atomic<int64_t> next_tile{0}, next_row{0};
    Pool::instance().run(threads, [&] {
        auto worker = make_worker();
        for (int64_t i; (i = next_tile.fetch_add(1)) < count;) {
            WorkTile tile = tiles.tile(i);
            int64_t row = (tile.sequence * shape.kv_heads + tile.head) * shape.group;
            worker(tile, q + row * shape.dim, tiles.partial(i));
        }
    });
    Pool::instance().run(threads, [&] {
        for (int64_t r; (r = next_row.fetch_add(1)) < rows;)
            tiles.merge(r / shape.kv_heads, r % shape.kv_heads, nullptr,
                        out + r * shape.group * shape.dim, lse + r * shape.group);
    });
}

}  // namespace diffxkv

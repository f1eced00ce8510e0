// SPDX-License-Identifier: Apache-2.0
// The pages of a decode step, looked up, and their use recorded (see cpu.py and naive.py).

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kPageTokens = 64;

// cpu.py passes words of 64 bits. Tables of the page directory, by virtual page; counts: fp32
// [R, 64] by raw slot, or null.
struct PageMetadata {
    const int32_t* raw_slot;
    const bool* sealed;
    int32_t *position, *context, *filled;
    int64_t *window_step, *last_used;
    float* counts;
};

struct StepPages {
    int32_t* table;
    int64_t width;
    int32_t *lengths, *count, *last_len;
    int64_t* rows;  // [batch * queries]
};

}  // namespace

// Returns whether every page is open or sealed; rows of padding, from num_real on, have none.
extern "C" bool diffxkv_begin_decode(const int32_t* req_to_token, int64_t context,
                                     const int64_t* req_pool_indices, const int64_t* seq_lens,
                                     int64_t batch, int64_t num_real, int64_t queries, int64_t step,
                                     int64_t decode_step, int64_t window,
                                     const PageMetadata* metadata, const StepPages* out) {
    const PageMetadata& d = *metadata;
    bool known = true;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = b < num_real ? seq_lens[b] : 0;
        const int64_t count = (length + kPageTokens - 1) / kPageTokens;
        out->lengths[b] = static_cast<int32_t>(length);
        out->count[b] = static_cast<int32_t>(count);
        out->last_len[b] = static_cast<int32_t>(length ? (length - 1) % kPageTokens + 1 : 0);
        int64_t* rows = out->rows + b * queries;
        std::fill_n(rows, queries, 0);
        const int64_t first = length - queries, accepted = first + 1;
        const int32_t* tokens = req_to_token + req_pool_indices[b] * context;
        for (int64_t place = 0; place < count; ++place) {
            const int32_t page = tokens[place * kPageTokens] / kPageTokens;
            const int64_t begin = place * kPageTokens, slot = d.raw_slot[page];
            out->table[b * out->width + place] = page;
            d.last_used[page] = step;
            if (slot < 0) {
                known = known && d.sealed[page];
                continue;
            }
            for (int64_t t = std::max(first, begin); t < std::min(length, begin + kPageTokens); ++t)
                rows[t - first] = slot * kPageTokens + t - begin;
            d.position[page] = static_cast<int32_t>(place);
            d.context[page] = static_cast<int32_t>(accepted);
            d.filled[page] =
                static_cast<int32_t>(std::clamp<int64_t>(accepted - begin, 0, kPageTokens));
            if (begin + kPageTokens > accepted - window) d.window_step[page] = decode_step;
            if (!d.counts) continue;
            const int64_t earlier = std::min(kPageTokens, accepted - 1 - begin);
            float* to = d.counts + slot * kPageTokens;
            for (int64_t t = 0; t < earlier; ++t) to[t] += 1.f;
        }
    }
    return known;
}

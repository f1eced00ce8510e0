// SPDX-License-Identifier: Apache-2.0
// Writing and reading sealed payload. The bytes equal those of naive.py; kernels/layout/page.py has
// the format. One work item is one head of one page. Strides are in elements.

#include <atomic>
#include <vector>

#include "payload.h"
#include "pool.h"
#include "quantize.h"

namespace diffxkv {
namespace {

// Raw pages [R, 64, H, D] of one side (keys or values), `stride` elements apart.
struct RawPages {
    const uint8_t* data;
    int64_t stride;
};

struct RawTokens {
    RawPages keys, values;
    int64_t dtype;
    const int64_t* slots;  // [S]
    int64_t pages;         // S
};

struct Rows {
    uint8_t *keys, *values;   // [rows, D]
    uint8_t* token_metadata;  // [rows, 2] or null
    int64_t dtype;            // of keys and values
};

int64_t itemsize(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Calls body(page, head, row) for all heads of all pages; row is scratch of D floats.
template <class Body>
void each_head(int64_t pages, const Layout& layout, int64_t threads, Body&& body) {
    std::atomic<int64_t> next{0};
    Pool::instance().run(threads, [&] {
        std::vector<float> row(layout.head_dim);
        for (int64_t item; (item = next.fetch_add(1)) < pages * layout.kv_heads;)
            body(item / layout.kv_heads, item % layout.kv_heads, row.data());
    });
}

// Tokens of one head that go to one tier, in position order.
struct Chosen {
    int64_t count = 0;
    uint8_t tokens[kPageTokens];
};

Chosen tokens_of_tier(const uint8_t* tiers, uint8_t code) {
    Chosen chosen;
    for (int64_t token = 0; token < kPageTokens; ++token)
        if (tiers[token] == code) chosen.tokens[chosen.count++] = static_cast<uint8_t>(token);
    return chosen;
}

// One head of one page, as it lies in the arena.
struct Head {
    const Layout& layout;
    Payload<uint8_t> payload;
    HeadRecord record;
    Sections at;

    Head(const SealedTables& tables, int64_t page, int64_t head)
        : layout(*tables.layout), payload(tables.payload(page)),
          record(tables.record(page, head)),
          at(sections(layout, record.n_high, record.n_low)) {}

    const Tier& tier(uint8_t code) const { return code == kHigh ? layout.high : layout.low; }
    const TierSections& starts(uint8_t code) const { return code == kHigh ? at.high : at.low; }
    int64_t count(uint8_t code) const { return code == kHigh ? record.n_high : record.n_low; }
};

// Writes the key or value rows of one tier; `meta` is the first scale of the side, 4 words a token.
void write_rows(const Head& head, int64_t start, int64_t bits, const uint8_t* first, DType dtype,
                const Chosen& chosen, float* row, Half* meta) {
    const int64_t dim = head.layout.head_dim, row_bytes = head.layout.row_bytes(bits);
    const int64_t token_bytes = head.layout.kv_heads * dim * itemsize(dtype);
    auto write = [&](uint8_t* out, int64_t at, int64_t rows) {
        for (int64_t i = at; i < at + rows; ++i, out += row_bytes) {
            const uint8_t* source = first + chosen.tokens[i] * token_bytes;
            if (bits == 0) {
                std::memcpy(out, source, row_bytes);
                continue;
            }
            row_to_float(source, 0, dtype, dim, row);
            quantize_row(row, dim, bits, out, meta + 4 * i);
        }
    };
    head.payload.each_run(head.record.offset + start, row_bytes, chosen.count, write);
}

void pack_head(const Head& head, const RawTokens& raw, int64_t page, int64_t number,
               const uint8_t* tiers, const uint8_t* importance, float* row) {
    const auto dtype = static_cast<DType>(raw.dtype);
    auto first = [&](const RawPages& side) {
        const int64_t at = raw.slots[page] * side.stride + number * head.layout.head_dim;
        return side.data + at * itemsize(dtype);
    };
    int64_t metadata = head.record.offset + head.at.token_metadata;
    for (uint8_t code : {kHigh, kLow}) {
        const Tier& tier = head.tier(code);
        const TierSections& start = head.starts(code);
        const Chosen chosen = tokens_of_tier(tiers, code);
        Half meta[kPageTokens][4];
        write_rows(head, start.key, tier.key_bits, first(raw.keys), dtype, chosen, row, meta[0]);
        write_rows(head, start.value, tier.value_bits, first(raw.values), dtype, chosen, row,
                   meta[0] + 2);
        if (!tier.raw())
            head.payload.each_run(head.record.offset + start.meta, kMetaBytes, chosen.count,
                                  [&](uint8_t* out, int64_t i, int64_t rows) {
                                      std::memcpy(out, meta[i], rows * kMetaBytes);
                                  });
        head.payload.each_run(metadata, kTokenMetadataBytes, chosen.count,
                              [&](uint8_t* out, int64_t i, int64_t rows) {
                                  for (const int64_t end = i + rows; i < end; ++i) {
                                      *out++ = chosen.tokens[i];
                                      *out++ = importance[chosen.tokens[i]];
                                  }
                              });
        metadata += chosen.count * kTokenMetadataBytes;
    }
}

// Reads the key or value rows of one tier into consecutive rows of `dtype`.
void read_rows(const Head& head, uint8_t code, int64_t start, int64_t bits, DType raw,
               const float (*scales)[2], float* row, DType dtype, uint8_t* out) {
    const int64_t dim = head.layout.head_dim, row_bytes = head.layout.row_bytes(bits);
    auto read = [&](const uint8_t* data, int64_t i, int64_t rows) {
        for (const int64_t end = i + rows; i < end; ++i, data += row_bytes) {
            uint8_t* to = out + i * dim * itemsize(dtype);
            float* x = dtype == kFloat32 ? reinterpret_cast<float*>(to) : row;
            row_to_float(data, bits, raw, dim, x);
            if (bits) {
                const float scale = scales[i][0], zero = scales[i][1];
#pragma omp simd
                for (int64_t j = 0; j < dim; ++j) x[j] = x[j] * scale + zero;
            }
            if (dtype != kFloat32) float_to_row(x, dtype, dim, to);
        }
    };
    head.payload.each_run(head.record.offset + start, row_bytes, head.count(code), read);
}

void unpack_head(const Head& head, DType raw, const Rows& rows, int64_t first, float* row) {
    const auto dtype = static_cast<DType>(rows.dtype);
    int64_t done = first;
    for (uint8_t code : {kHigh, kLow}) {
        const Tier& tier = head.tier(code);
        const TierSections& start = head.starts(code);
        float keys[kPageTokens][2], values[kPageTokens][2];  // scale and zero
        if (!tier.raw())
            head.payload.each_run(head.record.offset + start.meta, kMetaBytes, head.count(code),
                                  [&](const uint8_t* data, int64_t i, int64_t n) {
                                      for (const int64_t end = i + n; i < end;
                                           ++i, data += kMetaBytes) {
                                          const Meta meta = load_meta(data);
                                          keys[i][0] = meta.key_scale, keys[i][1] = meta.key_zero;
                                          values[i][0] = meta.value_scale;
                                          values[i][1] = meta.value_zero;
                                      }
                                  });
        const int64_t at = done * head.layout.head_dim * itemsize(dtype);
        read_rows(head, code, start.key, tier.key_bits, raw, keys, row, dtype, rows.keys + at);
        read_rows(head, code, start.value, tier.value_bits, raw, values, row, dtype,
                  rows.values + at);
        done += head.count(code);
    }
    if (rows.token_metadata)
        head.payload.each_run(head.record.offset + head.at.token_metadata, kTokenMetadataBytes,
                              done - first, [&](const uint8_t* data, int64_t i, int64_t n) {
                                  std::memcpy(rows.token_metadata +
                                                  (first + i) * kTokenMetadataBytes,
                                              data, n * kTokenMetadataBytes);
                              });
}

// Copies the rows of tokens that are of this tier in both payloads.
void copy_tier(const Head& from, const uint8_t* from_tiers, const Head& to,
               const uint8_t* to_tiers, uint8_t code) {
    const Tier& tier = from.tier(code);
    const TierSections &source = from.starts(code), &target = to.starts(code);
    auto copy = [&](int64_t start, int64_t i, int64_t end, int64_t j, int64_t bytes) {
        std::memcpy(to.payload.at(to.record.offset + end + j * bytes),
                    from.payload.at(from.record.offset + start + i * bytes), bytes);
    };
    int64_t i = 0, j = 0;  // ordinals of the token in either tier
    for (int64_t token = 0; token < kPageTokens; ++token) {
        const bool leaves = from_tiers[token] == code, comes = to_tiers[token] == code;
        if (leaves && comes) {
            copy(source.key, i, target.key, j, from.layout.row_bytes(tier.key_bits));
            copy(source.value, i, target.value, j, from.layout.row_bytes(tier.value_bits));
            if (!tier.raw()) copy(source.meta, i, target.meta, j, kMetaBytes);
        }
        i += leaves, j += comes;
    }
}

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// tiers, importance: [S, H, 64]; tables are those of the S pages.
extern "C" void diffxkv_pack(const SealedTables* tables, const RawTokens* raw, const uint8_t* tiers,
                             const uint8_t* importance, int64_t threads) {
    const Layout& layout = *tables->layout;
    each_head(raw->pages, layout, threads, [&](int64_t page, int64_t head, float* row) {
        const int64_t at = (page * layout.kv_heads + head) * kPageTokens;
        pack_head({*tables, page, head}, *raw, page, head, tiers + at, importance + at, row);
    });
}

// pages: [N], of the tables; first: [N, H], where each head's rows begin.
extern "C" void diffxkv_unpack(const SealedTables* tables, const int64_t* pages, int64_t count,
                               const int64_t* first, int64_t raw_dtype, const Rows* rows,
                               int64_t threads) {
    const Layout& layout = *tables->layout;
    each_head(count, layout, threads, [&](int64_t n, int64_t head, float* row) {
        unpack_head({*tables, pages[n], head}, static_cast<DType>(raw_dtype), *rows,
                    first[n * layout.kv_heads + head], row);
    });
}

// tiers: [S, H, 64] each; tables are those of the S pages.
extern "C" void diffxkv_copy_rows(const SealedTables* from, const uint8_t* from_tiers,
                                  const SealedTables* to, const uint8_t* to_tiers, int64_t pages,
                                  int64_t threads) {
    const Layout& layout = *from->layout;
    each_head(pages, layout, threads, [&](int64_t page, int64_t head, float*) {
        const Head source(*from, page, head), target(*to, page, head);
        const int64_t at = (page * layout.kv_heads + head) * kPageTokens;
        for (uint8_t code : {kHigh, kLow})
            copy_tier(source, from_tiers + at, target, to_tiers + at, code);
    });
}

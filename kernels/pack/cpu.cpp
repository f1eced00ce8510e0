// SPDX-License-Identifier: Apache-2.0
// Writing and reading sealed payload. The bytes equal those of naive.py; kernels/layout/page.py has the
// format. One work item is one head of one page. Strides are in elements.
#include <cstring>
#include <vector>

#include "payload.h"
#include "quantize.h"
#include "rows.h"

namespace {

using namespace diffxkv;

struct Strides {
    int64_t page, token, head;
};

// Raw pages [R, 64, H, D] of one side (keys or values); D has unit stride.
struct RawPages {
    const uint8_t* data;
    Strides strides;
    DType dtype;
    int64_t itemsize;

    const uint8_t* row(int64_t slot, int64_t token, int64_t head) const {
        return data +
               (slot * strides.page + token * strides.token + head * strides.head) * itemsize;
    }
};

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

// Writes the key or value rows of one tier; `meta` is the first scale of the side, 4 words a token.
void write_rows(const Payload<uint8_t>& payload, int64_t offset, int64_t row_bytes, int64_t bits,
                const RawPages& raw, int64_t slot, int64_t head, const Chosen& chosen,
                std::vector<float>& values, uint16_t* meta) {
    const int64_t dim = static_cast<int64_t>(values.size());
    payload.each_run(offset, row_bytes, chosen.count, [&](uint8_t* out, int64_t at, int64_t rows) {
        for (int64_t i = at; i < at + rows; ++i, out += row_bytes) {
            const uint8_t* source = raw.row(slot, chosen.tokens[i], head);
            if (bits == 0) {
                std::memcpy(out, source, row_bytes);
                continue;
            }
            row_to_float(source, 0, raw.dtype, dim, values.data());
            quantize_row(values.data(), dim, bits, out, meta + 4 * i);
        }
    });
}

// Reads the key or value rows of one tier into consecutive fp32 rows.
void read_rows(const Payload<const uint8_t>& payload, int64_t offset, int64_t row_bytes,
               int64_t bits, DType raw, int64_t count, int64_t dim, const float (*scales)[2],
               float* out) {
    payload.each_run(offset, row_bytes, count, [&](const uint8_t* row, int64_t at, int64_t rows) {
        for (int64_t i = at; i < at + rows; ++i, row += row_bytes) {
            float* target = out + i * dim;
            row_to_float(row, bits, raw, dim, target);
            if (bits == 0) continue;
            const float scale = scales[i][0], zero = scales[i][1];
#pragma omp simd
            for (int64_t j = 0; j < dim; ++j) target[j] = target[j] * scale + zero;
        }
    });
}

}  // namespace

extern "C" {

// slots int64 [S]; tiers, importance uint8 [S, H, 64]; frames int32 [S, frame_columns];
// heads int32 [S, H, 2]; arena uint8 [F, frame_bytes].
void diffxkv_pack(const Layout* layout, int64_t threads, const uint8_t* k_raw,
                  const Strides* k_strides, const uint8_t* v_raw, const Strides* v_strides,
                  int64_t dtype, int64_t itemsize, const int64_t* slots, int64_t pages,
                  const uint8_t* tiers, const uint8_t* importance, const int32_t* frames,
                  int64_t frame_columns, const int32_t* heads, uint8_t* arena) {
    const int64_t kv_heads = layout->kv_heads;
    const RawPages keys{k_raw, *k_strides, static_cast<DType>(dtype), itemsize};
    const RawPages values{v_raw, *v_strides, static_cast<DType>(dtype), itemsize};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(layout->head_dim);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < pages * kv_heads; ++item) {
            const int64_t page = item / kv_heads, head = item % kv_heads;
            const HeadRecord record = head_record(heads + 2 * item);
            const Sections at = sections(*layout, record.n_high, record.n_low);
            const Payload<uint8_t> payload{arena, frames + page * frame_columns,
                                           layout->frame_bytes};
            int64_t note = record.offset + at.notes;
            for (uint8_t code : {kHigh, kLow}) {
                const Tier& tier = code == kHigh ? layout->high : layout->low;
                const TierSections& start = code == kHigh ? at.high : at.low;
                const Chosen chosen = tokens_of_tier(tiers + item * kPageTokens, code);
                uint16_t meta[kPageTokens][4];
                write_rows(payload, record.offset + start.key, layout->row_bytes(tier.key_bits),
                           tier.key_bits, keys, slots[page], head, chosen, row, meta[0]);
                write_rows(payload, record.offset + start.value,
                           layout->row_bytes(tier.value_bits), tier.value_bits, values,
                           slots[page], head, chosen, row, meta[0] + 2);
                if (!tier.raw())
                    payload.each_run(record.offset + start.meta, kMetaBytes, chosen.count,
                                     [&](uint8_t* out, int64_t first, int64_t rows) {
                                         std::memcpy(out, meta[first], rows * kMetaBytes);
                                     });
                payload.each_run(note, kNoteBytes, chosen.count,
                                 [&](uint8_t* out, int64_t first, int64_t rows) {
                                     for (int64_t i = first; i < first + rows; ++i) {
                                         const uint8_t token = chosen.tokens[i];
                                         *out++ = token;
                                         *out++ = importance[item * kPageTokens + token];
                                     }
                                 });
                note += chosen.count * kNoteBytes;
            }
        }
    }
}

// frames int32 [V, ...] and heads int32 [V, H, 2] with these page strides; pages int64 [N];
// first int64 [N, H]; k, v fp32 [rows, D]; notes uint8 [rows, 2] or null.
void diffxkv_unpack(const Layout* layout, int64_t threads, const uint8_t* arena,
                    const int32_t* frames, int64_t frames_stride, const int32_t* heads,
                    int64_t heads_stride, const int64_t* pages, int64_t n, const int64_t* first,
                    int64_t raw_dtype, float* k, float* v, uint8_t* notes) {
    const int64_t kv_heads = layout->kv_heads, dim = layout->head_dim;
    const DType raw = static_cast<DType>(raw_dtype);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t item = 0; item < n * kv_heads; ++item) {
        const int64_t page = pages[item / kv_heads], head = item % kv_heads;
        const HeadRecord record = head_record(heads + page * heads_stride + 2 * head);
        const Sections at = sections(*layout, record.n_high, record.n_low);
        const Payload<const uint8_t> payload{arena, frames + page * frames_stride,
                                             layout->frame_bytes};
        int64_t target = first[item];
        for (bool high : {true, false}) {
            const Tier& tier = high ? layout->high : layout->low;
            const TierSections& start = high ? at.high : at.low;
            const int64_t count = high ? record.n_high : record.n_low;
            float key_scales[kPageTokens][2], value_scales[kPageTokens][2];
            if (!tier.raw())
                payload.each_run(
                    record.offset + start.meta, kMetaBytes, count,
                    [&](const uint8_t* row, int64_t i, int64_t rows) {
                        for (const int64_t end = i + rows; i < end; ++i, row += kMetaBytes) {
                            const Meta meta = load_meta(row);
                            key_scales[i][0] = meta.key_scale;
                            key_scales[i][1] = meta.key_zero;
                            value_scales[i][0] = meta.value_scale;
                            value_scales[i][1] = meta.value_zero;
                        }
                    });
            read_rows(payload, record.offset + start.key, layout->row_bytes(tier.key_bits),
                      tier.key_bits, raw, count, dim, key_scales, k + target * dim);
            read_rows(payload, record.offset + start.value, layout->row_bytes(tier.value_bits),
                      tier.value_bits, raw, count, dim, value_scales, v + target * dim);
            target += count;
        }
        if (notes)
            payload.each_run(record.offset + at.notes, kNoteBytes, record.n_high + record.n_low,
                             [&](const uint8_t* row, int64_t i, int64_t rows) {
                                 std::memcpy(notes + (first[item] + i) * kNoteBytes, row,
                                             rows * kNoteBytes);
                             });
    }
}

}  // extern "C"

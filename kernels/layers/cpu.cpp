// SPDX-License-Identifier: Apache-2.0
// Small layers of a model in one pass each (see cpu.py). Rows are converted to floats, and rounded
// where SGLang's own implementation rounds, which is a handful of torch's operations.

#include <atomic>
#include <cmath>
#include <vector>

#include "exp2.h"
#include "pool.h"
#include "store.h"

namespace diffxkv {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kRows = 16;         // that a thread takes at a time
constexpr int64_t kAlone = 32 << 10;  // elements below which one thread does it all

// Calls body(row, scratch) for all rows; scratch has `floats` elements.
template <class Body>
void each_row(int64_t rows, int64_t elements, int64_t floats, int64_t threads, Body&& body) {
    std::atomic<int64_t> next{0};
    Pool::instance().run(rows * elements < kAlone ? 1 : threads, [&] {
        std::vector<float> scratch(floats);
        for (int64_t first; (first = next.fetch_add(kRows)) < rows;)
            for (int64_t r = first; r < std::min(rows, first + kRows); ++r)
                body(r, scratch.data());
    });
}

template <class T>
float rounded(float x) {
    T element;
    from_float(x, element);
    return to_float(element);
}

float sum_of_squares(const float* x, int64_t n) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

// Rotates the pairs of one head [2 * half]: neighbours, or halves (`Neox`).
template <bool Neox, class T>
void rotate_pairs(T* x, const T* cos, const T* sin, int64_t half) {
    constexpr int64_t step = Neox ? 1 : 2;
    const int64_t apart = Neox ? half : 1;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(x[i * step]), b = to_float(x[i * step + apart]);
        const float c = to_float(cos[i]), s = to_float(sin[i]);
        from_float(rounded<T>(a * c) - rounded<T>(b * s), x[i * step]);
        from_float(rounded<T>(b * c) + rounded<T>(a * s), x[i * step + apart]);
    }
}

}  // namespace
}  // namespace diffxkv

using namespace diffxkv;

// out = norm(x + residual) * weight, residual += x; residual may be null. Rows are contiguous, and all is
// of dtype.
extern "C" void diffxkv_rms_norm(const uint8_t* x, uint8_t* residual, const uint8_t* weight,
                                 uint8_t* out, int64_t rows, int64_t dim, float eps,
                                 int64_t dtype, int64_t threads) {
    const auto type = static_cast<DType>(dtype);
    const int64_t bytes = dim * (type == kFloat32 ? 4 : 2);
    each_row(rows, dim, 2 * dim, threads, [&](int64_t r, float* row) {
        float* other = row + dim;
        row_to_float(x + r * bytes, 0, type, dim, row);
        if (residual) {
            row_to_float(residual + r * bytes, 0, type, dim, other);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) row[i] += other[i];
            float_to_row(row, type, dim, residual + r * bytes);
        }
        const float mean = sum_of_squares(row, dim) / static_cast<float>(dim);
        const float scale = 1.f / std::sqrt(mean + eps);
        row_to_float(weight, 0, type, dim, other);
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) row[i] = row[i] * scale * other[i];
        float_to_row(row, type, dim, out + r * bytes);
    });
}

// Rotates heads [T, H, D] in place at the first `rotary` of their elements, tokens `stride` elements
// apart. cache: [positions, rotary], cosines before sines; of the same dtype.
extern "C" void diffxkv_rotary(uint8_t* x, int64_t stride, int64_t tokens, int64_t heads,
                               int64_t dim, int64_t rotary, const int64_t* positions,
                               const uint8_t* cache, bool neox, int64_t dtype, int64_t threads) {
    with_element(static_cast<DType>(dtype), [&](auto element) {
        using T = decltype(element);
        const int64_t half = rotary / 2;
        each_row(tokens, heads * dim, 0, threads, [&](int64_t t, float*) {
            const T* cos = reinterpret_cast<const T*>(cache) + positions[t] * rotary;
            T* token = reinterpret_cast<T*>(x) + t * stride;
            for (int64_t h = 0; h < heads; ++h) {
                if (neox) {
                    rotate_pairs<true>(token + h * dim, cos, cos + half, half);
                } else {
                    rotate_pairs<false>(token + h * dim, cos, cos + half, half);
                }
            }
        });
    });
}

// out [T, dim] = silu(x[:, :dim]) * x[:, dim:]; x is contiguous.
extern "C" void diffxkv_silu_and_mul(const uint8_t* x, uint8_t* out, int64_t rows, int64_t dim,
                                     int64_t dtype, int64_t threads) {
    with_element(static_cast<DType>(dtype), [&](auto element) {
        using T = decltype(element);
        each_row(rows, 2 * dim, 0, threads, [&](int64_t r, float*) {
            const T* gate = reinterpret_cast<const T*>(x) + 2 * r * dim;
            T* to = reinterpret_cast<T*>(out) + r * dim;
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) {
                const float g = to_float(gate[i]);
                const float silu = g / (1.f + fast_exp2(-kLog2E * g));
                from_float(rounded<T>(silu) * to_float(gate[dim + i]), to[i]);
            }
        });
    });
}

// SPDX-License-Identifier: Apache-2.0
// Vectors of floats as wide as the target has, through the vector extension of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace diffxkv {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

inline Lanes load_lanes(const float* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void store_lanes(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }

// Floats that start at a whole vector, so that no vector straddles two cache lines.
class Floats {
   public:
    explicit Floats(int64_t n) : lanes_((n + kLanes - 1) / kLanes) {}
    float* data() { return reinterpret_cast<float*>(lanes_.data()); }
    const float* data() const { return reinterpret_cast<const float*>(lanes_.data()); }

   private:
    std::vector<Lanes> lanes_;
};

// Sums of lanes i, i + 4, i + 8, ...
inline Quad fold_lanes(Lanes x) {
    Quad part[kLanes / 4];
    std::memcpy(part, &x, sizeof x);
    for (int width = kLanes / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

// The four sums over all lanes.
inline Quad sum_lanes(Lanes a, Lanes b, Lanes c, Lanes d) {
    Quad x = fold_lanes(a), y = fold_lanes(b), z = fold_lanes(c), w = fold_lanes(d);
    Quad xy = __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
    Quad zw = __builtin_shufflevector(z, w, 0, 4, 1, 5) + __builtin_shufflevector(z, w, 2, 6, 3, 7);
    return __builtin_shufflevector(xy, zw, 0, 1, 4, 5) + __builtin_shufflevector(xy, zw, 2, 3, 6, 7);
}

inline Lanes broadcast(float x) { return x - Lanes{}; }

inline Lanes max_lanes(Lanes a, Lanes b) { return a > b ? a : b; }

inline Lanes min_lanes(Lanes a, Lanes b) { return a < b ? a : b; }

// Exchanges the lanes of `a` that have bit Bit in their number with those of `b` that lack it.
template <int Bit, size_t... Lane>
inline void exchange(Lanes& a, Lanes& b, std::index_sequence<Lane...>) {
    const Lanes low = __builtin_shufflevector(a, b, (Lane & Bit ? kLanes + Lane - Bit : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Bit ? kLanes + Lane : Lane + Bit)...);
    a = low;
}

// Transposes a square of kLanes rows: each step exchanges one bit of the row's and the lane's number.
template <int Bit = 1>
inline void transpose(Lanes (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Bit)) exchange<Bit>(rows[i], rows[i + Bit], std::make_index_sequence<kLanes>());
    if constexpr (2 * Bit < kLanes) transpose<2 * Bit>(rows);
}

}  // namespace diffxkv

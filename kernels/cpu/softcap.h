// SPDX-License-Identifier: Apache-2.0
// Soft caps of scores: cap * tanh(score / cap), which leaves small scores as they are.
#pragma once

#include <cmath>

#include "exp2.h"

namespace diffxkv {

constexpr float kLog2E = 1.44269504f;

class SoftCap {
   public:
    // cap: of scores in base 2; 0: they stay.
    explicit SoftCap(float cap) : cap_(cap), slope_(cap > 0.f ? 2.f * kLog2E / cap : 0.f) {}

    bool on() const { return cap_ > 0.f; }

    // tanh(x) = t / (t + 2) of t = e^2x - 1, which is computed without cancellation: below 1e-6
    // relative error, near zero too.
    Lanes operator()(Lanes score) const {
        const Lanes bound = broadcast(126.f);
        const WholeAndRest parts(min_lanes(max_lanes(score * slope_, -bound), bound));
        const Lanes power = parts.scale(broadcast(1.f));
        const Lanes t = power * exp2_minus_one_near_zero(parts.rest) + (power - 1.f);
        return cap_ * (t / (t + 2.f));
    }

    // Caps scores [n] in place if there is a cap, and what follows up to a multiple of kLanes.
    void apply(float* scores, int64_t n) const {
        if (!on()) return;
        for (int64_t i = 0; i < n; i += kLanes)
            store_lanes(scores + i, (*this)(load_lanes(scores + i)));
    }

   private:
    float cap_, slope_;
};

}  // namespace diffxkv

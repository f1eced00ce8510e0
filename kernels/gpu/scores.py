# SPDX-License-Identifier: Apache-2.0
"""Triton: soft caps of scores."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.softmax import LOG2_E

_UNITS = tl.constexpr(2 * LOG2_E)


@triton.jit
def capped(scores, cap):
    """Base-2 scores as `kernels.softmax.capped` has them; exact to 1e-7 of the cap.

    Args:
        cap: of `QueryView`; None: there is none. Masked scores are to become -inf after this.
    """
    if cap is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which neither overflows nor gives NaN.
        return cap - 2 * cap / (tl.exp2(scores * (_UNITS / cap)) + 1)
    else:
        return scores

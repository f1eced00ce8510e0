# SPDX-License-Identifier: Apache-2.0
"""Triton: the rotation of `kernels.basis.rotation`, before it is normalised."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard_rows(x):
    """Rows of ``x`` [N, SIZE] times Sylvester's matrix.

    Each turn sums and subtracts neighbours, and puts all sums before all differences: after
    log2(SIZE) turns every element has met every other one, and all are back in their places.
    """
    for _ in tl.static_range(_log2(x.shape[1])):
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), x.shape)
    return x


@triton.constexpr_function
def _log2(n):
    """Of a power of two."""
    return n.bit_length() - 1

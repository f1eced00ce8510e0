# SPDX-License-Identifier: Apache-2.0
"""Triton: the keys, values and queries of one new token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kernel(
    q,
    k,
    v,
    rows,
    k_raw,
    v_raw,
    rotated,
    q_stride,
    k_stride,
    v_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Program (token, ROWS of its queries' blocks); the first of a token writes K and V, too.

    Args:
        WIDTH: elements of a token's keys, COLUMNS of which are copied at a time.
        BLOCKS, SIZE: blocks of a token's queries that are rotated each on its own, and elements of
            one, a power of two.
        SCALE: SIZE ** -0.5.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        row = tl.load(rows + token) * WIDTH
        for at in range(0, WIDTH, COLUMNS):
            column = at + tl.arange(0, COLUMNS)
            inside = column < WIDTH
            key = tl.load(k + token * k_stride + column, mask=inside)
            value = tl.load(v + token * v_stride + column, mask=inside)
            tl.store(k_raw + row + column, key.to(k_raw.dtype.element_ty), mask=inside)
            tl.store(v_raw + row + column, value.to(v_raw.dtype.element_ty), mask=inside)
    block = part * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (block < BLOCKS)[:, None]
    x = tl.load(q + token * q_stride + at, mask=inside, other=0).to(tl.float32)
    tl.store(rotated + token * (BLOCKS * SIZE) + at, _hadamard(x) * SCALE, mask=inside)


@triton.jit
def _hadamard(x):
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

# SPDX-License-Identifier: Apache-2.0
"""Triton: the keys, values and queries of one new token."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.hadamard import hadamard_rows


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
    tl.store(rotated + token * (BLOCKS * SIZE) + at, hadamard_rows(x) * SCALE, mask=inside)

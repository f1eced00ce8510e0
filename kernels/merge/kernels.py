# SPDX-License-Identifier: Apache-2.0
"""Triton: attention over some tokens and over others becomes attention over all of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def merge_two(a, b, merged, rows, DIM: tl.constexpr, ROWS: tl.constexpr):
    """`merge_states` of rows ``[program_id(0) * ROWS, ...)``: contiguous [rows, DIM] and [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, triton.next_power_of_2(DIM))
    mask = row < rows
    inside = mask[:, None] & (column < DIM)[None, :]
    lse_a = tl.load(a.lse + row, mask=mask, other=-float("inf"))
    lse_b = tl.load(b.lse + row, mask=mask, other=-float("inf"))
    top = tl.maximum(lse_a, lse_b)
    # Where all is empty, any finite base keeps -inf - -inf = NaN out.
    base = tl.where(top == -float("inf"), 0.0, top)
    weight_a, weight_b = tl.exp2(lse_a - base), tl.exp2(lse_b - base)
    total = weight_a + weight_b
    scale = 1 / tl.where(total > 0, total, 1.0)
    at = row[:, None] * DIM + column[None, :]
    out_a = tl.load(a.out + at, mask=inside, other=0).to(tl.float32)
    out = out_a * (weight_a * scale)[:, None]
    out_b = tl.load(b.out + at, mask=inside, other=0).to(tl.float32)
    out += out_b * (weight_b * scale)[:, None]
    tl.store(merged.out + at, out, mask=inside)
    tl.store(merged.lse + row, base + tl.log2(total), mask=mask)


@triton.jit(do_not_specialize=["splits", "rows"])
def merge_splits(
    parts, splits, rows, merged, ONTO: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
):
    """Merge rows ``[program_id(0) * ROWS, ...)`` of several parts by their base-2 LSE.

    Args:
        parts: `AttentionState`, fp32 [splits, rows, DIM] and [splits, rows].
        merged: `AttentionState`, fp32 [rows, DIM] and [rows].
        ONTO: whether it holds one more part already.
    """
    DIM_BLOCK: tl.constexpr = triton.next_power_of_2(DIM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_BLOCK)
    seen = row < rows
    inside = seen[:, None] & (column < DIM)[None, :]
    at = row[:, None] * DIM + column[None, :]
    if ONTO:
        top = tl.load(merged.lse + row, mask=seen, other=-float("inf"))
        total = tl.where(top == -float("inf"), 0.0, 1.0)
        acc = tl.load(merged.out + at, mask=inside, other=0)
    else:
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    outs, lses = parts.out, parts.lse
    for _ in range(splits):
        mine = tl.load(lses + row, mask=seen, other=-float("inf"))
        part = tl.load(outs + at, mask=inside, other=0)
        new_top = tl.maximum(top, mine)
        # Where all is empty, any finite base keeps -inf - -inf = NaN out.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - base), tl.exp2(mine - base)
        acc = acc * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = new_top
        lses += rows
        outs += rows * DIM
    scale = 1 / tl.where(total > 0, total, 1.0)
    tl.store(merged.out + at, acc * scale[:, None], mask=inside)
    tl.store(merged.lse + row, top + tl.log2(total), mask=seen)

# SPDX-License-Identifier: Apache-2.0
"""Triton: attention over some tokens and over others becomes attention over all of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_items(
    parts,
    part_lse,
    row_start,
    out,
    lse,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the items of query head ``program_id(0)``, of B * Hq, by their base-2 LSE.

    Args:
        parts, part_lse: fp32 [N, GROUP, DIM] and [N, GROUP].
        row_start: int32 [B * H * 3 + 1].
        out: [B * Hq, DIM], of any float type; lse: fp32 [B * Hq]. 0 and -inf where nothing was
            attended.
        PARTS: items that are read at a time: a lone long sequence has hundreds.
    """
    query = tl.program_id(0)
    row, member = query // GROUP, query % GROUP
    first = tl.load(row_start + row * 3)
    end = tl.load(row_start + row * 3 + 3)
    tops = tl.full([PARTS], -float("inf"), tl.float32)
    for at in range(first, end, PARTS):
        part = at + tl.arange(0, PARTS)
        tops = tl.maximum(tops, _part_lse(part_lse, part, end, member, GROUP))
    top = tl.max(tops, 0)
    # Where all is empty, any finite base keeps -inf - -inf = NaN out.
    base = tl.where(top == -float("inf"), 0.0, top)
    column = tl.arange(0, DIM_BLOCK)
    totals = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, DIM_BLOCK], tl.float32)
    for at in range(first, end, PARTS):
        part = at + tl.arange(0, PARTS)
        weights = tl.exp2(_part_lse(part_lse, part, end, member, GROUP) - base)
        rows = parts + (part.to(tl.int64) * GROUP + member)[:, None] * DIM + column[None, :]
        inside = (part < end)[:, None] & (column < DIM)[None, :]
        acc += weights[:, None] * tl.load(rows, mask=inside, other=0)
        totals += weights
    total = tl.sum(totals, 0)
    merged = tl.sum(acc, 0) / tl.where(total > 0, total, 1.0)
    merged = merged.to(out.dtype.element_ty)
    tl.store(out + query.to(tl.int64) * DIM + column, merged, mask=column < DIM)
    tl.store(lse + query, base + tl.log2(total))


@triton.jit
def _part_lse(lse, part, end, member, GROUP: tl.constexpr):
    return tl.load(lse + part * GROUP + member, mask=part < end, other=-float("inf"))


@triton.jit(do_not_specialize=["rows"])
def merge_two(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    rows,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`part.merge` of rows ``[program_id(0) * ROWS, ...)``: contiguous [rows, DIM] and [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_BLOCK)
    mask = row < rows
    inside = mask[:, None] & (column < DIM)[None, :]
    a = tl.load(lse_a + row, mask=mask, other=-float("inf"))
    b = tl.load(lse_b + row, mask=mask, other=-float("inf"))
    top = tl.maximum(a, b)
    base = tl.where(top == -float("inf"), 0.0, top)
    a, b = tl.exp2(a - base), tl.exp2(b - base)
    total = a + b
    scale = 1 / tl.where(total > 0, total, 1.0)
    at = row[:, None] * DIM + column[None, :]
    merged = tl.load(out_a + at, mask=inside, other=0).to(tl.float32) * (a * scale)[:, None]
    merged += tl.load(out_b + at, mask=inside, other=0).to(tl.float32) * (b * scale)[:, None]
    tl.store(out + at, merged, mask=inside)
    tl.store(lse + row, base + tl.log2(total), mask=mask)

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
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the items of (sequence, KV head) ``program_id(0)`` by their base-2 LSE.

    Args:
        parts, part_lse: fp32 [N, GROUP, DIM] and [N, GROUP].
        row_start: int32 [B * H * 3 + 1].
        out, lse: fp32 [B * H, GROUP, DIM] and [B * H, GROUP]; 0 and -inf where
            nothing was attended.
        PARTS: items looked at a time.
    """
    row = tl.program_id(0)
    first = tl.load(row_start + row * 3)
    end = tl.load(row_start + row * 3 + 3)
    member, column = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    inside = (member < GROUP)[:, None] & (column < DIM)[None, :]
    top = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    for at in range(first, end, PARTS):
        top = tl.maximum(top, tl.max(_part_lse(part_lse, at, end, member, GROUP, PARTS), 0))
    # Where all is empty, any finite base keeps -inf - -inf = NaN out.
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    parts += first.to(tl.int64) * GROUP * DIM + member[:, None] * DIM + column[None, :]
    for part in range(first, end):
        mine = tl.load(part_lse + part * GROUP + member, mask=member < GROUP, other=-float("inf"))
        weight = tl.exp2(mine - base)
        acc += weight[:, None] * tl.load(parts, mask=inside, other=0)
        total += weight
        parts += GROUP * DIM
    scale = 1 / tl.where(total > 0, total, 1.0)
    at = row.to(tl.int64) * GROUP * DIM + member[:, None] * DIM + column[None, :]
    tl.store(out + at, acc * scale[:, None], mask=inside)
    tl.store(lse + row * GROUP + member, base + tl.log2(total), mask=member < GROUP)


@triton.jit
def _part_lse(lse, at, end, member, GROUP: tl.constexpr, PARTS: tl.constexpr):
    part = at + tl.arange(0, PARTS)
    mask = (part < end)[:, None] & (member < GROUP)[None, :]
    return tl.load(lse + part[:, None] * GROUP + member[None, :], mask=mask, other=-float("inf"))


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

# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of the same queries over several parts of the tokens becomes one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["splits", "rows"])
def merge_splits(
    parts,
    part_lse,
    splits,
    rows,
    out,
    lse,
    ONTO: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge rows ``[program_id(0) * ROWS, ...)`` by their base-2 LSE.

    Args:
        parts, part_lse: fp32 [splits, rows, DIM] and [splits, rows].
        out, lse: fp32 [rows, DIM] and [rows]; 0 and -inf where nothing was attended.
        ONTO: whether they hold one more part already.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_BLOCK)
    seen = row < rows
    inside = seen[:, None] & (column < DIM)[None, :]
    at = row[:, None] * DIM + column[None, :]
    if ONTO:
        top = tl.load(lse + row, mask=seen, other=-float("inf"))
        total = tl.where(top == -float("inf"), 0.0, 1.0)
        acc = tl.load(out + at, mask=inside, other=0)
    else:
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for _ in range(splits):
        mine = tl.load(part_lse + row, mask=seen, other=-float("inf"))
        part = tl.load(parts + at, mask=inside, other=0)
        new_top = tl.maximum(top, mine)
        # Where all is empty, any finite base keeps -inf - -inf = NaN out.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - base), tl.exp2(mine - base)
        acc = acc * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = new_top
        part_lse += rows
        parts += rows * DIM
    scale = 1 / tl.where(total > 0, total, 1.0)
    tl.store(out + at, acc * scale[:, None], mask=inside)
    tl.store(lse + row, top + tl.log2(total), mask=seen)

# SPDX-License-Identifier: Apache-2.0
"""Triton: attention over some tokens and over others becomes attention over all of them."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.hadamard import hadamard_rows


@triton.jit
def merge_items(
    parts,
    part_lse,
    row_start,
    q,
    key_mean,
    out,
    lse,
    score_scale,
    q_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TURNS: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Merge the items of query head ``program_id(0)``, of B * Hq, by their base-2 LSE.

    Args:
        parts, part_lse: fp32 [N, GROUP, DIM] and [N, GROUP].
        row_start: int32 [B * H * 3 + 1].
        q: [B, Hq, D], not rotated; ``q_stride`` elements from one sequence's to the next one's.
        key_mean: fp32 [H, D], which sealed keys lack.
        score_scale: sm_scale * log2(e).
        out: [B * Hq, DIM], of any float type; lse: fp32 [B * Hq]. 0 and -inf where nothing was
            attended.
        PARTS: items that are read at a time: a lone long sequence has hundreds.
        TURNS: whether sealed items are to come back from the basis of sealed pages
            (`kernels.basis.sealed`), whose rotation has blocks of SIZE and the factor SCALE.
    """
    query = tl.program_id(0)
    row, member = query // GROUP, query % GROUP
    first = tl.load(row_start + row * 3)
    sealed = tl.load(row_start + row * 3 + 1)
    end = tl.load(row_start + row * 3 + 3)
    column = tl.arange(0, DIM_BLOCK)
    lacking = 0.0
    if TURNS:
        at = (query // (KV_HEADS * GROUP)).to(tl.int64) * q_stride
        at += query % (KV_HEADS * GROUP) * DIM
        inside = column < DIM
        elements = tl.load(q + at + column, mask=inside, other=0).to(tl.float32)
        mean = tl.load(key_mean + row % KV_HEADS * DIM + column, mask=inside, other=0)
        lacking = tl.sum(elements * mean, 0) * score_scale
    tops = tl.full([PARTS], -float("inf"), tl.float32)
    for at in range(first, end, PARTS):
        part = at + tl.arange(0, PARTS)
        found = _part_lse(part_lse, part, end, member, GROUP)
        tops = tl.maximum(tops, found + tl.where(part < sealed, 0.0, lacking))
    top = tl.max(tops, 0)
    # Where all is empty, any finite base keeps -inf - -inf = NaN out.
    base = tl.where(top == -float("inf"), 0.0, top)
    if TURNS:
        total, merged = _sum_items(
            parts, part_lse, sealed, end, base - lacking, member, GROUP, DIM, DIM_BLOCK, PARTS
        )
        merged = hadamard_rows(tl.reshape(merged, [DIM_BLOCK // SIZE, SIZE])) * SCALE
        open_total, open_sum = _sum_items(
            parts, part_lse, first, sealed, base, member, GROUP, DIM, DIM_BLOCK, PARTS
        )
        merged = tl.reshape(merged, [DIM_BLOCK]) + open_sum
        total += open_total
    else:
        total, merged = _sum_items(
            parts, part_lse, first, end, base, member, GROUP, DIM, DIM_BLOCK, PARTS
        )
    merged = merged / tl.where(total > 0, total, 1.0)
    merged = merged.to(out.dtype.element_ty)
    tl.store(out + query.to(tl.int64) * DIM + column, merged, mask=column < DIM)
    tl.store(lse + query, base + tl.log2(total))


@triton.jit
def _sum_items(
    parts,
    part_lse,
    first,
    end,
    base,
    member,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Weights of items ``[first, end)`` relative to exp2(base), and their weighted sum [D]."""
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
    return tl.sum(totals, 0), tl.sum(acc, 0)


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

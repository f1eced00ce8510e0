# SPDX-License-Identifier: Apache-2.0
"""Triton: attention over unpacked rows, which lie side by side for each sequence and KV head."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.rows import locate_rows, read_rows


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["heads", "pages"])
def starts_kernel(
    heads, heads_stride, pages, count, starts, capacity, HEADS: tl.constexpr, PAGES: tl.constexpr
):
    """Program (KV head) of `naive.row_starts`, for ``count`` pages, PAGES at a time."""
    head = tl.program_id(0)
    heads += head * 2 + 1
    starts += head
    start = head.to(tl.int64) * capacity
    tl.store(starts, start)
    for first in range(0, count, PAGES):
        listed = first + tl.arange(0, PAGES)
        inside = listed < count
        page = tl.load(pages + listed, mask=inside, other=0).to(tl.int64)
        kept = tl.load(heads + page * heads_stride, mask=inside, other=0)
        kept = (kept & 0xFF) + (kept >> 8)
        tl.store(starts + (listed + 1) * HEADS, start + tl.cumsum(kept, 0), mask=inside)
        start += tl.sum(kept, 0)


@triton.jit
def _attend_tile(
    state,
    queries,
    k,
    v,
    first,
    end,
    score_scale,
    PARTIAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take rows ``first ...`` into a state: base-2 maxima [M], sums of weights [M] and of values.

    Args:
        PARTIAL: whether rows from ``end`` on, which may hold anything, can be among them. There is
            a row before that.
    """
    top, total, acc = state
    row = first + tl.arange(0, BLOCK_N)
    column = tl.arange(0, DIM_BLOCK)
    at = row[:, None] * DIM + column[None, :]
    inside = tl.full([BLOCK_N, DIM_BLOCK], True, tl.int1)
    if DIM != DIM_BLOCK:
        inside = inside & (column < DIM)[None, :]
    if PARTIAL:
        inside = inside & (row < end)[:, None]
    keys = tl.load(k + at, mask=inside, other=0).to(COMPUTE)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if PARTIAL:
        scores = tl.where((row < end)[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
    weights = tl.exp2(scores * score_scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    values = tl.load(v + at, mask=inside, other=0).to(COMPUTE)
    acc = tl.dot(weights.to(COMPUTE), values, acc * fade[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["sequences", "part_rows", "first_page", "end_page"])
def unpacked_kernel(
    q,
    q_stride,
    q_indptr,
    sequences,
    part_rows,
    k,
    v,
    starts,
    indptr,
    first_page,
    end_page,
    out,
    lse,
    score_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    PEEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of rows, KV head, split): attention over the unpacked rows of its sequence.

    Args:
        q, q_stride, q_indptr, sequences, part_rows: as in `sealed_kernel`.
        k, v, starts: of `scratch.PrefixScratch`.
        indptr: int32 [sequences + 1], into the list of pages, of which those from ``first_page`` to
            ``end_page`` are unpacked.
        out, lse: fp32 [T, Hq, DIM] and [T, Hq], attention over other tokens, to which these are
            added. With SPLIT they are [splits, T, Hq, ...], of which each split writes its own.
        score_scale: factor of base-2 scores; positive.
        DIM_BLOCK: the power of two that DIM is padded to.
        COMPUTE, PRECISION: dtype of the products, and input precision if that is fp32.
        PEEL: whether the last tile, alone, is masked: it saves instructions for registers.
        BLOCK_M: rows; BLOCK_N: tokens of a tile.
    """
    head, split = tl.program_id(1), tl.program_id(2)
    b, start, first, rows = locate_rows(q_indptr, sequences, GROUP, BLOCK_M)
    if first >= rows:
        return
    low = tl.minimum(tl.maximum(tl.load(indptr + b), first_page), end_page) - first_page
    high = tl.minimum(tl.maximum(tl.load(indptr + b + 1), first_page), end_page) - first_page
    begin = tl.load(starts + low * HEADS + head)
    end = (tl.load(starts + high * HEADS + head) - begin).to(tl.int32)
    k += begin * DIM
    v += begin * DIM
    token = 0
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end, BLOCK_N), tl.num_programs(2)) * BLOCK_N
        token = split * share
        end = tl.maximum(token, tl.minimum(token + share, end))
        out += split.to(tl.int64) * part_rows * DIM
        lse += split.to(tl.int64) * part_rows
    elif end == 0:
        return
    ahead = first - start
    column = tl.arange(0, DIM_BLOCK)
    seen, query, query_head = read_rows(q_indptr + b, ahead, rows, head, GROUP, BLOCK_M)
    inside = seen[:, None] & (column < DIM)[None, :]
    q_rows = q + query * q_stride + query_head * DIM
    queries = tl.load(q_rows[:, None] + column[None, :], mask=inside, other=0)
    queries = queries.to(tl.float32).to(COMPUTE)
    if SPLIT:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
    else:
        at = query * (HEADS * GROUP) + query_head
        top = tl.load(lse + at, mask=seen, other=0)
        total = tl.where(top == -float("inf"), 0.0, 1.0)
        acc = tl.load(out + (at * DIM)[:, None] + column[None, :], mask=inside, other=0)
    state = top, total, acc
    full = token + (end - token) // BLOCK_N * BLOCK_N if PEEL else end
    for tile in tl.range(token, full, BLOCK_N):
        state = _attend_tile(
            state, queries, k, v, tile, end, score_scale, not PEEL, COMPUTE, PRECISION, DIM,
            DIM_BLOCK, BLOCK_N,
        )  # fmt: skip
    if PEEL:  # noqa: SIM102 (a constant)
        if full < end:
            state = _attend_tile(
                state, queries, k, v, full, end, score_scale, True, COMPUTE, PRECISION, DIM,
                DIM_BLOCK, BLOCK_N,
            )  # fmt: skip
    top, total, acc = state
    seen, query, query_head = read_rows(q_indptr + b, ahead, rows, head, GROUP, BLOCK_M)
    inside = seen[:, None] & (column < DIM)[None, :]
    at = query * (HEADS * GROUP) + query_head
    acc *= (1 / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(lse + at, top + tl.log2(total), mask=seen)
    tl.store(out + (at * DIM)[:, None] + column[None, :], acc, mask=inside)

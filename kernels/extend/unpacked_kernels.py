# SPDX-License-Identifier: Apache-2.0
"""Triton: attention over unpacked rows, which lie side by side for each sequence and KV head."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.rows import load_queries, locate_rows, read_rows, store_rows
from sglang_diffxkv.kernels.gpu.scores import capped
from sglang_diffxkv.kernels.gpu.sections import record_counts
from sglang_diffxkv.kernels.merge.state import AttentionState

PAGES: tl.constexpr = tl.constexpr(512)
"""Pages whose rows are counted at a time: most prefixes in one go."""


class RowState(NamedTuple):
    """Online softmax of M query rows: base-2 maxima [M], sums of weights [M] and of values."""

    top: tl.tensor
    total: tl.tensor
    acc: tl.tensor


class KeptRows(NamedTuple):
    """Unpacked keys and values [N, D] of a sequence and KV head, up to row ``end``."""

    k: tl.tensor
    v: tl.tensor
    end: tl.tensor


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["heads", "pages"])
def starts_kernel(heads, heads_stride, pages, count, starts, capacity, HEADS: tl.constexpr):
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
        n_high, n_low = record_counts(tl.load(heads + page * heads_stride, mask=inside, other=0))
        kept = n_high + n_low
        tl.store(starts + (listed + 1) * HEADS, start + tl.cumsum(kept, 0), mask=inside)
        start += tl.sum(kept, 0)


@triton.jit
def _attend_tile(state, q, kept, first, queries, PARTIAL: tl.constexpr, TRAITS: tl.constexpr):
    """Take rows ``first ...`` into a state.

    Args:
        q: of `load_queries`. queries: `QueryView`.
        PARTIAL: whether rows from ``kept.end`` on, which may hold anything, can be among them.
            There is a row before that.
    """
    DIM: tl.constexpr = TRAITS.shape.dim
    DIM_BLOCK: tl.constexpr = TRAITS.shape.dim_block
    BLOCK_N: tl.constexpr = TRAITS.tile.tokens
    row = first + tl.arange(0, BLOCK_N)
    column = tl.arange(0, DIM_BLOCK)
    at = row[:, None] * DIM + column[None, :]
    inside = tl.full([BLOCK_N, DIM_BLOCK], True, tl.int1)
    if DIM != DIM_BLOCK:
        inside = inside & (column < DIM)[None, :]
    if PARTIAL:
        inside = inside & (row < kept.end)[:, None]
    keys = tl.load(kept.k + at, mask=inside, other=0).to(TRAITS.compute)
    scores = tl.dot(q, tl.trans(keys), input_precision=TRAITS.precision)
    score_scale = queries.score_scale
    if queries.cap is not None:
        scores, score_scale = capped(scores * score_scale, queries.cap), 1.0
    if PARTIAL:
        scores = tl.where((row < kept.end)[None, :], scores, -float("inf"))
    top = tl.maximum(state.top, tl.max(scores, 1) * score_scale)
    weights = tl.exp2(scores * score_scale - top[:, None])
    fade = tl.exp2(state.top - top)
    total = state.total * fade + tl.sum(weights, 1)
    values = tl.load(kept.v + at, mask=inside, other=0).to(TRAITS.compute)
    weights, acc = weights.to(TRAITS.compute), state.acc * fade[:, None]
    return RowState(top, total, tl.dot(weights, values, acc, input_precision=TRAITS.precision))


@triton.jit(do_not_specialize=["sequences", "part_rows"])
def unpacked_kernel(queries, sequences, part_rows, indptr, scratch, merged, TRAITS: tl.constexpr):
    """Program (block of rows, KV head, split): attention over the unpacked rows of its sequence.

    Args:
        queries: `QueryView`, of so many sequences; its scale is positive.
        part_rows: queries times query heads.
        indptr: int32 [sequences + 1], into the pages that are unpacked.
        scratch: `scratch.PrefixScratch`.
        merged: `AttentionState`, fp32 [T, Hq, D] and [T, Hq], attention over other tokens, to which
            these are added. Where they are split, [splits, T, Hq, ...], of which each split writes
            its own.
        TRAITS: `traits.UnpackedTraits`.
    """
    BLOCK_M: tl.constexpr = TRAITS.tile.rows
    BLOCK_N: tl.constexpr = TRAITS.tile.tokens
    PEEL: tl.constexpr = TRAITS.tile.peel
    GROUP: tl.constexpr = TRAITS.shape.group
    HEADS: tl.constexpr = TRAITS.shape.kv_heads
    DIM: tl.constexpr = TRAITS.shape.dim
    DIM_BLOCK: tl.constexpr = TRAITS.shape.dim_block
    head, split = tl.program_id(1), tl.program_id(2)
    block = locate_rows(queries.indptr, sequences, GROUP, BLOCK_M)
    if block.first >= block.rows:
        return
    low, high = tl.load(indptr + block.sequence), tl.load(indptr + block.sequence + 1)
    begin = tl.load(scratch.starts + low * HEADS + head)
    end = (tl.load(scratch.starts + high * HEADS + head) - begin).to(tl.int32)
    token = 0
    out, lse = merged.out, merged.lse
    if TRAITS.split:
        share = tl.cdiv(tl.cdiv(end, BLOCK_N), tl.num_programs(2)) * BLOCK_N
        token = split * share
        end = tl.maximum(token, tl.minimum(token + share, end))
        out += split.to(tl.int64) * part_rows * DIM
        lse += split.to(tl.int64) * part_rows
    elif end == 0:
        return
    merged = AttentionState(out, lse)
    kept = KeptRows(scratch.k + begin * DIM, scratch.v + begin * DIM, end)
    rows = read_rows(queries.indptr, block, head, GROUP, BLOCK_M)
    q = load_queries(queries, rows, TRAITS)
    if TRAITS.split:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
    else:
        column = tl.arange(0, DIM_BLOCK)
        inside = rows.seen[:, None] & (column < DIM)[None, :]
        at = rows.query * TRAITS.shape.q_heads + rows.head
        top = tl.load(lse + at, mask=rows.seen, other=0)
        total = tl.where(top == -float("inf"), 0.0, 1.0)
        acc = tl.load(out + (at * DIM)[:, None] + column[None, :], mask=inside, other=0)
    state = RowState(top, total, acc)
    full = token + (end - token) // BLOCK_N * BLOCK_N if PEEL else end
    for tile in tl.range(token, full, BLOCK_N):
        state = _attend_tile(state, q, kept, tile, queries, not PEEL, TRAITS)
    if PEEL:  # noqa: SIM102 (a constant)
        if full < end:
            state = _attend_tile(state, q, kept, full, queries, True, TRAITS)
    rows = read_rows(queries.indptr, block, head, GROUP, BLOCK_M)
    scale = 1 / tl.where(state.total > 0, state.total, 1.0)
    lse = state.top + tl.log2(state.total)
    store_rows(merged, rows, state.acc * scale[:, None], lse, TRAITS)

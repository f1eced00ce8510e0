# SPDX-License-Identifier: Apache-2.0
"""Triton: what the tokens of an open page receive, for one KV head.

A page's keys are read once for all queries. Tokens lie on the M axis of the products and queries on
N; what a query may not see is selected away, as tokens not yet written may hold anything. A page
that several sequences share is added to by several programs, in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.ragged import sequence_of_entry


@triton.jit
def _load_rows(rows, mask, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows at pointers [N], as fp32 [N, BLOCK]; 0 where masked or padded."""
    column = tl.arange(0, BLOCK)
    inside = mask[:, None] & (column < DIM)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _received(keys, queries, lse, visible, score_scale, PRECISION: tl.constexpr):
    """Probabilities [tokens, queries]; 0 where not visible."""
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * score_scale
    return tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)


@triton.jit(do_not_specialize=["sequences"])
def open_kernel(
    q,
    q_stride,
    lse,
    q_indptr,
    q_position,
    sequences,
    k_raw,
    page_stride,
    indptr,
    slots,
    page_position,
    accum,
    accum_stride,
    score_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Program (listed page, KV head); arguments as in `score.score_open`.

    Args:
        BLOCK: the power of two that DIM is padded to. QUERIES: queries of a product.
    """
    entry, head = tl.program_id(0), tl.program_id(1)
    b = sequence_of_entry(indptr, sequences, entry)
    begin, end = tl.load(q_indptr + b), tl.load(q_indptr + b + 1)
    if begin == end:
        return
    slot = tl.load(slots + entry).to(tl.int64)
    token = tl.arange(0, PAGE_TOKENS)
    position = tl.load(page_position + entry) * PAGE_TOKENS + token
    key_rows = k_raw + slot * page_stride + (token * HEADS + head) * DIM
    keys = _load_rows(key_rows, token >= 0, DIM, BLOCK)
    most = tl.zeros((PAGE_TOKENS,), tl.float32)
    for i in range(GROUP):
        total = tl.zeros((PAGE_TOKENS,), tl.float32)
        for first in range(begin, end, QUERIES):
            query = first + tl.arange(0, QUERIES)
            mask = query < end
            query_head = head * GROUP + i
            at = query.to(tl.int64)
            queries = _load_rows(q + at * q_stride + query_head * DIM, mask, DIM, BLOCK)
            query_lse = tl.load(lse + at * (HEADS * GROUP) + query_head, mask=mask, other=0)
            query_position = tl.load(q_position + query, mask=mask, other=0)
            later = query_position[None, :] > position[:, None]
            total += tl.sum(_received(keys, queries, query_lse, later, score_scale, PRECISION), 1)
        most = tl.maximum(most, total)
    tl.atomic_add(
        accum + slot * accum_stride + head * PAGE_TOKENS + token, most, mask=most > 0, sem="relaxed"
    )


@triton.jit
def decode_kernel(
    q,
    q_stride,
    lse,
    seq_lens,
    k_raw,
    page_stride,
    table,
    table_stride,
    table_width,
    raw_slot,
    accum,
    accum_stride,
    score_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Program (sequence, block of its page table, KV head); arguments as in `score_decode`.

    Args:
        GROUP_BLOCK, BLOCK: what GROUP and DIM are padded to. PAGES: table entries of a block.
    """
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    last = tl.load(seq_lens + b).to(tl.int32) - 1
    first = tl.program_id(1) * PAGES
    if first * PAGE_TOKENS >= last:
        return
    index = first + tl.arange(0, PAGES)
    listed = (index < table_width) & (index * PAGE_TOKENS < last)
    page = tl.load(table + b * table_stride + index, mask=listed, other=0)
    slots = tl.load(raw_slot + page, mask=listed, other=-1)
    is_open = (slots >= 0).to(tl.int32)
    rank = tl.cumsum(is_open, 0) * is_open
    member = tl.arange(0, GROUP_BLOCK)
    mask = member < GROUP
    query_head = head * GROUP + member
    queries = _load_rows(q + b * q_stride + query_head * DIM, mask, DIM, BLOCK)
    query_lse = tl.load(lse + b * (HEADS * GROUP) + query_head, mask=mask, other=0)
    query_lse -= tl.log2((last + 1).to(tl.float32))
    token = tl.arange(0, PAGE_TOKENS)
    for i in range(1, tl.sum(is_open, 0) + 1):
        slot = tl.sum(tl.where(rank == i, slots, 0), 0).to(tl.int64)
        position = tl.sum(tl.where(rank == i, index, 0), 0) * PAGE_TOKENS + token
        key_rows = k_raw + slot * page_stride + (token * HEADS + head) * DIM
        keys = _load_rows(key_rows, token >= 0, DIM, BLOCK)
        seen = (position < last)[:, None] & mask[None, :]
        received = _received(keys, queries, query_lse, seen, score_scale, PRECISION)
        at = accum + slot * accum_stride + head * PAGE_TOKENS + token
        tl.atomic_add(at, tl.max(received, 1), mask=position < last, sem="relaxed")

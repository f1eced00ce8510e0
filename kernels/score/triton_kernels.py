# SPDX-License-Identifier: Apache-2.0
"""Triton: what the tokens of an open page receive, for one KV head.

A page's keys are read once for all queries. Tokens lie on the M axis of the products and queries on
N; what a query may not see is selected away, as tokens not yet written may hold anything. A page
that several sequences share is added to by several programs, in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.ragged import sequence_of_entry
from sglang_diffxkv.kernels.gpu.scores import capped
from sglang_diffxkv.kernels.gpu.views import QueryView
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenLists

QUERIES = 16
"""Sampled queries of a product."""
_TOKENS, _QUERIES = tl.constexpr(PAGE_TOKENS), tl.constexpr(QUERIES)


class RawKeys(NamedTuple):
    """Raw keys [R, 64, H, D], ``page_stride`` elements from one page to the next."""

    data: torch.Tensor
    page_stride: int


class PageTable(NamedTuple):
    """Pages of B sequences, all int32.

    Attributes:
        ids: [B, width], page ids by position. lengths: [B], tokens.
        raw_slot: by page id, as in `score.score_decode`.
    """

    ids: torch.Tensor
    width: int
    lengths: torch.Tensor
    raw_slot: torch.Tensor


class Scores(NamedTuple):
    """fp32 [R, H, 64], ``page_stride`` elements from one raw page's to the next one's."""

    data: torch.Tensor
    page_stride: int


@triton.constexpr_function
def precision_of(dtype):
    """Of products: TF32 holds 16-bit models' elements exactly."""
    return "tf32x3" if dtype == tl.float32 else "tf32"


@triton.jit
def _load_rows(rows, mask, DIM: tl.constexpr):
    """Rows at pointers [N], as fp32 [N, D]; 0 where masked, or padded to a power of two."""
    column = tl.arange(0, triton.next_power_of_2(DIM))
    inside = mask[:, None] & (column < DIM)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _load_keys(keys: RawKeys, slot, head, SHAPE: tl.constexpr):
    """All keys of a page's head, fp32 [64, D]."""
    token = tl.arange(0, _TOKENS)
    rows = keys.data + slot * keys.page_stride + (token * SHAPE.kv_heads + head) * SHAPE.dim
    return _load_rows(rows, token >= 0, SHAPE.dim)


@triton.jit
def _received(keys, q, lse, visible, queries: QueryView, PRECISION: tl.constexpr):
    """Probabilities [tokens, queries]; 0 where not visible."""
    scores = tl.dot(keys, tl.trans(q), input_precision=PRECISION) * queries.score_scale
    scores = capped(scores, queries.cap)
    return tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)


@triton.jit
def _add(scores: Scores, slot, head, received, mask):
    """Add what the tokens of a page's head received, fp32 [64]."""
    at = scores.data + slot * scores.page_stride + head * _TOKENS + tl.arange(0, _TOKENS)
    tl.atomic_add(at, received, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["sequences"])
def open_kernel(
    queries: QueryView,
    lse,
    keys: RawKeys,
    opened: OpenLists,
    sequences,
    scores: Scores,
    SHAPE: tl.constexpr,
):
    """Program (listed page, KV head): see `score.score_open`; queries have a position each."""
    PRECISION: tl.constexpr = precision_of(queries.data.dtype.element_ty)
    entry, head = tl.program_id(0), tl.program_id(1)
    b = sequence_of_entry(opened.indptr, sequences, entry)
    begin, end = tl.load(queries.indptr + b), tl.load(queries.indptr + b + 1)
    if begin == end:
        return
    slot = tl.load(opened.slots + entry).to(tl.int64)
    position = tl.load(opened.position + entry) * _TOKENS + tl.arange(0, _TOKENS)
    page_keys = _load_keys(keys, slot, head, SHAPE)
    most = tl.zeros((_TOKENS,), tl.float32)
    for i in range(SHAPE.group):
        total = tl.zeros((_TOKENS,), tl.float32)
        for first in range(begin, end, _QUERIES):
            query = first + tl.arange(0, _QUERIES)
            mask = query < end
            query_head = head * SHAPE.group + i
            at = query.to(tl.int64)
            rows = queries.data + at * queries.stride + query_head * SHAPE.dim
            q = _load_rows(rows, mask, SHAPE.dim)
            query_lse = tl.load(lse + at * SHAPE.q_heads + query_head, mask=mask, other=0)
            query_position = tl.load(queries.position + query, mask=mask, other=0)
            later = query_position[None, :] > position[:, None]
            received = _received(page_keys, q, query_lse, later, queries, PRECISION)
            total += tl.sum(received, 1)
        most = tl.maximum(most, total)
    _add(scores, slot, head, most, most > 0)


@triton.jit
def decode_kernel(
    queries: QueryView,
    lse,
    pages: PageTable,
    keys: RawKeys,
    scores: Scores,
    SHAPE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Program (sequence, block of its page table, KV head): see `score.score_decode`.

    Args:
        SHAPE: `HeadShape`; of a sequence's queries the first one counts.
        PAGES: table entries of a block.
    """
    PRECISION: tl.constexpr = precision_of(queries.data.dtype.element_ty)
    GROUP_BLOCK: tl.constexpr = max(16, triton.next_power_of_2(SHAPE.group))
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    last = tl.load(pages.lengths + b).to(tl.int32) - SHAPE.queries
    first = tl.program_id(1) * PAGES
    if first * _TOKENS >= last:
        return
    index = first + tl.arange(0, PAGES)
    listed = (index < pages.width) & (index * _TOKENS < last)
    page = tl.load(pages.ids + b * pages.width + index, mask=listed, other=0)
    slots = tl.load(pages.raw_slot + page, mask=listed, other=-1)
    is_open = (slots >= 0).to(tl.int32)
    ordinal = tl.cumsum(is_open, 0) * is_open
    member = tl.arange(0, GROUP_BLOCK)
    mask = member < SHAPE.group
    query_head = head * SHAPE.group + member
    rows = queries.data + b * SHAPE.queries * queries.stride + query_head * SHAPE.dim
    q = _load_rows(rows, mask, SHAPE.dim)
    query_lse = tl.load(lse + b * SHAPE.queries * SHAPE.q_heads + query_head, mask=mask, other=0)
    query_lse -= tl.log2((last + 1).to(tl.float32))
    for i in range(1, tl.sum(is_open, 0) + 1):
        slot = tl.sum(tl.where(ordinal == i, slots, 0), 0).to(tl.int64)
        start = tl.sum(tl.where(ordinal == i, index, 0), 0) * _TOKENS
        position = start + tl.arange(0, _TOKENS)
        page_keys = _load_keys(keys, slot, head, SHAPE)
        seen = (position < last)[:, None] & mask[None, :]
        received = _received(page_keys, q, query_lse, seen, queries, PRECISION)
        _add(scores, slot, head, tl.max(received, 1), position < last)

# SPDX-License-Identifier: Apache-2.0
"""Triton: causal attention of a block of query rows over its sequence's open pages."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.rows import (
    load_queries,
    locate_rows,
    rows_of,
    softmax_step,
    store_rows,
)
from sglang_diffxkv.kernels.gpu.ragged import count_at_most
from sglang_diffxkv.kernels.gpu.scores import capped


@triton.jit(do_not_specialize=["sequences"])
def open_kernel(queries, sequences, raw, lists, merged, TRAITS: tl.constexpr):
    """Program (block of rows, KV head); see `extend.extend_open`.

    Args:
        queries: `QueryView`, of so many sequences.
        raw: `RawView`.
        lists: `pages.OpenLists`.
        merged: `AttentionState`, written.
        TRAITS: `traits.Traits`; tokens of a tile divide a page's.
    """
    PAGE_TOKENS: tl.constexpr = 64
    BLOCK_M: tl.constexpr = TRAITS.tile.rows
    BLOCK_N: tl.constexpr = TRAITS.tile.tokens
    GROUP: tl.constexpr = TRAITS.shape.group
    DIM: tl.constexpr = TRAITS.shape.dim
    DIM_BLOCK: tl.constexpr = TRAITS.shape.dim_block
    TILES: tl.constexpr = PAGE_TOKENS // BLOCK_N
    head = tl.program_id(1)
    block = locate_rows(queries.indptr, sequences, GROUP, BLOCK_M)
    if block.first >= block.rows:
        return
    b = block.sequence
    rows = rows_of(block.start, block.first, block.rows, head, GROUP, BLOCK_M)
    q = load_queries(queries, rows, TRAITS)

    start = tl.load(queries.position + b)
    position = start + (block.first + tl.arange(0, BLOCK_M)) // GROUP
    last = start + (tl.minimum(block.first + BLOCK_M, block.rows) - 1) // GROUP
    # Pages whose first token the block's last query sees; the others may hold anything.
    begin, end = tl.load(lists.indptr + b), tl.load(lists.indptr + b + 1)
    end = count_at_most(lists.position, begin, end, last // PAGE_TOKENS)
    if queries.window_left is not None:
        # Of these, pages whose last token the block's first query sees.
        earliest = tl.maximum(start + block.first // GROUP - queries.window_left, 0)
        begin = count_at_most(lists.position, begin, end, earliest // PAGE_TOKENS - 1)

    column = tl.arange(0, DIM_BLOCK)
    top = tl.zeros((BLOCK_M,), tl.float32) - float("inf")
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_BLOCK), tl.float32)
    for tile in tl.range(begin * TILES, end * TILES, disable_licm=True):
        page = tile // TILES
        token = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        token_position = tl.load(lists.position + page) * PAGE_TOKENS + token
        written = token_position <= last
        if queries.window_left is not None:
            written = written & (token_position >= earliest)
        mask = written[:, None] & (column < DIM)[None, :]
        at = tl.load(lists.slots + page).to(tl.int64) * raw.page_stride + head * DIM
        at = at + token[:, None] * (TRAITS.shape.kv_heads * DIM) + column[None, :]
        keys = tl.load(raw.k + at, mask=mask, other=0).to(tl.float32).to(TRAITS.compute)
        scores = tl.dot(q, tl.trans(keys), input_precision=TRAITS.precision)
        scores = capped(scores * queries.score_scale, queries.cap)
        visible = token_position[None, :] <= position[:, None]
        if queries.window_left is not None:
            oldest = position - queries.window_left
            visible = visible & (token_position[None, :] >= oldest[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        weights, fade, top, total = softmax_step(top, total, scores)
        values = tl.load(raw.v + at, mask=mask, other=0).to(tl.float32).to(TRAITS.compute)
        weights = weights.to(TRAITS.compute)
        acc = tl.dot(weights, values, acc * fade[:, None], input_precision=TRAITS.precision)

    total = tl.where(total > 0, total, 1.0)
    store_rows(merged, rows, acc / total[:, None], top + tl.log2(total), TRAITS)

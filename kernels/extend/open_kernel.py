# SPDX-License-Identifier: Apache-2.0
"""Triton: causal attention of a block of query rows over its sequence's open pages."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.rows import locate_rows, query_of_rows, softmax_step
from sglang_diffxkv.kernels.gpu.ragged import count_at_most


@triton.jit(do_not_specialize=["sequences"])
def open_kernel(
    q,
    q_stride,
    q_indptr,
    q_position,
    sequences,
    k_raw,
    v_raw,
    page_stride,
    indptr,
    slots,
    page_position,
    out,
    lse,
    score_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of rows, KV head); arguments as in `open.extend_open`.

    Args:
        BLOCK: the power of two that DIM is padded to.
        COMPUTE, PRECISION: dtype and input precision of the products.
        BLOCK_M: rows; BLOCK_N: tokens of a tile, which divide PAGE_TOKENS.
    """
    TILES: tl.constexpr = PAGE_TOKENS // BLOCK_N
    head = tl.program_id(1)
    b, start, first, rows = locate_rows(q_indptr, sequences, GROUP, BLOCK_M)
    if first >= rows:
        return
    row = first + tl.arange(0, BLOCK_M)
    seen = row < rows
    query, query_head = query_of_rows(start, first, head, GROUP, BLOCK_M)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    q_rows = q + query * q_stride + query_head * DIM
    queries = (
        tl.load(q_rows[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0)
        .to(tl.float32)
        .to(COMPUTE)
    )

    position = tl.load(q_position + b) + row // GROUP
    last = tl.load(q_position + b) + (tl.minimum(first + BLOCK_M, rows) - 1) // GROUP
    begin = tl.load(indptr + b)
    # Pages whose first token the block's last query sees; the others may hold anything.
    end = count_at_most(page_position, begin, tl.load(indptr + b + 1), last // PAGE_TOKENS)

    top = tl.zeros((BLOCK_M,), tl.float32) - float("inf")
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for tile in tl.range(begin * TILES, end * TILES, disable_licm=True):
        page = tile // TILES
        token = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        token_position = tl.load(page_position + page) * PAGE_TOKENS + token
        written = token_position <= last
        mask = written[:, None] & inside[None, :]
        at = tl.load(slots + page).to(tl.int64) * page_stride + head * DIM
        at = at + token[:, None] * (HEADS * DIM) + column[None, :]
        keys = tl.load(k_raw + at, mask=mask, other=0).to(tl.float32).to(COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * score_scale
        visible = token_position[None, :] <= position[:, None]
        scores = tl.where(visible, scores, -float("inf"))
        weights, fade, top, total = softmax_step(top, total, scores)
        values = tl.load(v_raw + at, mask=mask, other=0).to(tl.float32).to(COMPUTE)
        acc = tl.dot(weights.to(COMPUTE), values, acc * fade[:, None], input_precision=PRECISION)

    total = tl.where(total > 0, total, 1.0)
    at = query * (HEADS * GROUP) + query_head
    tl.store(
        out + (at * DIM)[:, None] + column[None, :],
        acc / total[:, None],
        mask=seen[:, None] & inside[None, :],
    )
    tl.store(lse + at, top + tl.log2(total), mask=seen)

# SPDX-License-Identifier: Apache-2.0
"""Triton: blocks of query rows, which are a sequence's new tokens times its GQA group.

Row r of a sequence and KV head is query head ``r % group`` of new token ``r // group``: keys and
values are read once for the whole group.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.ragged import first_block, sequence_of_block


class RowBlock(NamedTuple):
    """Rows of a program, and how they are found again.

    Attributes:
        sequence: whose rows they are.
        start: the sequence's first query.
        first: which of its rows come first in this block.
        rows: how many it has, which may be fewer: then there is nothing to do.
    """

    sequence: tl.tensor
    start: tl.tensor
    first: tl.tensor
    rows: tl.tensor


class QueryRows(NamedTuple):
    """Which of a block's rows exist [M], their queries int64 [M], and their query heads [M]."""

    seen: tl.tensor
    query: tl.tensor
    head: tl.tensor


@triton.jit
def locate_rows(indptr, sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The `RowBlock` of this program, given ``indptr`` of `QueryView`."""
    block = tl.program_id(0)
    b = sequence_of_block(indptr, sequences, block, GROUP, BLOCK_M)
    start = tl.load(indptr + b)
    first = (block - first_block(indptr, b, GROUP, BLOCK_M)) * BLOCK_M
    return RowBlock(b, start, first, (tl.load(indptr + b + 1) - start) * GROUP)


@triton.jit
def rows_of(start, first, rows, head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """`QueryRows` from ``first`` on, of a KV head and the sequence that starts with a query."""
    row = first + tl.arange(0, BLOCK_M)
    return QueryRows(row < rows, (start + row // GROUP).to(tl.int64), head * GROUP + row % GROUP)


@triton.jit
def read_rows(indptr, block, head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """`rows_of` a block.

    Read from memory each time, or the compiler would keep all rows' addresses in registers.
    """
    query = tl.load(indptr + block.sequence, volatile=True)
    return rows_of(query, query + (block.first - block.start), block.rows, head, GROUP, BLOCK_M)


@triton.jit
def load_queries(queries, rows, TRAITS: tl.constexpr):
    """Queries of these rows in the dtype of the products: [M, dim_block]."""
    column = tl.arange(0, TRAITS.shape.dim_block)
    inside = rows.seen[:, None] & (column < TRAITS.shape.dim)[None, :]
    at = queries.data + rows.query * queries.stride + rows.head * TRAITS.shape.dim
    loaded = tl.load(at[:, None] + column[None, :], mask=inside, other=0)
    return loaded.to(tl.float32).to(TRAITS.compute)


@triton.jit
def store_rows(merged, rows, out, lse, TRAITS: tl.constexpr):
    """Write the states of these rows: out [M, dim_block] and lse [M] to an `AttentionState`."""
    column = tl.arange(0, TRAITS.shape.dim_block)
    inside = rows.seen[:, None] & (column < TRAITS.shape.dim)[None, :]
    at = rows.query * TRAITS.shape.q_heads + rows.head
    tl.store(merged.lse + at, lse, mask=rows.seen)
    tl.store(merged.out + (at * TRAITS.shape.dim)[:, None] + column[None, :], out, mask=inside)


@triton.jit
def softmax_step(top, total, scores):
    """Take a tile's base-2 scores [M, N] into running maxima and sums [M]; -inf is masked.

    Returns:
        Weights [M, N] of the tile, what earlier sums are to be multiplied by [M], top, total.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Rows that see nothing yet: any finite base keeps -inf - -inf = NaN out.
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    return weights, fade, new_top, total * fade + tl.sum(weights, 1)

# SPDX-License-Identifier: Apache-2.0
"""Triton: blocks of query rows, which are a sequence's new tokens times its GQA group.

Row r of a sequence and KV head is query head ``r % GROUP`` of new token ``r // GROUP``: keys and
values are read once for the whole group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.ragged import first_block, sequence_of_block


@triton.jit
def locate_rows(q_indptr, sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of this program.

    Returns:
        The sequence; its first query; which of its rows come first in this block; how many rows it
        has, which may be fewer: then there is nothing to do.
    """
    block = tl.program_id(0)
    b = sequence_of_block(q_indptr, sequences, block, GROUP, BLOCK_M)
    start = tl.load(q_indptr + b)
    first = (block - first_block(q_indptr, b, GROUP, BLOCK_M)) * BLOCK_M
    return b, start, first, (tl.load(q_indptr + b + 1) - start) * GROUP


@triton.jit
def query_of_rows(start, first, head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query int64 [BLOCK_M] and query head int32 [BLOCK_M] of rows ``first ...`` of a KV head."""
    row = first + tl.arange(0, BLOCK_M)
    return (start + row // GROUP).to(tl.int64), head * GROUP + row % GROUP


@triton.jit
def read_rows(start, ahead, rows, head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which of a block's rows exist, their queries and their query heads.

    Read from memory each time, or the compiler would keep all rows' addresses in registers.

    Args:
        start: pointer to the first query of the sequence. ahead: what the block's first row has
            more than that. rows: of the sequence.
    """
    query = tl.load(start, volatile=True)
    first = query + ahead
    seen = first + tl.arange(0, BLOCK_M) < rows
    query, query_head = query_of_rows(query, first, head, GROUP, BLOCK_M)
    return seen, query, query_head


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

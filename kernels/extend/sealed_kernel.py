# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of a block of query rows over all sealed pages of its sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.order import quarters
from sglang_diffxkv.kernels.extend.rows import locate_rows, read_rows
from sglang_diffxkv.kernels.extend.tiles import PageRange, attend_tier, empty_state, sums_of
from sglang_diffxkv.kernels.gpu.sections import records_from


@triton.jit(do_not_specialize=["sequences", "part_rows"])
def sealed_kernel(queries, sequences, part_rows, lists, sealed, parts, TRAITS: tl.constexpr):
    """Program (block of rows, KV head, split of the pages); see `extend.extend_sealed`.

    The high tier comes first, then the low one: each wants the queries in its own order.

    Args:
        queries: `QueryView`, of so many sequences.
        part_rows: queries times query heads.
        lists: `pages.SealedLists`.
        sealed: `SealedView`.
        parts: `AttentionState`, fp32 [splits, part_rows, D] and [splits, part_rows]; written.
        TRAITS: `traits.SealedTraits`.
    """
    BLOCK_M: tl.constexpr = TRAITS.tile.rows
    GROUP: tl.constexpr = TRAITS.shape.group
    DIM: tl.constexpr = TRAITS.shape.dim
    DIM_BLOCK: tl.constexpr = TRAITS.shape.dim_block
    head, split = tl.program_id(1), tl.program_id(2)
    out = parts.out + split.to(tl.int64) * part_rows * DIM
    lse = parts.lse + split.to(tl.int64) * part_rows
    block = locate_rows(queries.indptr, sequences, GROUP, BLOCK_M)
    if block.first >= block.rows:
        return
    b = block.sequence
    sealed = records_from(sealed, head)
    rows = read_rows(queries.indptr, block, head, GROUP, BLOCK_M)
    begin = tl.load(lists.indptr + b)
    share = tl.cdiv(tl.load(lists.indptr + b + 1) - begin, tl.num_programs(2))
    begin += split * share
    end = tl.minimum(begin + share, tl.load(lists.indptr + b + 1))
    pages = PageRange(lists.pages, begin, end)
    state = empty_state(BLOCK_M, DIM_BLOCK)
    state = attend_tier(state, queries, rows, sealed, pages, True, TRAITS)
    rows = read_rows(queries.indptr, block, head, GROUP, BLOCK_M)
    state = attend_tier(state, queries, rows, sealed, pages, False, TRAITS)
    rows = read_rows(queries.indptr, block, head, GROUP, BLOCK_M)
    at = rows.query * TRAITS.shape.q_heads + rows.head
    total, zeros = sums_of(state.sums, 0), sums_of(state.sums, 1)
    tl.store(lse + at, state.base + tl.log2(total), mask=rows.seen)
    total = tl.where(total > 0, total, 1.0)
    column, inside = quarters(tl.arange(0, DIM_BLOCK), DIM, DIM_BLOCK)
    result = (state.acc + zeros[:, None]) / total[:, None]
    inside = rows.seen[:, None] & inside[None, :]
    tl.store(out + (at * DIM)[:, None] + column[None, :], result, mask=inside)

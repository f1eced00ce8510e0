# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of a block of query rows over all sealed pages of its sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.order import quarters
from sglang_diffxkv.kernels.extend.rows import locate_rows, read_rows
from sglang_diffxkv.kernels.extend.tiles import attend_tier, empty_state, sums_of


@triton.jit(
    do_not_specialize=["sequences", "part_rows"], do_not_specialize_on_alignment=["frames", "heads"]
)
def sealed_kernel(
    q,
    q_stride,
    q_indptr,
    sequences,
    part_rows,
    arena,
    frames,
    frames_stride,
    heads,
    indptr,
    pages,
    out,
    lse,
    score_scale,
    byte_mask,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HIGH_KEY_BITS: tl.constexpr,
    HIGH_VALUE_BITS: tl.constexpr,
    LOW_KEY_BITS: tl.constexpr,
    LOW_VALUE_BITS: tl.constexpr,
    RAW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of rows, KV head, split of the pages); arguments as in `extend_sealed`.

    The high tier comes first, then the low one: each wants the queries in its own order.

    Args:
        part_rows: queries times query heads.
        out, lse: fp32 [splits, part_rows, DIM] and [splits, part_rows].
        byte_mask: of `unpack_words`.
        DIM_BLOCK: the power of two that DIM is padded to.
        RAW: dtype of raw elements; COMPUTE, PRECISION: dtype and precision of their products.
        PAGES: pages of a group; BLOCK_M: rows; BLOCK_N: tokens of a tile.
    """
    head, split = tl.program_id(1), tl.program_id(2)
    out += split.to(tl.int64) * part_rows * DIM
    lse += split.to(tl.int64) * part_rows
    b, start, first, rows = locate_rows(q_indptr, sequences, GROUP, BLOCK_M)
    if first >= rows:
        return
    ahead = first - start
    heads += head * 2
    seen, query, query_head = read_rows(q_indptr + b, ahead, rows, head, GROUP, BLOCK_M)
    q_rows = q + query * q_stride + query_head * DIM
    first_page = tl.load(indptr + b)
    share = tl.cdiv(tl.load(indptr + b + 1) - first_page, tl.num_programs(2))
    first_page += split * share
    end_page = tl.minimum(first_page + share, tl.load(indptr + b + 1))
    state = empty_state(BLOCK_M, DIM_BLOCK)
    state = attend_tier(
        state, q_rows, seen, arena, frames, frames_stride, heads, HEADS * 2, pages, first_page,
        end_page, score_scale, byte_mask, HIGH_KEY_BITS, HIGH_VALUE_BITS, LOW_KEY_BITS,
        LOW_VALUE_BITS, True, RAW, COMPUTE, PRECISION, DIM, DIM_BLOCK, BLOCK_N, PAGES, FRAME_BYTES,
    )  # fmt: skip
    seen, query, query_head = read_rows(q_indptr + b, ahead, rows, head, GROUP, BLOCK_M)
    q_rows = q + query * q_stride + query_head * DIM
    state = attend_tier(
        state, q_rows, seen, arena, frames, frames_stride, heads, HEADS * 2, pages, first_page,
        end_page, score_scale, byte_mask, HIGH_KEY_BITS, HIGH_VALUE_BITS, LOW_KEY_BITS,
        LOW_VALUE_BITS, False, RAW, COMPUTE, PRECISION, DIM, DIM_BLOCK, BLOCK_N, PAGES, FRAME_BYTES,
    )  # fmt: skip
    seen, query, query_head = read_rows(q_indptr + b, ahead, rows, head, GROUP, BLOCK_M)
    base, sums, acc = state
    at = query * (HEADS * GROUP) + query_head
    total, zeros = sums_of(sums, 0), sums_of(sums, 1)
    tl.store(lse + at, base + tl.log2(total), mask=seen)
    total = tl.where(total > 0, total, 1.0)
    column, inside = quarters(tl.arange(0, DIM_BLOCK), DIM, DIM_BLOCK)
    result = (acc + zeros[:, None]) / total[:, None]
    tl.store(
        out + (at * DIM)[:, None] + column[None, :], result, mask=seen[:, None] & inside[None, :]
    )

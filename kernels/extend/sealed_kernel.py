# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of a block of query rows over all sealed pages of its sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.rows import locate_rows, query_of_rows
from sglang_diffxkv.kernels.extend.tiles import WEIGHT_UNIT, attend_tier
from sglang_diffxkv.kernels.gpu.payload import CODE_UNIT, row_bytes, section_starts


@triton.jit
def _load_query_quarter(rows, seen, i: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = seen[:, None] & (column < QUARTER)[None, :]
    at = rows[:, None] + (i * QUARTER + column)[None, :]
    return tl.load(at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store_quarter(rows, seen, values, i: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = seen[:, None] & (column < QUARTER)[None, :]
    tl.store(rows[:, None] + (i * QUARTER + column)[None, :], values, mask=inside)


@triton.jit
def sealed_kernel(
    q,
    q_stride,
    q_indptr,
    sequences,
    arena,
    frames,
    frames_stride,
    heads,
    indptr,
    pages,
    out,
    lse,
    score_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HIGH_KEY_BITS: tl.constexpr,
    HIGH_VALUE_BITS: tl.constexpr,
    LOW_KEY_BITS: tl.constexpr,
    LOW_VALUE_BITS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of rows, KV head); arguments as in `sealed.extend_sealed`.

    Args:
        BLOCK: the power of two that a quarter of DIM is padded to.
        PAGES: pages of a group; BLOCK_M: rows; BLOCK_N: tokens of a tile.
    """
    QUARTER: tl.constexpr = DIM // 4
    ITEM_BYTES: tl.constexpr = RAW.primitive_bitwidth // 8
    head = tl.program_id(1)
    b, start, first, rows = locate_rows(q_indptr, sequences, GROUP, BLOCK_M)
    if first >= rows:
        return
    seen = first + tl.arange(0, BLOCK_M) < rows
    query, query_head = query_of_rows(start, first, head, GROUP, BLOCK_M)
    q_rows = q + query * q_stride + query_head * DIM
    q0 = _load_query_quarter(q_rows, seen, 0, QUARTER, BLOCK)
    q1 = _load_query_quarter(q_rows, seen, 1, QUARTER, BLOCK)
    q2 = _load_query_quarter(q_rows, seen, 2, QUARTER, BLOCK)
    q3 = _load_query_quarter(q_rows, seen, 3, QUARTER, BLOCK)
    # Zeros cancel against codes exactly only if both meet the same, rounded queries.
    halves = q0.to(tl.float16).to(tl.float32) + q1.to(tl.float16).to(tl.float32)
    halves += q2.to(tl.float16).to(tl.float32) + q3.to(tl.float16).to(tl.float32)
    q_sum = tl.sum(halves, 1)

    nothing = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    state = nothing - float("inf"), nothing, nothing, acc, acc, acc, acc
    end = tl.load(indptr + b + 1)
    for group in range(tl.load(indptr + b), end, PAGES):
        listed = group + tl.arange(0, PAGES)
        page = tl.load(pages + listed, mask=listed < end, other=0).to(tl.int64)
        record = heads + (page * HEADS + head) * 2
        offset = tl.load(record, mask=listed < end, other=0)
        counts = tl.load(record + 1, mask=listed < end, other=0)
        n_high, n_low = counts & 0xFF, counts >> 8
        key_high, value_high, key_low, value_low, meta_high, meta_low, _ = section_starts(
            n_high,
            n_low,
            row_bytes(DIM, HIGH_KEY_BITS, ITEM_BYTES),
            row_bytes(DIM, HIGH_VALUE_BITS, ITEM_BYTES),
            row_bytes(DIM, LOW_KEY_BITS, ITEM_BYTES),
            row_bytes(DIM, LOW_VALUE_BITS, ITEM_BYTES),
            8 if HIGH_KEY_BITS else 0,
            8 if LOW_KEY_BITS else 0,
        )
        table = page * frames_stride
        state = attend_tier(
            state,
            (q0, q1, q2, q3),
            q_sum,
            arena,
            frames,
            table,
            n_high,
            offset + key_high,
            offset + value_high,
            offset + meta_high,
            score_scale,
            HIGH_KEY_BITS,
            HIGH_VALUE_BITS,
            RAW,
            PRECISION,
            DIM,
            BLOCK,
            BLOCK_N,
            PAGES,
            FRAME_BYTES,
        )
        state = attend_tier(
            state,
            (q0, q1, q2, q3),
            q_sum,
            arena,
            frames,
            table,
            n_low,
            offset + key_low,
            offset + value_low,
            offset + meta_low,
            score_scale,
            LOW_KEY_BITS,
            LOW_VALUE_BITS,
            RAW,
            PRECISION,
            DIM,
            BLOCK,
            BLOCK_N,
            PAGES,
            FRAME_BYTES,
        )
    top, total, zeros, a0, a1, a2, a3 = state
    total = tl.where(total > 0, total, 1.0)
    share = 1 / total
    scale, shift = (share * (CODE_UNIT / WEIGHT_UNIT))[:, None], (zeros * share)[:, None]
    at = query * (HEADS * GROUP) + query_head
    out_rows = out + at * DIM
    _store_quarter(out_rows, seen, a0 * scale + shift, 0, QUARTER, BLOCK)
    _store_quarter(out_rows, seen, a1 * scale + shift, 1, QUARTER, BLOCK)
    _store_quarter(out_rows, seen, a2 * scale + shift, 2, QUARTER, BLOCK)
    _store_quarter(out_rows, seen, a3 * scale + shift, 3, QUARTER, BLOCK)
    tl.store(lse + at, top + tl.log2(total), mask=seen)

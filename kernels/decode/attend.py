# SPDX-License-Identifier: Apache-2.0
"""Triton: decode attention of one work item, tokens of one kind of one sequence and KV head.

The bytes of a head are read once for its whole GQA group. Tokens lie on the M axis of the products
and the group's queries on N, which needs the fewest instructions per element; scales and zeros
never touch an element, but are folded into the scores and the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.decode.tiles import (
    attend_rows,
    empty_state,
    lane_sums,
    load_query,
    softmax_step,
    store_part,
)
from sglang_diffxkv.kernels.gpu.fragments import (
    by_lane,
    by_rank,
    dots_by_lane,
    key_operand,
    value_operand,
    value_word,
)
from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    arena_row,
    load_meta_at,
    load_rows,
    row_bytes,
    section_starts,
)
from sglang_diffxkv.kernels.gpu.ranks import page_of_rank, per_row

OPEN: tl.constexpr = tl.constexpr(0)
HIGH: tl.constexpr = tl.constexpr(1)
LOW: tl.constexpr = tl.constexpr(2)
"""Kinds of tokens: of open pages, and of sealed ones by tier."""


# Tables of one layer start anywhere: not to be compiled for each alignment.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["frames", "heads"])
def attend_item(
    items,
    row_start,
    rows,
    q,
    q_sealed,
    arena,
    frames,
    heads,
    keys,
    values,
    first_page,
    num_pages,
    pages,
    raw_slot,
    last_len,
    out,
    lse,
    score_scale,
    q_stride,
    q_sealed_stride,
    frames_stride,
    heads_stride,
    raw_stride,
    byte_mask,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
    IN_FP32: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    HAS_SEALED: tl.constexpr,
):
    """Attention over the tokens of item ``program_id(0)``; writes out [GROUP, DIM] and lse [GROUP].

    Args:
        items, row_start: int32 [N, 4] and [rows + 1] of `plan.DecodePlan`.
        q, q_sealed: [B, Hq, D], as open and as sealed pages want them, with so many elements from
            one sequence's to the next one's.
        score_scale: sm_scale * log2(e).
        KEY_HIGH ... VALUE_LOW: bits per element of the two tiers, 0 for raw.
        GROUP_BLOCK, DIM_BLOCK: powers of two that the group and D are padded to.
        BLOCK_N: tokens of a tile; half as many where they are raw, but at least 16.
        PAGES: pages that are addressed at a time.
        STAGES: of the loops over codes: what a tile loads depends on entries of the frame table, so
            of five two are between these and the codes, and two between the codes and their use.
        IN_FP32: whether raw tokens are multiplied in fp32, not in their own 16 bits.
    """
    item = tl.program_id(0)
    if item >= tl.load(row_start + rows):
        return
    row = tl.load(items + item * 4)
    page_at = tl.load(items + item * 4 + 1)
    page_end = tl.load(items + item * 4 + 2)
    kind = row % 3
    head = row // 3 % KV_HEADS
    sequence = row // (3 * KV_HEADS)
    pages += tl.load(first_page + sequence)
    q += sequence.to(tl.int64) * q_stride + head * GROUP * DIM
    q_sealed += sequence.to(tl.int64) * q_sealed_stride + head * GROUP * DIM
    out += item * GROUP * DIM
    lse += item * GROUP
    if HAS_OPEN and kind == OPEN:
        last_page = tl.load(num_pages + sequence) - 1
        last = tl.load(last_len + sequence)
        _attend_open(
            q, keys + head * DIM, values + head * DIM, pages, raw_slot, page_at, page_end,
            last_page, last, raw_stride, out, lse, score_scale, KV_HEADS * DIM, GROUP, GROUP_BLOCK,
            DIM, DIM_BLOCK, max(16, BLOCK_N // 2), PAGES, IN_FP32,
        )  # fmt: skip
    if HAS_SEALED:
        heads += head * 2
        if kind == HIGH:
            _attend_tier(
                q_sealed, arena, frames, heads, keys.dtype, pages, raw_slot, page_at,
                page_end, frames_stride, heads_stride, byte_mask, out, lse, score_scale, GROUP,
                GROUP_BLOCK, DIM, DIM_BLOCK, KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, FRAME_BYTES,
                BLOCK_N, PAGES, STAGES, IN_FP32, HAS_OPEN, True,
            )  # fmt: skip
        if kind == LOW:
            _attend_tier(
                q_sealed, arena, frames, heads, keys.dtype, pages, raw_slot, page_at,
                page_end, frames_stride, heads_stride, byte_mask, out, lse, score_scale, GROUP,
                GROUP_BLOCK, DIM, DIM_BLOCK, KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, FRAME_BYTES,
                BLOCK_N, PAGES, STAGES, IN_FP32, HAS_OPEN, False,
            )  # fmt: skip


@triton.jit
def _attend_tier(
    q,
    arena,
    frames,
    heads,
    RAW: tl.constexpr,
    pages,
    raw_slot,
    page_at,
    page_end,
    frames_stride,
    heads_stride,
    byte_mask,
    out,
    lse,
    score_scale,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
    IN_FP32: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    IS_HIGH: tl.constexpr,
):
    """The tokens of one tier in pages ``[page_at, page_end)``.

    Args:
        RAW: pointer type of the raw pages, whose elements raw tiers have.
    """
    ITEM: tl.constexpr = RAW.element_ty.primitive_bitwidth // 8
    KEY_BITS: tl.constexpr = KEY_HIGH if IS_HIGH else KEY_LOW
    VALUE_BITS: tl.constexpr = VALUE_HIGH if IS_HIGH else VALUE_LOW
    KEY_BYTES: tl.constexpr = row_bytes(DIM, KEY_BITS, ITEM)
    VALUE_BYTES: tl.constexpr = row_bytes(DIM, VALUE_BITS, ITEM)
    VALUE_WORD: tl.constexpr = value_word(VALUE_BITS, DIM_BLOCK)
    # Rows in 16 bits take twice the registers.
    TILE: tl.constexpr = BLOCK_N if KEY_BITS else max(16, BLOCK_N // 2)
    ROWS: tl.constexpr = (TILE + 31) // 32
    if KEY_BITS:
        query = tl.trans(load_query(q, KEY_BITS, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK).to(tl.float16))
        # Of the queries as rounded to fp16, or large zeros would not cancel.
        rounded = load_query(q, 0, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK).to(tl.float16)
        q_sum = tl.sum(rounded.to(tl.float32), 1) * score_scale
    else:
        query = tl.trans(load_query(q, 0, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK))
    top, total, zeros, acc = empty_state(GROUP_BLOCK, DIM_BLOCK)
    for at in range(page_at, page_end, PAGES):
        place = at + tl.arange(0, PAGES)
        valid = place < page_end
        page = tl.load(pages + place, mask=valid, other=0)
        if HAS_OPEN:
            valid = valid & (tl.load(raw_slot + page, mask=valid, other=0) < 0)
        record = heads + page.to(tl.int64) * heads_stride
        base = tl.load(record, mask=valid, other=0)
        word = tl.load(record + 1, mask=valid, other=0)
        n_high, n_low = word & 0xFF, word >> 8 & 0xFF
        starts = section_starts(
            n_high,
            n_low,
            row_bytes(DIM, KEY_HIGH, ITEM),
            row_bytes(DIM, VALUE_HIGH, ITEM),
            row_bytes(DIM, KEY_LOW, ITEM),
            row_bytes(DIM, VALUE_LOW, ITEM),
            8 if KEY_HIGH else 0,
            8 if KEY_LOW else 0,
        )
        counts = n_high if IS_HIGH else n_low
        ends = tl.cumsum(counts, 0)
        # As if a page's ranks started with it: a row's number is then linear in its rank.
        skipped = ends - counts
        key_start = (base + (starts[0] if IS_HIGH else starts[2])) // KEY_BYTES - skipped
        value_start = (base + (starts[1] if IS_HIGH else starts[3])) // VALUE_BYTES - skipped
        meta_start = (base + (starts[4] if IS_HIGH else starts[5])) // 8 - skipped
        n = tl.sum(counts, 0)
        ends = per_row(ends, ROWS)
        table = per_row(page * frames_stride, ROWS)
        key_start, value_start = per_row(key_start, ROWS), per_row(value_start, ROWS)
        meta_start = per_row(meta_start, ROWS)
        for first in tl.range(0, n, TILE, num_stages=STAGES if KEY_BITS else 1):
            mask = first + tl.arange(0, TILE) < n
            # Beyond the last token that one is read again, without masks, and not looked at.
            rank = tl.minimum(first + tl.arange(0, TILE), n - 1)
            rank = tl.reshape(rank, [ROWS, TILE // ROWS])
            group = page_of_rank(ends, rank, PAGES)
            entry = frames + tl.gather(table, group, 1)
            key_at = tl.gather(key_start, group, 1) + rank
            key_at = arena_row(entry, key_at, FRAME_BYTES, KEY_BYTES)
            value_at = tl.gather(value_start, group, 1) + rank
            value_at = arena_row(entry, value_at, FRAME_BYTES, VALUE_BYTES)
            if KEY_BITS:
                meta_at = tl.gather(meta_start, group, 1) + rank
                meta_at = arena_row(entry, meta_at, FRAME_BYTES, 8)
                key_scale, key_zero, value_scale, value_zero = load_meta_at(arena, meta_at)
                key = load_rows(arena, key_at, KEY_BITS, 32, DIM, DIM_BLOCK)
                value = load_rows(arena, value_at, VALUE_BITS, VALUE_WORD, DIM, DIM_BLOCK)
                dots = tl.dot(key_operand(key, byte_mask, KEY_BITS, DIM_BLOCK), query)
                scores = dots_by_lane(dots) * by_lane(key_scale * (score_scale * CODE_UNIT))
                scores += by_lane(key_zero) * q_sum + by_lane(tl.where(mask, 0.0, -float("inf")))
                weights, fade, top, total, acc = softmax_step(top, total, acc, scores)
                zeros = zeros * fade + lane_sums(weights * by_lane(value_zero))
                weights = by_rank((weights * by_lane(value_scale)).to(tl.float16))
                acc = tl.dot(value_operand(value, byte_mask, VALUE_BITS, DIM_BLOCK), weights, acc)
            else:
                key_rows = (arena + key_at.to(tl.int64) * KEY_BYTES).to(RAW)
                value_rows = (arena + value_at.to(tl.int64) * VALUE_BYTES).to(RAW)
                top, total, acc = attend_rows(
                    top, total, acc, query, key_rows, value_rows, mask, score_scale, DIM, DIM_BLOCK,
                    IN_FP32,
                )  # fmt: skip
    store_part(top, total, zeros, acc, out, lse, VALUE_BITS, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK)


@triton.jit
def _attend_open(
    q,
    keys,
    values,
    pages,
    raw_slot,
    page_at,
    page_end,
    last_page,
    last,
    raw_stride,
    out,
    lse,
    score_scale,
    TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    """The tokens of the open ones of pages ``[page_at, page_end)``, of which the last has ``last``.

    Args:
        TOKEN: elements between two tokens of a raw page.
    """
    ROWS: tl.constexpr = (BLOCK_N + 31) // 32
    query = tl.trans(load_query(q, 0, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK))
    top, total, zeros, acc = empty_state(GROUP_BLOCK, DIM_BLOCK)
    for at in range(page_at, page_end, PAGES):
        place = at + tl.arange(0, PAGES)
        valid = place < page_end
        page = tl.load(pages + place, mask=valid, other=0)
        slot = tl.load(raw_slot + page, mask=valid, other=-1)
        counts = tl.where(slot < 0, 0, tl.where(place == last_page, last, 64))
        ends = tl.cumsum(counts, 0)
        n = tl.sum(counts, 0)
        skipped, ends = per_row(ends - counts, ROWS), per_row(ends, ROWS)
        slot = per_row(slot, ROWS)
        for first in range(0, n, BLOCK_N):
            rank = first + tl.arange(0, BLOCK_N)
            in_rows = tl.reshape(rank, [ROWS, BLOCK_N // ROWS])
            group = page_of_rank(ends, in_rows, PAGES)
            token = in_rows - tl.gather(skipped, group, 1)
            row = tl.gather(slot, group, 1).to(tl.int64) * raw_stride + token * TOKEN
            row = tl.multiple_of(tl.reshape(row, [BLOCK_N]), DIM & -DIM)
            top, total, acc = attend_rows(
                top, total, acc, query, keys + row, values + row, rank < n, score_scale, DIM,
                DIM_BLOCK, IN_FP32,
            )  # fmt: skip
    store_part(top, total, zeros, acc, out, lse, 0, GROUP, GROUP_BLOCK, DIM, DIM_BLOCK)

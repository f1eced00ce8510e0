# SPDX-License-Identifier: Apache-2.0
"""Triton: decode attention over the sealed tokens of one tier.

Scales and zeros never touch an element, but are folded into the scores and the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.decode.tiles import (
    LaneState,
    RawTile,
    attend_rows,
    empty_state,
    lane_sums,
    load_query,
    softmax_step,
    store_state,
)
from sglang_diffxkv.kernels.gpu.fragments import (
    by_lane,
    by_ordinal,
    dots_by_lane,
    key_operand,
    value_operand,
    value_word,
)
from sglang_diffxkv.kernels.gpu.ordinals import page_of_ordinal, per_row
from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    arena_row,
    load_meta_at,
    load_rows,
)
from sglang_diffxkv.kernels.gpu.scores import capped
from sglang_diffxkv.kernels.gpu.sections import bytes_of_row, find_tier


class PageRange(NamedTuple):
    """Pages ``[begin, end)`` of a sequence.

    Attributes:
        listed: pointer to the sequence's page ids.
        raw_slot: of `work.SequencePages`.
    """

    listed: tl.tensor
    raw_slot: tl.tensor | None
    begin: tl.tensor
    end: tl.tensor


@triton.jit
def attend_tier(queries, at_row, pages, sealed, part, IS_HIGH: tl.constexpr, TRAITS: tl.constexpr):
    """The tokens of one tier in the sealed ones of a range of pages, which all rows see whole.

    Args:
        queries: `QueryView`, from the KV head's first one on. at_row: the first of the rows.
        pages: `PageRange`.
        sealed: `SealedView`, with records from this KV head on.
        part: `AttentionState` of pointers, written.
    """
    LAYOUT: tl.constexpr = TRAITS.layout
    TIER: tl.constexpr = LAYOUT.high if IS_HIGH else LAYOUT.low
    KEY_BITS: tl.constexpr = TIER.key_bits
    VALUE_BITS: tl.constexpr = TIER.value_bits
    KEY_BYTES: tl.constexpr = bytes_of_row(LAYOUT, KEY_BITS)
    VALUE_BYTES: tl.constexpr = bytes_of_row(LAYOUT, VALUE_BITS)
    FRAME_BYTES: tl.constexpr = LAYOUT.frame_bytes
    DIM: tl.constexpr = TRAITS.dim
    DIM_BLOCK: tl.constexpr = TRAITS.dim_block
    VALUE_WORD: tl.constexpr = value_word(VALUE_BITS, DIM_BLOCK)
    PAGES: tl.constexpr = TRAITS.pages
    TILE: tl.constexpr = TRAITS.tokens if KEY_BITS else TRAITS.raw_tokens
    STAGES: tl.constexpr = TRAITS.constants.num_stages if KEY_BITS else 1
    ROWS: tl.constexpr = (TILE + 31) // 32
    arena, byte_mask = sealed.arena, sealed.byte_mask
    if KEY_BITS:
        query = tl.trans(load_query(queries, at_row, KEY_BITS, TRAITS).to(tl.float16))
        # Of the queries as rounded to fp16, or large zeros would not cancel.
        rounded = load_query(queries, at_row, 0, TRAITS).to(tl.float16)
        q_sum = tl.sum(rounded.to(tl.float32), 1) * queries.score_scale
    else:
        query = tl.trans(load_query(queries, at_row, 0, TRAITS))
    state = empty_state(TRAITS)
    for at in range(pages.begin, pages.end, PAGES):
        place = at + tl.arange(0, PAGES)
        valid = place < pages.end
        page = tl.load(pages.listed + place, mask=valid, other=0)
        if pages.raw_slot is not None:
            valid = valid & (tl.load(pages.raw_slot + page, mask=valid, other=0) < 0)
        tier = find_tier(sealed.heads, sealed.heads_stride, page, valid, LAYOUT, IS_HIGH)
        ends = tl.cumsum(tier.tokens, 0)
        # As if a page's ordinals started with it: a row's number is then linear in its ordinal.
        skipped = ends - tier.tokens
        key_start = tier.key // KEY_BYTES - skipped
        value_start = tier.value // VALUE_BYTES - skipped
        meta_start = tier.meta // 8 - skipped
        n = tl.sum(tier.tokens, 0)
        ends = per_row(ends, ROWS)
        table = per_row(page * sealed.frames_stride, ROWS)
        key_start, value_start = per_row(key_start, ROWS), per_row(value_start, ROWS)
        meta_start = per_row(meta_start, ROWS)
        for first in tl.range(0, n, TILE, num_stages=STAGES):
            mask = first + tl.arange(0, TILE) < n
            # Beyond the last token that one is read again, without masks, and not looked at.
            ordinal = tl.minimum(first + tl.arange(0, TILE), n - 1)
            ordinal = tl.reshape(ordinal, [ROWS, TILE // ROWS])
            group = page_of_ordinal(ends, ordinal, PAGES)
            entry = sealed.frames + tl.gather(table, group, 1)
            key_at = tl.gather(key_start, group, 1) + ordinal
            key_at = arena_row(entry, key_at, FRAME_BYTES, KEY_BYTES)
            value_at = tl.gather(value_start, group, 1) + ordinal
            value_at = arena_row(entry, value_at, FRAME_BYTES, VALUE_BYTES)
            if KEY_BITS:
                meta_at = tl.gather(meta_start, group, 1) + ordinal
                meta_at = arena_row(entry, meta_at, FRAME_BYTES, 8)
                key_scale, key_zero, value_scale, value_zero = load_meta_at(arena, meta_at)
                key = load_rows(arena, key_at, KEY_BITS, 32, DIM, DIM_BLOCK)
                value = load_rows(arena, value_at, VALUE_BITS, VALUE_WORD, DIM, DIM_BLOCK)
                dots = tl.dot(key_operand(key, byte_mask, KEY_BITS, DIM_BLOCK), query)
                scores = dots_by_lane(dots) * by_lane(key_scale * (queries.score_scale * CODE_UNIT))
                none = by_lane(tl.where(mask, 0.0, -float("inf")))
                if queries.cap is None:
                    scores += by_lane(key_zero) * q_sum + none
                else:
                    scores = capped(scores + by_lane(key_zero) * q_sum, queries.cap) + none
                weights, fade, state = softmax_step(state, scores, False)
                zeros = state.zeros * fade + lane_sums(weights * by_lane(value_zero))
                weights = by_ordinal((weights * by_lane(value_scale)).to(tl.float16))
                operand = value_operand(value, byte_mask, VALUE_BITS, DIM_BLOCK)
                acc = tl.dot(operand, weights, state.acc)
                state = LaneState(state.top, state.total, zeros, acc)
            else:
                key_rows = arena + key_at.to(tl.int64) * KEY_BYTES
                value_rows = arena + value_at.to(tl.int64) * VALUE_BYTES
                tile = RawTile(
                    key_rows.to(tl.pointer_type(TRAITS.raw)),
                    value_rows.to(tl.pointer_type(TRAITS.raw)),
                    mask,
                    first + tl.arange(0, TILE),
                )
                state = attend_rows(state, query, tile, None, queries, TRAITS)
    store_state(state, at_row, part, VALUE_BITS, TRAITS)

# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of a block of query rows over what a sequence keeps in one tier.

Tiles are full: the tokens of a group of pages are one range of ordinals (`gpu.ordinals`), in rows
of 32, one to a warp, so that looking up an ordinal's page is a shuffle. Scales and zeros never
touch an element, but are folded into the scores and the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.order import (
    codes_of_values,
    load_raw,
    ordered_queries,
    parts,
    values_of_codes,
)
from sglang_diffxkv.kernels.gpu.ordinals import page_of_ordinal, per_row
from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    load_meta,
    load_words_at,
    unpack_words,
)
from sglang_diffxkv.kernels.gpu.scores import capped
from sglang_diffxkv.kernels.gpu.sections import bytes_of_row, find_tier

HEADROOM: tl.constexpr = tl.constexpr(4)
"""The largest weight of a row so far is 2**4: times value scales, which may be up to 4,000, it does
not overflow fp16, and those of values around 0.001 stay clear of its subnormals."""
SUMS: tl.constexpr = tl.constexpr(8)
"""Columns of sums of weights: the first is their own, the second that of weighted zeros."""


class CodeState(NamedTuple):
    """Online softmax of M query rows: fp32.

    Attributes:
        base: [M], base-2 logarithm of the unit of weights.
        sums: [M, SUMS] of weights, in that unit.
        acc: [M, dim_block] of weighted values.
    """

    base: tl.tensor
    sums: tl.tensor
    acc: tl.tensor


class CodeTile(NamedTuple):
    """Coded tokens: words of their keys and values, and their metadata as of `load_meta`."""

    k: tl.tensor
    v: tl.tensor
    meta: tl.tuple


class PageRange(NamedTuple):
    """Pages ``[begin, end)`` of a list."""

    listed: tl.tensor
    begin: tl.tensor
    end: tl.tensor


@triton.jit
def empty_state(ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """The `CodeState` of no tokens."""
    base = tl.full([ROWS], -float("inf"), tl.float32)
    sums = tl.zeros([ROWS, SUMS], tl.float32)
    return CodeState(base, sums, tl.zeros([ROWS, DIM_BLOCK], tl.float32))


@triton.jit
def _weights(base, scores):
    """Weights of a tile's base-2 scores [M, N], what earlier sums are to be multiplied by [M, 1],
    and the new base. Each row has a token."""
    new_base = tl.maximum(base, tl.max(scores, 1) - HEADROOM)
    return tl.exp2(scores - new_base[:, None]), tl.exp2(base - new_base)[:, None], new_base


@triton.jit
def sums_of(sums, COLUMN: tl.constexpr):
    """One column [M] of sums."""
    return tl.sum(tl.where(tl.arange(0, SUMS)[None, :] == COLUMN, sums, 0.0), 1)


@triton.constexpr_function
def _alignment(NBYTES):
    """Largest power of two, at most 16, that divides a row's bytes."""
    return 16 if NBYTES % 16 == 0 else NBYTES & -NBYTES


@triton.jit
def _everywhere(x):
    """x [N], computed once and not again by every thread that needs it.

    Triton recomputes what it deems cheap in the layout of its use, where a thread has many tokens:
    here, the search for each token's page. A gather ends what it looks at.
    """
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def _row_offsets(table, start, place, ordinal, UNIT: tl.constexpr, NBYTES, FRAME_BYTES):
    """Offsets in the arena, int64 [N], of rows of one section, in units of so many bytes.

    Args:
        table: pointers [N / 32, 32] to the frames of each ordinal's page.
        start: int32 [N / 32, PAGES], where the section would start, had its page all before.
        place, ordinal: int32 [N / 32, 32], pages within the group, and ordinals.
    """
    virtual = (tl.gather(start, place, 1) + ordinal * NBYTES).to(tl.uint32)
    frame = tl.load(table + virtual // FRAME_BYTES)
    at = frame.to(tl.int64) * (FRAME_BYTES // UNIT) + virtual % FRAME_BYTES // UNIT
    return tl.reshape(at, [at.shape[0] * at.shape[1]])


@triton.jit
def _attend_codes(state, ordered, tile, valid, queries, byte_mask, TIER: tl.constexpr):
    """Take a `CodeTile` into the state.

    Args:
        ordered: of `ordered_queries`, and their sums.
        queries: `QueryView`.
        valid: [N], which tokens there are.
    """
    query, q_sum = ordered
    score_scale = queries.score_scale
    DIM_BLOCK: tl.constexpr = query.shape[1]
    key_scale, key_zero, value_scale, value_zero = tile.meta
    keys = unpack_words(tile.k, byte_mask, TIER.key_bits, DIM_BLOCK)
    scores = tl.dot(query, tl.trans(keys))
    scores *= _everywhere(key_scale * (score_scale * CODE_UNIT))[None, :]
    scores += q_sum[:, None] * _everywhere(key_zero * score_scale)[None, :]
    weights, fade, base = _weights(state.base, capped(scores, queries.cap))
    # Sums over tokens are products, too: numerator and denominator meet the same rounded weights.
    weights = weights.to(tl.float16)
    column = tl.arange(0, SUMS)[None, :]
    one = tl.where(valid, 1.0, 0.0)[:, None]
    value_zero = tl.where(valid, value_zero, 0.0)[:, None]
    summands = tl.where(column == 0, one, tl.where(column == 1, value_zero, 0.0))
    sums = tl.dot(weights, summands.to(tl.float16), state.sums * fade)
    weights *= _everywhere(tl.where(valid, value_scale, 0.0).to(tl.float16))[None, :]
    values = unpack_words(tile.v, byte_mask, TIER.value_bits, DIM_BLOCK)
    return CodeState(base, sums, tl.dot(weights, values, state.acc * fade))


@triton.jit
def _attend_raw(state, query, keys, values, valid, queries, PRECISION: tl.constexpr):
    """Take a tile of raw tokens, keys and values [N, dim_block], into the state."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    scores = capped(scores * queries.score_scale, queries.cap)
    scores = tl.where(valid[None, :], scores, -float("inf"))
    weights, fade, base = _weights(state.base, scores)
    column = tl.arange(0, SUMS)[None, :]
    sums = state.sums * fade + tl.where(column == 0, tl.sum(weights, 1)[:, None], 0.0)
    weights = weights.to(values.dtype)
    acc = tl.dot(weights, values, state.acc * fade, input_precision=PRECISION)
    return CodeState(base, sums, acc)


@triton.jit
def attend_tier(state, queries, rows, sealed, pages, IS_HIGH: tl.constexpr, TRAITS: tl.constexpr):
    """All tokens that a range of pages keeps in one tier.

    Args:
        state: `CodeState`, sums of values in the order of `order.quarters`.
        queries: `QueryView`. rows: `QueryRows` of it.
        sealed: `SealedView`, with records from this KV head on.
        pages: `PageRange`.
        TRAITS: `traits.SealedTraits`.
    """
    LAYOUT: tl.constexpr = TRAITS.layout
    TIER: tl.constexpr = LAYOUT.high if IS_HIGH else LAYOUT.low
    KEY_BITS: tl.constexpr = TIER.key_bits
    VALUE_BITS: tl.constexpr = TIER.value_bits
    FRAME_BYTES: tl.constexpr = LAYOUT.frame_bytes
    DIM: tl.constexpr = TRAITS.shape.dim
    DIM_BLOCK: tl.constexpr = TRAITS.shape.dim_block
    PAGES: tl.constexpr = TRAITS.pages
    PRECISION: tl.constexpr = TRAITS.precision
    BLOCK_N: tl.constexpr = TRAITS.tile.tokens
    ROWS: tl.constexpr = BLOCK_N // 32
    KEY_BYTES: tl.constexpr = bytes_of_row(LAYOUT, KEY_BITS)
    VALUE_BYTES: tl.constexpr = bytes_of_row(LAYOUT, VALUE_BITS)
    KEY_UNIT: tl.constexpr = _alignment(KEY_BYTES)
    VALUE_UNIT: tl.constexpr = _alignment(VALUE_BYTES)
    arena = sealed.arena
    q_rows = queries.data + rows.query * queries.stride + rows.head * DIM
    ordered = ordered_queries(q_rows, rows.seen, KEY_BITS, TRAITS)
    if VALUE_BITS:
        state = CodeState(state.base, state.sums, codes_of_values(state.acc, VALUE_BITS))
    words = arena.to(tl.pointer_type(tl.uint32))
    every = tl.full([BLOCK_N], True, tl.int1)
    for group in range(pages.begin, pages.end, PAGES):
        listed = group + tl.arange(0, PAGES)
        inside = listed < pages.end
        page = tl.load(pages.listed + listed, mask=inside, other=0)
        tier = find_tier(sealed.heads, TRAITS.shape.kv_heads * 2, page, inside, LAYOUT, IS_HIGH)
        ends = tl.cumsum(tier.tokens, 0)
        # As if a page's ordinals started with it: where a row lies is then linear in its ordinal.
        skipped = ends - tier.tokens
        key_start = tier.key - skipped * KEY_BYTES
        value_start = tier.value - skipped * VALUE_BYTES
        meta_start = tier.meta - skipped * 8
        n = tl.sum(tier.tokens, 0)
        ends, page = per_row(ends, ROWS), per_row(page, ROWS)
        key_start, value_start = (
            per_row(key_start, ROWS),
            per_row(value_start, ROWS),
        )
        meta_start = per_row(meta_start, ROWS)
        for first in tl.range(0, n, BLOCK_N, disable_licm=True):
            token = first + tl.arange(0, BLOCK_N)
            valid = token < n
            # The last token stands in for those after it: its score cannot be a new maximum.
            ordinal = tl.reshape(tl.minimum(token, n - 1), [ROWS, 32])
            place = page_of_ordinal(ends, ordinal, PAGES)
            table = sealed.frames + tl.gather(page, place, 1).to(tl.int64) * sealed.frames_stride
            key_at = _everywhere(
                _row_offsets(table, key_start, place, ordinal, KEY_UNIT, KEY_BYTES, FRAME_BYTES)
            )
            value_at = _everywhere(
                _row_offsets(
                    table, value_start, place, ordinal, VALUE_UNIT, VALUE_BYTES, FRAME_BYTES
                )
            )
            # All loads before the first product, so that their latencies overlap.
            if KEY_BITS:
                meta_at = _row_offsets(table, meta_start, place, ordinal, 1, 8, FRAME_BYTES)
                meta = load_meta(arena, meta_at, every)
                key_at *= KEY_UNIT // 4
                value_at *= VALUE_UNIT // 4
                keys = load_words_at(words, key_at, every, KEY_BITS, DIM, DIM_BLOCK, 1)
                values = load_words_at(
                    words, value_at, every, VALUE_BITS, DIM, DIM_BLOCK, parts(VALUE_BITS)
                )
                tile = CodeTile(keys, values, meta)
                state = _attend_codes(state, ordered, tile, valid, queries, sealed.byte_mask, TIER)
            else:
                key_rows = (arena + key_at * KEY_UNIT).to(tl.pointer_type(TRAITS.raw))
                value_rows = (arena + value_at * VALUE_UNIT).to(tl.pointer_type(TRAITS.raw))
                keys = load_raw(key_rows, TRAITS.compute, DIM, DIM_BLOCK)
                values = load_raw(value_rows, TRAITS.compute, DIM, DIM_BLOCK)
                query, _ = ordered
                state = _attend_raw(state, query, keys, values, valid, queries, PRECISION)
    if VALUE_BITS:
        state = CodeState(state.base, state.sums, values_of_codes(state.acc, VALUE_BITS))
    return state

# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of a block of query rows over what a sequence keeps in one tier.

Tiles are full: the tokens of a group of pages are one range of ranks (`gpu.ranks`), in rows of 32,
one to a warp, so that looking up a rank's page is a shuffle. Scales and zeros never touch an
element, but are folded into the scores and the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.order import (
    codes_of_values,
    load_queries,
    load_raw,
    parts,
    values_of_codes,
)
from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    load_meta,
    load_words_at,
    row_bytes,
    section_starts,
    unpack_words,
)
from sglang_diffxkv.kernels.gpu.ranks import page_of_rank, per_row

HEADROOM: tl.constexpr = tl.constexpr(4)
"""The largest weight of a row so far is 2**4: times value scales, which may be up to 4,000, it does
not overflow fp16, and those of values around 0.001 stay clear of its subnormals."""
SUMS: tl.constexpr = tl.constexpr(8)
"""Columns of sums of weights: the first is their own, the second that of weighted zeros."""


@triton.jit
def empty_state(ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Base-2 logarithm of the unit of weights [ROWS], and sums in that unit: [ROWS, SUMS] of
    weights, [ROWS, DIM_BLOCK] of weighted values."""
    base = tl.full([ROWS], -float("inf"), tl.float32)
    sums = tl.zeros([ROWS, SUMS], tl.float32)
    return base, sums, tl.zeros([ROWS, DIM_BLOCK], tl.float32)


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
def _rows_of_ranks(table, start, place, rank, UNIT: tl.constexpr, NBYTES, FRAME_BYTES):
    """Offsets in the arena, int64 [N], of rows of one section, in units of so many bytes.

    Args:
        table: pointers [N / 32, 32] to the frames of each rank's page.
        start: int32 [N / 32, PAGES], where the section would start, had its page all earlier ranks.
        place, rank: int32 [N / 32, 32], pages within the group, and ranks.
    """
    virtual = (tl.gather(start, place, 1) + rank * NBYTES).to(tl.uint32)
    frame = tl.load(table + virtual // FRAME_BYTES)
    at = frame.to(tl.int64) * (FRAME_BYTES // UNIT) + virtual % FRAME_BYTES // UNIT
    return tl.reshape(at, [at.shape[0] * at.shape[1]])


@triton.jit
def _attend_codes(
    state,
    queries,
    q_sum,
    key_words,
    value_words,
    meta,
    valid,
    score_scale,
    byte_mask,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """A tile of coded tokens: words of their rows, and their metadata as of `load_meta`."""
    base, sums, acc = state
    key_scale, key_zero, value_scale, value_zero = meta
    keys = unpack_words(key_words, byte_mask, KEY_BITS, DIM_BLOCK)
    scores = tl.dot(queries, tl.trans(keys))
    scores *= _everywhere(key_scale * (score_scale * CODE_UNIT))[None, :]
    scores += q_sum[:, None] * _everywhere(key_zero * score_scale)[None, :]
    weights, fade, base = _weights(base, scores)
    # Sums over tokens are products, too: numerator and denominator meet the same rounded weights.
    weights = weights.to(tl.float16)
    column = tl.arange(0, SUMS)[None, :]
    one = tl.where(valid, 1.0, 0.0)[:, None]
    value_zero = tl.where(valid, value_zero, 0.0)[:, None]
    summands = tl.where(column == 0, one, tl.where(column == 1, value_zero, 0.0))
    sums = tl.dot(weights, summands.to(tl.float16), sums * fade)
    weights *= _everywhere(tl.where(valid, value_scale, 0.0).to(tl.float16))[None, :]
    values = unpack_words(value_words, byte_mask, VALUE_BITS, DIM_BLOCK)
    return base, sums, tl.dot(weights, values, acc * fade)


@triton.jit
def _attend_raw(state, queries, keys, values, valid, score_scale, PRECISION: tl.constexpr):
    """A tile of raw tokens: keys and values [N, DIM_BLOCK]."""
    base, sums, acc = state
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    scores = tl.where(valid[None, :], scores * score_scale, -float("inf"))
    weights, fade, base = _weights(base, scores)
    column = tl.arange(0, SUMS)[None, :]
    sums = sums * fade + tl.where(column == 0, tl.sum(weights, 1)[:, None], 0.0)
    weights = weights.to(values.dtype)
    return base, sums, tl.dot(weights, values, acc * fade, input_precision=PRECISION)


@triton.jit
def attend_tier(
    state,
    q_rows,
    seen,
    arena,
    frames,
    frames_stride,
    heads,
    heads_stride,
    pages,
    first_page,
    end_page,
    score_scale,
    byte_mask,
    HIGH_KEY_BITS: tl.constexpr,
    HIGH_VALUE_BITS: tl.constexpr,
    LOW_KEY_BITS: tl.constexpr,
    LOW_VALUE_BITS: tl.constexpr,
    IS_HIGH: tl.constexpr,
    RAW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
):
    """All tokens that pages ``[first_page, end_page)`` of the list keep in one tier.

    Args:
        state: of `empty_state`, sums of values in the order of `order.quarters`.
        q_rows: pointers [M] to the queries. seen: [M].
        heads: of this KV head.
        RAW: dtype of raw elements; COMPUTE, PRECISION: dtype and precision of their products.
    """
    ITEM: tl.constexpr = RAW.primitive_bitwidth // 8
    KEY_BITS: tl.constexpr = HIGH_KEY_BITS if IS_HIGH else LOW_KEY_BITS
    VALUE_BITS: tl.constexpr = HIGH_VALUE_BITS if IS_HIGH else LOW_VALUE_BITS
    RANK_ROWS: tl.constexpr = BLOCK_N // 32
    KEY_BYTES: tl.constexpr = row_bytes(DIM, KEY_BITS, ITEM)
    VALUE_BYTES: tl.constexpr = row_bytes(DIM, VALUE_BITS, ITEM)
    KEY_UNIT: tl.constexpr = _alignment(KEY_BYTES)
    VALUE_UNIT: tl.constexpr = _alignment(VALUE_BYTES)
    queries, q_sum = load_queries(q_rows, seen, KEY_BITS, COMPUTE, DIM, DIM_BLOCK)
    base, sums, acc = state
    if VALUE_BITS:
        acc = codes_of_values(acc, VALUE_BITS)
    state = base, sums, acc
    words = arena.to(tl.pointer_type(tl.uint32))
    every = tl.full([BLOCK_N], True, tl.int1)
    for group in range(first_page, end_page, PAGES):
        listed = group + tl.arange(0, PAGES)
        inside = listed < end_page
        page = tl.load(pages + listed, mask=inside, other=0)
        record = heads + page.to(tl.int64) * heads_stride
        offset = tl.load(record, mask=inside, other=0)
        word = tl.load(record + 1, mask=inside, other=0)
        n_high, n_low = word & 0xFF, word >> 8
        starts = section_starts(
            n_high,
            n_low,
            row_bytes(DIM, HIGH_KEY_BITS, ITEM),
            row_bytes(DIM, HIGH_VALUE_BITS, ITEM),
            row_bytes(DIM, LOW_KEY_BITS, ITEM),
            row_bytes(DIM, LOW_VALUE_BITS, ITEM),
            8 if HIGH_KEY_BITS else 0,
            8 if LOW_KEY_BITS else 0,
        )
        counts = n_high if IS_HIGH else n_low
        ends = tl.cumsum(counts, 0)
        # As if a page's ranks started with it: where a row lies is then linear in its rank.
        skipped = ends - counts
        key_start = offset + (starts[0] if IS_HIGH else starts[2]) - skipped * KEY_BYTES
        value_start = offset + (starts[1] if IS_HIGH else starts[3]) - skipped * VALUE_BYTES
        meta_start = offset + (starts[4] if IS_HIGH else starts[5]) - skipped * 8
        n = tl.sum(counts, 0)
        ends, page = per_row(ends, RANK_ROWS), per_row(page, RANK_ROWS)
        key_start, value_start = per_row(key_start, RANK_ROWS), per_row(value_start, RANK_ROWS)
        meta_start = per_row(meta_start, RANK_ROWS)
        for first in tl.range(0, n, BLOCK_N, disable_licm=True):
            token = first + tl.arange(0, BLOCK_N)
            valid = token < n
            # The last token stands in for those after it: its score cannot be a new maximum.
            rank = tl.reshape(tl.minimum(token, n - 1), [RANK_ROWS, 32])
            place = page_of_rank(ends, rank, PAGES)
            table = frames + tl.gather(page, place, 1).to(tl.int64) * frames_stride
            key_at = _everywhere(
                _rows_of_ranks(table, key_start, place, rank, KEY_UNIT, KEY_BYTES, FRAME_BYTES)
            )
            value_at = _everywhere(
                _rows_of_ranks(
                    table, value_start, place, rank, VALUE_UNIT, VALUE_BYTES, FRAME_BYTES
                )
            )
            # All loads before the first product, so that their latencies overlap.
            if KEY_BITS:
                meta_at = _rows_of_ranks(table, meta_start, place, rank, 1, 8, FRAME_BYTES)
                meta = load_meta(arena, meta_at, every)
                key_at *= KEY_UNIT // 4
                value_at *= VALUE_UNIT // 4
                state = _attend_codes(
                    state,
                    queries,
                    q_sum,
                    load_words_at(words, key_at, every, KEY_BITS, DIM, DIM_BLOCK, 1),
                    load_words_at(
                        words, value_at, every, VALUE_BITS, DIM, DIM_BLOCK, parts(VALUE_BITS)
                    ),
                    meta,
                    valid,
                    score_scale,
                    byte_mask,
                    KEY_BITS,
                    VALUE_BITS,
                    DIM_BLOCK,
                )
            else:
                key_rows = (arena + key_at * KEY_UNIT).to(tl.pointer_type(RAW))
                value_rows = (arena + value_at * VALUE_UNIT).to(tl.pointer_type(RAW))
                keys = load_raw(key_rows, COMPUTE, DIM, DIM_BLOCK)
                values = load_raw(value_rows, COMPUTE, DIM, DIM_BLOCK)
                state = _attend_raw(state, queries, keys, values, valid, score_scale, PRECISION)
    base, sums, acc = state
    if VALUE_BITS:
        acc = values_of_codes(acc, VALUE_BITS)
    return base, sums, acc

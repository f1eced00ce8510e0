# SPDX-License-Identifier: Apache-2.0
"""Triton: decode attention of one work tile, tokens of one kind of one sequence and KV head.

The bytes of a head are read for its whole GQA group, and for all new tokens of the sequence: each
query of each of its heads is a row. Programs with the other rows, if one has not room for all, run
beside it. Tokens lie on the M axis of the products and rows on N, which needs the fewest
instructions per element.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.decode.attend_tier import PageRange, attend_tier
from sglang_diffxkv.kernels.decode.tiles import (
    RawTile,
    attend_rows,
    empty_state,
    load_query,
    store_state,
)
from sglang_diffxkv.kernels.gpu.ordinals import page_of_ordinal, per_row
from sglang_diffxkv.kernels.gpu.sections import records_from
from sglang_diffxkv.kernels.gpu.views import QueryView, RawView
from sglang_diffxkv.kernels.merge.state import AttentionState

OPEN: tl.constexpr = tl.constexpr(0)
HIGH: tl.constexpr = tl.constexpr(1)
LOW: tl.constexpr = tl.constexpr(2)
"""Kinds of tokens: of open pages, and of sealed ones by tier."""


class DecodeQueries(NamedTuple):
    """Queries of N new tokens of each sequence, [B * N, Hq, D], as open and as sealed pages want
    them: `QueryView` without lists."""

    open: QueryView
    sealed: QueryView


class LastPage(NamedTuple):
    """Of a sequence: its place in the list, and the tokens that it has."""

    place: tl.tensor
    tokens: tl.tensor


@triton.jit(do_not_specialize=["segments"])
def attend_work_tile(work, segments, queries, raw, sealed, parts, TRAITS: tl.constexpr):
    """Attention of some rows over the tokens of a tile: the programs of a tile are neighbours.

    Args:
        work: `work.WorkTiles` of one layer, of so many segments.
        queries: `DecodeQueries`.
        raw: `RawView`.
        sealed: `SealedView`; None: no page is sealed.
        parts: `AttentionState` of the tiles, written: fp32 [tiles, rows, D] and [tiles, rows].
        TRAITS: `DecodeTraits`.
    """
    index, at_row = tl.program_id(0), 0
    if TRAITS.blocks > 1:
        at_row = index % TRAITS.blocks * TRAITS.rows_block
        index = index // TRAITS.blocks
    if index >= tl.load(work.segment_start + segments):
        return
    segment = tl.load(work.tiles + index * 4)
    begin = tl.load(work.tiles + index * 4 + 1)
    end = tl.load(work.tiles + index * 4 + 2)
    kind = segment % 3
    head = segment // 3 % TRAITS.kv_heads
    sequence = segment // (3 * TRAITS.kv_heads)
    listed = work.sequences.pages + tl.load(work.sequences.first + sequence)
    pages = PageRange(listed, work.sequences.raw_slot, begin, end)
    first_row = index * TRAITS.rows
    part = AttentionState(parts.out + first_row * TRAITS.dim, parts.lse + first_row)
    if work.sequences.raw_slot is not None and kind == OPEN:
        last_place = tl.load(work.sequences.count + sequence) - 1
        last = LastPage(last_place, tl.load(work.sequences.last_len + sequence))
        k, v = raw.k + head * TRAITS.dim, raw.v + head * TRAITS.dim
        at_head = RawView(k, v, raw.page_stride)
        of_head = QueryView(
            _first_query(queries.open, sequence, head, TRAITS),
            queries.open.stride,
            queries.open.score_scale,
            None,
            None,
            queries.open.cap,
            queries.open.window_left,
        )
        _attend_open(of_head, at_row, pages, last, at_head, part, TRAITS)
    if sealed is not None:
        records = records_from(sealed, head)
        of_head = QueryView(
            _first_query(queries.sealed, sequence, head, TRAITS),
            queries.sealed.stride,
            queries.sealed.score_scale,
            None,
            None,
            queries.sealed.cap,
            None,
        )
        if kind == HIGH:
            attend_tier(of_head, at_row, pages, records, part, True, TRAITS)
        if kind == LOW:
            attend_tier(of_head, at_row, pages, records, part, False, TRAITS)


@triton.jit
def _first_query(queries, sequence, head, TRAITS: tl.constexpr):
    """Pointer to the first query of a sequence and KV head."""
    first = queries.data + sequence.to(tl.int64) * TRAITS.queries * queries.stride
    return first + head * TRAITS.group * TRAITS.dim


@triton.jit
def _attend_open(queries, at_row, pages, last, raw, part, TRAITS: tl.constexpr):
    """The tokens of the open ones of a range of pages, as far as each row sees them.

    Args:
        queries: `QueryView`, from the KV head's first one on. at_row: the first of the rows.
        pages: `PageRange`.
        last: `LastPage` of the sequence.
        raw: `RawView`, from this KV head on.
        part: `AttentionState` of pointers, written.
    """
    TOKEN: tl.constexpr = TRAITS.kv_heads * TRAITS.dim
    BLOCK_N: tl.constexpr = TRAITS.raw_tokens
    PAGES: tl.constexpr = TRAITS.pages
    DIM: tl.constexpr = TRAITS.dim
    ROWS: tl.constexpr = (BLOCK_N + 31) // 32
    query = tl.trans(load_query(queries, at_row, 0, TRAITS))
    # A sequence's last query is its last token's.
    row_ends = last.place * 64 + last.tokens - (TRAITS.queries - 1)
    row_ends += (at_row + tl.arange(0, TRAITS.rows_block)) // TRAITS.group
    state = empty_state(TRAITS)
    for at in range(pages.begin, pages.end, PAGES):
        place = at + tl.arange(0, PAGES)
        valid = place < pages.end
        page = tl.load(pages.listed + place, mask=valid, other=0)
        slot = tl.load(pages.raw_slot + page, mask=valid, other=-1)
        counts = tl.where(slot < 0, 0, tl.where(place == last.place, last.tokens, 64))
        ends = tl.cumsum(counts, 0)
        n = tl.sum(counts, 0)
        skipped, ends = per_row(ends - counts, ROWS), per_row(ends, ROWS)
        slot = per_row(slot, ROWS)
        for first in range(0, n, BLOCK_N):
            ordinal = first + tl.arange(0, BLOCK_N)
            in_rows = tl.reshape(ordinal, [ROWS, BLOCK_N // ROWS])
            group = page_of_ordinal(ends, in_rows, PAGES)
            token = in_rows - tl.gather(skipped, group, 1)
            row = tl.gather(slot, group, 1).to(tl.int64) * raw.page_stride + token * TOKEN
            row = tl.multiple_of(tl.reshape(row, [BLOCK_N]), DIM & -DIM)
            in_list = tl.reshape((at + group) * 64 + token, [BLOCK_N])
            tile = RawTile(raw.k + row, raw.v + row, ordinal < n, in_list)
            state = attend_rows(state, query, tile, row_ends, queries, TRAITS)
    store_state(state, at_row, part, 0, TRAITS)

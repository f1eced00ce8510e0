# SPDX-License-Identifier: Apache-2.0
"""Triton: counting the work of a decode step, and cutting it into work tiles (`work`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.sections import record_counts

# Batches come in all sizes: what depends on theirs is not to be compiled for each.

BLOCK: tl.constexpr = tl.constexpr(1024)
"""Segments that are looked at at a time."""


class RecordView(NamedTuple):
    """Records int32 [L, V, H, 2], and elements from layer to layer and from page to page."""

    data: torch.Tensor
    layer_stride: int
    page_stride: int


@dataclass(frozen=True)
class WorkTraits:
    """What the kernels that divide work are compiled for: KV heads, and costs of a token."""

    kv_heads: int
    open_cost: int
    high_cost: int
    low_cost: int

    @property
    def heads_block(self) -> int:
        """The power of two that the heads are padded to."""
        return triton.next_power_of_2(self.kv_heads)

    @property
    def pages(self) -> int:
        """Pages that are looked at at a time."""
        return min(64, max(1, 512 // self.heads_block))


@triton.jit
def _page_costs(listed, count, raw_slot, heads, page_stride, at, TRAITS: tl.constexpr):
    """Costs of the open, high and low tokens of some pages, int32 [pages, heads_block].

    The page that is being written counts as full: a step's division then is as good as the next
    one's.

    Args:
        listed: pointer to ``count`` page ids, of which those from ``at`` on are looked at.
        heads: pointer to the layer's records.
    """
    PAGES: tl.constexpr = TRAITS.pages
    HEADS: tl.constexpr = TRAITS.heads_block
    place = at + tl.arange(0, PAGES)
    head = tl.arange(0, HEADS)
    valid = place < count
    page = tl.load(listed + place, mask=valid, other=0)
    real = valid[:, None] & (head < TRAITS.kv_heads)[None, :]
    sealed = real
    open_cost = tl.zeros([PAGES, HEADS], tl.int32)
    if raw_slot is not None:
        is_open = tl.load(raw_slot + page, mask=valid, other=-1) >= 0
        open_cost = tl.where(real & is_open[:, None], 64 * TRAITS.open_cost, 0)
        sealed = real & ~is_open[:, None]
    record = heads + page.to(tl.int64)[:, None] * page_stride + head[None, :] * 2
    word = tl.load(record + 1, mask=sealed, other=0)
    n_high, n_low = record_counts(word)
    return open_cost, n_high * TRAITS.high_cost, n_low * TRAITS.low_cost


@triton.jit
def count_costs(costs, sequences, records, TRAITS: tl.constexpr):
    """Cost of every segment of one sequence and layer.

    Args:
        costs: int32 [L, B * H * 3], written.
        sequences: `work.SequencePages`.
        records: `RecordView`.
    """
    HEADS: tl.constexpr = TRAITS.heads_block
    sequence, layer = tl.program_id(0), tl.program_id(1)
    listed = sequences.pages + tl.load(sequences.first + sequence)
    count = tl.load(sequences.count + sequence)
    heads = records.data + layer.to(tl.int64) * records.layer_stride
    opened = tl.zeros([HEADS], tl.int32)
    high, low = opened, opened
    for at in range(0, count, TRAITS.pages):
        a, b, c = _page_costs(
            listed, count, sequences.raw_slot, heads, records.page_stride, at, TRAITS
        )
        opened += tl.sum(a, 0)
        high += tl.sum(b, 0)
        low += tl.sum(c, 0)
    head = tl.arange(0, HEADS)
    real = head < TRAITS.kv_heads
    segment = costs + ((layer * tl.num_programs(0) + sequence) * TRAITS.kv_heads + head) * 3
    tl.store(segment, opened, mask=real)
    tl.store(segment + 1, high, mask=real)
    tl.store(segment + 2, low, mask=real)


@triton.jit(do_not_specialize=["stride", "segments"])
def assign_tiles(
    costs, segment_start, stride, share, segments, SHARES: tl.constexpr, LEAST: tl.constexpr
):
    """How many tiles each segment of one layer gets, and the cost that is a tile's share.

    Args:
        costs: int32 [L, segments].
        segment_start: int32 [L, segments + 1], ``stride`` elements from layer to layer; written.
        share: int32 [L], written.
        SHARES: to divide the layer's cost into.
        LEAST: the most that a page may cost, which no share is below.
    """
    layer = tl.program_id(0)
    costs += layer * segments
    segment_start += layer * stride
    total = tl.zeros([BLOCK], tl.int64)
    for at in range(0, segments, BLOCK):
        segment = at + tl.arange(0, BLOCK)
        total += tl.load(costs + segment, mask=segment < segments, other=0)
    size = tl.maximum(tl.cdiv(tl.sum(total, 0), SHARES), LEAST).to(tl.int32)
    tl.store(share + layer, size)
    before = 0
    tl.store(segment_start, before)
    for at in range(0, segments, BLOCK):
        segment = at + tl.arange(0, BLOCK)
        real = segment < segments
        count = tl.cdiv(tl.load(costs + segment, mask=real, other=0), size)
        tl.store(segment_start + 1 + segment, before + tl.cumsum(count, 0), mask=real)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["tile_stride", "segment_stride"])
def divide_pages(work, tile_stride, segment_stride, share, records, TRAITS: tl.constexpr):
    """Write the tiles of one sequence and layer.

    Args:
        work: `work.WorkTiles`, and elements from layer to layer of its two tensors.
        share: int32 [L], of `assign_tiles`.
        records: `RecordView`.
    """
    HEADS: tl.constexpr = TRAITS.heads_block
    PAGES: tl.constexpr = TRAITS.pages
    sequence, layer = tl.program_id(0), tl.program_id(1)
    listed = work.sequences.pages + tl.load(work.sequences.first + sequence)
    count = tl.load(work.sequences.count + sequence)
    heads = records.data + layer.to(tl.int64) * records.layer_stride
    tiles = work.tiles + layer.to(tl.int64) * tile_stride
    size = tl.load(share + layer)
    head = tl.arange(0, HEADS)
    segment = (sequence * TRAITS.kv_heads + head) * 3
    starts = work.segment_start + layer * segment_stride + segment
    real = head < TRAITS.kv_heads
    first0 = tl.load(starts, mask=real, other=0)
    first1 = tl.load(starts + 1, mask=real, other=0)
    first2 = tl.load(starts + 2, mask=real, other=0)
    end = tl.load(starts + 3, mask=real, other=0)
    _empty_tiles(tiles, segment, first0, first1, count)
    _empty_tiles(tiles, segment + 1, first1, first2, count)
    _empty_tiles(tiles, segment + 2, first2, end, count)
    tl.debug_barrier()
    spent0 = tl.zeros([HEADS], tl.int32)
    spent1, spent2 = spent0, spent0
    for at in range(0, count, PAGES):
        a, b, c = _page_costs(
            listed, count, work.sequences.raw_slot, heads, records.page_stride, at, TRAITS
        )
        if work.sequences.raw_slot is not None:
            spent0 = _cut(tiles, first0, spent0, a, at, size, PAGES)
        spent1 = _cut(tiles, first1, spent1, b, at, size, PAGES)
        spent2 = _cut(tiles, first2, spent2, c, at, size, PAGES)


@triton.jit
def _empty_tiles(tiles, segment, first, end, count):
    """Tiles [first, end) of each head's segment: the first is all pages, the others none yet."""
    most = tl.max(end - first, 0)
    for i in range(0, most):
        at = tiles + (first + i) * 4
        mine = first + i < end
        tl.store(at, segment, mask=mine)
        tl.store(at + 1, tl.where(first + i == first, 0, count), mask=mine)
        tl.store(at + 2, count, mask=mine)


@triton.jit
def _cut(tiles, first, spent, costs, at, size, PAGES: tl.constexpr):
    """Begin a tile at each page with which another share of its segment's cost is reached.

    Args:
        spent: int32 [heads_block], cost of the segment's pages before ``at``.
        costs: of these pages.
    """
    ends = spent[None, :] + tl.cumsum(costs, 0)
    # The share that a page ends in: at most one more than the page before, as none is larger.
    index = tl.maximum(ends - 1, 0) // size
    before = tl.maximum(ends - costs - 1, 0) // size
    place = (at + tl.arange(0, PAGES))[:, None]
    begins = index != before
    tile = tiles + (first[None, :] + index) * 4
    tl.store(tile + 1, place + tl.zeros_like(index), mask=begins)
    tl.store(tile - 2, place + tl.zeros_like(index), mask=begins)
    return spent + tl.sum(costs, 0)

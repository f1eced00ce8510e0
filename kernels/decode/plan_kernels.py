# SPDX-License-Identifier: Apache-2.0
"""Triton: counting the work of a decode step, and cutting it into items (`plan`)."""

from __future__ import annotations

import triton
import triton.language as tl

# Batches come in all sizes: what depends on theirs is not to be compiled for each.


@triton.jit
def _page_costs(
    pages,
    count,
    raw_slot,
    heads,
    page_stride,
    at,
    KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    PAGES: tl.constexpr,
    OPEN_COST: tl.constexpr,
    HIGH_COST: tl.constexpr,
    LOW_COST: tl.constexpr,
):
    """Costs of the open, high and low tokens of pages [at, at + PAGES), int32 [PAGES, HEADS_BLOCK].

    The page that is being written counts as full: a step's plan then is as good as the next one's.
    """
    place = at + tl.arange(0, PAGES)
    head = tl.arange(0, HEADS_BLOCK)
    valid = place < count
    page = tl.load(pages + place, mask=valid, other=0)
    real = valid[:, None] & (head < KV_HEADS)[None, :]
    sealed = real
    open_cost = tl.zeros([PAGES, HEADS_BLOCK], tl.int32)
    if HAS_OPEN:
        is_open = tl.load(raw_slot + page, mask=valid, other=-1) >= 0
        open_cost = tl.where(real & is_open[:, None], 64 * OPEN_COST, 0)
        sealed = real & ~is_open[:, None]
    record = heads + page.to(tl.int64)[:, None] * page_stride + head[None, :] * 2
    word = tl.load(record + 1, mask=sealed, other=0)
    return open_cost, (word & 0xFF) * HIGH_COST, (word >> 8 & 0xFF) * LOW_COST


@triton.jit(do_not_specialize=["batch"])
def count_costs(
    costs,
    pages,
    first_page,
    num_pages,
    raw_slot,
    heads,
    layer_stride,
    page_stride,
    batch,
    KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    PAGES: tl.constexpr,
    OPEN_COST: tl.constexpr,
    HIGH_COST: tl.constexpr,
    LOW_COST: tl.constexpr,
):
    """Cost of every row of one sequence and layer: ``costs`` int32 [L, B * H * 3]."""
    sequence, layer = tl.program_id(0), tl.program_id(1)
    pages += tl.load(first_page + sequence)
    count = tl.load(num_pages + sequence)
    heads += layer.to(tl.int64) * layer_stride
    opened = tl.zeros([HEADS_BLOCK], tl.int32)
    high, low = opened, opened
    for at in range(0, count, PAGES):
        a, b, c = _page_costs(
            pages, count, raw_slot, heads, page_stride, at, KV_HEADS, HEADS_BLOCK, HAS_OPEN, PAGES,
            OPEN_COST, HIGH_COST, LOW_COST,
        )  # fmt: skip
        opened += tl.sum(a, 0)
        high += tl.sum(b, 0)
        low += tl.sum(c, 0)
    head = tl.arange(0, HEADS_BLOCK)
    row = costs + ((layer * batch + sequence) * KV_HEADS + head) * 3
    tl.store(row, opened, mask=head < KV_HEADS)
    tl.store(row + 1, high, mask=head < KV_HEADS)
    tl.store(row + 2, low, mask=head < KV_HEADS)


@triton.jit(do_not_specialize=["rows", "row_stride"])
def assign_items(
    costs,
    row_start,
    row_stride,
    share,
    rows,
    ITEMS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many items each row of one layer gets: prefix sums int32 [L, rows + 1], and their share.

    Args:
        ITEMS: shares to divide the layer's cost into.
        LEAST: the most that a page may cost, which no share is below.
    """
    layer = tl.program_id(0)
    costs += layer * rows
    row_start += layer * row_stride
    total = tl.zeros([BLOCK], tl.int64)
    for at in range(0, rows, BLOCK):
        row = at + tl.arange(0, BLOCK)
        total += tl.load(costs + row, mask=row < rows, other=0)
    size = tl.maximum(tl.cdiv(tl.sum(total, 0), ITEMS), LEAST).to(tl.int32)
    tl.store(share + layer, size)
    before = 0
    tl.store(row_start, before)
    for at in range(0, rows, BLOCK):
        row = at + tl.arange(0, BLOCK)
        count = tl.cdiv(tl.load(costs + row, mask=row < rows, other=0), size)
        tl.store(row_start + 1 + row, before + tl.cumsum(count, 0), mask=row < rows)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["batch", "row_stride", "item_stride"])
def divide_pages(
    items,
    row_start,
    row_stride,
    share,
    pages,
    first_page,
    num_pages,
    raw_slot,
    heads,
    layer_stride,
    page_stride,
    batch,
    item_stride,
    KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    PAGES: tl.constexpr,
    OPEN_COST: tl.constexpr,
    HIGH_COST: tl.constexpr,
    LOW_COST: tl.constexpr,
):
    """Write the items of one sequence and layer."""
    sequence, layer = tl.program_id(0), tl.program_id(1)
    pages += tl.load(first_page + sequence)
    count = tl.load(num_pages + sequence)
    heads += layer.to(tl.int64) * layer_stride
    items += layer.to(tl.int64) * item_stride
    size = tl.load(share + layer)
    head = tl.arange(0, HEADS_BLOCK)
    row = (sequence * KV_HEADS + head) * 3
    starts = row_start + layer * row_stride + row
    real = head < KV_HEADS
    first0 = tl.load(starts, mask=real, other=0)
    first1 = tl.load(starts + 1, mask=real, other=0)
    first2 = tl.load(starts + 2, mask=real, other=0)
    end = tl.load(starts + 3, mask=real, other=0)
    _empty_items(items, row, first0, first1, count)
    _empty_items(items, row + 1, first1, first2, count)
    _empty_items(items, row + 2, first2, end, count)
    tl.debug_barrier()
    spent0 = tl.zeros([HEADS_BLOCK], tl.int32)
    spent1, spent2 = spent0, spent0
    for at in range(0, count, PAGES):
        a, b, c = _page_costs(
            pages, count, raw_slot, heads, page_stride, at, KV_HEADS, HEADS_BLOCK, HAS_OPEN, PAGES,
            OPEN_COST, HIGH_COST, LOW_COST,
        )  # fmt: skip
        if HAS_OPEN:
            spent0 = _cut(items, first0, spent0, a, at, size, PAGES)
        spent1 = _cut(items, first1, spent1, b, at, size, PAGES)
        spent2 = _cut(items, first2, spent2, c, at, size, PAGES)


@triton.jit
def _empty_items(items, row, first, end, count):
    """Items [first, end) of each head's row: the first one is all pages, the others none yet."""
    most = tl.max(end - first, 0)
    for i in range(0, most):
        at = items + (first + i) * 4
        mine = first + i < end
        tl.store(at, row, mask=mine)
        tl.store(at + 1, tl.where(first + i == first, 0, count), mask=mine)
        tl.store(at + 2, count, mask=mine)


@triton.jit
def _cut(items, first, spent, costs, at, size, PAGES: tl.constexpr):
    """Begin an item at each page with which another share of its row's cost is reached.

    Args:
        spent: int32 [HEADS_BLOCK], cost of the row's pages before ``at``. costs: of these pages.
    """
    ends = spent[None, :] + tl.cumsum(costs, 0)
    # The share that a page ends in: at most one more than the page before, as none is larger.
    index = tl.maximum(ends - 1, 0) // size
    before = tl.maximum(ends - costs - 1, 0) // size
    place = (at + tl.arange(0, PAGES))[:, None]
    begins = index != before
    item = items + (first[None, :] + index) * 4
    tl.store(item + 1, place + tl.zeros_like(index), mask=begins)
    tl.store(item - 2, place + tl.zeros_like(index), mask=begins)
    return spent + tl.sum(costs, 0)

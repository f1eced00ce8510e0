# SPDX-License-Identifier: Apache-2.0
"""How decode attention is divided over the GPU: made on the device, once per step for all layers.

What a head keeps of a page differs from head to head, layer to layer and page to page. So the work
is counted first, in bytes, and cut into items of about equal size, as many as keep the GPU busy. An
item is a range of one sequence's pages, for one KV head, and of them the tokens of one kind (open,
high, low). All shapes are fixed by the batch size and the longest context: no host sync, and CUDA
graphs replay while everything behind them changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout

KINDS = 3
"""Open, high and low tokens; rows of the plan are ordered by sequence, head, then kind."""

ITEMS_PER_SM = 12
"""About as many items as run on a multiprocessor at a time: one wave, nearly full."""

COST_UNIT = 32
"""Bytes; costs are counted in it."""

TOKEN_OVERHEAD = 64
"""What addressing a token and its softmax cost, in bytes that could have been read meanwhile."""

_PAGES = 64
_ROWS = 1024


class SequencePages(NamedTuple):
    """Pages of B sequences on the device.

    Attributes:
        pages: int32 [N], page ids.
        first: int32 [B], where each sequence's pages start in ``pages``.
        count: int32 [B], how many there are.
        raw_slot: int32 [V], raw page of open pages, negative for sealed ones; None: all are sealed.
        last_len: int32 [B], tokens of each sequence's last page, where that is open.
    """

    pages: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    raw_slot: torch.Tensor | None
    last_len: torch.Tensor


class DecodePlan(NamedTuple):
    """Work items of each of L layers.

    Attributes:
        items: int32 [L, N, 4]: row (``(sequence * H + head) * KINDS + kind``), first page, end.
        row_start: int32 [L, B * H * KINDS + 1], first item of each row; the last is their number.
        sequences: the pages that it was made for.
    """

    items: torch.Tensor
    row_start: torch.Tensor
    sequences: SequencePages

    def layer(self, index: int) -> DecodePlan:
        """The plan of one layer alone."""
        return self._replace(items=self.items[index], row_start=self.row_start[index])


def plan_decode(sequences: SequencePages, heads: torch.Tensor, layout: PageLayout) -> DecodePlan:
    """Divide the work of a decode step.

    Args:
        heads: int32 [L, V, H, 2], the directory's records; layers and pages may be strided.
    """
    layers, kv_heads, batch = heads.shape[0], layout.num_kv_heads, len(sequences.count)
    rows = batch * kv_heads * KINDS
    # Every row's last item may be small; all others take their full share.
    most = ITEMS_PER_SM * multiprocessors(heads.device) + rows

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=heads.device)

    plan = DecodePlan(empty(layers, most, 4), empty(layers, rows + 1), sequences)
    costs, share = empty(layers, rows), empty(layers)
    shared = dict(
        pages=sequences.pages,
        first_page=sequences.first,
        num_pages=sequences.count,
        raw_slot=sequences.pages if sequences.raw_slot is None else sequences.raw_slot,
        heads=heads,
        layer_stride=heads.stride(0),
        page_stride=heads.stride(1),
        BATCH=batch,
        KV_HEADS=kv_heads,
        HEADS_BLOCK=triton.next_power_of_2(kv_heads),
        HAS_OPEN=sequences.raw_slot is not None,
        PAGES=_PAGES,
        **_token_costs(layout),
    )
    grid = (batch, layers)
    launch(_count, grid, costs=costs, num_warps=4, **shared)
    launch(
        _assign,
        (layers,),
        costs=costs,
        row_start=plan.row_start,
        share=share,
        rows=rows,
        ITEMS=most - rows,
        LEAST=PAGE_TOKENS * max(_token_costs(layout).values()),
        BLOCK=_ROWS,
        num_warps=4,
    )
    launch(
        _divide,
        grid,
        items=plan.items,
        row_start=plan.row_start,
        share=share,
        item_stride=plan.items.stride(0),
        num_warps=4,
        **shared,
    )
    return plan


def _token_costs(layout: PageLayout) -> dict[str, int]:
    """Cost of a token of each kind, in units of COST_UNIT."""

    def cost(key_bits: int, value_bits: int) -> int:
        meta = META_BYTES if key_bits else 0
        nbytes = layout.row_bytes(key_bits) + layout.row_bytes(value_bits) + meta
        return -(-(nbytes + TOKEN_OVERHEAD) // COST_UNIT)

    high, low = layout.high, layout.low
    return {
        "OPEN_COST": cost(0, 0),
        "HIGH_COST": cost(high.key_bits, high.value_bits),
        "LOW_COST": cost(low.key_bits, low.value_bits),
    }


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


@triton.jit
def _count(
    costs,
    pages,
    first_page,
    num_pages,
    raw_slot,
    heads,
    layer_stride,
    page_stride,
    BATCH: tl.constexpr,
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
    row = costs + ((layer * BATCH + sequence) * KV_HEADS + head) * 3
    tl.store(row, opened, mask=head < KV_HEADS)
    tl.store(row + 1, high, mask=head < KV_HEADS)
    tl.store(row + 2, low, mask=head < KV_HEADS)


@triton.jit
def _assign(
    costs,
    row_start,
    share,
    rows,
    ITEMS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many items each row of one layer gets: prefix sums int32 [L, rows + 1], and their share.

    Args:
        ITEMS: shares to divide the layer's cost into. LEAST: a page's cost, which no share is below.
    """
    layer = tl.program_id(0)
    costs += layer * rows
    row_start += layer * (rows + 1)
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


@triton.jit
def _divide(
    items,
    row_start,
    share,
    pages,
    first_page,
    num_pages,
    raw_slot,
    heads,
    layer_stride,
    page_stride,
    item_stride,
    BATCH: tl.constexpr,
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
    starts = row_start + layer * (BATCH * KV_HEADS * 3 + 1) + row
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

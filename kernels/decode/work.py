# SPDX-License-Identifier: Apache-2.0
"""How decode attention is divided over the GPU: on the device, once per step for all layers.

What a head keeps of a page differs from head to head, layer to layer and page to page. So the work
is counted first, in bytes, and cut into work tiles of about equal size, as many as keep the GPU
busy. A tile is a range of one sequence's pages, for one KV head, and of them the tokens of one kind
(open, high, low): a part of that *segment*. All shapes are fixed by the batch size and the longest
context: no host sync, and CUDA graphs replay while everything behind them changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.decode.work_kernels import (
    RecordView,
    WorkTraits,
    assign_tiles,
    count_costs,
    divide_pages,
)
from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout

KINDS = 3
"""Open, high and low tokens; segments are ordered by sequence, head, then kind."""

TILES_PER_SM = 24
"""Twice as many as run on a multiprocessor at a time: those that are left over at the end are then
small beside the whole."""

COST_UNIT = 32
"""Bytes; costs are counted in it."""

TOKEN_OVERHEAD = 64
"""What addressing a token and its softmax cost, in bytes that could have been read meanwhile."""


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


class WorkTiles(NamedTuple):
    """The work of each of L layers.

    Attributes:
        tiles: int32 [L, N, 4]: segment (``(sequence * H + head) * KINDS + kind``), first page, end.
        segment_start: int32 [L, B * H * KINDS + 1], first tile of each segment; the last is their
            number.
        sequences: whose work it is.
    """

    tiles: torch.Tensor
    segment_start: torch.Tensor
    sequences: SequencePages

    def layer(self, index: int) -> WorkTiles:
        """The work of one layer alone."""
        return WorkTiles(self.tiles[index], self.segment_start[index], self.sequences)


def divide_work(sequences: SequencePages, heads: torch.Tensor, layout: PageLayout) -> WorkTiles:
    """Divide the work of a decode step.

    Args:
        heads: int32 [L, V, H, 2], the directory's records; layers and pages may be strided.
    """
    layers, batch = heads.shape[0], len(sequences.count)
    segments = batch * layout.num_kv_heads * KINDS
    shares = TILES_PER_SM * multiprocessors(heads.device)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=heads.device)

    # Layers start at multiples of 16 bytes, or kernels would be compiled for other addresses, too.
    segment_start = empty(layers, segments // 4 * 4 + 4)[:, : segments + 1]
    # Every segment's last tile may be small; all others take their full share.
    work = WorkTiles(empty(layers, shares + segments, 4), segment_start, sequences)
    costs, share = empty(layers, segments), empty(layers)
    records = RecordView(heads, *heads.stride()[:2])
    traits = work_traits(layout)
    grid = (batch, layers)
    launch(
        count_costs,
        grid,
        costs=costs,
        sequences=sequences,
        records=records,
        TRAITS=traits,
        num_warps=4,
    )
    launch(
        assign_tiles,
        (layers,),
        costs=costs,
        segment_start=segment_start,
        stride=segment_start.stride(0),
        share=share,
        segments=segments,
        SHARES=shares,
        LEAST=PAGE_TOKENS * max(traits.open_cost, traits.high_cost, traits.low_cost),
        num_warps=4,
    )
    launch(
        divide_pages,
        grid,
        work=work,
        tile_stride=work.tiles.stride(0),
        segment_stride=segment_start.stride(0),
        share=share,
        records=records,
        TRAITS=traits,
        num_warps=4,
    )
    return work


def divide_open(sequences: SequencePages, layout: PageLayout) -> WorkTiles:
    """`divide_work` of a layer all of whose pages are open, and of every other layer like it."""
    records = sequences.count.new_empty(1, 1, layout.num_kv_heads, 2)  # nothing is read
    return divide_work(sequences, records, layout).layer(0)


def work_traits(layout: PageLayout) -> WorkTraits:
    """Costs of a token of each kind, in units of `COST_UNIT`."""

    def cost(key_bits: int, value_bits: int) -> int:
        meta = META_BYTES if key_bits else 0
        nbytes = layout.row_bytes(key_bits) + layout.row_bytes(value_bits) + meta
        return -(-(nbytes + TOKEN_OVERHEAD) // COST_UNIT)

    high, low = layout.high, layout.low
    return WorkTraits(
        kv_heads=layout.num_kv_heads,
        open_cost=cost(0, 0),
        high_cost=cost(high.key_bits, high.value_bits),
        low_cost=cost(low.key_bits, low.value_bits),
    )

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

from sglang_diffxkv.kernels.decode.plan_kernels import assign_items, count_costs, divide_pages
from sglang_diffxkv.kernels.gpu.device import multiprocessors
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout

KINDS = 3
"""Open, high and low tokens; rows of the plan are ordered by sequence, head, then kind."""

ITEMS_PER_SM = 24
"""Twice as many items as run on a multiprocessor at a time: those that are left over at the end are
then small beside the whole."""

COST_UNIT = 32
"""Bytes; costs are counted in it."""

TOKEN_OVERHEAD = 64
"""What addressing a token and its softmax cost, in bytes that could have been read meanwhile."""

_TILE = 512
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

    # Layers start at multiples of 16 bytes, or kernels would be compiled for other addresses, too.
    row_start = empty(layers, rows // 4 * 4 + 4)[:, : rows + 1]
    plan = DecodePlan(empty(layers, most, 4), row_start, sequences)
    costs, share = empty(layers, rows), empty(layers)
    shared = dict(
        pages=sequences.pages,
        first_page=sequences.first,
        num_pages=sequences.count,
        raw_slot=sequences.pages if sequences.raw_slot is None else sequences.raw_slot,
        heads=heads,
        layer_stride=heads.stride(0),
        page_stride=heads.stride(1),
        batch=batch,
        KV_HEADS=kv_heads,
        HEADS_BLOCK=triton.next_power_of_2(kv_heads),
        HAS_OPEN=sequences.raw_slot is not None,
        PAGES=min(64, max(1, _TILE // triton.next_power_of_2(kv_heads))),
        **_token_costs(layout),
    )
    grid = (batch, layers)
    launch(count_costs, grid, costs=costs, num_warps=4, **shared)
    launch(
        assign_items,
        (layers,),
        costs=costs,
        row_start=plan.row_start,
        row_stride=plan.row_start.stride(0),
        share=share,
        rows=rows,
        ITEMS=most - rows,
        LEAST=PAGE_TOKENS * max(_token_costs(layout).values()),
        BLOCK=_ROWS,
        num_warps=4,
    )
    launch(
        divide_pages,
        grid,
        items=plan.items,
        row_start=plan.row_start,
        row_stride=plan.row_start.stride(0),
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

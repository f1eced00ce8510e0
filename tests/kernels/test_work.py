# SPDX-License-Identifier: Apache-2.0
"""The division of a decode step: tiles cover every segment's pages once, none is much too large."""

from __future__ import annotations

import itertools

import pytest
import torch

from sglang_diffxkv.kernels.decode.work import KINDS, SequencePages, divide_work, work_traits
from sglang_diffxkv.kernels.decode.work_kernels import WorkTraits
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, head_counts, head_records
from tests.support.device import DEVICE
from tests.support.layouts import layout_of

LAYERS, PAGES = 2, 90


def page_costs(
    pages: torch.Tensor, heads: torch.Tensor, raw_slot: torch.Tensor, costs: WorkTraits
) -> torch.Tensor:
    """int64 [pages, H, KINDS] of some pages of one layer."""
    opened = (raw_slot[pages] >= 0)[:, None]
    n_high, n_low = (n.masked_fill(opened, 0) for n in head_counts(heads[pages]))
    full = (opened * PAGE_TOKENS * costs.open_cost).expand_as(n_high)
    return torch.stack([full, n_high * costs.high_cost, n_low * costs.low_cost], 2)


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("counts", [[0, 1, 70, 131, 0], [300], [5, 0, 64, 1, 1, 1, 40]])
def test_tiles_cover_the_pages_of_every_segment_once(counts: list[int], kv_heads: int) -> None:
    gen = torch.Generator().manual_seed(sum(counts) + kv_heads)
    layout = layout_of(head_dim=64, kv_heads=kv_heads)
    pages = torch.randint(PAGES, (sum(counts),), generator=gen, dtype=torch.int32)
    first = torch.tensor([0, *counts]).cumsum(0)[:-1].to(torch.int32)
    raw_slot = torch.where(torch.rand(PAGES, generator=gen) < 0.2, 1, -1).to(torch.int32)
    n_high = torch.randint(65, (LAYERS, PAGES, kv_heads), generator=gen)
    n_low = (torch.rand(n_high.shape, generator=gen) * (65 - n_high)).long()
    n_high[1, :, 0] = n_low[1, :, 0] = 0  # a head that keeps nothing
    heads = head_records(torch.zeros_like(n_high), n_high, n_low)
    count = torch.tensor(counts, dtype=torch.int32)
    on_device = (x.to(DEVICE) for x in (pages, first, count, raw_slot, count))
    work = divide_work(SequencePages(*on_device), heads.to(DEVICE), layout)
    costs = work_traits(layout)
    for layer in range(LAYERS):
        starts, tiles = work.segment_start[layer].tolist(), work.tiles[layer].tolist()
        assert starts[-1] <= len(tiles)
        rows = [
            page_costs(pages[at : at + n].long(), heads[layer], raw_slot, costs)
            for at, n in zip(first.tolist(), counts, strict=True)
        ]
        total = sum(int(row.sum()) for row in rows)
        dearest = max(costs.open_cost, costs.high_cost, costs.low_cost)
        share = max(-(-total // (len(tiles) - len(starts) + 1)), PAGE_TOKENS * dearest)
        for segment in range(len(counts) * kv_heads * KINDS):
            sequence, rest = divmod(segment, kv_heads * KINDS)
            head, kind = divmod(rest, KINDS)
            mine = rows[sequence][:, head, kind]
            ours = tiles[starts[segment] : starts[segment + 1]]
            assert len(ours) == -(-int(mine.sum()) // share)
            assert [tile[0] for tile in ours] == [segment] * len(ours)
            if not ours:
                continue
            edges = [tile[1] for tile in ours] + [counts[sequence]]
            assert edges[0] == 0 and edges == sorted(edges)
            assert [tile[2] for tile in ours] == edges[1:]
            for begin, end in itertools.pairwise(edges):
                assert 0 < int(mine[begin:end].sum()) < 2 * share

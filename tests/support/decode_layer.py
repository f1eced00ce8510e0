# SPDX-License-Identifier: Apache-2.0
"""Pages and new tokens of a decode step for all layers of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.decode import layer
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.step import StepPages
from tests.support.builders import build_sealed, random_tiers

KV_HEADS, LAYERS = 2, 2
LENGTHS = (130, 1, 64, 777, 65)
SHARED = 0
"""The raw slot of a page that the last two sequences share."""


class Case(NamedTuple):
    """Arguments; raw pages hold random tokens in place of the new ones."""

    tables: layer.LayerTables
    pages: StepPages
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_case(
    layout: PageLayout,
    group: int,
    dtype: torch.dtype,
    *,
    scores: bool = True,
    lengths: Sequence[int] = LENGTHS,
    queries: int = 1,
    window_left: int = -1,
) -> Case:
    """Every third page sealed but for those of new tokens; what nobody may read is NaN.

    With a window all pages are open that it reaches, and the others are not listed.
    """
    gen = torch.Generator().manual_seed(group + layout.head_dim)
    lens = torch.tensor(lengths, dtype=torch.int32)
    counts = -(-lens // PAGE_TOKENS)
    num_pages = int(counts.sum()) + 1
    table = torch.full((len(lens), int(counts.max()) + 1), 1 << 30, dtype=torch.int32)
    raw_slot = torch.full((num_pages,), -1, dtype=torch.int32)
    slots = torch.randperm(2 * num_pages, generator=gen).int() + 1
    shape = (2 * num_pages + 1, PAGE_TOKENS, KV_HEADS, layout.head_dim)
    keys, values = (
        [torch.full(shape, torch.nan, dtype=dtype) for _ in range(LAYERS)] for _ in range(2)
    )
    ids = torch.randperm(num_pages, generator=gen).int()
    shared, next_page = ids[0], 1
    rows = torch.zeros(len(lens), queries, dtype=torch.int64)
    for b, length in enumerate(lengths):
        first_new = length - queries
        first_seen = max(first_new - window_left, 0) if window_left >= 0 else 0
        for place in range(int(counts[b])):
            begin = place * PAGE_TOKENS
            n = min(PAGE_TOKENS, length - begin)
            holds_new = begin + n > first_new
            page = ids[next_page]
            next_page += 1
            if place == 0 and not holds_new and b >= len(lens) - 2:
                page = shared
            if window_left >= 0 and begin + n <= first_seen:
                continue
            table[b, place] = page
            if place % 3 == 1 and not holds_new and window_left < 0:
                continue
            slot = SHARED if page == shared else int(slots[page])
            raw_slot[page] = slot
            hidden = max(first_seen - begin, 0) if page != shared else 0
            for raw in (*keys, *values):
                raw[slot, hidden:n] = torch.randn(shape[1:], generator=gen)[hidden:n].to(dtype)
            for i, token in enumerate(range(first_new, length)):
                if begin <= token < begin + n:
                    rows[b, i] = slot * PAGE_TOKENS + token - begin
    accum = torch.rand(LAYERS, shape[0], KV_HEADS, PAGE_TOKENS, generator=gen) if scores else None
    sealed = None
    if window_left < 0:
        sealed = make_sealed(layout, num_pages, dtype, gen)
    tables = layer.LayerTables(raw_slot, keys, values, accum, sealed)
    last_len = (lens - 1) % PAGE_TOKENS + 1
    pages = StepPages(table, lens, counts, last_len, rows.flatten())
    # As slices of one product, which is how models make them.
    width = (group + 2) * KV_HEADS
    qkv = torch.randn(len(lens) * queries, width + 1, layout.head_dim, generator=gen).to(dtype)
    q, k, v, _ = qkv.split([group * KV_HEADS, KV_HEADS, KV_HEADS, 1], dim=1)
    return Case(tables, pages, q, k, v)


def make_sealed(
    layout: PageLayout, num_pages: int, dtype: torch.dtype, gen: torch.Generator
) -> layer.SealedLayers:
    """Nothing in the first layer, whose frames are invalid."""
    tiers = random_tiers(num_pages, KV_HEADS, (0.3, 0.5, 0.2), gen)
    arena = build_sealed(layout, tiers, gen, dtype)
    return layer.SealedLayers(
        arena.arena,
        torch.stack([torch.full_like(arena.frames, -1), arena.frames]),
        torch.stack([torch.zeros_like(arena.heads), arena.heads]),
        torch.randn(LAYERS, KV_HEADS, layout.head_dim, generator=gen),
        layout,
    )

# SPDX-License-Identifier: Apache-2.0
"""Decode steps of several new tokens as a GPU does them, and what they must give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.decode import naive
from sglang_diffxkv.kernels.decode.triton import attend
from sglang_diffxkv.kernels.decode.work import SequencePages, divide_work
from sglang_diffxkv.kernels.extend import naive as extend
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages, Queries
from sglang_diffxkv.kernels.softmax import Softmax, add_sinks
from tests.support.attention import assert_close, indptr, moved
from tests.support.builders import SealedArena, build_sealed, random_tiers
from tests.support.device import DEVICE
from tests.support.layouts import layout_of


class Batch(NamedTuple):
    """Sequences of a decode step, on the CPU.

    Attributes:
        sequences: all pages, by position.
        lengths: tokens of each, new ones included.
        sealed: page ids of each sequence.
        opened: their lists; raw pages hold NaN where nothing is written.
    """

    sequences: SequencePages
    lengths: list[int]
    sealed: list[torch.Tensor]
    opened: OpenPages


def draw_batch(
    lengths: Sequence[int],
    sealed: Sequence[int],
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window_pages: int | None = None,
) -> Batch:
    """Sequences whose first pages, ``sealed`` of each, are sealed; ids of these come first.

    Args:
        window_pages: only so many of the last pages are listed.
    """
    ids, sealed_ids, slots, positions, counts = [], [], [], [], []
    raw_slot = torch.full((sum(sealed) + 99,), -1, dtype=torch.int32)
    next_sealed, next_open = 0, sum(sealed)
    order = iter(torch.randperm(98).tolist())
    k, v = torch.full((2, 98, PAGE_TOKENS, kv_heads, dim), math.nan).to(dtype)
    for length, of_sealed in zip(lengths, sealed, strict=True):
        pages = -(-length // PAGE_TOKENS)
        first = max(0, pages - window_pages) if window_pages else 0
        mine = torch.arange(next_sealed, next_sealed + of_sealed)
        next_sealed += of_sealed
        sealed_ids.append(mine.int())
        listed = mine.tolist()
        for place in range(max(first, of_sealed), pages):
            slot = raw_slot[next_open] = next(order)
            written = min(PAGE_TOKENS, length - place * PAGE_TOKENS)
            for raw in (k, v):
                raw[slot, :written] = torch.randn(written, kv_heads, dim).to(dtype)
            listed.append(next_open)
            slots.append(int(slot))
            positions.append(place)
            next_open += 1
        ids.append(listed)
        counts.append(len(listed))
    width = max(counts) + 1
    table = torch.tensor([row + [10**9] * (width - len(row)) for row in ids], dtype=torch.int32)
    last = [(n - 1) % PAGE_TOKENS + 1 if n else 0 for n in lengths]
    sequences = SequencePages(
        table.flatten(),
        torch.arange(len(ids), dtype=torch.int32) * width,
        torch.tensor(counts, dtype=torch.int32),
        raw_slot,
        torch.tensor(last, dtype=torch.int32),
    )
    of_open = [n - of_sealed for n, of_sealed in zip(counts, sealed, strict=True)]
    lists = indptr(*of_open), torch.tensor(slots).int(), torch.tensor(positions).int()
    return Batch(sequences, list(lengths), sealed_ids, OpenPages(k, v, *lists))


def new_tokens(q: torch.Tensor, batch: Batch, queries: int) -> Queries:
    """The last tokens of each sequence; sequences without any have none."""
    starts = torch.tensor([n - queries if n else 0 for n in batch.lengths]).int()
    return Queries(q, torch.arange(0, len(q) + 1, queries, dtype=torch.int32), starts)


def expected_open(q: torch.Tensor, batch: Batch, queries: int, softmax: Softmax) -> AttentionState:
    asking, opened = new_tokens(q, batch, queries), batch.opened
    written = OpenPages(*(x.nan_to_num() for x in opened[:2]), *opened.lists)
    return extend.extend_open(asking, written, softmax)


def expected_sealed(
    q: torch.Tensor, batch: Batch, arena: SealedArena, queries: int, softmax: Softmax
) -> AttentionState:
    """Every new token over all sealed pages of its sequence: as if it were a sequence's own."""
    listed = [pages for pages in batch.sealed for _ in range(queries)]
    pages = torch.cat(listed)
    return naive.decode_sealed(q, arena.tables.listed(indptr(*map(len, listed)), pages), softmax)


def check_step(
    queries: int,
    lengths: Sequence[int],
    sealed: Sequence[int],
    *,
    tiers: tuple[str, str] = ("K8V4", "K4V2"),
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    softmax: Softmax | None = None,
    mean: bool = False,
) -> None:
    """Both kinds of pages; queries of sealed ones differ, and what is found there may come back."""
    gen = torch.Generator().manual_seed(queries)
    torch.manual_seed(dim + queries)
    softmax = softmax or Softmax(dim**-0.5)
    batch = draw_batch(lengths, sealed, kv_heads, dim, dtype)
    layout = layout_of(*tiers, head_dim=dim, kv_heads=kv_heads, itemsize=dtype.itemsize)
    drawn = random_tiers(sum(sealed), kv_heads, (0.3, 0.4, 0.3), gen)
    arena = build_sealed(layout, drawn, gen, dtype)
    tokens = len(lengths) * queries
    q, q_sealed = torch.randn(2, tokens, kv_heads * group + 1, dim).to(dtype)[:, :, :-1]
    key_mean = torch.randn(kv_heads, dim) if mean else None
    missing = len(batch.sequences.raw_slot) - len(arena.heads)  # sealed pages' ids come first
    heads = torch.cat([arena.heads, torch.full((missing, kv_heads, 2), -1, dtype=torch.int32)])
    pages = LayerPages(arena.tables._replace(heads=heads), *batch.opened[:2], key_mean)
    pages, sequences, on_device = moved((pages, batch.sequences, (q, q_sealed, softmax)), DEVICE)
    work = divide_work(sequences, pages.tables.heads[None], layout).layer(0)
    found = attend(*on_device[:2], pages, work, on_device[2])
    part = softmax.of_part
    of_sealed = expected_sealed(q_sealed, batch, arena, queries, part)
    if key_mean is not None:
        of_sealed = from_sealed(of_sealed, q, key_mean, part)
    expected = merge_states(expected_open(q, batch, queries, part), of_sealed)
    assert_close(found, add_sinks(expected, softmax.sinks), 1e-3)

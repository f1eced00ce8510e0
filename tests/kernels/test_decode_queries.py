# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a GPU with several new tokens of each sequence, against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.decode import naive
from sglang_diffxkv.kernels.decode.triton import attend
from sglang_diffxkv.kernels.decode.work import SequencePages, divide_open, divide_work
from sglang_diffxkv.kernels.extend import naive as extend
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages, Queries
from sglang_diffxkv.kernels.score import RawTables
from sglang_diffxkv.kernels.score import naive as naive_score
from sglang_diffxkv.kernels.score import triton as triton_score
from sglang_diffxkv.kernels.softmax import Softmax, add_sinks
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests
from sglang_diffxkv.kernels.step import naive as step
from sglang_diffxkv.kernels.step import triton as triton_step
from tests.support.attention import assert_close, indptr, moved
from tests.support.builders import SealedArena, build_sealed, error_norm, random_tiers
from tests.support.device import DEVICE
from tests.support.layouts import layout_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHARES = (0.3, 0.4, 0.3)


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


def check(
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
    drawn = random_tiers(sum(sealed), kv_heads, SHARES, gen)
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


LENGTHS = (130, 64, 65, 3 * 64 + 5, 64 * 5)
SEALED = (1, 0, 0, 2, 4)


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
@pytest.mark.parametrize("mean", [False, True])
def test_new_tokens_see_those_before_them(queries: int, mean: bool) -> None:
    """Among them some that begin a page, or lie in two."""
    check(queries, LENGTHS, SEALED, mean=mean)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "group", "dim"),
    [(16, 1, 3, 64), (8, 1, 8, 64), (4, 3, 1, 80), (2, 1, 4, 256), (7, 2, 5, 16), (3, 1, 16, 128)],
)
def test_shapes(queries: int, kv_heads: int, group: int, dim: int) -> None:
    shape = {"kv_heads": kv_heads, "group": group, "dim": dim}
    check(queries, (200, 64 + queries - 1, 64 + queries), (1, 0, 1), **shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiers", [("raw", "K4V2"), ("K8V8", "K2V2")])
def test_dtypes_and_tiers(dtype: torch.dtype, tiers: tuple[str, str]) -> None:
    check(4, (130, 67), (1, 1), tiers=tiers, dtype=dtype)


def test_more_pages_than_one_tile_takes() -> None:
    """Drafts then have a tile to themselves, in which the first queries see nothing."""
    check(5, (64 * 40 + 3, 64 * 3 + 1), (20, 1), kv_heads=1, group=2, dim=16)


def test_sequences_without_pages() -> None:
    check(3, (0, 70, 0), (0, 0, 0))


def test_sinks_count_once() -> None:
    """Where there are parts of both kinds, and where a sequence has no pages at all."""
    sinks = torch.tensor([3.0, -4.0, 0.0, 9.0])
    check(3, (330, 70), (4, 0), softmax=Softmax(0.125, sinks=sinks), mean=True)
    check(1, (330, 0), (4, 0), softmax=Softmax(0.125, sinks=sinks))


@pytest.mark.parametrize("cap", [0.7, 5.0, 50.0])
@pytest.mark.parametrize("tiers", [("K8V4", "K4V2"), ("raw", "K2V2")])
def test_soft_caps(cap: float, tiers: tuple[str, str]) -> None:
    check(2, (330, 70), (4, 0), tiers=tiers, softmax=Softmax(0.3, cap=cap))


def test_soft_caps_of_huge_scores() -> None:
    """Their exponentials overflow, and end at the cap."""
    check(2, (200, 70), (1, 1), softmax=Softmax(100.0, cap=3.0))


@pytest.mark.parametrize("window_left", [0, 1, 63, 100, 512])
@pytest.mark.parametrize(("queries", "group"), [(1, 2), (4, 3), (8, 1)])
def test_windows(window_left: int, queries: int, group: int) -> None:
    """Lists have the pages of the window; what no query sees of them is NaN in the keys."""
    torch.manual_seed(window_left + queries)
    dim, kv_heads, dtype = 64, 2, torch.bfloat16
    sinks = torch.randn(kv_heads * group)
    softmax = Softmax(0.2, cap=4.0, window_left=window_left, sinks=sinks)
    width = (window_left + queries + PAGE_TOKENS - 2) // PAGE_TOKENS + 1
    lengths = (700, 64 + queries, 129, queries, 640)
    batch = draw_batch(lengths, [0] * 5, kv_heads, dim, dtype, window_pages=width)
    q = torch.randn(len(lengths) * queries, kv_heads * group, dim).to(dtype)
    pages = LayerPages.of_open(*moved(batch.opened[:2], DEVICE))
    sequences, on_device, softmax = moved((batch.sequences, q, softmax), DEVICE)
    work = divide_open(sequences, pages.tables.layout)
    found = attend(on_device, on_device, pages, work, softmax)
    softmax = moved(softmax, "cpu")
    expected = expected_open(q, batch, queries, softmax.of_part)
    assert_close(found, add_sinks(expected, softmax.sinks), 1e-3)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("queries", [2, 3, 8, 16])
def test_only_the_first_new_token_is_recorded(queries: int, scores: bool) -> None:
    torch.manual_seed(queries)
    lengths = [queries, 64, 64 + queries - 1, 64 + queries, 65, 999, 5]  # the last is padding
    req_to_token = torch.full((9, 1024), 10**9, dtype=torch.int32)
    rows, page = torch.randperm(9)[: len(lengths)], 1
    for row, length in zip(rows.tolist(), lengths, strict=True):
        tokens = torch.arange(page * PAGE_TOKENS, page * PAGE_TOKENS + length)
        req_to_token[row, :length] = tokens.int()
        page += -(-length // PAGE_TOKENS)
    raw_slot = torch.where(torch.rand(page) < 0.6, torch.randperm(page), -1).int()
    raw_slot[page - 18 :] = torch.arange(page, page + 18).int()  # the last sequence's, open
    poisoned = [torch.full_like(raw_slot, -77) for _ in range(3)]
    longs = [torch.full((page,), -77) for _ in range(2)]
    counts = torch.rand(2 * page + 18, PAGE_TOKENS) if scores else None
    metadata = PageMetadata(raw_slot, *poisoned, *longs, counts)
    recorded, on_device = (moved(metadata, "cpu"), moved(metadata, DEVICE))
    recorded, on_device = (
        PageMetadata(*(None if x is None else x.clone() for x in tables))
        for tables in (recorded, on_device)
    )
    real = torch.tensor([len(lengths) - 1], dtype=torch.int32)
    requests = StepRequests(req_to_token, rows, torch.tensor(lengths), real, queries)
    clock = torch.tensor([1 << 33, 77])
    expected = step.begin_decode(requests, recorded, clock, 64)
    found = triton_step.begin_decode(*moved((requests,), DEVICE), on_device, clock.to(DEVICE), 64)
    for name in ("lengths", "count", "last_len", "rows"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert found.queries == queries and not found.rows[-queries:].any()
    for name, mine, theirs in zip(PageMetadata._fields, on_device, recorded, strict=True):
        if theirs is not None:
            assert torch.allclose(mine.cpu(), theirs), name


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_only_the_first_new_token_scores(queries: int, cap: float) -> None:
    torch.manual_seed(queries)
    kv_heads, group, dim, dtype = 2, 3, 80, torch.bfloat16
    lengths = (200, 64 + queries, 64 + queries - 1, queries)
    softmax = Softmax(0.2, cap=cap)
    batch = draw_batch(lengths, (1, 0, 0, 0), kv_heads, dim, dtype)
    sequences = batch.sequences
    rows = torch.zeros(len(lengths) * queries, dtype=torch.int64)
    table = sequences.pages.view(len(lengths), -1)
    lens = torch.tensor(lengths, dtype=torch.int32)
    pages = StepPages(table, lens, sequences.count, sequences.last_len, rows)
    q = torch.randn(len(rows), kv_heads * group, dim).to(dtype)
    lse = 5 + torch.rand(len(rows), kv_heads * group)
    drafts = torch.arange(len(rows)) % queries > 0
    q[drafts], lse[drafts] = math.nan, math.nan
    keys = batch.opened.keys
    before = torch.rand(len(keys), kv_heads, PAGE_TOKENS)
    expected, accum = before.double(), before.to(DEVICE, copy=True)
    naive_score.score_decode(q, lse, pages, RawTables(keys, sequences.raw_slot, expected), softmax)
    raw = RawTables(*moved((keys, sequences.raw_slot), DEVICE), accum)
    triton_score.score_decode(*moved((q, lse, pages), DEVICE), raw, softmax)
    assert error_norm(accum.cpu() - before, expected - before.double()) <= 1e-3
    unseen = expected == before
    assert unseen.any() and torch.equal(accum.cpu()[unseen], before[unseen])

# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a GPU with several new tokens of each sequence, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.score import RawTables
from sglang_diffxkv.kernels.score import naive as naive_score
from sglang_diffxkv.kernels.score import triton as triton_score
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests
from sglang_diffxkv.kernels.step import naive as step
from sglang_diffxkv.kernels.step import triton as triton_step
from tests.support.attention import moved
from tests.support.builders import error_norm
from tests.support.decode_batches import check_step, draw_batch
from tests.support.device import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (130, 64, 65, 3 * 64 + 5, 64 * 5)
SEALED = (1, 0, 0, 2, 4)


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
@pytest.mark.parametrize("mean", [False, True])
def test_new_tokens_see_those_before_them(queries: int, mean: bool) -> None:
    """Among them some that begin a page, or lie in two."""
    check_step(queries, LENGTHS, SEALED, mean=mean)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "group", "dim"),
    [(16, 1, 3, 64), (8, 1, 8, 64), (4, 3, 1, 80), (2, 1, 4, 256), (7, 2, 5, 16), (3, 1, 16, 128)],
)
def test_shapes(queries: int, kv_heads: int, group: int, dim: int) -> None:
    shape = {"kv_heads": kv_heads, "group": group, "dim": dim}
    check_step(queries, (200, 64 + queries - 1, 64 + queries), (1, 0, 1), **shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiers", [("raw", "K4V2"), ("K8V8", "K2V2")])
def test_dtypes_and_tiers(dtype: torch.dtype, tiers: tuple[str, str]) -> None:
    check_step(4, (130, 67), (1, 1), tiers=tiers, dtype=dtype)


def test_more_pages_than_one_tile_takes() -> None:
    """Drafts then have a tile to themselves, in which the first queries see nothing."""
    check_step(5, (64 * 40 + 3, 64 * 3 + 1), (20, 1), kv_heads=1, group=2, dim=16)


def test_sequences_without_pages() -> None:
    check_step(3, (0, 70, 0), (0, 0, 0))


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
    sealed = (raw_slot < 0) & (torch.rand(page) < 0.7)
    unread = torch.zeros(1, dtype=torch.int32)
    metadata = PageMetadata(raw_slot, sealed, *poisoned, *longs, counts, unread)
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

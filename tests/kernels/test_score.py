# SPDX-License-Identifier: Apache-2.0
"""Importance scores: every implementation against dense attention in float64."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch

from sglang_diffxkv.kernels import score
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import RawTables, ScoringQueries, naive, triton
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages
from tests.support.builders import error_norm
from tests.support.device import DEVICE

KV_HEADS = 2


TOLERANCE = {"triton": 1e-3}


@pytest.fixture(params=["naive", *available_isas(), "triton"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation under test, selected for the public function."""
    if request.param not in ("naive", "triton"):
        monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


class Sequences(NamedTuple):
    """Arguments of score_open before ``accum``, and the dense scores float64 [R, H, 64]."""

    queries: ScoringQueries
    opened: OpenPages
    expected: torch.Tensor

    def on(self, device: torch.device) -> tuple[ScoringQueries, OpenPages]:
        queries = ScoringQueries(*(x.to(device) for x in self.queries))
        return queries, OpenPages(*(x.to(device) for x in self.opened))


LENGTHS = [101, 2, 64, 80]
QUERIES = [[0, 5, 63, 64, 100], [1], [], list(range(3, 80, 4))]


@functools.cache
def mixed_sequences(group: int, dim: int, dtype: torch.dtype) -> Sequences:
    return random_sequences(LENGTHS, QUERIES, group, dim, dtype)


def random_sequences(
    lengths: list[int], queries: list[list[int]], group: int, dim: int, dtype: torch.dtype
) -> Sequences:
    """Sequences of these lengths, all open, with queries at these positions.

    The first page's raw slot is shared by all sequences. Elsewhere, tokens past the end hold NaN.
    """
    gen = torch.Generator().manual_seed(dim + group)
    counts = [-(-n // PAGE_TOKENS) for n in lengths]
    slots_per = [[0, *range(1 + 10 * b, 10 * b + n)] if n else [] for b, n in enumerate(counts)]
    k_raw = torch.randn(10 * len(lengths), PAGE_TOKENS, KV_HEADS, dim, generator=gen).to(dtype)
    expected = torch.zeros(len(k_raw), KV_HEADS, PAGE_TOKENS, dtype=torch.float64)
    q_all, lse_all = [], []
    for length, slots, positions in zip(lengths, slots_per, queries, strict=True):
        if length % PAGE_TOKENS and len(slots) > 1:
            k_raw[slots[-1], length % PAGE_TOKENS :] = math.nan
        q = torch.randn(len(positions), KV_HEADS * group, dim, generator=gen).to(dtype)
        keys = k_raw[slots].flatten(0, 1).double().nan_to_num().repeat_interleave(group, 1)
        scores = torch.einsum("shd,thd->sht", q.double(), keys) * dim**-0.5
        token, at = torch.arange(len(keys)), torch.tensor(positions)[:, None, None]
        lse = scores.masked_fill(token > at, -math.inf).logsumexp(-1, keepdim=True)
        received = torch.where(token < at, torch.exp(scores - lse), 0).sum(0)
        received = received.view(KV_HEADS, group, -1).amax(1)
        expected.index_add_(
            0,
            torch.tensor(slots, dtype=torch.int64),
            received.view(KV_HEADS, -1, PAGE_TOKENS).transpose(0, 1),
        )
        q_all.append(q)
        lse_all.append(lse.squeeze(-1).float() * math.log2(math.e))

    def offsets(parts: list[list[int]]) -> torch.Tensor:
        return torch.tensor([0, *map(len, parts)]).cumsum(0).to(torch.int32)

    def flat(parts: list[list[int]]) -> torch.Tensor:
        return torch.tensor([x for part in parts for x in part], dtype=torch.int32)

    page_position = flat([list(range(n)) for n in counts])
    asking = ScoringQueries(torch.cat(q_all), torch.cat(lse_all), offsets(queries), flat(queries))
    values = torch.full_like(k_raw, math.nan)
    opened = OpenPages(k_raw, values, offsets(slots_per), flat(slots_per), page_position)
    return Sequences(asking, opened, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (5, 80), (3, 48)])
def test_scores(name: str, dtype: torch.dtype, group: int, dim: int) -> None:
    check_scores(name, mixed_sequences(group, dim, dtype), dim)


@pytest.mark.parametrize(("group", "dim"), [(7, 96), (8, 256)])
def test_scores_of_other_dimensions(name: str, group: int, dim: int) -> None:
    """Queries that come in several blocks, and sequences without pages between others."""
    queries = [[], list(range(1, 90, 2)), [], [69]]
    sequences = random_sequences([0, 90, 0, 70], queries, group, dim, torch.bfloat16)
    check_scores(name, sequences, dim)


def check_scores(name: str, sequences: Sequences, dim: int) -> None:
    device = DEVICE if name == "triton" else torch.device("cpu")
    before = torch.rand(sequences.expected.shape, generator=torch.Generator().manual_seed(0))
    accum = before.to(device, copy=True)
    run = {"naive": naive.score_open, "triton": triton.score_open}.get(name, score.score_open)
    run(*sequences.on(device), accum, Softmax(dim**-0.5))
    accum = accum.cpu()
    assert error_norm(accum - before, sequences.expected) <= TOLERANCE.get(name, 1e-5)
    unseen = sequences.expected == 0
    assert torch.equal(accum[unseen], before[unseen])


@pytest.mark.parametrize(
    ("group", "dim", "dtype"),
    [(1, 64, torch.float32), (4, 128, torch.bfloat16), (5, 80, torch.float16)],
)
def test_decode_scores(
    group: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open pages anywhere among sealed ones, one of them shared; nothing else is read."""
    monkeypatch.setattr(triton, "DECODE_PAGES", 4)
    gen = torch.Generator().manual_seed(dim)
    lens = torch.tensor([1, 64 * 6 + 17, 65, 64 * 2])
    open_at = [[0], [0, 2, 5, 6], [1], [0, 1]]
    k_raw = torch.full((12, PAGE_TOKENS, KV_HEADS, dim), math.nan).to(dtype)
    raw_slot = torch.full((40,), -1, dtype=torch.int32)
    table = torch.full((4, 7), 10**9, dtype=torch.int32)
    pages = iter((torch.randperm(39, generator=gen) + 1).int())
    slots = iter(torch.randperm(12, generator=gen).int())
    for b, length in enumerate(lens.tolist()):
        for index in range(-(-length // PAGE_TOKENS)):
            table[b, index] = page = next(pages)
            if index in open_at[b]:
                raw_slot[page] = slot = next(slots)
                written = min(PAGE_TOKENS, length - index * PAGE_TOKENS)
                fill = torch.randn(written, KV_HEADS, dim, generator=gen)
                k_raw[slot, :written] = fill.to(dtype)
    table[3, 0] = table[1, 0]
    q = torch.randn(4, KV_HEADS * group, dim, generator=gen).to(dtype)
    lse = 8 + torch.rand(4, KV_HEADS * group, generator=gen)
    before = torch.rand(12, KV_HEADS, PAGE_TOKENS, generator=gen)
    counts, rows = -(-lens // PAGE_TOKENS), torch.zeros(4, dtype=torch.int64)
    step = StepPages(table, lens.int(), counts.int(), (lens.int() - 1) % PAGE_TOKENS + 1, rows)
    expected = before.double()
    naive.score_decode(q, lse, step, RawTables(k_raw, raw_slot, expected), Softmax(dim**-0.5))
    accum = before.to(DEVICE, copy=True)
    step = StepPages(*(x.to(DEVICE) for x in step))
    raw = RawTables(k_raw.to(DEVICE), raw_slot.to(DEVICE), accum)
    triton.score_decode(q.to(DEVICE), lse.to(DEVICE), step, raw, Softmax(dim**-0.5))
    assert error_norm(accum.cpu() - before, expected - before.double()) <= 1e-3
    unseen = expected == before
    assert unseen.any() and torch.equal(accum.cpu()[unseen], before[unseen])


def test_deterministic_with_shared_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sequences add to one slot: the same sum, bit for bit, every time."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    queries = [[40 + b, 63] for b in range(12)]
    sequences = random_sequences([64] * 12, queries, 2, 64, torch.float32)
    results = []
    for _ in range(5):
        accum = torch.zeros(sequences.expected.shape)
        score.score_open(*sequences[:2], accum, Softmax(0.125))
        results.append(accum)
    assert error_norm(results[0], sequences.expected) <= 1e-5
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_mismatches_are_refused() -> None:
    queries, opened, _ = random_sequences([3], [[2]], 1, 64, torch.float32)
    with pytest.raises(ValueError, match="accum"):
        score.score_open(queries, opened, torch.zeros(3, KV_HEADS, PAGE_TOKENS), 1.0)
    few = queries._replace(q=queries.q[:, :1])
    with pytest.raises(ValueError, match="against"):
        score.score_open(few, opened, torch.zeros(10, KV_HEADS, PAGE_TOKENS), 1.0)

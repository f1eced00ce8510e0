# SPDX-License-Identifier: Apache-2.0
"""Checks of score: what tokens of open pages receive, from sampled queries or in a decode step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu.device import kernels, to
from bench.gpu.verify.check import TOLERANCE, Check, Found, is_timed, relative_error
from bench.gpu.verify.extend import describe, indptr
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import RawTables, ScoringQueries, naive
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages

CPU = torch.device("cpu")


def ints(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Case(NamedTuple):
    """Sequences as (positions of the sampled queries, positions of the listed pages)."""

    dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    cap: float = 0.0

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.dim**-0.5, self.cap)


SMALL = (
    Case(128, 2, 3, torch.bfloat16, (((70, 71, 130), (0, 1)), ((), (0,)), ((5,), (0,)))),
    Case(80, 1, 4, torch.float16, ((tuple(range(3, 200, 17)), (0, 2)),)),
    Case(64, 1, 2, torch.bfloat16, (((63, 100), (0, 1)),), cap=2.0),
)
LARGE = (
    Case(128, 4, 4, torch.bfloat16, ((tuple(range(450, 514)), tuple(range(8))), ((9,), (0,)))),
    Case(256, 1, 2, torch.bfloat16, ((tuple(range(60, 130, 2)), (0, 1, 2)),)),
)


def check(case: Case, device: torch.device) -> Found:
    """The accumulators are not empty before; keys that no sampled query may see are NaN."""
    samples, listed = zip(*case.sequences, strict=True)
    pages = [page for mine in listed for page in mine]
    q_position = [position for mine in samples for position in mine]
    k_raw = torch.randn(
        2 * len(pages), PAGE_TOKENS, case.kv_heads, case.dim, device=device
    ).to(case.dtype)  # fmt: skip
    slots = torch.randperm(len(k_raw), device=device)[: len(pages)].int()
    lasts = [max(mine, default=-1) for mine, own in case.sequences for _ in own]
    for slot, page, last in zip(slots.tolist(), pages, lasts, strict=True):
        k_raw[slot, max(0, last + 1 - page * PAGE_TOKENS) :] = torch.nan
    heads = case.kv_heads * case.group
    accum = torch.rand(len(k_raw), case.kv_heads, PAGE_TOKENS, device=device)
    q = torch.randn(len(q_position), heads, case.dim, device=device).to(case.dtype)
    asking = indptr(tuple(len(x) for x in samples), device), ints(q_position, device)
    lists = indptr(tuple(len(x) for x in listed), device), slots, ints(pages, device)
    lse = 5 + torch.rand(len(q_position), heads, device=device)
    queries, opened = ScoringQueries(q, lse, *asking), OpenPages(k_raw, k_raw, *lists)
    before = accum.cpu().clone()
    expected = before.double()
    kernels("score").score_open(queries, opened, accum, case.softmax)
    cpu = ScoringQueries(*to(CPU, *queries)), OpenPages(*to(CPU, *opened))
    naive.score_open(*cpu, expected, case.softmax)
    return Found(relative_error(accum.cpu() - before, expected - before))


class Decode(NamedTuple):
    """New tokens' queries, as many of each sequence, over pages of which every third is sealed."""

    dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    queries: int = 1
    cap: float = 0.0


DECODE_SMALL = (
    Decode(128, 2, 3, torch.bfloat16, (200, 1, 65, 64)),
    Decode(80, 1, 4, torch.float16, (130, 129)),
    Decode(64, 2, 3, torch.bfloat16, (200, 68, 67, 4), queries=4, cap=3.0),
)
DECODE_LARGE = (
    Decode(128, 8, 4, torch.bfloat16, (4100, 513, 64, 2113)),
    Decode(256, 2, 1, torch.bfloat16, (700, 2)),
)


def check_decode(case: Decode, device: torch.device) -> Found:
    """Against one query of `score_open`'s reference: that of the first new token."""
    batch, dim = len(case.lengths), case.dim
    counts = [-(-length // PAGE_TOKENS) for length in case.lengths]
    pages = torch.randperm(sum(counts), device=device).int()
    table = torch.full((batch, max(counts) + 3), -1, dtype=torch.int32, device=device)
    is_open = torch.arange(len(pages), device=device) % 3 != 1
    raw_slot = torch.full_like(pages, -1)
    opened = int(is_open.sum())
    raw_slot[is_open] = torch.randperm(opened, device=device).int()
    shape = (opened, PAGE_TOKENS, case.kv_heads, dim)
    k_raw = torch.randn(shape, device=device).to(case.dtype)
    slots, positions = [], []
    for b, (count, mine) in enumerate(zip(counts, pages.split(counts), strict=True)):
        table[b, :count] = mine
        listed = raw_slot[mine.long()]
        last = int(listed[-1])
        if last >= 0:
            k_raw[last, (case.lengths[b] - 1) % PAGE_TOKENS + 1 :] = torch.nan
        positions.append((listed >= 0).nonzero()[:, 0].int())
        slots.append(listed[listed >= 0])
    heads = case.kv_heads * case.group
    q = torch.randn(batch * case.queries, heads, dim, device=device).to(case.dtype)
    lse = 5 + torch.rand(len(q), heads, device=device)
    accum = torch.rand(opened, case.kv_heads, PAGE_TOKENS, device=device)
    before = accum.cpu().clone()
    lengths = ints(case.lengths, device)
    first = lengths.cpu() - case.queries
    nowhere = torch.zeros(len(q), dtype=torch.int64, device=device)
    step = StepPages(table, lengths, ints(counts, device), (lengths - 1) % PAGE_TOKENS + 1, nowhere)
    raw = RawTables(k_raw, raw_slot, accum)
    softmax = Softmax(dim**-0.5, case.cap)
    kernels("score").score_decode(q, lse, step, raw, softmax)
    expected = before.double()
    of_uniform = lse.cpu()[:: case.queries] - (first + 1).log2()[:, None]
    queries = ScoringQueries(q.cpu()[:: case.queries], of_uniform, torch.arange(batch + 1), first)
    lists = indptr(tuple(len(x) for x in slots), device), torch.cat(slots), torch.cat(positions)
    opened = OpenPages(*to(CPU, k_raw, k_raw, *lists))
    naive.score_open(queries, opened, expected, softmax)
    return Found(relative_error(accum.cpu() - before, expected - before))


def checks(large: bool) -> Iterator[Check]:
    for case in (*SMALL, *LARGE) if large else SMALL:
        dtype = str(case.dtype).removeprefix("torch.")
        name = f"score_open D={case.dim} G={case.group} {dtype}, {len(case.sequences)} sequences"
        name += describe(case.softmax)
        timed = is_timed(case.dim, case.dtype)
        yield Check(name, "score_open", TOLERANCE, partial(check, case), timed)
    for decode in (*DECODE_SMALL, *DECODE_LARGE) if large else DECODE_SMALL:
        dtype = str(decode.dtype).removeprefix("torch.")
        name = f"score_decode D={decode.dim} G={decode.group} {dtype}, lengths {decode.lengths}"
        name += f", N={decode.queries}, cap {decode.cap:g}" if decode.queries > 1 else ""
        timed = is_timed(decode.dim, decode.dtype)
        yield Check(name, "score_decode", TOLERANCE, partial(check_decode, decode), timed)

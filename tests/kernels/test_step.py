# SPDX-License-Identifier: Apache-2.0
"""The pages of a decode step: looked up and recorded by one kernel, as the reference does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests, cpu, naive, triton
from tests.support.attention import moved
from tests.support.device import DEVICE

PAGES = 120
POISON = -77


def make_metadata(gen: torch.Generator, scores: bool) -> PageMetadata:
    """A directory in which every third page is open, and all else poisoned."""
    raw_slot = torch.full((PAGES + 1,), -1, dtype=torch.int32)
    opened = torch.randperm(PAGES, generator=gen)[: PAGES // 3] + 1
    raw_slot[opened] = torch.arange(1, len(opened) + 1, dtype=torch.int32)
    ints = [torch.full_like(raw_slot, POISON) for _ in range(3)]
    longs = [torch.full((PAGES + 1,), POISON) for _ in range(2)]
    counts = torch.rand(PAGES // 3 + 1, PAGE_TOKENS, generator=gen) if scores else None
    unread = torch.tensor([5], dtype=torch.int32)
    return PageMetadata(raw_slot, raw_slot < 0, *ints, *longs, counts, unread)


def copied(metadata: PageMetadata, device: torch.device) -> PageMetadata:
    return PageMetadata(*(None if t is None else t.clone().to(device) for t in metadata))


class Run(NamedTuple):
    """A kernel's answer; what it recorded."""

    pages: StepPages
    metadata: PageMetadata


def on_gpu(requests: StepRequests, metadata: PageMetadata, clock: torch.Tensor, window: int) -> Run:
    metadata = copied(metadata, DEVICE)
    requests, clock = moved((requests, clock), DEVICE)
    return Run(triton.begin_decode(requests, metadata, clock, window), metadata)


def on_cpu(requests: StepRequests, metadata: PageMetadata, clock: torch.Tensor, window: int) -> Run:
    metadata = copied(metadata, torch.device("cpu"))
    table, rows, lengths, num_real, queries = requests
    kernel = cpu.StepKernel(table, metadata, window)
    pages = kernel.begin(rows, lengths, int(num_real), *clock.tolist(), queries)
    return Run(pages, metadata)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("window", [0, 64, 200])
@pytest.mark.parametrize("run", [on_gpu, on_cpu])
def test_begin_decode(run: Callable[..., Run], window: int, scores: bool) -> None:
    gen = torch.Generator().manual_seed(window)
    lengths = [1, 64, 65, 130, 2240, 999, 5, 5]  # two of padding
    width = 2500
    req_to_token = torch.full((11, width), 10**9, dtype=torch.int32)
    rows = torch.randperm(11, generator=gen)[: len(lengths)]
    for row, length in zip(rows.tolist(), lengths, strict=True):
        pages = torch.randperm(PAGES, generator=gen)[: -(-length // PAGE_TOKENS)] + 1
        token = pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        req_to_token[row, :length] = token.flatten()[:length].int()
    metadata = make_metadata(gen, scores)
    # Pages that two sequences share are recorded by both; either's may stay.
    num_real = torch.tensor([6], dtype=torch.int32)
    requests = StepRequests(req_to_token, rows, torch.tensor(lengths), num_real)
    clock = torch.tensor([1 << 33, 77])
    recorded = copied(metadata, torch.device("cpu"))
    expected = naive.begin_decode(requests, recorded, clock, window)
    actual, actual_metadata = run(requests, metadata, clock, window)
    for name in ("lengths", "count", "last_len", "rows"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    assert actual.count[6:].tolist() == [0, 0]
    used = torch.arange(expected.table.shape[1]) < expected.count[:, None]
    assert torch.equal(actual.table.cpu()[used], expected.table[used])
    shared = torch.bincount(expected.table[used].long(), minlength=PAGES + 1) > 1
    for name, table in actual_metadata._asdict().items():
        if table is None:
            continue
        want = getattr(recorded, name)
        if name == "unread":
            assert table.tolist() == want.tolist() == [5]
            continue
        if name == "counts":
            assert torch.allclose(table.cpu(), want)
            continue
        ours = table.cpu()
        alone = (
            ~shared | (want == POISON) if name not in ("last_used",) else torch.ones_like(shared)
        )
        assert torch.equal(ours[alone], want[alone]), name
    assert (recorded.last_used == 1 << 33).any()


@pytest.mark.parametrize("begin_decode", [naive.begin_decode, triton.begin_decode])
def test_pages_that_cannot_be_read_are_counted(begin_decode: Callable[..., StepPages]) -> None:
    """In several blocks of two sequences, and nothing behind their ends."""
    gen = torch.Generator().manual_seed(2)
    metadata = make_metadata(gen, scores=False)
    metadata.sealed.copy_((metadata.raw_slot < 0) & (torch.rand(PAGES + 1, generator=gen) < 0.6))
    lengths = [PAGE_TOKENS * 70 + 1, PAGE_TOKENS * 3, PAGE_TOKENS * 9]  # the last is padding
    table = (torch.arange(PAGES) + 1).mul(PAGE_TOKENS).repeat_interleave(PAGE_TOKENS).int()
    expected = 5
    for length in lengths[:2]:
        pages = table[:length:PAGE_TOKENS].long() // PAGE_TOKENS
        expected += int(((metadata.raw_slot[pages] < 0) & ~metadata.sealed[pages]).sum())
    assert expected > 20
    arguments = StepRequests(
        table[None], torch.zeros(3, dtype=torch.int64), torch.tensor(lengths),
        torch.tensor([2], dtype=torch.int32),
    ), metadata, torch.tensor([1, 1])  # fmt: skip
    device = DEVICE if begin_decode is triton.begin_decode else "cpu"
    requests, metadata, clock = moved(arguments, device)
    begin_decode(requests, metadata, clock, 64)
    assert metadata.unread.tolist() == [expected]


def test_free_pages_are_noticed() -> None:
    metadata = make_metadata(torch.Generator().manual_seed(1), scores=True)
    table = torch.arange(PAGES * PAGE_TOKENS, dtype=torch.int32)[None]
    closed = int((metadata.raw_slot[1:] < 0).nonzero()[0]) + 1
    metadata.sealed[closed] = False
    begin = cpu.StepKernel(table, metadata, 64).begin
    row, step = torch.tensor([0]), (1, 1, 1)
    begin(row, torch.tensor([closed * PAGE_TOKENS]), *step)
    with pytest.raises(ValueError, match="free page"):
        begin(row, torch.tensor([closed * PAGE_TOKENS + 1]), *step)

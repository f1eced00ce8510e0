# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a CPU with several new tokens of each sequence."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepRequests, cpu, naive

PAGES = 60


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("queries", [1, 2, 7, 16])
def test_step_records_what_is_known_to_be_accepted(queries: int, window: int) -> None:
    gen = torch.Generator().manual_seed(queries)
    lengths = torch.tensor([16, 64, 64 + queries - 1, 64 + queries, 1000, 129, 40])
    num_real = torch.tensor([len(lengths) - 1], dtype=torch.int32)
    pages = torch.randperm(PAGES, generator=gen) + 1
    req_to_token = torch.full((9, 1088), 10**9, dtype=torch.int32)
    rows = torch.randperm(9, generator=gen)[: len(lengths)]
    raw_slot = torch.full((PAGES + 1,), -1, dtype=torch.int32)
    first = 0
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        mine = pages[first : first + -(-length // PAGE_TOKENS)]
        first += len(mine)
        tokens = mine[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        req_to_token[row, :length] = tokens.flatten()[:length].int()
        last = mine[-3:] if len(mine) > 3 else mine
        raw_slot[last] = last.int() + 5
    ints = [torch.full_like(raw_slot, -77) for _ in range(3)]
    longs = [torch.full((PAGES + 1,), -77) for _ in range(2)]
    counts = torch.rand(PAGES + 6, PAGE_TOKENS, generator=gen)
    metadata = PageMetadata(raw_slot, *ints, *longs, counts)
    recorded = PageMetadata(*(x.clone() for x in metadata))
    requests = StepRequests(req_to_token, rows, lengths, num_real, queries)
    clock = torch.tensor([1 << 33, 77])
    expected = naive.begin_decode(requests, recorded, clock, window)
    actual = cpu.begin_decode(requests, metadata, clock, window)
    used = torch.arange(expected.table.shape[1]) < expected.count[:, None]
    assert torch.equal(actual.table[used], expected.table[used])
    for name in ("lengths", "count", "last_len", "rows"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert len(actual.rows) == len(lengths) * queries
    for name, table in metadata._asdict().items():
        assert torch.equal(table, getattr(recorded, name)), name
    # Page 1 of sequence 2 holds drafts alone, but for N = 1, whose sequence ends with page 0.
    if queries > 1:
        drafts = int(actual.table[2, 1])
        assert recorded.filled[drafts] == 0 and recorded.context[drafts] == 64
        assert torch.equal(metadata.counts[raw_slot[drafts]], counts[raw_slot[drafts]])

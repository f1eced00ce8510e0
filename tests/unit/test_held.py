# SPDX-License-Identifier: Apache-2.0
"""What running requests hold, against the directory page by page, and what costs nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.requests import running_requests
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.held import held
from sglang_diffxkv.pool.running import RunningRequest, RunningRequests
from sglang_diffxkv.pool.sealing import seal
from tests.support.pages import write
from tests.support.stores import make_allocator, make_store

LENGTHS = {5: 3 * PAGE_TOKENS + 1, 0: PAGE_TOKENS, 3: 0, 7: 2 * PAGE_TOKENS}
SHARED = 2
"""Pages of request 5 that request 7 holds, too."""


@pytest.fixture
def pool() -> tuple[DiffXKVAllocator, torch.Tensor]:
    """Four requests, one that has not run yet, and their table; some full pages are sealed."""
    allocator = make_allocator()
    store, running = allocator.store, allocator.running
    table = torch.full((8, 8 * PAGE_TOKENS), -12345, dtype=torch.int32)
    pages = torch.tensor([3, 9, 4, 8, 6])
    store.open(pages)
    _place(table, 5, pages[:4])
    _place(table, 0, pages[4:])
    _place(table, 7, pages[:SHARED])
    for index, length in LENGTHS.items():
        request = SimpleNamespace(rid=f"request {index}", cached_tokens=64 * (index == 7))
        running.enter([index], [RunningRequest(Quality.HIGH, 1, request)])
        if length:
            running.commit([index], torch.tensor([0]), torch.tensor([length]))
    sealed = pages[[0, 1, 4]]
    write(store, sealed, torch.tensor([0, 1, 0]), torch.tensor([193, 193, 64]))
    seal(store, sealed)
    return allocator, table


def _place(table: torch.Tensor, index: int, pages: torch.Tensor) -> None:
    slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
    table[index, : len(slots)] = slots


def test_it_is_what_the_directory_says(pool: tuple[DiffXKVAllocator, torch.Tensor]) -> None:
    allocator, table = pool
    store = allocator.store
    found = held(store, allocator.running, table)
    assert found.keys() == LENGTHS.keys()
    for index, length in LENGTHS.items():
        pages = table[index, :length:PAGE_TOKENS].long() // PAGE_TOKENS
        is_sealed = store.directory.sealed[pages]
        frames = int(store.directory.owned(pages[is_sealed]).sum())
        opened, sealed = int((~is_sealed).sum()), int(is_sealed.sum())
        nbytes = frames * store.layout.frame_bytes + opened * store.raw.page_bytes
        assert found[index] == (length, opened, sealed, nbytes)
    assert [found[5].open_pages, found[5].sealed_pages] == [2, 2]
    assert [found[7].open_pages, found[7].sealed_pages] == [0, 2]
    assert found[3] == (0, 0, 0, 0)


def test_what_the_endpoint_says(pool: tuple[DiffXKVAllocator, torch.Tensor]) -> None:
    found = running_requests(*pool)
    assert [set(request) for request in found] == [
        {"rid", "quality", "cached_tokens", "tokens", "open_pages", "sealed_pages", "bytes"}
    ] * len(LENGTHS)
    assert {request["rid"] for request in found} == {f"request {index}" for index in LENGTHS}
    last: dict[str, Any] = found[-1]
    assert (last["quality"], last["cached_tokens"], last["sealed_pages"]) == ("high", 64, 2)


def test_nobody_runs() -> None:
    assert held(make_store("diffkv"), RunningRequests(), torch.zeros(4, 64).int()) == {}

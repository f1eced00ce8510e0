# SPDX-License-Identifier: Apache-2.0
"""A copy that fails ends the scheduler, as any kernel's failure does: what it leaves on disk is
right, however far it had come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.kernels.arena import copy_frames
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.offload import load_back, offload
from sglang_diffxkv.pool.payload import PagePayload
from tests.support.disk_scheduling import DiskScheduling
from tests.support.published import published

PROMPTS, PAGES = 5, 6
COPIES = 5
"""Of a prompt: out, from both memories to be written, and back layer by layer."""


class CopyError(RuntimeError):
    """Of this test alone."""


@pytest.fixture(scope="module", autouse=True)
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with published(tmp_path_factory.mktemp("model")):
        yield


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(PAGES * PAGE_TOKENS + 5)]


def work(server: DiskScheduling) -> None:
    """Each prompt's pages go to the host, from there to disk, and half of them come back."""
    for seed in range(PROMPTS):
        server.serve(prompt(seed))
        pages = server.store.directory.sealed.nonzero().flatten()
        offload(server.store, pages)
        load_back(server.store, pages[::2])
    server.write_all()


def fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of that number leaves half of its bytes wrong, and fails."""
    left = iter(range(call - 1, -1, -1))

    def copy(
        source: torch.Tensor, old: torch.Tensor, target: torch.Tensor, new: torch.Tensor
    ) -> None:
        copy_frames(source, old, target, new)
        if next(left) == 0:
            target[new[new >= 0].long(), ::2] = 0xAB
            raise CopyError

    for module in ("offload", "payload"):
        monkeypatch.setattr(f"sglang_diffxkv.pool.{module}.copy_frames", copy)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[PagePayload]]:
    server = DiskScheduling(tmp_path_factory.mktemp("disk"))
    work(server)
    found = [server.payload(prompt(seed)) for seed in range(PROMPTS)]
    server.level.close()
    return found


@pytest.mark.parametrize("call", range(1, 24, 2))
def test_what_is_left_on_disk_is_right(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: list[list[PagePayload]],
    call: int,
) -> None:
    first = DiskScheduling(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(CopyError):
        fail_at(call, patched)
        work(first)
    first.level.close()
    second = DiskScheduling(tmp_path)
    found = [second.serve(prompt(seed)) // PAGE_TOKENS for seed in range(PROMPTS)]
    assert sum(found) == second.level.stats["read"] and second.allocator.check() == []
    for seed, pages in enumerate(expected):
        read = second.payload(prompt(seed))[: found[seed]]
        for was, now in zip(pages, read, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))
    assert sum(found) >= PAGES * ((call - 1) // COPIES)
    second.level.close()

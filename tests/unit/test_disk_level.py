# SPDX-License-Identifier: Apache-2.0
"""From the tree to the disk and back, with SGLang's own requests, tree and admission."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from tests.support.disk_scheduling import DiskScheduling
from tests.support.published import published


@pytest.fixture(scope="module", autouse=True)
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with published(tmp_path_factory.mktemp("model")):
        yield


PROMPT = 6 * PAGE_TOKENS + 5


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def healthy(server: DiskScheduling) -> bool:
    return server.allocator.check() == []


@pytest.mark.parametrize("policy", ["diffkv", "lossless"])
def test_a_server_finds_what_another_has_written(tmp_path: Path, policy: str) -> None:
    first = DiskScheduling(tmp_path, policy)
    prompts = [prompt(seed) for seed in range(3)]
    assert [first.serve(tokens) for tokens in prompts] == [0, 0, 0]
    first.write_all()
    written = [first.payload(tokens) for tokens in prompts]
    assert first.level.stats["written"] == 18
    first.level.close()

    second = DiskScheduling(tmp_path, policy)
    assert [second.serve(tokens) for tokens in prompts] == [6 * PAGE_TOKENS] * 3
    for tokens, before in zip(prompts, written, strict=True):
        for was, now in zip(before, second.payload(tokens), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))
    stats = second.level.stats
    assert (stats["read"], stats["hits"], stats["misses"]) == (18, 18, 0)
    assert healthy(second)
    second.write_all()
    assert second.level.stats["written"] == 0

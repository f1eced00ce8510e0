# SPDX-License-Identifier: Apache-2.0
"""From the tree to the disk and back, with SGLang's own requests, tree and admission."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.events import NoEvents
from sglang_diffxkv.pool.offload import offload
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


class Told(NoEvents):
    """What becomes of pages, in the order in which it is told."""

    def __init__(self) -> None:
        self.of: dict[bytes, list[str]] = {}

    def backing_up(self, keys: Sequence[bytes]) -> None:
        self._note(keys, "backing up")

    def backed_up(self, keys: Sequence[bytes]) -> None:
        self._note(keys, "backed up")

    def dropped_from_disk(self, keys: Sequence[bytes]) -> None:
        self._note(keys, "dropped")

    def _note(self, keys: Sequence[bytes], what: str) -> None:
        for key in keys:
            self.of.setdefault(key, []).append(what)


def test_who_listens_is_told_of_every_page(tmp_path: Path) -> None:
    told = Told()
    first = DiskScheduling(tmp_path, events=told)
    first.serve(prompt(0))
    first.write_all()
    assert list(told.of.values()) == [["backing up", "backed up"]] * 6
    written = set(told.of)
    first.level.close()
    told = Told()
    second = DiskScheduling(tmp_path, events=told)
    second.serve(prompt(0))
    assert told.of == {key: ["backed up"] for key in written}
    second.level.close()


def test_what_was_not_written_is_dropped(tmp_path: Path) -> None:
    told = Told()
    server = DiskScheduling(tmp_path, events=told, disk_bytes=1 << 12)  # not even one
    server.serve(prompt(0))
    server.write_all()
    assert told.of and all(x[0] == "backing up" and x[1] == "dropped" for x in told.of.values())
    server.level.close()


def test_who_is_aborted_is_not_read_for(tmp_path: Path) -> None:
    first = DiskScheduling(tmp_path)
    first.serve(prompt(0))
    first.write_all()
    first.level.close()
    second = DiskScheduling(tmp_path)
    request = second.come(prompt(0))
    second.tree.release_aborted_request(request.cache_request_handle)
    assert not second.level.prefetcher.in_flight
    assert second.gate(request), "nobody is waited for"
    assert second.store.ledger.host_pages == 0 and healthy(second)


def test_what_the_tree_has_lost_meanwhile_is_computed(tmp_path: Path) -> None:
    """The first pages are cached when a request comes, and gone when the others have been read."""
    text = prompt(0)
    first = DiskScheduling(tmp_path)
    first.serve(text)
    first.write_all()
    first.level.close()
    second = DiskScheduling(tmp_path)
    assert second.serve(text[: 2 * PAGE_TOKENS + 1]) == 2 * PAGE_TOKENS
    request = second.come(text)
    second.allocator.reclaimer.evict_until(second.tree, lambda: False)
    while not second.gate(request):
        second.level.prefetcher.wait(1)
    request.init_next_round_input(second.tree)
    assert request.prefix_len == 0 and healthy(second)


def test_no_disk_after_its_weights_changed(tmp_path: Path) -> None:
    server = DiskScheduling(tmp_path)
    server.serve(prompt(0))
    server.write_all()
    assert server.level.stats["pages"] == 6
    server.level.switch_off("a test")
    server.serve(prompt(1))
    offload(server.store, server.store.directory.sealed.nonzero().flatten())
    server.level.wait_for_writes(10)
    assert not server.level.is_on and server.level.stats["pages"] == 0
    server.level.close()
    assert DiskScheduling(tmp_path).serve(prompt(0)) == 0

# SPDX-License-Identifier: Apache-2.0
"""What is read ahead for requests that wait: what is worth it, until when, on all ranks alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_diffxkv.offload.disk.reader import Records
from sglang_diffxkv.offload.disk.store import DiskStore
from sglang_diffxkv.offload.prefetch import LEAST_SECONDS, Prefetcher, Prompt
from sglang_diffxkv.pool.ranks import Agree, alone
from tests.support.disk import key_of

PAYLOAD = 5000
KEYS = [key_of(number) for number in range(8)]
PROMPT: Any = Prompt([], None, None)  # type: ignore[arg-type]
FAST, SLOW = (10**6, 1.0), (10, 1.0)
"""Tokens of prompts that were computed, and seconds."""


class HeldReader:
    """Reads when it is told to."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self.asked: list[tuple[Sequence[bytes], Future[Records]]] = []

    def read(self, keys: Sequence[bytes]) -> Future[Records]:
        self.asked.append((keys, Future()))
        return self.asked[-1][1]

    def go_on(self) -> None:
        for keys, future in self.asked:
            if future.set_running_or_notify_cancel():
                future.set_result([self._store.get(key) for key in keys])
        self.asked.clear()


class Setup:
    """A disk with the first ``pages`` of a prompt, and who reads ahead from it."""

    def __init__(
        self, folder: Path, pages: Sequence[int], agree: Agree = alone, most_bytes: int = 1 << 20
    ) -> None:
        self.disk = DiskStore(folder, 1 << 24, "test")
        for page in pages:
            self.disk.put(KEYS[page], b"", bytes(PAYLOAD))
        self.reader: Any = HeldReader(self.disk)
        self.ahead = Prefetcher(self.disk, self.reader, self._decode, agree, most_bytes)

    def _decode(self, records: Records) -> list[Any]:
        return [record.key for record in records if record is not None]

    def read(self, request: str = "one") -> list[bytes] | None:
        """Pages of the prompt that a request gets at once; None: nothing is read."""
        self.ahead.begin(request, PROMPT, 0, KEYS)
        self.reader.go_on()
        self.ahead.poll()
        arrived = self.ahead.take(request)
        return None if arrived is None else arrived.keys


def test_what_follows_each_other_is_read(tmp_path: Path) -> None:
    """Nothing behind a page that is not there."""
    setup = Setup(tmp_path, [0, 1, 3])
    assert setup.read() == KEYS[:2]
    assert (setup.ahead.hits, setup.ahead.misses) == (2, 6)
    assert not setup.ahead.in_flight and setup.ahead.take("one") is None


def test_a_request_waits_for_what_is_read(tmp_path: Path) -> None:
    setup = Setup(tmp_path, range(8))
    setup.ahead.begin("one", PROMPT, 0, KEYS)
    setup.ahead.begin("another", PROMPT, 8, [])
    setup.ahead.poll()
    assert setup.ahead.is_waiting("one") and setup.ahead.in_flight
    assert not setup.ahead.is_waiting("another")
    setup.reader.go_on()
    setup.ahead.poll()
    assert not setup.ahead.is_waiting("one")
    arrived = setup.ahead.take("one")
    assert arrived is not None and arrived.payload == KEYS and arrived.first == 0


@pytest.mark.parametrize(("prefill", "is_read"), [(SLOW, True), (FAST, False)])
def test_what_is_quicker_is_done(tmp_path: Path, prefill: tuple[int, float], is_read: bool) -> None:
    """A disk that took a tenth of a second for eight pages, and prompts that take more, or less."""
    setup = Setup(tmp_path, range(8))
    setup.ahead.begin("one", PROMPT, 0, KEYS)
    time.sleep(0.1)
    setup.reader.go_on()
    setup.ahead.poll()
    assert setup.ahead.take("one") is not None, "nothing was measured yet"
    setup.ahead.poll()
    setup.ahead.note_prefill(*prefill)
    assert (setup.read("two") is not None) == is_read


def test_who_is_late_is_not_waited_for(tmp_path: Path) -> None:
    """A read that takes longer than computing is given up, and the next one is not begun."""
    setup = Setup(tmp_path, range(8))
    setup.ahead.note_prefill(*FAST)
    setup.ahead.begin("one", PROMPT, 0, KEYS)
    ((_, future),) = setup.reader.asked
    setup.ahead.poll()
    assert setup.ahead.is_waiting("one")
    time.sleep(1.5 * LEAST_SECONDS)
    setup.ahead.poll()
    assert not setup.ahead.is_waiting("one") and setup.ahead.take("one") is None
    assert future.cancelled() and setup.ahead.hits == 0
    assert setup.read("two") is None


def test_who_goes_is_not_read_for(tmp_path: Path) -> None:
    setup = Setup(tmp_path, range(8), most_bytes=8 * PAYLOAD + PAYLOAD // 2)
    setup.ahead.begin("one", PROMPT, 0, KEYS)
    ((_, future),) = setup.reader.asked
    setup.ahead.begin("two", PROMPT, 0, KEYS)
    assert not setup.ahead.is_waiting("two"), "there is no room beside it"
    setup.ahead.cancel("one")
    assert future.cancelled() and not setup.ahead.in_flight
    assert setup.read("three") == KEYS


def test_memory_is_bounded(tmp_path: Path) -> None:
    setup = Setup(tmp_path, range(8), most_bytes=3 * PAYLOAD + PAYLOAD // 2)
    assert setup.read() == KEYS[:3]


def test_who_has_least_decides_for_all_ranks(tmp_path: Path) -> None:
    """Another rank has five of the pages on its disk, and gets four of them."""
    others = iter([torch.tensor([-5]), torch.tensor([[-4, 0]])])

    def agree(own: torch.Tensor) -> torch.Tensor:
        return torch.maximum(own, next(others))

    assert Setup(tmp_path, range(8), agree).read() == KEYS[:4]


def test_who_is_late_on_another_rank_is_late_here(tmp_path: Path) -> None:
    others = iter([torch.tensor([-8]), torch.tensor([[1, 1]])])
    setup = Setup(tmp_path, range(8), lambda own: torch.maximum(own, next(others)))
    assert setup.read() is None
    assert not setup.ahead.in_flight

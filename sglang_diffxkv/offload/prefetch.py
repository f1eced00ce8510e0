# SPDX-License-Identifier: Apache-2.0
"""Reading ahead for requests that wait: from the disk into memory, while others run.

All ranks decide alike. Who has the fewest pages of a prompt decides how many are read; who is late
decides that they are computed instead.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.disk.reader import Reader, Records
from sglang_diffxkv.offload.disk.store import DiskStore
from sglang_diffxkv.offload.rates import Rate
from sglang_diffxkv.pool.payload import PagePayload
from sglang_diffxkv.pool.ranks import Agree

LEAST_SECONDS = 0.05
"""How long a read may take in any case: less than anybody waits for."""
UNKNOWN_SECONDS = 1.0
"""What computing a prompt is taken to cost before any was measured."""
_WAITING = 1

Decode = Callable[["Records"], list[PagePayload]]
"""Payload of the first records, as far as they are there and can be used."""


class Prompt(NamedTuple):
    """Tokens of a request, in its radix namespace."""

    tokens: array[int]
    extra_key: str | None
    cache_salt: str | None


class Arrived(NamedTuple):
    """Pages of a prompt, from its page number ``first`` on, on all ranks."""

    prompt: Prompt
    first: int
    keys: list[bytes]
    payload: list[PagePayload]


@dataclass
class _Reading:
    prompt: Prompt
    first: int
    keys: list[bytes]
    future: Future[Records]
    began: float
    deadline: float
    payload: list[PagePayload] | None = None
    agreed: int | None = None
    """Pages that all ranks have; None: that is not decided yet."""


class Prefetcher:
    """Attributes:
    hits, misses: pages that were read for requests, and those that were looked for in vain.
    """

    def __init__(
        self, disk: DiskStore, reader: Reader, decode: Decode, agree: Agree, most_bytes: int
    ) -> None:
        """``most_bytes``: in memory at a time, of what is read and not taken yet."""
        self._disk, self._reader, self._decode, self._agree = disk, reader, decode, agree
        self._most_bytes = most_bytes
        self._reading: dict[Hashable, _Reading] = {}
        self._took: deque[tuple[int, float]] = deque()  # bytes and seconds, from reader threads
        self._disk_rate, self._prefill_rate = Rate(), Rate()
        self._prefilled = 0, 0.0
        self.hits = self.misses = 0

    def begin(self, request: Hashable, prompt: Prompt, first: int, keys: list[bytes]) -> None:
        """Look for pages of a prompt from number ``first`` on, and read those that come next.

        Every rank calls it alike, with the ``keys`` of all that may be read.
        """
        if not keys or request in self._reading:
            return
        found = next((i for i, key in enumerate(keys) if not self._disk.contains(key)), len(keys))
        own = torch.tensor([-self._worth_reading(found)])
        count = -int(self._agree(own))
        self.misses += len(keys) - found
        if not count:
            return
        began, keys = time.monotonic(), keys[:count]
        future = self._reader.read(keys)
        future.add_done_callback(lambda done: self._time(done, began))
        patience = max(LEAST_SECONDS, self._compute_seconds(count))
        reading = _Reading(prompt, first, keys, future, began, began + patience)
        self._reading[request] = reading

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """How many tokens of prompts were computed since the start, and how long that took."""
        before, since = self._prefilled
        if tokens > before:
            self._prefill_rate.add(tokens - before, seconds - since)
        self._prefilled = tokens, seconds

    def poll(self) -> None:
        """See what has arrived, or is given up; every rank calls it in every step."""
        while self._took:
            self._disk_rate.add(*self._took.popleft())
        undecided = [reading for reading in self._reading.values() if reading.agreed is None]
        if not undecided:
            return
        now = time.monotonic()
        own = [(self._progress(reading), now > reading.deadline) for reading in undecided]
        agreed = self._agree(torch.tensor(own, dtype=torch.int64)).tolist()
        for reading, (progress, is_late) in zip(undecided, agreed, strict=True):
            if progress != _WAITING:
                reading.agreed = -progress
                self.hits += reading.agreed
            elif is_late:
                reading.agreed = 0
                self._give_up(reading, now)

    def is_waiting(self, request: Hashable) -> bool:
        """Whether a request's pages may still come."""
        reading = self._reading.get(request)
        return reading is not None and reading.agreed is None

    def take(self, request: Hashable) -> Arrived | None:
        """What has arrived for a request that does not wait; it is forgotten here."""
        reading = self._reading.pop(request, None)
        if reading is None or not reading.agreed:
            return None
        assert reading.payload is not None
        count = reading.agreed
        return Arrived(reading.prompt, reading.first, reading.keys[:count], reading.payload[:count])

    def cancel(self, request: Hashable) -> None:
        reading = self._reading.pop(request, None)
        if reading is not None:
            reading.future.cancel()

    def cancel_all(self) -> None:
        for request in list(self._reading):
            self.cancel(request)

    @property
    def in_flight(self) -> bool:
        return any(self.is_waiting(request) for request in self._reading)

    def wait(self, seconds: float) -> None:
        """Until something has arrived, or so long."""
        futures = [reading.future for reading in self._reading.values() if reading.agreed is None]
        wait(futures, seconds, FIRST_COMPLETED)

    def _progress(self, reading: _Reading) -> int:
        """Less than 1: as many pages, negative; the largest number of any rank decides."""
        if not reading.future.done():
            return _WAITING
        if reading.payload is None:
            reading.payload = self._decode(reading.future.result())
        return -len(reading.payload)

    def _worth_reading(self, pages: int) -> int:
        """As many of so many pages as there is room for; 0 where computing them is quicker."""
        page_bytes = self._page_bytes
        in_memory = sum(len(reading.keys) for reading in self._reading.values())
        pages = min(pages, max(0, int(self._most_bytes / page_bytes) - in_memory))
        read = self._disk_rate.seconds(pages * page_bytes)
        return pages if read is None or read < self._compute_seconds(pages) else 0

    def _compute_seconds(self, pages: int) -> float:
        seconds = self._prefill_rate.seconds(pages * PAGE_TOKENS)
        return UNKNOWN_SECONDS if seconds is None else seconds

    @property
    def _page_bytes(self) -> float:
        counters = self._disk.counters
        return max(1.0, counters.bytes_in_use / max(1, counters.pages))

    def _give_up(self, reading: _Reading, now: float) -> None:
        """It would have taken twice as long, or longer: nobody waits to know."""
        reading.future.cancel()
        self._disk_rate.add(len(reading.keys) * self._page_bytes, 2 * (now - reading.began))

    def _time(self, done: Future[Records], began: float) -> None:
        if not done.cancelled():
            nbytes = sum(x.payload.nbytes for x in done.result() if x is not None)
            self._took.append((nbytes, time.monotonic() - began))

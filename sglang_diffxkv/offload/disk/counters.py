# SPDX-License-Identifier: Apache-2.0
"""What a store has done since its start."""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

Event = Literal["written", "read", "dropped", "errors"]


class DiskCounters(NamedTuple):
    """Pages unless named bytes.

    ``bytes_total``: what may be used; ``bytes_in_use``: of it, abandoned identities' included;
    ``pages``: those here; ``written``, ``read``: intact ones; ``dropped``: offered and not
    written; ``errors``: failed writes, failed reads and damaged records.
    """

    bytes_total: int
    bytes_in_use: int
    pages: int
    written: int
    read: int
    dropped: int
    errors: int


class Counts:
    """Of events, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Event, int] = {"written": 0, "read": 0, "dropped": 0, "errors": 0}

    def add(self, event: Event, count: int = 1) -> None:
        with self._lock:
            self._counts[event] += count

    def snapshot(self) -> dict[Event, int]:
        with self._lock:
            return dict(self._counts)

# SPDX-License-Identifier: Apache-2.0
"""Reads records on a few threads, so that a disk's queue is deep and no caller waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sglang_diffxkv.offload.disk.record import Record
from sglang_diffxkv.offload.disk.store import DiskStore

log = logging.getLogger(__name__)

THREADS = 4

Records = list[Record | None]


class Reader:
    def __init__(self, store: DiskStore, threads: int = THREADS) -> None:
        self._store = store
        self._closed = False
        self._threads = ThreadPoolExecutor(threads, "diffxkv-disk-reader")

    def read(self, keys: Sequence[bytes]) -> Future[Records]:
        """Records of keys, in their order; None for those that are not here or damaged.

        The future never holds an exception. Cancelling it works until it is done: what was not
        read yet is not. After `close` records are None.
        """
        wanted = _Wanted(len(keys))
        for position, key in enumerate(keys):
            try:
                self._threads.submit(self._read, wanted, position, key)
            except RuntimeError:  # closed
                wanted.set(position, None)
        return wanted.future

    def close(self) -> None:
        """Returns when the reads that were begun are done; the others yield None."""
        self._closed = True
        self._threads.shutdown()

    def _read(self, wanted: _Wanted, position: int, key: bytes) -> None:
        record = None
        if not self._closed and not wanted.future.cancelled():
            try:
                record = self._store.get(key)
            except Exception:  # a caller of `on_removed`, or no memory: the page is recomputed
                log.exception("disk: reading failed")
        wanted.set(position, record)


class _Wanted:
    """The records of one call as they come, in any order; its future is done when all have."""

    def __init__(self, count: int) -> None:
        self.future: Future[Records] = Future()
        self._records: Records = [None] * count
        self._lock = threading.Lock()
        self._left = count
        if not count:
            self.future.set_result([])

    def set(self, position: int, record: Record | None) -> None:
        with self._lock:
            self._records[position] = record
            self._left -= 1
            done = self._left == 0
        if done and self.future.set_running_or_notify_cancel():
            self.future.set_result(self._records)

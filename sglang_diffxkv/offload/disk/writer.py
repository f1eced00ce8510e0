# SPDX-License-Identifier: Apache-2.0
"""Writes what is offered on a thread of its own; who offers never waits for a disk."""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

from sglang_diffxkv.offload.disk.record import Bytes, flat
from sglang_diffxkv.offload.disk.store import DiskStore

log = logging.getLogger(__name__)

PAUSE_SECONDS = 30.0
"""How long nothing is written after a failure."""


class _Offered(NamedTuple):
    metadata: bytes
    payload: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.metadata) + self.payload.nbytes


class Writer:
    """A queue bounded in bytes, and the thread that empties it."""

    def __init__(
        self, store: DiskStore, queue_bytes: int, pause_seconds: float = PAUSE_SECONDS
    ) -> None:
        self._store, self._most, self._pause = store, queue_bytes, pause_seconds
        self._changed = threading.Condition()
        self._queue: dict[bytes, _Offered] = {}
        self._queued_bytes = 0  # of the one being written, too
        self._busy = self._closed = self._failing = False
        self._resume_at = 0.0
        self._thread = threading.Thread(target=self._run, name="diffxkv-disk-writer", daemon=True)
        self._thread.start()

    def offer(self, key: bytes, metadata: bytes, payload: Bytes) -> bool:
        """Queue a record, and return at once.

        Args:
            payload: contiguous. Not copied: it must not change until it is written.

        Returns:
            False if it will not be written: the queue is full, or writing is off after a failure.
            True also if it is on disk or in the queue.
        """
        offered = _Offered(metadata, flat(payload))
        with self._changed:
            if key in self._queue or self._store.contains(key):
                return True
            full = self._queued_bytes + offered.nbytes > self._most
            if full or self._is_off:
                self._store.counts.add("dropped")
                return False
            self._queue[key] = offered
            self._queued_bytes += offered.nbytes
            self._changed.notify_all()
        return True

    @property
    def room(self) -> int:
        """Bytes that may be offered now; 0 as long as nothing is written."""
        with self._changed:
            return 0 if self._is_off else max(0, self._most - self._queued_bytes)

    @property
    def _is_off(self) -> bool:
        return self._closed or time.monotonic() < self._resume_at

    def idle(self, timeout: float | None = 0.0) -> bool:
        """Whether all that was offered is written or dropped; waits for it up to ``timeout``
        seconds, or without a limit if that is None."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout)

    def clear(self) -> None:
        """Forget the queue and delete all records of the store; raises OSError."""
        with self._changed:
            self._forget()
            self._changed.wait_for(self._is_idle)
            self._store.clear()

    def close(self, timeout: float = 10.0) -> None:
        """Write what is queued if that takes no longer than ``timeout`` seconds, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            self._forget()

    def _is_idle(self) -> bool:
        return not self._queue and not self._busy

    def _forget(self) -> list[bytes]:
        forgotten = list(self._queue)
        self._queued_bytes -= sum(offered.nbytes for offered in self._queue.values())
        self._queue.clear()
        return forgotten

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                key = next(iter(self._queue))
                offered = self._queue.pop(key)
                self._busy = True
            self._write(key, offered)
            with self._changed:
                self._busy = False
                self._queued_bytes -= offered.nbytes
                self._changed.notify_all()
            del offered  # its memory is not kept until the next one comes

    def _write(self, key: bytes, offered: _Offered) -> None:
        try:
            self._store.put(key, *offered)
        except Exception as error:  # whatever it is, it must not end the thread
            self._stop_for_a_while(key, error)
        else:
            if self._failing:
                self._failing = False
                log.info("disk: writing again")

    def _stop_for_a_while(self, key: bytes, error: Exception) -> None:
        with self._changed:
            self._resume_at = time.monotonic() + self._pause
            lost = [key, *self._forget()]
        self._store.counts.add("errors")
        self._store.counts.add("dropped", len(lost))
        self._store.on_removed(lost)
        if not self._failing:
            self._failing = True
            log.warning("disk: nothing is written until it works again: %s", error)

# SPDX-License-Identifier: Apache-2.0
"""Records by key, in the segments of one folder, never more than a number of bytes.

One thread writes; any may read. When room lacks, the oldest segment goes as a whole: what was read
of it since it was written is written again, the rest is gone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sglang_diffxkv.offload.disk.counters import Counts, DiskCounters
from sglang_diffxkv.offload.disk.identity import (
    Abandoned,
    digest,
    segment_number,
    segment_path,
    segment_paths,
    subfolder,
)
from sglang_diffxkv.offload.disk.lock import FolderLock
from sglang_diffxkv.offload.disk.record import Bytes, Record, flat
from sglang_diffxkv.offload.disk.segments import EMPTY_BYTES, ForeignSegment, Segment, cost

log = logging.getLogger(__name__)

SEGMENT_BYTES, MOST_SEGMENTS, FEWEST_SEGMENTS = 16 << 20, 256, 8
PATIENCE_SECONDS = 1.0
"""How long a start waits for another process to let go of the folder."""


def segment_bytes(nbytes: int) -> int:
    """Size of a store's segments: small enough that what goes at once is little of it, large enough
    that there are few files."""
    return min(max(SEGMENT_BYTES, nbytes // MOST_SEGMENTS), nbytes // FEWEST_SEGMENTS)


class DiskStore:
    """``on_written``: told the keys of records that are here now, on the thread that wrote them.
    ``on_removed``: of those that fell off, turned out damaged or were not written after all, on the
    thread that found it; not those of `clear`."""

    def __init__(self, folder: Path, nbytes: int, identity: bytes | str) -> None:
        """Opens what is there; reads headers or indices, not payloads.

        Args:
            folder: created if need be. Each identity has a sub-folder.
            nbytes: of all files together, those of abandoned identities included. Processes that
                share a folder bound themselves, each with its own identity.
            identity: all that decides a page's bytes beside its key.

        Raises:
            FolderInUse: another process has this identity's sub-folder.
            OSError: the folder cannot be created or written to.
        """
        self.on_written: Callable[[list[bytes]], None] = lambda keys: None
        self.on_removed: Callable[[list[bytes]], None] = lambda keys: None
        self.counts = Counts()
        self._nbytes, self._segment_bytes = nbytes, segment_bytes(nbytes)
        self._identity = digest(identity)
        self._folder = subfolder(folder, self._identity)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock: FolderLock | None = FolderLock(self._folder, PATIENCE_SECONDS)
        self._writing = threading.Lock()
        self._index: dict[bytes, Segment] = {}
        self._segments: deque[Segment] = deque()
        self._current: Segment | None = None
        self._next = 0
        try:
            self._abandoned = Abandoned(folder, self._folder)
            for path in segment_paths(self._folder):
                self._open(path)
        except OSError:
            self._lock.release()
            raise
        self._used = sum(segment.nbytes for segment in self._segments)
        with suppress(OSError):
            self._make_room(0, [])

    def contains(self, key: bytes) -> bool:
        return key in self._index

    @property
    def counters(self) -> DiskCounters:
        return DiskCounters(self._nbytes, self._taken(), len(self._index), **self.counts.snapshot())

    def get(self, key: bytes, into: NDArray[np.uint8] | None = None) -> Record | None:
        """The record that was put, bit by bit, or None: not here, or damaged, and then it is gone.

        Args:
            into: uint8, one dimension, contiguous: where to put the payload if that fits.
        """
        while segment := self._index.get(key):
            record = self._read(segment, key, into)
            if record is not None:
                segment.recent.pop(key, None)
                segment.recent[key] = None
                self.counts.add("read")
                return record
            if self._index.get(key) is segment:  # else it was written again, or fell off, meanwhile
                self._drop(segment, key)
        return None

    def put(self, key: bytes, metadata: bytes, payload: Bytes) -> None:
        """Write a record unless it is here, or larger than the store; raises OSError."""
        view = flat(payload)
        need = cost(len(metadata), view.nbytes)
        removed: list[bytes] = []
        try:
            with self._writing:
                if key in self._index:
                    return
                if self._lock is None or need + EMPTY_BYTES > self._nbytes:
                    self.counts.add("dropped")
                    removed.append(key)
                    return
                self._make_room(need + EMPTY_BYTES, removed)
                self._append(key, metadata, view)
                self.counts.add("written")
            self.on_written([key])
        finally:
            if removed:
                self.on_removed(removed)

    def clear(self) -> None:
        """Delete all records of this identity; raises OSError."""
        with self._writing:
            self._index.clear()
            self._current = None
            while self._segments:
                self._remove(self._segments[0])

    def close(self) -> None:
        """Let go of the folder; afterwards nothing is here."""
        with self._writing:
            self._index.clear()
            self._seal()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _open(self, path: Path) -> None:
        try:
            segment = Segment.open(path, self._identity)
        except ForeignSegment as reason:
            log.warning("disk: %s: discarded: %s", path, reason)
            with suppress(OSError):
                path.unlink()
            return
        except OSError as error:
            log.warning("disk: %s: cannot be read: %s", path, error.strerror)
            segment = Segment.unreadable(path, self._identity)
        self._next = segment_number(path) + 1
        self._segments.append(segment)
        self._index.update(dict.fromkeys(segment.entries, segment))

    def _read(
        self, segment: Segment, key: bytes, into: NDArray[np.uint8] | None = None
    ) -> Record | None:
        with suppress(OSError):
            return segment.read(key, into)
        return None

    def _drop(self, segment: Segment, key: bytes) -> None:
        """Forget a record that cannot be read; its bytes go with its segment."""
        if self._index.pop(key, None) is None:
            return  # another reader found it first
        self.counts.add("errors")
        if not segment.reported:
            log.warning("disk: %s: a record is damaged or cannot be read", segment.path)
            segment.reported = True
        self.on_removed([key])

    def _taken(self) -> int:
        return self._used + self._abandoned.nbytes

    def _make_room(self, need: int, removed: list[bytes]) -> None:
        """Until ``need`` bytes fit, and beside them what `_keep` writes again the next time."""
        need += self._segment_bytes // 2
        while self._taken() + need > self._nbytes:
            if self._abandoned.nbytes:
                self._abandoned.remove_oldest()
            elif self._segments:
                self._evict(self._segments[0], removed)
            else:
                return

    def _evict(self, oldest: Segment, removed: list[bytes]) -> None:
        if oldest is self._current:
            self._seal()
        self._keep(oldest)
        gone = [key for key in oldest.entries if self._index.get(key) is oldest]
        for key in gone:  # before the file, so that readers do not take it for a damaged one
            self._index.pop(key, None)
        removed += gone
        self._remove(oldest)

    def _keep(self, oldest: Segment) -> None:
        """Write again what was read, the latest first: half a segment at most, so that at least as
        much is freed as is written."""
        left = oldest.nbytes // 2
        for key in reversed(list(oldest.recent)):
            if self._index.get(key) is not oldest:
                continue
            need = cost(*oldest.entries[key][1:])
            left -= need
            if left < 0 or self._taken() + need + EMPTY_BYTES > self._nbytes:
                return
            record = self._read(oldest, key)
            if record is None:
                self.counts.add("errors")
            else:
                self._append(key, record.metadata, record.payload.data)

    def _append(self, key: bytes, metadata: bytes, payload: memoryview) -> None:
        segment = self._writable(cost(len(metadata), payload.nbytes))
        before = segment.nbytes
        segment.append(key, metadata, payload)
        self._used += segment.nbytes - before
        self._index[key] = segment

    def _writable(self, need: int) -> Segment:
        """The segment to append to: a new one where the current one would become too large."""
        current = self._current
        if current is not None:
            if not current.entries or current.nbytes + need <= self._segment_bytes:
                return current
            self._seal()
        path = segment_path(self._folder, self._next)
        self._next += 1
        current = self._current = Segment.create(path, self._identity)
        self._segments.append(current)
        self._used += current.nbytes
        return current

    def _seal(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            try:
                current.seal()
            except OSError:
                self.counts.add("errors")

    def _remove(self, segment: Segment) -> None:
        segment.remove()
        self._segments.remove(segment)
        self._used -= segment.nbytes

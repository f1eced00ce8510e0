# SPDX-License-Identifier: Apache-2.0
"""One append-only file of records; sealed with an index of them when it is full.

Nothing is synced: what `write` took survives the process, and after a loss of power checksums tell
what reached the disk.
"""

from __future__ import annotations

import logging
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from sglang_diffxkv.offload.disk.files import opened, read_all, write_all
from sglang_diffxkv.offload.disk.record import (
    HEADER_BYTES,
    Record,
    checked,
    pack_header,
    record_bytes,
)
from sglang_diffxkv.offload.disk.segment_index import (
    ENTRY_BYTES,
    TRAILER_BYTES,
    Entry,
    pack_index,
    read_index,
    scan,
)

log = logging.getLogger(__name__)

VERSION = 1
_MAGIC = b"DXKVSEGM"
_HEADER = struct.Struct("<8sQ16sQ")  # magic, version, identity, checksum of these
_START = _HEADER.size
EMPTY_BYTES = _START + TRAILER_BYTES
"""Size of a segment without records."""


class ForeignSegment(ValueError):
    """A file that is no segment of this identity and version; the text says why."""


def cost(metadata_bytes: int, payload_bytes: int) -> int:
    """Bytes that a record takes in a segment, its entry in the index included."""
    return record_bytes(metadata_bytes, payload_bytes) + ENTRY_BYTES


class Segment:
    """``entries``: its records by key; ``nbytes``: its size, or what that will be when it is
    sealed; ``recent``: keys of records that were read, the last one last; ``reported``: whether
    damage was logged."""

    def __init__(self, path: Path, identity: bytes, entries: dict[bytes, Entry]) -> None:
        self.path = path
        self.entries = entries
        self.recent: dict[bytes, None] = {}
        self.reported = False
        self.nbytes = EMPTY_BYTES
        self._seed = int.from_bytes(identity[:8])
        self._end = _START
        self._fd: int | None = None

    @classmethod
    def create(cls, path: Path, identity: bytes) -> Segment:
        """An empty one to append to; raises OSError."""
        segment = cls(path, identity, {})
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        segment._fd = os.open(path, flags, 0o600)
        try:
            write_all(segment._fd, [_pack_header(identity)], 0)
        except OSError:
            segment.remove()
            raise
        return segment

    @classmethod
    def open(cls, path: Path, identity: bytes) -> Segment:
        """One of an earlier process, to read from. What is torn or damaged is cut off.

        Raises:
            ForeignSegment: it is no segment of this identity and version.
            OSError: it cannot be read.
        """
        segment = cls(path, identity, {})
        with opened(path, os.O_RDWR) as fd:
            _check_header(os.pread(fd, _START, 0), identity)
            size = segment.nbytes = os.fstat(fd).st_size
            entries = read_index(fd, size, _START, segment._seed)
            if entries is None:
                segment._repair(fd, size)
            else:
                segment.entries = entries
        return segment

    @classmethod
    def unreadable(cls, path: Path, identity: bytes) -> Segment:
        """One that takes space and has no records."""
        segment = cls(path, identity, {})
        with suppress(OSError):
            segment.nbytes = path.stat().st_size
        return segment

    def append(self, key: bytes, metadata: bytes, payload: memoryview) -> None:
        """One write. Raises OSError, and then the segment is as it was."""
        assert self._fd is not None, "a sealed segment"
        header = pack_header(key, metadata, payload, self._seed)
        try:
            write_all(self._fd, [header, metadata, payload], self._end)
        except OSError:
            self._cut_off(self._fd)
            raise
        self.entries[key] = entry = Entry(self._end, len(metadata), payload.nbytes)
        self._end = entry.end
        self.nbytes += cost(*entry[1:])

    def read(self, key: bytes, into: NDArray[np.uint8] | None = None) -> Record | None:
        """A record of this segment, by one read; None if it is damaged.

        Args:
            into: uint8, one dimension, contiguous: where to put the payload if that fits.

        Raises:
            KeyError: it has no such record.
            OSError: it cannot be read; FileNotFoundError: the segment was removed.
        """
        offset, metadata_bytes, payload_bytes = self.entries[key]
        head = memoryview(bytearray(HEADER_BYTES + metadata_bytes))
        if into is not None and into.size >= payload_bytes:
            payload = into[:payload_bytes]
        else:
            payload = np.empty(payload_bytes, np.uint8)
        with opened(self.path, os.O_RDONLY) as fd:
            if not read_all(fd, [head, payload.data], offset):
                return None
        return checked(key, bytes(head), payload, self._seed)

    def seal(self) -> None:
        """Write the index; nothing can be appended any more. Raises OSError if it has none now,
        which costs a later start some time."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            self._write_index(fd)
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Delete the file; raises OSError."""
        self.path.unlink(missing_ok=True)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _repair(self, fd: int, size: int) -> None:
        """Of a file without an index that can be believed, keep what comes before any damage."""
        self.entries, self._end = scan(fd, size, _START, self._seed)
        if size > self._end:
            log.warning("disk: %s: discarded its last %d bytes", self.path, size - self._end)
            os.ftruncate(fd, self._end)
        self.nbytes = self._end + len(self.entries) * ENTRY_BYTES + TRAILER_BYTES
        with suppress(OSError):
            self._write_index(fd)

    def _write_index(self, fd: int) -> None:
        try:
            write_all(fd, [pack_index(self.entries, self._seed)], self._end)
        except OSError:
            self._cut_off(fd)
            raise

    def _cut_off(self, fd: int) -> None:
        """What a failed write left; where that fails, too, a scan stops at it."""
        with suppress(OSError):
            os.ftruncate(fd, self._end)


def _pack_header(identity: bytes) -> bytes:
    named = _HEADER.pack(_MAGIC, VERSION, identity, 0)[:-8]
    return named + struct.pack("<Q", xxhash.xxh3_64_intdigest(named))


def _check_header(data: bytes, identity: bytes) -> None:
    if len(data) < _START or not data.startswith(_MAGIC):
        raise ForeignSegment("not a segment")
    _, version, found, checksum = _HEADER.unpack(data)
    if checksum != xxhash.xxh3_64_intdigest(data[:-8]):
        raise ForeignSegment("its header is damaged")
    if version != VERSION:
        raise ForeignSegment(f"of format {version}, not {VERSION}")
    if found != identity:
        raise ForeignSegment("of another model or other settings")

# SPDX-License-Identifier: Apache-2.0
"""The end of a sealed segment: where its records are, so that a start reads one piece a file.

It only saves time: without it, or where it is damaged, headers are read one by one. What it says is
checked again when a record is read.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import xxhash

from sglang_diffxkv.offload.disk.record import HEADER_BYTES, record_bytes, unpack_header

_MAGIC = b"DXKVIDX1"
_ENTRY = struct.Struct("<16sQII")  # key, offset of the header, bytes of metadata and payload
_TRAILER = struct.Struct("<8sQ16sQ")  # magic, entries, checksum of the entries and of this
ENTRY_BYTES, TRAILER_BYTES = _ENTRY.size, _TRAILER.size


class Entry(NamedTuple):
    """Where a record lies in its segment, in bytes; the offset is that of its header."""

    offset: int
    metadata_bytes: int
    payload_bytes: int

    @property
    def end(self) -> int:
        return self.offset + record_bytes(self.metadata_bytes, self.payload_bytes)


def pack_index(entries: dict[bytes, Entry], seed: int) -> bytes:
    packed = b"".join(_ENTRY.pack(key, *entry) for key, entry in entries.items())
    start = _TRAILER.pack(_MAGIC, len(entries), xxhash.xxh3_128_digest(packed, seed), 0)[:-8]
    return packed + start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start, seed))


def read_index(fd: int, size: int, start: int, seed: int) -> dict[bytes, Entry] | None:
    """The index of a segment of ``size`` bytes whose records begin at ``start``; None: it has none
    that can be believed."""
    trailer = os.pread(fd, TRAILER_BYTES, max(size - TRAILER_BYTES, 0))
    if len(trailer) < TRAILER_BYTES:
        return None
    magic, count, checksum, own = _TRAILER.unpack(trailer)
    end = size - TRAILER_BYTES - count * ENTRY_BYTES
    if magic != _MAGIC or xxhash.xxh3_64_intdigest(trailer[:-8], seed) != own or end < start:
        return None
    packed = os.pread(fd, count * ENTRY_BYTES, end)
    if xxhash.xxh3_128_digest(packed, seed) != checksum:
        return None
    entries = {key: Entry(*where) for key, *where in _ENTRY.iter_unpack(packed)}
    fits = all(start <= entry.offset and entry.end <= end for entry in entries.values())
    return entries if fits else None


def scan(fd: int, size: int, start: int, seed: int) -> tuple[dict[bytes, Entry], int]:
    """Entries of the records from ``start`` up to the first that is torn or damaged, and where
    that one begins. Reads headers only."""
    entries: dict[bytes, Entry] = {}
    while header := unpack_header(os.pread(fd, HEADER_BYTES, start), seed):
        entry = Entry(start, header.metadata_bytes, header.payload_bytes)
        if entry.end > size:
            break
        entries[header.key] = entry
        start = entry.end
    return entries, start

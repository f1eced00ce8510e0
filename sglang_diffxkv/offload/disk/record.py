# SPDX-License-Identifier: Apache-2.0
"""The bytes of one record: header, metadata, payload.

All checksums are XXH3, seeded with the store's identity, so that a record of another identity does
not verify wherever it lies. They find damage, not forgery: who can write to the folder is trusted.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from typing_extensions import Buffer

KEY_BYTES = 16
_MAGIC = b"DXKVREC1"
_NAMED = struct.Struct("<8s16sII")  # magic, key, bytes of metadata, bytes of payload
_HEADER = struct.Struct("<32s16sQ")  # the above, checksum of the record, checksum of the header
HEADER_BYTES = _HEADER.size

Bytes = Buffer | NDArray[np.uint8]
"""Contiguous."""


class Record(NamedTuple):
    """``key``: 16 bytes; ``payload``: uint8, one dimension."""

    key: bytes
    metadata: bytes
    payload: NDArray[np.uint8]


class Header(NamedTuple):
    key: bytes
    metadata_bytes: int
    payload_bytes: int
    checksum: bytes


def record_bytes(metadata_bytes: int, payload_bytes: int) -> int:
    return HEADER_BYTES + metadata_bytes + payload_bytes


def flat(buffer: Bytes) -> memoryview:
    """A contiguous buffer as bytes, not copied."""
    view = memoryview(buffer)  # type: ignore[arg-type]  # numpy's arrays are buffers
    return view.cast("B") if view.nbytes else memoryview(b"")


def pack_header(key: bytes, metadata: bytes, payload: memoryview, seed: int) -> bytes:
    """Raises ValueError for a key of another length than 16, struct.error for 4 GiB and more."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    named = _NAMED.pack(_MAGIC, key, len(metadata), payload.nbytes)
    checksum = _checksum(named, metadata, payload, seed)
    return _HEADER.pack(named, checksum, xxhash.xxh3_64_intdigest(named + checksum, seed))


def unpack_header(data: bytes, seed: int) -> Header | None:
    """What a header says, or None if it is none, another store's, or damaged.

    Its lengths can be believed; whether the record is whole is for `checked` to say.
    """
    if len(data) < HEADER_BYTES:
        return None
    named, checksum, own = _HEADER.unpack_from(data)
    magic, key, metadata_bytes, payload_bytes = _NAMED.unpack(named)
    if magic != _MAGIC or xxhash.xxh3_64_intdigest(named + checksum, seed) != own:
        return None
    return Header(key, metadata_bytes, payload_bytes, checksum)


def checked(key: bytes, head: bytes, payload: NDArray[np.uint8], seed: int) -> Record | None:
    """The record that was read for a key, or None if it is not the one that was written.

    Args:
        head: header and metadata.
    """
    header, metadata = unpack_header(head, seed), head[HEADER_BYTES:]
    if header is None or header[:3] != (key, len(metadata), payload.nbytes):
        return None
    named = _NAMED.pack(_MAGIC, *header[:3])
    if _checksum(named, metadata, payload.data, seed) != header.checksum:
        return None
    return Record(key, metadata, payload)


def _checksum(named: bytes, metadata: bytes, payload: memoryview, seed: int) -> bytes:
    hashed = xxhash.xxh3_128(named, seed)
    hashed.update(metadata)
    hashed.update(payload)
    return hashed.digest()

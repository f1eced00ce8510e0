# SPDX-License-Identifier: Apache-2.0
"""Records of a disk store that follow from their key, and damage to its files."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_diffxkv.offload.disk.record import Record
from sglang_diffxkv.offload.disk.store import DiskStore

if TYPE_CHECKING:
    import pytest


def key_of(number: int) -> bytes:
    return random.Random(number).randbytes(16)


def metadata_of(key: bytes) -> bytes:
    source = random.Random(key + b"m")
    return source.randbytes(source.randrange(40))


def payload_of(key: bytes, most: int = 3000) -> bytes:
    """Of a size that follows from the key, too: 0 to ``most`` bytes."""
    source = random.Random(key)
    return source.randbytes(source.choice([0, 1, source.randrange(most + 1), most]))


def put(store: DiskStore, number: int, most: int = 3000) -> bytes:
    key = key_of(number)
    store.put(key, metadata_of(key), payload_of(key, most))
    return key


def is_right(record: Record, most: int = 3000) -> bool:
    key, metadata, payload = record
    assert payload.dtype == np.uint8 and payload.ndim == 1
    return metadata == metadata_of(key) and payload.tobytes() == payload_of(key, most)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.segment"))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in segments(folder))


def sizes_when_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes in all segments after each write from now on: nothing else makes files grow."""
    sizes: list[int] = []
    real = os.pwritev

    def measured(*args: Any) -> int:
        done = real(*args)
        sizes.append(bytes_in(folder))
        return done

    monkeypatch.setattr(os, "pwritev", measured)
    return sizes


def crash(store: DiskStore) -> None:
    """Let go of a store as a killed process does: nothing is written any more."""
    current, lock = store._current, store._lock
    assert lock is not None
    lock.release()
    store._current = store._lock = None
    if current is not None and current._fd is not None:
        fd, current._fd = current._fd, None
        os.close(fd)

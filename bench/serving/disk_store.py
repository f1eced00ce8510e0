# SPDX-License-Identifier: Apache-2.0
"""The disk store alone: what writing and reading a page costs, and a start with many.

Files are in the page cache unless the folder has more than memory holds; seconds of CPU beside
those of the clock tell how much was waiting.

    python -m bench.serving.disk_store --folder /somewhere/on/the/disk --gib 4
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sglang_diffxkv.offload.disk.store import DiskStore

SIZES = {"20 KiB": 20 << 10, "2 MiB": 2 << 20}
MANY = 200_000


def measured(title: str, nbytes: int, count: int, work: Callable[[], object]) -> None:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    rate = f"{nbytes / clock / 1e6:8.0f} MB/s" if nbytes else " " * 13
    micro = f"{clock / count * 1e6:8.1f} us each, {cpu / count * 1e6:8.1f} of CPU"
    print(f"{title:28} {rate} {micro}, {clock:6.2f} s")


def put_and_get(folder: Path, total: int) -> None:
    for name, size in SIZES.items():
        store = DiskStore(folder, 2 * total, name)
        payload = np.random.default_rng().integers(0, 256, size, dtype=np.uint8)
        keys = [os.urandom(16) for _ in range(total // size)]
        into = np.empty(size, np.uint8)
        measured(f"put, {name}", len(keys) * size, len(keys), partial(_put, store, keys, payload))
        measured(f"get, {name}", len(keys) * size, len(keys), partial(_get, store, keys, into))
        assert store.counters.read == store.counters.written == len(keys)
        store.clear()
        store.close()


def _put(store: DiskStore, keys: list[bytes], payload: NDArray[np.uint8]) -> None:
    for key in keys:
        store.put(key, b"metadata", payload)


def _get(store: DiskStore, keys: list[bytes], into: NDArray[np.uint8]) -> None:
    for key in keys:
        store.get(key, into)


def start(folder: Path, count: int) -> None:
    """With indices, as after a clean end, and without, where headers are read one by one."""
    store = DiskStore(folder, 8 << 30, "start")
    for _ in range(count):
        store.put(os.urandom(16), b"", bytes(100))
    store.close()
    for title in ("start, indices", "start, headers"):
        if title == "start, headers":
            for path in folder.rglob("*.segment"):
                os.truncate(path, path.stat().st_size - 1)
        measured(f"{title}, {count:,}", 0, count, partial(_open, folder, count))


def _open(folder: Path, count: int) -> None:
    store = DiskStore(folder, 8 << 30, "start")
    assert store.counters.pages == count
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--gib", type=float, default=1.0, help="how much is written a page size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        put_and_get(Path(folder), int(args.gib * (1 << 30)))
        start(Path(folder), MANY)


if __name__ == "__main__":
    main()

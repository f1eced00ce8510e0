# SPDX-License-Identifier: Apache-2.0
"""Kills processes that write to a disk store, and reads what they left; alone, for forks are cheap
in a process without torch.

    python -m tests.support.disk_kills FOLDER --kills 200 --seed 1

Each child writes, reads, evicts and seals in a store of a few small segments, and tells by a pipe
which records `put` had returned for. It is killed after a random time. Prints JSON: how many kills,
records that were got, among them of those told last, and how many stores had torn ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import struct
import time
from pathlib import Path

from sglang_diffxkv.offload.disk.store import DiskStore
from sglang_diffxkv.offload.disk.writer import Writer
from tests.support.disk import bytes_in, is_right, key_of, metadata_of, payload_of, put

NBYTES, MOST, NUMBERS = 256 << 10, 6000, 400
SURE = 12
"""Records told last that nothing can have evicted: they are less than half of the store."""

_NUMBER = struct.Struct("<I")


def write_for_ever(folder: Path, told: int, seed: int) -> None:
    source = random.Random(seed)
    store = DiskStore(folder, NBYTES, "kills")
    writer = Writer(store, queue_bytes=1 << 20) if source.random() < 0.3 else None
    while True:
        number = source.randrange(NUMBERS)
        if store.contains(key_of(number)):
            store.get(key_of(number))
            continue
        if writer is None:
            put(store, number, MOST)
            os.write(told, _NUMBER.pack(number))
        elif not writer.offer(key := key_of(number), metadata_of(key), payload_of(key, MOST)):
            writer.idle(None)
        if source.random() < 0.01 and writer is None:
            store.close()
            store = DiskStore(folder, NBYTES, "kills")


def start(folder: Path, seed: int) -> tuple[int, int]:
    """A child's id, and where it tells."""
    heard, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        return child, heard
    try:
        os.close(heard)
        write_for_ever(folder, told, seed)
    finally:
        os._exit(1)  # never reached but by an error


def heard_of(pipe: int) -> list[int]:
    data = b""
    while piece := os.read(pipe, 1 << 16):
        data += piece
    os.close(pipe)
    return [number for (number,) in _NUMBER.iter_unpack(data[: len(data) // 4 * 4])]


def verify(folder: Path, told: list[int]) -> tuple[int, int]:
    """Records that were got, all of them right, and those of the last that were told."""
    assert bytes_in(folder) <= NBYTES, f"{bytes_in(folder)} bytes"
    store = DiskStore(folder, NBYTES, "kills")
    records = [record for n in range(NUMBERS) if (record := store.get(key_of(n))) is not None]
    assert all(is_right(record, MOST) for record in records), "a wrong record"
    assert store.counters.errors == 0, "damage that is more than a torn end"
    last = set(told[-SURE:])
    assert all(store.contains(key_of(number)) for number in last), "a record was lost"
    store.close()
    return len(records), len(last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = random.Random(args.seed)
    torn: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: torn.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sglang_diffxkv").addHandler(handler)
    found = [0, 0]
    for kill in range(args.kills):
        child, pipe = start(args.folder, args.seed * 1_000_003 + kill)
        time.sleep(source.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed before it was killed"
        got = verify(args.folder, heard_of(pipe))
        found = [one + more for one, more in zip(found, got, strict=True)]
    result = {"kills": args.kills, "records": found[0], "told last": found[1], "torn": len(torn)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

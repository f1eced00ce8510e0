# SPDX-License-Identifier: Apache-2.0
"""The disk store where the system fails or does a part, and the threads around it."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from sglang_diffxkv.offload.disk.reader import Reader
from sglang_diffxkv.offload.disk.store import DiskStore
from sglang_diffxkv.offload.disk.writer import Writer
from tests.support.disk import (
    bytes_in,
    crash,
    is_right,
    key_of,
    metadata_of,
    payload_of,
    put,
    segments,
    sizes_when_written,
)

NBYTES = 200_000
CALLS = ("open", "pwritev", "preadv", "pread", "ftruncate", "unlink")


class Faults:
    """Of system calls on segments: errors, and reads and writes that do a part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.rate, self.calls, self._source = 0.0, set(CALLS), random.Random(seed)
        for name in CALLS:
            monkeypatch.setattr(os, name, self._faulty(name, getattr(os, name)))

    def _faulty(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            ours = isinstance(first, int) or str(first).endswith(".segment")
            if not ours or name not in self.calls or self._source.random() >= self.rate:
                return real(first, *args, **kwargs)
            some = self._source.randrange(1, 50)
            if name == "preadv" and self._source.random() < 0.7:
                return real(first, [part[:some] for part in args[0] if len(part)][:1], args[1])
            if name == "pwritev" and self._source.random() < 0.7:
                done = real(first, [memoryview(b"".join(args[0]))[:some]], args[1])
                if self._source.random() < 0.5:
                    return done
            raise OSError(self._source.choice([errno.EIO, errno.ENOSPC]), "injected")

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, seed: int) -> Faults:
    return Faults(monkeypatch, seed)


@pytest.mark.parametrize("round_", range(5))
def test_random_faults(tmp_path: Path, faults: Faults, seed: int, round_: int) -> None:
    source = random.Random(seed * 100 + round_)
    store = DiskStore(tmp_path, NBYTES, "model")
    failed = 0
    for _ in range(600):
        faults.rate = source.choice([0, 0.05, 0.3])
        number = source.randrange(200)
        try:
            put(store, number)
        except OSError:
            failed += 1
        record = store.get(key_of(source.randrange(200)))
        assert record is None or is_right(record)
        if source.random() < 0.02:
            source.choice([DiskStore.close, crash])(store)
            store = DiskStore(tmp_path, NBYTES, "model")
        assert bytes_in(tmp_path) <= NBYTES
    faults.rate = 0
    store.close()
    store = DiskStore(tmp_path, NBYTES, "model")
    assert failed > 10 and store.counters.pages > 0
    record = store.get(put(store, 1000))
    assert record is not None and is_right(record)
    assert bytes_in(tmp_path) <= NBYTES


def test_short_writes_and_reads_are_completed(tmp_path: Path, faults: Faults) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    faults._source = random.Random(1)
    real = faults._source.random
    faults._source.random = lambda: min(real() * 0.49, 0.49)  # type: ignore[method-assign]
    faults.calls, faults.rate = {"pwritev", "preadv"}, 1.0
    for number in range(40):
        record = store.get(put(store, number))
        assert record is not None and is_right(record)


def test_a_segment_that_cannot_be_read_at_the_start_is_not_deleted(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    key = put(store, 3)
    store.close()
    faults.rate, faults.calls = 1.0, {"open"}
    with caplog.at_level(logging.WARNING):
        store = DiskStore(tmp_path, NBYTES, "model")
    assert not store.contains(key) and store.counters.bytes_in_use == bytes_in(tmp_path) > 0
    assert len(caplog.messages) == 1 and "cannot be read" in caplog.text
    faults.rate = 0
    store.close()
    assert DiskStore(tmp_path, NBYTES, "model").contains(key)


def test_a_read_error_drops_the_record_and_is_told(tmp_path: Path, faults: Faults) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    removed: list[bytes] = []
    store.on_removed = removed.extend
    key, other = put(store, 1), put(store, 2)
    faults.rate, faults.calls = 1.0, {"open"}
    assert store.get(key) is None and removed == [key] and store.counters.errors == 1
    faults.rate = 0
    assert store.get(key) is None and store.get(other) is not None
    assert store.get(put(store, 1)) is not None


class Gate:
    """Holds `put` of a store until it is opened."""

    def __init__(self, store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        real = store.put

        def held(*args: object) -> None:
            self.entered.set()
            self.open.wait()
            real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "put", held)


def test_offers_to_a_full_queue_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    gate = Gate(store, monkeypatch)
    writer = Writer(store, queue_bytes=10_000)
    taken = [writer.offer(key_of(number), b"12345", bytes(1995)) for number in range(8)]
    assert taken == [True] * 5 + [False] * 3
    assert writer.offer(key_of(4), b"12345", bytes(1995)), "it is in the queue"
    assert not writer.idle() and store.counters.dropped == 3
    gate.open.set()
    assert writer.idle(None) and writer.idle()
    assert store.counters.written == 5 and writer.offer(key_of(9), b"", bytes(10_000))
    writer.close()
    assert store.contains(key_of(9)) and not writer.offer(key_of(10), b"", b"")


def test_clear_forgets_what_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    gate = Gate(store, monkeypatch)
    writer = Writer(store, queue_bytes=10_000)
    for number in range(3):
        writer.offer(key_of(number), b"", b"x")
    gate.entered.wait()
    threading.Timer(0.05, gate.open.set).start()
    writer.clear()
    assert writer.idle() and store.counters.pages == 0
    assert writer.offer(key_of(1), b"", b"x") and writer.idle(None) and store.contains(key_of(1))
    writer.close()


def test_a_full_disk_turns_writing_off_for_a_while(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    writer = Writer(store, queue_bytes=1 << 20, pause_seconds=0.1)
    faults.rate, faults.calls = 1.0, {"open"}
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert writer.offer(key_of(1), b"", b"x") and writer.idle(None)
            assert not writer.offer(key_of(2), b"", b"x"), "it is off"
            time.sleep(0.15)
        faults.rate = 0
        assert writer.offer(key_of(1), b"", b"x") and writer.idle(None)
    assert store.contains(key_of(1)) and store.counters.errors == 2 and store.counters.dropped == 4
    assert len(caplog.messages) == 2 and "nothing is written" in caplog.messages[0]
    writer.close()


def test_the_writer_outlives_any_error(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    writer = Writer(store, queue_bytes=1 << 20, pause_seconds=0.0)
    assert writer.offer(b"short", b"", b"x") and writer.idle(None)
    assert writer.offer(key_of(1), b"", b"x") and writer.idle(None) and store.contains(key_of(1))
    writer.close()


def test_reading_many(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    keys = [put(store, number) for number in range(30)]
    reader = Reader(store)
    wanted = [keys[3], key_of(99), *keys[5:]]
    records = reader.read(wanted).result()
    assert [record and record.key for record in records] == [keys[3], None, *keys[5:]]
    assert all(is_right(record) for record in records if record)
    assert reader.read([]).result() == []
    reader.close()
    assert reader.read(keys[:2]).result() == [None, None]


def test_a_read_can_be_cancelled_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    reader = Reader(store, threads=1)
    go, begun, got = threading.Event(), threading.Event(), []

    def get(key: bytes) -> None:
        got.append(key)
        begun.set()
        go.wait()

    monkeypatch.setattr(store, "get", get)
    future = reader.read([key_of(number) for number in range(5)])
    begun.wait()
    assert future.cancel()
    go.set()
    reader.close()
    assert got == [key_of(0)]
    with pytest.raises(CancelledError):
        future.result()


def test_a_reader_never_raises(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")

    def broken(keys: list[bytes]) -> None:
        raise RuntimeError("theirs")

    store.on_removed = broken
    key, other = put(store, 1), put(store, 2)
    for path in segments(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    reader = Reader(store)
    assert reader.read([key, other]).result() == [None, None]
    reader.close()


def test_readers_and_a_writer_while_segments_go(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record that is got is right, none is taken for damaged, and files stay bounded."""
    most = sizes_when_written(tmp_path, monkeypatch)
    store = DiskStore(tmp_path, NBYTES, "model")
    writer = Writer(store, queue_bytes=50_000)
    wrong: list[object] = []
    found = [0, 0, 0]
    stop = threading.Event()

    def read(which: int) -> None:
        source = random.Random(seed + which)
        while not stop.is_set():
            record = store.get(key_of(source.randrange(150)))
            found[which] += record is not None
            if record is not None and not is_right(record):
                wrong.append(record)

    threads = [threading.Thread(target=read, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    source = random.Random(seed)
    deadline = time.monotonic() + 60
    while (store.counters.written <= 300 or min(found) == 0) and time.monotonic() < deadline:
        key = key_of(source.randrange(150))
        if not writer.offer(key, metadata_of(key), payload_of(key)):
            writer.idle(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    writer.close()
    assert wrong == [] and min(found) > 0 and store.counters.errors == 0
    assert store.counters.written > 300 and NBYTES // 2 < max(most) <= NBYTES

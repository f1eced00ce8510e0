# SPDX-License-Identifier: Apache-2.0
"""The disk store alone: round trips, its bound, second chances, identities, the lock."""

from __future__ import annotations

import ast
import logging
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sglang_diffxkv.offload.disk.identity import digest, identity_of, subfolder
from sglang_diffxkv.offload.disk.lock import FolderInUse, FolderLock
from sglang_diffxkv.offload.disk.segments import VERSION, Segment
from sglang_diffxkv.offload.disk.store import DiskStore, segment_bytes
from tests.support.disk import bytes_in, crash, key_of, put, segments, sizes_when_written

ROOT = Path(__file__).resolve().parents[2]
NBYTES = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path, NBYTES, "model")


def fresh(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 256, size, dtype=np.uint8)


def test_what_was_put_is_got_before_and_after_a_restart(store: DiskStore, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    sizes = [0, 1, 55, 4096, *rng.integers(1, 60_000, 8).tolist()]
    kept = {rng.bytes(16): (rng.bytes(size % 97), fresh(rng, size)) for size in sizes}
    for key, (metadata, payload) in kept.items():
        assert not store.contains(key) and store.get(key) is None
        store.put(key, metadata, payload)
    for end in (DiskStore.close, crash, DiskStore.close):
        for key, (metadata, payload) in kept.items():
            assert store.contains(key)
            record = store.get(key)
            assert record is not None and record[:2] == (key, metadata)
            assert (record.payload == payload).all()
        end(store)
        store = DiskStore(tmp_path, NBYTES, "model")
    assert store.counters.pages == len(sizes) and store.counters.errors == 0


def test_a_payload_comes_into_the_buffer_that_is_handed_in(store: DiskStore) -> None:
    key, payload = os.urandom(16), fresh(np.random.default_rng(), 1001)
    store.put(key, b"m", payload)
    large, small = np.full(2000, 7, np.uint8), np.full(1000, 7, np.uint8)
    found, other = store.get(key, large), store.get(key, small)
    assert found is not None and found.payload.base is large and (large[1001:] == 7).all()
    assert other is not None and (other.payload == payload).all() and (small == 7).all()


def test_putting_twice_writes_once(store: DiskStore, tmp_path: Path) -> None:
    put(store, 1)
    size = bytes_in(tmp_path)
    put(store, 1)
    assert bytes_in(tmp_path) == size and store.counters.written == 1


@pytest.mark.parametrize("length", [0, 15, 17])
def test_keys_have_16_bytes(store: DiskStore, length: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        store.put(bytes(length), b"", b"")


def test_a_put_is_one_write_and_a_get_one_read(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)
    calls: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls.append(name)
            return real(*args)

        return call

    for name in ("pwritev", "pwrite", "write", "preadv", "pread", "read", "fsync", "fdatasync"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    store.get(put(store, 2))
    assert calls == ["pwritev", "preadv"]


def test_files_are_never_more_than_the_bound(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = sizes_when_written(tmp_path, monkeypatch)
    sizes = random.Random(os.urandom(8))
    for number in range(600):
        store.put(key_of(number), b"", bytes(int(sizes.paretovariate(1) * 500) % NBYTES))
        assert bytes_in(tmp_path) <= store.counters.bytes_in_use <= NBYTES
        store.get(key_of(sizes.randrange(number + 1)))
    store.close()
    assert max(written) <= NBYTES
    smaller = DiskStore(tmp_path, NBYTES // 3, "model")
    assert 0 < bytes_in(tmp_path) <= NBYTES // 3 and smaller.counters.pages > 0


def test_a_record_that_no_segment_has_room_for(store: DiskStore) -> None:
    large = bytes(NBYTES // 2)
    assert len(large) > segment_bytes(NBYTES)
    store.put(key_of(0), b"", large)
    put(store, 1)
    store.put(key_of(2), b"", bytes(NBYTES))
    assert store.contains(key_of(0)) and store.contains(key_of(1))
    assert not store.contains(key_of(2)) and store.counters.dropped == 1


def test_what_was_read_outlives_what_was_not(store: DiskStore) -> None:
    removed: list[bytes] = []
    store.on_removed = removed.extend
    wanted = [key_of(number) for number in (0, 9, 17)]
    for number in range(1000):
        store.put(key_of(number), b"", bytes(4000))
        for key in wanted:
            if number > 20:
                assert store.get(key) is not None
    kept = {number for number in range(1000) if store.contains(key_of(number))}
    assert {0, 9, 17} <= kept and kept - {0, 9, 17} == set(range(1003 - len(kept), 1000))
    assert sorted(removed) == sorted(key_of(n) for n in range(1000) if n not in kept)


def test_a_second_chance_is_one(store: DiskStore) -> None:
    there = []
    for number in range(800):
        store.put(key_of(number), b"", bytes(4000))
        if number == 0:
            assert store.get(key_of(0)) is not None
        there.append(store.contains(key_of(0)))
    assert there[400] and there[:400] == [True] * 400 and not there[-1]


def test_where_all_is_read_writing_goes_on(store: DiskStore) -> None:
    for number in range(600):
        store.put(key_of(number), b"", bytes(4000))
        for known in range(max(0, number - 240), number + 1, 1 + number % 7):
            store.get(key_of(known))
    assert store.counters.written == 600 and store.contains(key_of(599))
    assert store.counters.bytes_in_use <= NBYTES


def test_clearing(store: DiskStore, tmp_path: Path) -> None:
    for number in range(100):
        put(store, number)
    store.clear()
    assert bytes_in(tmp_path) == 0 and store.counters.pages == 0 and store.get(key_of(1)) is None
    assert store.contains(put(store, 1))


def test_after_close_nothing_is_there(store: DiskStore) -> None:
    put(store, 1)
    store.close()
    store.close()
    assert store.get(put(store, 2)) is None and store.get(key_of(1)) is None
    assert store.counters.dropped == 1


def test_a_second_process_is_refused_in_one_line(store: DiskStore, tmp_path: Path) -> None:
    with pytest.raises(FolderInUse) as refused:
        DiskStore(tmp_path, NBYTES, "model")
    assert str(refused.value).endswith(f"is in use by process {os.getpid()}")
    assert "\n" not in str(refused.value)
    store.close()
    DiskStore(tmp_path, NBYTES, "model").close()


def test_who_looks_at_a_folder_for_a_moment_stops_no_start(tmp_path: Path) -> None:
    DiskStore(tmp_path, NBYTES, "model").close()
    looking = FolderLock(subfolder(tmp_path, digest("model")))
    threading.Timer(0.1, looking.release).start()
    DiskStore(tmp_path, NBYTES, "model").close()


def test_what_is_served_now_goes_last(tmp_path: Path) -> None:
    def filled(identity: str, count: int) -> DiskStore:
        store = DiskStore(tmp_path, NBYTES, identity)
        for number in range(count):
            store.put(key_of(number), b"", bytes(4000))
        return store

    filled("before", 200).close()
    alive = filled("another rank", 20)
    (tmp_path / "a file of theirs").write_bytes(bytes(5000))
    store = filled("now", 20)
    assert bytes_in(subfolder(tmp_path, digest("before"))) > NBYTES // 2
    for number in range(235):
        store.put(key_of(number), b"", bytes(4000))
        assert store.counters.bytes_in_use <= NBYTES
    assert bytes_in(subfolder(tmp_path, digest("before"))) == 0
    assert store.counters.pages == 235 and alive.get(key_of(0)) is not None
    assert (tmp_path / "a file of theirs").stat().st_size == 5000


def test_an_abandoned_folder_that_is_served_again_is_left(tmp_path: Path) -> None:
    first = DiskStore(tmp_path, NBYTES, "first")
    for number in range(200):
        first.put(key_of(number), b"", bytes(4000))
    first.close()
    store = DiskStore(tmp_path, NBYTES, "second")
    first = DiskStore(tmp_path, NBYTES, "first")
    for number in range(300):
        store.put(key_of(number), b"", bytes(4000))
    assert all(first.get(key_of(number)) for number in range(200))


def test_files_of_other_names_are_left(store: DiskStore, tmp_path: Path) -> None:
    own = subfolder(tmp_path, digest("model"))
    others = [own / "notes", own / "1.segment", own / f"{3:016x}.segment.bak"]
    for other in others:
        other.write_bytes(b"theirs")
    (own / f"{9:016x}.segment").symlink_to(own / "notes")
    put(store, 1)
    store.close()
    store = DiskStore(tmp_path, NBYTES, "model")
    store.clear()
    assert all(other.read_bytes() == b"theirs" for other in others)
    assert (own / f"{9:016x}.segment").is_symlink()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a segment"),
        (b"GIF89a" + bytes(500), "not a segment"),
        ("identity", "of another model or other settings"),
        ("version", f"of format {VERSION - 1}, not {VERSION}"),
    ],
)
def test_a_foreign_file_is_discarded_with_one_line(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | str,
    reason: str,
) -> None:
    store = DiskStore(tmp_path, NBYTES, "model")
    put(store, 1)
    store.close()
    path = subfolder(tmp_path, digest("model")) / f"{7:016x}.segment"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if content == "version":
            monkeypatch.setattr("sglang_diffxkv.offload.disk.segments.VERSION", VERSION - 1)
        other = Segment.create(path, digest("other" if content == "identity" else "model"))
        other.append(key_of(2), b"", memoryview(b"wrong"))
        other.seal()
        monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        store = DiskStore(tmp_path, NBYTES, "model")
    assert caplog.messages == [f"disk: {path}: discarded: {reason}"] and not path.exists()
    assert store.contains(key_of(1)) and not store.contains(key_of(2))


def test_an_identity_is_one_text_whatever_the_order() -> None:
    assert identity_of({"b": 1, "a": [2]}) == identity_of({"a": [2], "b": 1}) == '{"a":[2],"b":1}'
    assert digest("x") == digest(b"x") != digest("y")


def test_only_the_owner_may_read(store: DiskStore, tmp_path: Path) -> None:
    put(store, 1)
    (path,) = segments(tmp_path)
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        DiskStore(tmp_path / "file", NBYTES, "model")


def test_it_is_a_plain_library() -> None:
    allowed = {"numpy", "xxhash", "typing_extensions"}
    for path in (ROOT / "sglang_diffxkv/offload/disk").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("sglang_diffxkv.offload.disk") or (
                    name.split(".")[0] in allowed | sys.stdlib_module_names
                ), f"{path} imports {name}"

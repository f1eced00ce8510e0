# SPDX-License-Identifier: Apache-2.0
"""Random histories of a disk store, its files damaged in between: never a wrong byte."""

from __future__ import annotations

import random
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_diffxkv.offload.disk import segments as segments_module
from sglang_diffxkv.offload.disk.record import record_bytes
from sglang_diffxkv.offload.disk.store import DiskStore
from tests.support.disk import bytes_in, crash, is_right, key_of, put, segments

START_BYTES = segments_module._START
NUMBERS = st.integers(0, 40)
PLACES = st.floats(0, 1, exclude_max=True)


class Histories(RuleBasedStateMachine):
    """While no file was damaged, the store has just the keys that the model has; unless somebody
    made files grow since it was opened, they are bounded."""

    @initialize(nbytes=st.integers(2_000, 60_000))
    def begin(self, nbytes: int) -> None:
        self.folder, self.nbytes = Path(tempfile.mkdtemp()), nbytes
        self.model: set[bytes] = set()
        self.damaged = self.grown = False
        self.other = self._other_identity()
        self._open()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(number=NUMBERS)
    def put(self, number: int) -> None:
        dropped = self.store.counters.dropped
        try:
            key = put(self.store, number)
        except FileExistsError:  # a file that was added has the name of the next segment
            assert self.grown
            return
        if self.store.counters.dropped == dropped:
            self.model.add(key)

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        key = key_of(number)
        record = self.store.get(key)
        assert record is None or (record.key == key and is_right(record))
        assert self.damaged or (record is not None) == (key in self.model)

    @rule(end=st.sampled_from([DiskStore.close, crash]))
    def reopen(self, end: object) -> None:
        end(self.store)  # type: ignore[operator]
        self.grown = False
        before, self.model = self.model, set()
        self._open()
        found = {key_of(number) for number in range(41) if self.store.contains(key_of(number))}
        assert self.damaged or found == before
        self.model |= found

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.model.clear()

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES, place=PLACES, bit=st.integers(0, 7))
    def flip_a_bit(self, which: float, place: float, bit: int) -> None:
        data = bytearray((path := self._segment(which)).read_bytes())
        if data:
            data[int(place * len(data))] ^= 1 << bit
            self._damage(path, data)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES, place=PLACES, zeros=st.booleans())
    def lose_the_end(self, which: float, place: float, zeros: bool) -> None:
        data = (path := self._segment(which)).read_bytes()
        kept = data[: int(place * len(data))]
        self._damage(path, kept.ljust(len(data), b"\0") if zeros else kept)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES, place=PLACES, seed=st.integers(0, 1 << 32))
    def write_noise(self, which: float, place: float, seed: int) -> None:
        data = bytearray((path := self._segment(which)).read_bytes())
        start = int(place * len(data))
        noise = random.Random(seed).randbytes(min(200, len(data) - start))
        data[start : start + len(noise)] = noise
        self._damage(path, data)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES, other=PLACES)
    def swap(self, which: float, other: float) -> None:
        one, two = self._segment(which), self._segment(other)
        first, second = one.read_bytes(), two.read_bytes()
        self._damage(one, second)
        self._damage(two, first)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES, place=PLACES, source=PLACES)
    def move_a_piece(self, which: float, place: float, source: float) -> None:
        data = bytearray((path := self._segment(which)).read_bytes())
        start, end = int(place * len(data)), int(source * len(data))
        piece = data[end : end + 300]
        data[start : start + len(piece)] = piece
        self._damage(path, data)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES)
    def put_anothers_in_its_place(self, which: float) -> None:
        self._damage(self._segment(which), self.other)

    @rule(number=st.integers(0, (1 << 64) - 1), data=st.binary(max_size=200))
    def add_a_file(self, number: int, data: bytes) -> None:
        path = self.store._folder / f"{number:016x}.segment"
        if not path.exists():
            self.grown = True
            self._damage(path, data)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES)
    def make_it_an_old_version(self, which: float) -> None:
        data = bytearray((path := self._segment(which)).read_bytes())
        if len(data) > 16:
            struct.pack_into("<Q", data, 8, segments_module.VERSION - 1)
            self._damage(path, data)

    @precondition(lambda self: bool(segments(self.folder)))
    @rule(which=PLACES)
    def delete(self, which: float) -> None:
        self._segment(which).unlink()
        self.damaged = True

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "folder"):
            assert self.grown or bytes_in(self.folder) <= self.nbytes
            assert self.store.counters.bytes_in_use <= self.nbytes

    def _open(self) -> None:
        self.store = DiskStore(self.folder, self.nbytes, "model")
        self.store.on_removed = self.model.difference_update

    def _segment(self, which: float) -> Path:
        found = segments(self.folder)
        return found[int(which * len(found))]

    def _damage(self, path: Path, data: bytes | bytearray) -> None:
        before = path.read_bytes() if path.exists() else b""
        self.grown |= len(data) > len(before)
        if not path.exists() or before != data:
            with path.open("r+b" if path.exists() else "wb") as file:  # the same file, if there
                file.write(data)
                file.truncate()
            self.damaged = True

    def _other_identity(self) -> bytes:
        """A segment of another identity, with our keys and other payloads."""
        with tempfile.TemporaryDirectory() as folder:
            store = DiskStore(Path(folder), self.nbytes * 10, "other")
            for number in range(5):
                store.put(key_of(number), b"", b"wrong")
            store.close()
            return segments(Path(folder))[0].read_bytes()


Histories.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestHistories = pytest.mark.slow(Histories.TestCase)


@pytest.mark.parametrize("sealed", [True, False])
def test_every_byte_may_be_damaged_or_the_last(tmp_path: Path, sealed: bool) -> None:
    """All truncations and a flip in each byte of a segment of a few records."""
    store = DiskStore(tmp_path, 1 << 20, "model")
    keys = [put(store, number, most=60) for number in range(6)]
    (store.close if sealed else lambda: crash(store))()
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    source = random.Random(sealed)
    flips = [
        whole[:at] + bytes([whole[at] ^ source.randrange(1, 256)]) + whole[at + 1 :]
        for at in range(len(whole))
    ]
    for damaged in [*flips, *(whole[:at] for at in range(len(whole)))]:
        for old in segments(tmp_path):
            old.unlink()
        path.write_bytes(damaged)
        store = DiskStore(tmp_path, 1 << 20, "model")
        records = [record for key in keys if (record := store.get(key)) is not None]
        assert all(is_right(record, most=60) for record in records)
        if len(damaged) < len(whole):
            assert store.counters.errors == 0, "a torn end is cut off at the start"
        if sealed and len(damaged) == len(whole) and damaged[:START_BYTES] == whole[:START_BYTES]:
            assert len(records) >= 5, "the index tells where the others are"
        store.close()


def test_records_that_changed_places(tmp_path: Path) -> None:
    """Each is whole, and of this identity, but not what the index says."""
    store = DiskStore(tmp_path, 1 << 20, "model")
    for number in range(3):
        store.put(key_of(number), b"", bytes([number]) * 1000)
    size = record_bytes(0, 1000)
    store.close()
    (path,) = segments(tmp_path)
    data = path.read_bytes()
    first, second = data[START_BYTES:][:size], data[START_BYTES + size :][:size]
    path.write_bytes(data[:START_BYTES] + second + first + data[START_BYTES + 2 * size :])
    store = DiskStore(tmp_path, 1 << 20, "model")
    found = [store.get(key_of(number)) for number in range(3)]
    assert found[:2] == [None, None] and found[2] is not None and store.counters.errors == 2

# SPDX-License-Identifier: Apache-2.0
"""The disk behind a pool: what is written to it, and what is read from it for those who wait."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang_diffxkv.offload.backup import Backup
from sglang_diffxkv.offload.disk.identity import digest, subfolder
from sglang_diffxkv.offload.disk.reader import Reader, Records
from sglang_diffxkv.offload.disk.store import DiskStore
from sglang_diffxkv.offload.disk.writer import Writer
from sglang_diffxkv.offload.events import LevelEvents
from sglang_diffxkv.offload.means import SavedMeans
from sglang_diffxkv.offload.prefetch import Prefetcher
from sglang_diffxkv.offload.records import PageForm
from sglang_diffxkv.pool.offload import host_of
from sglang_diffxkv.pool.payload import PagePayload
from sglang_diffxkv.pool.store import PageStore

log = logging.getLogger(__name__)

BUFFER_SHARE = 1 / 4
"""Of the host's frames: how much more memory is taken by what waits to be written, and as much
again by what was read."""


class DiskLevel:
    """Attributes:
    backup, prefetcher: the two directions.
    events: who is told what becomes of pages.
    is_on: False once it has been switched off; then nothing is on disk, and nothing gets there.
    """

    def __init__(
        self, store: PageStore, events: LevelEvents, folder: Path, nbytes: int, identity: str
    ) -> None:
        """``folder`` and what follows: as `DiskStore` takes them, and raises for."""
        self.is_on = True
        self._store, self.events = store, events
        self._disk = DiskStore(folder, nbytes, identity)
        path = subfolder(folder, digest(identity)) / "key_means"
        self._means = SavedMeans(path, store.key_means, store.layout.rotates)
        found = self._disk.counters.pages
        if not self._means.restore() and found:
            log.warning("disk: %d pages are discarded: the means of their keys are gone", found)
            self._disk.clear()
        self._disk.on_written, self._disk.on_removed = events.backed_up, events.dropped_from_disk
        buffer = int(store.ledger.host_total * store.layout.frame_bytes * BUFFER_SHARE)
        self._writer = Writer(self._disk, buffer)
        self._reader = Reader(self._disk)
        self.backup = Backup(store, self._disk, self._writer, self._means, events)
        self.prefetcher = Prefetcher(self._disk, self._reader, self._decode, store.agree, buffer)
        host_of(store).on_offload.append(self.backup.write)

    @property
    def stats(self) -> dict[str, Any]:
        """Pages unless named bytes; counts since the start."""
        found = self.prefetcher
        return self._disk.counters._asdict() | {"hits": found.hits, "misses": found.misses}

    def clear(self) -> None:
        """Delete what is on disk; raises OSError."""
        self.prefetcher.cancel_all()
        self._writer.clear()

    def switch_off(self, reason: str) -> None:
        """Delete what is on disk, and leave it so: pages are no longer what their keys say."""
        if self.is_on:
            self.is_on = False
            host_of(self._store).on_offload.remove(self.backup.write)
            log.warning("disk: switched off until the server starts again: %s", reason)
            self.clear()

    def wait_for_writes(self, seconds: float) -> None:
        """Until all that was offered is written, or so long."""
        self._writer.idle(seconds)

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
        self._disk.close()

    def _decode(self, records: Records) -> list[PagePayload]:
        if self._means.id is None:
            return []
        form, found = PageForm.of(self._store, self._means.id), []
        for record in records:
            page = None if record is None else form.payload(record)
            if page is None:
                break
            found.append(page)
        return found

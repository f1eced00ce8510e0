# SPDX-License-Identifier: Apache-2.0
"""Which sealed pages are written to disk: those that leave the device, and at idle the others."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from sglang_diffxkv.offload.disk.store import DiskStore
from sglang_diffxkv.offload.disk.writer import Writer
from sglang_diffxkv.offload.events import LevelEvents
from sglang_diffxkv.offload.keys import from_numbers
from sglang_diffxkv.offload.means import SavedMeans
from sglang_diffxkv.offload.records import PageForm
from sglang_diffxkv.pool.payload import read_payload
from sglang_diffxkv.pool.store import PageStore

log = logging.getLogger(__name__)

WINDOW, BATCH = 4096, 128
"""Pages that are looked at, and written, at a time when nothing else is to be done: a request that
comes waits for that."""


class _Lacking(NamedTuple):
    """Pages that the disk lacks; int64 [N], and their keys."""

    pages: torch.Tensor
    keys: list[bytes]

    def first(self, count: int) -> _Lacking:
        return _Lacking(self.pages[:count], self.keys[:count])


class Backup:
    """Attributes:
    is_behind: whether the last round over what is cached is not finished.
    """

    def __init__(
        self,
        store: PageStore,
        disk: DiskStore,
        writer: Writer,
        means: SavedMeans,
        events: LevelEvents,
    ) -> None:
        self._store, self._disk, self._writer, self._means = store, disk, writer, means
        self._events = events
        self._hand, self._left, self._sealed = 0, 0, 0

    @property
    def is_behind(self) -> bool:
        return self._left > 0

    def write(self, pages: torch.Tensor) -> None:
        """Offer those of ``pages`` (int64 [N], sealed or on the host) that the disk lacks.

        As many as there is room for to wait: the others are not even read. Waits for the device.
        """
        lacking = self._lacking(pages)
        fitting = self._fitting(lacking)
        self._disk.counts.add("dropped", len(lacking.keys) - len(fitting.keys))
        self._offer(fitting)

    def rest(self) -> None:
        """Nothing runs: go on with a round over what is cached, or begin one if pages were sealed
        since the last."""
        sealed = self._store.counters.sealed
        if not self._left and sealed != self._sealed:
            self._sealed, self._left = sealed, self._store.directory.num_pages
        if self._left and self._writer.idle():
            self._go_on()

    def _go_on(self) -> None:
        d = self._store.directory
        window = slice(self._hand + 1, min(self._hand + WINDOW, d.num_pages) + 1)
        cached = (d.sealed[window] | d.on_host[window]).nonzero().flatten() + window.start
        lacking = self._lacking(cached)
        offered = self._offer(self._fitting(lacking.first(BATCH)))
        if lacking.keys and not offered:
            self._left = 0  # until more was sealed: nothing can be written now
        elif offered == len(lacking.keys):
            self._left = max(0, self._left - (window.stop - window.start))
            self._hand = (window.stop - 1) % d.num_pages

    def _lacking(self, pages: torch.Tensor) -> _Lacking:
        numbers = self._store.directory.key[pages].cpu().numpy()
        keys = list(enumerate(from_numbers(numbers)))
        found = [(i, key) for i, key in keys if key is not None and not self._disk.contains(key)]
        return _Lacking(pages[[i for i, _ in found]], [key for _, key in found])

    def _fitting(self, lacking: _Lacking) -> _Lacking:
        """The first of them, which the writer has room for."""
        frames = self._store.directory.num_frames[lacking.pages].cumsum(0)
        nbytes = frames.cpu() * self._store.layout.frame_bytes
        return lacking.first(int((nbytes <= self._writer.room).sum()))

    def _offer(self, lacking: _Lacking) -> int:
        """How many of them, from the first on, will be written."""
        form = self._form() if lacking.keys else None
        if form is None:
            return 0
        payload = read_payload(self._store, lacking.pages)
        for i, (key, page) in enumerate(zip(lacking.keys, payload, strict=True)):
            self._events.backing_up([key])
            if not self._writer.offer(key, form.metadata(page), page.frames.numpy()):
                self._events.dropped_from_disk([key])
                return i
        return len(payload)

    def _form(self) -> PageForm | None:
        """None: the means of keys are not known, or cannot be saved."""
        try:
            known = self._means.save()
        except OSError as error:
            log.warning("disk: the means of keys cannot be saved: %s", error)
            return None
        return PageForm.of(self._store, self._means.id) if known else None

# SPDX-License-Identifier: Apache-2.0
"""Host-side byte accounting: what can still be promised, without asking the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Share(NamedTuple):
    """Some sealed pages, and the frames that they are charged for."""

    pages: int
    frames: int


@dataclass
class Ledger:
    """Raw pages and frames, as promised and as used. All counts are pages or frames.

    An open page owns one raw page and has a promise of ``worst_frames`` frames, the most that
    sealing it can take (the layers' byte caps). Sealing trades both for the frames really used,
    so a promise that was kept can never fail, and what a page did not use is credited back. A page
    that turns out to be a lossless request's is never sealed, and gives its promise back.

    Frames used are those charged for (`pool.ranks`), at least as many as pages have on this rank.
    """

    raw_total: int
    frames_total: int
    worst_frames: int
    open_pages: int = 0
    sealed_pages: int = 0
    frames_used: int = 0
    raw_only: int = 0
    """Of the open pages, those that will never be sealed."""
    demoted_pages: int = 0
    """Of the sealed ones."""
    demoted_frames: int = 0
    """Of those used."""

    @property
    def raw_free(self) -> int:
        return self.raw_total - self.open_pages

    @property
    def frames_free(self) -> int:
        """Frames neither used by a sealed page nor promised to an open one."""
        return self.frames_total - self.frames_used - self.unsealed_pages * self.worst_frames

    @property
    def unsealed_pages(self) -> int:
        """Open pages that will be sealed, or freed before."""
        return self.open_pages - self.raw_only

    @property
    def frame_headroom(self) -> int:
        """Pages that the frames allow to open now."""
        return self.frames_free // self.worst_frames

    @property
    def headroom(self) -> int:
        """Pages that may be opened now."""
        return min(self.raw_free, self.frame_headroom)

    @property
    def largest_sequence(self) -> int:
        """Pages that one sequence may hold in an otherwise empty pool, whatever its content."""
        return self.frames_total // self.worst_frames

    @property
    def fresh_pages(self) -> int:
        """Sealed pages that were never demoted."""
        return self.sealed_pages - self.demoted_pages

    @property
    def fresh_mean(self) -> float:
        """Frames per fresh page; 0 where there is none."""
        return (self.frames_used - self.demoted_frames) / max(1, self.fresh_pages)

    def mean_frames(self, expected: float) -> float:
        """Frames that a page takes when it is sealed, as measured, or ``expected`` from too few."""
        return expected if self.fresh_pages < 16 else max(1.0, self.fresh_mean)

    def frames_of_evicted(self, pages: float) -> float:
        """Frames that evicting ``pages`` frees, about: demoted ones are cold, and go first."""
        demoted = min(pages, self.demoted_pages)
        demoted_mean = self.demoted_frames / max(1, self.demoted_pages)
        return demoted * demoted_mean + (pages - demoted) * self.fresh_mean

    def open(self, pages: int) -> None:
        if pages > self.headroom:
            raise RuntimeError(f"{pages} pages asked for, {self.headroom} can be promised")
        self.open_pages += pages

    def seal(self, pages: int, frames: int) -> None:
        if pages > self.unsealed_pages or frames > pages * self.worst_frames:
            raise RuntimeError(f"sealing {pages} pages into {frames} frames breaks a promise")
        self.open_pages -= pages
        self.sealed_pages += pages
        self.frames_used += frames

    def demote(self, fresh: Share, frames: int) -> None:
        """Demoted pages, ``fresh`` of them for the first time, gave ``frames`` back."""
        self.demoted_pages += fresh.pages
        self.demoted_frames += fresh.frames - frames
        self.frames_used -= frames

    def release(self, open_pages: int, fresh: Share, demoted: Share) -> None:
        """Open pages, and fresh and demoted sealed ones, were freed."""
        self.open_pages -= open_pages
        self.sealed_pages -= fresh.pages + demoted.pages
        self.frames_used -= fresh.frames + demoted.frames
        self.demoted_pages -= demoted.pages
        self.demoted_frames -= demoted.frames

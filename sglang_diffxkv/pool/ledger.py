# SPDX-License-Identifier: Apache-2.0
"""Host-side byte accounting: what can still be reserved, without asking the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_diffxkv.kernels.layout import PAGE_TOKENS


class Share(NamedTuple):
    """Some sealed pages, and the frames allocated to them."""

    pages: int
    frames: int


class OpenShare(NamedTuple):
    """Some open pages: how many, how many of them are full and may be sealed, how many are never
    compressed, and the tokens in them."""

    pages: int
    full: int
    never_compressed: int
    tokens: int


@dataclass
class Ledger:
    """Raw pages and frames, as reserved and as used. All counts are pages or frames.

    An open page owns one raw page and reserves ``worst_frames`` frames, the most that sealing it
    can take (the layers' byte caps). Sealing trades both for the frames allocated, so it can never
    fail for lack of frames, and those that a page reserved and did not take are released. A page
    that turns out to be a lossless request's is never compressed, and its reservation is released.

    Frames used are those allocated (`pool.ranks`), at least as many as pages have on this rank.
    Pages on the host are counted apart from sealed ones, with the host's frames that they have.
    """

    raw_total: int
    frames_total: int
    worst_frames: int
    open_pages: int = 0
    full_pages: int = 0
    """Of the open pages, those that are full and may be sealed."""
    open_tokens: int = 0
    """Committed tokens in open pages."""
    sealed_pages: int = 0
    frames_used: int = 0
    never_compressed: int = 0
    """Of the open pages, those of lossless requests, which will never be sealed."""
    demoted_pages: int = 0
    """Of the sealed ones."""
    demoted_frames: int = 0
    """Of those used."""
    host_total: int = 0
    """Frames in host memory."""
    host_used: int = 0
    host_pages: int = 0

    @property
    def raw_free(self) -> int:
        return self.raw_total - self.open_pages

    @property
    def frames_free(self) -> int:
        """Frames neither allocated to a sealed page nor reserved for an open one."""
        return self.frames_total - self.frames_used - self.unsealed_pages * self.worst_frames

    @property
    def host_free(self) -> int:
        return self.host_total - self.host_used

    @property
    def unsealed_pages(self) -> int:
        """Open pages that will be sealed, or freed before."""
        return self.open_pages - self.never_compressed

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
    def tokens_held(self) -> int:
        """Tokens of open and sealed pages, not of those on the host."""
        return self.open_tokens + self.sealed_pages * PAGE_TOKENS

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
            raise RuntimeError(f"{pages} pages asked for, {self.headroom} can be opened")
        self.open_pages += pages

    def commit(self, tokens: int, full: int) -> None:
        """Tokens in open pages are committed, and with them ``full`` of the pages are full."""
        self.open_tokens += tokens
        self.full_pages += full

    def never_compress(self, pages: int, full: int) -> None:
        """Open pages, ``full`` of them full, turn out to be lossless requests'."""
        self.never_compressed += pages
        self.full_pages -= full

    def seal(self, pages: int, frames: int) -> None:
        if pages > self.unsealed_pages or frames > pages * self.worst_frames:
            raise RuntimeError(
                f"sealing {pages} pages into {frames} frames exceeds what was reserved"
            )
        self.open_pages -= pages
        self.full_pages -= pages
        self.open_tokens -= pages * PAGE_TOKENS
        self.sealed_pages += pages
        self.frames_used += frames

    def demote(self, fresh: Share, frames: int) -> None:
        """Demoted pages, ``fresh`` of them for the first time, released ``frames``."""
        self.demoted_pages += fresh.pages
        self.demoted_frames += fresh.frames - frames
        self.frames_used -= frames

    def offload(self, fresh: Share, demoted: Share) -> None:
        """Fresh and demoted sealed pages went to the host."""
        pages, frames = fresh.pages + demoted.pages, fresh.frames + demoted.frames
        if frames > self.host_free:
            raise RuntimeError(f"{frames} frames to offload, {self.host_free} free on the host")
        self._give_back(fresh, demoted)
        self.take_in_host(Share(pages, frames))

    def take_in_host(self, share: Share) -> None:
        """Pages are on the host now."""
        self.host_pages += share.pages
        self.host_used += share.frames

    def load_back(self, fresh: Share, demoted: Share) -> None:
        """Fresh and demoted pages came back from the host."""
        pages, frames = fresh.pages + demoted.pages, fresh.frames + demoted.frames
        if frames > self.frames_free:
            raise RuntimeError(f"{frames} frames to load back, {self.frames_free} free")
        self.host_pages -= pages
        self.host_used -= frames
        self.sealed_pages += pages
        self.frames_used += frames
        self.demoted_pages += demoted.pages
        self.demoted_frames += demoted.frames

    def release(
        self, opened: OpenShare, fresh: Share, demoted: Share, on_host: Sequence[Share] = ()
    ) -> None:
        """Open pages, fresh and demoted sealed ones, and pages on the host were freed."""
        self.open_pages -= opened.pages
        self.full_pages -= opened.full
        self.never_compressed -= opened.never_compressed
        self.open_tokens -= opened.tokens
        self.host_pages -= sum(share.pages for share in on_host)
        self.host_used -= sum(share.frames for share in on_host)
        self._give_back(fresh, demoted)

    def _give_back(self, fresh: Share, demoted: Share) -> None:
        self.sealed_pages -= fresh.pages + demoted.pages
        self.frames_used -= fresh.frames + demoted.frames
        self.demoted_pages -= demoted.pages
        self.demoted_frames -= demoted.frames

    def problems(self) -> list[str]:
        """What cannot be, whatever the pages are: in O(1), without the device."""
        parts = {
            "full pages": (self.full_pages, self.unsealed_pages),
            "never compressed pages": (self.never_compressed, self.open_pages),
            "open pages": (self.open_pages, self.raw_total),
            "demoted pages": (self.demoted_pages, self.sealed_pages),
            "demoted frames": (self.demoted_frames, self.frames_used),
            "frames reserved and used": (self.frames_total - self.frames_free, self.frames_total),
            "frames on the host": (self.host_used, self.host_total),
            "pages on the host": (self.host_pages, self.host_pages),
            "tokens in full pages": (self.full_pages * PAGE_TOKENS, self.open_tokens),
            "tokens in open pages": (self.open_tokens, self.open_pages * PAGE_TOKENS),
        }
        return [
            f"ledger: {part} {name}, of {whole}"
            for name, (part, whole) in parts.items()
            if not 0 <= part <= whole
        ]

# SPDX-License-Identifier: Apache-2.0
"""What fits: estimates from counters alone, without looking at pages or waiting for the device."""

from __future__ import annotations

from typing import Any

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.shared_pages import distinct_pages
from sglang_diffxkv.pool.store import PageStore

MIN_CHUNK_PAGES = 3
"""A chunk is not cut shorter than this, its tail's page included: each costs a forward pass."""


class Capacity:
    """Of one pool: for admission, and for what SGLang publishes.

    Attributes:
        drafts: slots that SGLang allocates behind a request's tokens, for drafts to be verified.
    """

    drafts = 0

    def __init__(self, store: PageStore, running: RunningRequests) -> None:
        self._store, self._ledger, self._running = store, store.ledger, running

    @property
    def tokens_reservable(self) -> int:
        """Tokens that frames allow to open now, raw pages aside."""
        return self._ledger.frame_headroom * PAGE_TOKENS

    @property
    def tokens_with_raw_page(self) -> int:
        """Tokens that there are raw pages for, once every page is sealed that may be."""
        return (self._ledger.raw_free + self._ledger.full_pages) * PAGE_TOKENS

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that surely fits alone, sealed at its worst.

        Two pages are left: one for what is generated, one for drafts to be verified, of which
        SGLang allocates at most a page.
        """
        pages = min(self._store.sizes.device_pages, self._ledger.largest_sequence)
        return (pages - 2) * PAGE_TOKENS

    @property
    def lossless_pages(self) -> int:
        """Pages that running lossless requests may hold between them, at their longest.

        The other raw pages are left to the pages that everyone else is writing.
        """
        return self._ledger.raw_total - MIN_CHUNK_PAGES

    def tokens_when_sealed(self, evictable_tokens: int) -> float:
        """Tokens that fit beside those held, if all get sealed and ``evictable_tokens`` go."""
        ledger = self._ledger
        mean = ledger.mean_frames(self._store.sizes.expected_frames)
        free = ledger.frames_total - ledger.frames_used - ledger.unsealed_pages * mean
        evictable = self._evictable_pages(evictable_tokens)
        sealed = min(evictable, ledger.sealed_pages)
        free += ledger.frames_of_evicted(sealed)
        return (free / mean + evictable - sealed) * PAGE_TOKENS

    def frames_reclaimable(self, evictable_tokens: int) -> float:
        """Frames that come free by sealing every full page and evicting ``evictable_tokens``."""
        ledger = self._ledger
        full = ledger.full_pages
        evicted = min(self._evictable_pages(evictable_tokens), ledger.sealed_pages + full)
        freed = ledger.frames_of_evicted(evicted)
        return full * (ledger.worst_frames - ledger.fresh_mean) + freed

    def _evictable_pages(self, evictable_tokens: int) -> float:
        """Those of them that take memory on the device."""
        return max(0.0, evictable_tokens / PAGE_TOKENS - self._ledger.host_pages)

    def tokens_openable(self, evictable_tokens: int) -> int:
        """Tokens that frames can be reserved for after all that can be reclaimed is."""
        free = self._ledger.frames_free + self.frames_reclaimable(evictable_tokens)
        return int(free / self._ledger.worst_frames + 1e-6) * PAGE_TOKENS

    def usage(self, tree_cache: Any) -> float:
        """Share of the scarcer of frames and raw pages that requests hold, from 0 to 1.

        Looks at the tree's nodes above running lossless requests, too.
        """
        ledger = self._ledger
        free = ledger.frames_free + self.frames_reclaimable(tree_cache.evictable_size())
        held = distinct_pages(tree_cache, self._running.lossless)
        raw = ledger.open_pages - ledger.full_pages - max(0, ledger.never_compressed - held)
        used = max(1 - free / ledger.frames_total, raw / ledger.raw_total)
        return min(1.0, max(0.0, used))

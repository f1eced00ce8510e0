# SPDX-License-Identifier: Apache-2.0
"""Making room, from what costs least to what costs most.

Seal cold pages, offload, demote, evict, seal windows, too.
What is offloaded comes back as it was; demotion is for good, so it waits until the host is full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.capacity import Capacity
from sglang_diffxkv.pool.demotion import demote_cold
from sglang_diffxkv.pool.held import held_pages
from sglang_diffxkv.pool.offload import load_back, offload_cold
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore

RAW_WINDOWS = 4
"""How many windows of raw pages are searched before recent windows of running requests are sealed,
too."""
SEALED_SPARE = 1 / 64
"""Of the raw pages, sealed beyond what is asked for, so that it is not asked for each page."""
RECLAIMED_SPARE = 1 / 256
"""Of the pages that the pool holds at worst, reclaimed beyond what is asked for: so memory pressure
is met once for many pages. A small pool reclaims what it must."""


def seal_cold(store: PageStore, headroom: int, include_window: bool) -> None:
    """Seal the coldest full open pages until ``headroom`` pages may be opened, if that helps.

    With ``include_window`` recent windows of running requests go too: it costs them accuracy, so
    everything else is tried before, and no more of them is sealed than is needed.
    """
    ledger, recency = store.ledger, store.recency
    if ledger.headroom >= headroom:
        return
    spare = 0 if include_window else int(store.sizes.raw_pages * SEALED_SPARE)
    # The last resort goes on until it has found them: each that there is makes room.
    for slots in recency.raw_hand.windows(None if include_window else RAW_WINDOWS):
        if not ledger.full_pages or ledger.headroom >= headroom:
            return
        cold = recency.sealable(slots, include_window)
        while ledger.headroom < headroom and cold.numel():
            frames_free, batch = ledger.frames_free, headroom - ledger.headroom + spare
            seal(store, cold[:batch])
            store.counters.sealed_under_pressure += len(cold[:batch])
            cold = cold[batch:]
            if ledger.raw_free >= headroom and ledger.frames_free == frames_free:
                return  # only frames lack, and these pages take all that they reserved


class Reclaimer:
    """The ladder, for the pages behind an allocator's virtual ones.

    Costs what it reclaims: candidates are found in the store, a window at a time, and where there
    is pressure at all, more is reclaimed than is needed at once.
    """

    def __init__(
        self,
        store: PageStore,
        running: RunningRequests,
        capacity: Capacity,
        virtual: BaseTokenToKVPoolAllocator,
    ) -> None:
        self.store, self._running, self._capacity = store, running, capacity
        self._virtual = virtual

    def reclaim(self, tree_cache: Any, num_tokens: int) -> bool:
        """Do everything short of retraction to have ``num_tokens``; whether they can be had now."""
        self._virtual.evict_to_free_tokens(tree_cache, num_tokens)
        store, pages = self.store, -(-num_tokens // PAGE_TOKENS)
        ledger = store.ledger
        if ledger.headroom < pages:
            store.settle()
        if ledger.headroom < pages:
            store.counters.reclaims += 1
            if ledger.raw_free >= pages:  # only frames lack: what costs no accuracy comes first
                self._offload(tree_cache, pages)
            seal_cold(store, pages, include_window=False)
            self._free_frames(tree_cache, pages)
            self.evict_for_raw_pages(tree_cache, num_tokens)
        return self.secure(pages) and self._virtual.available_size() >= num_tokens

    def settle(self) -> None:
        """Have the ledger know all that was freed; waits for the device."""
        self.store.settle()

    def secure(self, pages: int) -> bool:
        """Make ``pages`` openable without the tree's help; the gates before saw to the rest."""
        if self.store.ledger.headroom < pages:
            self.store.settle()
        seal_cold(self.store, pages, include_window=False)
        seal_cold(self.store, pages, include_window=True)
        return self.store.ledger.headroom >= pages

    def evict_for_raw_pages(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict until raw pages can hold ``num_tokens``, if that helps.

        Cached pages that may be sealed count as free already: only lossless ones have to go.
        """
        store, ledger, capacity = self.store, self.store.ledger, self._capacity
        if capacity.tokens_with_raw_page < num_tokens:
            store.settle()
        if capacity.tokens_with_raw_page >= num_tokens or not ledger.never_compressed:
            return
        unused = store.recency.never_compressed_unused(self.held_since)
        held = ledger.never_compressed - unused
        self.evict_until(
            tree_cache,
            lambda: capacity.tokens_with_raw_page >= num_tokens or ledger.never_compressed <= held,
        )

    def evict_until(self, tree_cache: Any, enough: Callable[[], bool]) -> None:
        """Evict prefixes, the coldest first, until there is enough or none is left."""
        if enough() or not tree_cache.supports_prefix_sharing():
            return
        counters = self.store.counters
        released = counters.released

        def satisfied() -> bool:
            self.store.settle()
            return enough()

        tree_cache.evict_for_alloc(
            EvictParams(num_tokens=tree_cache.evictable_size()),
            allocation_reclaim_satisfied=satisfied,
        )
        counters.evicted += counters.released - released

    @property
    def held_since(self) -> int:
        """A step since which all pages that requests hold have been used, by them or by others.

        Whoever decodes reads its pages in every decode step, and whoever does not yet in the step
        that it entered in, the next one perhaps (`patches.expected_pages`).
        """
        recency = self.store.recency
        return max(recency.decoded_at, self._running.entered_since(recency.next_step))

    def load_back(self, tree_cache: Any, pages: torch.Tensor, promised: int = 0) -> bool:
        """Bring ``pages`` (int64 [N], on the host, of a prefix that nobody may evict) back.

        Args:
            promised: how many pages others may still open, whose frames are not taken.

        Returns:
            Whether there is room for them now: for all, or none comes.
        """
        store, ledger = self.store, self.store.ledger
        frames = store.share(pages).frames + promised * ledger.worst_frames
        if ledger.frames_free < frames:
            store.settle()
            self._free_frames(tree_cache, -(-frames // ledger.worst_frames))
        if ledger.frames_free < frames:
            return False
        load_back(store, pages)
        return True

    def _free_frames(self, tree_cache: Any, pages: int) -> None:
        """Have frames for ``pages`` at their worst, if that can be had, and some to spare."""
        ledger = self.store.ledger
        goal = pages + int(ledger.largest_sequence * RECLAIMED_SPARE)
        for rung in (self._offload, self._demote, self._evict):
            if ledger.frame_headroom >= pages:
                return
            rung(tree_cache, goal)

    def _offload(self, tree_cache: Any, pages: int) -> bool:
        """Whether any page was."""
        if self.store.host is None or not tree_cache.supports_prefix_sharing():
            return False
        return offload_cold(self.store, self.held_since, pages) > 0

    def _demote(self, tree_cache: Any, pages: int) -> None:
        policy = self.store.policy
        if policy.can_demote and policy.config.demote and tree_cache.supports_prefix_sharing():
            demote_cold(self.store, self.held_since, pages)

    def _evict(self, tree_cache: Any, pages: int) -> None:
        """Evict prefixes until frames allow it."""
        if self.store.host is not None and tree_cache.supports_prefix_sharing():
            self._evict_from_host(tree_cache, pages)
        else:
            self.evict_until(tree_cache, lambda: self._lacking(pages) <= 0)

    def _evict_from_host(self, tree_cache: Any, pages: int) -> None:
        """Evict prefixes as far as the host needs room for what is warmer, and offload that.

        The coldest lie on the host and free nothing here: if nobody's pages are left here, they
        stay.
        """
        store, ledger, worst = self.store, self.store.ledger, self.store.ledger.worst_frames
        table = tree_cache.req_to_token_pool.req_to_token
        store.recency.expect(held_pages(self._running, table).page)
        unheld_since = store.recency.next_step
        seal(store, store.recency.unheld_full(unheld_since))

        def enough() -> bool:
            lacking = self._lacking(pages)
            return lacking <= 0 or ledger.host_free >= lacking + worst

        while self._lacking(pages) > 0 and store.recency.any_sealed_before(unheld_since):
            self.evict_until(tree_cache, enough)
            if not offload_cold(store, unheld_since, pages):
                return

    def _lacking(self, pages: int) -> int:
        """Frames that lack for ``pages`` at their worst."""
        return pages * self.store.ledger.worst_frames - self.store.ledger.frames_free

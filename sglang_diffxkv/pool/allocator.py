# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator of virtual pages, byte-accounted through its capacity hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.utils import get_num_new_pages

from sglang_diffxkv.pool.demotion import demote_cold
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.kv_pool import DiffXKVPool
from sglang_diffxkv.pool.prefill_budget import MIN_CHUNK_PAGES, DiffXKVPrefillBudget
from sglang_diffxkv.pool.request_rows import RequestRows
from sglang_diffxkv.pool.shared_pages import distinct_pages
from sglang_diffxkv.pool.store import PageStore

SPARE_SHARE = 1 / 256
"""Of the pages that the pool holds at worst, reclaimed beyond what is asked for: so memory pressure
is met once for many pages. A small pool reclaims what it must."""


class DiffXKVAllocator(PagedTokenToKVPoolAllocator):
    """Virtual pages stay SGLang's; every page handed out is opened in the store first.

    ``available_size`` counts virtual pages only, which keeps SGLang's leak checks exact. Bytes are
    enforced where the scheduler asks for capacity, in this order: seal cold open pages, demote cold
    sealed ones, evict prefixes, seal pages of running windows, and at last say no, so that it waits
    or retracts.

    Pages of lossless requests are never sealed: they keep their raw pages until they are evicted.
    """

    _kvcache: DiffXKVPool
    free_pages: torch.Tensor
    rows: RequestRows | None = None
    """Of the running requests, once there is a backend to run them."""

    @property
    def store(self) -> PageStore:
        return self._kvcache.store

    # -- pages in and out --

    def clear(self) -> None:
        super().clear()
        # Free pages stay at its end; the base class takes them from the front of a view of it.
        self._page_list = self.free_pages
        self.store.clear()

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if not self._secure(need_size // self.page_size):
            return None
        return self._opening(lambda: super(DiffXKVAllocator, self).alloc(need_size))

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._secure(num_new_pages):
            return None
        return self._opening(
            lambda: super(DiffXKVAllocator, self).alloc_extend(
                prefix_lens,
                prefix_lens_cpu,
                seq_lens,
                seq_lens_cpu,
                last_loc,
                extend_num_tokens,
                num_new_pages,
            )
        )

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        if not self._secure(pages):
            return None
        return self._opening(
            lambda: super(DiffXKVAllocator, self).alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        )

    def _opening(self, alloc: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Run an allocation of the base class, which takes pages from the list's front."""
        before = self.free_pages
        out = alloc()
        taken = len(before) - len(self.free_pages)
        if out is not None and taken:
            self.store.open(before[:taken])
        return out

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        """Put pages at the front of the list, in place: the base class would copy all of it."""
        pages = torch.cat(page_ids).long()
        self.store.release(pages)
        end = len(self._page_list) - len(self.free_pages)
        self._page_list[end - len(pages) : end] = pages
        self.free_pages = self._page_list[end - len(pages) :]

    # -- capacity --

    def _secure(self, pages: int) -> bool:
        """Make ``pages`` openable without the tree's help; the gates before saw to the rest."""
        if self.store.ledger.headroom < pages:
            self.store.settle()
        self.store.seal_cold(pages, include_window=False)
        self.store.seal_cold(pages, include_window=True)
        return self.store.ledger.headroom >= pages

    @property
    def tokens_promisable(self) -> int:
        """Tokens that virtual pages and frames allow to open now, raw pages aside."""
        return min(self.available_size(), self.store.ledger.frame_headroom * self.page_size)

    @property
    def tokens_with_raw_page(self) -> int:
        """Tokens that there are raw pages for, once every page is sealed that may be."""
        ledger = self.store.ledger
        return (ledger.raw_free + ledger.full_pages) * self.page_size

    def tokens_when_sealed(self, evictable_tokens: int) -> float:
        """Tokens that fit beside those held, if all get sealed and ``evictable_tokens`` go."""
        ledger = self.store.ledger
        mean = ledger.mean_frames(self.store.plan.expected_frames)
        free = ledger.frames_total - ledger.frames_used - ledger.unsealed_pages * mean
        sealed = min(evictable_tokens / self.page_size, ledger.sealed_pages)
        free += ledger.frames_of_evicted(sealed)
        return free / mean * self.page_size + evictable_tokens - sealed * self.page_size

    def frames_reclaimable(self, evictable_tokens: int) -> float:
        """Frames that come free by sealing every full page and evicting ``evictable_tokens``."""
        ledger = self.store.ledger
        full = ledger.full_pages
        evicted = min(evictable_tokens / self.page_size, ledger.sealed_pages + full)
        freed = ledger.frames_of_evicted(evicted)
        return full * (ledger.worst_frames - ledger.fresh_mean) + freed

    def tokens_openable(self, evictable_tokens: int) -> int:
        """Tokens that frames can be promised to after all that can be reclaimed is."""
        ledger = self.store.ledger
        free = ledger.frames_free + self.frames_reclaimable(evictable_tokens)
        return int(free / ledger.worst_frames + 1e-6) * self.page_size

    @property
    def expected_tokens(self) -> int:
        """Tokens that fit, as SGLang publishes it: virtual pages are plenty by design."""
        return self.store.plan.expected_tokens

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that surely fits alone, sealed at its worst."""
        pages = min(self.num_pages, self.store.ledger.largest_sequence)
        return (pages - 2) * self.page_size

    def usage(self, tree_cache: Any) -> float:
        """Share of the scarcer of frames and raw pages that requests hold, from 0 to 1.

        From counters alone, and the tree's nodes above running lossless requests.
        """
        ledger = self.store.ledger
        free = ledger.frames_free + self.frames_reclaimable(tree_cache.evictable_size())
        held = ledger.raw_only
        if self.rows is not None:
            held = distinct_pages(tree_cache, self.rows.lossless)
        raw = ledger.open_pages - ledger.full_pages - max(0, ledger.raw_only - held)
        used = max(1 - free / ledger.frames_total, raw / ledger.raw_total)
        return min(1.0, max(0.0, used))

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> DiffXKVPrefillBudget:
        return DiffXKVPrefillBudget(
            self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens
        )

    def get_extend_allocation_demand(
        self,
        prefix_lens_cpu: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        *,
        conservative_num_tokens: int,
        shard_size: int,
    ) -> int:
        """The exact demand: an estimate would seal and evict more than is needed."""
        pages = get_num_new_pages(
            seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
        )
        return pages * self.page_size

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool | None:
        """Evict for virtual pages only: SGLang asks again before each allocation, for a page per
        running request in decode, when the gates before have made the room that is needed."""
        released = self.store.counters.released
        result = super().evict_to_free_tokens(tree_cache, num_tokens)
        self.store.counters.evicted += self.store.counters.released - released
        return result

    def reclaim(self, tree_cache: Any, num_tokens: int) -> bool:
        """Do everything short of retraction to have ``num_tokens``; whether they can be had now.

        Costs what it reclaims: candidates are found in the store, a window at a time, and where
        there is pressure at all, more is reclaimed than is needed at once.
        """
        self.evict_to_free_tokens(tree_cache, num_tokens)
        store, pages = self.store, -(-num_tokens // self.page_size)
        ledger = store.ledger
        if ledger.headroom < pages:
            store.settle()
        if ledger.headroom < pages:
            store.counters.reclaims += 1
            store.seal_cold(pages, include_window=False)
            if ledger.frame_headroom < pages:
                goal = pages + int(ledger.largest_sequence * SPARE_SHARE)
                self._demote_for_frames(tree_cache, goal)
                if ledger.frame_headroom < pages:
                    self._evict_until(tree_cache, lambda: ledger.frame_headroom >= goal)
            self.evict_for_raw_pages(tree_cache, num_tokens)
        return self._secure(pages) and self.available_size() >= num_tokens

    def _demote_for_frames(self, tree_cache: Any, pages: int) -> None:
        policy = self.store.policy
        if policy.can_demote and policy.config.demote and tree_cache.supports_prefix_sharing():
            demote_cold(self.store, self.held_since, pages)

    @property
    def held_since(self) -> int:
        """A step since which all pages that requests hold have been used, by them or by others.

        Whoever decodes reads its pages in every decode step, and whoever does not yet in the step
        that it entered in, the next one perhaps (`patches.admission`).
        """
        store = self.store
        entered = 0 if self.rows is None else self.rows.entered_since(store.next_step)
        return max(store.decoded_at, entered)

    def evict_for_raw_pages(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict until raw pages can hold ``num_tokens``, if that helps.

        Cached pages that may be sealed count as free already: only lossless ones have to go.
        """
        ledger = self.store.ledger
        if self.tokens_with_raw_page < num_tokens:
            self.store.settle()
        if self.tokens_with_raw_page >= num_tokens or not ledger.raw_only:
            return
        held = ledger.raw_only - self.store.num_raw_only_unused(self.held_since)
        self._evict_until(
            tree_cache,
            lambda: self.tokens_with_raw_page >= num_tokens or ledger.raw_only <= held,
        )

    def _evict_until(self, tree_cache: Any, enough: Callable[[], bool]) -> None:
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

    def check_decode_capacity(
        self,
        *,
        num_tokens: int,
        tree_cache: Any,
        requests: Any = None,
        spec_algorithm: Any = None,
    ) -> bool:
        return self.reclaim(tree_cache, num_tokens)

    def max_new_tokens_for_memory(
        self,
        input_tokens: int,
        max_new_tokens: int,
        *,
        token_capacity: int,
        sliding_window_size: int | None,
        chunk_size: int | None,
    ) -> int:
        """Clip to what surely fits alone, sealed at its worst. Prompts longer than `longest_prompt`
        are refused, or truncated, by what SGLang was told of it (`patches.capacity`)."""
        worst = min(self.size, self.store.ledger.largest_sequence * self.page_size)
        paged_input = -(-input_tokens // self.page_size) * self.page_size
        return max(0, min(max_new_tokens, worst - paged_input - self.page_size - 1))

    @property
    def lossless_pages(self) -> int:
        """Pages that running lossless requests may hold between them, at their longest.

        The other raw pages are left to the pages that everyone else is writing.
        """
        return self.store.ledger.raw_total - MIN_CHUNK_PAGES

    def verify_byte_accounting(self) -> list[str]:
        """Violations that counters show; empty when healthy. `check` looks at every page.

        SGLang asks after each request, and once a second when idle.
        """
        store = self.store
        held = store.pages_held
        problems = store.problems()
        if len(self.free_pages) + held != self.num_pages:
            problems.append(
                f"virtual pages: {len(self.free_pages)} free + {held} held are not the "
                f"{self.num_pages} that there are"
            )
        return problems

    def check(self) -> list[str]:
        """Violations of page, frame and raw-page conservation, recomputed from all tables."""
        problems = [*self.verify_byte_accounting(), *check_integrity(self.store)]
        directory, free = self.store.directory, self.free_pages.cpu()
        in_use = ((directory.raw_slot >= 0) | directory.sealed).cpu()
        if bool(in_use[free].any()) or len(free.unique()) != len(free):
            problems.append("virtual pages: the free list and the directory disagree")
        return problems

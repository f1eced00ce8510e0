# SPDX-License-Identifier: Apache-2.0
"""Admission of prefills: SGLang's token arithmetic over our bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.capacity import MIN_CHUNK_PAGES, Capacity
from sglang_diffxkv.pool.offload import on_host
from sglang_diffxkv.pool.reclaim import Reclaimer

_NOT_IN_THIS_STEP = (True, 0)
"""A chunk of no tokens: SGLang passes the request over, and asks again before the next step."""


class DiffXKVPrefillBudget(PrefillBudget):
    """``PrefillBudget`` bounded by bytes as well as by virtual pages.

    ``remaining_total`` and ``remaining_current`` are estimates (what fits once everything is
    sealed, what reclaiming could free) and only end the pass early. A request is admitted on room
    that was really made: running short in the allocation that follows would end SGLang's scheduler.
    """

    def __init__(
        self,
        allocator: PagedTokenToKVPoolAllocator,
        tree_cache: Any,
        reclaimer: Reclaimer,
        capacity: Capacity,
        num_mixed_decode_tokens: int = 0,
    ) -> None:
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self._reclaimer, self._capacity = reclaimer, capacity
        self._prefix: torch.Tensor | None = None
        # SGLang keeps track of one unfinished prompt: after one that we shortened or put off,
        # nobody else may be admitted in this pass.
        self.closed = False

    def expect_prefix(self, pages: torch.Tensor | None) -> None:
        """The next prompt to be checked begins with cached ``pages`` (int64 [N]), or with none."""
        self._prefix = pages

    @property
    def remaining_total(self) -> float:
        return self._evictable_as(self._capacity.tokens_when_sealed) - self.total_offset

    @property
    def remaining_current(self) -> float:
        return self._evictable_as(self._capacity.tokens_openable) - self.current_offset

    def _evictable_as(self, estimate: Callable[[int], float]) -> float:
        """What ``estimate`` makes of the tree's evictable tokens, as far as virtual pages go."""
        evictable = self.tree_cache.evictable_size()
        return min(self.allocator.available_size() + evictable, estimate(evictable))

    def _holds(self, condition: Callable[[], bool]) -> bool:
        """Whether so, if need be with what was freed and the ledger does not know yet.

        Who is refused on what was known may not be asked for again until somebody else leaves.
        """
        if condition():
            return True
        self._reclaimer.settle()
        return condition()

    def has_capacity(self) -> bool:
        # Not `remaining_current`: what is short now may be sealed a step later, and SGLang would
        # admit nobody until some request finishes.
        return not self.closed and self._holds(lambda: self.remaining_total > 0)

    def _openable(self, tokens: int) -> int:
        """How many of ``tokens`` new ones, in whole pages, raw pages allow to open in this step.

        The rest of a prompt is opened in later steps, when these are sealed: to reserve frames for
        it now would evict, at the worst case, much that sealing does not need. Raw pages that ended
        lossless requests left in the cache are evicted for it, as sealing cannot free them.
        """
        offset = int(self.current_offset)
        self._reclaimer.evict_for_raw_pages(self.tree_cache, tokens + offset)
        tokens = min(tokens, self._capacity.tokens_with_raw_page - offset)
        return max(0, tokens // self.page_size * self.page_size)

    def _make_room(self, tokens: int) -> int:
        """Reclaim for ``tokens`` new ones beside those admitted in this pass.

        Unlike stock's, these checks change the cache: they evict what the request will need.

        Returns:
            How many of them can be opened for sure, a multiple of the page.
        """
        self._reclaimer.reclaim(self.tree_cache, tokens + self.current_offset)
        most = min(self.allocator.available_size(), self._capacity.tokens_reservable)
        return self._openable(min(tokens, most - int(self.current_offset)))

    def _load_prefix_back(self) -> bool:
        """Whether the cached prefix, which SGLang has locked, is on the device now."""
        pages, self._prefix = self._prefix, None
        if pages is None:
            return True
        absent = on_host(self._reclaimer.store, pages)
        promised = -(-int(self.current_offset) // PAGE_TOKENS)
        return not len(absent) or self._reclaimer.load_back(self.tree_cache, absent, promised)

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        total_tokens: int,
        max_new_tokens: int,
        input_tokens: int,
        swa_host_hit_length: int,
        chunk_limit: int | None,
        auxiliary_swa_host_hit_length: int = 0,
    ) -> tuple[bool, int | None]:
        if self.closed or not self._holds(lambda: total_tokens < self.remaining_total):
            return False, None
        wanted = extend_input_len if chunk_limit is None else min(extend_input_len, chunk_limit)
        needed = self.ceil_paged_tokens(wanted) + self.page_size  # as `reserve` will count it
        openable = self._openable(needed)
        fits = self._holds(lambda: openable <= self.remaining_current)
        fits = fits and self._load_prefix_back()
        if not fits or self._make_room(openable) < openable:
            return _NOT_IN_THIS_STEP
        if openable == needed:
            return True, chunk_limit
        if openable < MIN_CHUNK_PAGES * self.page_size or chunk_limit is None:
            return _NOT_IN_THIS_STEP
        self.closed = True
        return True, openable - self.page_size

    def can_allocate_prefill(
        self,
        *,
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        """Where the radix cache is off: admits a whole prompt, of which one chunk is opened now."""
        wanted = extend_input_len if chunk_limit is None else min(extend_input_len, chunk_limit)
        needed = self.ceil_paged_tokens(wanted) + self.page_size
        fits = not self.closed and self._holds(
            lambda: paged_input <= self.remaining_total and needed <= self.remaining_current
        )
        return fits and needed <= self._make_room(needed)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        # An unfinished prompt holds its pages, so it goes on with whatever room there is.
        most = chunk_limit + self.page_size
        self._holds(lambda: self.remaining_current >= most)
        wanted = min(most, int(self.remaining_current))
        room = self._make_room(self._openable(wanted)) - self.page_size
        if room > 0:
            return min(chunk_limit, room)
        self.closed = True
        return None

    def fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        self.closed = chunk_limit < extend_input_len
        return chunk_limit

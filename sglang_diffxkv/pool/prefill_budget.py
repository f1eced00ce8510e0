# SPDX-License-Identifier: Apache-2.0
"""Admission of prefills: SGLang's token arithmetic over our bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget

if TYPE_CHECKING:
    from sglang_diffxkv.pool.allocator import DiffXKVAllocator

MIN_CHUNK_PAGES = 3
"""A chunk is not cut shorter than this, its tail's page included: each costs a forward pass."""


class DiffXKVPrefillBudget(PrefillBudget):
    """``PrefillBudget`` bounded by bytes as well as by virtual pages.

    ``remaining_total`` and ``remaining_current`` are estimates (what fits once everything is
    sealed, what reclaiming could free) and only end the pass early. A request is admitted on room
    that was really made: running short in the allocation that follows would end SGLang's scheduler.
    """

    allocator: DiffXKVAllocator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang tracks one unfinished chunk at a time, so a chunk that we shortened ends the pass.
        self._shortened = False

    @property
    def remaining_total(self) -> float:
        evictable = self.tree_cache.evictable_size()
        tokens = min(
            self.allocator.available_size() + evictable,
            self.allocator.tokens_when_sealed(evictable),
        )
        return tokens - self.total_offset

    @property
    def remaining_current(self) -> float:
        evictable = self.tree_cache.evictable_size()
        tokens = min(
            self.allocator.available_size() + evictable,
            self.allocator.tokens_openable(evictable),
        )
        return tokens - self.current_offset

    def has_capacity(self) -> bool:
        return not self._shortened and super().has_capacity()

    def _make_room(self, tokens: int) -> int:
        """Reclaim for ``tokens`` new ones beside those admitted in this pass.

        Returns:
            How many of them can be opened for sure, a multiple of the page.
        """
        self.allocator.reclaim(self.tree_cache, tokens + self.current_offset)
        room = min(self.allocator.tokens_promisable, self.allocator.tokens_with_raw_page)
        room = min(tokens, room - int(self.current_offset))
        return max(0, room // self.page_size * self.page_size)

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
        if self._shortened or total_tokens >= self.remaining_total:
            return False, None
        wanted = extend_input_len if chunk_limit is None else min(extend_input_len, chunk_limit)
        needed = self.ceil_paged_tokens(wanted) + self.page_size  # as `reserve` will charge it
        if needed > self.remaining_current:
            return False, None
        room = self._make_room(needed)
        if room >= needed:
            return True, chunk_limit
        # What lacks frames waits for others to finish. What only lacks raw pages goes in smaller
        # chunks: running requests hold theirs as long as they run, a chunk's come free when sealed.
        lacks_frames = needed + self.current_offset > self.allocator.tokens_promisable
        if lacks_frames or chunk_limit is None or room < MIN_CHUNK_PAGES * self.page_size:
            return False, None
        self._shortened = True
        return True, room - self.page_size

    def can_allocate_prefill(
        self,
        *,
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        if paged_input > min(self.remaining_total, self.remaining_current):
            return False
        return paged_input <= self._make_room(paged_input)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        # An unfinished request holds its pages, so it goes on with whatever room there is.
        wanted = min(chunk_limit + self.page_size, int(self.remaining_current))
        room = self._make_room(wanted) - self.page_size
        return min(chunk_limit, room) if room > 0 else None

    def fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        self._shortened = chunk_limit < extend_input_len
        return chunk_limit

# SPDX-License-Identifier: Apache-2.0
"""Admission of prefills: SGLang's token arithmetic over our bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget

if TYPE_CHECKING:
    from sglang_diffxkv.pool.allocator import DiffXKVAllocator


class DiffXKVPrefillBudget(PrefillBudget):
    """``PrefillBudget`` bounded by bytes as well as by virtual pages.

    ``remaining_total`` asks what fits once pages are sealed (mean frames per page);
    ``remaining_current`` asks what can be opened in this step (worst case per page).
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

    def _chunk_room(self) -> int:
        """Tokens that a chunk may have now, a multiple of the page; one page is for its tail."""
        room = int(self.remaining_current) - self.page_size
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
        room = self._chunk_room()
        if self.ceil_paged_tokens(wanted) <= room:
            return True, chunk_limit
        # Wait for room, unless even an empty pool could not open so much in one step.
        largest = self.allocator.largest_chunk
        if chunk_limit is None or self.ceil_paged_tokens(wanted) <= largest or room == 0:
            return False, None
        self._shortened = True
        return True, room

    def can_allocate_prefill(
        self,
        *,
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        return paged_input <= min(self.remaining_current, self.remaining_total)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        room = min(chunk_limit, self._chunk_room())
        return room if room > 0 else None

    def fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        self._shortened = chunk_limit < extend_input_len
        return chunk_limit

# SPDX-License-Identifier: Apache-2.0
"""Admission of prefills where window layers have a pool beside ours: both must have room."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import SWAPrefillBudget

from sglang_diffxkv.pool.prefill_budget import DiffXKVPrefillBudget


class WindowPrefillBudget(DiffXKVPrefillBudget):
    """`DiffXKVPrefillBudget`, which SGLang's budget for window layers may refuse or shorten.

    Args:
        allocator: its full-attention side is a `DiffXKVAllocator`.
    """

    def __init__(
        self,
        allocator: SWATokenToKVPoolAllocator,
        tree_cache: Any,
        num_mixed_decode_tokens: int = 0,
    ) -> None:
        ours: Any = allocator.full_attn_allocator
        super().__init__(ours, tree_cache, ours.reclaimer, ours.capacity, num_mixed_decode_tokens)
        self._windows = SWAPrefillBudget(
            allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens
        )

    @property
    def remaining_swa(self) -> float:
        return self._windows.remaining_swa

    def has_capacity(self) -> bool:
        return super().has_capacity() and self.remaining_swa > 0

    def check_prefill(self, *, chunk_limit: int | None, **kwargs: Any) -> tuple[bool, int | None]:
        fits, chunk = self._windows.check_prefill(chunk_limit=chunk_limit, **kwargs)
        if not fits:
            return False, None
        return super().check_prefill(chunk_limit=chunk, **kwargs)

    def can_allocate_prefill(self, **kwargs: Any) -> bool:
        return self._windows.can_allocate_prefill(**kwargs) and super().can_allocate_prefill(
            **kwargs
        )

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        chunk = self._windows.available_chunk_tokens(chunk_limit)
        if chunk is None:
            self.closed = True
            return None
        return super().available_chunk_tokens(chunk)

    def reserve(self, extend_input_len: int, max_new_tokens: int, **kwargs: Any) -> None:
        super().reserve(extend_input_len, max_new_tokens, **kwargs)
        self._windows.reserve(extend_input_len, max_new_tokens, **kwargs)

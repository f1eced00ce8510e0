# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator for models with window layers: full-attention layers' pages are ours."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.reclaim import Reclaimer
from sglang_diffxkv.pool.window_budget import WindowPrefillBudget
from sglang_diffxkv.pool.window_use import WindowUse


class DiffXKVWindowAllocator(SWATokenToKVPoolAllocator):
    """``SWATokenToKVPoolAllocator`` whose full-attention side is a :class:`DiffXKVAllocator`.

    Pages of both sides are handed out together, one for one. SGLang frees those of the window
    layers as windows move on, ours stay. Bytes are enforced as ours are; the window layers' pages
    are SGLang's to count.
    """

    full_attn_allocator: DiffXKVAllocator

    def __init__(self, size: int, size_swa: int, **kwargs: Any) -> None:
        super().__init__(size, size_swa, **kwargs)
        self.full_attn_allocator = ours = DiffXKVAllocator(
            size,
            self.page_size,
            self.dtype,
            self.device,
            self._kvcache.full_kv_pool,
            self.need_sort,
        )
        ours.reclaimer = Reclaimer(ours.store, ours.running, ours.capacity, self)

    # -- pages --

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
    ) -> torch.Tensor | None:
        pages = get_num_new_pages(
            seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
        )
        if not self._secure(pages):
            return None
        return super().alloc_extend(
            prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens
        )

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        if not self._secure(pages):
            return None
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)

    def _secure(self, pages: int) -> bool:
        """Whether both sides have the pages: what one has taken is lost where the other has not."""
        fits = self.new_pages_available(pages, pages)
        return fits and self.full_attn_allocator.reclaimer.secure(pages)

    # -- capacity --

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> WindowPrefillBudget:
        self.full_attn_allocator.store.recency.schedule()
        return WindowPrefillBudget(self, tree_cache, num_mixed_decode_tokens)

    def get_extend_allocation_demand(
        self, prefix_lens_cpu: torch.Tensor, seq_lens_cpu: torch.Tensor, **kwargs: Any
    ) -> int:
        ours = self.full_attn_allocator
        return ours.get_extend_allocation_demand(prefix_lens_cpu, seq_lens_cpu, **kwargs)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict for token slots of either kind of layers."""
        with self.full_attn_allocator.counting_evicted():
            super().evict_to_free_tokens(tree_cache, num_tokens)

    def check_decode_capacity(self, *, num_tokens: int, tree_cache: Any, **kwargs: Any) -> bool:
        return self.full_attn_allocator.reclaimer.reclaim(tree_cache, num_tokens)

    def max_new_tokens_for_memory(
        self, input_tokens: int, max_new_tokens: int, **kwargs: Any
    ) -> int:
        """Of full-attention layers alone: windows do not grow."""
        ours = self.full_attn_allocator
        return ours.max_new_tokens_for_memory(input_tokens, max_new_tokens, **kwargs)

    # -- what it holds, and whether that is right --

    @property
    def window_use(self) -> WindowUse:
        pool = self._kvcache.swa_kv_pool
        tokens = self.size_swa
        rows = [*pool.k_buffer, *pool.v_buffer]
        return WindowUse(
            layers=pool.layer_num,
            tokens_total=tokens,
            tokens_held=tokens - self.swa_available_size(),
            token_bytes=sum(row[0].nbytes for row in rows),
        )

    def verify_byte_accounting(self) -> list[str]:
        return self.full_attn_allocator.verify_byte_accounting()

    def check(self) -> list[str]:
        """`DiffXKVAllocator.check`, and whether each window page belongs to one page of ours."""
        problems = self.full_attn_allocator.check()
        slots = self.full_to_swa_index_mapping[:-1].view(-1, PAGE_TOKENS).cpu()
        first = slots[:, :1]
        mapped = first.flatten() > 0
        own = mapped[:, None] & (slots == first + torch.arange(PAGE_TOKENS))
        if not bool((own | (slots == 0)).all()):  # slots that are not handed out yet are 0
            problems.append("window pages: a page's tokens lie in several")
        pages = first[mapped] // PAGE_TOKENS
        free = self.swa_attn_allocator.get_all_free_pages().cpu()
        if len(torch.cat([pages.flatten(), free]).unique()) != len(pages) + len(free):
            problems.append("window pages: one is free or mapped twice")
        if len(pages) + len(free) != self.size_swa // PAGE_TOKENS:
            problems.append(
                f"window pages: {len(pages)} mapped + {len(free)} free are not the "
                f"{self.size_swa // PAGE_TOKENS} that there are"
            )
        directory = self.full_attn_allocator.store.directory
        held = directory.in_use.cpu()
        if bool((mapped & ~held[: len(mapped)]).any()):
            problems.append("window pages: one is mapped to a free page")
        return problems


def find_windows(allocator: Any) -> WindowUse | None:
    """What the window layers' pool holds behind SGLang's allocator; None: it has none of ours."""
    return allocator.window_use if isinstance(allocator, DiffXKVWindowAllocator) else None

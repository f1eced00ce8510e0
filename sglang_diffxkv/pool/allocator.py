# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator of virtual pages, byte-accounted through its capacity hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from sglang_diffxkv.pool.capacity import Capacity
from sglang_diffxkv.pool.committed import count, fill
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.prefill_budget import DiffXKVPrefillBudget
from sglang_diffxkv.pool.reclaim import Reclaimer
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.store import PageStore


class DiffXKVAllocator(PagedTokenToKVPoolAllocator):
    """Virtual pages stay SGLang's; every page handed out is opened in the store first.

    ``available_size`` counts virtual pages only, which keeps SGLang's leak checks exact. Bytes are
    enforced where the scheduler asks for capacity (`pool.reclaim`); at last it is told no, so that
    it waits or retracts.

    Attributes:
        running: requests that hold pages.
        capacity, reclaimer: what fits, and who makes room.
    """

    free_pages: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running = RunningRequests()
        self.capacity = Capacity(self.store, self.running)
        self.reclaimer = Reclaimer(self.store, self.running, self.capacity, self)

    @property
    def store(self) -> PageStore:
        """Of our pool, which may be the full-attention part of one of SGLang's."""
        pool: Any = getattr(self._kvcache, "full_kv_pool", self._kvcache)
        return cast(PageStore, pool.store)

    # -- pages in and out --

    def clear(self) -> None:
        super().clear()
        # Free pages stay at its end; the base class takes them from the front of a view of it.
        self._page_list = self.free_pages
        self.store.clear()

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if not self.reclaimer.secure(need_size // self.page_size):
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
        if not self.reclaimer.secure(num_new_pages):
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
        if not self.reclaimer.secure(pages):
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

    def take_free(self, count: int) -> torch.Tensor:
        """Take so many free pages off the list, without opening them; int64 [count]."""
        taken, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return taken.clone()  # the list is written in place

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        """Put pages at the front of the list, in place: the base class would copy all of it."""
        pages = torch.cat(page_ids).long()
        self.store.release(pages)
        end = len(self._page_list) - len(self.free_pages)
        self._page_list[end - len(pages) : end] = pages
        self.free_pages = self._page_list[end - len(pages) :]

    @contextmanager
    def freeing_later(self) -> Iterator[None]:
        """What is freed meanwhile is freed at the end, or with the group that SGLang has begun."""
        if self.free_group is not None:
            yield
            return
        self.free_group_begin()
        try:
            yield
        finally:
            self.free_group_end()

    def commit(self, index: int, length: int, req_to_token: torch.Tensor) -> None:
        """Count what the last verification of a request accepted, before the tree takes its pages.

        Args:
            index: its ``req_pool_index``. length: its committed tokens, or fewer.
            req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
        """
        start = self.running.tokens(index)
        if not 0 < start < length:
            return
        committed = self.running.commit([index], torch.tensor([start]), torch.tensor([length]))
        count(self.store, committed, req_to_token)
        fill(self.store, req_to_token[index], start, length)

    # -- capacity --

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> DiffXKVPrefillBudget:
        self.store.recency.schedule()
        return DiffXKVPrefillBudget(
            self, tree_cache, self.reclaimer, self.capacity, num_mixed_decode_tokens
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
        with self.counting_evicted():
            return super().evict_to_free_tokens(tree_cache, num_tokens)

    @contextmanager
    def counting_evicted(self) -> Iterator[None]:
        """What is freed meanwhile is evicted."""
        counters = self.store.counters
        released = counters.released
        yield
        counters.evicted += counters.released - released

    def check_decode_capacity(
        self,
        *,
        num_tokens: int,
        tree_cache: Any,
        requests: Any = None,
        spec_algorithm: Any = None,
    ) -> bool:
        return self.reclaimer.reclaim(tree_cache, num_tokens)

    def max_new_tokens_for_memory(
        self,
        input_tokens: int,
        max_new_tokens: int,
        *,
        token_capacity: int,
        sliding_window_size: int | None,
        chunk_size: int | None,
    ) -> int:
        """Clip to what surely fits alone, sealed at its worst. Prompts longer than
        `Capacity.longest_prompt` are refused, or truncated, by what SGLang was told of it
        (`patches.published_capacity`)."""
        worst = min(self.size, self.store.ledger.largest_sequence * self.page_size)
        paged_input = -(-input_tokens // self.page_size) * self.page_size
        return max(0, min(max_new_tokens, worst - paged_input - self.page_size - 1))

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
        in_use = directory.in_use.cpu()
        if bool(in_use[free].any()) or len(free.unique()) != len(free):
            problems.append("virtual pages: the free list and the directory disagree")
        return problems


def find_allocator(allocator: Any) -> DiffXKVAllocator | None:
    """Ours: ``allocator`` itself, or the full-attention layers' in a composite one of SGLang's."""
    found = getattr(allocator, "full_attn_allocator", allocator)
    return found if isinstance(found, DiffXKVAllocator) else None

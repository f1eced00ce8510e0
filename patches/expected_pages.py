# SPDX-License-Identifier: Apache-2.0
"""Hook: what a prompt is about to read counts as used before others are admitted beside it.

To make room for one, cold pages are offloaded or demoted, lossless ones evicted. A request's own
are not cold, though no forward pass has read them lately: those of the prefix that it will find in
the cache, and those that it has while its prompt waits between two chunks. What of a prefix is on
the host comes back where the prompt is admitted. Where it is not, nobody is about to read its
prefix: a queue whose prefixes all counted as used would leave nothing to make room from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import DiffXKVAllocator, find_allocator

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req


_EXPECTED = "diffxkv_expected"


def _use_prefix(self: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is not None:
        prefix = self.tree_cache.prefix_device_indices(req) if req.prefix_len else None
        pages = None if prefix is None else _paged(allocator, prefix)
        self.memory_budget.expect_prefix(pages)
        if pages is not None:
            setattr(self, _EXPECTED, (pages, allocator.store.recency.expect(pages)))


def _withdraw(result: Any, self: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    """The prefix counts as it did before, unless its request is the last that was admitted."""
    pages, before = self.__dict__.pop(_EXPECTED, (None, None))
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is not None and pages is not None and req not in self.can_run_list[-1:]:
        allocator.store.recency.withdraw(pages, before)


def _use_chunks(self: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is None:
        return
    index = req.kv.req_pool_idx
    table = self.tree_cache.req_to_token_pool.req_to_token
    pages = _paged(allocator, table[index, : req.kv.kv_allocated_len])
    allocator.store.recency.expect(pages)
    allocator.running.stay(index, allocator.store.recency.next_step)


def _paged(allocator: DiffXKVAllocator, slots: torch.Tensor) -> torch.Tensor:
    return slots[::PAGE_TOKENS].to(allocator.device).long() // PAGE_TOKENS


def install() -> None:
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    hook(f"{adder}.add_one_req", _use_prefix, HookType.BEFORE, ("req",))
    hook(f"{adder}.add_one_req", _withdraw, HookType.AFTER, ("req",))
    hook(f"{adder}.add_chunked_req", _use_chunks, HookType.BEFORE, ("req",))

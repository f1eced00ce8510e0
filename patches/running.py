# SPDX-License-Identifier: Apache-2.0
"""Hook: the allocator learns which requests run, as they get indices of SGLang's ReqToTokenPool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.quality import quality_of
from sglang_diffxkv.pool.allocator import DiffXKVAllocator, find_allocator
from sglang_diffxkv.pool.running import RunningRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_ALLOCATOR = "diffxkv_allocator"


def follow(req_to_token_pool: Any, allocator: Any) -> None:
    """Tell the allocator which requests run, as they get their indices of ``req_to_token_pool``."""
    setattr(req_to_token_pool, _ALLOCATOR, find_allocator(allocator))


def _enter(result: list[int] | None, self: Any, reqs: list[Req]) -> None:
    allocator: DiffXKVAllocator | None = getattr(self, _ALLOCATOR, None)
    if allocator is not None and result:
        step = allocator.store.recency.next_step
        allocator.running.enter(result, [RunningRequest(quality_of(r), step, r) for r in reqs])


def _leave(result: None, self: Any, indices: list[int]) -> None:
    allocator: DiffXKVAllocator | None = getattr(self, _ALLOCATOR, None)
    if allocator is not None:
        allocator.running.leave(indices)


def install() -> None:
    pool = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool"
    hook(f"{pool}.alloc", _enter, HookType.AFTER, ("reqs",))
    hook(f"{pool}.free_rows", _leave, HookType.AFTER, ("indices",))

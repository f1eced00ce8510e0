# SPDX-License-Identifier: Apache-2.0
"""Hook: what the radix tree takes of a request is counted as committed, drafts left out.

A verification tells what it has accepted after its forward pass, which the next one counts. A
request that has finished has no next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_spec

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import find_allocator

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def expect_drafts(allocator: Any) -> None:
    """Tell ours how many slots SGLang allocates for drafts, behind a request's tokens."""
    found = find_allocator(allocator)
    if found is not None and get_spec().speculative_algorithm is not None:
        found.capacity.drafts = get_alloc_reserve_per_decode()


def _commit(self: Any, req: Req, *args: Any, up_to: int, **kwargs: Any) -> None:
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is not None:
        allocator.commit(req.kv.req_pool_idx, up_to, self.req_to_token_pool.req_to_token)


def install() -> None:
    tree = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    hook(f"{tree}.checkpoint", _commit, HookType.BEFORE, ("req", "up_to"))

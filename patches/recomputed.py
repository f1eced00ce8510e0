# SPDX-License-Identifier: Apache-2.0
"""Hook: what a request has computed takes the place of the same pages on the host, and what it is
given instead counts as used.

Where a prompt turns out to be cached already, SGLang gives the request the cached pages in exchange
for its own. It computed what it had not found, or was not to look for: the last token of every
prompt, those whose log probabilities are asked for, what others cached meanwhile. Pages that were
not loaded back for it may so be on the host, and it goes on to read them; or here, and read by
nobody for so long that they would be offloaded or demoted before its next step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.offload import replace

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def _keep_computed(
    original: Callable[..., None], self: Any, req: Req, *, up_to: int, **kwargs: Any
) -> None:
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is None or req.finished():
        original(self, req, up_to=up_to, **kwargs)
        return
    store = allocator.store
    row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    heads = slice(req.kv.cache_protected_len, up_to, PAGE_TOKENS)
    with allocator.freeing_later() if store.ledger.host_pages else nullcontext():
        own = row[heads].long() // PAGE_TOKENS
        original(self, req, up_to=up_to, **kwargs)
        cached = row[heads].long() // PAGE_TOKENS
        given = cached != own
        if store.ledger.host_pages:
            away = given & store.directory.on_host[cached]
            replace(store, cached[away], own[away])
    store.recency.expect(cached, given)


def install() -> None:
    tree = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    hook(f"{tree}.checkpoint_into_tree", _keep_computed, HookType.AROUND, ("req", "up_to"))

# SPDX-License-Identifier: Apache-2.0
"""Hook: requests wait for pages that are on disk, by the gates that SGLang has for its own storage.

They are open (`patches.disk`), so its scheduler asks the tree, which asks the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.adopt import adopt_arrived
from sglang_diffxkv.offload.prefetch import Prompt
from sglang_diffxkv.patches.disk import disk_of, has_disk
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.page_keys import keys_of
from sglang_diffxkv.pool.allocator import find_allocator

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

NAPS_SECONDS = 0.002
"""What a request that comes may have to wait for, where nothing runs."""


def _begin(original: Callable[..., Any], self: Any, req: Req, *args: Any, **kwargs: Any) -> Any:
    """A request has come."""
    tree, level = self.tree_cache, disk_of(self.tree_cache)
    if not has_disk(tree):
        return original(self, req, *args, **kwargs)
    if level is None:
        return None
    req.init_next_round_input(tree, cow_mamba=False)
    keys, first = keys_of(tree, req), req.prefix_len // PAGE_TOKENS
    tokens = req.full_untruncated_fill_ids
    last = req._compute_max_prefix_len(len(tokens)) // PAGE_TOKENS
    if keys is not None and first < last:
        prompt = Prompt(tokens, req.extra_key, req.cache_salt)
        level.prefetcher.begin(req.cache_request_handle, prompt, first, keys.span(first, last))
    return None


def _poll(original: Callable[..., None], self: Any) -> None:
    level = disk_of(self)
    if level is not None:
        level.prefetcher.poll()
    if not has_disk(self):
        original(self)


def _gate(original: Callable[..., bool], self: Any, request: Any) -> bool:
    """Whether a request may be admitted."""
    level, allocator = disk_of(self), find_allocator(self.token_to_kv_pool_allocator)
    if level is None or allocator is None:
        return original(self, request)
    if level.prefetcher.is_waiting(request):
        return False
    arrived = level.prefetcher.take(request)
    if arrived is not None:
        span = adopt_arrived(self, allocator, level.events, arrived)
        if span.tokens:
            self.prefetch_loaded_tokens_by_reqid[request] = span.tokens
            self.prefetch_loaded_storage_start_by_reqid[request] = span.start
    return True


def _forget(result: None, self: Any, request: Any) -> None:
    level = disk_of(self)
    if level is not None:
        level.prefetcher.cancel(request)


def _measure(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """How long prompts take to compute, by SGLang's own clock."""
    level = disk_of(self.tree_cache)
    if level is not None:
        seconds = self.total_prefill_busy_us / 1e6
        level.prefetcher.note_prefill(self.total_prefill_uncached_tokens, seconds)


def _nap(result: None, self: Any) -> None:
    """Nothing can run; SGLang would ask again at once."""
    level = disk_of(self.tree_cache)
    if level is not None and level.prefetcher.in_flight:
        level.prefetcher.wait(NAPS_SECONDS)


def _write_on(original: Callable[[Any], None], self: Any) -> None:
    """Before the scheduler sleeps, which may be for a second, everything is written."""
    level = disk_of(self.tree_cache)
    if level is not None and level.backup.is_behind:
        level.wait_for_writes(NAPS_SECONDS)
    else:
        original(self)


def _name(result: str, self: Any) -> str | None:
    return "DiffXKV" if has_disk(self.tree_cache) else None


def install() -> None:
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}._prefetch_kvcache", _begin, HookType.AROUND, ("req",))
    hook(f"{scheduler}._record_step_counters", _measure, HookType.AFTER, ())
    hook(f"{scheduler}.on_idle", _nap, HookType.AFTER, ())
    hook(f"{scheduler}.maybe_sleep_on_idle", _write_on, HookType.AROUND, ())
    tree = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    hook(f"{tree}.check_hicache_events", _poll, HookType.AROUND, ())
    hook(f"{tree}.check_prefetch_progress", _gate, HookType.AROUND, ("request",))
    hook(f"{tree}.release_aborted_request", _forget, HookType.AFTER, ("request",))
    streamer = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
    hook(f"{streamer}._get_storage_backend_type", _name, HookType.AFTER, ())

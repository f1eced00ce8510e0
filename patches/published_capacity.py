# SPDX-License-Identifier: Apache-2.0
"""Hook: what SGLang publishes of capacity and use is physical, and in one unit.

Virtual pages are plenty by design, so a share of them says nothing. Capacity, wherever SGLang names
it (`max_total_num_tokens`: log, ``/server_info``, ``/v1/loads``, Prometheus, KV metrics of
events), is the tokens that are expected to fit; use is the share of the scarcer of frames and raw
pages that is taken, of that capacity. Leak checks alone keep the virtual pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import find_allocator

SCHEDULER = "sglang.srt.managers.scheduler"
OBSERVER = f"{SCHEDULER}_components.pool_stats_observer.SchedulerPoolStatsObserver"


@dataclass
class PhysicalPoolStats(PoolStats):
    """Publishes physical tokens; what leak checks read of it (available, evictable) is virtual.

    Attributes:
        tokens_running: that requests hold, however few bytes they take: the log's ``#token``.
        virtual_tokens: all that there are, free or not.
    """

    tokens_running: int = 0
    virtual_tokens: int = 0

    def get_decode_usage_msg_parts(self) -> list[str]:
        running = PhysicalPoolStats(**vars(self) | {"full_num_used": self.tokens_running})
        return PoolStats.get_decode_usage_msg_parts(running)

    def update_scheduler_stats(self, stats: Any) -> None:
        super().update_scheduler_stats(stats)
        free = self.full_capacity - self.full_num_used
        stats.kv_evictable_tokens = min(self.full_evictable_size, free)
        stats.kv_available_tokens = free - stats.kv_evictable_tokens


def _publish_physical(result: PoolStats, self: Any) -> PoolStats | None:
    """Statistics of plain models, and of those that have other layers, too."""
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is None:
        return None
    held = allocator.size - result.full_available_size - result.full_evictable_size
    usage = max(held / allocator.size, allocator.capacity.usage(self.tree_cache))
    physical = {
        "full_num_used": round(usage * allocator.store.sizes.expected_tokens),
        "full_token_usage": usage,
        "full_capacity": allocator.store.sizes.expected_tokens,
        "tokens_running": held,
        "virtual_tokens": allocator.size,
    }
    return PhysicalPoolStats(**vars(result) | physical)


def _get_worker_info(result: tuple[Any, ...], self: Any) -> tuple[Any, ...] | None:
    """Capacity, and the longest request and prompt, as the scheduler learns and publishes them."""
    allocator = find_allocator(self.model_runner.token_to_kv_pool_allocator)
    if allocator is None:
        return None
    _, *between, length, prompt = result[:6]
    length = min(length, allocator.capacity.longest_prompt + allocator.page_size)
    prompt = min(prompt, allocator.capacity.longest_prompt)
    return (allocator.store.sizes.expected_tokens, *between, length, prompt, *result[6:])


def _check_virtual_pages(original: Callable[[Any], None], self: Any) -> None:
    """Every virtual page is free, cached or held by somebody."""
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    published = self.max_total_num_tokens
    if allocator is not None:
        self.max_total_num_tokens = allocator.size
    original(self)
    self.max_total_num_tokens = published


def _check_window_models(
    original: Callable[..., Any], self: Any, ps: PoolStats, *args: Any, **kwargs: Any
) -> Any:
    """The same of models with window layers, where SGLang takes the capacity from statistics."""
    if isinstance(ps, PhysicalPoolStats):
        ps = PhysicalPoolStats(**vars(ps) | {"full_capacity": ps.virtual_tokens})
    return original(self, ps, *args, **kwargs)


def install() -> None:
    for kind in ("_get_token_info", "_get_mamba_token_info", "_get_swa_token_info"):
        hook(f"{OBSERVER}.{kind}", _publish_physical, HookType.AFTER, ())
    worker = "sglang.srt.managers.tp_worker.TpModelWorker"
    hook(f"{worker}.get_worker_info", _get_worker_info, HookType.AFTER, ())
    checker = f"{SCHEDULER}.Scheduler.init_invariant_checker"
    hook(checker, _check_virtual_pages, HookType.AROUND, ())
    of_pool = f"{SCHEDULER}_components.invariant_checker.SchedulerInvariantChecker._check_full_pool"
    hook(of_pool, _check_window_models, HookType.AROUND, ("ps",))

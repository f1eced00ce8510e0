# SPDX-License-Identifier: Apache-2.0
"""Hook: pool statistics in ``/server_info``, ``/diffxkv/stats`` and Prometheus."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_diffxkv.metrics import PrometheusGauges, pool_gauges, pool_stats
from sglang_diffxkv.patches.disk import disk_stats
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.window_allocator import find_windows

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sglang.srt.managers.scheduler_components.metrics_reporter import PrefillStats

SCHEDULER = "sglang.srt.managers.scheduler_components"
STATE_KEY = "diffxkv"

EXPORT_INTERVAL_S = 1.0
"""SGLang reports after every decode step, which is more than anybody reads."""


@dataclass
class PrefixHits:
    """Of all prompts that were prefilled since the start; what is retracted and prefilled again
    counts once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, stats: PrefillStats) -> None:
        cached = stats.log_hit_tokens - stats.reprocessed_log_hit_tokens
        self.cached_tokens += cached
        self.prompt_tokens += cached + stats.log_input_tokens - stats.reprocessed_log_input_tokens


_hits = PrefixHits()
_gauges: PrometheusGauges | None = None
_last_export = 0.0


def _add_memory_usage(result: Any, self: Any, state: dict[str, Any]) -> None:
    allocator = find_allocator(self.scheduler.token_to_kv_pool_allocator)
    if allocator is not None:
        windows = find_windows(self.scheduler.token_to_kv_pool_allocator)
        beside = {
            "disk": disk_stats(self.scheduler.tree_cache),
            "prefix": asdict(_hits),
            "dp_rank": get_parallel().dp_rank or 0,
        }
        state[STATE_KEY] = pool_stats(allocator.store, windows) | beside


def _count_hits(
    result: Any, self: Any, batch: Any, prefill_stats: PrefillStats, **kwargs: Any
) -> None:
    _hits.add(prefill_stats)


def _export(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    global _gauges, _last_export
    allocator = find_allocator(self.scheduler.token_to_kv_pool_allocator)
    if not self.enable_metrics or allocator is None:
        return
    if time.monotonic() - _last_export < EXPORT_INTERVAL_S:
        return
    _last_export = time.monotonic()
    if _gauges is None:
        _gauges = PrometheusGauges(dict(self.metrics_collector.labels))
    windows = find_windows(self.scheduler.token_to_kv_pool_allocator)
    disk = disk_stats(self.scheduler.tree_cache)
    _gauges.update(pool_gauges(allocator.store, windows) | {"disk": disk})


def add_route(app: FastAPI) -> None:
    """Add ``GET /diffxkv/stats``."""
    from sglang.srt.entrypoints import http_server

    @app.get("/diffxkv/stats")
    async def diffxkv_stats() -> list[dict[str, Any]] | dict[str, Any]:
        """Pool statistics; a list by data-parallel rank where there are several."""
        states = await http_server._global_state.tokenizer_manager.get_internal_state()
        stats = [state[STATE_KEY] for state in states if STATE_KEY in state]
        stats.sort(key=lambda of_rank: of_rank["dp_rank"])
        return stats[0] if len(stats) == 1 else stats


def install() -> None:
    state = f"{SCHEDULER}.internal_state.SchedulerInternalStateController._add_memory_usage"
    hook(state, _add_memory_usage, HookType.AFTER, ("state",))
    reporter = f"{SCHEDULER}.metrics_reporter.SchedulerMetricsReporter"
    hook(f"{reporter}.report_prefill_stats", _count_hits, HookType.AFTER, ("prefill_stats",))
    for method in ("report_decode_stats", "report_prefill_stats", "_maybe_log_idle_metrics"):
        hook(f"{reporter}.{method}", _export, HookType.AFTER, ())

# SPDX-License-Identifier: Apache-2.0
"""Hook: a server at rest does what has waited for that."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.disk import disk_of
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import find_allocator


def _rest(result: Any, self: Any) -> None:
    allocator = find_allocator(self.scheduler.token_to_kv_pool_allocator)
    if allocator is not None:
        allocator.store.settle()
        allocator.store.policy.on_idle()
        disk = disk_of(self.scheduler.tree_cache)
        if disk is not None:
            disk.backup.rest()


def install() -> None:
    reporter = "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
    hook(f"{reporter}._maybe_log_idle_metrics", _rest, HookType.AFTER, ())

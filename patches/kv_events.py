# SPDX-License-Identifier: Apache-2.0
"""Hook: where a pool has a host level, the radix tree's KV events name the level of each block."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.events import LevelEvents, NoEvents
from sglang_diffxkv.offload.recorder import LevelRecorder
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.page_keys import give_keys
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.store import PageStore


def name_levels(tree: Any, store: PageStore) -> None:
    """Have the events of an empty ``tree`` tell where its pages lie; ``store`` has a host level."""
    recorder, keys, host = tree.tree_core.kv_events, store.directory.key, store.host
    assert host is not None
    assert not isinstance(recorder, LevelRecorder), "the levels of this tree are named already"
    events = tree.tree_core.kv_events = LevelRecorder(recorder, PAGE_TOKENS)
    host.on_offload.append(lambda pages: events.offloaded(keys[pages]))
    host.on_load_back.append(lambda pages: events.loaded_back(keys[pages]))


def level_events(tree: Any) -> LevelEvents:
    """Who is told what becomes of the pages of ``tree``."""
    recorder = tree.tree_core.kv_events
    return recorder if isinstance(recorder, LevelRecorder) else NoEvents()


def _name_levels(result: None, self: Any, params: Any) -> None:
    allocator = find_allocator(params.token_to_kv_pool_allocator)
    if params.enable_kv_cache_events and allocator is not None and allocator.store.host is not None:
        give_keys(self, dynamo=params.dynamo_kv_event_format)
        name_levels(self, allocator.store)


def install() -> None:
    tree = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    hook(f"{tree}.__init__", _name_levels, HookType.AFTER, ("params",))

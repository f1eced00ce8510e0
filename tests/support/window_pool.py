# SPDX-License-Identifier: Apache-2.0
"""Our pool as the full-attention part of SGLang's pools of models with sliding windows."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup
from sglang_diffxkv.pool.window_allocator import DiffXKVWindowAllocator
from tests.support.policies import Shape, config_of, policy_of
from tests.support.scheduling import Scheduling
from tests.support.stores import sizes_of

SHAPE = Shape(layers=2, heads=2)
FULL, WINDOWS = [2, 5], [0, 1, 3, 4]
"""The model's ids of its layers."""
WINDOW_LEFT = 99
"""Tokens before its own that a query sees."""


def _build(setup: PoolSetup, *args: Any, allocation_label: str, **kwargs: Any) -> object:
    """What `patches.pool` has SGLang build."""
    if allocation_label == "SWA":
        return MHATokenToKVPool(*args, **kwargs)
    return DiffXKVPool(*args, setup=setup, **kwargs)


def window_allocator(
    mib: float, window_pages: int, raw_share: float = 0.6, **config: Any
) -> DiffXKVWindowAllocator:
    """SGLang's allocator over a pool of so many MiB beside one of so many pages of window layers;
    the rest are fields of the configuration."""
    policy = policy_of(config_of("diffkv", **config), SHAPE)
    sizes = sizes_of(int(mib * 2**20), policy, raw_share=raw_share)
    setup = PoolSetup(policy, sizes, window_tokens=window_pages * PAGE_TOKENS)
    pool = SWAKVPool(
        sizes.virtual_tokens,
        setup.window_tokens,
        PAGE_TOKENS,
        SHAPE.dtype,
        SHAPE.heads,
        SHAPE.dim,
        WINDOWS,
        FULL,
        "cpu",
        token_to_kv_pool_class=partial(_build, setup),
    )
    return DiffXKVWindowAllocator(
        sizes.virtual_tokens,
        setup.window_tokens,
        page_size=PAGE_TOKENS,
        dtype=SHAPE.dtype,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )


class WindowScheduling(Scheduling):
    """With window layers' K/V in the tree beside pages."""

    components = (ComponentType.FULL, ComponentType.SWA)
    tree_options: ClassVar[dict[str, Any]] = {"sliding_window_size": WINDOW_LEFT}

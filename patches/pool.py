# SPDX-License-Identifier: Apache-2.0
"""Hook: ``KVCacheConfigurator`` sizes and builds our pool and allocator instead of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.pool_setup import make_setup, rank_budget
from sglang_diffxkv.patches.server_args import get_config, is_active
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup, find_pool
from sglang_diffxkv.pool.window_allocator import DiffXKVWindowAllocator

CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"


@dataclass(kw_only=True)
class DiffXKVPoolConfig(MemoryPoolConfig):
    """What SGLang carries from the sizing of memory to whoever builds the pool."""

    setup: PoolSetup


def _config_from_budget(
    original: Callable[..., MemoryPoolConfig],
    self: Any,
    budget_bytes: int,
    *,
    cap_tokens: int | None = None,
) -> MemoryPoolConfig:
    if not is_active():
        return original(self, budget_bytes, cap_tokens=cap_tokens)
    from sglang.srt.runtime_context import get_schedule

    caps = [c for c in (cap_tokens, get_schedule().max_total_tokens) if c is not None]
    config = get_config()
    if self.mambaish_config is None:  # otherwise it is what states left of it (`linear_state`)
        budget_bytes = rank_budget(config, self, budget_bytes)
    setup = make_setup(config, self, budget_bytes, min(caps, default=None))
    tokens, has_windows = setup.sizes.virtual_tokens, self.is_hybrid_swa
    self.memory_pool_config = DiffXKVPoolConfig(
        max_total_num_tokens=tokens,
        full_max_total_num_tokens=tokens if has_windows else None,
        swa_max_total_num_tokens=setup.window_tokens if has_windows else None,
        setup=setup,
    )
    return self.memory_pool_config


def _resolve_kv_pool_class(
    original: Callable[..., type], self: Any, *, kind: str, default: type
) -> Callable[..., Any]:
    config, stock = self.memory_pool_config, original(self, kind=kind, default=default)
    if not isinstance(config, DiffXKVPoolConfig) or kind != "mha" or self.is_draft_worker:
        return stock
    return partial(_build_pool, stock, config.setup)


def _build_pool(
    window_pool: type, setup: PoolSetup, *args: Any, allocation_label: str = "", **kwargs: Any
) -> Any:
    """Ours, for all layers or for those with full attention; SGLang's for window layers."""
    if allocation_label == "SWA":
        return window_pool(*args, allocation_label=allocation_label, **kwargs)
    return DiffXKVPool(*args, setup=setup, **kwargs)


def _build_allocator(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    pool = kwargs["token_to_kv_pool"]
    if find_pool(pool) is None or kwargs["token_to_kv_pool_allocator"] is not None:
        return original(self, **kwargs)
    sizes, common = (
        kwargs["sizes"],
        {
            "page_size": PAGE_TOKENS,
            "dtype": self.kv_cache_dtype,
            "device": self.device,
            "kvcache": pool,
            "need_sort": False,
        },
    )
    if not self.is_hybrid_swa:
        return DiffXKVAllocator(sizes.max_total_num_tokens, **common)
    return DiffXKVWindowAllocator(
        sizes.full_max_total_num_tokens, sizes.swa_max_total_num_tokens, **common
    )


def install() -> None:
    for method, function, parameters in (
        ("config_from_budget", _config_from_budget, ("budget_bytes", "cap_tokens")),
        ("_resolve_kv_pool_class", _resolve_kv_pool_class, ("kind", "default")),
        (
            "_build_token_to_kv_pool_allocator",
            _build_allocator,
            ("sizes", "token_to_kv_pool", "token_to_kv_pool_allocator"),
        ),
    ):
        hook(f"{CONFIGURATOR}.{method}", function, HookType.AROUND, parameters)

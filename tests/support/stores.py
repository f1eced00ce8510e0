# SPDX-License-Identifier: Apache-2.0
"""Page stores, SGLang's allocator over one, and a cache that stands in for the radix tree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup
from sglang_diffxkv.pool.sizing import VIRTUAL_SLACK, PoolBudget, PoolSizes, size_pool
from sglang_diffxkv.pool.store import PageStore
from tests.support.policies import Shape, config_of, policy_of

STORE = Shape(layers=3, heads=2)
ALLOCATOR = Shape(layers=2, heads=2)


def sizes_of(
    budget: int, policy: TierPolicy, raw_share: float, virtual_slack: float = VIRTUAL_SLACK
) -> PoolSizes:
    """The sizes of a pool of so many bytes, the policy's own ones included."""
    memory = PoolBudget(
        budget - policy.nbytes, raw_share, virtual_slack, host_bytes=policy.config.host_bytes
    )
    return size_pool(memory, policy.layout, policy.caps, policy.expected_fill)


def make_store(
    policy: str,
    budget: int = 5 << 20,
    virtual_slack: float = VIRTUAL_SLACK,
    *,
    shape: Shape = STORE,
    raw_share: float = 0.3,
    device: str = "cpu",
    **config: Any,
) -> PageStore:
    """A store of so many bytes; what else is given are fields of the configuration."""
    graded = policy_of(config_of(policy, **config), shape)
    sizes = sizes_of(budget, graded, raw_share, virtual_slack)
    return PageStore(sizes, graded, shape.dtype, device)


def make_allocator(policy: str = "diffkv", mib: float = 3, **config: Any) -> DiffXKVAllocator:
    """SGLang's allocator over a pool of so many MiB; the rest are fields of the configuration."""
    return allocator_of(config_of(policy, **config), int(mib * 2**20), ALLOCATOR, raw_share=0.4)


def allocator_of(
    config: DiffXKVConfig,
    budget: int,
    shape: Shape,
    raw_share: float,
    virtual_slack: float = VIRTUAL_SLACK,
) -> DiffXKVAllocator:
    """SGLang's allocator over a pool on the CPU, as SGLang makes both."""
    policy = policy_of(config, shape)
    sizes = sizes_of(budget, policy, raw_share, virtual_slack)
    pool = DiffXKVPool(
        sizes.virtual_tokens,
        page_size=PAGE_TOKENS,
        dtype=shape.dtype,
        head_num=shape.heads,
        head_dim=shape.dim,
        layer_num=shape.layers,
        device="cpu",
        enable_memory_saver=False,
        setup=PoolSetup(policy, sizes),
    )
    return DiffXKVAllocator(
        sizes.virtual_tokens,
        page_size=PAGE_TOKENS,
        dtype=shape.dtype,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )


class PrefixCache:
    """Stands in for the radix tree: whole sequences of full pages, the oldest evicted first.

    Attributes:
        req_to_token_pool: SGLang's, as far as it is looked at: the table.
    """

    def __init__(self, allocator: DiffXKVAllocator, table: torch.Tensor | None = None) -> None:
        self.allocator = allocator
        if table is None:
            table = torch.zeros(0, 0, dtype=torch.int32)
        self.req_to_token_pool = SimpleNamespace(req_to_token=table)
        self.sequences: list[torch.Tensor] = []

    def supports_prefix_sharing(self) -> bool:
        return True

    def supports_mamba(self) -> bool:
        return False

    def evictable_size(self) -> int:
        return sum(len(slots) for slots in self.sequences)

    def evict_for_alloc(
        self, params: EvictParams, *, allocation_reclaim_satisfied: Any = None
    ) -> EvictResult:
        evicted = 0
        while self.sequences and evicted < params.num_tokens:
            if allocation_reclaim_satisfied is not None and allocation_reclaim_satisfied():
                break
            slots = self.sequences.pop(0)
            self.allocator.free_segment(slots, start_pos=0)
            evicted += len(slots)
        return EvictResult(num_tokens_evicted=evicted)

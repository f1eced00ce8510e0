# SPDX-License-Identifier: Apache-2.0
"""Our pool as the attention part of SGLang's pools of hybrid models, which hold states, too."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_mamba_slots
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup
from tests.support.policies import config_of, policy_of
from tests.support.scheduling import Scheduling
from tests.support.stores import ALLOCATOR, sizes_of

LINEAR, ATTENTION = [0, 2], [1, 3]
"""The model's ids of its layers."""


def hybrid_rows(requests: int, states: int) -> HybridReqToTokenPool:
    """Rows of so many requests, and states of linear layers, as SGLang makes both."""
    shape = Mamba2StateShape.create(
        tp_world_size=1, intermediate_size=16, n_groups=1, num_heads=2, head_dim=8, state_size=4,
        conv_kernel=4,
    )  # fmt: skip
    return HybridReqToTokenPool(
        size=requests,
        mamba_size=states,
        mamba_spec_state_size=requests,
        max_context_len=1 << 14,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=LINEAR),
        mamba_layer_ids=LINEAR,
        enable_mamba_extra_buffer=True,
        enable_overlap_schedule=False,
    )


def hybrid_allocator(
    rows: HybridReqToTokenPool, policy: str = "diffkv", mib: float = 3, **config: Any
) -> DiffXKVAllocator:
    """SGLang's allocator over a hybrid pool whose attention layers are ours, of so many MiB; the
    rest are fields of the configuration."""
    graded = policy_of(config_of(policy, **config), ALLOCATOR)
    sizes = sizes_of(int(mib * 2**20), graded, raw_share=0.4)
    pool = HybridLinearKVPool(
        size=sizes.virtual_tokens,
        dtype=ALLOCATOR.dtype,
        page_size=PAGE_TOKENS,
        head_num=ALLOCATOR.heads,
        head_dim=ALLOCATOR.dim,
        full_attention_layer_ids=ATTENTION,
        device="cpu",
        mamba_pool=rows.mamba_pool,
        full_kv_pool_class=partial(DiffXKVPool, setup=PoolSetup(graded, sizes)),
    )
    return DiffXKVAllocator(
        sizes.virtual_tokens,
        page_size=PAGE_TOKENS,
        dtype=ALLOCATOR.dtype,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )


class HybridScheduling(Scheduling):
    """With states in the tree beside pages: each prefill leaves one at the end of its last page."""

    rows: HybridReqToTokenPool
    components = (ComponentType.FULL, ComponentType.MAMBA)

    def _write(self, requests: list[Req], spans: list[tuple[int, int]]) -> None:
        super()._write(requests, spans)
        for request, (start, end) in zip(requests, spans, strict=True):
            tracked = end // PAGE_TOKENS * PAGE_TOKENS
            request.kv.mamba_last_track_seqlen = tracked if tracked > start else None

    @property
    def states_held(self) -> int:
        """By requests: what their layers go on with, and what is kept for the tree.

        Who waits has a copy of the state that its cached prefix ends with.
        """
        return sum(kv_mamba_slots(request.kv) for request in (*self.held, *self.waiting))

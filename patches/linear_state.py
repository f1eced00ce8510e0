# SPDX-License-Identifier: Apache-2.0
"""Hook: states of linear-attention and Mamba layers come out of the budget that our pool has.

SGLang takes them from the memory that it would give its own pool, which need not be what ours gets:
`memory_bytes`, or a share of a host's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import HYBRID_GDN_SM100_BACKENDS
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.pool_setup import make_agreement, rank_budget
from sglang_diffxkv.patches.server_args import get_config, is_active
from sglang_diffxkv.patches.validation import BACKEND

logger = logging.getLogger(__name__)

GIB = 2**30


def _set_states_aside(original: Callable[..., float], self: Any, total_rest_memory: float) -> float:
    """Size the states; both are GiB, of all that is to be divided, and of what is left of it.

    Raises:
        ValueError: nothing is left for the pool.
    """
    if not is_active() or self.is_draft_worker:
        return original(self, total_rest_memory)
    from sglang.srt.runtime_context import get_parallel, get_schedule

    agree = make_agreement(get_parallel().attn_tp_group)
    budget = rank_budget(get_config(), self, int(total_rest_memory * GIB))
    total = -agree(torch.tensor([-budget], dtype=torch.float64)).item() / GIB
    left = original(self, total)
    slots = get_schedule().max_mamba_cache_size
    if left <= 0:
        raise ValueError(
            f"diffxkv: {slots} states of linear layers take {total - left:.2f} GiB, the pool's "
            f"whole budget of {total:.2f}: lower --max-mamba-cache-size, or raise memory_bytes or "
            "--mem-fraction-static"
        )
    logger.info(
        "diffxkv: of %.3f GiB %d states of linear layers, each of %.0f KiB, take %.3f, and the "
        "pool gets %.3f; --mamba-full-memory-ratio or --max-mamba-cache-size changes that",
        total,
        slots,
        (total - left) * 2**20 / (slots + 1),
        total - left,
        left,
    )
    return left


def install() -> None:
    # SGLang asserts that full attention beside gated delta layers is one of these on Blackwell.
    HYBRID_GDN_SM100_BACKENDS.add(BACKEND)
    configurator = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
    hook(
        f"{configurator}._handle_max_mamba_cache",
        _set_states_aside,
        HookType.AROUND,
        ("total_rest_memory",),
    )

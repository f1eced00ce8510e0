# SPDX-License-Identifier: Apache-2.0
"""Hook: ``KVCacheConfigurator`` sizes and builds our pool and allocator instead of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.server_args import (
    fraction_is_given,
    get_config,
    is_active,
    ranks_per_host,
)
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.host_memory import available_memory, default_budget, on_each, too_much
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK, VIRTUAL_SLACK, plan_pool

logger = logging.getLogger(__name__)

CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"

RAW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of raw pages: what the kernels read and write."""

MOST_RUNNING = 256
"""Requests at once where neither flags nor CUDA graphs say how many."""

_setup: PoolSetup | None = None
"""Made when memory is sized, used when the pool is built moments later in the same process."""


def _keep_model_dtype(result: None, self: Any) -> None:
    """Raw pages stay in the model's dtype where a checkpoint asks for fp8 KV.

    Its scales are for storing fp8, and nobody reads them here: to keep more is to lose less.
    """
    if not is_active() or self.kv_cache_dtype in RAW_DTYPES:
        return
    logger.info(
        "diffxkv: the checkpoint asks for KV in %s; raw pages stay in the model's %s, and its KV "
        "scales are not used",
        self.kv_cache_dtype,
        self.dtype,
    )
    self.kv_cache_dtype, self.kv_cache_dtype_str = self.dtype, "auto"


def _check_dtype(dtype: torch.dtype, model: torch.dtype) -> None:
    """
    Raises:
        ValueError: no kernel reads or writes raw pages in it, or it is not the model's.
    """
    if dtype not in RAW_DTYPES or dtype != model:
        known = ", ".join(str(x).removeprefix("torch.") for x in RAW_DTYPES)
        raise ValueError(
            f"diffxkv: KV in {dtype} of a model in {model} is not supported, only in the model's "
            f"dtype, and in {known}: leave out --kv-cache-dtype, or choose another --dtype"
        )


def make_setup(
    config: DiffXKVConfig, configurator: Any, budget_bytes: int, cap_tokens: int | None
) -> PoolSetup:
    """Divide the budget for the configurator's model on this rank, as all ranks do.

    Raises:
        ValueError: the budget is too small (one line that says what to raise), or the dtype is
            unknown.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel, model = get_parallel(), configurator.model_config
    _check_dtype(configurator.kv_cache_dtype, model.dtype)
    config = config.of_rank(parallel.attn_tp_rank, parallel.attn_tp_size)
    agree = make_agreement(parallel.attn_tp_group)
    num_layers = configurator.layer_info.num_effective_layers
    policy = make_policy(
        config,
        head_dim=model.head_dim,
        num_kv_heads=model.get_num_kv_heads(parallel.attn_tp_size),
        raw_itemsize=torch.empty(0, dtype=configurator.kv_cache_dtype).element_size(),
        num_layers=num_layers,
    )
    # What each rank measured or learnt by itself: the least memory, the fullest pages of any, and
    # what FlashInfer takes where one has it.
    attention = _attention_bytes(configurator, policy.layout, num_layers)
    own = torch.tensor([-budget_bytes, policy.expected_fill, attention], dtype=torch.float64)
    least, expected_fill, attention = agree(own).tolist()
    plan = plan_pool(
        (config.memory_bytes or int(-least)) - policy.nbytes,
        policy.layout,
        num_layers,
        policy.caps,
        expected_fill,
        config.raw_share,
        max_virtual_pages=None if cap_tokens is None else cap_tokens // PAGE_TOKENS,
        virtual_slack=DEMOTION_SLACK if policy.can_demote else VIRTUAL_SLACK,
        attention_bytes=int(attention),
    )
    _check_chunk(plan.raw_pages)
    return PoolSetup(config, policy.layout, policy, plan, agree)


def _attention_bytes(configurator: Any, layout: PageLayout, num_layers: int) -> int:
    """What attention keeps beside the pages; nothing to speak of on a CPU.

    Makes FlashInfer ready first: whether it can be decides about its workspace, which is not in use
    yet when SGLang looks how much memory is free.
    """
    if configurator.device != "cuda":
        return 0
    from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule

    from sglang_diffxkv.kernels.extend import flashinfer
    from sglang_diffxkv.kernels.gpu.workspace import attention_bytes

    model, graphs = configurator.model_config, get_exec().graph.cuda_graph_config
    batch = get_schedule().max_running_requests or graphs.decode.max_bs or MOST_RUNNING
    device = torch.device(configurator.device)
    heads = model.num_attention_heads // get_parallel().attn_tp_size
    shape = flashinfer.Shape(
        device, configurator.kv_cache_dtype, heads, layout.num_kv_heads, layout.head_dim
    )
    return attention_bytes(
        layout,
        num_layers,
        heads,
        batch,
        -(-model.context_len // PAGE_TOKENS),
        device,
        flashinfer=flashinfer.make_ready(shape),
    )


def make_agreement(group: Any) -> Agree:
    """`Agree` of SGLang's ``GroupCoordinator`` of attention ranks.

    It uses the group's gloo processes: the numbers are for the host, which waits for them in any
    case, and pages are sealed and demoted on two streams, between which NCCL calls of several
    communicators may come to be ordered differently on different ranks.
    """
    if group.world_size == 1:
        return alone

    def agree(values: torch.Tensor) -> torch.Tensor:
        most = values.to("cpu", copy=True)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group.cpu_group)
        return most.to(values.device)

    return agree


def host_budget(memory_bytes: int | None, budget_bytes: int) -> int:
    """What this rank may take of the host's memory, from what SGLang would give its own pool.

    SGLang would leave next to nothing to the host, and does not know how many ranks share it.

    Raises:
        ValueError: the ranks' ``memory_bytes`` are more than is left now that the model is loaded.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel, available = get_parallel(), available_memory()
    ranks = ranks_per_host(parallel)
    if memory_bytes is not None:
        problem = too_much(memory_bytes, available, ranks)
        if problem is not None:
            raise ValueError(f"diffxkv: {problem}")
    if memory_bytes is not None or fraction_is_given():
        return budget_bytes
    chosen = default_budget(budget_bytes, available, ranks)
    if parallel.tp_rank == 0:
        logger.info(
            "diffxkv: the pool takes %.2f GiB%s of the %.1f GiB that this host has available; "
            "memory_bytes or --mem-fraction-static changes that",
            chosen / 2**30,
            on_each(ranks),
            available / 2**30,
        )
    return chosen


def _check_chunk(raw_pages: int) -> None:
    """Without the radix cache SGLang takes whole chunks only: one must fit into the raw pages.

    Raises:
        ValueError: it does not.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule

    largest = (raw_pages - 1) * PAGE_TOKENS
    if get_memory().disable_radix_cache and get_schedule().chunked_prefill_size > largest:
        raise ValueError(
            f"diffxkv: with --disable-radix-cache, --chunked-prefill-size may be at most {largest} "
            f"({raw_pages} raw pages): lower it, or raise memory_bytes or raw_share"
        )


def _config_from_budget(
    original: Callable[..., Any],
    self: Any,
    budget_bytes: int,
    *,
    cap_tokens: int | None = None,
) -> Any:
    stock = original(self, budget_bytes, cap_tokens=cap_tokens)
    if not is_active():
        return stock
    from sglang.srt.runtime_context import get_schedule

    caps = [c for c in (cap_tokens, get_schedule().max_total_tokens) if c is not None]
    config = get_config()
    if self.device == "cpu":
        budget_bytes = host_budget(config.memory_bytes, budget_bytes)
    global _setup
    _setup = make_setup(config, self, budget_bytes, min(caps, default=None))
    return dataclasses.replace(stock, max_total_num_tokens=_setup.plan.virtual_tokens)


def _resolve_kv_pool_class(
    original: Callable[..., type], self: Any, *, kind: str, default: type
) -> type:
    if _setup is None or kind != "mha" or self.is_draft_worker:
        return original(self, kind=kind, default=default)
    return DiffXKVPool.with_setup(_setup)


def _build_allocator(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    pool = kwargs["token_to_kv_pool"]
    if not isinstance(pool, DiffXKVPool) or kwargs["token_to_kv_pool_allocator"] is not None:
        return original(self, **kwargs)
    return DiffXKVAllocator(
        kwargs["sizes"].max_total_num_tokens,
        page_size=PAGE_TOKENS,
        dtype=self.kv_cache_dtype,
        device=self.device,
        kvcache=pool,
        need_sort=False,
    )


def install() -> None:
    runner = "sglang.srt.model_executor.model_runner.ModelRunner.configure_kv_cache_dtype"
    hook(runner, _keep_model_dtype, HookType.AFTER, ())
    hook(
        f"{CONFIGURATOR}.config_from_budget",
        _config_from_budget,
        HookType.AROUND,
        ("budget_bytes", "cap_tokens"),
    )
    hook(
        f"{CONFIGURATOR}._resolve_kv_pool_class",
        _resolve_kv_pool_class,
        HookType.AROUND,
        ("kind", "default"),
    )
    hook(
        f"{CONFIGURATOR}._build_token_to_kv_pool_allocator",
        _build_allocator,
        HookType.AROUND,
        ("sizes", "token_to_kv_pool", "token_to_kv_pool_allocator"),
    )

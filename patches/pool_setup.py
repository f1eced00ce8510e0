# SPDX-License-Identifier: Apache-2.0
"""How large the pool of this rank gets, and by which policy: decided when SGLang divides memory."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sglang_diffxkv.attention.layer_softmax import softmaxes_of
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.patches.draft_pool import DRAFT_SLACK, draft_token_bytes, log_draft_pool
from sglang_diffxkv.patches.kv_dtype import check_dtype
from sglang_diffxkv.patches.server_args import fraction_is_given, ranks_per_host
from sglang_diffxkv.patches.window_setup import log_division, window_layers
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.pool.host_memory import (
    available_memory,
    default_budget,
    on_each,
    too_much,
    too_much_on_host,
)
from sglang_diffxkv.pool.kv_pool import PoolSetup
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK, VIRTUAL_SLACK, PoolBudget, size_pool
from sglang_diffxkv.pool.window_sizing import SLOT_BYTES, WindowLayers, size_window_pool

logger = logging.getLogger(__name__)

MOST_RUNNING = 256
"""Requests at once where neither flags nor CUDA graphs say how many."""


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
    check_dtype(configurator.kv_cache_dtype, model.dtype)
    config = config.of_rank(parallel.attn_tp_rank, parallel.attn_tp_size)
    agree = make_agreement(parallel.attn_tp_group)
    num_layers = _full_attention_layers(configurator)
    policy = make_policy(
        config,
        head_dim=model.head_dim,
        num_kv_heads=model.get_num_kv_heads(parallel.attn_tp_size),
        raw_itemsize=torch.empty(0, dtype=configurator.kv_cache_dtype).element_size(),
        num_layers=num_layers,
    )
    # What each rank measured or learnt by itself: the least memory, the fullest pages of any, what
    # the policy keeps, and what FlashInfer takes where one has it.
    attention = _attention_bytes(configurator, policy.layout, num_layers)
    own = [-budget_bytes, policy.expected_fill, policy.nbytes, attention]
    agreed = agree(torch.tensor(own, dtype=torch.float64)).tolist()
    least, expected_fill, policy_bytes, attention = agreed
    draft_bytes = draft_token_bytes(configurator)
    slack = DEMOTION_SLACK if policy.can_demote else VIRTUAL_SLACK
    nbytes, windows = int(-least) - int(policy_bytes), window_layers(configurator)
    window_tokens = window_bytes = 0
    if windows is not None:
        sealed = sum(policy.caps) * expected_fill / PAGE_TOKENS
        token_bytes = sealed / (1 - config.raw_share) + draft_bytes
        window_tokens = size_window_pool(windows, nbytes, token_bytes, cap_tokens)
        window_bytes = (window_tokens + PAGE_TOKENS) * windows.token_bytes
        log_division(windows, window_tokens, window_bytes, nbytes)
    budget = PoolBudget(
        nbytes - window_bytes,
        config.raw_share,
        virtual_slack=DRAFT_SLACK if draft_bytes else slack,
        max_virtual_pages=None if cap_tokens is None else cap_tokens // PAGE_TOKENS,
        attention_bytes=int(attention),
        slot_bytes=draft_bytes + (0 if windows is None else SLOT_BYTES),
        host_bytes=config.host_bytes,
        whole_bytes=config.memory_bytes or int(-least),
    )
    sizes = size_pool(budget, policy.layout, policy.caps, expected_fill)
    _check_chunk(sizes.raw_pages, windows, window_tokens)
    _check_host_level(config.host_bytes)
    if draft_bytes:
        log_draft_pool(draft_bytes, sizes.virtual_tokens)
    return PoolSetup(policy, sizes, agree, window_tokens)


def _full_attention_layers(configurator: Any) -> int:
    """How many layers' KV is ours: SGLang keeps what others need beside it."""
    layers, linear = configurator.layer_info, configurator.mambaish_config
    full = (layers if linear is None else linear).full_attention_layer_ids
    return layers.num_effective_layers if full is None else len(full)


def _attention_bytes(configurator: Any, layout: PageLayout, num_layers: int) -> int:
    """What attention keeps beside the pages; nothing to speak of on a CPU.

    Makes FlashInfer ready first: whether it can be decides about its workspace, which is not in use
    yet when SGLang looks how much memory is free.
    """
    if configurator.device != "cuda":
        return 0
    from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule, get_spec

    from sglang_diffxkv.kernels.extend import flashinfer
    from sglang_diffxkv.kernels.workspace import attention_bytes

    model, graphs = configurator.model_config, get_exec().graph.cuda_graph_config
    batch = get_schedule().max_running_requests or graphs.decode.max_bs or MOST_RUNNING
    device = torch.device(configurator.device)
    heads = model.num_attention_heads // get_parallel().attn_tp_size
    shape = flashinfer.Shape(
        device, configurator.kv_cache_dtype, heads, layout.num_kv_heads, layout.head_dim
    )
    flashinfer.make_ready(shape, softmaxes_of(configurator.model))
    return attention_bytes(
        layout,
        num_layers,
        heads * (get_spec().speculative_num_draft_tokens or 1),
        batch,
        -(-model.context_len // PAGE_TOKENS),
        device,
        flashinfer_bytes=flashinfer.workspace_bytes(),
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


def rank_budget(config: DiffXKVConfig, configurator: Any, budget_bytes: int) -> int:
    """What this rank may take, from what SGLang would give its own pool.

    Raises:
        ValueError: as `host_budget`.
    """
    if configurator.device == "cpu":
        budget_bytes = host_budget(config.memory_bytes, budget_bytes)
    return config.memory_bytes or budget_bytes


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


def _check_host_level(host_bytes: int) -> None:
    """
    Raises:
        ValueError: there is no prefix cache whose pages could go to host memory, or too little of
            that.
    """
    from sglang.srt.runtime_context import get_memory, get_parallel

    if not host_bytes:
        return
    if get_memory().disable_radix_cache:
        raise ValueError(
            "diffxkv: host_bytes is for prefixes that nobody reads, which --disable-radix-cache "
            "does not keep: leave out one of them"
        )
    problem = too_much_on_host(host_bytes, available_memory(), ranks_per_host(get_parallel()))
    if problem is not None:
        raise ValueError(f"diffxkv: {problem}")


def _check_chunk(raw_pages: int, windows: WindowLayers | None, window_tokens: int) -> None:
    """Without the radix cache SGLang takes whole chunks only: one must fit into the raw pages.

    With it chunks are shortened where the window layers' pool is small; without it only the chunk
    that runs and what lies behind the windows of the next one can be freed, so they must fit, too.

    Raises:
        ValueError: it does not.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule

    if not get_memory().disable_radix_cache:
        return
    largest, room = (raw_pages - 1) * PAGE_TOKENS, f"{raw_pages} raw pages"
    if windows is not None:
        # SGLang frees in whole pages, a page late, and admits nobody without one to spare.
        beside = windows.window_left + 1 + 4 * PAGE_TOKENS
        of_windows = max(0, window_tokens - beside) // PAGE_TOKENS * PAGE_TOKENS
        if of_windows < largest:
            largest, room = of_windows, f"{window_tokens} tokens of window layers"
    if get_schedule().chunked_prefill_size > largest:
        raise ValueError(
            f"diffxkv: with --disable-radix-cache, --chunked-prefill-size may be at most {largest} "
            f"({room}): lower it, or raise memory_bytes or raw_share"
        )

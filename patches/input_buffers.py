# SPDX-License-Identifier: Apache-2.0
"""Hook: SGLang's input buffers hold the longest batch there can be, not as many tokens as the pool.

For batches that no CUDA graph holds SGLang keeps 48 bytes of inputs for each token slot, as where
prompts are not chunked one of them may fill the pool. Ours has several times the slots of its own
pool in the same memory, and takes chunks only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.server_args import is_active

SLACK = 2
"""Times the longest batch: the buffers are small all the same."""


def _build(original: Callable[..., Any], *, max_bs: int, max_num_token: int, **kwargs: Any) -> Any:
    if is_active():
        max_num_token = min(max_num_token, SLACK * longest_batch(max_bs))
    return original(max_bs=max_bs, max_num_token=max_num_token, **kwargs)


def longest_batch(max_bs: int) -> int:
    """Tokens of a batch at most: a prefill step's, and one of every running request."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    return max(schedule.chunked_prefill_size, schedule.max_prefill_tokens) + max_bs


def install() -> None:
    hook(
        "sglang.srt.model_executor.cuda_graph_buffer_registry.build_eager_registry",
        _build,
        HookType.AROUND,
        ("max_bs", "max_num_token"),
    )

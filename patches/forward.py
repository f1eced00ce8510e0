# SPDX-License-Identifier: Apache-2.0
"""Hook: the model's forward pass writes K/V through our pool, and ends with sealing."""

from __future__ import annotations

from typing import Any

from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_diffxkv.attention.backend import find_backend
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.server_args import is_active
from sglang_diffxkv.pool.kv_pool import find_pool

_INDICES = "diffxkv_req_pool_indices"


def _note_requests(result: Any, cls: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Whose tokens they are: on the host, and not by ids, which clients may give twice."""
    if is_active():
        setattr(result, _INDICES, [req.kv.req_pool_idx for req in batch.reqs])


def _before_forward(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """What SGLang does not tell backends: which requests run, and that it runs mixed batches as
    prefills."""
    backend = find_backend(self.attn_backend)
    if backend is not None:
        backend.is_mixed = forward_batch.forward_mode.is_mixed()
        backend.batch_indices = getattr(forward_batch, _INDICES, None)


def _before_replay(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """Speculative workers load a verification into its graph before its forward pass begins."""
    _before_forward(self.model_runner, forward_batch)


def _after_forward(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    backend = find_backend(self.attn_backend)
    if backend is not None:
        backend.end_of_step()
        # Sealing was enqueued after the event that SGLang would wait for before it frees pages.
        self.shared_read_done_event = None
        store = backend.store
        # Does nothing unless SGLANG_ENABLE_RANK_CONSENSUS_CHECKER is set.
        assert_same("diffxkv: %s, %s", store.ledger, store.counters)


def _no_fused_write(result: bool, forward_batch: Any) -> bool:
    """Rotary kernels of some models write K/V to SGLang's own buffers, which we do not have."""
    return result and find_pool(get_token_to_kv_pool()) is None


def install() -> None:
    hook(
        "sglang.srt.models.utils.enable_fused_set_kv_buffer",
        _no_fused_write,
        HookType.AFTER,
        ("forward_batch",),
    )
    forward = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
    batch = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
    hook(batch, _note_requests, HookType.AFTER, ("batch",))
    graphs = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
    hook(f"{graphs}.load_batch", _before_replay, HookType.BEFORE, ("forward_batch",))
    hook(forward, _before_forward, HookType.BEFORE, ("forward_batch",))
    hook(forward, _after_forward, HookType.AFTER, ("forward_batch",))

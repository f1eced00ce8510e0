# SPDX-License-Identifier: Apache-2.0
"""Hook: SGLang's speculative workers draft chains, and on a CPU they have what they run on.

Installed when a worker is made, as SGLang imports none before, nor on a CPU can.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches import chains_cpu
from sglang_diffxkv.patches.hook import HookError, apply_now, hook
from sglang_diffxkv.patches.server_args import is_active

_WORKERS = "sglang.srt.speculative"


def longest_chain(drafts: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The longest branch of each tree, and zeros behind it, as a chain.

    NGRAM merges what follows each suffix of a text, so that its trees branch at any breadth; what
    it has not filled are zeros that follow the root.

    Args:
        drafts: [B, N] tokens; those of a branch are in order.
        mask: [B, N, N] which nodes a node's branch consists of, itself included.

    Returns:
        tokens [B, N], and their mask [B, N, N].
    """
    nodes = drafts.shape[1]
    leaf = mask.sum(2).argmax(1)
    on_branch = np.take_along_axis(mask, leaf[:, None, None], 1)[:, 0].astype(bool)
    order = np.argsort(~on_branch, axis=1, kind="stable")
    tokens = np.take_along_axis(np.where(on_branch, drafts, 0), order, 1)
    causal = np.tril(np.ones((nodes, nodes), mask.dtype))
    return tokens, np.broadcast_to(causal, mask.shape)


def _as_chains(
    result: tuple[np.ndarray, np.ndarray], self: Any, *args: Any
) -> tuple[np.ndarray, np.ndarray]:
    nodes = self.draft_token_num
    drafts, mask = result
    tokens, causal = longest_chain(drafts.reshape(-1, nodes), mask.reshape(-1, nodes, nodes))
    return tokens.reshape(-1), causal.reshape(-1)


def _stay(*args: Any) -> None:
    """Accepted tokens of a chain are where they should be: at its front."""


def _no_moves(original: Callable[[Any], None], self: Any) -> None:
    """Nor do pools, ours and the draft model's, need the kernel that moves tokens."""
    if not is_active():
        original(self)


def _prepare(self: Any, server_args: Any) -> None:
    if not is_active():
        return
    chains_cpu.install()
    if self.is_ngram():
        drafts = f"{_WORKERS}.ngram_worker.NGRAMWorker._prepare_draft_tokens"
        hook(drafts, _as_chains, HookType.AFTER, ("batch",))
        if not resolving_view(server_args).enable_watermark:
            _short_masks()
    move = f"{_WORKERS}.spec_utils.move_accept_tokens_to_target_kvcache"
    hook(move, _stay, HookType.REPLACE, ("accept_index",))
    apply_now()


def _short_masks() -> None:
    """Nobody reads the masks, which NGRAM else makes as long as each request's text."""
    worker: Any = importlib.import_module(f"{_WORKERS}.ngram_worker")
    if not hasattr(worker, "USE_FULL_MASK"):
        raise HookError("diffxkv: SGLang's ngram_worker has no USE_FULL_MASK")
    worker.USE_FULL_MASK = False


def install() -> None:
    create = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
    hook(create, _prepare, HookType.BEFORE, ("server_args",))
    pool = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
    hook(f"{pool}._init_kv_copy_and_warmup", _no_moves, HookType.AROUND, ())

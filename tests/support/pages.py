# SPDX-License-Identifier: Apache-2.0
"""What a backend tells a store of its open pages, for tests that have none."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.running import RunningRequest
from sglang_diffxkv.pool.store import PageStore

EVERY_SLOT = slice(None)


def running(quality: Quality, step: int = 0) -> RunningRequest:
    """A request that shares no page."""
    request = SimpleNamespace(last_node=0, kv=SimpleNamespace(cache_protected_len=0))
    return RunningRequest(quality, step, request)


def count(store: PageStore, pages: torch.Tensor, filled: torch.Tensor) -> None:
    """Tokens are written to ``pages`` (int64 [N], distinct), up to ``filled`` [N] of each."""
    before = store.directory.filled[pages]
    full = (
        (filled == PAGE_TOKENS) & (before < PAGE_TOKENS) & ~store.directory.never_compressed(pages)
    )
    store.ledger.commit(int((filled - before).sum()), int(full.sum()))


def write(
    store: PageStore,
    pages: torch.Tensor,
    position: torch.Tensor,
    context: torch.Tensor,
    window: int = 64,
) -> None:
    """Count what a step writes, and note it; arguments as for `Recency.touch`."""
    own, place = torch.unique(pages, return_inverse=True)
    filled = (context - position * PAGE_TOKENS).clamp(max=PAGE_TOKENS)
    most = torch.zeros_like(own).scatter_reduce_(0, place, filled, "amax")
    count(store, own, most)
    store.recency.touch(pages, position, context, window)


def ask(store: PageStore, pages: torch.Tensor, levels: Sequence[Quality]) -> None:
    """Open ``pages`` (int64 [N], distinct) are of requests that asked for these qualities."""
    lossless = torch.tensor([level is Quality.LOSSLESS for level in levels], dtype=torch.bool)
    full = int((store.directory.filled[pages][lossless] == PAGE_TOKENS).sum())
    store.note_quality(pages, levels, full)

# SPDX-License-Identifier: Apache-2.0
"""Readable reference of extend: one query of one head at a time, in float64."""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, head_counts
from sglang_diffxkv.kernels.merge import AttentionState, empty_state
from sglang_diffxkv.kernels.pack import unpack
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax, capped


def attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
) -> tuple[torch.Tensor, float]:
    """Output [D] and base-2 LSE of one query [D] over tokens [L, D]."""
    if len(k) == 0:
        return torch.zeros_like(q, dtype=torch.float64), -math.inf
    scores = capped(k.double() @ q.double() * softmax.scale, softmax.cap)
    lse = scores.logsumexp(0)
    return (scores - lse).exp() @ v.double(), float(lse) / math.log(2)


def extend_sealed(queries: Queries, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    """See `extend.extend_sealed`."""
    q, indptr = queries.q, sealed.indptr
    state = empty_state(q)
    group = q.shape[1] // sealed.layout.num_kv_heads
    for b in range(len(indptr) - 1):
        mine = sealed.pages[indptr[b] : indptr[b + 1]]
        tokens = unpack(sealed.tables, mine, torch.float32, q.dtype)
        for t in range(queries.indptr[b], queries.indptr[b + 1]):
            for head in range(q.shape[1]):
                kv_head = head // group
                kept = tokens.kept[:, kv_head]
                state.out[t, head], state.lse[t, head] = attend_one(
                    q[t, head], tokens.k[:, kv_head][kept], tokens.v[:, kv_head][kept], softmax
                )
    return state


def row_starts(heads: torch.Tensor, pages: torch.Tensor, capacity: int) -> torch.Tensor:
    """First row of each (page, head) where a head's kept tokens lie side by side, and their end.

    Args:
        heads: int32 [V, H, 2], directory entries. pages: int32 [N].
        capacity: rows set aside for a head; those of the next one begin there.

    Returns:
        int64 [N + 1, H].
    """
    starts = torch.zeros(len(pages) + 1, heads.shape[1], dtype=torch.int64)
    for head in range(heads.shape[1]):
        starts[0, head] = head * capacity
        for i, page in enumerate(pages.tolist()):
            starts[i + 1, head] = starts[i, head] + sum(head_counts(heads[page, head]))
    return starts


def extend_open(queries: Queries, opened: OpenPages, softmax: Softmax) -> AttentionState:
    """See `extend.extend_open`."""
    q, indptr = queries.q, opened.indptr
    state = empty_state(q)
    group = q.shape[1] // opened.keys.shape[2]
    for b in range(len(indptr) - 1):
        listed = slice(int(indptr[b]), int(indptr[b + 1]))
        first = opened.position[listed].long()[:, None] * PAGE_TOKENS
        position = (first + torch.arange(PAGE_TOKENS)).flatten()
        slots = opened.slots[listed].long()
        k, v = (raw[slots].double().flatten(0, 1) for raw in (opened.keys, opened.values))
        for i, t in enumerate(range(queries.indptr[b], queries.indptr[b + 1])):
            behind = queries.position[b] + i - position
            visible = behind >= 0
            if softmax.window_left >= 0:
                visible &= behind <= softmax.window_left
            for head in range(q.shape[1]):
                state.out[t, head], state.lse[t, head] = attend_one(
                    q[t, head], k[visible, head // group], v[visible, head // group], softmax
                )
    return state

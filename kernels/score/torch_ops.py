# SPDX-License-Identifier: Apache-2.0
"""Vectorised fp32 torch version, for any device: the fallback where no compiled kernel exists."""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS

LOG2_E = math.log2(math.e)


def score_open(
    q: torch.Tensor,
    lse: torch.Tensor,
    q_indptr: torch.Tensor,
    q_position: torch.Tensor,
    k_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    page_position: torch.Tensor,
    accum: torch.Tensor,
    sm_scale: float,
) -> None:
    """See :func:`sglang_diffxkv.kernels.score.score_open`."""
    kv_heads, device = k_raw.shape[2], k_raw.device
    grouped = q.float().reshape(len(q), kv_heads, -1, q.shape[2]) * (sm_scale * LOG2_E)
    grouped_lse = lse.reshape(len(q), kv_heads, -1, 1)
    token = torch.arange(PAGE_TOKENS, device=device)
    for b in range(len(indptr) - 1):
        query = slice(int(q_indptr[b]), int(q_indptr[b + 1]))
        entry = slice(int(indptr[b]), int(indptr[b + 1]))
        slot = slots[entry].long()
        position = (page_position[entry, None] * PAGE_TOKENS + token).flatten()
        keys = k_raw[slot].flatten(0, 1).float()
        scores = torch.einsum("shgd,thd->shgt", grouped[query], keys)
        later = q_position[query, None] > position
        # Select, not multiply: unwritten tokens may hold NaN.
        received = torch.where(later[:, None, None], torch.exp2(scores - grouped_lse[query]), 0)
        per_token = received.sum(0).amax(1).reshape(kv_heads, -1, PAGE_TOKENS)
        accum.index_add_(0, slot, per_token.transpose(0, 1))

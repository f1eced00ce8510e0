# SPDX-License-Identifier: Apache-2.0
"""Readable reference in float64: one sequence, page, token and query head at a time."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS


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
    kv_heads = k_raw.shape[2]
    group = q.shape[1] // kv_heads
    weights_lse = lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    for b in range(len(indptr) - 1):
        queries = range(int(q_indptr[b]), int(q_indptr[b + 1]))
        for entry in range(int(indptr[b]), int(indptr[b + 1])):
            slot, start = int(slots[entry]), int(page_position[entry]) * PAGE_TOKENS
            for h in range(kv_heads):
                for t in range(PAGE_TOKENS):
                    later = [s for s in queries if int(q_position[s]) > start + t]
                    if not later:
                        continue
                    heads = slice(h * group, (h + 1) * group)
                    scores = q[later, heads].double() @ k_raw[slot, t, h].double() * sm_scale
                    received = torch.exp(scores - weights_lse[later, heads]).sum(0)
                    accum[slot, h, t] += received.max().to(accum.dtype)


def score_decode(
    q: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    k_raw: torch.Tensor,
    table: torch.Tensor,
    raw_slot: torch.Tensor,
    accum: torch.Tensor,
    sm_scale: float,
) -> None:
    """See :func:`sglang_diffxkv.kernels.score.score_decode`."""
    for b, length in enumerate(seq_lens.tolist()):
        pages = range(-(-length // PAGE_TOKENS))
        slots = [int(raw_slot[table[b, page]]) for page in pages]
        is_open = [slot >= 0 for slot in slots]
        score_open(
            q[b : b + 1],
            lse[b : b + 1] - torch.tensor(max(length, 1)).log2(),
            torch.tensor([0, 1]),
            torch.tensor([length - 1]),
            k_raw,
            torch.tensor([0, sum(is_open)]),
            torch.tensor([slot for slot in slots if slot >= 0]),
            torch.tensor([page for page, open_ in zip(pages, is_open, strict=True) if open_]),
            accum,
            sm_scale,
        )

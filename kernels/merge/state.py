# SPDX-License-Identifier: Apache-2.0
"""Attention states: what every attention operation returns, and what is made of several."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.device import on_gpu


class AttentionState(NamedTuple):
    """Attention over some of the tokens.

    Attributes:
        out: fp32 [B, Hq, D], normalised over these tokens; 0 where nothing was attended.
        lse: fp32 [B, Hq], log2 of the sum of exp(score); -inf where nothing was attended.
    """

    out: torch.Tensor
    lse: torch.Tensor


def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of tokens; either may be empty."""
    if on_gpu(a.lse):
        from sglang_diffxkv.kernels.merge import triton  # not installed everywhere

        return triton.merge_states(a, b)
    top = torch.maximum(a.lse, b.lse)
    # Where both are empty, any finite base keeps -inf - -inf = NaN out.
    base = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weight_a, weight_b = torch.exp2(a.lse - base), torch.exp2(b.lse - base)
    total = weight_a + weight_b
    scale = torch.where(total > 0, total, torch.ones_like(total)).reciprocal()
    out = a.out * (weight_a * scale).unsqueeze(-1) + b.out * (weight_b * scale).unsqueeze(-1)
    return AttentionState(out, base + torch.log2(total))


def empty_state(q: torch.Tensor) -> AttentionState:
    """The state of no tokens, for queries [T, Hq, D]."""
    return AttentionState(
        torch.zeros_like(q, dtype=torch.float32),
        q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32),
    )


def concat_states(states: list[AttentionState]) -> AttentionState:
    """States of different queries, one after the other; at least one. A lone one is not copied."""
    if len(states) == 1:
        return states[0]
    return AttentionState(torch.cat([s.out for s in states]), torch.cat([s.lse for s in states]))

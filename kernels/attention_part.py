# SPDX-License-Identifier: Apache-2.0
"""Attention over one part of a sequence's tokens: what every attention operation returns."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.decode.part import AttentionPart, merge

__all__ = ["AttentionPart", "concat_parts", "empty_part", "merge"]


def empty_part(q: torch.Tensor) -> AttentionPart:
    """The part without tokens, for queries [T, Hq, D]."""
    return AttentionPart(
        torch.zeros_like(q, dtype=torch.float32),
        q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32),
    )


def concat_parts(parts: list[AttentionPart]) -> AttentionPart:
    """Parts of different queries, one after the other; at least one. A single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return AttentionPart(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))

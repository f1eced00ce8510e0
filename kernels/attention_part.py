# SPDX-License-Identifier: Apache-2.0
"""Attention over one part of a sequence's tokens: what every attention operation returns."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.decode.part import AttentionPart, merge

__all__ = ["AttentionPart", "empty_part", "merge"]


def empty_part(q: torch.Tensor) -> AttentionPart:
    """The part without tokens, for queries [T, Hq, D]."""
    return AttentionPart(
        torch.zeros_like(q, dtype=torch.float32),
        q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32),
    )

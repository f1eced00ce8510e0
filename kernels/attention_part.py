# SPDX-License-Identifier: Apache-2.0
"""Attention over one part of a sequence's tokens, ready to be merged with the other parts."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionPart(NamedTuple):
    """Attention of queries over some of their tokens.

    Fields:
        out: fp32 [T, Hq, D], normalised over this part's tokens; 0 where the part is empty.
        lse: fp32 [T, Hq], **base 2** logarithm of the sum of exp(score) (FlashInfer's
            convention); -inf where the part is empty.
    """

    out: torch.Tensor
    lse: torch.Tensor


def empty_part(q: torch.Tensor) -> AttentionPart:
    """The part without tokens, for queries [T, Hq, D]."""
    return AttentionPart(
        torch.zeros_like(q, dtype=torch.float32),
        q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32),
    )


def merge_parts(a: AttentionPart, b: AttentionPart) -> AttentionPart:
    """Attention over the tokens of both parts, which must not share any; either may be empty."""
    top = torch.maximum(a.lse, b.lse)
    # Both empty: subtract 0 instead of -inf, which would give NaN.
    base = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = (a.lse - base).exp2(), (b.lse - base).exp2()
    total = weight_a + weight_b
    share = torch.where(total > 0, weight_b / total, 0.0)
    return AttentionPart(torch.lerp(a.out, b.out, share[..., None]), base + total.log2())

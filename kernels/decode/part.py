# SPDX-License-Identifier: Apache-2.0
"""Attention over a part of the tokens, and merging two such parts by their LSE."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.device import on_gpu


class AttentionPart(NamedTuple):
    """Attention over some of the tokens.

    Attributes:
        out: fp32 [B, Hq, D], normalised over these tokens; 0 where nothing was attended.
        lse: fp32 [B, Hq], log2 of the sum of exp(score); -inf where nothing was attended.
    """

    out: torch.Tensor
    lse: torch.Tensor


def merge(a: AttentionPart, b: AttentionPart) -> AttentionPart:
    """Attention over the union of two disjoint sets of tokens; either may be empty."""
    if on_gpu(a.lse):
        from sglang_diffxkv.kernels.decode import triton  # not installed everywhere

        return triton.merge(a, b)
    top = torch.maximum(a.lse, b.lse)
    # Where both are empty, any finite base keeps -inf - -inf = NaN out.
    base = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weight_a, weight_b = torch.exp2(a.lse - base), torch.exp2(b.lse - base)
    total = weight_a + weight_b
    scale = torch.where(total > 0, total, torch.ones_like(total)).reciprocal()
    out = a.out * (weight_a * scale).unsqueeze(-1) + b.out * (weight_b * scale).unsqueeze(-1)
    return AttentionPart(out, base + torch.log2(total))

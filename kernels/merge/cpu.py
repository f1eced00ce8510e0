# SPDX-License-Identifier: Apache-2.0
"""Merging on a CPU: a few operations of torch, which are the readable reference, too."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import merge as ops
from sglang_diffxkv.kernels import softmax
from sglang_diffxkv.kernels.merge import AttentionState


@ops.merge_states.register("cpu")
def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    top = torch.maximum(a.lse, b.lse)
    # Where both are empty, any finite base keeps -inf - -inf = NaN out.
    base = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weight_a, weight_b = torch.exp2(a.lse - base), torch.exp2(b.lse - base)
    total = weight_a + weight_b
    scale = torch.where(total > 0, total, torch.ones_like(total)).reciprocal()
    out = a.out * (weight_a * scale).unsqueeze(-1) + b.out * (weight_b * scale).unsqueeze(-1)
    return AttentionState(out, base + torch.log2(total))


@ops.add_sinks.register("cpu")
def add_sinks(state: AttentionState, sinks: torch.Tensor) -> AttentionState:
    return softmax.add_sinks(state, sinks)

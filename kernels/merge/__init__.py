# SPDX-License-Identifier: Apache-2.0
"""Attention states, and merging those of disjoint sets of tokens by their LSE."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.dispatch import operation
from sglang_diffxkv.kernels.merge.state import AttentionState, empty_state, unwritten_state

__all__ = ["AttentionState", "add_sinks", "empty_state", "merge_states", "unwritten_state"]


@operation
def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of tokens; either may be empty."""
    return merge_states.on(a.lse)(a, b)


@operation
def add_sinks(state: AttentionState, sinks: torch.Tensor) -> AttentionState:
    """Attention over the same tokens where each head has a sink, too, which takes weight alone.

    Args:
        state: over all tokens of each query; contiguous; may be overwritten.
        sinks: fp32 [Hq], as in `kernels.softmax.Softmax`.
    """
    return add_sinks.on(state.lse)(state, sinks)

# SPDX-License-Identifier: Apache-2.0
"""Attention states, and merging those of disjoint sets of tokens by their LSE."""

from __future__ import annotations

from sglang_diffxkv.kernels.dispatch import operation
from sglang_diffxkv.kernels.merge.state import AttentionState, empty_state, unwritten_state

__all__ = ["AttentionState", "empty_state", "merge_states", "unwritten_state"]


@operation
def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of tokens; either may be empty."""
    return merge_states.on(a.lse)(a, b)

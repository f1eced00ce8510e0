# SPDX-License-Identifier: Apache-2.0
"""Attention states, and merging those of disjoint sets of tokens by their LSE."""

from sglang_diffxkv.kernels.merge.state import (
    AttentionState,
    concat_states,
    empty_state,
    merge_states,
)

__all__ = ["AttentionState", "concat_states", "empty_state", "merge_states"]

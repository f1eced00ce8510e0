# SPDX-License-Identifier: Apache-2.0
"""Attention states: what every attention operation returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionState(NamedTuple):
    """Attention over some of the tokens.

    Attributes:
        out: fp32 [B, Hq, D], normalised over these tokens; 0 where nothing was attended.
        lse: fp32 [B, Hq], log2 of the sum of exp(score); -inf where nothing was attended.
    """

    out: torch.Tensor
    lse: torch.Tensor


def empty_state(q: torch.Tensor) -> AttentionState:
    """The state of no tokens, for queries [T, Hq, D]."""
    state = unwritten_state(q)
    return AttentionState(state.out.zero_(), state.lse.fill_(-torch.inf))


def unwritten_state(
    q: torch.Tensor, *parts: int, dtype: torch.dtype = torch.float32
) -> AttentionState:
    """Room for the states of queries [T, Hq, D], of so many parts of the tokens if told.

    Args:
        dtype: of the output.
    """
    shape = (*parts, *q.shape)
    return AttentionState(
        torch.empty(shape, dtype=dtype, device=q.device),
        torch.empty(shape[:-1], dtype=torch.float32, device=q.device),
    )

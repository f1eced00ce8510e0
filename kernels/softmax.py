# SPDX-License-Identifier: Apache-2.0
"""How one layer of a model turns the products of queries and keys into weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.merge.state import AttentionState

LOG2_E = math.log2(math.e)


class Softmax(NamedTuple):
    """Parameters of a layer's softmax, which every attention kernel takes.

    Attributes:
        scale: factor of q.k.
        cap: a scaled score s becomes ``cap * tanh(s / cap)`` (Gemma 2); 0: it stays.
        window_left: how many tokens before it a query sees, as FlashInfer counts; -1: all. Layers
            with a window have open pages only: sealed ones are seen whole.
        sinks: fp32 [Hq], contiguous, a logit of each head that takes its part of the weight and
            gives nothing (gpt-oss); None: there are none. It is not scaled, and counts once: where
            the parts of a query's attention are merged (`merge.add_sinks`), not in each part.
    """

    scale: float
    cap: float = 0.0
    window_left: int = -1
    sinks: torch.Tensor | None = None

    @property
    def of_part(self) -> Softmax:
        """For a part of the tokens: without sinks."""
        return self._replace(sinks=None)

    @property
    def log2_scale(self) -> float:
        """Factor of q.k for scores in base 2."""
        return self.scale * LOG2_E

    @property
    def log2_cap(self) -> float:
        """The cap of scores in base 2."""
        return self.cap * LOG2_E


def capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Soft-capped scores; the readable reference of what kernels do."""
    return torch.tanh(scores / cap) * cap if cap else scores


def add_sinks(state: AttentionState, sinks: torch.Tensor | None) -> AttentionState:
    """Attention over the same tokens where each head has a sink, too; the readable reference.

    Args:
        state: out [T, Hq, D], base-2 lse [T, Hq], over all tokens of each query.
        sinks: as in `Softmax`.
    """
    if sinks is None:
        return state
    lse = torch.logaddexp2(state.lse, sinks * LOG2_E)
    weight = torch.exp2(state.lse - lse)  # a finite sink keeps -inf - -inf out
    return AttentionState(state.out * weight.unsqueeze(-1).to(state.out.dtype), lse)

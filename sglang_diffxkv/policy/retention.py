# SPDX-License-Identifier: Apache-2.0
"""Measured retention R: how much importance the pages that were sealed have kept, by layer."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import HIGH, LOW
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting.target import low_utility


class RetentionMeter:
    """R by layer of all that was sealed (XKV's R_i, arXiv 2412.05896).

    Counts tokens whose importance is known, sinks left out: these are kept in any case, and take so
    much of all attention that R would say little about the others. A low token keeps the utility
    that the budget solver reckons with.
    """

    def __init__(self, policy: TierPolicy, num_layers: int, device: str) -> None:
        self._policy = policy
        self._low_utility = low_utility(policy.layout.high, policy.layout.low)
        self._sums = torch.zeros(2, num_layers, dtype=torch.float64, device=device)
        """Of importances kept and of all, in units of uniform attention, in which sequences of all
        lengths are comparable."""

    @property
    def nbytes(self) -> int:
        return self._sums.nbytes

    def add(self, ctx: SealContext, tiers: torch.Tensor) -> None:
        """Take in S pages that are sealed with ``tiers`` (uint8 [S, L, H, 64])."""
        known = ~self._policy.is_sink(ctx) & (ctx.count > 0)
        weight = ctx.importance.masked_fill(~ctx.importance.isfinite(), 0)
        weight = weight * (known * ctx.context[:, None])[:, None, None]
        utility = (tiers == HIGH) + (tiers == LOW) * self._low_utility
        self._sums[0] += (weight * utility).sum((0, 2, 3))
        self._sums[1] += weight.sum((0, 2, 3))

    def by_layer(self) -> list[float | None]:
        """R of each layer; None where nothing is known."""
        return [kept / whole if whole else None for kept, whole in self._sums.T.tolist()]

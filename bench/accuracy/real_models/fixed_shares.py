# SPDX-License-Identifier: Apache-2.0
"""The static counterpart of `diffkv`: each head of each layer has as many high and low tokens."""

from __future__ import annotations

import torch

from bench.accuracy.real_models.ours import Sealed, Sealer
from bench.accuracy.real_models.reader import States
from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.policy.base import SealContext
from sglang_diffxkv.policy.methods.diffkv import DiffKVPolicy, ThresholdSettings
from sglang_diffxkv.policy.methods.sequences import sequences


class FixedShares(DiffKVPolicy):
    """Of a sequence's tokens, each head keeps those of the most importance, so many of each tier.

    What is protected comes first, and counts. An importance of NaN counts as high.

    Args:
        high, low: shares of the tokens.
    """

    def __init__(
        self,
        config: ThresholdSettings,
        layout: PageLayout,
        num_layers: int,
        high: float,
        low: float,
    ) -> None:
        super().__init__(config, layout, num_layers)
        self._high, self._kept = high, high + low

    def grade(self, ctx: SealContext) -> torch.Tensor:
        protected = self.protected(ctx)[:, None, None] | ctx.importance.isnan()
        scores = ctx.importance.masked_fill(protected, torch.inf)
        tiers = torch.empty_like(scores, dtype=torch.uint8)
        for pages in sequences(ctx):
            by_head = scores[pages].permute(1, 2, 0, 3).flatten(-2)  # [L, H, P * 64]
            order = by_head.argsort(dim=-1, descending=True, stable=True)
            place = torch.arange(order.shape[-1])
            high, kept = (round(share * len(place)) for share in (self._high, self._kept))
            code = (place < high).to(torch.uint8) + (place < kept)
            code = torch.empty_like(order, dtype=torch.uint8).scatter_(
                -1, order, code.expand_as(order)
            )
            tiers[pages] = code.unflatten(-1, (len(pages), -1)).permute(2, 0, 1, 3)
        return tiers


def seal_fixed(dynamic: Sealer, states: States) -> Sealed:
    """The prompt with the shares of tiers, and so the bytes, that `dynamic` gives all of it."""
    shares, config = dynamic.seal(states), dynamic.config
    policy = FixedShares(
        config, dynamic.store.layout, dynamic.shape.layers, shares.high, shares.low
    )
    return Sealer(config, dynamic.shape, policy).seal(states)

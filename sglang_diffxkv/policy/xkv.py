# SPDX-License-Identifier: Apache-2.0
"""Policy `xkv`: budgets by layer, in one format (XKV, arXiv 2412.05896), to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import FORMATS, HIGH, PageLayout, TierFormat
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budget import Prices, least_bytes, most_retained, rank_tokens
from sglang_diffxkv.policy.caps import full_bytes
from sglang_diffxkv.policy.plan import page_overhead
from sglang_diffxkv.policy.scoring import SampledQueries, last_queries
from sglang_diffxkv.policy.sequences import pooled, sequences
from sglang_diffxkv.policy.target import Target, raw_page_bytes

TARGET = 0.9
"""A retention that the paper's examples use, where the user sets no target."""


class XKVPolicy(TierPolicy):
    """Each layer keeps, for every head, as many tokens as the greedy gives it; the rest is dropped.

    What is kept stays in 16 bit. Scores are SnapKV's, of the last queries and pooled, as in the
    paper; budgets are the request's own. As in `snapkv`, pages that are sealed together are judged
    together, and sinks and tokens that no query has scored are kept.
    """

    name = "xkv"
    needs_scores = True
    prunes = True
    streams = False
    may_share = False
    knobs = ("target",)

    def __init__(self, config: DiffXKVConfig, layout: PageLayout, num_layers: int) -> None:
        super().__init__(config, layout, num_layers)
        self.target = Target.of(TARGET if config.target is None else config.target)
        self._raw_bytes = raw_page_bytes(layout, num_layers)
        self._overhead = num_layers * page_overhead(layout)

    @classmethod
    def formats(cls, config: DiffXKVConfig) -> tuple[TierFormat, TierFormat]:
        return FORMATS["raw"], FORMATS["raw"]

    @property
    def expected_share(self) -> float:
        if self.target.compression is None:
            return 0.5
        full = len(self.caps) * full_bytes(self.layout)
        return min(1.0, self._raw_bytes / self.target.compression / full)

    def sample(self, extend_lens: Sequence[int], n: int) -> SampledQueries:
        return last_queries(extend_lens, n)

    def grade(self, ctx: SealContext) -> torch.Tensor:
        certain = self.is_sink(ctx) | (ctx.count == 0)
        kept = torch.zeros_like(ctx.importance, dtype=torch.bool)
        for pages in sequences(ctx):
            kept[pages] = self._select(ctx.importance[pages], certain[pages])
        return kept.to(torch.uint8) * HIGH

    def _select(self, importance: torch.Tensor, certain: torch.Tensor) -> torch.Tensor:
        """Which tokens of one sequence stay.

        Args:
            importance: float32 [P, L, H, 64]. certain: bool [P, 64], what stays in any case.

        Returns:
            bool [P, L, H, 64].
        """
        layers, heads = importance.shape[1:3]
        worth = pooled(importance.permute(1, 2, 0, 3).flatten(-2))  # [L, H, P * 64]
        worth = worth.masked_fill(certain.flatten(), torch.inf)
        scores, order = worth.sort(dim=-1, descending=True, stable=True)
        # One more token for a layer is one more for each of its heads: R_i(n), XKV's gains.
        scores = scores.masked_fill(scores.isinf(), 0).double()
        gains = (scores / scores.sum((1, 2), keepdim=True).clamp(min=1e-30)).sum(1) / layers
        forced = int(certain.sum())
        gains[:, :forced] = torch.inf
        flat, places = gains.flatten().sort(descending=True, stable=True)
        ranking = rank_tokens(flat.masked_fill(flat.isinf(), 0))
        price = heads * self.layout.token_bytes(self.layout.high)
        prices = Prices(price, price, 1.0)
        if self.target.retention is not None:
            split = least_bytes(ranking, prices, self.target.retention, layers * forced)
        else:
            assert self.target.compression is not None
            allowed = self._raw_bytes / self.target.compression - self._overhead
            split = most_retained(ranking, prices, len(certain) * allowed, layers * forced)
        chosen = torch.arange(len(flat), device=flat.device) < split.high + split.low
        budgets = (places.div(gains.shape[1], rounding_mode="floor")[chosen]).bincount(
            minlength=layers
        )
        first = torch.arange(order.shape[-1], device=order.device) < budgets[:, None, None]
        kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))
        return kept.unflatten(-1, certain.shape).permute(2, 0, 1, 3)

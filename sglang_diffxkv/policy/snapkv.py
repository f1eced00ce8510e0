# SPDX-License-Identifier: Apache-2.0
"""Policy `snapkv`: each head keeps the prompt tokens that its last queries attend to most.

After SnapKV (arXiv 2404.14469), as a baseline: what is kept stays in 16 bit, the rest is dropped.
"""

from collections.abc import Sequence

import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import FORMATS, HIGH, PageLayout, TierFormat
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.caps import full_bytes
from sglang_diffxkv.policy.scoring import SampledQueries, last_queries
from sglang_diffxkv.policy.sequences import pooled, sequences


class SnapKVPolicy(TierPolicy):
    """The top `layer_caps` share of a sequence's tokens, by pooled importance, per layer and head.

    A sequence is judged on the pages of it that are sealed together: of a prompt prefilled in one
    chunk all full pages outside the window, of a longer one chunk by chunk. Pages of generated
    text, and those sealed under pressure, are judged one by one. Sinks and tokens that no query
    has scored are kept and count toward the share.

    One page may be kept in full while others lose everything, so nothing less than a full page can
    be promised for an open one.
    """

    name = "snapkv"
    needs_scores = True
    prunes = True
    streams = False
    may_share = False

    def __init__(self, config: DiffXKVConfig, layout: PageLayout, num_layers: int) -> None:
        super().__init__(config, layout, num_layers)
        if max(self.shares) == 1:
            raise ConfigError(
                f"policy {self.name!r} needs layer_caps below 1: "
                "the share of tokens that each head keeps"
            )
        self.caps = [full_bytes(layout)] * num_layers

    @classmethod
    def formats(cls, config: DiffXKVConfig) -> tuple[TierFormat, TierFormat]:
        return FORMATS["raw"], FORMATS["raw"]

    @property
    def expected_share(self) -> float:
        return sum(self.shares) / len(self.shares)

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
            importance: float32 [P, L, H, 64], of its pages in order.
            certain: bool [P, 64], tokens that stay whatever their importance.

        Returns:
            bool [P, L, H, 64].
        """
        worth = pooled(importance.permute(1, 2, 0, 3).flatten(-2))  # [L, H, P * 64]
        worth = worth.masked_fill(certain.flatten(), torch.inf)
        tokens, forced = certain.numel(), int(certain.sum())
        budgets = [max(round(share * tokens), forced) for share in self.shares]

        # Not topk, which leaves open which of equal tokens it takes: here the earlier ones.
        order = worth.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(tokens, device=worth.device)
        first = place < torch.tensor(budgets, device=worth.device)[:, None, None]
        kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))
        return kept.unflatten(-1, certain.shape).permute(2, 0, 1, 3)

# SPDX-License-Identifier: Apache-2.0
"""What `snapkv` and `xkv` share: a prompt is judged whole, by its own last queries, and once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from sglang_diffxkv.kernels.layout import FORMATS, HIGH, TierFormat
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.methods.sequences import sequences
from sglang_diffxkv.policy.scoring import SampledQueries, last_queries
from sglang_diffxkv.policy.settings import PolicySettings

_KERNEL = 7
"""Tokens that importance is averaged over, so that clusters are kept and not lone tokens."""


class PromptPolicy(TierPolicy):
    """Every head of a layer keeps the same number of tokens in 16 bit; the rest is dropped.

    A sequence is judged on the pages of it that are sealed together: of a prompt prefilled in one
    chunk all full pages outside the window, of a longer one chunk by chunk. Pages of generated
    text, and those sealed under pressure, are judged one by one. Sinks and tokens that no query
    has scored are kept and count toward the number.
    """

    needs_scores = True
    prunes = True
    streams = False
    may_share = False

    @classmethod
    def formats(cls, config: PolicySettings) -> tuple[TierFormat, TierFormat]:
        return FORMATS["raw"], FORMATS["raw"]

    def sample(self, extend_lens: Sequence[int], n: int) -> SampledQueries:
        return last_queries(extend_lens, n)

    @abstractmethod
    def budgets(self, scores: torch.Tensor, protected: int) -> torch.Tensor:
        """Tokens that each head of a layer keeps of a sequence of T tokens: int64 [L].

        Args:
            scores: float32 [L, H, T], pooled importance, descending; inf for protected tokens.
            protected: tokens that stay whatever their importance.
        """

    def grade(self, ctx: SealContext) -> torch.Tensor:
        protected = self.protected(ctx)
        kept = torch.zeros_like(ctx.importance, dtype=torch.bool)
        for pages in sequences(ctx):
            kept[pages] = self._select(ctx.importance[pages], protected[pages])
        return kept.to(torch.uint8) * HIGH

    def _select(self, importance: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
        """Which tokens of one sequence stay.

        Args:
            importance: float32 [P, L, H, 64], of its pages in order.
            protected: bool [P, 64], tokens that stay whatever their importance.

        Returns:
            bool [P, L, H, 64].
        """
        scores = pooled(importance.permute(1, 2, 0, 3).flatten(-2))  # [L, H, P * 64]
        scores = scores.masked_fill(protected.flatten(), torch.inf)
        # Not topk, which leaves open which of equal tokens it takes: here the earlier ones.
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        budgets = self.budgets(scores, int(protected.sum()))
        first = torch.arange(order.shape[-1], device=order.device) < budgets[:, None, None]
        kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))
        return kept.unflatten(-1, protected.shape).permute(2, 0, 1, 3)


def pooled(importance: torch.Tensor) -> torch.Tensor:
    """Average over neighbours, zeros beyond both ends: float32 [L, H, T], finite.

    A NaN gives its own token the highest score and leaves its neighbours as they are.
    """
    most = torch.finfo(torch.float32).max
    wrong = importance.isnan()
    pooled = torch.nn.functional.avg_pool1d(
        importance.masked_fill(wrong, 0), _KERNEL, stride=1, padding=_KERNEL // 2
    )
    # Finite, because only protected tokens may score inf.
    return pooled.clamp(max=most).masked_fill(wrong, most)

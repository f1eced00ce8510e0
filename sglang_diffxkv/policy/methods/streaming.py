# SPDX-License-Identifier: Apache-2.0
"""Policy `streaming`: attention sinks and the recent window (StreamingLLM, arXiv 2309.17453)."""

import torch

from sglang_diffxkv.kernels.layout import HIGH, PAGE_TOKENS, PRUNED
from sglang_diffxkv.policy.base import SealContext, TierPolicy


class StreamingPolicy(TierPolicy):
    """Sinks stay high; every other token is dropped once its page has left the window."""

    name = "streaming"
    prunes = True

    @property
    def expected_share(self) -> float:
        # As if every sequence were one page long: longer ones only add pages that take nothing.
        return max(self.config.sink, 1) / PAGE_TOKENS

    def grade(self, ctx: SealContext) -> torch.Tensor:
        tiers = torch.full_like(ctx.importance, PRUNED, dtype=torch.uint8)
        return tiers.masked_fill(self.is_sink(ctx)[:, None, None], HIGH)

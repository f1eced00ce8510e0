# SPDX-License-Identifier: Apache-2.0
"""Policy `diffkv`: tiers by thresholds relative to uniform attention (arXiv 2412.03131)."""

import torch

from sglang_diffxkv.kernels.layout import HIGH, LOW
from sglang_diffxkv.policy.base import SealContext, TierPolicy

# Shares of high and low tokens that α_h = 1, α_l = 0.02 leave on Llama-3-8B, roughly: at these the
# K8V4/K4V2 payload is about a quarter of bf16, as the paper's table of memory use has it.
_HIGH_SHARE, _LOW_SHARE = 0.25, 0.5


class DiffKVPolicy(TierPolicy):
    """High from α_h/N, low from α_l/N, pruned below, with N tokens in the sequence.

    1/N is the attention each token would get if all got the same. Sinks are high, and so is a token
    that no query has scored, of which nothing is known. An importance of NaN counts as high.
    """

    name = "diffkv"
    needs_scores = True
    can_demote = True

    @property
    def prunes(self) -> bool:
        return self.config.alpha_low > 0 or super().prunes

    @property
    def expected_share(self) -> float:
        high, low = (self.layout.token_bytes(t) for t in (self.layout.high, self.layout.low))
        low_share = _LOW_SHARE if self.config.alpha_low > 0 else 1 - _HIGH_SHARE
        return _HIGH_SHARE + low_share * low / high

    def grade(self, ctx: SealContext) -> torch.Tensor:
        uniform = 1 / ctx.context.clamp(min=1).to(torch.float32)[:, None, None, None]
        # Negated comparisons, so that NaN, which compares false, ends up high.
        is_high = ~(ctx.importance < self.config.alpha_high * uniform)
        is_kept = ~(ctx.importance < self.config.alpha_low * uniform)
        certain = self.is_sink(ctx) | (ctx.count == 0)
        is_high = is_high | certain[:, None, None]
        tiers = is_kept.to(torch.uint8) * LOW
        return tiers.masked_fill(is_high, HIGH)

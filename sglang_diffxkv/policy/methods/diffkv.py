# SPDX-License-Identifier: Apache-2.0
"""Policy `diffkv`: tiers by thresholds relative to uniform attention (arXiv 2412.03131)."""

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sglang_diffxkv.kernels.layout import HIGH, LOW
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.settings import CHECKED, Allowed, PolicySettings

# Shares of high and low tokens that α_h = 1, α_l = 0.02 leave on Llama-3-8B, roughly: at these the
# K8V4/K4V2 payload is about a quarter of bf16, as the paper's table of memory use has it.
_HIGH_SHARE, _LOW_SHARE = 0.25, 0.5


@dataclass(frozen=True, config=CHECKED)
class ThresholdSettings(PolicySettings):
    """Settings of policy `diffkv`."""

    alpha_high: Annotated[
        float, Field(ge=0), Allowed("a number, at least 0 and at least alpha_low")
    ] = 1.0
    """`diffkv`: high tier from this multiple of uniform attention (1 / length of the sequence)"""
    alpha_low: Annotated[float, Field(ge=0, le=1), Allowed("a number from 0 to 1")] = 0.02
    """`diffkv`: low tier from this multiple, 0 to 1, pruned below; `0` prunes nothing"""

    @model_validator(mode="after")
    def _check_alphas(self) -> Self:
        if self.alpha_high < self.alpha_low:
            raise ValueError(
                f"alpha_high ({self.alpha_high:g}) must be at least alpha_low ({self.alpha_low:g})"
            )
        return self


class DiffKVPolicy(TierPolicy):
    """High from α_h/N, low from α_l/N, pruned below, with N tokens in the sequence.

    1/N is the attention each token would get if all got the same. Sinks are high, and so is a token
    that no query has scored, of which nothing is known. An importance of NaN counts as high.
    """

    name = "diffkv"
    settings = ThresholdSettings
    needs_scores = True
    can_demote = True
    config: ThresholdSettings

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
        is_high = is_high | self.protected(ctx)[:, None, None]
        tiers = is_kept.to(torch.uint8) * LOW
        return tiers.masked_fill(is_high, HIGH)

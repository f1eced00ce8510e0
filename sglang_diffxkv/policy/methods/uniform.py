# SPDX-License-Identifier: Apache-2.0
"""Policy `uniform`: one tier for every token, as quantised KV caches have it."""

import torch

from sglang_diffxkv.kernels.layout import HIGH, TierFormat
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.settings import PolicySettings


class UniformPolicy(TierPolicy):
    """Every token in the configured high tier; nothing is scored and nothing pruned."""

    name = "uniform"
    can_shrink = False
    expected_share = 1.0

    @classmethod
    def formats(cls, config: PolicySettings) -> tuple[TierFormat, TierFormat]:
        high, _ = config.tiers.formats
        return high, high

    def grade(self, ctx: SealContext) -> torch.Tensor:
        return torch.full_like(ctx.importance, HIGH, dtype=torch.uint8)

# SPDX-License-Identifier: Apache-2.0
"""Policy `lossless`: sealed pages hold the model's own elements, bit for bit."""

import torch

from sglang_diffxkv.kernels.layout import FORMATS, HIGH, TierFormat
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.settings import PolicySettings


class LosslessPolicy(TierPolicy):
    """Every token raw: saves nothing, changes nothing; the yardstick for the others."""

    name = "lossless"
    can_shrink = False
    is_lossless = True
    expected_share = 1.0

    @classmethod
    def formats(cls, config: PolicySettings) -> tuple[TierFormat, TierFormat]:
        return FORMATS["raw"], FORMATS["raw"]

    def grade(self, ctx: SealContext) -> torch.Tensor:
        return torch.full_like(ctx.importance, HIGH, dtype=torch.uint8)
